"""The output trees of public benchmarks, as each one's evaluator walks them.

`LAYOUTS` maps the name of a benchmark to its reader, the number of samples that its score is
defined for, and the files that its evaluator opens for a prompt.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from starflow2_jax.evaluation.benchmarks import items
from starflow2_jax.evaluation.benchmarks.items import Item

JPEG_QUALITY = 95


class File(NamedTuple):
    """One file of a tree.

    `kind` is `picture` (sample number `sample`), `jpeg` (the same, compressed), `grid` (all samples
    in two columns without padding), `source` (the source of an edit) or `text`.
    """

    path: str  #: relative to the tree
    kind: str = "picture"
    sample: int = 0
    text: str = ""


@dataclass(frozen=True)
class Layout:
    """Reader and output tree of a benchmark."""

    read: Callable[[Sequence[Path], Path], list[Item]]
    files: Callable[[Item, int], list[File]]  #: the files of an item with so many samples
    harness: str  #: the repository and commit whose walk the tree was checked against
    samples: int = 1
    any_samples: bool = False  #: whether another number of samples can be scored, too


def _geneval(item: Item, samples: int) -> list[File]:
    pictures = [File(f"{item.name}/samples/{k:05}.png", sample=k) for k in range(samples)]
    text = json.dumps(item.row) + "\n"
    return [File(f"{item.name}/metadata.jsonl", "text", text=text), *pictures]


def _dpg(item: Item, samples: int) -> list[File]:
    return [File(f"{item.name}.png", "grid")]


def _gedit(item: Item, samples: int) -> list[File]:
    path = f"fullset/{item.name}"
    return [File(f"{path}_SRCIMG.png", "source"), File(f"{path}.png")]


def _rise(item: Item, samples: int) -> list[File]:
    return [File(f"images/{item.name}.png")]


def _kris(item: Item, samples: int) -> list[File]:
    # The official evaluator opens .jpg, BAGEL's copy of it .png.
    return [File(f"{item.name}.jpg", "jpeg"), File(f"{item.name}.png")]


def _flat(item: Item, samples: int) -> list[File]:
    return [File(f"{item.name}.png")]


LAYOUTS = {
    "geneval": Layout(
        items.read_geneval, _geneval, "djghosh13/geneval@af4902f", samples=4, any_samples=True
    ),
    "dpg": Layout(items.read_dpg, _dpg, "TencentQQGYLab/ELLA@3c228f1", samples=4),
    "gedit": Layout(items.read_gedit, _gedit, "stepfun-ai/Step1X-Edit@570eba6"),
    "imgedit": Layout(items.read_imgedit, _flat, "PKU-YuanGroup/ImgEdit@547185d"),
    "rise": Layout(items.read_rise, _rise, "PhoenixZ810/RISEBench@5f22651"),
    "kris": Layout(items.read_kris, _kris, "mercurystraw/Kris_Bench@2114fec"),
    "wise": Layout(items.read_wise, _flat, "PKU-YuanGroup/WISE@eb51174 (WISE_legacy)"),
    "wise_verified": Layout(
        functools.partial(items.read_wise, version="wise_verified"),
        _flat,
        "PKU-YuanGroup/WISE@eb51174",
    ),
}


def open_layout(name: str, samples: int | None = None) -> tuple[Layout, int]:
    """Return the layout of a benchmark and its number of samples.

    Raises:
        ValueError: There is no such benchmark, or it is scored with another number of samples.
    """
    if name not in LAYOUTS:
        raise ValueError(f"--bench={name}: expected one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    if samples not in (None, layout.samples) and not layout.any_samples:
        raise ValueError(f"--n={samples}: {name} is scored with n={layout.samples}")
    return layout, samples or layout.samples


def read_items(
    name: str, prompts: Sequence[str], image_root: str | None, rewrite: Sequence[str] = ()
) -> list[Item]:
    """Return the items of a benchmark.

    Args:
        prompts: the benchmark's own files, or its folder.
        image_root: folder of the source images; by default that of the prompts.
        rewrite: files of the same format whose texts replace those of `prompts`.
    """
    layout, _ = open_layout(name)

    def read(texts: Sequence[str]) -> list[Item]:
        paths, location = [Path(text).expanduser() for text in texts], ", ".join(texts)
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file or folder")
        root = Path(image_root) if image_root else paths[0]
        root = root if root.is_dir() else root.parent
        return items.check_names(layout.read(paths, root), location)

    result = read(prompts)
    if not rewrite:
        return result
    return items.replace_texts(result, read(rewrite), ", ".join(rewrite))
