"""Questions of harnesses: settings, images and records, without any model."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from starflow2_jax.data import images, records
from starflow2_jax.data.records import Text
from starflow2_jax.evaluation import interleaved_likelihood, vqa
from starflow2_jax.evaluation.harnesses import lmms_plugin, questions
from starflow2_jax.inference.prompts import Part

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"max_tokens": 128, "stop": (), "temperature": 0, "images": 0}),
        ({"until": ["\n\n", "ASSISTANT:"], "max_new_tokens": 16, "num_beams": 3},
         {"max_tokens": 16, "stop": ("\n\n", "ASSISTANT:")}),
        ({"until": "###", "max_new_tokens": 32768, "do_sample": False, "top_p": None},
         {"max_tokens": 200, "stop": ("###",), "temperature": 0, "top_p": 1}),
        ({"do_sample": True, "top_p": 0.9, "top_k": 5},
         {"temperature": 1, "top_p": 0.9, "top_k": 5}),
        ({"temperature": 0.0, "do_sample": True, "top_p": 0.5}, {"temperature": 0, "top_p": 1}),
    ],
)  # fmt: skip
def test_settings_of_a_harness(settings, expected):
    options = questions.read_settings(settings, 200)
    assert {name: getattr(options, name) for name in expected} == expected


def test_images_of_a_harness_are_rgb_arrays():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    for value in (pixels, Image.fromarray(pixels), buffer.getvalue()):
        np.testing.assert_array_equal(questions.read_image(value, 16, "pad", "x"), pixels)
    gray = questions.read_image(Image.fromarray(pixels[..., 0]), 16, "pad", "x")
    np.testing.assert_array_equal(gray, np.repeat(pixels[..., :1], 3, 2))
    palette = Image.fromarray(pixels).convert("P")
    assert questions.read_image(palette, 16, "pad", "x").shape == (16, 16, 3)
    padded = questions.read_image(pixels[:8], 16, "pad", "x")
    np.testing.assert_array_equal(padded[4:12], pixels[:8])  # nothing of it is lost
    with pytest.raises(ValueError, match="x: the image is 8 x 16"):
        questions.read_image(pixels[:8], 16, "refuse", "x")
    with pytest.raises(ValueError, match=r"x: float64\[16, 16\], expected uint8 \[H, W, 3\]"):
        questions.read_image(np.zeros((16, 16)), 16, "pad", "x")


def test_answers_are_scored_after_their_question(monkeypatch):
    scored = []

    def score_records(model, rows, *, batch_size, seed):
        scored.extend(rows)
        count = np.array([2.0, 3.0])
        return {"text/nll": np.array([0.5, 4.0]), "text/count": count,
                "text/correct": np.array([2.0, 1.0])}, None  # fmt: skip

    monkeypatch.setattr(interleaved_likelihood, "score_records", score_records)
    image = np.zeros((4, 4, 3), np.uint8)
    rows = [[image, "What?"], [Part("text", "system", "Be brief."), "Who?"]]
    scores = questions.score_answers(None, rows, [" red", "a man\n"], batch_size=8)
    assert scores == [(0.5, True), (4.0, False)]
    first, second = scored
    # The white space that harnesses put before a choice is none of the answer.
    assert [getattr(s, "s", s) for s in first.segs][1:] == ["What?", "red"]
    assert [s.loss for s in first.segs] == [False, False, True] and len(first.imgs) == 1
    assert [s.role for s in second.segs] == ["system", "user", "assistant"]
    assert questions.score_answers(None, [], [], batch_size=8) == []


def test_records_that_end_with_one_answer_are_decoded(monkeypatch):
    requests = []

    def answer(model, prompts, options, numbers, *, batch_size, seed):
        requests.extend(zip(numbers, prompts, options))
        return [f"answer {number}" for number in numbers]

    monkeypatch.setattr(questions, "answer", answer)
    blob = records.image_blob(images.encode_png(np.zeros((4, 4, 3), np.uint8)), "x")
    question, end = Text("What?", False, "user"), Text("red one", True, "assistant")

    def record(*segments):
        return records.Record(1, "r", "", [records.Img(0, False, "user"), *segments], [blob])

    rows = [record(question, end), record(question, end, question, end), record(question, end)]
    model = SimpleNamespace(tokenizer=SimpleNamespace(encode=str.split))
    decoded = questions.decode_records(model, rows, batch_size=8, blank=True)
    assert decoded == {0: "answer 0", 2: "answer 2"}  # a dialog has two answers
    number, prompt, options = requests[1]
    assert number == 2 and options.max_tokens == 6 and (prompt[0].image == 128).all()
    assert [(part.kind, part.role, part.text) for part in prompt] == [
        ("image", "user", ""), ("text", "user", "What?"),
    ]  # fmt: skip
    sums = {"text/nll": np.ones(3), "text/count": np.full(3, 2.0), "text/correct": np.full(3, 2.0)}
    scored = vqa.from_sums(rows, sums, {**decoded, 2: "red one"})
    assert [row.correct for row in scored] == [False, True, True]


def test_the_plugin_imports_nothing_before_it_is_called():
    assert lmms_plugin.MODEL_ID == "starflow2_jax"
    # A plugin that cannot be imported would disable those of other packages, too.
    assert set(vars(lmms_plugin)) & {"lmms_eval", "jax", "questions"} == set()
