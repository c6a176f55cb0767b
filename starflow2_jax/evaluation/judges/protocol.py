"""The questions that a benchmark asks its judge about an item, and the scores of the replies.

The protocols of this folder are restated from the benchmarks' own evaluators. Where those guess,
skip or crash, a reply is counted as unparsable instead: GEdit-Bench draws a random score, ImgEdit
drops the item.
"""

import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from starflow2_jax.data import untrusted

Item = Mapping[str, Any]
# The numbers that a reply gives, None if they cannot be read.
Scores = list[float] | None


@dataclass(frozen=True)
class Picture:
    """An image file as a request sends it."""

    path: Path
    jpeg: bool = False  #: encoded again, as JPEG; otherwise the bytes of the file
    quality: int = 75  #: of that JPEG
    media_type: str = "image/png"  #: that the benchmark names for the bytes of the file
    size_of: Path | None = None  #: scaled to the size of this image
    max_side: int = 0  #: scaled down to this side
    detail: str = ""  #: value of the field of that name
    label: str = ""  #: text before the picture


@dataclass(frozen=True)
class Question:
    """One request about an item."""

    name: str
    messages: tuple[tuple[str, str], ...]  #: (role, text); the last one is followed by the pictures
    pictures: tuple[Picture, ...]
    parse: Callable[[str], Scores] | None = None  #: where it differs from the protocol's


@dataclass(frozen=True)
class Protocol:
    """A benchmark's way to score a tree of images."""

    items: Callable[[Sequence[Path]], list[Item]]  #: from the files of prompts
    name: Callable[[Item], str]
    files: Callable[[Item, Path, Path], list[Path]]  #: from item, tree and folder of sources
    questions: Callable[[Item, list[Path], Any], list[Question]]  #: from item, files and prompts
    prompts: Callable[[Path], Any]  #: from the checkout of the benchmark
    parse: Callable[[str], Scores]
    score: Callable[[Item, Mapping[str, list[float]]], dict[str, float]]
    groups: Callable[[Item], tuple[str, ...]]  #: that the scores are averaged in
    summarize: Callable[[Mapping[str, Mapping[str, float]]], dict[str, float]]
    settings: Mapping[str, Any]  #: fields of a request
    attempts: int  #: requests until a reply can be read
    judge: str  #: the judge of the published scores
    commit: str  #: of the benchmark, that this was compared with
    prompt_files: tuple[str, ...]


def json_items(paths: Sequence[Path]) -> list[Item]:
    """Return the rows of files with a JSON list each, or with JSON lines."""
    items: list[Item] = []
    for path in paths:
        if path.suffix == ".jsonl":
            items += [
                untrusted.decode_json(line, str(path)) for _, line in untrusted.read_lines(path)
            ]
            continue
        rows = untrusted.read_json(path, Any)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: expected a list of items")
        items += rows
    return items


def mean_of_groups(groups: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over groups of every score."""
    sums: dict[str, list[float]] = defaultdict(list)
    for row in groups.values():
        for name, value in row.items():
            sums[name].append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def encode(picture: Picture) -> tuple[str, bytes]:
    """Return the media type and the bytes of a picture as the benchmark sends it."""
    data = picture.path.read_bytes()
    if not picture.jpeg:
        return picture.media_type, data
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    if picture.size_of is not None:
        with Image.open(picture.size_of) as reference:
            image = image.resize(reference.size)
    if picture.max_side:
        image.thumbnail((picture.max_side, picture.max_side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=picture.quality)
    return "image/jpeg", out.getvalue()
