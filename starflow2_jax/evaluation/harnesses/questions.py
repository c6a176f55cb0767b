"""Answers and exact likelihoods of answers, in the terms of evaluation harnesses.

A question is a list of texts and images of the user, or of `Part` with other roles. Nothing here
needs a harness to be installed.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.data import images, records
from starflow2_jax.data.records import Img, Record, Text
from starflow2_jax.evaluation import ask, interleaved_likelihood
from starflow2_jax.inference.generate import generate_many
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.options import GenerateOptions, make_options
from starflow2_jax.inference.prompts import Part, parse_prompt
from starflow2_jax.inference.resize import fit_image

Question = Sequence[str | np.ndarray | Part]
DEFAULT_MAX_TOKENS = 128
# Tokens that an answer may have beyond the longest reference text.
_EXTRA_TOKENS = 4


def read_settings(settings: Mapping[str, Any], limit: int) -> GenerateOptions:
    """Return the options of a harness' generation settings.

    Args:
        settings: `max_new_tokens`, `until` (a text or several), `do_sample`, `temperature`,
            `top_p` and `top_k`. Decoding is greedy unless `do_sample` is set or the temperature is
            above 0. Beams and other settings of the decoding of others are ignored.
        limit: the most tokens of an answer; a setting of more becomes this.
    """
    until = settings.get("until") or ()
    temperature = settings.get("temperature")
    if temperature is None:
        temperature = 1.0 if settings.get("do_sample") else 0.0
    values: dict[str, Any] = {"images": 0, "temperature": float(temperature)}
    max_tokens = settings.get("max_new_tokens") or DEFAULT_MAX_TOKENS
    values["max_tokens"] = min(int(max_tokens), limit)
    values["stop"] = (until,) if isinstance(until, str) else tuple(until)
    if temperature and settings.get("top_p"):
        values["top_p"] = float(settings["top_p"])
    if temperature and settings.get("top_k"):
        values["top_k"] = int(settings["top_k"])
    return make_options(values)


def read_image(value: Any, side: int, resize: str, location: str) -> np.ndarray:
    """Return an image of a harness as uint8 [side, side, 3].

    Args:
        value: a PIL image, a path, encoded bytes, or an array uint8 [H, W, 3].
        side: the side that the model reads.
        resize: what to do with an image of another size, see `inference.resize`.
        location: the image's name in error messages.
    """
    from PIL import Image  # heavy

    if isinstance(value, str):
        with open(value, "rb") as file:
            value = file.read()
    if isinstance(value, bytes):
        value = images.decode(value, location)
    elif isinstance(value, Image.Image):
        value = images.decode(images.encode_png(_upright(value)), location)
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"{location}: {pixels.dtype}{list(pixels.shape)}, expected uint8 [H, W, 3]"
        )
    return fit_image(pixels, side, resize, location)[0]


def _upright(image: Any) -> np.ndarray:
    from PIL import ImageOps  # heavy

    image = ImageOps.exif_transpose(image)
    return np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))


def answer(
    model: Model,
    questions: Sequence[Question],
    options: Sequence[GenerateOptions],
    numbers: Sequence[int],
    *,
    batch_size: int,
    seed: int = 0,
) -> list[str]:
    """Return the answer to every question; those with equal options share batches.

    Args:
        model: a STARFlow2.
        questions: the questions.
        options: of each question.
        numbers: of each question; the noise of its images depends on it and the seed alone.
        batch_size: upper bound on the questions of a batch.
        seed: of the noise.
    """
    groups: dict[GenerateOptions, list[int]] = defaultdict(list)
    for i, row in enumerate(options):
        groups[dataclasses.replace(row, seed=seed)].append(i)
    answers: dict[int, str] = {}
    for row, group in groups.items():
        lengths = [_length(model, questions[i]) for i in group]
        order = [group[k] for k in ask.batch_order(lengths, min(batch_size, len(group)))]
        samples = generate_many(
            model,
            [list(questions[i]) for i in order],
            row,
            batch_size,
            [numbers[i] for i in order],
        )
        answers |= {i: ask.answer_text(parts[0]) for i, parts in zip(order, samples)}
    return [answers[i] for i in range(len(questions))]


def decode_records(
    model: Model,
    rows: Sequence[Record],
    *,
    batch_size: int,
    seed: int = 0,
    blank: bool = False,
) -> dict[int, str]:
    """Return the greedy answers to records that end with their only target, a text, by number.

    Args:
        model: a STARFlow2.
        rows: the records; the noise of an image depends on the number of its record and the seed.
        batch_size: upper bound on the questions of a batch.
        seed: of the noise.
        blank: replace images by gray.
    """
    prompts: dict[int, list[Part]] = {}
    max_tokens = 1
    for number, record in enumerate(rows):
        targets = [segment for segment in record.segs if segment.loss]
        if targets != record.segs[-1:] or not isinstance(targets[0], Text):
            continue
        prompts[number] = [_part(record, segment, blank) for segment in record.segs[:-1]]
        max_tokens = max(max_tokens, len(model.tokenizer.encode(targets[0].s)) + _EXTRA_TOKENS)
    options = [make_options({"images": 0, "max_tokens": max_tokens})] * len(prompts)
    answers = answer(
        model, list(prompts.values()), options, list(prompts), batch_size=batch_size, seed=seed
    )
    return dict(zip(prompts, answers))


def _part(record: Record, segment: Text | Img, blank: bool) -> Part:
    if isinstance(segment, Text):
        return Part("text", segment.role, segment.s)
    location = f"{record.id!r}, image {segment.i}"
    pixels = images.decode(record.imgs[segment.i].data, location)
    return Part("image", segment.role, image=np.full_like(pixels, 128) if blank else pixels)


def _length(model: Model, question: Question) -> int:
    """Return the number of text tokens and image patches of a question."""
    parts = parse_prompt(list(question), "question")
    tokens = [len(model.tokenizer.encode(part.text)) for part in parts if part.kind == "text"]
    return sum(tokens) + (len(parts) - len(tokens)) * model.model_config.num_patches


def score_answers(
    model: Model,
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    batch_size: int,
    seed: int = 0,
) -> list[tuple[float, bool]]:
    """Return the exact NLL in nats of every answer, and whether greedy decoding gives it.

    The NLL is that of all tokens of the answer and of the end of the turn, given the question.
    White space around an answer is removed, since none stands there in training.
    """
    rows = [_record(*row) for row in zip(range(len(questions)), questions, answers)]
    if not rows:
        return []
    sums, _ = interleaved_likelihood.score_records(
        model, rows, batch_size=min(batch_size, len(rows)), seed=seed
    )
    is_greedy = sums["text/correct"] == sums["text/count"]
    return [(float(nll), bool(ok)) for nll, ok in zip(sums["text/nll"], is_greedy)]


def _record(number: int, question: Question, answer: str) -> Record:
    segments: list[Text | Img] = []
    blobs = []
    for part in parse_prompt(list(question), f"question {number}"):
        if part.kind == "text":
            segments.append(Text(part.text, False, part.role))
        else:
            location = f"question {number}, image {len(blobs)}"
            segments.append(Img(len(blobs), False, part.role))
            blobs.append(records.image_blob(images.encode_png(part.image), location))
    segments.append(Text(answer.strip(), True, "assistant"))
    return Record(1, str(number), "harness", segments, blobs)
