"""Draw images from a trained flow, or measure how likely it finds them.

python -m starflow2_jax.generate --model runs/tiny --label 'red circle' --n 8 --guidance 1 --out pictures/
python -m starflow2_jax.generate --model runs/starflow --prompt 'a red circle' --n 4 --seed 1 --out pictures/
python -m starflow2_jax.generate --model runs/tiny --n 16 --jacobi 16 --threshold 1e-3 --out pictures/
"""  # noqa: E501

import json
import time
from typing import Any

from absl import flags
from etils import epath

from starflow2_jax import allocator, command, config
from starflow2_jax import mesh as meshes

_MODEL = flags.DEFINE_string("model", None, "workdir, step in it, or model folder")
_OUT = flags.DEFINE_string("out", None, "folder for the pictures, not written over")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace what --out names")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "caption; may be repeated")
_LABEL = flags.DEFINE_multi_string("label", [], "class name or number; may be repeated")
_N = flags.DEFINE_integer("n", 4, "images of each prompt or label", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0)
_GUIDANCE = flags.DEFINE_float("guidance", None, "weight; the run's own by default", lower_bound=0)
_RULE = flags.DEFINE_string("rule", None, "guidance rule; the run's own by default")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "of attention", lower_bound=1e-3)
_JACOBI = flags.DEFINE_integer("jacobi", 0, "tokens of a Jacobi chunk; 0 samples in sequence")
_THRESHOLD = flags.DEFINE_float("threshold", 1e-3, "where a Jacobi chunk has settled")
_DENOISE = flags.DEFINE_bool("denoise", True, "a score step after sampling")
_LAYOUT = flags.DEFINE_string("layout", "dp", "where weights live")
_MESH = flags.DEFINE_string("mesh", None, "such as fsdp=8; one device by default")
_JSON = flags.DEFINE_bool("json", False, "print the result as JSON")


def main(words: list[str]) -> None:
    """See the module's docstring."""
    import numpy as np
    from PIL import Image, PngImagePlugin

    from starflow2_jax.generation import model as generation
    from starflow2_jax.generation.inverse import Jacobi
    from starflow2_jax.training import pictures

    if words:
        raise ValueError(f"unexpected argument {words[0]!r}")
    if not (_MODEL.value and _OUT.value):
        raise ValueError("--model and --out are needed")
    if _PROMPT.value and _LABEL.value:
        raise ValueError("--prompt and --label: give one of them")
    out = epath.Path(_OUT.value)
    if out.exists() and any(out.iterdir()) and not _OVERWRITE.value:
        raise ValueError(f"--out: {out} is not empty; --overwrite replaces pictures in it")
    mesh = meshes.make_mesh(_MESH.value) if _MESH.value else None
    model = generation.load(_MODEL.value, mesh, _LAYOUT.value)
    sample = model.cfg["sample"]
    guidance = sample["guidance"] if _GUIDANCE.value is None else _GUIDANCE.value
    sampling = generation.Sampling(
        guidance=guidance,
        rule=_RULE.value or sample["rule"],
        temperature=_TEMPERATURE.value,
        jacobi=Jacobi(_JACOBI.value, _THRESHOLD.value) if _JACOBI.value else None,
        denoise=_DENOISE.value,
        seed=_SEED.value,
        batch=min(16, _N.value * max(len(_PROMPT.value) + len(_LABEL.value), 1)),
    )
    wanted = _PROMPT.value or _LABEL.value or [""]
    captions = [caption for caption in wanted for _ in range(_N.value)]
    given: dict[str, Any] = {}
    if _PROMPT.value:
        given["prompts"] = captions
    if _LABEL.value:
        given["labels"] = [_class_number(label, model.classes) for label in captions]
    began = time.perf_counter()
    drawn = generation.generate(model, len(captions), **given, sampling=sampling)
    seconds = time.perf_counter() - began
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": str(_MODEL.value), "source": model.source, "seed": _SEED.value,
        "guidance": guidance, "rule": sampling.rule, "temperature": _TEMPERATURE.value,
        "jacobi": _JACOBI.value, "threshold": _THRESHOLD.value, "denoise": _DENOISE.value,
    }  # fmt: skip
    if drawn.dtype != np.uint8:
        path = out / "latents.npy"
        path.write_bytes(_npy(drawn))
        _say({"written": [str(path)], "seconds": seconds})
        return
    written = []
    for i, (pixels, caption) in enumerate(zip(drawn, captions)):
        note = PngImagePlugin.PngInfo()
        note.add_text("starflow2_jax", json.dumps({**settings, "caption": caption, "index": i}))
        path = out / f"{i:05d}.png"
        with path.open("wb") as file:
            Image.fromarray(pixels).save(file, "PNG", pnginfo=note)
        written.append(str(path))
    pictures.save_grid(out / "grid.png", drawn, captions if any(captions) else None)
    _say({"written": [*written, str(out / "grid.png")], "seconds": seconds})


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


def _say(result: dict[str, Any]) -> None:
    if _JSON.value:
        print(json.dumps(result))
        return
    print(f"{len(result['written'])} files in {result['seconds']:.1f} s: {result['written'][-1]}")


if __name__ == "__main__":
    allocator.keep_freed_memory()
    command.run(main)
