"""Reads the objects of a shapes picture by rules, and holds them against GenEval metadata.

An object is a connected region that differs from the ground, which is estimated from the border.
Its colour is the nearest of the world's eight in CIELAB; its shape is the one whose drawing, at the
region's centre of mass and area, differs least from the coverage of each pixel. What resembles no
colour or no shape of the world is called `other`. Nothing here is learnt. Objects are expected not
to touch one another, nor to fill the border.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from starflow2_jax.shapes import generator

OTHER = "other"

_CONTRAST = 30.0  # least distance from the ground, in levels of 255; the world has 75 and more
_LEAST_AREA = 0.006  # of the picture; the smallest star has 0.02
_MOST_COLOR_DISTANCE = 30.0  # in CIELAB; the world's blue and purple are 29 apart
_MOST_MISFIT = 0.3  # squared error of the coverage over the area of the shape
_SHARES = (0.5, 0.7)  # of the contrast nearby: the edge of an object
_BOX_GAP = 0.1  # of GenEval's evaluation: share of the two boxes that offsets must exceed
_SUPERSAMPLE = 4


class Found(NamedTuple):
    """An object: `x` (to the right), `y` (down) and box (x0, y0, x1, y1) in image sides."""

    shape: str
    color: str
    x: float
    y: float
    box: tuple[float, float, float, float]


class Verdict(NamedTuple):
    """`reason` is empty where `correct`, and otherwise names the first fact that does not hold."""

    correct: bool
    reason: str


def judge(pixels: np.ndarray, facts: Mapping[str, Any]) -> Verdict:
    """Whether a picture shows what GenEval metadata asks for.

    Args:
      pixels: [H, W, 3], uint8 or floats in [-1, 1]; sides of 32 to 128.
      facts: `include` and `exclude` as `verdict` takes them.
    """
    return verdict(find(pixels), facts)


def verdict(found: Sequence[Found], facts: Mapping[str, Any]) -> Verdict:
    """Holds found objects against GenEval metadata.

    Every entry of `include` needs `count` objects (1 if absent) or more of its `class`, and of its
    `color` where one is given; with `position` [relation, index] one of them stands so to one of
    entry `index`. No entry of `exclude` may have `count` objects or more. Other objects are no
    fault, as in GenEval; unlike there, `exclude` may have a colour too.

    Raises:
      ValueError: metadata of another form, or with a class or colour that the world lacks.
    """
    include, exclude = list(facts.get("include", [])), list(facts.get("exclude", []))
    if not include and not exclude:
        raise ValueError("facts: expected include or exclude, found neither")
    groups = [[item for item in found if _is(item, entry)] for entry in include]
    for entry, group in zip(include, groups):
        if len(group) < entry.get("count", 1):
            return Verdict(
                False, f"expected {_name(entry)} >= {entry.get('count', 1)}, found {len(group)}"
            )
    for entry in exclude:
        count = sum(_is(item, entry) for item in found)
        if count >= entry["count"]:
            return Verdict(False, f"expected {_name(entry)} < {entry['count']}, found {count}")
    for entry, group in zip(include, groups):
        if "position" not in entry:
            continue
        wanted, index = entry["position"]
        if wanted not in generator.RELATIONS or not 0 <= index < len(include):
            raise ValueError(f"facts: position {entry['position']}, expected [relation, index]")
        pairs = [(a, b) for a in group for b in groups[index] if a is not b]
        if not any(wanted in relations(a, b) for a, b in pairs):
            seen = sorted({r for a, b in pairs for r in relations(a, b)})
            return Verdict(
                False,
                f"expected {_name(entry)} {wanted} {_name(include[index])}, "
                f"found {' and '.join(seen) or 'neither beside nor above'}",
            )
    return Verdict(True, "")


def relations(first: Found, second: Found) -> set[str]:
    """Where the first object is from the second, by GenEval's rule on boxes; one, two or none."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = first.box, second.box
    offset = np.array([ax0 + ax1 - bx0 - bx1, ay0 + ay1 - by0 - by1]) / 2
    extent = np.array([ax1 - ax0 + bx1 - bx0, ay1 - ay0 + by1 - by0])
    offset = np.sign(offset) * np.maximum(np.abs(offset) - _BOX_GAP * extent, 0)
    if not offset.any():
        return set()
    dx, dy = offset / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def find(pixels: np.ndarray) -> list[Found]:
    """The objects of a picture [H, W, 3] (uint8, or floats in [-1, 1]), from top to bottom.

    Raises:
      ValueError: another shape or dtype, or a side under 16.
    """
    image = _levels(pixels)
    height, width = image.shape[:2]
    away, noise = _from_ground(image)
    size = np.linalg.norm(_blur(away), axis=-1)
    # Half of the contrast nearby is the edge of an antialiased object, whatever its colour. Small
    # pictures of close objects need more to tell them apart.
    nearby = _grow(size, max(1, round(min(height, width) / 32)))
    readings = []
    for share in _SHARES:
        inked = size > np.maximum(_CONTRAST, share * nearby)
        readings.append(_objects(image, away, size, noise, inked))
        unknown = [sum(item.shape == OTHER for item in reading) for reading in readings]
        if not unknown[-1]:
            break
    found = readings[int(np.argmin(unknown))]
    return sorted(found, key=lambda item: (item.y, item.x))


def _objects(
    image: np.ndarray, away: np.ndarray, size: np.ndarray, noise: float, inked: np.ndarray
) -> list[Found]:
    """The objects that connected pixels show; arguments as `find` has them, flags [H, W] last."""
    height, width = inked.shape
    labels, count = _components(inked)
    found = []
    for number in range(1, count + 1):
        own = labels == number
        if own.sum() < _LEAST_AREA * height * width:
            continue
        core = _core(own, size)
        contrast = away[core].mean(0)
        near = _grow(own, 1) & ~_grow((labels > 0) & ~own, 1)
        cover = np.where(near, away @ contrast / (contrast @ contrast), 0.0)
        spread = near.sum() * noise**2 / (contrast @ contrast)
        shape, (x, y) = _shape(cover, own, spread)
        rows, columns = np.nonzero(own.any(1))[0], np.nonzero(own.any(0))[0]
        box = (
            columns[0] / width,
            rows[0] / height,
            (columns[-1] + 1) / width,
            (rows[-1] + 1) / height,
        )
        found.append(Found(shape, _color(image[core].mean(0)), x / width, y / height, box))
    return found


def _levels(pixels: np.ndarray) -> np.ndarray:
    """Levels 0 to 255 as float64 [H, W, 3]."""
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 16:
        raise ValueError(f"expected pixels [H, W, 3] with sides of 16 or more, got {pixels.shape}")
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float64)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"expected pixels in uint8 or floats in [-1, 1], got {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise ValueError("pixels are not finite")
    return ((pixels.astype(np.float64) + 1) * 127.5).clip(0, 255)


def _from_ground(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Difference to the ground, and the standard deviation of the noise, both in levels.

    The ground is a plane fitted to the border; what lies far from it there is left out of the fit.
    """
    height, width = image.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    terms = np.stack([np.ones_like(x), y, x], -1)
    ring = max(1, min(height, width) // 32)
    border = np.ones((height, width), bool)
    border[ring:-ring, ring:-ring] = False
    known, values = terms[border], image[border]
    plane = np.zeros((3, 3))
    plane[0] = np.median(values, 0)
    for _ in range(3):
        distance = np.abs(values - known @ plane).max(-1)
        near = distance <= max(20.0, 4 * np.median(distance))
        plane = np.linalg.lstsq(known[near], values[near], rcond=None)[0]
    rest = np.abs(values - known @ plane)
    return image - terms @ plane, float(1.4826 * np.median(rest))


def _blur(image: np.ndarray) -> np.ndarray:
    """Binomial 3 x 3; leaves 0.375 of the deviation of independent noise."""
    for axis in (0, 1):
        wide = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        n = image.shape[axis]
        parts = [wide.take(range(k, k + n), axis) for k in range(3)]
        image = (parts[0] + 2 * parts[1] + parts[2]) / 4
    return image


def _grow(image: np.ndarray, reach: int) -> np.ndarray:
    """Maximum (of flags: any) over the square of `reach` pixels around each."""
    for axis in (0, 1):
        wide = np.pad(image, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)])
        n = image.shape[axis]
        image = np.max([wide.take(range(k, k + n), axis) for k in range(2 * reach + 1)], 0)
    return image


def _components(flags: np.ndarray) -> tuple[np.ndarray, int]:
    """Regions connected by sides, numbered from 1 in int32 [H, W] where flags hold; their number.

    The runs of each row are joined to those they touch in the row above.
    """
    parents = [0]

    def root(label: int) -> int:
        while parents[label] != label:
            label = parents[label]
        return label

    labels = np.zeros(flags.shape, np.int32)
    edges = np.diff(np.pad(flags, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    for row in range(flags.shape[0]):
        starts, ends = np.nonzero(edges[row] == 1)[0], np.nonzero(edges[row] == -1)[0]
        for start, end in zip(starts.tolist(), ends.tolist()):
            above = set(labels[row - 1, start:end].tolist()) - {0} if row else set()
            roots = {root(label) for label in above}
            label = min(roots, default=len(parents))
            if not roots:
                parents.append(label)
            for other in roots:
                parents[other] = label
            labels[row, start:end] = label
    roots = np.array([root(label) for label in range(len(parents))])
    names, numbers = np.unique(roots, return_inverse=True)
    return numbers.astype(np.int32)[labels], len(names) - 1


def _core(own: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The inner pixels of a region or, where it is thin, the quarter that differs most."""
    inner = own & ~_grow(~own, 1)
    if inner.sum() >= 4:
        return inner
    return own & (size >= np.quantile(size[own], 0.75))


def _color(level: np.ndarray) -> str:
    """Name of the nearest colour of the world to levels [3]."""
    distances = np.linalg.norm(
        _lab(np.array(list(generator.COLORS.values()))) - _lab(level), axis=-1
    )
    nearest = int(distances.argmin())
    return list(generator.COLORS)[nearest] if distances[nearest] <= _MOST_COLOR_DISTANCE else OTHER


def _lab(levels: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB levels of 255, [..., 3]: distances are about as the eye sees them."""
    linear = levels / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.array(to_xyz).T / [0.9505, 1.0, 1.089]
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _shape(cover: np.ndarray, own: np.ndarray, spread: float) -> tuple[str, tuple[float, float]]:
    """The shape that fits the coverage [H, W] best, and its centre (x, y) in pixels.

    `spread` is the squared error that noise alone brings; it is not held against a fit.
    """
    rows, columns = np.nonzero(own.any(1))[0], np.nonzero(own.any(0))[0]
    top, left = max(rows[0] - 2, 0), max(columns[0] - 2, 0)
    crop = cover[top : rows[-1] + 3, left : columns[-1] + 3]
    height, width = crop.shape
    area = max(crop.sum(), 1.0)
    y = (crop.sum(1) @ (np.arange(height) + 0.5)) / area
    x = (crop.sum(0) @ (np.arange(width) + 0.5)) / area
    fits = []
    for shape in generator.SHAPES:
        unit_area, dx, dy = _moments(shape)
        radius = np.sqrt(area / unit_area)
        centre = (x - dx * radius, y - dy * radius)
        fine = generator.mask(
            shape,
            (width * _SUPERSAMPLE, height * _SUPERSAMPLE),
            (centre[0] * _SUPERSAMPLE, centre[1] * _SUPERSAMPLE),
            radius * _SUPERSAMPLE,
        )
        drawn = np.asarray(fine.resize((width, height), Image.Resampling.BOX)) / 255
        misfit = (((crop - drawn) ** 2).sum() - spread) / area
        fits.append((misfit, shape, (centre[0] + left, centre[1] + top)))
    misfit, shape, centre = min(fits)
    return (shape if misfit <= _MOST_MISFIT else OTHER), centre


@functools.cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area and centre of mass of a shape, in units of its radius, from its centre."""
    drawn = np.asarray(generator.mask(shape, (512, 512), (256, 256), 200)) / 255
    offsets = (np.arange(512) + 0.5 - 256) / 200
    area = drawn.sum()
    return area / 200**2, drawn.sum(0) @ offsets / area, drawn.sum(1) @ offsets / area


def _is(item: Found, entry: Mapping[str, Any]) -> bool:
    for key, names in (("class", generator.SHAPES), ("color", generator.COLORS)):
        if (key == "class" or key in entry) and entry.get(key) not in names:
            raise ValueError(f"facts: {key} {entry.get(key)!r}, expected one of {', '.join(names)}")
    return item.shape == entry["class"] and entry.get("color", item.color) == item.color


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['color']} {entry['class']}" if "color" in entry else entry["class"]
