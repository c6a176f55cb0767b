"""The mixture of transformers: causal, exact, its VLM's text without images, of equal size."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pretzel_rows as small
import pytest

from starflow2_jax.inference import decode_loop
from starflow2_jax.models import backbone, layers, qwen, starflow2
from starflow2_jax.models.ablations import mot
from starflow2_jax.params import count as count_params, init as init_params
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.losses.interleaved import Stage

BOTH = Stage(True, True)


def model(width=24, **changes):
    """Beside the small Pretzel of the tests, whose tokenizer begins an image with token 3."""
    pretzel = small.model(**changes)
    vlm = dataclasses.replace(pretzel.vlm, vision_start_token=small.TOKENIZER.vision_start)
    return mot.beside(dataclasses.replace(pretzel, vlm=vlm), width)


def drawn(cfg, seed=0, shake=0.3):
    """Weights with nothing at zero; float32, or float64 under x64."""
    tree = init_params(jax.random.key(seed), mot.declare(cfg))
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    rng = np.random.default_rng(seed)

    def change(leaf):
        size = shake / max(leaf.shape[-2] if leaf.ndim > 1 else 10, 1) ** 0.5
        return np.asarray(leaf, dtype) + size * rng.standard_normal(leaf.shape).astype(dtype)

    return jax.tree.map(change, tree)


def terms(params, batch, cfg, x=None):
    x = jnp.asarray(batch["latent_mean"]) if x is None else x
    return interleaved.terms(params, batch, x, cfg, BOTH, text_targets=12)


def test_text_beside_no_image_is_the_vlms():
    cfg = model()
    params = drawn(cfg)
    batch = small.batch([[small.TEXT], [small.TEXT, small.TEXT]], length=24, places=1)
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
        *(small.Part("none", "ab"), small.Part("none", 0, True)),
        *(small.Part("none", "c"), small.Part("none", 1, True)),
    )
    batch = small.batch([[record, small.T2I]], length=32, dtype=np.float64)
    segments, is_image = batch["segments"], batch["image"] >= 0
    begins = batch["ids"] == small.TOKENIZER.vision_start
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
    batch = small.batch([[small.EDIT, small.T2I]], length=48, dtype=np.float64)

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
    batch = small.batch([[small.T2I]], length=24, places=1)
    is_image, begins = batch["image"] >= 0, batch["ids"] == small.TOKENIZER.vision_start
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


def check_exact(cfg, params):
    """z of an image, given another before it: its log-determinant by autodiff."""
    batch = small.batch([[small.EDIT]], length=40, dtype=np.float64)
    x = jnp.asarray(batch["latent_mean"])
    is_image = batch["image"] >= 0
    mask = layers.segment_mask(jnp.asarray(batch["segments"]))
    first = int(np.argmax(batch["image"][0] == cfg.patches))

    @jax.jit
    def z_of(second):
        now = x.at[0, 1].set(second.reshape(x.shape[2:]))
        u = starflow2.shallow(params, now.reshape(-1, *x.shape[2:]), cfg)[0][-1]
        u = starflow2.place(u.reshape(x.shape), batch["image"])
        at = (batch["positions"], batch["flow_positions"], mask)
        _, h, _ = backbone.states(params, batch["ids"], u, u, is_image, *at, cfg)
        scale, mean = starflow2.image_head(params, h, cfg)
        here = slice(first, first + cfg.patches)
        before = slice(first - 1, first + cfg.patches - 1)
        return ((u[0, here] - mean[0, before]) / scale[0, before]).ravel()

    jacobian = jax.jit(jax.jacfwd(z_of))(x[0, 1].ravel())
    found = jax.jit(lambda p: terms(p, batch, cfg))(params)
    log_det = float(sum(found.log_dets)[0, 1])
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], rtol=1e-10, atol=1e-10)
    half = 0.5 * float(np.square(z_of(x[0, 1].ravel())).sum())
    np.testing.assert_allclose(float(found.half_square[0, 1]), half, rtol=1e-10)


def test_log_likelihood_is_that_of_the_jacobian(x64):
    cfg = model(compute_dtype="float64")
    check_exact(cfg, drawn(cfg))


def check_cached(cfg, params, batch, tolerance=1e-4):
    """Cached steps give what the parallel forward gives: scale, mean and logits."""
    is_image = batch["image"] >= 0
    rng = np.random.default_rng(1)
    u = rng.standard_normal((*is_image.shape, cfg.flow.channels)) * is_image[..., None]
    items = decode_loop.Items(
        ids=jnp.asarray(batch["ids"]),
        u=jnp.asarray(u, jnp.float32),
        is_image=jnp.asarray(is_image),
        real=jnp.asarray(batch["segments"] > 0),
        positions=jnp.asarray(batch["positions"]),
        following=jnp.asarray(batch["flow_positions"]),
    )

    def heads(params, y, h):
        texts = starflow2.text_states(params, y, h, cfg)
        image = starflow2.image_head(params, h, cfg)
        return *image, starflow2.text_logits(params, texts, cfg)

    @jax.jit
    def whole(params):
        mask = layers.segment_mask(jnp.where(items.real, 1, 0))
        args = (items.ids, items.u, items.u, items.is_image, items.positions, items.following)
        y, h, _ = backbone.states(params, *args, mask, cfg)
        return heads(params, y, h)

    @jax.jit
    def step(prepared, caches, valid, item):
        y, h, caches, valid = decode_loop.read(prepared, caches, valid, item, 1.0, cfg)
        return heads(prepared, y, h), caches, valid

    expected = [np.asarray(each) for each in whole(params)]
    prepared = decode_loop.prepare(params, cfg=cfg)
    caches, valid = decode_loop.empty(prepared, cfg, *items.ids.shape)
    cut = lambda i, n: jax.tree.map(lambda leaf: leaf[:, i : i + n], items)
    caches, valid = decode_loop.prefill(prepared, caches, valid, cut(0, 3), 1.0, cfg=cfg)
    for t in range(3, items.ids.shape[1]):
        found, caches, valid = step(prepared, caches, valid, cut(t, 1))
        there = np.asarray(items.real[:, t])
        close = partial(np.testing.assert_allclose, atol=tolerance, rtol=tolerance)
        for ours, theirs in zip(found, expected):
            close(np.asarray(ours)[there, 0], theirs[there, t])
    assert all(each.std() > 0.05 for each in expected)


def test_cached_steps_equal_the_parallel_forward():
    cfg = model()
    batch = small.batch([[small.REASON], [small.T2I]], length=48)
    check_cached(cfg, drawn(cfg), batch)


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_trained_parameters_are_the_pretzels_within_five_percent(name):
    count = lambda tree: count_params({n: t for n, t in tree.items() if n != "vlm"})
    ours = count(mot.declare(mot.preset(name)))
    theirs = count(starflow2.declare(starflow2.preset(name)))
    assert abs(ours / theirs - 1) < 0.05


def test_a_deep_block_is_refused():
    cfg = small.model()
    with pytest.raises(ValueError, match="the last number must be 0"):
        mot.Config(cfg.vlm, cfg.flow, 24, 48)
