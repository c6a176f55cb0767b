"""The mixture of transformers: causal, exact, its VLM's text without images, of equal size."""

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
from helpers.pretzel_batch import EDIT, REASON, T2I, TEXT, TOKENIZER, random_params
from helpers.tiny_mot import model, terms

from starflow2_jax.data.chat_layout import MessagePart
from starflow2_jax.models import attention, qwen, starflow2
from starflow2_jax.models.ablations import mot
from starflow2_jax.params import count as count_params


@pytest.mark.fast
def test_text_without_images_is_the_vlms():
    cfg = model()
    params = random_params(cfg)
    batch = pretzel_batch.batch([[TEXT], [TEXT, TEXT]], length=24, places=1)
    result = jax.jit(lambda p: terms(p, batch, cfg))(params)

    @jax.jit
    def vlm_log_probs(params):
        h = qwen.embed(params["vlm"], batch["ids"], cfg.vlm)
        mask = attention.segment_mask(jnp.asarray(batch["segments"]))
        h, _ = qwen.apply_layers(params["vlm"], h, cfg.vlm, batch["positions"], mask)
        return jax.nn.log_softmax(qwen.logits(params["vlm"], h, cfg.vlm))

    log_probs = np.asarray(vlm_log_probs(params))
    index, is_token = np.asarray(result.target_index), np.asarray(result.token)
    for b in range(2):
        positions = index[b][is_token[b]]
        expected = -log_probs[b, positions, batch["ids"][b, positions + 1]]
        np.testing.assert_allclose(result.nll[b][is_token[b]], expected, rtol=1e-5, atol=1e-5)
    assert is_token.sum() > 4


def test_every_pair_of_positions_is_causal(x64):
    """Row of text, image, text, image, and one more record: what each output depends on."""
    cfg = model(compute_dtype="float64")
    params = random_params(cfg)
    record = (
        *(MessagePart("none", "ab"), MessagePart("none", 0, True)),
        *(MessagePart("none", "c"), MessagePart("none", 1, True)),
    )
    batch = pretzel_batch.batch([[record, T2I]], length=32, dtype=np.float64)
    segments, is_image = batch["segments"], batch["image"] >= 0
    image_starts = batch["ids"] == TOKENIZER.vision_start
    mask = attention.segment_mask(jnp.asarray(segments))
    u = random_latents(batch, cfg.flow.channels)
    text = qwen.embed(params["vlm"], batch["ids"], cfg.vlm)

    def outputs(text, u):
        states = mot.forward(params, backbone_inputs(batch, u, text), cfg)
        return [output[0] for output in heads(params, states, cfg)]

    by_text, by_u = zip(*jax.jit(jax.jacrev(outputs, (0, 1)))(text, jnp.asarray(u)))
    by_expert = (image_starts | is_image)[0]
    # A position has a text embedding or a patch as its input. The image head reads the expert's
    # positions, the text head those of the VLM.
    for jacobians, is_input in ((by_text, ~by_expert), (by_u, is_image[0])):
        for jacobian, is_output in zip(jacobians, (by_expert, by_expert, ~by_expert)):
            reached = np.abs(np.asarray(jacobian)[:, :, 0]).max((1, 3)) > 0
            compared = (segments[0] > 0) & is_output
            expected = np.asarray(mask[0]) & is_input[None]
            np.testing.assert_array_equal(reached[compared], expected[compared])


def test_an_image_sees_all_of_itself_and_nothing_later(x64):
    cfg = model(compute_dtype="float64")
    params = random_params(cfg)
    batch = pretzel_batch.batch([[EDIT, T2I]], length=48, dtype=np.float64)

    def nats(x):
        result = terms(params, batch, cfg, x)
        return (result.half_square - sum(result.log_dets))[0], result.nll[0]

    images, tokens = jax.jit(jax.jacrev(nats))(jnp.asarray(batch["latent_mean"]))
    by_image = np.abs(np.asarray(images))[:3, 0, :3].max((2, 3)) > 0
    expected = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
    np.testing.assert_array_equal(by_image, expected)
    assert (np.abs(np.asarray(images))[[0, 1, 2], 0, [0, 1, 2]] > 0).all()
    assert np.abs(np.asarray(tokens))[:, 0].max() > 0


def test_each_input_of_the_expert_carries_the_position_of_the_patch_it_predicts():
    cfg = model()
    params = random_params(cfg)
    batch = pretzel_batch.batch([[T2I]], length=24, places=1)
    is_image = batch["image"] >= 0
    u = starflow2.latents_at_positions(jnp.asarray(batch["latent_mean"]), batch["image"])
    first = int(np.argmax(is_image[0])) - 1

    @jax.jit
    def expert(place):
        moved = {**params, "deep": {**params["deep"], "place": place}}
        states = mot.forward(moved, backbone_inputs(batch, u), cfg)
        return states.flow_states[0, first : first + cfg.num_patches]

    place = jnp.asarray(params["deep"]["place"])
    plain = np.asarray(expert(place))
    for number in range(cfg.num_patches):
        changed = (np.asarray(expert(place.at[number].add(1.0))) != plain).any(-1)
        assert int(np.argmax(changed)) == number and changed[number:].all()


@pytest.mark.parametrize(
    "flow_options",
    [pytest.param({}, marks=pytest.mark.slow), pretzel_batch.OWN_KEYS],
    ids=["next", "own"],
)
def test_log_likelihood_is_that_of_the_jacobian(flow_options, x64):
    cfg = model(flow=flow_options, compute_dtype="float64")
    check_log_det(cfg, random_params(cfg))


@pytest.mark.parametrize(
    "flow_options",
    [pytest.param({}, marks=pytest.mark.slow), pretzel_batch.OWN_KEYS],
    ids=["next", "own"],
)
def test_cached_steps_equal_the_parallel_forward(flow_options):
    cfg = model(flow=flow_options)
    batch = pretzel_batch.batch([[REASON], [T2I]], length=48)
    check_cached_steps(cfg, random_params(cfg), batch)


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_trained_parameters_are_the_pretzels_within_five_percent(name):
    count = lambda tree: count_params({n: t for n, t in tree.items() if n != "vlm"})
    mixture = count(mot.declare(mot.preset(name)))
    pretzel = count(starflow2.declare(starflow2.preset(name)))
    assert abs(mixture / pretzel - 1) < 0.05


@pytest.mark.fast
def test_a_deep_block_is_refused():
    cfg = pretzel_batch.model()
    with pytest.raises(ValueError, match="the last number must be 0"):
        mot.MoTConfig(cfg.vlm, cfg.flow, 24, 48)
