"""Procedural images: random content of many kinds, for codecs that shall code any image.

An image is a background with up to nine layers on it: polygons, stars, ellipses, rectangles,
strokes, arcs and text, each filled with a color, a gradient, a smooth field or a texture. Some
layers are translucent or blurred. An image follows from a seed and its index, so ranges of indices
can be drawn in parallel.
"""

import colorsys
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from starflow2_jax.data import images, records
from starflow2_jax.data.records import Img, Record

VERSION = "1"  # in the manifest; raise it when an equal seed would give other images

_SUPERSAMPLE = 3
_NUM_LAYERS = (0, 1, 1, 2, 2, 3, 4, 6, 9)  # equally likely
_TEXTURED, _TRANSLUCENT, _BLURRED, _ROTATED = 0.4, 0.15, 0.1, 0.3  # probabilities of a layer
_FONT_SIZES = (0.13, 0.18, 0.25, 0.35, 0.5)  # in image sides
_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!?&"

Color = tuple[int, int, int]


def make_records(seed: int, count: int, pixels: int) -> Iterator[Record]:
    """Yield records 0 to count - 1 of `seed`, each an image [pixels, pixels, 3] without text."""
    for index in range(count):
        id = f"procedural-{seed}-{index:08d}"
        blob = records.image_blob(images.encode_png(draw(image_rng(seed, index), pixels)), id)
        yield Record(1, id, f"procedural:{seed}", [Img(0, True, "assistant")], [blob])


def image_rng(*numbers: int) -> np.random.Generator:
    """Return the generator of random numbers of the image that `numbers` identify."""
    return np.random.default_rng(np.random.SeedSequence(numbers))


def draw(rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Draw a random image, antialiased: uint8 [pixels, pixels, 3]."""
    side = _SUPERSAMPLE * pixels
    image = _random_fill(rng, side)
    for _ in range(int(rng.choice(_NUM_LAYERS))):
        mask = _random_mask(rng, side)
        if rng.random() < _TRANSLUCENT:
            opacity = rng.uniform(0.3, 0.9)
            mask = mask.point([round(opacity * level) for level in range(256)])
        if rng.random() < _BLURRED:
            mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.01, 0.06) * side))
        is_textured = rng.random() < _TEXTURED
        image.paste(_random_fill(rng, side) if is_textured else random_color(rng), mask=mask)
    return np.asarray(image.resize((pixels, pixels), Image.Resampling.BOX))


def random_color(rng: np.random.Generator) -> Color:
    """Return a color: any, a saturated one, or a gray."""
    kind = rng.random()
    if kind < 0.3:
        hue, saturation, value = rng.random(), rng.uniform(0.6, 1), rng.uniform(0.5, 1)
        return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value))
    if kind < 0.45:
        return (int(rng.integers(256)),) * 3
    return tuple(rng.integers(0, 256, 3).tolist())


def _random_fill(rng: np.random.Generator, side: int) -> Image.Image:
    """Return an RGB image [side, side]: a color, gradient, smooth field or texture."""
    first, second = (Image.new("RGB", (side, side), random_color(rng)) for _ in range(2))
    kind = rng.integers(5)
    if kind == 0:
        return first
    if kind == 1:
        return _field(rng, side, 3)
    if kind == 2:
        return Image.composite(first, second, _field(rng, side, 1))
    levels = _gradient(rng, side) if kind == 3 else _texture(rng, side)
    levels = Image.fromarray((255 * levels.clip(0, 1)).astype(np.uint8))
    return Image.composite(first, second, levels)


def _field(rng: np.random.Generator, side: int, channels: int) -> Image.Image:
    """Return a smooth random image of one or three channels."""
    points = int(rng.integers(2, 9))
    levels = rng.integers(0, 256, (points, points, channels), np.uint8)
    image = Image.fromarray(levels if channels == 3 else levels[..., 0])
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _gradient(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return a linear gradient in a random direction: float32 [side, side]."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = _coordinates(side)
    return (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle) + 0.5


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return stripes, waves, checks, dots, rings or noise, of 0 to 1: float32 [side, side]."""
    angle, frequency = rng.uniform(0, math.pi), rng.uniform(2, 14)  # frequency in 1/side
    x, y = _coordinates(side)
    u = frequency * (x * math.cos(angle) + y * math.sin(angle))
    v = frequency * (y * math.cos(angle) - x * math.sin(angle))
    kind = rng.integers(6)
    if kind == 0:
        return (np.sin(2 * math.pi * u) > rng.uniform(-0.5, 0.5)).astype(np.float32)
    if kind == 1:
        return 0.5 + 0.5 * np.sin(2 * math.pi * u)
    if kind == 2:
        return (np.floor(u) + np.floor(v)) % 2
    if kind == 3:
        squared_radius = rng.uniform(0.04, 0.16)
        return ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < squared_radius).astype(np.float32)
    if kind == 4:
        distance = np.hypot(x - rng.random(), y - rng.random())
        return 0.5 + 0.5 * np.sin(2 * math.pi * frequency * distance)
    points = int(rng.integers(8, 65))
    levels = Image.fromarray(rng.integers(0, 256, (points, points), np.uint8))
    return np.asarray(levels.resize((side, side), Image.Resampling.BILINEAR)) / np.float32(255)


@functools.lru_cache(maxsize=4)
def _coordinates(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of every pixel, in image sides: float32 [1, side] and [side, 1]."""
    line = (np.arange(side, dtype=np.float32) + 0.5) / side
    return line[None, :], line[:, None]


def _random_mask(rng: np.random.Generator, side: int) -> Image.Image:
    """Draw one form of a random kind, place and size, as 255 on 0: an L image [side, side]."""
    image = Image.new("L", (side, side), 0)
    x, y = (rng.uniform(0.1, 0.9, 2) * side).tolist()
    form = _FORMS[int(rng.integers(len(_FORMS)))]
    form(rng, ImageDraw.Draw(image), x, y, float(rng.uniform(0.06, 0.4)) * side)
    if rng.random() < _ROTATED:
        image = image.rotate(rng.uniform(0, 360), center=(x, y))
    return image


def _polygon(
    rng: np.random.Generator, pen: ImageDraw.ImageDraw, x: float, y: float, radius: float
) -> None:
    """Draw three to eight corners at random angles and distances."""
    corners = int(rng.integers(3, 9))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    _draw_corners(pen, x, y, rng.uniform(0.4, 1, corners) * radius, angles)


def _star(
    rng: np.random.Generator, pen: ImageDraw.ImageDraw, x: float, y: float, radius: float
) -> None:
    """Draw a regular polygon of three to six corners, or a star of as many points."""
    points = int(rng.integers(3, 7))
    inner = math.cos(math.pi / points) * (1 if rng.integers(2) else rng.uniform(0.3, 0.8))
    radii = radius * np.tile([1, inner], points)
    _draw_corners(pen, x, y, radii, math.pi / points * np.arange(2 * points) - math.pi / 2)


def _draw_corners(
    pen: ImageDraw.ImageDraw, x: float, y: float, radii: np.ndarray, angles: np.ndarray
) -> None:
    corners = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1)
    pen.polygon([tuple(corner) for corner in corners.tolist()], fill=255)


def _ellipse(
    rng: np.random.Generator, pen: ImageDraw.ImageDraw, x: float, y: float, radius: float
) -> None:
    """Draw an ellipse, filled or as a ring."""
    height = radius * rng.uniform(0.3, 1)
    box = (x - radius, y - height, x + radius, y + height)
    if rng.random() < 0.7:
        pen.ellipse(box, fill=255)
    else:
        pen.ellipse(box, outline=255, width=_stroke_width(rng, pen))


def _rectangle(
    rng: np.random.Generator, pen: ImageDraw.ImageDraw, x: float, y: float, radius: float
) -> None:
    width, height = (radius * rng.uniform(0.2, 1, 2)).tolist()
    pen.rectangle((x - width, y - height, x + width, y + height), fill=255)


def _stroke(
    rng: np.random.Generator, pen: ImageDraw.ImageDraw, x: float, y: float, radius: float
) -> None:
    """Draw a line of one to five random parts."""
    steps = rng.normal(0, radius, (int(rng.integers(1, 6)), 2))
    corners = np.cumsum([(x, y), *steps.tolist()], axis=0)
    pen.line(
        [tuple(corner) for corner in corners.tolist()],
        fill=255,
        width=_stroke_width(rng, pen),
        joint="curve",
    )


def _arc(
    rng: np.random.Generator, pen: ImageDraw.ImageDraw, x: float, y: float, radius: float
) -> None:
    start, end = rng.uniform(0, 360, 2).tolist()
    box = (x - radius, y - radius, x + radius, y + radius)
    pen.arc(box, start, end, fill=255, width=_stroke_width(rng, pen))


def _text(
    rng: np.random.Generator, pen: ImageDraw.ImageDraw, x: float, y: float, radius: float
) -> None:
    """Write one to five characters; the size of the font does not depend on `radius`."""
    text = "".join(rng.choice(list(_CHARACTERS), int(rng.integers(1, 6))))
    side = pen.im.size[0]
    font = _font(round(side * _FONT_SIZES[int(rng.integers(len(_FONT_SIZES)))]))
    pen.text((x, y), text, fill=255, font=font, anchor="mm")


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _stroke_width(rng: np.random.Generator, pen: ImageDraw.ImageDraw) -> int:
    """Return 1% to 8% of the image's side, in pixels."""
    return max(1, round(pen.im.size[0] * rng.uniform(0.01, 0.08)))


_FORMS: tuple[
    Callable[[np.random.Generator, ImageDraw.ImageDraw, float, float, float], None], ...
] = (_polygon, _star, _ellipse, _rectangle, _stroke, _arc, _text)
