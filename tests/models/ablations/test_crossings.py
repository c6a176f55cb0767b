"""Several crossings: none of them when zero, causal, one of them the Pretzel, cached alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import backbone_checks, pretzel_batch

from starflow2_jax.models import layers, qwen, starflow2
from starflow2_jax.models.ablations import crossings
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.losses.interleaved import Stage

BOTH = Stage(True, True)
PACKED = [[pretzel_batch.EDIT, pretzel_batch.TEXT], [pretzel_batch.T2I, pretzel_batch.I2T]]


def states(params, batch, cfg, text, u, eyes):
    is_image, mask = batch["image"] >= 0, layers.segment_mask(jnp.asarray(batch["segments"]))
    at = (batch["positions"], batch["flow_positions"], mask)
    return crossings.states(params, text, u, eyes, is_image, *at, cfg)[:2]


def given(params, batch, cfg):
    rng = np.random.default_rng(0)
    is_image = batch["image"] >= 0
    u = rng.standard_normal((*is_image.shape, cfg.flow.channels)) * is_image[..., None]
    text = qwen.embed(params["vlm"], batch["ids"], cfg.vlm)
    return text, jnp.asarray(u, text.dtype)


def test_one_crossing_is_the_pretzel():
    cfg = pretzel_batch.model()
    params, batch = pretzel_batch.drawn(cfg), pretzel_batch.batch(PACKED)
    text, u = given(params, batch, cfg)

    @jax.jit
    def theirs(params, text, u):
        is_image, mask = batch["image"] >= 0, layers.segment_mask(jnp.asarray(batch["segments"]))
        h = starflow2.vlm_input(params, text, u, is_image, cfg)
        y = starflow2.vlm_states(params, h, batch["positions"], mask, cfg)
        h = starflow2.deep_input(params, y, u, is_image, cfg)
        return y, starflow2.deep_states(params, h, batch["flow_positions"], mask, cfg)

    ours = jax.jit(lambda p, text, u: states(p, batch, cfg, text, u, u))(params, text, u)
    for a, b in zip(ours, theirs(params, text, u)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_text_of_a_model_just_born_is_the_vlms():
    cfg = pretzel_batch.model(crossings=2)
    params, batch = pretzel_batch.drawn(cfg, zero=("adapter", "skip")), pretzel_batch.batch(PACKED)
    text, u = given(params, batch, cfg)
    blank = jnp.where((batch["image"] >= 0)[..., None], 0, text)
    mask = layers.segment_mask(jnp.asarray(batch["segments"]))
    ours = jax.jit(lambda p: states(p, batch, cfg, text, u, u)[0])
    theirs = jax.jit(lambda p: qwen.run(p["vlm"], blank, batch["positions"], mask, cfg.vlm))
    expected = np.asarray(theirs(params))
    # To the last bits: the two are compiled to other programs.
    np.testing.assert_allclose(ours(params), expected, rtol=1e-6, atol=1e-6)
    crossed = {**params, "skip": pretzel_batch.drawn(cfg, 1)["skip"]}
    assert np.abs(np.asarray(ours(crossed)) - expected).max() > 1e-2


def test_every_pair_of_positions_is_causal(x64):
    cfg = pretzel_batch.model(crossings=2, compute_dtype="float64")
    params = pretzel_batch.drawn(cfg)
    record = (
        *(pretzel_batch.Part("none", "ab"), pretzel_batch.Part("none", 0, True)),
        *(pretzel_batch.Part("none", "c"), pretzel_batch.Part("none", 1, True)),
    )
    batch = pretzel_batch.batch([[record, pretzel_batch.T2I]], length=32, dtype=np.float64)
    segments, is_image = batch["segments"], batch["image"] >= 0
    text, u = given(params, batch, cfg)

    def outputs(text, u):
        y, h = states(params, batch, cfg, text, u, u)
        scale, mean = starflow2.image_head(params, h, cfg)
        texts = starflow2.text_states(params, y, h, cfg)
        return scale[0], mean[0], starflow2.text_logits(params, texts, cfg)[0]

    by_text, by_u = zip(*jax.jit(jax.jacrev(outputs, (0, 1)))(text, u))
    allowed = np.asarray(layers.segment_mask(jnp.asarray(segments))[0])
    held = segments[0] > 0
    for found, here in ((by_text, ~is_image[0]), (by_u, is_image[0])):
        for part in found:
            reached = np.abs(np.asarray(part)[:, :, 0]).max((1, 3)) > 0
            np.testing.assert_array_equal(reached[held], (allowed & here[None])[held])


def test_an_image_sees_all_of_itself_and_nothing_later(x64):
    cfg = pretzel_batch.model(crossings=2, compute_dtype="float64")
    params = pretzel_batch.drawn(cfg)
    batch = pretzel_batch.batch(
        [[pretzel_batch.EDIT, pretzel_batch.T2I]], length=48, dtype=np.float64
    )

    def nats(x):
        found = interleaved.terms(params, batch, x, cfg, BOTH, text_targets=8)
        return (found.half_square - sum(found.log_dets))[0]

    by_x = np.abs(np.asarray(jax.jit(jax.jacrev(nats))(jnp.asarray(batch["latent_mean"]))))
    by_image = by_x[:3, 0, :3].max((2, 3)) > 0
    np.testing.assert_array_equal(by_image, np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], bool))


def test_log_likelihood_is_that_of_the_jacobian(x64):
    cfg = pretzel_batch.model(crossings=2, compute_dtype="float64")
    backbone_checks.check_exact(cfg, pretzel_batch.drawn(cfg))


def test_cached_steps_equal_the_parallel_forward():
    cfg = pretzel_batch.model(crossings=2)
    batch = pretzel_batch.batch([[pretzel_batch.REASON], [pretzel_batch.T2I]], length=48)
    backbone_checks.check_cached(cfg, pretzel_batch.drawn(cfg), batch)


def test_groups_hold_every_layer_once():
    assert crossings.groups(5, 2) == [(0, 3), (3, 5)]
    assert crossings.groups(5, 4) == [(0, 2), (2, 3), (3, 4), (4, 5)]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"crossings": 3}, r"model\.crossings=3 must be from 1 to 2 groups"),
        ({"crossings": 2, "skips": ("vlm",)}, "needs both skips"),
    ],
)
def test_what_cannot_cross_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(pretzel_batch.model(), **changes)
