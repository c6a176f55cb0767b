"""Images of prompts are read from several sources; those that cannot be are named."""

import io
import json
import os

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


@pytest.mark.parametrize(
    "prompt",
    [
        "\ud800",
        ["a", "\udcff"],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": [{"type": "text", "text": "a\0"}]}],
    ],
)
def test_text_that_is_no_unicode_is_named(prompt):
    with pytest.raises(ValueError, match=r"prompt 0, (part|message) .*: (not valid Unicode|a NUL)"):
        prompts.parse_prompt(prompt, "prompt 0")


def test_files_of_chats_have_line_feeds_and_may_have_a_byte_order_mark(tmp_path):
    chat = [{"role": "user", "content": "a\u2028b\x85"}]
    text = json.dumps(chat, ensure_ascii=False)
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n\n{text}".encode())
    assert prompts.read_batch(file) == [chat, chat]
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert prompts.read_chat(file) == chat


DAMAGED = (b"[" * 100_000, b'["\\ud800"]', b"\xff", b"{}", b"[]", b"[3]", b"", b'[{"role": 1}')


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_files_of_chats_are_named(tmp_path, data):
    file = tmp_path / "chat.json"
    file.write_bytes(data)
    for read in (prompts.read_chat, prompts.read_batch):
        with pytest.raises(ValueError, match=r"chat\.json"):
            read(file)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(100 << 30)
    for name, problem in (
        ("a.png", "not a regular file"),
        ("b.png", "bytes, at most"),
        ("/dev/zero", "not a"),
    ):
        with pytest.raises(ValueError, match=f"prompt 0, {tmp_path / name}: .*{problem}"):
            prompts.read_pixels(str(tmp_path / name), "prompt 0")
