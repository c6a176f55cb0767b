"""Text-to-image generation, scored by tag as in GenEval, with baselines that ignore the caption."""

import functools
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


def measure(
    cases: Sequence[Case], answer_fn: ask.AnswerFn, reconstruct_fn: ReconstructFn | None = None
) -> tuple[dict[str, Any], list[Sample]]:
    """Generate one image for every caption and score the images."""
    parts = generate_images(cases, answer_fn)
    generated = [detector.detect(part.image) for part in parts]
    references = [detector.detect(case.reference_image) for case in cases]
    blanks = [
        detector.detect(codec.background(case.reference_image, case.scenes[0])) for case in cases
    ]
    verdicts = [detector.check_facts(objects, c.facts) for objects, c in zip(generated, cases)]
    split = functools.partial(accuracy.split_by_holdout, cases)

    def score(detections):
        return split([detector.check_facts(d, c.facts).correct for d, c in zip(detections, cases)])

    def generated_correct_for(j, i):
        return detector.check_facts(generated[j], cases[i].facts).correct

    def reference_correct_for(j, i):
        return detector.check_facts(references[j], cases[i].facts).correct

    figures = {
        "score": split([verdict.correct for verdict in verdicts]),
        "baselines": {
            "shuffled": split(accuracy.shuffled(cases, generated_correct_for)),
            "chance": split(accuracy.shuffled(cases, reference_correct_for)),
            "constant_image": split(accuracy.best_constant(cases, reference_correct_for)),
            "blank_image": score(blanks),
        },
        "ceilings": {"reference_image": score(references)},
    }
    if reconstruct_fn is not None:
        images = reconstruct_fn(np.stack([case.reference_image for case in cases]))
        figures["ceilings"]["codec_reconstruction"] = score(map(detector.detect, images))
    samples = [
        Sample(case, (part.image,), "", verdict.correct, verdict.reason, part.log_likelihood)
        for case, part, verdict in zip(cases, parts, verdicts)
    ]
    return figures, samples
