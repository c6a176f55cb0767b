"""Images of prompts are read from several sources; those that cannot be are named."""

import io

import numpy as np
import pytest
from PIL import Image

from starflow2_jax.inference import prompts

pytestmark = pytest.mark.fast


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_an_image_is_read_from_an_array_a_path_or_bytes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    encoded = png(Image.fromarray(pixels))
    (tmp_path / "a.png").write_bytes(encoded)
    for image in (pixels, tmp_path / "a.png", str(tmp_path / "a.png"), encoded):
        np.testing.assert_array_equal(prompts.read_pixels(image, "prompt 0"), pixels)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("/no/such.png", r"prompt 0, part 1: /no/such\.png: no such file"),
        (np.zeros((8, 8), np.uint8), r"part 1: expected uint8 \[H, W, 3\], got uint8 \[8, 8"),
        (np.zeros((8, 8, 3), np.float32), r"got float32 \[8, 8, 3\]"),
        (b"GIF89a", "not a JPEG, PNG or WebP image"),
        (np.broadcast_to(np.uint8(0), (9000, 9000, 3)), "9000 x 9000 pixels are more than"),
        (png(Image.new("1", (9000, 9000))), "the image is 9000 x 9000 pixels, at most"),
    ],
)
def test_images_that_cannot_be_read_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        prompts.parse_prompt(["a", {"type": "image", "image": image}], "prompt 0")
