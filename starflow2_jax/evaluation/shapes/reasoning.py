"""Questions that an intermediate image helps with, answered with it, without it, with another one.

The answer to a request with a choice (task `reason_free`) is the one that the detector reads off
the image that the model generated. If that image does not give a clear one, the sample is wrong;
answers without an image or with another one are then compared with the reference.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from starflow2_jax.evaluation import ask
from starflow2_jax.evaluation.shapes import accuracy, vqa
from starflow2_jax.evaluation.shapes.cases import Case, Sample, with_blank_images
from starflow2_jax.inference.prompts import Part
from starflow2_jax.shapes import detector, reasoning as shapes_reasoning
from starflow2_jax.shapes.detector import Verdict

BASELINES = {
    "direct_answer": "the answer at once, without an image",
    "other_image": "the answer after the image that was drawn for the next case of the tag",
    "encoded_again": "the answer after its own image, decoded to pixels and encoded again",
    "most_frequent": "the most frequent answer of the tag",
    "chance": "one over the number of different answers of the tag",
    "blank_source": "the model with a gray image in place of the source; it draws, then answers",
    "blank_source_direct_answer": "the same, answered at once",
    "shuffled": "the model with the source of the next case of the tag; it draws, then answers",
}
CEILINGS = {"reference_image": "the answer after the reference image in place of the generated one"}


class _Answer(NamedTuple):
    """An image and a text that the model generated, and what the image says."""

    part: Part
    text: str
    verdict: Verdict  # of the image
    expected: str | None  # the correct text after this image, None if the image does not give one

    @property
    def correct(self) -> bool:
        return self.text == self.expected


def answer_cases(cases: Sequence[Case], answer_fn: ask.AnswerFn) -> list[Sample]:
    """Answer every case after generating an image; return source, image, reference and verdict."""
    return [
        _sample(c, answer) for c, answer in zip(cases, _answer_through_images(cases, answer_fn))
    ]


def measure(cases: Sequence[Case], answer_fn: ask.AnswerFn) -> tuple[dict[str, Any], list[Sample]]:
    """Answer every case after generating an image, which is scored too, and by each baseline.

    The same question is answered with its own image, without one and with another one, so
    `differences` to `direct_answer` and `other_image` are what the image adds.
    """
    answers = _answer_through_images(cases, answer_fn)
    expected_cases = [
        dataclasses.replace(case, reference_text=answer.expected or case.reference_text)
        for case, answer in zip(cases, answers)
    ]
    blank_cases = [with_blank_images(case) for case in expected_cases]
    images = [answer.part.image for answer in answers]
    other_images = [images[j] for j in accuracy.next_in_tag(cases)]

    def correct_after_drawing(cases):
        return [answer.correct for answer in _answer_through_images(cases, answer_fn)]

    baselines = {
        "direct_answer": vqa.is_correct(expected_cases, answer_fn),
        "other_image": _correct_after(expected_cases, other_images, answer_fn),
        "encoded_again": _correct_after(expected_cases, images, answer_fn),
        "most_frequent": accuracy.most_frequent_text(expected_cases),
        "chance": accuracy.chance_of_text(cases),
        "blank_source": correct_after_drawing([with_blank_images(case) for case in cases]),
        "blank_source_direct_answer": vqa.is_correct(blank_cases, answer_fn),
        "shuffled": correct_after_drawing(vqa.shuffle_images(cases)),
    }
    figures = accuracy.compare(cases, [answer.correct for answer in answers], baselines)
    references = [case.reference_image for case in cases]
    split = functools.partial(accuracy.split_by_holdout, cases)
    figures["ceilings"] = {"reference_image": split(_correct_after(cases, references, answer_fn))}
    figures["image"] = {
        **accuracy.compare(cases, [answer.verdict.correct for answer in answers], {}),
        "ceilings": {
            "reference_image": split(
                [read_image(image, case)[0].correct for image, case in zip(references, cases)]
            )
        },
    }
    direct = baselines["direct_answer"]
    return figures, [_sample(*row) for row in zip(cases, answers, direct)]


def _correct_after(
    cases: Sequence[Case], images: Sequence[np.ndarray], answer_fn: ask.AnswerFn
) -> list[bool]:
    """Return whether the text after these images, as the model's own, is the reference text."""
    prompts = [
        [*case.prompt, Part("image", "assistant", image=image)]
        for case, image in zip(cases, images)
    ]
    texts = [ask.answer_text(parts) for parts in answer_fn(prompts, "text")]
    return [text == case.reference_text for text, case in zip(texts, cases)]


def read_image(image: np.ndarray, case: Case) -> tuple[Verdict, str | None]:
    """Return whether an image is right for a case, and the correct text after it.

    The text is None if the answer depends on the image, and the image does not give a clear one.
    """
    objects = detector.detect(image)
    verdict = detector.check_facts(objects, case.facts)
    if case.task != "reason_free":
        return verdict, case.reference_text
    answer = shapes_reasoning.read_answer(case.tag, objects, case.scenes)
    if answer is None and verdict.correct:
        verdict = Verdict(False, "it gives no clear answer")
    return verdict, answer


def _answer_through_images(cases: Sequence[Case], answer_fn: ask.AnswerFn) -> list[_Answer]:
    """Return the answer to each case, an image and then a text."""
    answers = []
    for parts, case in zip(answer_fn([case.prompt for case in cases], "both"), cases):
        part = ask.answer_image(parts, case.id)
        answers.append(_Answer(part, ask.answer_text(parts), *read_image(part.image, case)))
    return answers


def _sample(case: Case, answer: _Answer, direct_is_correct: bool | None = None) -> Sample:
    """Return the sample of a case."""
    reasons = []
    if answer.expected is not None and not answer.correct:
        reasons.append(f"correct: {answer.expected}")
    if answer.verdict.reason:
        reasons.append(f"image: {answer.verdict.reason}")
    shown_images = (*case.prompt_images, answer.part.image, case.reference_image)
    return Sample(
        case,
        shown_images,
        answer.text,
        answer.correct,
        "; ".join(reasons),
        answer.part.log_likelihood,
        {"image": bool(answer.verdict.correct), "direct_answer": direct_is_correct},
    )
