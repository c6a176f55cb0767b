"""Decoding of untrusted images: three formats, with sizes checked before any pixel is decoded.

The whole project has one definition of RGB: the EXIF orientation is applied, transparent pixels are
blended onto white, Pillow converts CMYK and palettes, 16-bit values keep their upper byte, and the
first frame of an animation counts.
"""

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from starflow2_jax.data.manifest import DatasetError

Format = Literal["jpeg", "png", "webp"]
# Phones write multi-picture JPEGs, which Pillow reports as MPO.
_FORMATS: dict[str, Format] = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}

_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L")

# EXIF orientation -> how to bring the image upright.
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

MAX_SIDE = 16384
MAX_PIXELS = 1 << 26  # 64 Mi, 192 MiB decoded
MAX_BYTES = 64 << 20


def header(data: bytes, location: str) -> tuple[Format, int, int]:
    """Return format, height and width of an encoded image, before EXIF orientation."""
    with _open(data, location) as image:
        return _FORMATS[image.format], image.height, image.width


def decode(data: bytes, location: str) -> np.ndarray:
    """Decode a JPEG, PNG or WebP image to upright RGB: uint8 [H, W, 3]."""
    return _decode(data, location, _rgb)


def decode_rgba(data: bytes, location: str) -> np.ndarray:
    """Decode an image with its transparency: uint8 [H, W, 4], of which `decode` blends RGB."""
    return _decode(data, location, _rgba)


def _decode(
    data: bytes, location: str, convert: Callable[[Image.Image], Image.Image]
) -> np.ndarray:
    with _open(data, location) as image:
        try:
            # First, as faults of the pixels would be hidden among those of the metadata.
            image.load()
            # Transposing copies even an upright image, so the orientation tag is read first.
            transpose = _TRANSPOSE.get(_orientation(image))
            return np.asarray(convert(image if transpose is None else image.transpose(transpose)))
        except DatasetError:
            raise
        except Exception as error:
            raise DatasetError(f"{location}: the image cannot be decoded: {error}") from error


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] as PNG, losslessly."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def center_crop(pixels: np.ndarray, side: int) -> np.ndarray:
    """Scale the short side of uint8 [H, W, 3 or 4] to `side` (antialiased) and crop the center.

    This is ADM's scheme: halve with a box filter while the short side is at least twice the target,
    then resize bicubically.
    """
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def square(pixels: np.ndarray, side: int, resize: str, location: str) -> np.ndarray:
    """Return uint8 [side, side, 3]; only `resize` "center_crop" accepts images of any size."""
    if resize == "center_crop" and pixels.shape[:2] != (side, side):
        pixels = center_crop(pixels, side)
    if pixels.shape[:2] != (side, side):
        raise DatasetError(
            f"{location}: the image is {pixels.shape[0]} x {pixels.shape[1]} (h x w), expected "
            f"data.pixels={side}; data.resize='center_crop' would bring it to that size"
        )
    return pixels


def _open(data: bytes, location: str) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise DatasetError(
            f"{location}: the image has {len(data)} bytes, at most {MAX_BYTES} allowed"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{location}: {error}") from error
    except UnidentifiedImageError as error:
        # Its message names a buffer in memory.
        content = f"its first bytes are {data[:12]!r}" if data else "the file is empty"
        raise DatasetError(f"{location}: not a JPEG, PNG or WebP image: {content}") from error
    except Exception as error:
        raise DatasetError(f"{location}: not a JPEG, PNG or WebP image: {error}") from error
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS or min(width, height) < 1:
        image.close()
        raise DatasetError(
            f"{location}: the image is {width} x {height} pixels, at most {MAX_SIDE} a side and "
            f"{MAX_PIXELS} in all are allowed"
        )
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, for junk metadata of a complete image."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # of many kinds, whatever bytes are junk
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in _DEEP_MODES:
        upper_bytes = np.asarray(image).astype(np.uint32) >> 8
        return Image.fromarray(upper_bytes.astype(np.uint8)).convert("RGB")
    if _has_transparency(image):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _rgba(image: Image.Image) -> Image.Image:
    return image.convert("RGBA") if _has_transparency(image) else _rgb(image).convert("RGBA")


def _has_transparency(image: Image.Image) -> bool:
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        return True
    return "transparency" in image.info and image.mode not in _DEEP_MODES
