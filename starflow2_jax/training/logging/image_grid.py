"""Grids of images with captions."""

import io
import math
import textwrap
import unicodedata
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from starflow2_jax.runtime import atomic
from starflow2_jax.training.logging import caption_fonts


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] as PNG."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", optimize=True)
    return data.getvalue()


def save_grid(
    path: epath.PathLike,
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
) -> None:
    """Write images uint8 [n, H, W, 3] as one PNG; see `grid`."""
    atomic.write_file(path, png(grid(images, captions, columns)))


def grid(
    images: np.ndarray, captions: Sequence[str] | None = None, columns: int | None = None
) -> np.ndarray:
    """Arrange images uint8 [n, H, W, 3] in one image uint8 [rows, columns, 3] on white.

    Small images are enlarged by an integer factor, so that every pixel stays visible. The default
    is eight columns, or an almost square grid of fewer than 16 images.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"grid: {images.dtype}{list(images.shape)}, expected uint8 [n, H, W, 3]")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"grid: {len(captions)} captions for {len(images)} images")
    count, height, width, _ = images.shape
    columns = columns or (8 if count >= 16 else math.ceil(math.sqrt(count)))
    scale = max(1, round((112 if captions else 64) / width))
    height, width, gap = height * scale, width * scale, 4
    captions, line_height = captions or [""] * count, 14
    fonts = caption_fonts.fonts_of(captions, 11)
    lines = [_wrap(text, width) for text in captions]
    step = height + gap + line_height * max(map(len, lines))
    rows = -(-count // columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * step), "white")
    pen = ImageDraw.Draw(sheet)
    for i, pixels in enumerate(images):
        left, top = gap + i % columns * (width + gap), gap + i // columns * step
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        # A thin frame: a white image would be invisible on the white sheet.
        pen.rectangle((left - 1, top - 1, left + width, top + height), outline="#cccccc")
        sheet.paste(image, (left, top))
        for n, line in enumerate(lines[i]):
            pen.text((left, top + height + 1 + n * line_height), line, "black", fonts[i])
    return np.asarray(sheet)


def _wrap(text: str, width: int) -> list[str]:
    """Wrap a caption to at most five lines that fit below an image of `width` pixels."""
    is_wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
    columns = max(8, width // 6) // (2 if is_wide else 1)
    return textwrap.wrap(text, columns, max_lines=5, placeholder=" ...")
