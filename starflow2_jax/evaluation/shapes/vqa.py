"""Visual question answering by decoding, with baselines that do not see the image.

An answer is correct if it equals the reference text word for word.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from starflow2_jax.data import chat_layout
from starflow2_jax.evaluation import ask, scoring_batches
from starflow2_jax.evaluation.shapes import accuracy
from starflow2_jax.evaluation.shapes.cases import Case, Sample, with_blank_images, with_images_of
from starflow2_jax.inference import vlm
from starflow2_jax.inference.vlm import VLM
from starflow2_jax.training.tasks.vlm import grid_side

_VLM_BATCH_SIZE = 32
BASELINES = {
    "most_frequent": "the most frequent answer of the tag",
    "chance": "one over the number of different answers of the tag",
    "blank_image": "the model with a gray image in place of the real one",
    "shuffled": "the model with the image of the next question of the tag",
}
REFERENCES = {
    "vlm_baseline": "the frozen VLM with its own vision tower",
    "vlm_baseline_blank_image": "the frozen VLM with its own vision tower and a gray image",
    "text_only_baseline": "a VLM that was trained without images",
}


def answer_cases(cases: Sequence[Case], answer_fn: ask.AnswerFn) -> list[Sample]:
    """Answer every question and return the answer with its verdict."""
    samples = []
    for case, parts in zip(cases, answer_fn([case.prompt for case in cases], "text")):
        text = ask.answer_text(parts)
        correct = text == case.reference_text
        reason = "" if correct else f"correct: {case.reference_text}"
        log_likelihood = sum(part.log_likelihood or 0.0 for part in parts)
        images = tuple(case.prompt_images)
        samples.append(Sample(case, images, text, correct, reason, log_likelihood))
    return samples


def measure(cases: Sequence[Case], answer_fn: ask.AnswerFn) -> tuple[dict[str, Any], list[Sample]]:
    """Answer every question once, and once more under each baseline."""
    samples = answer_cases(cases, answer_fn)
    baselines = {
        "most_frequent": accuracy.most_frequent_text(cases),
        "chance": accuracy.chance_of_text(cases),
        "blank_image": is_correct([*map(with_blank_images, cases)], answer_fn),
        "shuffled": is_correct(shuffle_images(cases), answer_fn),
    }
    figures = accuracy.compare(cases, [sample.correct for sample in samples], baselines)
    return {**figures, "references": {}}, samples


def shuffle_images(cases: Sequence[Case]) -> list[Case]:
    """Return the cases, each with the images of the next case of its tag."""
    return [with_images_of(c, cases[j]) for c, j in zip(cases, accuracy.next_in_tag(cases))]


def is_correct(cases: Sequence[Case], answer_fn: ask.AnswerFn, kind: str = "text") -> list[bool]:
    """Return for each case whether it is answered with its reference text."""
    answers = answer_fn([case.prompt for case in cases], kind)
    return [ask.answer_text(parts) == case.reference_text for parts, case in zip(answers, cases)]


def vlm_is_correct(model: VLM, cases: Sequence[Case], *, blank: bool = False) -> list[bool]:
    """Return for each case whether a VLM with its own vision tower gives the reference text.

    The VLM scores the reference: greedy decoding gives it exactly if every token, including the end
    of the turn, is the likeliest after those before it. `blank` replaces images by gray.
    """
    pixels = model.cfg["image"]["pixels"]
    for case in cases:
        for image in case.prompt_images:
            if image.shape != (pixels, pixels, 3):
                raise ValueError(
                    f"case {case.id} has an image of shape {image.shape}, but the VLM reads images "
                    f"of {pixels} x {pixels} pixels"
                )
    records = [case.record for case in cases]
    correct: list[bool] = []
    tokenizer = chat_layout.open_tokenizer(model.tokenizer_folder, model.model_config.vocab)
    side = grid_side(model.cfg, model.model_config)
    size = min(_VLM_BATCH_SIZE, len(records))
    for batch, count in scoring_batches.batches(records, tokenizer, side, size=size, blank=blank):
        wrong = np.asarray(vlm.score(model, batch)["wrong"])
        correct += (wrong[:count, 0] == 0).tolist()
    return correct
