"""Denoise samples: the flow models data with noise added, so its samples are noisy."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.decode_loop import DecodeState
from starflow2_jax.models import flow, starflow2
from starflow2_jax.models.backbone import BackboneConfig, BackboneInputs
from starflow2_jax.models.flow import Conditioning, FlowConfig
from starflow2_jax.params import Tree


def score_step(
    params: Tree,
    x: jax.Array,
    cfg: FlowConfig,
    sigma: float,
    conditioning: Conditioning | None = None,
) -> jax.Array:
    """Return Tweedie's estimate x + sigma^2 d log p(x) / dx of noisy tokens x [B, T, D].

    `sigma` is the standard deviation of the training noise.
    """

    def log_density(x: jax.Array) -> Any:
        z, log_det = flow.forward(params, x, cfg, conditioning)
        return (log_det - 0.5 * jnp.square(z).sum((1, 2))).sum()

    return x + sigma**2 * jax.grad(log_density)(x)


class ImageStart(NamedTuple):
    """The point at which an image begins in a decoded row."""

    token: Any  # id of the `<|vision_start|>` before the image
    slot: Any  # the slot of that token in the caches
    vlm_position: Any  # VLM position of the image
    flow_index: Any  # number of tokens and images before the image


@partial(jax.jit, static_argnames="cfg")
def image_score_step(
    shallow_params: Tree,
    decode_params: Tree,
    state: DecodeState,
    row: Any,
    start: ImageStart,
    x: jax.Array,
    sigma: Any,
    *,
    cfg: BackboneConfig,
) -> jax.Array:
    """Return `score_step` of an image in a session, conditioned on the caches before it.

    Args:
        shallow_params: a tree with the subtree `shallow`.
        decode_params: from `decode_loop.prepare_params`.
        state: the state of the session after the image.
        x: latents of the image [N, D].
    """
    single_row = state.valid.shape[0] == 1

    def select_row(a):  # A cache of one row has no batch axis.
        return a if single_row else jax.lax.dynamic_index_in_dim(a, row, 0, False)

    caches = decode_loop.map_caches(select_row, state.caches)
    caches = tuple(cache.replace(length=start.slot) for cache in caches)
    valid = jax.lax.dynamic_index_in_dim(state.valid, row, 0) & (
        jnp.arange(state.valid.shape[1]) < start.slot
    )
    patch = jnp.arange(cfg.num_patches)
    rows, columns = jnp.divmod(patch, cfg.flow.side)
    positions = start.vlm_position + jnp.stack([0 * patch, rows, columns], -1)
    token_position = jnp.full((1, 3), start.vlm_position - 1)
    next_positions = jnp.stack([rows, columns, jnp.full_like(patch, start.flow_index)], -1)
    token_flow_position = jnp.stack([0, 0, start.flow_index - 1])[None]
    # Item n predicts patch n: the inputs are `<|vision_start|>` and all patches but the last.
    inputs = BackboneInputs(
        ids=jnp.full((1, cfg.num_patches), start.token),
        latents=None,
        adapter_input=None,
        is_image=(patch > 0)[None],
        positions=jnp.concatenate([token_position, positions[:-1]])[None],
        next_positions=next_positions[None],
        item_positions=jnp.concatenate([token_flow_position, next_positions[:-1]])[None],
    )
    is_real = jnp.ones((1, cfg.num_patches), bool)

    def log_density(x: jax.Array) -> Any:
        outputs, log_dets = starflow2.shallow_forward(shallow_params, x[None], cfg)
        u = outputs[-1]
        shifted = inputs.replace(latents=jnp.pad(u[:, :-1], ((0, 0), (1, 0), (0, 0))))
        _, h, _, _ = decode_loop.forward_cached(decode_params, caches, valid, shifted, is_real, cfg)
        scale, mean = starflow2.image_head(decode_params, h, cfg)
        z = (u - mean) / scale
        return sum(log_dets).sum() - (0.5 * jnp.square(z) + jnp.log(scale)).sum()

    return x + sigma**2 * jax.grad(log_density)(x)
