"""Image editing: whether the requested change was made, and whether everything else stayed.

`changed`: the detector finds in the image what the whole target scene asks for, and none of what
had to go (GenEval metadata of the edit). `preserved`: every object that the edit leaves alone is
found in its color and shape, at most `MAX_SHIFT` image sides from its place, over the edits that
leave something alone. `both`: the two together, and no more objects than the target has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from starflow2_jax.evaluation import ask, codec
from starflow2_jax.evaluation.shapes import accuracy
from starflow2_jax.evaluation.shapes.cases import Case, Sample, with_blank_images
from starflow2_jax.evaluation.shapes.text_to_image import CEILINGS, ReconstructFn, generate_images
from starflow2_jax.shapes import detector
from starflow2_jax.shapes.detector import DetectedObject
from starflow2_jax.shapes.generator import Object, Scene

MAX_SHIFT = 0.08
MEASURES = ("changed", "preserved", "both")
BASELINES = {
    "copy": "the source image, unchanged",
    "shuffled": "the images generated for the next edit of the tag",
    "chance": "the reference image of the next edit of the tag",
    "blank_image": "an empty background",
    "blank_source": "the model with a gray image in place of the source",
}


def answer_cases(cases: Sequence[Case], answer_fn: ask.AnswerFn) -> list[Sample]:
    """Make every edit once and return source, result and reference with the verdict of `both`."""
    samples = []
    for case, part in zip(cases, generate_images(cases, answer_fn)):
        verdict = judge(part.image, case)
        images = (case.prompt_images[0], part.image, case.reference_image)
        both, reason = verdict["both"], verdict["reason"]
        measures = {name: verdict[name] for name in MEASURES}
        samples.append(Sample(case, images, "", both, reason, part.log_likelihood, measures))
    return samples


def measure(
    cases: Sequence[Case], answer_fn: ask.AnswerFn, reconstruct_fn: ReconstructFn | None = None
) -> tuple[dict[str, Any], list[Sample]]:
    """Make every edit once and score the images, by each of `MEASURES`.

    `psnr_outside_edit` is the mean over edits of the PSNR in dB between image and reference outside
    of the boxes around what changes.
    """
    samples = answer_cases(cases, answer_fn)
    generated = [sample.images[1] for sample in samples]
    blank_source = generate_images([with_blank_images(case) for case in cases], answer_fn)
    next_cases = accuracy.next_in_tag(cases)
    images = {
        "score": generated,
        "copy": [case.prompt_images[0] for case in cases],
        "shuffled": [generated[j] for j in next_cases],
        "chance": [cases[j].reference_image for j in next_cases],
        "blank_image": [codec.background(c.reference_image, c.scenes[-1]) for c in cases],
        "blank_source": [part.image for part in blank_source],
        "reference_image": [case.reference_image for case in cases],
    }
    if reconstruct_fn is not None:
        references = np.stack([case.reference_image for case in cases])
        images["codec_reconstruction"] = list(reconstruct_fn(references))
    verdicts = {name: [*map(judge, group, cases)] for name, group in images.items()}
    figures: dict[str, Any] = {name: _compare(cases, verdicts, name) for name in MEASURES}
    figures["psnr_outside_edit"] = {
        name: round(float(np.mean([*map(_psnr_outside_edit, images[name], cases)])), 2)
        for name in ("score", "blank_source", "codec_reconstruction")
        if name in images
    }
    return figures, samples


def judge(image: np.ndarray, case: Case) -> dict[str, Any]:
    """Return `changed`, `preserved` (None if nothing is left alone), `both`, and the `reason`."""
    objects = detector.detect(image)
    verdict = detector.check_facts(objects, case.facts)
    source, target = case.scenes[0], case.scenes[-1]
    static = [item for item in source.objects if item in target.objects]
    missing = [item for item in static if not any(_matches(d, item) for d in objects)]
    has_extra = len(objects) > len(target.objects)
    reason = verdict.reason
    if not reason and missing:
        reason = f"the {missing[0].color} {missing[0].shape} is not where it was"
    elif not reason and has_extra:
        reason = f"{len(objects)} objects, expected {len(target.objects)}"
    return {
        "changed": verdict.correct,
        "preserved": not missing if static else None,
        "both": verdict.correct and not missing and not has_extra,
        "reason": reason,
    }


def _matches(detected: DetectedObject, item: Object) -> bool:
    """Return whether a detected object has an object's shape and color and is near its place."""
    same = (detected.shape, detected.color) == (item.shape, item.color)
    return same and float(np.hypot(detected.x - item.x, detected.y - item.y)) <= MAX_SHIFT


def _compare(
    cases: Sequence[Case], verdicts: Mapping[str, Sequence[Mapping[str, Any]]], measure: str
) -> dict[str, Any]:
    """Return `accuracy.compare` and the ceilings of a measure, over the cases that have it."""
    index = [i for i, verdict in enumerate(verdicts["score"]) if verdict[measure] is not None]
    subset = [cases[i] for i in index]
    correct = {name: [group[i][measure] for i in index] for name, group in verdicts.items()}
    baselines = {name: correct[name] for name in BASELINES}
    return {
        **accuracy.compare(subset, correct["score"], baselines),
        "ceilings": {
            name: accuracy.split_by_holdout(subset, correct[name])
            for name in CEILINGS
            if name in correct
        },
    }


def _psnr_outside_edit(image: np.ndarray, case: Case) -> float:
    """Return the PSNR in dB of image and reference outside of the boxes around what changes."""
    source, target = case.scenes[0], case.scenes[-1]
    changed = set(source.objects) ^ set(target.objects)
    boxes = codec.object_boxes(Scene(source.background, source.ramp, tuple(changed)), len(image))
    return codec.psnr(case.reference_image, image, ~boxes)
