"""Which part of a picture each of its objects fills, and what can be said of it.

Grounded words teach a vision tower far faster than captions, which name all of a picture at once.
The ground has words too: what nothing is told of may look like anything, and who searches a shape
finds it there. Records of the shapes world tell them: `meta.scene` of one picture, `meta.scenes` of
several.
"""

import json
from collections import Counter
from typing import NamedTuple

import numpy as np

from starflow2_jax.data.chat_layout import Tokenizer
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record
from starflow2_jax.shapes import generator
from starflow2_jax.shapes.generator import Object

# Of an object's radius: what lies within the first shows the object, beyond the second the ground.
_REACH, _CLEAR = 0.9, 1.3


class Region(NamedTuple):
    """`words` of an object within `radius` of (x, y), in image sides; of the ground, which is all
    that no object is near to, with a radius of 0."""

    words: str
    x: float
    y: float
    radius: float


def find(record: Record, image: int, where: str) -> list[Region]:
    """Regions of image number `image` of a record, empty where nothing is told of it.

    Of an object: how many there are of its kind, size, colour, shape and, of two, how it lies to
    the other.

    Raises:
      DatasetError: a record without scenes, naming `where`.
    """
    meta = record.meta
    try:
        scenes = json.loads(str(meta["scenes"] if "scenes" in meta else f"[{meta['scene']}]"))
        if image >= len(scenes):
            return []
        objects = [Object(**item) for item in scenes[image]["objects"]]
        ground = Region(f" {scenes[image]['background']} background", 0.5, 0.5, 0.0)
        return [*(_told(objects, k) for k in range(len(objects))), ground]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{where}: no scenes in its meta, so no regions are known") from error


def _told(objects: list[Object], k: int) -> Region:
    item = objects[k]
    count = Counter((other.color, other.shape) for other in objects)[item.color, item.shape]
    words = f" {generator.NUMBERS[count]} {item.size} {item.color} {item.shape}"
    relation = generator.relation(item, objects[1 - k]) if len(objects) == 2 else None
    words += f" {relation}" if relation else ""
    return Region(words, item.x, item.y, generator.SIZES[item.size])


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
    clear = np.ones((side, side), bool)
    ids = np.full((most, words), -1, np.int32)
    for number, region in enumerate(found[:most]):
        if region.radius:
            away = np.hypot(centre[None, :] - region.x, centre[:, None] - region.y)
            # The patch under the centre shows even a small object.
            within = (away < max(_REACH * region.radius, 0.71 / side)) & (away < nearest)
            nearest[within] = away[within]
            clear &= away > _CLEAR * region.radius + 0.71 / side
        else:
            within = clear
        shown[within] = number
        tokens = tokenizer.encode(region.words)[:words]
        ids[number, : len(tokens)] = tokens
    return shown.ravel(), ids
