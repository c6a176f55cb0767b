"""Checks for every backbone: an exact likelihood, and cached steps that equal the forward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from helpers import pretzel_batch
from helpers.tiny_mot import terms
from starflow2_jax.inference import decode_loop
from starflow2_jax.models import backbone, layers, starflow2


def check_exact(cfg, params):
    """z of an image, given another before it: its log-determinant by autodiff."""
    batch = pretzel_batch.batch([[pretzel_batch.EDIT]], length=40, dtype=np.float64)
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
