"""Procedural images follow from seed and index, and have many kinds of content."""

import numpy as np
import pytest

from starflow2_jax.data import records
from starflow2_jax.importers import procedural

pytestmark = pytest.mark.fast


def test_an_image_depends_on_seed_and_index_alone():
    first_five = [records.encode(r) for r in procedural.make_records(1, 5, 16)]
    first_nine = [records.encode(r) for r in procedural.make_records(1, 9, 16)]
    other_seed = [records.encode(r) for r in procedural.make_records(2, 9, 16)]
    assert first_five == first_nine[:5] and not set(first_nine) & set(other_seed)
    record = records.decode(first_nine[7], "x")
    expected = procedural.draw(procedural.image_rng(1, 7), 16)
    assert (records.target_image(record, "x") == expected).all()
    records.check(record, "x", pixels=True)


def test_the_content_scales_with_the_size():
    """An image of 96 pixels shows what that of 48 shows, apart from hard edges and font hints."""
    for index in range(20):
        small, large = (
            procedural.draw(procedural.image_rng(0, index), pixels) for pixels in (48, 96)
        )
        assert small.shape == (48, 48, 3) and large.shape == (96, 96, 3)
        halved = large.reshape(48, 2, 48, 2, 3).mean((1, 3))
        assert np.median(np.abs(halved - small)) < 6, index


def test_images_have_flat_smooth_and_busy_parts():
    image_stack = np.stack([procedural.draw(procedural.image_rng(5, k), 32) for k in range(300)])
    steps = np.abs(np.diff(image_stack.astype(int), axis=2)).mean(
        (1, 2, 3)
    )  # levels between neighbors
    assert (steps < 1).mean() > 0.05 and (steps > 25).mean() > 0.05
    assert ((steps > 2) & (steps < 12)).mean() > 0.2
    # Every part of the cube of colors occurs.
    cells = (image_stack // 64).reshape(-1, 3) @ [16, 4, 1]
    assert (np.bincount(cells, minlength=64) > 500).all()
