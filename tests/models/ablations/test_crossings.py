"""Several crossings: the VLM's text while they are zero, causality, exactness, cached steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pretzel_batch
from helpers.backbone_checks import (
    backbone_inputs,
    check_cached_steps,
    check_log_det,
    heads,
    random_latents,
)
from helpers.pretzel_batch import EDIT, I2T, REASON, T2I, TEXT

from starflow2_jax.data.chat_layout import MessagePart
from starflow2_jax.models import attention, qwen, starflow2
from starflow2_jax.models.ablations import crossings
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.losses.interleaved import Stage

BOTH = Stage(True, True)
PACKED = [[EDIT, TEXT], [T2I, I2T]]


def forward(params, inputs, cfg):
    states = crossings.forward(params, inputs, cfg)
    return states.vlm_states, states.flow_states


def embeddings_and_latents(params, batch, cfg):
    text = qwen.embed(params["vlm"], batch["ids"], cfg.vlm)
    return text, jnp.asarray(random_latents(batch, cfg.flow.channels), text.dtype)


@pytest.mark.fast
def test_one_crossing_is_the_pretzel():
    cfg = pretzel_batch.model(crossings=1)
    params, batch = pretzel_batch.random_params(cfg), pretzel_batch.batch(PACKED)
    inputs = backbone_inputs(batch, embeddings_and_latents(params, batch, cfg)[1])
    pretzel = jax.jit(lambda params: starflow2.forward(params, inputs, cfg))(params)
    expected = (pretzel.vlm_states, pretzel.flow_states)
    actual = jax.jit(lambda params: forward(params, inputs, cfg))(params)
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_text_of_a_new_model_is_the_vlms():
    cfg = pretzel_batch.model(crossings=2)
    params, batch = (
        pretzel_batch.random_params(cfg, zero=("adapter", "skip")),
        pretzel_batch.batch(PACKED),
    )
    text, u = embeddings_and_latents(params, batch, cfg)
    blank = jnp.where((batch["image"] >= 0)[..., None], 0, text)
    mask = attention.segment_mask(jnp.asarray(batch["segments"]))
    crossings_states = jax.jit(lambda p: forward(p, backbone_inputs(batch, u), cfg)[0])
    vlm_states = jax.jit(
        lambda p: qwen.apply_layers(p["vlm"], blank, cfg.vlm, batch["positions"], mask)[0]
    )
    expected = np.asarray(vlm_states(params))
    # To the last bits: the two are compiled to other programs.
    np.testing.assert_allclose(crossings_states(params), expected, rtol=1e-6, atol=1e-6)
    with_skips = {**params, "skip": pretzel_batch.random_params(cfg, 1)["skip"]}
    assert np.abs(np.asarray(crossings_states(with_skips)) - expected).max() > 1e-2


def test_every_pair_of_positions_is_causal(x64):
    cfg = pretzel_batch.model(crossings=2, compute_dtype="float64")
    params = pretzel_batch.random_params(cfg)
    record = (
        *(MessagePart("none", "ab"), MessagePart("none", 0, True)),
        *(MessagePart("none", "c"), MessagePart("none", 1, True)),
    )
    batch = pretzel_batch.batch([[record, T2I]], length=32, dtype=np.float64)
    segments, is_image = batch["segments"], batch["image"] >= 0
    text, u = embeddings_and_latents(params, batch, cfg)

    def outputs(text, u):
        states = crossings.forward(params, backbone_inputs(batch, u, text), cfg)
        return [output[0] for output in heads(params, states, cfg)]

    by_text, by_u = zip(*jax.jit(jax.jacrev(outputs, (0, 1)))(text, u))
    allowed = np.asarray(attention.segment_mask(jnp.asarray(segments))[0])
    in_segment = segments[0] > 0
    for jacobians, is_input in ((by_text, ~is_image[0]), (by_u, is_image[0])):
        for jacobian in jacobians:
            reached = np.abs(np.asarray(jacobian)[:, :, 0]).max((1, 3)) > 0
            np.testing.assert_array_equal(
                reached[in_segment], (allowed & is_input[None])[in_segment]
            )


def test_an_image_sees_all_of_itself_and_nothing_later(x64):
    cfg = pretzel_batch.model(crossings=2, compute_dtype="float64")
    params = pretzel_batch.random_params(cfg)
    batch = pretzel_batch.batch([[EDIT, T2I]], length=48, dtype=np.float64)

    def nats(x):
        terms = interleaved.loss_terms(params, batch, x, cfg, BOTH, text_targets=8)
        return (terms.half_square - sum(terms.log_dets))[0]

    by_x = np.abs(np.asarray(jax.jit(jax.jacrev(nats))(jnp.asarray(batch["latent_mean"]))))
    by_image = by_x[:3, 0, :3].max((2, 3)) > 0
    np.testing.assert_array_equal(by_image, np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], bool))


@pytest.mark.parametrize(
    "flow_options",
    [pytest.param({}, marks=pytest.mark.slow), pretzel_batch.OWN_KEYS],
    ids=["next", "own"],
)
def test_log_likelihood_is_that_of_the_jacobian(flow_options, x64):
    cfg = pretzel_batch.model(crossings=2, flow=flow_options, compute_dtype="float64")
    check_log_det(cfg, pretzel_batch.random_params(cfg))


@pytest.mark.parametrize(
    "flow_options",
    [pytest.param({}, marks=pytest.mark.slow), pretzel_batch.OWN_KEYS],
    ids=["next", "own"],
)
def test_cached_steps_equal_the_parallel_forward(flow_options):
    cfg = pretzel_batch.model(crossings=2, flow=flow_options)
    batch = pretzel_batch.batch([[REASON], [T2I]], length=48)
    check_cached_steps(cfg, pretzel_batch.random_params(cfg), batch)


@pytest.mark.fast
def test_groups_contain_every_layer_once():
    assert crossings.layer_groups(5, 2) == [(0, 3), (3, 5)]
    assert crossings.layer_groups(5, 4) == [(0, 2), (2, 3), (3, 4), (4, 5)]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"crossings": 3}, r"model\.crossings=3 must be from 1 to 2 groups"),
        ({"crossings": 2, "skips": ("vlm",)}, "needs both skips"),
    ],
)
def test_impossible_crossings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(pretzel_batch.model(crossings=1), **changes)
