"""Regions of a shapes image: the patches that show each of its objects, and a description of it.

Grounded words teach a vision tower far faster than captions, which describe a whole image at once.
The background needs a description too; otherwise the tower is free to give background patches
object-like features. The records' `meta.scene` or `meta.scenes` describe the images.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from starflow2_jax.data.chat_layout import Tokenizer
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.records import Record
from starflow2_jax.runtime import json_text
from starflow2_jax.shapes import generator
from starflow2_jax.shapes.generator import Object

# In units of an object's radius: the object fills what is nearer than the first; the background is
# farther than the second.
_OBJECT_RADIUS, _BACKGROUND_RADIUS = 0.9, 1.3


class Region(NamedTuple):
    """A described region: an object within `radius` of (x, y), in image sides.

    The background has a radius of 0; it is everything that is not near to an object.
    """

    words: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class RegionLabels:
    """The `RegionAnnotator` of packed batches for the shapes benchmark."""

    max_regions: int  # R, regions of an image at most; further ones are left out
    max_words: int  # W, token ids of a description at most; longer ones are cut

    def __call__(
        self, record: Record, image: int, tokenizer: Tokenizer, grid_side: int, location: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `region` int32 [N] and `region_words` int32 [R, W] of an image of a record."""
        regions = find_regions(record, image, location)[: self.max_regions]
        words = np.full((self.max_regions, self.max_words), -1, np.int32)
        for number, region in enumerate(regions):
            tokens = tokenizer.encode(region.words)[: self.max_words]
            words[number, : len(tokens)] = tokens
        return region_of_patches(regions, grid_side), words


def find_regions(record: Record, image: int, location: str) -> list[Region]:
    """Return the regions of image number `image` of a record; none if it has no scene.

    The description of an object gives the number of objects of its kind, size, color, shape and,
    between two objects, its relation to the other one.
    """
    meta = record.meta
    try:
        text = str(meta["scenes"] if "scenes" in meta else f"[{meta['scene']}]")
        scenes = json_text.decode(text, location)
        if image >= len(scenes):
            return []
        objects = [Object(**item) for item in scenes[image]["objects"]]
        background = Region(f" {scenes[image]['background']} background", 0.5, 0.5, 0.0)
        return [*(_object_region(objects, k) for k in range(len(objects))), background]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{location}: no scenes in its meta, so it has no regions; expected a record of "
            "`prepare import --format shapes`"
        ) from error


def _object_region(objects: Sequence[Object], k: int) -> Region:
    item = objects[k]
    count = Counter((other.color, other.shape) for other in objects)[item.color, item.shape]
    words = f" {generator.NUMBERS[count]} {item.size} {item.color} {item.shape}"
    relation = generator.relation(item, objects[1 - k]) if len(objects) == 2 else None
    words += f" {relation}" if relation else ""
    return Region(words, item.x, item.y, generator.SIZES[item.size])


def region_of_patches(regions: Sequence[Region], grid_side: int) -> np.ndarray:
    """Return the region of each patch of a grid of `grid_side`^2, -1 for none: int32 [N]."""
    center = (np.arange(grid_side) + 0.5) / grid_side
    patch_radius = 0.71 / grid_side  # half the diagonal
    region_map = np.full((grid_side, grid_side), -1, np.int32)
    nearest = np.full((grid_side, grid_side), np.inf)
    is_background = np.ones((grid_side, grid_side), bool)
    for number, region in enumerate(regions):
        if region.radius:
            distance = np.hypot(center[None, :] - region.x, center[:, None] - region.y)
            # The patch under the center shows even a small object.
            reach = max(_OBJECT_RADIUS * region.radius, patch_radius)
            inside = (distance < reach) & (distance < nearest)
            nearest[inside] = distance[inside]
            is_background &= distance > _BACKGROUND_RADIUS * region.radius + patch_radius
        else:
            inside = is_background
        region_map[inside] = number
    return region_map.ravel()
