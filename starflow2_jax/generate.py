"""Draw images and write text with a trained model; a flow of images alone draws.

python -m starflow2_jax.generate --prompt 'a red circle above a blue square' --out pictures/
python -m starflow2_jax.generate --model runs/stage3 --prompt 'a red circle' --n 4 --guidance 3 --out pictures/
python -m starflow2_jax.generate --model runs/stage3 --image in.png --prompt 'make the circle blue' --out edited/
python -m starflow2_jax.generate --model runs/stage3 --chat chat.json --temperature 0.7 --out answer/
python -m starflow2_jax.generate --model runs/stage3 --geneval evaluation_metadata.jsonl --out geneval/
python -m starflow2_jax.generate --model runs/tiny --label 'red circle' --n 8 --guidance 1 --out pictures/

Without --model it is the small STARFlow2 that comes with the package, which knows coloured shapes.
A STARFlow2 answers in free form: text, pictures, or both; where only prompts are given, it draws one
picture. Without --out it only writes text. A chat file is a JSON list of {role, content: [{type:
text, text} or {type: image, image: path}]}, a batch file has one such list a line.

In python: load(path).generate([[Path("photo.png"), "what is it?"]], images=0, max_tokens=32).
"""  # noqa: E501

import json
import time
from typing import Any

from absl import flags
from etils import epath

from starflow2_jax import config
from starflow2_jax.mesh import make_mesh
from starflow2_jax.runtime import allocator, cli

SHIPPED = "pretrained/starflow2_tiny"

# Flags that only one of the two kinds of model has.
_FLOW_ONLY = ("label",)
_INTERLEAVED_ONLY = (
    *("image", "chat", "batch", "geneval", "images", "max_tokens", "top_k", "top_p", "stop"),
    *("best_of", "best_of_gain", "null", "image_temperature", "cache", "vlm", "fae"),
)


def load(path: str, **where: Any) -> Any:
    """A trained model from a workdir, a step in it, or a model folder.

    Args:
        where: `mesh`, `layout`; of a STARFlow2 `vlm` and `fae`, see `generation.model.load`.

    Returns:
        of a STARFlow2 a model with `generate(prompts, ...)` and `log_likelihood(rows)`; else what
        `inference.flow_sampler` draws from.

    Raises:
        FileNotFoundError, ValueError: as `generation.model.load`.
    """
    from starflow2_jax.inference import flow_sampler

    return flow_sampler.load(path, **where)


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    own = {"flag_values": values}
    flags.DEFINE_string("model", SHIPPED, "workdir, step in it, or model folder", **own)
    flags.DEFINE_string("vlm", None, "folder of the VLM, where the run's is elsewhere", **own)
    flags.DEFINE_string("fae", None, "folder of the codec, where the run's is elsewhere", **own)
    flags.DEFINE_string("out", None, "folder for the pictures, not written over", **own)
    flags.DEFINE_bool("overwrite", False, "replace what --out names", **own)
    flags.DEFINE_multi_string("prompt", [], "what the user says; may be repeated", **own)
    flags.DEFINE_multi_string("image", [], "shown before every prompt; may be repeated", **own)
    flags.DEFINE_string("chat", None, "JSON file of a chat to continue", **own)
    flags.DEFINE_string("batch", None, "file with one chat a line", **own)
    flags.DEFINE_string("geneval", None, "GenEval's metadata; --out becomes its tree", **own)
    flags.DEFINE_multi_string("label", [], "class name or number; may be repeated", **own)
    flags.DEFINE_integer("n", None, "samples of each; 4 of pictures, 1 of answers", 1, **own)
    flags.DEFINE_integer("seed", 0, "of the noise", 0, **own)
    flags.DEFINE_float("guidance", None, "weight; the run's own by default", **own)
    flags.DEFINE_string("rule", None, "guidance rule; the run's own by default", **own)
    flags.DEFINE_enum("null", "text", ("text", "all"), "guidance against no words, or no words and "
                      "pictures of the user", **own)  # fmt: skip
    flags.DEFINE_float("temperature", None, "of tokens, 0 for the likeliest (default); of a flow's "
                       "attention, 1 by default", **own)  # fmt: skip
    flags.DEFINE_integer("top_k", 0, "draw from so many tokens, 0 for all", **own)
    flags.DEFINE_float("top_p", 1.0, "draw from tokens that hold this share", **own)
    flags.DEFINE_multi_string("stop", [], "text at which an answer ends; may be repeated", **own)
    flags.DEFINE_integer("max_tokens", 256, "text tokens of an answer at most", **own)
    flags.DEFINE_integer("images", None, "exactly so many pictures in an answer", **own)
    flags.DEFINE_float("image_temperature", None, "factor on the noise of pictures; the run's own "
                       "by default", **own)  # fmt: skip
    flags.DEFINE_integer("best_of", 1, "of so many samples keep the likeliest", **own)
    flags.DEFINE_bool("best_of_gain", False, "likeliest against what it is without the prompt",
                      **own)  # fmt: skip
    flags.DEFINE_integer("cache", None, "positions; as many as needed by default", **own)
    flags.DEFINE_integer("jacobi", 0, "tokens of a Jacobi chunk; 0 samples in sequence", **own)
    flags.DEFINE_float("threshold", 1e-3, "where a Jacobi chunk has settled", **own)
    flags.DEFINE_bool(
        "denoise", None, "a score step after sampling; the run's own by default", **own
    )
    flags.DEFINE_string("layout", "dp", "where weights live", **own)
    flags.DEFINE_string("mesh", None, "such as fsdp=8; one device by default", **own)
    flags.DEFINE_bool("json", False, "print the result as JSON", **own)


def main(words: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """See the module's docstring."""
    from starflow2_jax.inference.api import STARFlow2

    if words:
        raise ValueError(f"unexpected argument {words[0]!r}")
    out = epath.Path(values.out) if values.out else None
    if out is not None and out.exists() and any(out.iterdir()) and not values.overwrite:
        raise ValueError(f"--out: {out} is not empty; --overwrite replaces pictures in it")
    mesh = make_mesh(values.mesh) if values.mesh else None
    where = {"vlm": values.vlm or "", "fae": values.fae or ""}
    model = load(values.model, mesh=mesh, layout=values.layout, **where)
    ours = isinstance(model, STARFlow2)
    for name in _FLOW_ONLY if ours else _INTERLEAVED_ONLY:
        if values[name].present and values[name].value != values[name].default:
            raise ValueError(f"--{name}: {values.model} is a model that does not take it")
    if ours:
        _answer(model, out, values)
    else:
        _draw(model, out, values)


# -------------------------------------------------------------------------- interleaved answers


def _answer(model: Any, out: epath.Path | None, values: flags.FlagValues) -> None:
    from starflow2_jax.inference import generate, options as options_lib, output, prompts

    given = [name for name in ("prompt", "chat", "batch", "geneval") if values[name].value]
    if len(given) > 1 or not (given or values.image):
        raise ValueError(
            "give one of --prompt (with or without --image), --chat, --batch, --geneval"
        )
    kind = given[0] if given else "prompt"
    draws = kind == "geneval" or (kind == "prompt" and not values.image and values.images is None)
    if values.geneval and out is None:
        raise ValueError("--geneval: --out is needed")
    metadata = []
    if kind == "geneval":
        metadata = output.read_geneval(values.geneval)
        rows: list[Any] = [row["prompt"] for row in metadata]
    elif kind == "chat":
        rows = [prompts.read_chat(values.chat)]
    elif kind == "batch":
        rows = prompts.read_batch(values.batch)
    else:
        shown = [epath.Path(path).read_bytes() for path in values.image]
        rows = [[*shown, text] for text in values.prompt] or [shown]
    draws = draws and out is not None
    options = options_lib.make_options(_options(model, values, draws, out is not None))
    began = time.perf_counter()
    answers = generate.generate_many(model, rows, options)
    note = {"model": values.model, "source": model.source, **output.settings(options)}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if kind == "geneval":
        count = output.save_geneval(out, metadata, answers, note)
        seconds = time.perf_counter() - began
        result = {"written": count, "out": str(out), "seconds": seconds}
        print(json.dumps(result) if values.json else f"{count} pictures in {seconds:.1f} s: {out}")
        return
    found = []
    for i, samples in enumerate(answers):
        said = {"prompt": values.prompt[i]} if values.prompt else {}
        for k, row in enumerate(samples):
            found.append(output.save_row(out, f"{i:05}_{k:02}", row, {**note, **said}))
            if not values.json:
                _print_row(found[-1], len(rows) * len(samples) > 1, i, k)
    if out is not None:
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (out / "results.jsonl").write_text(lines)
    seconds = time.perf_counter() - began
    if values.json:
        print(json.dumps({"rows": found, "seconds": seconds}))
    else:
        pictures = sum(part["type"] == "image" for row in found for part in row)
        print(f"{len(found)} answers with {pictures} pictures in {seconds:.1f} s")


def _options(model: Any, values: flags.FlagValues, draws: bool, pictures: bool) -> dict[str, Any]:
    from starflow2_jax.inference import options as options_lib
    from starflow2_jax.inference.inverse import Jacobi

    images = 1 if draws else values.images if pictures else 0
    names = ("guidance", "denoise", "image_temperature")
    given_by_flag = {name: values[name].value for name in names} | {"rule": values.rule or None}
    drawing = options_lib.sampling_defaults(model.cfg["sample"], **given_by_flag)
    # Words are drawn without guidance: for them alone, no second branch.
    if images == 0 and drawing["guidance"] > 0:
        drawing["guidance"] = 0.0
    found = {
        **drawing,
        "n": values.n or (4 if draws else 1),
        "seed": values.seed,
        "null": values.null,
        "temperature": values.temperature or 0.0,
        "top_k": values.top_k,
        "top_p": values.top_p,
        "stop": tuple(values.stop),
        "max_tokens": 0 if draws else values.max_tokens,
        "images": images,
        "best_of": values.best_of,
        "best_of_gain": values.best_of_gain,
        "cache": values.cache,
        "jacobi": Jacobi(values.jacobi, values.threshold) if values.jacobi else None,
    }
    if values.images and not pictures:
        raise ValueError("--images: --out is needed to keep them")
    return found


def _print_row(row: list[dict[str, Any]], numbered: bool, i: int, k: int) -> None:
    if numbered:
        print(f"--- prompt {i}, sample {k}")
    for part in row:
        cut = " [cut off: --max_tokens]" if part["truncated"] else ""
        print((part["text"] if part["type"] == "text" else f"[{part['image']}]") + cut)


# ------------------------------------------------------------------------------------------ flows


def _draw(model: Any, out: epath.Path | None, values: flags.FlagValues) -> None:
    import numpy as np

    from starflow2_jax.inference import flow_sampler as generation, output
    from starflow2_jax.inference.inverse import Jacobi
    from starflow2_jax.training.logging import image_grid

    if out is None:
        raise ValueError("--out is needed")
    if values.prompt and values.label:
        raise ValueError("--prompt and --label: give one of them")
    sample, n = model.cfg["sample"], values.n or 4
    guidance = sample["guidance"] if values.guidance is None else values.guidance
    heat = 1.0 if values.temperature is None else values.temperature
    for name, value, low in (("guidance", guidance, 0.0), ("temperature", heat, 1e-3)):
        if not value >= low:
            raise ValueError(f"--{name}={value}: expected at least {low:g}")
    sampling = generation.FlowSampling(
        guidance=guidance,
        rule=values.rule or sample["guidance_rule"],
        temperature=heat,
        jacobi=Jacobi(values.jacobi, values.threshold) if values.jacobi else None,
        denoise=sample["denoise"] if values.denoise is None else values.denoise,
        seed=values.seed,
        batch=min(16, n * max(len(values.prompt) + len(values.label), 1)),
    )
    wanted = values.prompt or values.label or [""]
    captions = [caption for caption in wanted for _ in range(n)]
    given: dict[str, Any] = {}
    if values.prompt:
        given["prompts"] = captions
    if values.label:
        given["labels"] = [_class_number(label, model.classes) for label in captions]
    began = time.perf_counter()
    drawn = generation.generate(model, len(captions), **given, sampling=sampling)
    seconds = time.perf_counter() - began
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": str(values.model), "source": model.source, "seed": values.seed,
        "guidance": guidance, "rule": sampling.rule, "temperature": heat,
        "jacobi": values.jacobi, "threshold": values.threshold, "denoise": sampling.denoise,
    }  # fmt: skip
    if drawn.dtype != np.uint8:
        path = out / "latents.npy"
        path.write_bytes(_npy(drawn))
        _say({"written": [str(path)], "seconds": seconds}, values)
        return
    written = []
    for i, (pixels, caption) in enumerate(zip(drawn, captions)):
        path = out / f"{i:05d}.png"
        output.save_png(path, pixels, {**settings, "caption": caption, "index": i})
        written.append(str(path))
    image_grid.save_grid(out / "grid.png", drawn, captions if any(captions) else None)
    _say({"written": [*written, str(out / "grid.png")], "seconds": seconds}, values)


def _class_number(label: str, classes: tuple[str, ...]) -> int:
    if label.lstrip("-").isdigit():
        return int(label)
    if label not in classes:
        known = ", ".join(classes[:12]) or "none are known by name"
        near = config.nearest(label, classes)
        raise ValueError(f"--label: unknown class {label!r}{near}; classes: {known}")
    return classes.index(label)


def _npy(array: Any) -> bytes:
    import io

    import numpy as np

    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def _say(result: dict[str, Any], values: flags.FlagValues) -> None:
    if values.json:
        print(json.dumps(result))
        return
    print(f"{len(result['written'])} files in {result['seconds']:.1f} s: {result['written'][-1]}")


if __name__ == "__main__":
    define(flags.FLAGS)
    allocator.keep_freed_memory()
    cli.use_compilation_cache()
    cli.run(main)
