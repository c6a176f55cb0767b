"""Pictures drawn from captions, judged by tag as in GenEval, beside what needs no reading."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from starflow2_jax.evaluation import codec
from starflow2_jax.evaluation.codec import Picture
from starflow2_jax.evaluation.shapes import accuracy, ask as asking
from starflow2_jax.evaluation.shapes.ask import Ask
from starflow2_jax.evaluation.shapes.cases import Case, Sample
from starflow2_jax.shapes import detector

# Images uint8 [N, H, W, 3] -> what the codec makes of them.
Through = Callable[[np.ndarray], np.ndarray]

BASELINES = {
    "shuffled": "the same pictures held against other captions of their tag",
    "chance": "right pictures of other captions of the tag",
    "one_picture": "of each tag the one picture that is right most often",
    "blank_picture": "an empty ground",
}
CEILINGS = {
    "as_drawn": "the right picture itself, as the judge sees it",
    "through_codec": "the right picture, encoded and decoded with the noise of training",
}


def measure(
    cases: Sequence[Case], ask: Ask, through: Through | None = None
) -> tuple[dict[str, Any], list[Sample]]:
    """Draws every caption once and judges the pictures.

    Returns:
        `score`, `baselines` and `ceilings`, each as `shares.apart` gives it, and the samples.
    """
    answers = ask([case.given for case in cases], "picture")
    parts = [asking.drawn(row, case) for row, case in zip(answers, cases)]
    found = [detector.detect(part.image) for part in parts]
    verdicts = [detector.check_facts(seen, case.facts) for seen, case in zip(found, cases)]
    truths = [detector.detect(case.picture) for case in cases]
    grounds = [
        detector.detect(codec.blank(Picture(case.picture, case.scenes[0]))) for case in cases
    ]
    right = lambda seen: [detector.check_facts(s, c.facts).correct for s, c in zip(seen, cases)]
    of_truth = lambda j, i: detector.check_facts(truths[j], cases[i].facts).correct
    of_drawn = lambda j, i: detector.check_facts(found[j], cases[i].facts).correct
    figures = {
        "score": accuracy.apart(cases, [verdict.correct for verdict in verdicts]),
        "baselines": {
            "shuffled": accuracy.apart(cases, accuracy.shuffled(cases, of_drawn)),
            "chance": accuracy.apart(cases, accuracy.shuffled(cases, of_truth)),
            "one_picture": accuracy.apart(cases, accuracy.most_frequent(cases, of_truth)),
            "blank_picture": accuracy.apart(cases, right(grounds)),
        },
        "ceilings": {"as_drawn": accuracy.apart(cases, right(truths))},
    }
    if through is not None:
        kept = through(np.stack([case.picture for case in cases]))
        seen = [detector.detect(image) for image in kept]
        figures["ceilings"]["through_codec"] = accuracy.apart(cases, right(seen))
    samples = [
        Sample(case, (part.image,), "", verdict.correct, verdict.reason, part.log_likelihood)
        for case, part, verdict in zip(cases, parts, verdicts)
    ]
    return figures, samples
