"""Contact sheets of generated images and answers, captioned with their prompts."""

from collections.abc import Mapping, Sequence

import numpy as np

from starflow2_jax.evaluation.shapes.cases import Sample
from starflow2_jax.training.logging import image_grid

# Images on a sheet of generated ones; samples on the other sheets.
MAX_IMAGES, MAX_SAMPLES = 24, 12


def make(samples: Mapping[str, Sequence[Sample]], seed: int = 0) -> dict[str, np.ndarray]:
    """Return the sheets uint8 [H, W, 3] by name, without empty ones."""
    generated = list(samples.get("generation", ()))
    likeliest = sorted(generated, key=lambda sample: -(sample.log_likelihood or 0.0))
    failed = [sample for sample in generated if not sample.correct]
    selections = {
        "generation_best": likeliest[:MAX_IMAGES],
        "generation_random": _choose(generated, MAX_IMAGES, seed),
        "generation_failed": _choose(failed, MAX_IMAGES, seed),
    }
    sheets = {}
    for name, selected in selections.items():
        if selected:
            captions = [_with_reason(s.case.prompt_text, s.reason) for s in selected]
            sheets[name] = image_grid.grid(np.stack([s.images[0] for s in selected]), captions)
    for name in ("understanding", "editing", "reasoning"):
        selected = _choose_mixed(list(samples.get(name, ())), seed)
        if selected:
            sheets[name] = _answer_sheet(selected)
    return sheets


def _choose(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    order = np.random.default_rng(seed).permutation(len(samples))[:count]
    return [samples[i] for i in order]


def _choose_mixed(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Return random samples, a third of them failed ones if there are enough."""
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    failed = [i for i in order if not samples[i].correct]
    correct = [i for i in order if samples[i].correct]
    num_failed = min(len(failed), MAX_SAMPLES // 3)
    selected = [*correct[: MAX_SAMPLES - num_failed], *failed][:MAX_SAMPLES]
    return [samples[i] for i in selected]


def _answer_sheet(samples: Sequence[Sample]) -> np.ndarray:
    """Return a sheet of samples with one image each, or with several and two samples in a row."""
    images, captions = [], []
    num_images = len(samples[0].images)
    for sample in samples:
        images += sample.images
        if num_images == 1:
            text = f"{sample.case.prompt_text} {sample.text}"
            captions.append(_with_reason(text, sample.reason))
        else:
            answer = f"answer: {sample.text}" if sample.text else "generated"
            reference = sample.case.reference_text
            captions += [
                sample.case.prompt_text,
                _with_reason(answer, sample.reason),
                f"reference: {reference}" if reference else "reference",
            ]
    columns = 2 * num_images if num_images > 1 else 6
    return image_grid.grid(np.stack(images), captions, columns=columns)


def _with_reason(text: str, reason: str) -> str:
    return f"{text} [{reason}]" if reason else text
