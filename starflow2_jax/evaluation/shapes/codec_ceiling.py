"""The accuracy that a latent codec allows: the detector on true images, encoded and decoded.

No flow can be more accurate than its codec, except by chance: what the codec loses at the noise of
the flow's training cannot be generated.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from starflow2_jax.evaluation import codec as codec_evaluation, stats
from starflow2_jax.evaluation.shapes import accuracy, cases, editing
from starflow2_jax.latents.codec import Codec
from starflow2_jax.shapes import detector

KINDS = ("mean", "noisy")


def measure(codec: Codec, n: int, *, sigma: float, seed: int = 0) -> dict[str, Any]:
    """Return the accuracy of reconstructed images as answers to text-to-image and editing cases.

    Args:
        n: cases of each tag, and half as many held-out ones.
        sigma: standard deviation of the noise on normalized latents.

    Returns:
        For `mean` (decoded from the posterior mean) and `noisy`: `generation`, `changed`,
        `preserved` and `both`, each as from `accuracy.split_by_holdout`.
    """
    all_cases = cases.generate(seed, n, codec.model.pixels, ("t2i", "edit"))
    references = np.stack([case.reference_image for case in all_cases])
    decoded = dict(zip(KINDS, codec_evaluation.reconstruct(codec, references, sigma, seed)[1:]))
    return {name: _score(all_cases, images) for name, images in decoded.items()}


def _score(all_cases: list[cases.Case], images: np.ndarray) -> dict[str, Any]:
    pairs = [*zip(all_cases, images, strict=True)]
    generation = [(case, image) for case, image in pairs if case.task == "t2i"]
    correct = [
        detector.check_facts(detector.detect(image), case.facts).correct
        for case, image in generation
    ]
    tables = {"generation": accuracy.split_by_holdout([case for case, _ in generation], correct)}
    edits = [(case, editing.judge(image, case)) for case, image in pairs if case.task == "edit"]
    for name in editing.MEASURES:
        judged = [(case, verdict[name]) for case, verdict in edits if verdict[name] is not None]
        tables[name] = accuracy.split_by_holdout(*zip(*judged))
    return tables


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the figures of `measure` as lines of text."""
    lines = []
    for kind, label in zip(KINDS, ("posterior mean", "with noise")):
        for name, table in result[kind].items():
            parts = [
                f"{part.replace('_', ' ')} {stats.format_figure(row['mean'], 'correct', '.3f')}"
                for part, row in table.items()
                if row
            ]
            lines.append(f"ceiling    {label:15} {name:10} {', '.join(parts)}")
    return lines
