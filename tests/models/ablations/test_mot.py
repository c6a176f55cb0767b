"""The mixture of transformers: causal, exact, its VLM's text without images, of equal size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pretzel_batch
from helpers.backbone_checks import check_cached, check_exact
from helpers.tiny_mot import drawn, model, terms

from starflow2_jax.models import layers, qwen, starflow2
from starflow2_jax.models.ablations import mot
from starflow2_jax.params import count as count_params


def test_text_beside_no_image_is_the_vlms():
    cfg = model()
    params = drawn(cfg)
    batch = pretzel_batch.batch(
        [[pretzel_batch.TEXT], [pretzel_batch.TEXT, pretzel_batch.TEXT]], length=24, places=1
    )
    found = jax.jit(lambda p: terms(p, batch, cfg))(params)

    @jax.jit
    def theirs(params):
        h = qwen.embed(params["vlm"], batch["ids"], cfg.vlm)
        mask = layers.segment_mask(jnp.asarray(batch["segments"]))
        h = qwen.run(params["vlm"], h, batch["positions"], mask, cfg.vlm)
        return jax.nn.log_softmax(qwen.logits(params["vlm"], h, cfg.vlm))

    logs = np.asarray(theirs(params))
    at, held = np.asarray(found.at), np.asarray(found.token)
    for b in range(2):
        where = at[b][held[b]]
        expected = -logs[b, where, batch["ids"][b, where + 1]]
        np.testing.assert_allclose(found.nll[b][held[b]], expected, rtol=1e-5, atol=1e-5)
    assert held.sum() > 4


def test_every_pair_of_positions_is_causal(x64):
    """Row of text, image, text, image, and one more record: what each output depends on."""
    cfg = model(compute_dtype="float64")
    params = drawn(cfg)
    record = (
        *(pretzel_batch.Part("none", "ab"), pretzel_batch.Part("none", 0, True)),
        *(pretzel_batch.Part("none", "c"), pretzel_batch.Part("none", 1, True)),
    )
    batch = pretzel_batch.batch([[record, pretzel_batch.T2I]], length=32, dtype=np.float64)
    segments, is_image = batch["segments"], batch["image"] >= 0
    begins = batch["ids"] == pretzel_batch.TOKENIZER.vision_start
    mask = layers.segment_mask(jnp.asarray(segments))
    u = np.random.default_rng(0).standard_normal((1, 32, cfg.flow.channels)) * is_image[..., None]
    text = qwen.embed(params["vlm"], batch["ids"], cfg.vlm)

    def outputs(text, u):
        args = (params, text, u, begins, is_image, batch["positions"], batch["flow_positions"])
        y, h, _ = mot.states(*args, mask, cfg)
        scale, mean = starflow2.image_head(params, h, cfg)
        return scale[0], mean[0], starflow2.text_logits(params, y, cfg)[0]

    by_text, by_u = zip(*jax.jit(jax.jacrev(outputs, (0, 1)))(text, jnp.asarray(u)))
    drawn_at = (begins | is_image)[0]
    # Only a text that is read as such, or a patch, stands at a position; only the expert's
    # positions draw, only the VLM's speak.
    for found, here in ((by_text, ~drawn_at), (by_u, is_image[0])):
        for part, speaks in zip(found, (drawn_at, drawn_at, ~drawn_at)):
            reached = np.abs(np.asarray(part)[:, :, 0]).max((1, 3)) > 0
            asked = (segments[0] > 0) & speaks
            expected = np.asarray(mask[0]) & here[None]
            np.testing.assert_array_equal(reached[asked], expected[asked])


def test_an_image_sees_all_of_itself_and_nothing_later(x64):
    cfg = model(compute_dtype="float64")
    params = drawn(cfg)
    batch = pretzel_batch.batch(
        [[pretzel_batch.EDIT, pretzel_batch.T2I]], length=48, dtype=np.float64
    )

    def nats(x):
        found = terms(params, batch, cfg, x)
        return (found.half_square - sum(found.log_dets))[0], found.nll[0]

    images, tokens = jax.jit(jax.jacrev(nats))(jnp.asarray(batch["latent_mean"]))
    by_image = np.abs(np.asarray(images))[:3, 0, :3].max((2, 3)) > 0
    expected = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
    np.testing.assert_array_equal(by_image, expected)
    assert (np.abs(np.asarray(images))[[0, 1, 2], 0, [0, 1, 2]] > 0).all()
    assert np.abs(np.asarray(tokens))[:, 0].max() > 0


def test_each_input_of_the_expert_is_told_the_place_of_what_it_predicts():
    cfg = model()
    params = drawn(cfg)
    batch = pretzel_batch.batch([[pretzel_batch.T2I]], length=24, places=1)
    is_image, begins = batch["image"] >= 0, batch["ids"] == pretzel_batch.TOKENIZER.vision_start
    u = starflow2.place(jnp.asarray(batch["latent_mean"]), batch["image"])
    first = int(np.argmax(is_image[0])) - 1

    @jax.jit
    def expert(place):
        now = {**params, "deep": {**params["deep"], "place": place}}
        text = qwen.embed(params["vlm"], batch["ids"], cfg.vlm)
        mask = layers.segment_mask(jnp.asarray(batch["segments"]))
        args = (now, text, u, begins, is_image, batch["positions"], batch["flow_positions"])
        return mot.states(*args, mask, cfg)[1][0, first : first + cfg.patches]

    place = jnp.asarray(params["deep"]["place"])
    plain = np.asarray(expert(place))
    for number in range(cfg.patches):
        changed = (np.asarray(expert(place.at[number].add(1.0))) != plain).any(-1)
        assert int(np.argmax(changed)) == number and changed[number:].all()


def test_log_likelihood_is_that_of_the_jacobian(x64):
    cfg = model(compute_dtype="float64")
    check_exact(cfg, drawn(cfg))


def test_cached_steps_equal_the_parallel_forward():
    cfg = model()
    batch = pretzel_batch.batch([[pretzel_batch.REASON], [pretzel_batch.T2I]], length=48)
    check_cached(cfg, drawn(cfg), batch)


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_trained_parameters_are_the_pretzels_within_five_percent(name):
    count = lambda tree: count_params({n: t for n, t in tree.items() if n != "vlm"})
    ours = count(mot.declare(mot.preset(name)))
    theirs = count(starflow2.declare(starflow2.preset(name)))
    assert abs(ours / theirs - 1) < 0.05


def test_a_deep_block_is_refused():
    cfg = pretzel_batch.model()
    with pytest.raises(ValueError, match="the last number must be 0"):
        mot.Config(cfg.vlm, cfg.flow, 24, 48)
