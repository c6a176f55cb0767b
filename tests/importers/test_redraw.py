"""Transparent images are drawn on the backgrounds of an import, and brought to one size."""

import io

import numpy as np
import pytest
from PIL import Image

from starflow2_jax.data import images, records
from starflow2_jax.importers import redraw

pytestmark = pytest.mark.fast

RED = (200, 30, 30)


def emoji(count, side=24):
    """Yield records of a red square in the middle of a transparent image."""
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[side // 4 : -side // 4, side // 4 : -side // 4] = (*RED, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    for k in range(count):
        blob = records.image_blob(buffer.getvalue(), "x")
        yield records.text_to_image(f"emoji/{k}", "emoji", f"square {k}", blob, {"label": k})


def test_only_the_background_differs_between_copies():
    rows = list(redraw.redraw(emoji(12), None, ("white", "random"), 0))
    assert [row.id for row in rows[:3]] == ["emoji/0", "emoji/0#1", "emoji/1"]
    grounds = set()
    for k, (white, random) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        assert records.text(white) == records.text(random) == f"square {k}"
        assert white.meta == random.meta == {"label": k}
        pixels, other = (records.target_image(row, "x") for row in (white, random))
        (original,) = emoji(1)
        assert (pixels == records.target_image(original, "x")).all()
        assert (other[6:18, 6:18] == RED).all()
        grounds.add(np.delete(other, slice(6, 18), axis=0).tobytes())
    assert len(grounds) == 12
    same = list(redraw.redraw(emoji(12), None, ("white", "random"), 0))
    assert same == rows
    assert list(redraw.redraw(emoji(12), None, ("white", "random"), 1))[1] != rows[1]


def test_images_are_scaled_to_one_size():
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    blob = records.image_blob(images.encode_png(photo), "x")
    record = records.text_to_image("a", "photos", "noise", blob)
    (row,) = redraw.redraw(iter([record]), 64, ("random",), 0)
    expected = Image.fromarray(photo).resize((64, 64), Image.Resampling.BICUBIC)
    assert (records.target_image(row, "x") == np.asarray(expected)).all()
    (small,) = redraw.redraw(emoji(1), 8, ("random",), 0)
    pixels = records.target_image(small, "x")
    assert pixels.shape == (8, 8, 3) and (np.abs(pixels[3:5, 3:5].astype(int) - RED) < 12).all()
