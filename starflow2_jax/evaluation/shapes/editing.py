"""Pictures changed as told: whether the change was made, and whether all else stayed.

`changed`: the judge finds in the picture what the whole target scene asks for, and none of what
had to go (GenEval metadata of the edit). `kept`: every object that the edit leaves alone is found
in its colour and shape, at most `NEAR` image sides from where it was, over the edits that leave
something alone. `both`: the two together, and no more objects than the target has.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from starflow2_jax.evaluation import codec
from starflow2_jax.evaluation.shapes import accuracy, ask as asking, cases
from starflow2_jax.evaluation.shapes.ask import Ask
from starflow2_jax.evaluation.shapes.cases import Case, Sample
from starflow2_jax.evaluation.shapes.text_to_image import Through
from starflow2_jax.shapes import detector
from starflow2_jax.shapes.detector import DetectedObject
from starflow2_jax.shapes.generator import Object

NEAR = 0.08
MEASURES = ("changed", "kept", "both")
BASELINES = {
    "copy": "the source picture, unchanged",
    "shuffled": "the pictures drawn for the next edit of the kind",
    "chance": "the right picture of the next edit of the kind",
    "blank_picture": "an empty ground",
    "blind": "the model shown grey in place of the source",
}
CEILINGS = {
    "as_drawn": "the right picture itself, as the judge sees it",
    "through_codec": "the right picture, encoded and decoded with the noise of training",
}


def measure(
    given: Sequence[Case], ask: Ask, through: Through | None = None
) -> tuple[dict[str, Any], list[Sample]]:
    """Has every edit made once and judges it.

    Returns:
        by each of `MEASURES` `score`, `baselines` and `ceilings`, as `shares.apart` gives them;
        `psnr_rest`: means over edits of the PSNR in dB between the picture and the right one
        outside the squares around what changes; and the samples.
    """
    drawn = _drawn(given, ask, given)
    blind = _drawn(given, ask, [cases.blank(case) for case in given])
    images = [part.image for part in drawn]
    next_ = accuracy.partners(given)
    pictures = {
        "score": images,
        "copy": [_source(case) for case in given],
        "shuffled": [images[j] for j in next_],
        "chance": [given[j].picture for j in next_],
        "blank_picture": [
            codec.blank(codec.Picture(case.picture, case.scenes[-1])) for case in given
        ],
        "blind": [part.image for part in blind],
        "as_drawn": [case.picture for case in given],
    }
    if through is not None:
        pictures["through_codec"] = list(through(np.stack([case.picture for case in given])))
    judged = {name: [*map(judge, shown, given)] for name, shown in pictures.items()}
    tables = {name: _tables(given, rows) for name, rows in judged.items()}
    figures: dict[str, Any] = {
        measure: {
            "score": tables["score"][measure],
            "baselines": {name: tables[name][measure] for name in BASELINES},
            "ceilings": {name: tables[name][measure] for name in CEILINGS if name in tables},
        }
        for measure in MEASURES
    }
    rest = {name: np.mean([*map(_psnr, pictures[name], given)])
            for name in ("score", "blind", "through_codec") if name in pictures}  # fmt: skip
    figures["psnr_rest"] = {name: round(float(value), 2) for name, value in rest.items()}
    samples = []
    for case, part, row in zip(given, drawn, judged["score"]):
        shown = (_source(case), part.image, case.picture)
        samples.append(Sample(case, shown, "", row["both"], row["why"], part.log_likelihood))
    return figures, samples


def judge(image: np.ndarray, case: Case) -> dict[str, Any]:
    """`changed`, `kept` (None where nothing is left alone) and `both`, and `why` not."""
    found = detector.detect(image)
    verdict = detector.check_facts(found, case.facts)
    source, target = case.scenes[0], case.scenes[-1]
    stay = [item for item in source.objects if item in target.objects]
    gone = [item for item in stay if not any(_is_at(seen, item) for seen in found)]
    more = len(found) > len(target.objects)
    why = verdict.reason
    if not why and gone:
        why = f"the {gone[0].color} {gone[0].shape} is not where it was"
    elif not why and more:
        why = f"{len(found)} objects, expected {len(target.objects)}"
    kept = not gone if stay else None
    both = verdict.correct and not gone and not more
    return {"changed": verdict.correct, "kept": kept, "both": both, "why": why}


def _is_at(seen: DetectedObject, item: Object) -> bool:
    same = (seen.shape, seen.color) == (item.shape, item.color)
    return same and float(np.hypot(seen.x - item.x, seen.y - item.y)) <= NEAR


def _tables(given: Sequence[Case], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name in MEASURES:
        own = [(case, row[name]) for case, row in zip(given, rows) if row[name] is not None]
        found[name] = accuracy.apart(*zip(*own)) if own else {"seen": None, "withheld": None}
    return found


def _drawn(given: Sequence[Case], ask: Ask, asked: Sequence[Case]):
    answers = ask([case.given for case in asked], "picture")
    return [asking.drawn(row, case) for row, case in zip(answers, given)]


def _source(case: Case) -> np.ndarray:
    return next(part for part in case.given if not isinstance(part, str))


def _psnr(image: np.ndarray, case: Case) -> float:
    """dB between the picture and the right one outside the squares around what changes."""
    source, target = case.scenes[0], case.scenes[-1]
    changed = [item for item in (*source.objects, *target.objects)
               if item not in source.objects or item not in target.objects]  # fmt: skip
    scene = codec.Scene(source.background, source.ramp, tuple(changed))
    outside = ~codec.boxes(scene, len(image))
    return codec.psnr(case.picture, image, outside)
