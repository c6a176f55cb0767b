"""The commands that the soak test kills and whose inputs it damages."""

import dataclasses

from soak.assets import EXPERIMENT


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, the assets that it reads, and what it writes."""

    module: str
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]  # names, or ASSET=NAME to copy it under another name
    outputs: tuple[str, ...] = ()
    # Assets to put at outputs before the command starts, by output.
    before: tuple[tuple[str, str], ...] = ()
    # Folders whose files are damaged; empty: the case is only killed.
    damaged: tuple[str, ...] = ()
    is_killed: bool = True


def _case(command: str, inputs: str, outputs: str = "", *, damaged: str = "", **options) -> Case:
    module, *arguments = command.split()
    return Case(
        f"starflow2_jax.{module}" if "." not in module else module,
        tuple(arguments),
        tuple(inputs.split()),
        tuple(outputs.split()),
        damaged=tuple(damaged.split()),
        **options,
    )


def _read(command: str, inputs: str, outputs: str = "", damaged: str = "") -> Case:
    """Return a case whose inputs are damaged, all of them unless some are named."""
    return _case(command, inputs, outputs, damaged=damaged or inputs, is_killed=False)


_TRAIN = f"train --config {EXPERIMENT} --workdir run"
_LATENTS = "prepare latents --data parts/data --fae parts/fae --out latents"
_PETS = "prepare import --format webdataset --source sources/pets.tar --label caption"
_FLOW = "generate --model model --label red --n 2 --seed 3 --out images"
_ANSWER = "generate --model starflow2 --image sources/pets/0.png --prompt what"
_DRAW = "generate --model starflow2 --prompt circle --n 2 --out images --json"

CASES = {
    "train": _case(_TRAIN, f"shapes {EXPERIMENT}", "run"),
    "import tar": _case(f"{_PETS} --out pets", "sources", "pets"),
    "import tar --overwrite": _case(
        f"{_PETS} --out pets --overwrite", "sources", "pets", before=(("pets", "shapes_old"),)
    ),
    "import folder": _case(
        "prepare import --format folder --source sources/pets --out pets", "sources", "pets"
    ),
    "import llava": _case(
        "prepare import --format llava --source sources/talks.jsonl --image_root sources/pets "
        "--out talks",
        "sources",
        "talks",
    ),
    "show": _case("prepare show --data shapes --out sheet.png", "shapes", "sheet.png"),
    "index": _case(
        "prepare index --data parts/data --tokenizer parts/tokenizer --row_length 256 "
        "--image_tokens 4",
        "parts",
        "parts/data",
    ),
    "tokenizer": _case(
        "prepare tokenizer --data parts/data --vocabulary 300 --out words", "parts", "words"
    ),
    "latents": _case(_LATENTS, "parts", "latents"),
    "latents --overwrite": _case(
        f"{_LATENTS} --overwrite", "parts latents", "latents", before=(("latents", "latents"),)
    ),
    "export": _case("convert export --model run --out model", "run", "model"),
    "export --overwrite": _case(
        "convert export --model run --out model --overwrite",
        "run",
        "model",
        before=(("model", "model_old"),),
    ),
    "export --public": _case("convert export --model run --public --out public", "run", "public"),
    "convert tarflow": _case(
        "convert tarflow public --options public/options.yaml --out model", "public", "model"
    ),
    "export starflow2": _case(
        "convert export --model parts/run --out starflow2", "parts", "starflow2"
    ),
    "export starflow2 --overwrite": _case(
        "convert export --model parts/run --out starflow2 --overwrite",
        "parts",
        "starflow2",
        before=(("starflow2", "model_old"),),
    ),
    "generate flow": _case(_FLOW, "model", "images"),
    "generate flow --overwrite": _case(
        f"{_FLOW} --overwrite", "model", "images", before=(("images", "sources"),)
    ),
    "generate starflow2": _case(_DRAW, "starflow2", "images"),
    "generate geneval": _case(
        "generate --model starflow2 --bench geneval --prompts sources/geneval.jsonl --n 1 "
        "--out geneval",
        "starflow2 sources",
        "geneval",
    ),
    "likelihood": _case(
        "evaluate likelihood --model run --data shapes --out likelihood.json",
        "run shapes",
        "likelihood.json",
    ),
    "evaluate codec": _case(
        "evaluate codec --model parts/fae --data parts/data --out codec.json --pictures 4",
        "parts",
        "codec.json codec.png",
    ),
    "evaluate all": _case(
        "evaluate all --model starflow2 --n 1 --only generation --out shapes_page",
        "starflow2",
        "shapes_page",
    ),
    "report": _case("evaluate report --workdir run", "run shapes", "run/report.html"),
    "ablations": _case("soak.small_ablation table", EXPERIMENT, "table"),
    # These are only damaged.
    "resume": _read(_TRAIN, f"shapes {EXPERIMENT} half_run=run", "run", "run shapes"),
    "verify run": _read("convert verify --workdir run --json", "run", "", "run/checkpoints"),
    "verify starflow2": _read("convert verify --model starflow2 --json", "starflow2"),
    "show run": _read("convert show --model run --json", "run"),
    "draw model": _read(_FLOW, "model", "images"),
    "draw run": _read(_FLOW.replace("--model model", "--model run"), "run", "images"),
    "draw starflow2": _read(_DRAW, "starflow2", "images"),
    "answer": _read(_ANSWER, "starflow2 sources", "", "starflow2"),
    "export run": _read("convert export --model run --out model", "run", "model"),
    "export parts": _read(
        "convert export --model parts/run --out starflow2",
        "parts",
        "starflow2",
        "parts/run parts/vlm parts/fae",
    ),
    "export model": _read("convert export --model starflow2 --out other", "starflow2", "other"),
    "likelihood run": _read(
        "evaluate likelihood --model run --data shapes --out likelihood.json",
        "run shapes",
        "likelihood.json",
    ),
    "understanding": _read(
        "evaluate understanding --model parts/vlm --data parts/data --rows 4 --json",
        "parts",
        "",
        "parts/vlm parts/data",
    ),
    "codec": _read(
        "evaluate codec --model parts/fae --data parts/data --out codec.json --pictures 4",
        "parts",
        "codec.json codec.png",
        "parts/fae parts/data",
    ),
    "report of run": _read("evaluate report --workdir run", "run shapes", "run/report.html", "run"),
    "validate": _read("prepare validate --data shapes --json", "shapes"),
    "verify data": _read("prepare verify --data shapes --json", "shapes"),
    "stats": _read("prepare stats --data shapes --json", "shapes"),
    "sheet": _read("prepare show --data shapes --out sheet.png", "shapes", "sheet.png"),
    "resume latents": _read(
        "prepare latents --data wide --fae parts/fae --out latents",
        "wide parts half_latents=latents",
        "latents",
        "latents wide parts/fae",
    ),
    "use index": _read(
        "prepare index --data indexed/data --tokenizer indexed/tokenizer --row_length 256 "
        "--image_tokens 4 --json",
        "indexed",
    ),
}
