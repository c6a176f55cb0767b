"""Amplified spatial frequencies of latents, a linear map that decoding inverts."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.fft import dctn

from starflow2_jax.models.fae import codec
from starflow2_jax.params import init as init_params

TINY = codec.preset("tiny")


@pytest.mark.parametrize("frequencies", [1, 2, 3])
def test_slow_frequencies_are_amplified_and_attenuated(frequencies):
    """Their amplitudes are g times as large, those of all others are as before."""
    cfg = dataclasses.replace(TINY, frequency_gain=5.0, gain_frequencies=frequencies)
    params = init_params(jax.random.key(0), codec.declare(TINY))
    features = jax.random.normal(jax.random.key(1), (3, TINY.tokens, TINY.feature_width))
    plain, log_variance = codec.encode(params, features, TINY)
    amplified, same_log_variance = codec.encode(params, features, cfg)
    np.testing.assert_array_equal(log_variance, same_log_variance)
    grid = (len(plain), cfg.side, cfg.side, cfg.latent)
    plain_waves, amplified_waves = (
        dctn(np.reshape(x, grid), axes=(1, 2)) for x in (plain, amplified)
    )
    slow = np.s_[:, :frequencies, :frequencies]
    plain_waves[slow] *= 5
    np.testing.assert_allclose(amplified_waves, plain_waves, atol=1e-3)
    np.testing.assert_allclose(
        codec.denormalize(params, amplified, cfg), codec.denormalize(params, plain, TINY), atol=1e-5
    )
    np.testing.assert_allclose(
        codec.decode_features(params, amplified, cfg),
        codec.decode_features(params, plain, TINY),
        atol=1e-4,
    )


def test_bad_gains_are_refused():
    with pytest.raises(ValueError, match="frequency_gain=0 is not above zero"):
        codec.preset("tiny", frequency_gain=0)
    with pytest.raises(ValueError, match="gain_frequencies=9 is not from 1 to side=8"):
        codec.preset("tiny", gain_frequencies=9)
