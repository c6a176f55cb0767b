"""Sheets of what a model drew, every picture captioned with what was asked."""

from collections.abc import Mapping, Sequence

import numpy as np

from starflow2_jax.evaluation.shapes.cases import Sample
from starflow2_jax.training.logging import image_grid

# Pictures of a sheet of generated ones; samples of the other sheets.
SHOWN, ROWS = 24, 12

TITLES = {
    "generation_best": "Generation: the likeliest given their captions",
    "generation_random": "Generation: drawn at random",
    "generation_failed": "Generation: what the judge refused",
    "understanding": "Questions",
    "editing": "Edits: source, drawn, right",
    "reasoning": "Reasoning: source, drawn, right",
}


def make(samples: Mapping[str, Sequence[Sample]], seed: int = 0) -> dict[str, np.ndarray]:
    """Sheets uint8 [H, W, 3] by name (see `TITLES`); those of nothing are left out."""
    drawn = list(samples.get("generation", ()))
    nats = lambda sample: -(sample.log_likelihood or 0.0)
    chosen = {
        "generation_best": sorted(drawn, key=nats)[:SHOWN],
        "generation_random": _some(drawn, SHOWN, seed),
        "generation_failed": _some([s for s in drawn if not s.right], SHOWN, seed),
    }
    found = {}
    for name, shown in chosen.items():
        if shown:
            captions = [_note(s.case.asks, s.why) for s in shown]
            found[name] = image_grid.grid(np.stack([s.pictures[0] for s in shown]), captions)
    for name in ("understanding", "editing", "reasoning"):
        shown = _mixed(list(samples.get(name, ())), seed)
        if shown:
            found[name] = _in_rows(shown)
    return found


def _some(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    order = np.random.default_rng(seed).permutation(len(samples))[:count]
    return [samples[i] for i in order]


def _mixed(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Random ones; what failed has a third of the places, if there is as much."""
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    failed = [i for i in order if not samples[i].right]
    right = [i for i in order if samples[i].right]
    least = min(len(failed), ROWS // 3)
    shown = [*right[: ROWS - least], *failed][:ROWS]
    return [samples[i] for i in shown]


def _in_rows(shown: Sequence[Sample]) -> np.ndarray:
    """Samples of several pictures, two in each row of the sheet."""
    images, captions = [], []
    each = len(shown[0].pictures)
    for sample in shown:
        told = f"says {sample.says}" if sample.says else "drawn"
        images += sample.pictures
        if each == 1:
            captions.append(_note(f"{sample.case.asks} {sample.says}", sample.why))
        else:
            right = f"right: {sample.case.words}" if sample.case.words else "right"
            captions += [sample.case.asks, _note(told, sample.why), right]
    return image_grid.grid(np.stack(images), captions, columns=2 * each if each > 1 else 6)


def _note(text: str, why: str) -> str:
    return f"{text} [{why}]" if why else text
