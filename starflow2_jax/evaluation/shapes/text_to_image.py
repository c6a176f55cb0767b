"""Text-to-image generation, scored by tag as in GenEval, with baselines that ignore the caption."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from starflow2_jax.evaluation import ask, codec
from starflow2_jax.evaluation.shapes import accuracy
from starflow2_jax.evaluation.shapes.cases import Case, Sample
from starflow2_jax.inference.prompts import Part
from starflow2_jax.shapes import detector

# Images uint8 [N, H, W, 3] -> the codec's reconstructions of them.
ReconstructFn = Callable[[np.ndarray], np.ndarray]

BASELINES = {
    "shuffled": "the same images, scored against other captions of their tag",
    "chance": "reference images of other captions of the tag",
    "constant_image": "for each tag the one image that is correct most often",
    "blank_image": "an empty background",
}
CEILINGS = {
    "reference_image": "the reference image itself, as the detector sees it",
    "codec_reconstruction": "the reference image, encoded and decoded with the noise of training",
}


def generate_images(cases: Sequence[Case], answer_fn: ask.AnswerFn) -> list[Part]:
    """Return the image of the answer to each case."""
    answers = answer_fn([case.prompt for case in cases], "image")
    return [ask.answer_image(parts, case.id) for parts, case in zip(answers, cases)]


def answer_cases(cases: Sequence[Case], answer_fn: ask.AnswerFn) -> list[Sample]:
    """Draw one image for every caption and return it with its verdict."""
    samples = []
    for case, part in zip(cases, generate_images(cases, answer_fn)):
        verdict = detector.check_facts(detector.detect(part.image), case.facts)
        correct, reason = verdict.correct, verdict.reason
        samples.append(Sample(case, (part.image,), "", correct, reason, part.log_likelihood))
    return samples


def measure(
    cases: Sequence[Case], answer_fn: ask.AnswerFn, reconstruct_fn: ReconstructFn | None = None
) -> tuple[dict[str, Any], list[Sample]]:
    """Generate one image for every caption and score the images."""
    samples = answer_cases(cases, answer_fn)
    generated = [detector.detect(sample.images[0]) for sample in samples]
    references = [detector.detect(case.reference_image) for case in cases]
    blanks = [
        detector.detect(codec.background(case.reference_image, case.scenes[0])) for case in cases
    ]

    def correct(detections):
        return [detector.check_facts(d, c.facts).correct for d, c in zip(detections, cases)]

    def generated_correct_for(j, i):
        return detector.check_facts(generated[j], cases[i].facts).correct

    def reference_correct_for(j, i):
        return detector.check_facts(references[j], cases[i].facts).correct

    baselines = {
        "shuffled": accuracy.shuffled(cases, generated_correct_for),
        "chance": accuracy.shuffled(cases, reference_correct_for),
        "constant_image": accuracy.best_constant(cases, reference_correct_for),
        "blank_image": correct(blanks),
    }
    figures = accuracy.compare(cases, [sample.correct for sample in samples], baselines)
    ceilings = {"reference_image": references}
    if reconstruct_fn is not None:
        images = reconstruct_fn(np.stack([case.reference_image for case in cases]))
        ceilings["codec_reconstruction"] = [*map(detector.detect, images)]
    figures["ceilings"] = {
        name: accuracy.split_by_holdout(cases, correct(detections))
        for name, detections in ceilings.items()
    }
    return figures, samples
