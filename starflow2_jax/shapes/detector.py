"""Rule-based detection of the objects of a shapes image, and a check against GenEval metadata.

An object is a connected region that differs from the background, which is estimated from the
border. Its color is the nearest of the benchmark's eight in CIELAB; its shape is the one whose
drawing, at the region's center of mass and area, differs least from the coverage of each pixel. A
color or shape that resembles none is `other`. Objects must not touch, nor fill the border.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from starflow2_jax.shapes import generator

OTHER = "other"

_CONTRAST = 30.0  # minimum distance from the background, in levels of 255; drawings have 75
_MIN_AREA = 0.006  # share of the image; the smallest star has 0.02
_MAX_COLOR_DISTANCE = 30.0  # in CIELAB; blue and purple have a distance of 29
_MAX_MISFIT = 0.3  # squared error of the coverage over the area of the shape
_EDGE_SHARES = (0.5, 0.7)  # share of the contrast nearby that is the edge of an object
_BOX_GAP = 0.1  # offsets must exceed this share of the two boxes, as in GenEval
_SUPERSAMPLE = 4


class DetectedObject(NamedTuple):
    """An object with its center (x, y) and box (x0, y0, x1, y1), in image sides."""

    shape: str
    color: str
    x: float
    y: float
    box: tuple[float, float, float, float]


class Verdict(NamedTuple):
    """The result of a check; `reason` names the first fact that does not hold, if any."""

    correct: bool
    reason: str


def judge(pixels: np.ndarray, facts: Mapping[str, Any]) -> Verdict:
    """Check an image, as in `detect` and with sides of 32 to 128, against GenEval metadata."""
    return check_facts(detect(pixels), facts)


def check_facts(objects: Sequence[DetectedObject], facts: Mapping[str, Any]) -> Verdict:
    """Check detected objects against GenEval metadata.

    Every entry of `include` needs `count` objects (1 if absent) or more of its `class`, and of its
    `color` if it has one; with `position` [relation, index], one of them must have that relation to
    one of entry `index`. No entry of `exclude` may have `count` objects or more. Other objects are
    allowed, as in GenEval; unlike there, `exclude` may have a color too.
    """
    include, exclude = list(facts.get("include", [])), list(facts.get("exclude", []))
    if not include and not exclude:
        raise ValueError("facts: expected include or exclude, found neither")
    groups = [[item for item in objects if _matches(item, entry)] for entry in include]
    for entry, group in zip(include, groups):
        count = entry.get("count", 1)
        if len(group) < count:
            return Verdict(False, f"expected {_name(entry)} >= {count}, found {len(group)}")
    for entry in exclude:
        count = sum(_matches(item, entry) for item in objects)
        if count >= entry["count"]:
            return Verdict(False, f"expected {_name(entry)} < {entry['count']}, found {count}")
    for entry, group in zip(include, groups):
        if "position" not in entry:
            continue
        relation, index = entry["position"]
        if relation not in generator.RELATIONS or not 0 <= index < len(include):
            raise ValueError(f"facts: position {entry['position']}, expected [relation, index]")
        pairs = [(a, b) for a in group for b in groups[index] if a is not b]
        if not any(relation in box_relations(a, b) for a, b in pairs):
            relations = sorted({r for a, b in pairs for r in box_relations(a, b)})
            detected = " and ".join(relations) or "no relation"
            expected = f"{_name(entry)} {relation} {_name(include[index])}"
            return Verdict(False, f"expected {expected}, found {detected}")
    return Verdict(True, "")


def box_relations(first: DetectedObject, second: DetectedObject) -> set[str]:
    """Return the relations (up to two) of the first object to the second, as GenEval does."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = first.box, second.box
    offset = np.array([ax0 + ax1 - bx0 - bx1, ay0 + ay1 - by0 - by1]) / 2
    extent = np.array([ax1 - ax0 + bx1 - bx0, ay1 - ay0 + by1 - by0])
    offset = np.sign(offset) * np.maximum(np.abs(offset) - _BOX_GAP * extent, 0)
    if not offset.any():
        return set()
    dx, dy = offset / np.linalg.norm(offset)
    conditions = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in conditions.items() if holds}


def detect(pixels: np.ndarray) -> list[DetectedObject]:
    """Detect the objects of an image [H, W, 3], uint8 or floats in [-1, 1], from top to bottom."""
    image = _to_levels(pixels)
    height, width = image.shape[:2]
    difference, noise = _subtract_background(image)
    distance = np.linalg.norm(_blur(difference), axis=-1)
    # Half of the contrast nearby is the edge of an antialiased object, whatever its color. Small
    # images of close objects need more to separate them.
    nearby = _dilate(distance, max(1, round(min(height, width) / 32)))
    candidates: list[list[DetectedObject]] = []
    for share in _EDGE_SHARES:
        foreground = distance > np.maximum(_CONTRAST, share * nearby)
        labels, count = _connected_components(foreground)
        objects = []
        for region in (labels == number for number in range(1, count + 1)):
            if region.sum() < _MIN_AREA * height * width:
                continue
            core = _core(region, distance)
            contrast = difference[core].mean(0)
            near = _dilate(region, 1) & ~_dilate(foreground & ~region, 1)
            coverage = np.where(near, difference @ contrast / (contrast @ contrast), 0.0)
            noise_error = near.sum() * noise**2 / (contrast @ contrast)
            x0, y0, x1, y1 = Image.fromarray(region).getbbox()
            shape, (x, y) = _fit_shape(coverage, (x0, y0, x1, y1), noise_error)
            color = _nearest_color(image[core].mean(0))
            box = (x0 / width, y0 / height, x1 / width, y1 / height)
            objects.append(DetectedObject(shape, color, x / width, y / height, box))
        candidates.append(objects)
        if all(item.shape != OTHER for item in objects):
            break
    objects = min(candidates, key=lambda items: sum(item.shape == OTHER for item in items))
    return sorted(objects, key=lambda item: (item.y, item.x))


def _to_levels(pixels: np.ndarray) -> np.ndarray:
    """Return levels 0 to 255 as float64 [H, W, 3]."""
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


def _subtract_background(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the difference to a plane fitted to the border, and the deviation of the noise."""
    height, width = image.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    terms = np.stack([np.ones_like(x), y, x], -1)
    ring = max(1, min(height, width) // 32)
    border = np.ones((height, width), bool)
    border[ring:-ring, ring:-ring] = False
    inputs, values = terms[border], image[border]
    plane = np.zeros((3, 3))
    plane[0] = np.median(values, 0)
    for _ in range(3):
        residual = np.abs(values - inputs @ plane).max(-1)
        inliers = residual <= max(20.0, 4 * np.median(residual))
        plane = np.linalg.lstsq(inputs[inliers], values[inliers], rcond=None)[0]
    residuals = np.abs(values - inputs @ plane)
    return image - terms @ plane, float(1.4826 * np.median(residuals))


def _blur(image: np.ndarray) -> np.ndarray:
    """Blur with a binomial 3 x 3 kernel; it scales the deviation of independent noise by 0.375."""
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        n = image.shape[axis]
        shifted = [padded.take(range(k, k + n), axis) for k in range(3)]
        image = (shifted[0] + 2 * shifted[1] + shifted[2]) / 4
    return image


def _dilate(image: np.ndarray, reach: int) -> np.ndarray:
    """Return the maximum (of flags: any) over the square of `reach` pixels around each pixel."""
    for axis in (0, 1):
        padded = np.pad(image, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)])
        n = image.shape[axis]
        image = np.max([padded.take(range(k, k + n), axis) for k in range(2 * reach + 1)], 0)
    return image


def _connected_components(flags: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the regions of flags that are connected by sides from 1, int32 [H, W]; count them."""
    # The runs of each row are joined to those that they touch in the row above.
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


def _core(region: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return the inner pixels of a region or, if it is thin, the quarter with most contrast."""
    inner = region & ~_dilate(~region, 1)
    if inner.sum() >= 4:
        return inner
    return region & (distance >= np.quantile(distance[region], 0.75))


def _nearest_color(level: np.ndarray) -> str:
    """Return the name of the benchmark's color that is nearest to levels [3], or `OTHER`."""
    palette = _lab(np.array(list(generator.COLORS.values())))
    distances = np.linalg.norm(palette - _lab(level), axis=-1)
    nearest = int(distances.argmin())
    return list(generator.COLORS)[nearest] if distances[nearest] <= _MAX_COLOR_DISTANCE else OTHER


def _lab(levels: np.ndarray) -> np.ndarray:
    """Convert sRGB levels of 255 [..., 3] to CIELAB (D65), whose distances match perception."""
    linear = levels / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.array(to_xyz).T / [0.9505, 1.0, 1.089]
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _fit_shape(
    coverage: np.ndarray, box: tuple[int, int, int, int], noise_error: float
) -> tuple[str, tuple[float, float]]:
    """Return the shape that fits the coverage [H, W] best, and its center (x, y) in pixels.

    `noise_error` is the squared error that noise alone causes; it is subtracted from that of a fit.
    """
    left, top = max(box[0] - 2, 0), max(box[1] - 2, 0)
    crop = coverage[top : box[3] + 2, left : box[2] + 2]
    height, width = crop.shape
    area = max(crop.sum(), 1.0)
    y = (crop.sum(1) @ (np.arange(height) + 0.5)) / area
    x = (crop.sum(0) @ (np.arange(width) + 0.5)) / area
    fine_size = (width * _SUPERSAMPLE, height * _SUPERSAMPLE)
    fits = []
    for shape in generator.SHAPES:
        unit_area, dx, dy = _moments(shape)
        radius = np.sqrt(area / unit_area)
        center = (x - dx * radius, y - dy * radius)
        fine_center = (center[0] * _SUPERSAMPLE, center[1] * _SUPERSAMPLE)
        fine = generator.mask(shape, fine_size, fine_center, radius * _SUPERSAMPLE)
        drawing = np.asarray(fine.resize((width, height), Image.Resampling.BOX)) / 255
        misfit = (((crop - drawing) ** 2).sum() - noise_error) / area
        fits.append((misfit, shape, (center[0] + left, center[1] + top)))
    misfit, shape, center = min(fits)
    return (shape if misfit <= _MAX_MISFIT else OTHER), center


@functools.cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Return the area and center of mass of a shape, in units of its radius, from its center."""
    drawing = np.asarray(generator.mask(shape, (512, 512), (256, 256), 200)) / 255
    offsets = (np.arange(512) + 0.5 - 256) / 200
    area = drawing.sum()
    return area / 200**2, drawing.sum(0) @ offsets / area, drawing.sum(1) @ offsets / area


def _matches(item: DetectedObject, entry: Mapping[str, Any]) -> bool:
    for key, names in (("class", generator.SHAPES), ("color", generator.COLORS)):
        if (key == "class" or key in entry) and entry.get(key) not in names:
            raise ValueError(f"facts: {key} {entry.get(key)!r}, expected one of {', '.join(names)}")
    return item.shape == entry["class"] and entry.get("color", item.color) == item.color


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['color']} {entry['class']}" if "color" in entry else entry["class"]
