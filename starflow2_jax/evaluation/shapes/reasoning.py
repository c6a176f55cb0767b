"""Questions that an intermediate image helps with, answered with and without generating it."""

import functools
from collections.abc import Sequence
from typing import Any

from starflow2_jax.evaluation import ask
from starflow2_jax.evaluation.shapes import accuracy, vqa
from starflow2_jax.evaluation.shapes.cases import Case, Sample, with_blank_images
from starflow2_jax.inference.prompts import Part
from starflow2_jax.shapes import detector

BASELINES = {
    "direct_answer": "the answer at once, without an image",
    "most_frequent": "the most frequent answer of the tag",
    "chance": "one over the number of different answers of the tag",
    "blank_source": "the model with a gray image in place of the source; it draws, then answers",
    "blank_source_direct_answer": "the same, answered at once",
    "shuffled": "the model with the source of the next case of the tag; it draws, then answers",
}
CEILINGS = {"reference_image": "the answer after the reference image in place of the generated one"}


def measure(cases: Sequence[Case], answer_fn: ask.AnswerFn) -> tuple[dict[str, Any], list[Sample]]:
    """Answer every case after generating an image, which is scored too, and at once."""
    answers = answer_fn([case.prompt for case in cases], "both")
    texts = [ask.answer_text(parts) for parts in answers]
    correct = [text == case.reference_text for text, case in zip(texts, cases)]
    images = [ask.answer_image(parts, case.id) for parts, case in zip(answers, cases)]
    verdicts = [detector.judge(part.image, case.facts) for part, case in zip(images, cases)]
    references = [detector.judge(case.reference_image, case.facts).correct for case in cases]
    blank = [with_blank_images(case) for case in cases]
    forced_prompts = [
        [*case.prompt, Part("image", "assistant", image=case.reference_image)] for case in cases
    ]
    forced_texts = [ask.answer_text(parts) for parts in answer_fn(forced_prompts, "text")]
    forced = [text == case.reference_text for text, case in zip(forced_texts, cases)]
    split = functools.partial(accuracy.split_by_holdout, cases)
    figures = {
        "score": split(correct),
        "baselines": {
            "direct_answer": split(vqa.is_correct(cases, answer_fn)),
            "most_frequent": split(accuracy.most_frequent_text(cases)),
            "chance": split(accuracy.chance_of_text(cases)),
            "blank_source": split(vqa.is_correct(blank, answer_fn, "both")),
            "blank_source_direct_answer": split(vqa.is_correct(blank, answer_fn)),
            "shuffled": split(vqa.is_correct(vqa.shuffle_images(cases), answer_fn, "both")),
        },
        "ceilings": {"reference_image": split(forced)},
        "image": {
            "score": split([verdict.correct for verdict in verdicts]),
            "baselines": {},
            "ceilings": {"reference_image": split(references)},
        },
    }
    samples = []
    for case, part, text, matched, verdict in zip(cases, images, texts, correct, verdicts):
        reason = "" if matched else f"correct: {case.reference_text}"
        if verdict.reason:
            reason = f"{reason}; image: {verdict.reason}".lstrip("; ")
        shown_images = (*case.prompt_images, part.image, case.reference_image)
        samples.append(Sample(case, shown_images, text, matched, reason, part.log_likelihood))
    return figures, samples
