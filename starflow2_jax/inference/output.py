"""Write generated parts to disk: PNG files with metadata, and JSON lines."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from starflow2_jax.inference.prompts import Part
from starflow2_jax.runtime import atomic, json_text

# Key of the metadata in a PNG's text chunk.
PNG_KEY = "starflow2_jax"
_SCORES = (
    "log_likelihood",
    "sampling_log_likelihood",
    "unconditional_log_likelihood",
    "delimiters",
    "truncated",
)


# The file in an output folder with the job that writes it, and its result once that is complete.
JOB_FILE = ".generate.json"


def start_job(out: epath.Path, job: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """Prepare an output folder. Return the result of the same job if the folder is complete.

    Args:
        job: everything that the output depends on, for JSON. A folder that the same job left
            unfinished is continued.
        overwrite: replace files of another job.

    Raises:
        ValueError: The folder contains other files and may not be overwritten.
    """
    atomic.remove_leftovers(out)
    stored = read_job(out) if (out / JOB_FILE).exists() else {}
    is_same = stored.get("job") == json_text.decode(json.dumps(job), "the job")
    if is_same and not overwrite and stored.get("result") is not None:
        return stored["result"]
    # A job that ended in an error before its first image leaves only its description.
    has_files = out.exists() and any(path.name != JOB_FILE for path in out.iterdir())
    has_files = has_files or stored.get("result") is not None
    if not is_same and not overwrite and has_files:
        raise ValueError(f"--out: {out} is not empty; --overwrite replaces the files in it")
    atomic.write_file(out / JOB_FILE, json.dumps({"job": job, "result": None}) + "\n")
    return None


def end_job(out: epath.Path, job: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Note that the output folder of a job is complete."""
    atomic.write_file(out / JOB_FILE, json.dumps({"job": job, "result": result}) + "\n")


def read_job(out: epath.Path) -> dict[str, Any]:
    """Return `job` and `result` of an output folder, or an empty dict if they are unreadable."""
    try:
        stored = json_text.decode((out / JOB_FILE).read_bytes(), str(out / JOB_FILE))
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) else {}


def save_png(path: epath.PathLike, pixels: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Write uint8 [H, W, 3] with `settings` as JSON in the metadata."""
    atomic.write_file(path, encode_png(pixels, settings))


def encode_png(pixels: np.ndarray, settings: Mapping[str, Any]) -> bytes:
    """Encode uint8 [H, W, 3] as PNG with `settings` as JSON in the metadata."""
    from PIL import Image, PngImagePlugin

    metadata = PngImagePlugin.PngInfo()
    metadata.add_text(PNG_KEY, json.dumps(settings))
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", pnginfo=metadata)
    return data.getvalue()


def is_of_this_package(path: epath.PathLike) -> bool:
    """Return True for a PNG that `save_png` wrote."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(epath.Path(path).read_bytes()), formats=("PNG",)) as image:
            return PNG_KEY in image.text
    except (OSError, ValueError, SyntaxError):
        return False


def part_scores(part: Part) -> dict[str, Any]:
    """Return the likelihoods of a part, without those that are None, for JSON."""
    return {name: value for name in _SCORES if (value := getattr(part, name)) is not None}


def save_row(
    out: epath.Path | None, name: str, row: Sequence[Part], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Write the images of a row as `NAME_0.png`, `NAME_1.png`, ...; return its parts for JSON.

    If images of the prompt were `resized`, every part says so.
    """
    entries, image_count = [], 0
    for part in row:
        entry: dict[str, Any] = {"type": part.kind, **part_scores(part)}
        entry |= {name: settings[name] for name in ("resized",) if name in settings}
        if part.kind == "text":
            entry["text"] = part.text
        else:
            if part.image is None or out is None:
                raise ValueError(
                    "an image was generated, but it cannot be saved: give --out, and --fae if the "
                    "model has no codec"
                )
            path = out / f"{name}_{image_count}.png"
            metadata = {**settings, **part_scores(part), "row": name, "number": image_count}
            save_png(path, part.image, metadata)
            entry["image"] = str(path)
            image_count += 1
        entries.append(entry)
    return entries


def options_dict(options: Any) -> dict[str, Any]:
    """Return generation options for JSON, without the sample numbers."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name != "samples"}
