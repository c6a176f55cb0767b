"""Which part of a picture each of its objects fills, and what it is called.

Grounded words teach a vision tower far faster than captions, which name all of a picture at once.
Records of the shapes world tell them: `meta.scene` of one picture, `meta.scenes` of several.
"""

import json
from typing import NamedTuple

import numpy as np

from starflow2_jax.data import shapes
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record
from starflow2_jax.data.tokens import Tokenizer

# Of an object's radius: what lies within it shows the object.
_REACH = 0.9


class Region(NamedTuple):
    """`words` of an object within `radius` of (x, y), in image sides."""

    words: str
    x: float
    y: float
    radius: float


def find(record: Record, image: int, where: str) -> list[Region]:
    """Regions of image number `image` of a record, empty where nothing is told of it.

    Raises:
      DatasetError: a record without scenes, naming `where`.
    """
    meta = record.meta
    try:
        scenes = json.loads(str(meta["scenes"] if "scenes" in meta else f"[{meta['scene']}]"))
        objects = scenes[image]["objects"] if image < len(scenes) else []
        return [
            Region(
                f" {item['size']} {item['color']} {item['shape']}",
                item["x"],
                item["y"],
                shapes.SIZES[item["size"]],
            )
            for item in objects
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{where}: no scenes in its meta, so no regions are known") from error


def place(
    found: list[Region], tokenizer: Tokenizer, side: int, most: int, words: int
) -> tuple[np.ndarray, np.ndarray]:
    """Regions on a grid of patches.

    Args:
      side: rows (= columns) of patches; most, words: regions and words of a region that are kept.

    Returns:
      int32 [side^2], which region a patch shows, -1 none; int32 [most, words], ids of its words,
      -1 behind them.
    """
    centre = (np.arange(side) + 0.5) / side
    shown = np.full((side, side), -1, np.int32)
    nearest = np.full((side, side), np.inf)
    ids = np.full((most, words), -1, np.int32)
    for number, region in enumerate(found[:most]):
        away = np.hypot(centre[None, :] - region.x, centre[:, None] - region.y)
        # The patch under the centre shows even a small object.
        within = (away < max(_REACH * region.radius, 0.71 / side)) & (away < nearest)
        shown[within], nearest[within] = number, away[within]
        tokens = tokenizer.encode(region.words)[:words]
        ids[number, : len(tokens)] = tokens
    return shown.ravel(), ids
