"""Reading images that strangers made: three formats, sizes checked before a pixel is decoded.

One definition of RGB for the whole project: the EXIF orientation is applied; transparent pixels lie
on white; CMYK and palettes are converted by Pillow; 16-bit values keep their upper byte; the first
frame of an animation counts.
"""

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from starflow2_jax.data.manifest import DatasetError

Format = Literal["jpeg", "png", "webp"]
# Phones write multi-picture JPEGs, which Pillow reports as MPO.
_FORMATS: dict[str, Format] = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}

MAX_SIDE = 16384
MAX_PIXELS = 1 << 26  # 64 Mi, 192 MiB decoded
MAX_BYTES = 64 << 20


def header(data: bytes, where: str) -> tuple[Format, int, int]:
    """Format, height and width as stored (before EXIF orientation) of an encoded image.

    Raises:
      DatasetError: naming `where`, if it is no JPEG, PNG or WebP image, or larger than the limits.
    """
    with _open(data, where) as image:
        return _FORMATS[image.format], image.height, image.width


def decode(data: bytes, where: str) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP image to uint8 [H, W, 3] RGB, upright.

    Raises:
      DatasetError: naming `where`, if the format, the size or the data are not as they should be.
    """
    with _open(data, where) as image:
        try:
            # Reads the orientation tag first: transposing copies.
            turned = image.getexif().get(0x0112, 1) != 1
            return np.asarray(_rgb(ImageOps.exif_transpose(image) if turned else image))
        except DatasetError:
            raise
        except Exception as error:
            raise DatasetError(f"{where}: the image cannot be decoded: {error}") from error


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3] as PNG, losslessly."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def center_crop(pixels: np.ndarray, side: int) -> np.ndarray:
    """Scales the short side of uint8 [H, W, 3] to `side` (antialiased) and crops the centre.

    The scheme of ADM: box-halve while the short side is at least twice the target, then bicubic.
    """
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def square(pixels: np.ndarray, side: int, resize: str, where: str) -> np.ndarray:
    """uint8 [side, side, 3]; with `resize` "center_crop" of any image, with "none" of that size.

    Raises:
      DatasetError: an image of another size, naming `where`.
    """
    if resize == "center_crop" and pixels.shape[:2] != (side, side):
        pixels = center_crop(pixels, side)
    if pixels.shape[:2] != (side, side):
        raise DatasetError(
            f"{where}: the image is {pixels.shape[0]} x {pixels.shape[1]} (h x w), expected "
            f"data.pixels={side}; data.resize='center_crop' would bring it to that size"
        )
    return pixels


def _open(data: bytes, where: str) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise DatasetError(f"{where}: the image has {len(data)} bytes, at most {MAX_BYTES} allowed")
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{where}: {error}") from error
    except Exception as error:
        raise DatasetError(f"{where}: not a JPEG, PNG or WebP image: {error}") from error
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS or min(width, height) < 1:
        image.close()
        raise DatasetError(
            f"{where}: the image is {width} x {height} pixels, at most {MAX_SIDE} a side and "
            f"{MAX_PIXELS} in all are allowed"
        )
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
