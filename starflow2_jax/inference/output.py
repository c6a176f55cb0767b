"""Write generated parts to disk: PNG files with metadata, JSON lines, and GenEval's folder tree."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from starflow2_jax.inference.prompts import Part

# Key of the metadata in a PNG's text chunk.
PNG_KEY = "starflow2_jax"
_SCORES = (
    "log_likelihood",
    "sampling_log_likelihood",
    "unconditional_log_likelihood",
    "delimiters",
    "truncated",
)


def save_png(path: epath.PathLike, pixels: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Write uint8 [H, W, 3] with `settings` as JSON in the metadata."""
    from PIL import Image, PngImagePlugin

    metadata = PngImagePlugin.PngInfo()
    metadata.add_text(PNG_KEY, json.dumps(settings))
    with epath.Path(path).open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG", pnginfo=metadata)


def part_scores(part: Part) -> dict[str, Any]:
    """Return the likelihoods of a part, without those that are None, for JSON."""
    return {name: value for name in _SCORES if (value := getattr(part, name)) is not None}


def save_row(
    out: epath.Path | None, name: str, row: Sequence[Part], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Write the images of a row as `NAME_0.png`, `NAME_1.png`, ...; return its parts for JSON."""
    entries, image_count = [], 0
    for part in row:
        entry: dict[str, Any] = {"type": part.kind, **part_scores(part)}
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


def read_geneval(path: epath.PathLike) -> list[dict[str, Any]]:
    """Read GenEval's `evaluation_metadata.jsonl`, one JSON object with a `prompt` per line."""
    from starflow2_jax.data import untrusted

    rows = []
    for number, line in untrusted.read_lines(path):
        location = f"{path}, line {number + 1}"
        row = untrusted.decode_json(line, location)
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"{location}: expected an object with a text `prompt`")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file contains no prompt")
    return rows


def save_geneval(
    out: epath.Path,
    metadata: Sequence[Mapping[str, Any]],
    samples: Iterable[Sequence[Sequence[Part]]],
    settings: Mapping[str, Any],
) -> int:
    """Write GenEval's tree, `00000/metadata.jsonl` and `00000/samples/00000.png`; count its images.

    `settings.json` records the options, and that no prompt was rewritten.
    """
    count = 0
    (out / "settings.json").write_text(json.dumps({**settings, "rewrite": False}, indent=2) + "\n")
    for index, (row, prompt_samples) in enumerate(zip(metadata, samples)):
        folder = out / f"{index:05}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        for k, parts in enumerate(prompt_samples):
            part = next(part for part in parts if part.kind == "image")
            note = {**settings, **part_scores(part), "prompt": row["prompt"], "sample": k}
            save_png(folder / "samples" / f"{k:05}.png", part.image, note)
            count += 1
    return count


def options_dict(options: Any) -> dict[str, Any]:
    """Return generation options for JSON, without the sample numbers."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name != "samples"}
