"""The stored requests of VLMEvalKit are those of its restated code, and have its traps."""

import base64
import io

import numpy as np
import pytest
from helpers import vlmevalkit
from PIL import Image

pytestmark = pytest.mark.fast


def images(body):
    urls = [p["image_url"]["url"] for p in body["messages"][0]["content"] if "image_url" in p]
    return [
        Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        for url in urls
    ]


@pytest.mark.parametrize("name", vlmevalkit.NAMES)
def test_stored_requests_are_those_of_the_code(name):
    body = vlmevalkit.read(name)
    counts = {"working": 0, "two_images": 2}
    pictures = images(body)
    # Images of the shapes benchmark have 64 pixels; small ones are enlarged.
    assert [(p.format, p.size) for p in pictures] == [("JPEG", (100, 100))] * counts.get(name, 1)
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url"] * len(pictures) + ["text"]
    text = parts[-1]["text"]
    changes = {"stream": True} if name == "streamed" else {}
    rebuilt = vlmevalkit.body(text, [np.asarray(p) for p in pictures], **changes)
    for part in (*rebuilt["messages"][0]["content"], *parts):
        part.pop("image_url", None)  # JPEG is lossy
    assert rebuilt == body and body["max_tokens"] == 32768 and body["n"] == 1


def test_a_question_with_options_is_one_text():
    options = {"A": "red", "B": "blue", "C": "green"}
    text = vlmevalkit.multiple_choice("What color is the circle?", options)
    stored = vlmevalkit.read("multiple_choice")["messages"][0]["content"][-1]["text"]
    assert stored == text and "\nB. blue\n" in text
