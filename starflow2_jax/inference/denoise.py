"""Clean-up of sampled tokens: the model's density is that of noisy data, so samples are noisy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.decode_loop import State
from starflow2_jax.models import flow, starflow2 as pretzel
from starflow2_jax.models.backbone import BackboneConfig
from starflow2_jax.models.flow import Conditioning, FlowConfig
from starflow2_jax.params import Tree


def score_step(
    params: Tree,
    x: jax.Array,
    cfg: FlowConfig,
    sigma: float,
    conditioning: Conditioning | None = None,
) -> jax.Array:
    """Tweedie's estimate x + sigma^2 d log p(x) / dx of the data without noise (paper.md 3.8).

    Args:
        x: sampled tokens [B, T, D]; sigma: standard deviation of the noise in training.
    """

    def log_density(x: jax.Array) -> Any:
        z, log_det = flow.forward(params, x, cfg, conditioning)
        return (log_det - 0.5 * jnp.square(z).sum((1, 2))).sum()

    return x + sigma**2 * jax.grad(log_density)(x)


@partial(jax.jit, static_argnames="cfg")
def image_score_step(
    params: Tree,
    prepared: Tree,
    state: State,
    row: Any,
    begin: tuple[Any, Any, Any, Any],
    x: jax.Array,
    sigma: Any,
    *,
    cfg: BackboneConfig,
) -> jax.Array:
    """The same of an image x [N, D] in a conversation, given all that comes before it.

    What comes before is read from the caches, and nothing but the image is computed again.

    Args:
        params: with `shallow`; prepared: of `decode.prepare`; row: of the conversation.
        begin: of the image's `<|vision_start|>` its id, its slot, the VLM's position after it and
            how many tokens and images stand before the image.
    """
    token, slot, position, index = begin
    single = state.valid.shape[0] == 1
    of_row = lambda a: a if single else jax.lax.dynamic_index_in_dim(a, row, 0, False)
    caches = tuple(
        c.replace(keys=tuple(map(of_row, c.keys)), values=tuple(map(of_row, c.values)), length=slot)
        for c in state.caches
    )
    before = jax.lax.dynamic_index_in_dim(state.valid, row, 0) & (
        jnp.arange(state.valid.shape[1]) < slot
    )
    patch = jnp.arange(cfg.patches)
    rows, columns = jnp.divmod(patch, cfg.flow.side)
    inside = position + jnp.stack([0 * patch, rows, columns], -1)
    items = decode_loop.Items(
        ids=jnp.full((1, cfg.patches), token),
        u=None,
        is_image=(patch > 0)[None],
        real=jnp.ones((1, cfg.patches), bool),
        positions=jnp.concatenate([jnp.full((1, 3), position - 1), inside[:-1]])[None],
        following=jnp.stack([rows, columns, jnp.full_like(patch, index)], -1)[None],
    )

    def log_density(x: jax.Array) -> Any:
        outputs, log_dets = pretzel.shallow_forward(params, x[None], cfg)
        u = outputs[-1]
        given = items.replace(u=jnp.pad(u[:, :-1], ((0, 0), (1, 0), (0, 0))))
        heat = jnp.ones(1)
        _, h, _, _ = decode_loop.read(prepared, caches, before, given, heat, cfg)
        scale, mean = pretzel.image_head(prepared, h, cfg)
        z = (u - mean) / scale
        return sum(log_dets).sum() - (0.5 * jnp.square(z) + jnp.log(scale)).sum()

    return x + sigma**2 * jax.grad(log_density)(x)
