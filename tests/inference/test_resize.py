"""The resize policies of prompts: sizes there and back, what is lost, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from starflow2_jax.inference import resize
from starflow2_jax.inference.prompts import Part

pytestmark = pytest.mark.fast
SIDE = 16


def gradient(height, width):
    """Return an image whose red grows to the right and whose green grows downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(10, 250, width, dtype=np.uint8)
    pixels[..., 1] = np.linspace(10, 250, height, dtype=np.uint8)[:, None]
    return pixels


@pytest.mark.parametrize(
    "height, width, shape",
    [
        (40, 20, (16, 8)),
        (20, 40, (8, 16)),
        (5, 3, (16, 10)),
        (100, 100, (16, 16)),
        (900, 1, (16, 1)),
    ],
)
def test_a_padded_image_has_all_of_its_source_and_gets_its_shape_back(height, width, shape):
    pixels = gradient(height, width)
    square, fit = resize.fit_image(pixels, SIDE, "pad")
    assert square.shape == (SIDE, SIDE, 3) and square.dtype == np.uint8
    inside = resize.restore_image(square, [fit])
    assert inside.shape[:2] == shape
    margin = np.ones((SIDE, SIDE), bool)
    top, left = fit.box[:2]
    margin[top : top + shape[0], left : left + shape[1]] = False
    assert (square[margin] == resize.GRAY).all()
    # The corners of the source are in the corners of the image, and nothing is mirrored.
    expected = np.asarray(Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BICUBIC))
    assert np.abs(inside.astype(int) - expected).max() <= 12
    assert fit.to_json() == {
        "policy": "pad", "source": [height, width], "side": SIDE, "box": [top, left, *shape]
    }  # fmt: skip


def test_a_crop_loses_its_margins_and_stays_a_square():
    square, fit = resize.fit_image(gradient(16, 48), SIDE, "center_crop")
    assert square.shape == (SIDE, SIDE, 3) and fit.policy == "center_crop"
    assert square[..., 0].min() > 80 and square[..., 0].max() < 180
    assert resize.restore_image(square, [fit]).shape == square.shape


def test_an_image_of_the_right_size_is_unchanged():
    pixels = gradient(SIDE, SIDE)
    for policy in resize.POLICIES:
        square, fit = resize.fit_image(pixels, SIDE, policy)
        assert square is pixels and fit.policy == "none"


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"prompt 2: the image is 8 x 9 .* --resize pad"):
        resize.fit_image(gradient(8, 9), SIDE, "refuse", "prompt 2")
    with pytest.raises(ValueError, match="resize='crop' is not one of refuse, pad, center_crop"):
        resize.fit_image(gradient(8, 9), SIDE, "crop")


def test_the_images_of_a_prompt_are_squares_and_its_pictures_restored():
    latent = Part("image", "user", latent=np.zeros((4, 3)))
    parts = [Part("text", "user", "a"), latent, Part("image", "user", image=gradient(20, 40))]
    squares, fits = resize.fit_parts(parts, SIDE, "pad", "prompt 0")
    assert squares[:2] == parts[:2] and squares[2].image.shape == (SIDE, SIDE, 3) and len(fits) == 1
    answer = [Part("text", text="a"), Part("image", image=gradient(SIDE, SIDE))]
    restored = resize.restore_parts(answer, fits)
    assert restored[0] is answer[0] and restored[1].image.shape == (8, 16, 3)
    assert resize.restore_parts(answer, [])[1].image.shape == (SIDE, SIDE, 3)
    with pytest.raises(ValueError, match=r"prompt 0, part 2: the image is 20 x 40"):
        resize.fit_parts(parts, SIDE, "refuse", "prompt 0")
