"""Untrusted images: three formats, sizes checked before decoding, one definition of RGB."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from starflow2_jax.data import images
from starflow2_jax.data.manifest import DatasetError

pytestmark = pytest.mark.fast

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def save(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return buffer.getvalue()


def png_with_declared_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_png_is_lossless():
    data = images.encode_png(PIXELS)
    assert images.header(data, "x") == ("png", 6, 9)
    assert (images.decode(data, "x") == PIXELS).all()


@pytest.mark.parametrize("fmt", ["JPEG", "WEBP"])
def test_lossy_formats_are_decoded_closely(fmt):
    flat = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    data = save(Image.fromarray(flat), fmt)
    assert images.header(data, "x") == (fmt.lower(), 16, 24)
    assert np.abs(images.decode(data, "x").astype(int) - flat).max() < 6


@pytest.mark.parametrize("fmt", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(fmt):
    data = save(Image.fromarray(PIXELS), fmt)
    with pytest.raises(DatasetError, match="pic 7: not a JPEG, PNG or WebP image"):
        images.decode(data, "pic 7")


def test_text_is_not_an_image():
    with pytest.raises(DatasetError, match="not a JPEG"):
        images.header(b"<svg/>", "x")


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 4), (16_000, 16_000), (9_000, 9_000)])
def test_decompression_bombs_are_refused_by_their_header(size):
    data = png_with_declared_size(*size)
    assert len(data) < 1000
    for read in (images.header, images.decode):
        with pytest.raises(DatasetError, match=r"pic 7.*(pixels|bomb)"):
            read(data, "pic 7")


def test_too_many_bytes_are_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 50)
    with pytest.raises(DatasetError, match="at most 50"):
        images.header(images.encode_png(PIXELS), "x")


def test_a_truncated_image_is_named():
    data = save(Image.fromarray(np.repeat(np.repeat(PIXELS, 20, 0), 20, 1)), "JPEG")
    with pytest.raises(DatasetError, match="pic 7: the image cannot be decoded"):
        images.decode(data[: len(data) // 2], "pic 7")


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    data = save(Image.fromarray(PIXELS), "PNG", exif=exif)
    assert images.header(data, "x") == ("png", 6, 9)
    assert (images.decode(data, "x") == np.rot90(PIXELS, -1)).all()


def test_every_color_mode_becomes_rgb():
    gray = Image.fromarray(PIXELS[..., 0])
    assert (images.decode(save(gray, "PNG"), "x") == PIXELS[..., :1]).all()

    deep = Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16))
    assert images.decode(save(deep, "PNG"), "x")[0, :, 0].tolist() == [0, 0, 1, 255]

    clear = np.dstack([PIXELS, np.zeros((6, 9), np.uint8)])
    clear[0, 0, 3] = 255
    decoded = images.decode(save(Image.fromarray(clear), "PNG"), "x")
    assert (decoded[0, 0] == PIXELS[0, 0]).all() and (decoded[1:] == 255).all()

    palette = Image.fromarray(PIXELS).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert (images.decode(save(palette, "PNG"), "x") == expected).all()
    see_through = images.decode(save(palette, "PNG", transparency=0), "x")
    assert (see_through[np.asarray(palette) == 0] == 255).all()

    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = images.decode(save(inks, "JPEG"), "x")
    assert red.shape == (8, 8, 3) and (red[..., 0] > 240).all() and (red[..., 1:] < 20).all()

    # Blended onto white, what decode_rgba returns is what decode returns.
    partly = np.dstack([PIXELS, np.arange(54, dtype=np.uint8).reshape(6, 9) * 4])
    for image in (palette, deep, gray, inks, Image.fromarray(clear), Image.fromarray(partly)):
        options = {"transparency": 0} if image.mode in ("P", "L", "I;16") else {}
        data = save(image, "JPEG" if image.mode == "CMYK" else "PNG", **options)
        rgba = images.decode_rgba(data, "x")
        white = Image.new("RGBA", rgba.shape[1::-1], "white")
        blended = Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB")
        assert (np.asarray(blended) == images.decode(data, "x")).all()

    bits = Image.fromarray(PIXELS[..., 0] > 127)
    assert set(np.unique(images.decode(save(bits, "PNG"), "x"))) == {0, 255}


def test_center_crop():
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = 250
    cropped = images.center_crop(image, 10)
    assert cropped.shape == (10, 10, 3) and (cropped[:, 1:-1] > 245).all()
    assert images.center_crop(PIXELS, 6).shape == (6, 6, 3)
    assert (images.center_crop(PIXELS, 6) == PIXELS[:, 1:7]).all()
    assert images.center_crop(PIXELS, 32).shape == (32, 32, 3)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "junk", [b"junk", b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", bytes(50)]
)
def test_junk_metadata_is_no_orientation(fmt, junk):
    pixels = np.full((4, 5, 3), 90, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt, exif=junk)
    assert images.decode(buffer.getvalue(), "x").shape == (4, 5, 3)
    assert images.decode_rgba(buffer.getvalue(), "x").shape == (4, 5, 4)


def test_errors_name_no_address_in_memory():
    for data in (b"", b"GIF89a......"):
        with pytest.raises(DatasetError, match="x: not a JPEG, PNG or WebP image") as error:
            images.decode(data, "x")
        assert "0x7" not in str(error.value)
