"""Noise to data: sequential with a key-value cache, or block-wise Jacobi iteration.

Axes: B rows, R = B or 2B rows of a block (doubled under guidance), T tokens, D token channels,
C width, P predictions of a block, N positions of its input sequence.

Both ways see a block as one chain y_0, y_1, ..., y_P: prediction p reads y_0 ... y_p and gives the
(scale, mean) of y_{p+1}. y_0 is the start token, or the first data token where the block passes it
unchanged or predicts it from the text.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax.inference import guidance as guiding
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.models import flow, layers, rope
from starflow2_jax.models.flow import BlockConfig, Conditioning, FlowConfig
from starflow2_jax.models.layers import at_least_float32
from starflow2_jax.params import Tree


@dataclass(frozen=True)
class Jacobi:
    """Block-wise Jacobi iteration (paper.md 3.7).

    A chunk of `block` tokens starts from the noise and is predicted anew, in parallel, until
    mean((new - old)^2) / mean(new^2) < threshold over the whole batch, or `max_iterations`. It is
    exact after `block` iterations; threshold 0 with enough of them equals sequential sampling.
    """

    block: int = 16
    threshold: float = 1e-3
    max_iterations: int = 32


@struct.dataclass
class _Chain:
    """What the steps of one block share."""

    params: Tree
    offset: int = struct.field(pytree_node=False)
    add: Any
    tables: Any
    temperature: Any
    guided: Guidance | None
    block: BlockConfig = struct.field(pytree_node=False)


def inverse(
    params: Tree,
    z: jax.Array,
    cfg: FlowConfig,
    conditioning: Conditioning | None = None,
    *,
    guidance: Guidance | None = None,
    jacobi: Jacobi | None = None,
    temperature: Any = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Invert `flow.forward`: noise z [B, T, D] to data x [B, T, D], raster order.

    Args:
        conditioning: as in `flow.forward`.
        guidance: a `Guidance`, or None.
        jacobi: a `Jacobi`, or None for sequential sampling.
        temperature: of the attention logits in every block, without guidance (else
            `guidance.temperature` holds).

    Returns:
        x, and info: `passes` int32 [blocks], forward passes of each block's layers (prefix not
        counted), `residual` float [blocks], each block's last Jacobi residual, 0 if sequential;
        `tokens`: [B, T, D] after each block from the noise to the data, z first.

    Raises:
        ValueError: inputs that the model does not take, or unknown guidance words.
    """
    conditioning = flow.check_inputs(cfg, z.shape, conditioning)
    if guidance is not None:
        guiding.check(guidance)
    if jacobi is not None and (jacobi.block < 1 or jacobi.max_iterations < 1):
        raise ValueError(f"jacobi: block and max_iterations must be at least 1, got {jacobi}")
    block_size = jacobi.block if jacobi else None
    limits = (jacobi.threshold, jacobi.max_iterations) if jacobi else None
    x, passes, residual, tokens = _inverse(
        params,
        z,
        conditioning,
        guidance,
        limits,
        temperature,
        cfg=cfg,
        jacobi_block=block_size,
    )
    return x, {"passes": passes, "residual": residual, "tokens": tokens}


@partial(jax.jit, static_argnames=("cfg", "jacobi_block"))
def _inverse(params, z, conditioning, guidance, limits, temperature, *, cfg, jacobi_block):
    tokens, passes, residuals = [at_least_float32(z)], [], []
    for i in reversed(range(len(cfg.layers))):
        x, count, residual = tokens[-1], 0, 0.0
        if cfg.layers[i]:
            block = cfg.block(i)
            is_deep = i == len(cfg.layers) - 1
            block_conditioning = conditioning if is_deep else conditioning.replace(positions=None)
            zeta = x[:, ::-1] if block.reverse else x
            chain, first, cache = _begin(
                params["blocks"][str(i)], zeta, block, block_conditioning, guidance, temperature
            )
            if jacobi_block is None:
                x, count = _sequential(chain, first, cache, zeta)
            else:
                x, count, residual = _jacobi(chain, first, cache, zeta, jacobi_block, *limits)
            x = x[:, ::-1] if block.reverse else x
        tokens.append(x)
        passes.insert(0, jnp.asarray(count, jnp.int32))
        residuals.insert(0, jnp.asarray(residual, z.dtype))
    return tokens[-1], jnp.stack(passes), jnp.stack(residuals), tokens


def is_guided(guidance: Guidance | None, block: BlockConfig) -> bool:
    """Whether a block runs twice as many rows under `guidance`."""
    if guidance is None or guidance.blocks == "all":
        return guidance is not None
    if guidance.blocks == "top":
        return block == block.flow.block(-1)
    return block.text or bool(block.flow.classes)


def _begin(params, zeta, block, conditioning, guidance, temperature):
    """Conditions, cache and y_0 of a block: (chain, y_0 [R, 1, D], cache)."""
    cfg, (batch, tokens, _) = block.flow, zeta.shape
    text, labels, positions = conditioning.text, conditioning.labels, conditioning.positions
    rows, temperature = batch, jnp.asarray(temperature)
    guided = guidance if is_guided(guidance, block) else None
    if guidance is not None:
        temperature = jnp.ones(())
        if guidance.temperature_on == "all":
            temperature = jnp.asarray(guidance.temperature)
    if guided is not None:
        rows = 2 * batch
        labels, text = _with_null(guided, block, batch, labels, text)
        if guided.temperature_on == "unconditional":
            null = jnp.broadcast_to(jnp.asarray(guided.temperature, zeta.dtype), (batch,))
            temperature = jnp.concatenate([jnp.ones_like(null), null])
    length = text.shape[1] if block.text else 0
    if positions is None:
        positions = flow.block_positions(block, conditioning.grid, length)
    dtype = flow.compute_dtype(params, cfg)
    size = length + tokens - (block.start != "token")
    cache = layers.empty_cache(block.layer, block.depth, rows, size, dtype)
    add = flow.embed_class(params, labels, block) + flow.embed_positions(params, block)
    tables = None
    if cfg.positions == "rope":
        wide = jnp.promote_types(dtype, jnp.float32)
        tables = rope.tables(rope.angles(positions, cfg.head_dim), wide)
    params = {**params, "layers": layers.unstack(params["layers"])}
    chain = _Chain(
        params=params,
        offset=length,
        add=add,
        tables=tables,
        temperature=temperature,
        guided=guided,
        block=block,
    )
    if block.text:
        h, cache = _layers(chain, flow.embed_text(params, text, rows, block), cache, 0)
    if block.start == "token":
        first = jnp.broadcast_to(params["start"].astype(zeta.dtype), (batch, 1, cfg.channels))
    elif block.start == "shift":
        first = zeta[:, :1]
    else:
        scale, mean = _gaussian(chain, h[:, -1:], 1 / tokens)
        first = mean + scale * zeta[:, :1]
    return chain, first, cache


def _with_null(guided, block, batch, labels, text):
    """Labels and text of [conditional; null] rows."""
    if block.flow.classes:
        null = jnp.full((batch,), -1) if guided.labels is None else guided.labels
        given = jnp.full((batch,), -1) if labels is None else labels
        labels = jnp.concatenate([given, null])
    if block.text:
        null = jnp.zeros_like(text[:1]) if guided.text is None else guided.text
        wide = [jnp.broadcast_to(t, (batch, *text.shape[1:])) for t in (text, null)]
        text = jnp.concatenate([t.astype(text.dtype) for t in wide])
    return labels, text


def _layers(chain, h, cache, start):
    """The block's layers over new positions h [R, n, C] that begin at position `start`."""
    block, count = chain.block, h.shape[1]
    tables = chain.tables
    if tables is not None:
        tables = tuple(jax.lax.dynamic_slice_in_dim(t, start, count, -2) for t in tables)
    size = cache.keys[0].shape[-2]
    mask = (start + jnp.arange(count))[:, None] >= jnp.arange(size)[None, :]
    return layers.apply_layers(
        chain.params["layers"],
        h,
        block.layer,
        tables,
        mask,
        cache=cache,
        temperature=chain.temperature,
    )


def _gaussian(chain, h, fraction):
    """(scale, mean) [B, n, D], guided where the block is."""
    scale, mean = flow.head(chain.params, h, chain.block)
    if chain.guided is None:
        return scale, mean
    return guiding.combine(chain.guided, scale, mean, fraction)


def _predict(chain, y, cache, p, predictions):
    """(scale, mean) [B, n, D] of the items after y [B, n, D], the inputs p ... p + n - 1."""
    if chain.guided is not None:
        y = jnp.concatenate([y, y])
    add = chain.add
    if not isinstance(add, float) and add.shape[-2] > 1:
        add = jax.lax.dynamic_slice_in_dim(add, p, y.shape[1], add.ndim - 2)
    h = flow.embed_tokens(chain.params, y, chain.block) + add
    h, cache = _layers(chain, h, cache, chain.offset + p)
    fraction = (p + 1 + jnp.arange(y.shape[1])[None, :, None]) / predictions
    return *_gaussian(chain, h, fraction), cache


def _noise_to_predict(chain, zeta):
    """The noise of y_1 ... y_P."""
    return zeta if chain.block.start == "token" else zeta[:, 1:]


def _tokens_of(chain, first, rest):
    """Data tokens of y_0 and y_1 ... y_P."""
    return rest if chain.block.start == "token" else jnp.concatenate([first, rest], 1)


def _sequential(chain, first, cache, zeta):
    noise = _noise_to_predict(chain, zeta)
    count = noise.shape[1]

    def step(carry, now):
        y, cache = carry
        p, noise_p = now
        scale, mean, cache = _predict(chain, y, cache, p, count)
        y = mean + scale * noise_p[:, None]
        return (y, cache), y[:, 0]

    now = (jnp.arange(count), noise.swapaxes(0, 1))
    _, rest = jax.lax.scan(step, (first, cache), now)
    return _tokens_of(chain, first, rest.swapaxes(0, 1)), count


def _jacobi(chain, first, cache, zeta, block_size, threshold, max_iterations):
    noise = _noise_to_predict(chain, zeta)
    count = noise.shape[1]
    y = jnp.concatenate([first, noise], 1)

    def chunk(start, carry, size):
        y, cache, passes, _ = carry
        noise_now = jax.lax.dynamic_slice_in_dim(noise, start, size, 1)

        def unsettled(state):
            i, _, _, residual = state
            return ~(residual < threshold) & (i < max_iterations)

        def again(state):
            i, y, cache, _ = state
            # Writing at the same offset replaces the last iteration's keys and values.
            cache = cache.replace(length=jnp.asarray(chain.offset + start, jnp.int32))
            now = jax.lax.dynamic_slice_in_dim(y, start, size, 1)
            old = jax.lax.dynamic_slice_in_dim(y, start + 1, size, 1)
            scale, mean, cache = _predict(chain, now, cache, start, count)
            new = mean + scale * noise_now
            residual = jnp.square(new - old).mean() / jnp.square(new).mean()
            return i + 1, jax.lax.dynamic_update_slice_in_dim(y, new, start + 1, 1), cache, residual

        state = (jnp.zeros((), jnp.int32), y, cache, jnp.full((), jnp.inf, y.dtype))
        i, y, cache, residual = jax.lax.while_loop(unsettled, again, state)
        return y, cache, passes + i, residual

    carry = (y, cache, jnp.zeros((), jnp.int32), jnp.zeros((), y.dtype))
    whole, rest = divmod(count, block_size)
    if whole:  # a loop of no turns is traced all the same, and the chunk does not fit
        body = lambda c, state: chunk(c * block_size, state, block_size)
        carry = jax.lax.fori_loop(0, whole, body, carry)
    if rest:
        carry = chunk(whole * block_size, carry, rest)
    y, _, passes, residual = carry
    return _tokens_of(chain, y[:, :1], y[:, 1:]), passes, residual
