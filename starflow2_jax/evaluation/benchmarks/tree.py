"""Write and check the output tree of a benchmark.

Prompts are drawn in groups of fixed members and padded to one size, so that a picture is the work
of one program on one input: its bytes depend neither on what a killed run had finished nor on the
shard that draws it. `settings.json` in the tree is the protocol's stamp, and every picture holds
its sha256: a picture of another protocol counts as missing.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from starflow2_jax.evaluation.benchmarks import layouts
from starflow2_jax.evaluation.benchmarks.items import Item, Source, sha256
from starflow2_jax.evaluation.benchmarks.layouts import JPEG_QUALITY, File, Layout
from starflow2_jax.inference import output, prompts
from starflow2_jax.runtime import atomic, json_text

SETTINGS = "settings.json"
# The last bytes of a complete file.
_PNG_END, _JPEG_END = b"IEND\xaeB`\x82", b"\xff\xd9"


class Picture(NamedTuple):
    """A generated picture, and what its metadata say besides the stamp."""

    pixels: np.ndarray  #: uint8 [H, W, 3]
    note: Mapping[str, Any]


# Items of a group, and their numbers in the benchmark -> the samples of each item.
DrawFn = Callable[[Sequence[Item], Sequence[int]], list[list[Picture]]]


class Fault(NamedTuple):
    """A file of a tree that has to be written."""

    path: str  #: relative to the tree
    reason: str  #: `missing`, `truncated`, `another run` or `another text`
    item: str  #: the name of its prompt


@dataclass(frozen=True)
class Tree:
    """The output tree of a benchmark: all of its items, and the share of them to draw."""

    out: epath.Path
    name: str  #: of the benchmark
    layout: Layout
    items: Sequence[Item]
    samples: int  #: pictures of an item
    prompts: Sequence[str]  #: files or folder of the prompts
    rewrite: Sequence[str]  #: files of the texts that replace them
    group_size: int  #: items that are drawn at a time
    shard: tuple[int, int]  #: (i, n) draws every n-th group from the i-th

    def files(self, number: int) -> list[File]:
        """Return the files of an item."""
        return self.layout.files(self.items[number], self.samples)

    def groups(self) -> list[list[int]]:
        """Return the item numbers of the groups of the shard."""
        numbers = list(range(len(self.items)))
        firsts = range(0, len(numbers), self.group_size)
        return [numbers[i : i + self.group_size] for i in firsts][self.shard[0] :: self.shard[1]]


def open_tree(
    out: str,
    name: str,
    *,
    prompts: Sequence[str],
    image_root: str | None = None,
    rewrite: Sequence[str] = (),
    samples: int | None = None,
    shard: str = "0/1",
    max_rows: int = 16,
) -> Tree:
    """Read the prompts of a benchmark, and return its tree in the folder `out`.

    Args:
        name: a key of `layouts.LAYOUTS`.
        prompts: the benchmark's own files, or its folder.
        image_root: folder of the source images; by default that of the prompts.
        rewrite: files of the same format whose texts are drawn instead.
        samples: pictures of an item; by default as many as the benchmark's protocol has.
        shard: `i/n`.
        max_rows: pictures that are drawn at a time.
    """
    layout, samples = layouts.open_layout(name, samples)
    items = layouts.read_items(name, prompts, image_root, rewrite)
    size = min(max(max_rows // samples, 1), len(items))
    place = (epath.Path(out), name)
    return Tree(*place, layout, items, samples, prompts, rewrite, size, _parse_shard(shard))


def _parse_shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    digits = number.isascii() and number.isdigit() and count.isascii() and count.isdigit()
    if not slash or not digits or not int(number) < int(count):
        raise ValueError(f"--shard={text}: expected i/n with i from 0 to n - 1, such as 0/8")
    return int(number), int(count)


# -------------------------------------------------------------------------------------- the stamp


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return the content of `settings.json`."""
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def stamp_of(text: str) -> str:
    """Return the sha256 of the content of `settings.json`, which every picture holds."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_settings(out: epath.Path) -> dict[str, Any] | None:
    """Return the settings of a tree, None if it has none."""
    path = out / SETTINGS
    if not path.exists():
        return None
    try:
        settings = json_text.decode(path.read_bytes(), str(path))
    except ValueError as error:
        raise ValueError(f"{error}; --overwrite replaces it") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object; --overwrite replaces it")
    return settings


def describe(tree: Tree) -> dict[str, Any]:
    """Return the entries of the settings that say which prompts a tree is of."""
    return {
        "benchmark": tree.name,
        "harness": tree.layout.harness,
        "prompts": {"sha256": sha256(tree.prompts), "count": len(tree.items)},
        "rewriting": {"sha256": sha256(tree.rewrite)} if tree.rewrite else "none",
        "samples": tree.samples,
    }


def start(out: epath.Path, settings: Mapping[str, Any], *, overwrite: bool) -> str:
    """Write the settings of a tree unless it has the same ones, and return their stamp.

    Raises:
        ValueError: The tree has other settings, or the folder other files, and may not be replaced.
    """
    text = settings_text(settings)
    stored = None if overwrite else read_settings(out)
    expected = json_text.decode(text, "the settings")
    if stored is not None and stored != expected:
        lines = "; ".join(_differences(stored, expected))
        raise ValueError(
            f"--out: {out} was written with other settings: {lines}. Use another folder; "
            "--overwrite draws it again"
        )
    atomic.remove_leftovers(out)
    if stored is None:
        if not overwrite and out.exists() and any(out.iterdir()):
            raise ValueError(f"--out: {out} is not empty and has no {SETTINGS}")
        atomic.write_file(out / SETTINGS, text)
    return stamp_of(text)


def _differences(stored: Any, current: Any, name: str = "") -> list[str]:
    """Return `key: old in the tree, new in this command` of every value that differs."""
    if isinstance(stored, dict) and isinstance(current, dict):
        keys = [*stored, *(key for key in current if key not in stored)]
        return [
            line
            for key in keys
            for line in _differences(
                stored.get(key), current.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    if stored == current:
        return []
    return [f"{name} is {json.dumps(stored)} in the tree, {json.dumps(current)} in this command"]


# ------------------------------------------------------------------------------------ the pictures


def write(tree: Tree, stamp: str, draw: DrawFn, *, overwrite: bool = False) -> int:
    """Draw every item with a file that is missing, and write those files; return their number.

    Args:
        draw: is called with `group_size` items, of which the last ones repeat the last item of a
            group that is not full.
    """
    count = 0
    for group in tree.groups():
        paths = {fault.path for n in group for fault in item_faults(tree, n, stamp)}
        if overwrite:
            paths = {file.path for n in group for file in tree.files(n)}
        if not paths:
            continue
        padded = group + group[-1:] * (tree.group_size - len(group))
        samples = draw([tree.items[n] for n in padded], padded)
        for number, pictures in zip(group, samples):
            for file in tree.files(number):
                if file.path in paths:
                    data = _encode(file, tree.items[number], pictures, stamp)
                    atomic.write_file(tree.out / file.path, data)
                    count += 1
    return count


def _encode(file: File, item: Item, pictures: Sequence[Picture], stamp: str) -> bytes:
    """Return the bytes of a file."""
    note = {"stamp": stamp, "item": item.name, "prompt": item.prompt}
    if file.kind == "text":
        return file.text.encode()
    if file.kind == "source":
        return output.encode_png(read_source(item.shown_source, item.name), note)
    if file.kind == "grid":
        pixels = _grid([picture.pixels for picture in pictures])
        return output.encode_png(pixels, {**note, "samples": [dict(p.note) for p in pictures]})
    picture = pictures[file.sample]
    if file.kind == "jpeg":
        return _jpeg(picture.pixels, stamp)
    return output.encode_png(picture.pixels, {**note, "sample": file.sample, **picture.note})


def read_source(source: Source, name: str) -> np.ndarray:
    """Return the pixels of a source image of the item `name`: uint8 [H, W, 3]."""
    return prompts.read_pixels(source if isinstance(source, Path) else source(), name)


def _grid(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Return four pictures in two rows of two."""
    rows = [np.concatenate(pictures[first : first + 2], axis=1) for first in (0, 2)]
    return np.concatenate(rows)


def _jpeg(pixels: np.ndarray, stamp: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", comment=stamp, quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


# --------------------------------------------------------------------------------- what is missing


def check(tree: Tree) -> tuple[list[Fault], int]:
    """Return the faults of a tree's shard, and the number of its files.

    Raises:
        ValueError: The tree has no settings, or they name other prompts.
    """
    settings = read_settings(tree.out)
    if settings is None:
        raise ValueError(f"--check: {tree.out} has no {SETTINGS}, so it is no tree of --bench")
    expected = describe(tree)
    lines = _differences({key: settings.get(key) for key in expected}, expected)
    if lines:
        raise ValueError(f"--check: {tree.out} was written with other settings: {'; '.join(lines)}")
    stamp = stamp_of((tree.out / SETTINGS).read_text(encoding="utf-8"))
    numbers = [n for group in tree.groups() for n in group]
    faults = [fault for n in numbers for fault in item_faults(tree, n, stamp)]
    return faults, sum(len(tree.files(n)) for n in numbers)


def item_faults(tree: Tree, number: int, stamp: str) -> list[Fault]:
    """Return the faults of the files of one item."""
    reasons = (
        (file.path, _reason(tree.out / file.path, file, stamp)) for file in tree.files(number)
    )
    return [Fault(path, reason, tree.items[number].name) for path, reason in reasons if reason]


def _reason(path: epath.Path, file: File, stamp: str) -> str:
    """Return why a file has to be written, or "" for a complete one."""
    from PIL import Image

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return "missing"
    if file.kind == "text":
        return "" if data == file.text.encode() else "another text"
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.load()
            comment = image.info.get("comment", b"")
            note = json_text.decode(image.info.get(output.PNG_KEY) or "{}", str(path))
    except (OSError, ValueError, SyntaxError):
        return "truncated"
    # The decoder is content with a file that lacks its last bytes.
    if not data.endswith(_JPEG_END if file.kind == "jpeg" else _PNG_END):
        return "truncated"
    is_own = comment == stamp.encode() if file.kind == "jpeg" else note.get("stamp") == stamp
    return "" if is_own else "another run"
