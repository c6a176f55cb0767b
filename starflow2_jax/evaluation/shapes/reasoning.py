"""Questions that a picture helps with, answered with and without drawing it."""

from collections.abc import Sequence
from typing import Any

from starflow2_jax.evaluation.shapes import accuracy, ask as asking, cases, vqa
from starflow2_jax.evaluation.shapes.ask import Ask
from starflow2_jax.evaluation.shapes.cases import Case, Sample
from starflow2_jax.inference.prompts import Part
from starflow2_jax.shapes import detector

BASELINES = {
    "without_picture": "the answer at once: no picture is drawn",
    "most_frequent": "of each kind the most frequent answer",
    "chance": "one over the number of different answers of the kind",
    "blind": "the model shown grey in place of the source; it draws, then answers",
    "blind_without_picture": "the same, answered at once",
    "shuffled": "the model shown the source of the next case of the kind; it draws, then answers",
}
CEILINGS = {"true_picture": "the right picture in place of the drawn one, then the answer"}


def measure(given: Sequence[Case], ask: Ask) -> tuple[dict[str, Any], list[Sample]]:
    """Has every case answered through a picture, and at once.

    Returns:
        `score` (through a picture), `baselines` and `ceilings`, and `picture`, whether the drawn
        one shows what it should, each as `shares.apart` gives it; and the samples.
    """
    answers = ask([case.given for case in given], "both")
    said = [asking.said(row) for row in answers]
    right = [words == case.words for words, case in zip(said, given)]
    parts = [asking.drawn(row, case) for row, case in zip(answers, given)]
    verdicts = [detector.judge(part.image, case.facts) for part, case in zip(parts, given)]
    truths = [detector.judge(case.picture, case.facts).correct for case in given]
    blank = [cases.blank(case) for case in given]
    others = [cases.shown_another(c, given[j]) for c, j in zip(given, accuracy.partners(given))]
    told = [[*case.given, Part("image", "assistant", image=case.picture)] for case in given]
    true = [asking.said(row) == c.words for row, c in zip(ask(told, "words"), given)]
    made = {
        "without_picture": vqa.answered(given, ask),
        "most_frequent": accuracy.frequent_words(given),
        "chance": accuracy.chance_of_words(given),
        "blind": vqa.answered(blank, ask, "both"),
        "blind_without_picture": vqa.answered(blank, ask),
        "shuffled": vqa.answered(others, ask, "both"),
    }
    figures = {
        "score": accuracy.apart(given, right),
        "baselines": {name: accuracy.apart(given, values) for name, values in made.items()},
        "ceilings": {"true_picture": accuracy.apart(given, true)},
        "picture": {
            "score": accuracy.apart(given, [verdict.correct for verdict in verdicts]),
            "baselines": {},
            "ceilings": {"as_drawn": accuracy.apart(given, truths)},
        },
    }
    samples = []
    for case, part, words, ok, verdict in zip(given, parts, said, right, verdicts):
        source = tuple(shown for shown in case.given if not isinstance(shown, str))
        why = "" if ok else f"right: {case.words}"
        if verdict.reason:
            why = f"{why}; picture: {verdict.reason}".lstrip("; ")
        shown = (*source, part.image, case.picture)
        samples.append(Sample(case, shown, words, ok, why, part.log_likelihood))
    return figures, samples
