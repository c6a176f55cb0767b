"""The accuracy that a codec allows, with codecs that keep everything or nothing."""

from types import SimpleNamespace

import numpy as np
import pytest

from starflow2_jax.evaluation import codec as codec_evaluation
from starflow2_jax.evaluation.shapes import codec_ceiling, editing

CODEC = SimpleNamespace(model=SimpleNamespace(pixels=64))


@pytest.mark.fast
def test_true_images_are_correct_and_gray_ones_are_not(monkeypatch):
    def reconstruct(codec, images, sigma, seed):
        assert sigma == 0.3
        return None, images, np.full_like(images, 128)

    monkeypatch.setattr(codec_evaluation, "reconstruct", reconstruct)
    figures = codec_ceiling.measure(CODEC, 2, sigma=0.3)
    for name in ("generation", "changed", "both"):
        assert figures["mean"][name]["seen"]["mean"]["correct"] == 1
        assert figures["mean"][name]["held_out"]["mean"]["correct"] == 1
        assert figures["noisy"][name]["seen"]["mean"]["correct"] < 0.2
    assert set(figures["noisy"]) == {"generation", *editing.MEASURES}
    lines = codec_ceiling.summary_lines(figures)
    assert any("generation" in line and "seen 1.000" in line for line in lines)
