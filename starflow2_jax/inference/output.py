"""Generated parts as files: pictures that say how they were made, GenEval's tree, lines of JSON."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from starflow2_jax.inference.prompts import Part

# The name of the entry in a PNG's text.
NOTE = "starflow2_jax"


def save_png(path: epath.PathLike, pixels: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Writes uint8 [H, W, 3] with `settings` as JSON in its metadata."""
    from PIL import Image, PngImagePlugin

    note = PngImagePlugin.PngInfo()
    note.add_text(NOTE, json.dumps(settings))
    with epath.Path(path).open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG", pnginfo=note)


def read_settings(path: epath.PathLike) -> dict[str, Any]:
    """What `save_png` wrote beside the pixels; ValueError where there is nothing."""
    from PIL import Image

    with Image.open(epath.Path(path).open("rb"), formats=("PNG",)) as image:
        text = getattr(image, "text", {}).get(NOTE)
    if text is None:
        raise ValueError(f"{path}: its metadata hold no {NOTE}")
    return json.loads(text)


def nats(part: Part) -> dict[str, Any]:
    """A part's figures for JSON."""
    names = (
        "log_likelihood",
        "sampling_log_likelihood",
        "unconditional_log_likelihood",
        "delimiters",
        "truncated",
    )
    return {name: value for name in names if (value := getattr(part, name)) is not None}


def save_row(
    out: epath.Path | None, name: str, row: Sequence[Part], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row's parts for JSON; images as `NAME_0.png`, `NAME_1.png`, ... in `out`.

    Raises:
        ValueError: an image without pixels, as the model has no codec.
    """
    found, number = [], 0
    for part in row:
        entry: dict[str, Any] = {"type": part.kind, **nats(part)}
        if part.kind == "text":
            entry["text"] = part.text
        else:
            if part.image is None or out is None:
                raise ValueError("an image was drawn, but there is no codec (--fae) or no --out")
            path = out / f"{name}_{number}.png"
            save_png(path, part.image, {**settings, **nats(part), "row": name, "number": number})
            entry["image"], number = str(path), number + 1
        found.append(entry)
    return found


def read_geneval(path: epath.PathLike) -> list[dict[str, Any]]:
    """The prompts of GenEval's `evaluation_metadata.jsonl`, a JSON object with `prompt` a line.

    Raises:
        ValueError: another kind of line, named by its number.
    """
    found = []
    for number, line in enumerate(epath.Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"{path}, line {number}: expected an object with a text `prompt`")
        found.append(row)
    if not found:
        raise ValueError(f"{path}: no prompt in it")
    return found


def save_geneval(
    out: epath.Path,
    metadata: Sequence[Mapping[str, Any]],
    samples: Iterable[Sequence[Sequence[Part]]],
    settings: Mapping[str, Any],
) -> int:
    """GenEval's tree: `00000/metadata.jsonl` and `00000/samples/00000.png` of every prompt.

    `settings.json` beside them says how they were made, and that no prompt was rewritten.

    Returns:
        the number of pictures.
    """
    count = 0
    (out / "settings.json").write_text(json.dumps({**settings, "rewrite": False}, indent=2) + "\n")
    for index, (row, drawn) in enumerate(zip(metadata, samples)):
        folder = out / f"{index:05}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        for k, parts in enumerate(drawn):
            image = next(part for part in parts if part.kind == "image")
            note = {**settings, **nats(image), "prompt": row["prompt"], "sample": k}
            save_png(folder / "samples" / f"{k:05}.png", image.image, note)
            count += 1
    return count


def settings(options: Any) -> dict[str, Any]:
    """Options as JSON holds them."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name != "samples"}
