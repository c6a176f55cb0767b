"""Checks that every interleaved model has to pass, with any backbone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from helpers import pretzel_batch
from starflow2_jax.inference import decode_loop
from starflow2_jax.models import starflow2
from starflow2_jax.models.attention import segment_mask
from starflow2_jax.models.backbone import BackboneInputs
from starflow2_jax.training.losses import interleaved
from starflow2_jax.training.losses.interleaved import Stage


def backbone_inputs(batch, u, text_embeddings=None):
    """Return the inputs of a batch of rows with latents u [B, T, D] at its patches."""
    return BackboneInputs(
        ids=batch["ids"],
        latents=u,
        adapter_input=u,
        is_image=batch["image"] >= 0,
        positions=batch["positions"],
        next_positions=batch["flow_positions"],
        item_positions=item_positions(batch),
        mask=segment_mask(jnp.asarray(batch["segments"])),
        text_embeddings=text_embeddings,
    )


def item_positions(batch):
    """Return the flow's positions of the items themselves, (0, 0, 0) at the start of a record."""
    positions = np.zeros_like(batch["flow_positions"])
    for b, segments in enumerate(batch["segments"]):
        for t in range(1, len(segments)):
            if segments[t] == segments[t - 1]:
                positions[b, t] = batch["flow_positions"][b, t - 1]
    return positions


def random_latents(batch, channels, seed=0):
    """Return Gaussian latents u [B, T, D], zeros at text."""
    is_image = batch["image"] >= 0
    noise = np.random.default_rng(seed).standard_normal((*is_image.shape, channels))
    return noise * is_image[..., None]


def heads(params, states, cfg):
    """Return (scale, mean, logits) of the next item at every position."""
    text = starflow2.text_states(params, states.vlm_states, states.flow_states, cfg)
    scale, mean = starflow2.image_head(params, states.flow_states, cfg)
    return scale, mean, starflow2.text_logits(params, text, cfg)


def check_log_det(cfg, params):
    """Compare the log-determinant of a second image with that of its Jacobian by autodiff."""
    batch = pretzel_batch.batch([[pretzel_batch.EDIT]], length=40, dtype=np.float64)
    x = jnp.asarray(batch["latent_mean"])
    first = int(np.argmax(batch["image"][0] == cfg.num_patches))

    @jax.jit
    def normalize(second_image):
        latents = x.at[0, 1].set(second_image.reshape(x.shape[2:]))
        u = starflow2.shallow_forward(params, latents.reshape(-1, *x.shape[2:]), cfg)[0][-1]
        u = starflow2.latents_at_positions(u.reshape(x.shape), batch["image"])
        states = cfg.forward(params, backbone_inputs(batch, u))
        scale, mean = starflow2.image_head(params, states.flow_states, cfg)
        predictors = slice(first - 1, first + cfg.num_patches - 1)
        patches = u[0, first : first + cfg.num_patches]
        return ((patches - mean[0, predictors]) / scale[0, predictors]).ravel()

    second_image = x[0, 1].ravel()
    sign, expected = np.linalg.slogdet(np.asarray(jax.jit(jax.jacfwd(normalize))(second_image)))
    assert sign == 1 and abs(expected) > 0.01
    terms = jax.jit(lambda p: interleaved.loss_terms(p, batch, x, cfg, Stage(True, True)))(params)
    log_det = float(sum(terms.log_dets)[0, 1])
    np.testing.assert_allclose(log_det, expected, rtol=1e-10, atol=1e-10)
    half_square = 0.5 * float(np.square(np.asarray(normalize(second_image))).sum())
    np.testing.assert_allclose(float(terms.half_square[0, 1]), half_square, rtol=1e-10)


def check_cached_steps(cfg, params, batch, tolerance=1e-4):
    """Compare scales, means and logits of cached steps with those of the parallel forward."""
    u = jnp.asarray(random_latents(batch, cfg.flow.channels, seed=1), jnp.float32)
    items = BackboneInputs(
        ids=jnp.asarray(batch["ids"]),
        latents=u,
        adapter_input=None,
        is_image=jnp.asarray(batch["image"] >= 0),
        positions=jnp.asarray(batch["positions"]),
        next_positions=jnp.asarray(batch["flow_positions"]),
        item_positions=jnp.asarray(item_positions(batch)),
    )
    is_real = jnp.asarray(batch["segments"] > 0)
    row_batch = {**batch, "segments": np.where(batch["segments"] > 0, 1, 0)}

    @jax.jit
    def parallel(params):
        return heads(params, cfg.forward(params, backbone_inputs(row_batch, u)), cfg)

    @jax.jit
    def step(prepared, caches, valid, item):
        y, h, caches, valid = decode_loop.forward_cached(prepared, caches, valid, *item, cfg)
        text = starflow2.text_states(prepared, y, h, cfg)
        logits = starflow2.text_logits(prepared, text, cfg)
        return (*starflow2.image_head(prepared, h, cfg), logits), caches, valid

    expected = [np.asarray(output) for output in parallel(params)]
    prepared = decode_loop.prepare_params(params)
    state = decode_loop.empty_state(prepared, cfg, *items.ids.shape, has_null_branch=False)
    caches, valid = state.caches, state.valid
    cut = lambda i, n: jax.tree.map(lambda leaf: leaf[:, i : i + n], (items, is_real))
    caches, valid = decode_loop.prefill(prepared, caches, valid, *cut(0, 3), cfg=cfg)
    close = partial(np.testing.assert_allclose, atol=tolerance, rtol=tolerance)
    for t in range(3, items.ids.shape[1]):
        outputs, caches, valid = step(prepared, caches, valid, cut(t, 1))
        rows = np.asarray(is_real[:, t])
        for output, reference in zip(outputs, expected):
            close(np.asarray(output)[rows, 0], reference[rows, t])
    assert all(reference.std() > 0.05 for reference in expected)
