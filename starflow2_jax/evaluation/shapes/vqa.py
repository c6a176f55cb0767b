"""Questions about pictures, answered by the model's own words, beside what needs no eyes.

An answer is right where it is that of the record, word for word.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from starflow2_jax.evaluation import scoring_batches
from starflow2_jax.evaluation.shapes import accuracy, ask as asking, cases
from starflow2_jax.evaluation.shapes.ask import Ask
from starflow2_jax.evaluation.shapes.cases import Case, Sample
from starflow2_jax.inference import vlm as readers
from starflow2_jax.inference.vlm import VLM
from starflow2_jax.training.tasks import vlm

# Of a reader's, at a time.
_ROWS = 32
BASELINES = {
    "most_frequent": "of each kind the most frequent answer",
    "chance": "one over the number of different answers of the kind",
    "blank_picture": "the model shown grey in place of the picture",
    "shuffled": "the model shown the picture of the next question of the kind",
}
REFERENCES = {
    "own_eyes": "the frozen VLM with its own tower",
    "own_eyes_blank": "the frozen VLM with its own tower, shown grey",
    "blind_model": "a VLM that never saw a picture",
}


def measure(given: Sequence[Case], ask: Ask) -> tuple[dict[str, Any], list[Sample]]:
    """Asks every question once.

    Returns:
        `score` and `baselines`, each as `shares.apart` gives it, and the samples.
    """
    answers = ask([case.given for case in given], "words")
    said = [asking.said(row) for row in answers]
    right = [words == case.words for words, case in zip(said, given)]
    others = [cases.shown_another(c, given[j]) for c, j in zip(given, accuracy.partners(given))]
    figures = {
        "score": accuracy.apart(given, right),
        "baselines": {
            "most_frequent": accuracy.apart(given, accuracy.frequent_words(given)),
            "chance": accuracy.apart(given, accuracy.chance_of_words(given)),
            "blank_picture": accuracy.apart(given, answered([*map(cases.blank, given)], ask)),
            "shuffled": accuracy.apart(given, answered(others, ask)),
        },
        "references": {},
    }
    samples = []
    for case, row, words, true in zip(given, answers, said, right):
        shown = tuple(part for part in case.given if not isinstance(part, str))
        nats = sum(part.log_likelihood or 0.0 for part in row)
        why = "" if true else f"right: {case.words}"
        samples.append(Sample(case, shown, words, true, why, nats))
    return figures, samples


def answered(given: Sequence[Case], ask: Ask, kind: str = "words") -> list[bool]:
    """Whether each case is answered with its words."""
    rows = ask([case.given for case in given], kind)
    return [asking.said(row) == case.words for row, case in zip(rows, given)]


def by_reader(reader: VLM, given: Sequence[Case], *, blank: bool = False) -> list[bool]:
    """Whether a VLM that sees with its own tower gives each answer, decoded greedily.

    By scoring: an answer is given exactly where each of its tokens, the end of the turn included,
    is the likeliest after those before it.

    Raises:
        ValueError: pictures of another size than its tower reads; names the first.
    """
    from starflow2_jax.data import chat_layout  # heavy

    side, pixels = vlm.grid_side(reader.cfg, reader.model_config), reader.cfg["image"]["pixels"]
    for case in given:
        for part in case.given:
            if not isinstance(part, str) and part.shape != (pixels, pixels, 3):
                raise ValueError(f"case {case.id}: a picture {part.shape}, the VLM reads {pixels}")
    held = chat_layout.open_tokenizer(reader.tokenizer_folder)
    right: list[bool] = []
    asked = [case.record for case in given]
    rows = scoring_batches.batches(asked, held, side, size=min(_ROWS, len(asked)), blank=blank)
    for batch, count in rows:
        found = readers.score(reader, batch)
        right += (np.asarray(found["wrong"])[:count, 0] == 0).tolist()
    return right
