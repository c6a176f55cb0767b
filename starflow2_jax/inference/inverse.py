"""Invert a flow, noise to data: sequentially with a key-value cache, or by block-wise Jacobi.

Shapes: B rows, R = B or 2B rows of a block (doubled under guidance), T tokens, D token channels,
C width, P predictions of a block.

Both methods treat a block as one chain y_0, y_1, ..., y_P: prediction p reads y_0 ... y_p and
returns the (scale, mean) of y_{p+1}, and y_{p+1} = mean + scale * noise. y_0 is the start token, or
the first data token if the block passes it unchanged or predicts it from the text.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax.config import checks
from starflow2_jax.inference.guidance import Guidance, check, combine
from starflow2_jax.mesh import platform
from starflow2_jax.models import flow, layers
from starflow2_jax.models.flow import BlockConfig, Conditioning, FlowConfig
from starflow2_jax.models.layers import at_least_float32
from starflow2_jax.params import Tree

# On a CPU, sequential sampling runs in at most SEGMENTS loops of at least SEGMENT_STEPS steps. The
# cache grows before each of them, so that attention does not read slots that are still empty.
SEGMENTS, SEGMENT_STEPS = 4, 64


@dataclass(frozen=True)
class Jacobi:
    """Settings of block-wise Jacobi iteration (STARFlow-V, arXiv 2511.20462).

    A chunk of `block` tokens starts from the noise and is predicted again, in parallel, until
    mean((new - old)^2) / mean(new^2) < threshold over the batch, or for `max_iterations`. It is
    exact after `block` iterations: threshold 0 with enough of them equals sequential sampling.

    With a `tolerance` the chunk slides instead (`_slide`), in each row by itself: a token is final
    once a pass has changed no earlier one by more than the tolerance. Every pass makes at least one
    token final, so there are at most as many passes as sequential sampling has steps, and a row
    does not depend on the batch. Tolerance 0 equals sequential sampling.
    """

    block: int = 16
    threshold: float = 1e-3
    max_iterations: int = 32
    tolerance: float | None = None

    def __post_init__(self):
        checks.check_fields(Jacobi, vars(self), "jacobi")


@struct.dataclass
class _Chain:
    """Inputs that every prediction of one block shares."""

    params: Tree  #: the block's parameters, its layers unstacked
    block: BlockConfig = struct.field(pytree_node=False)  #: the block's configuration
    prefix_len: int = struct.field(pytree_node=False)  #: number of text positions before y_0
    embedding_offset: Any  #: sum of class and position embeddings, added to every token embedding
    rope_tables: Any  #: `flow.rope_tables` of all positions
    temperature: Any  #: temperature of the attention logits, a number or [R]
    guidance: Guidance | None  #: the guidance of this block, or None


@jax.jit
def prepare_params(params: Tree) -> dict[str, Any]:
    """Return a flow's parameters with one tree per layer, laid out for the decode steps.

    `inverse` lays out the parameters of a training itself, again in every call.
    """
    blocks = {
        i: {**block, "layers": layers.unstack(block["layers"])}
        for i, block in params["blocks"].items()
    }
    return {**params, "blocks": blocks}


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
    """Invert `flow.forward`: noise z [B, T, D] to data x [B, T, D] in raster order.

    Args:
        params: the flow's parameters, as trained or from `prepare_params`.
        jacobi: settings of Jacobi iteration, or None for sequential sampling.
        temperature: temperature of all attention logits; `guidance.temperature` replaces it.

    Returns:
        x [B, T, D], and a dictionary: `passes` int32 [blocks], forward passes through each block's
        layers, without the prefix; `residual` [blocks], each block's last Jacobi residual (with a
        tolerance the largest change of a token that was final), 0 if sequential; `tokens`, arrays
        [B, T, D] after each block, from z to x.
    """
    conditioning = flow.check_inputs(cfg, z.shape, conditioning)
    if guidance is not None:
        check(guidance)
    if jacobi is not None and (jacobi.block < 1 or jacobi.max_iterations < 1):
        raise ValueError(f"jacobi: block and max_iterations must be at least 1, got {jacobi}")
    x, passes, residual, tokens = _inverse(
        params,
        z,
        conditioning,
        guidance,
        _limits(jacobi) if jacobi else None,
        temperature,
        cfg=cfg,
        jacobi_block=jacobi.block if jacobi else None,
    )
    return x, {"passes": passes, "residual": residual, "tokens": tokens}


def _limits(jacobi: Jacobi) -> dict[str, float]:
    """Return the traced settings of `_slide` or `_jacobi`."""
    if jacobi.tolerance is not None:
        return {"tolerance": jacobi.tolerance}
    return {"threshold": jacobi.threshold, "max_iterations": jacobi.max_iterations}


@partial(jax.jit, static_argnames=("cfg", "jacobi_block"))
def _inverse(params, z, conditioning, guidance, jacobi_limits, temperature, *, cfg, jacobi_block):
    tokens, passes, residuals = [at_least_float32(z)], [], []
    for i in reversed(range(len(cfg.layers))):
        x, count, residual = tokens[-1], 0, 0.0
        if cfg.layers[i]:
            block, is_deep = cfg.block(i), i == len(cfg.layers) - 1
            noise = x[:, ::-1] if block.reverse else x
            chain, first, cache = _start_chain(
                params["blocks"][str(i)],
                noise,
                block,
                conditioning if is_deep else conditioning.replace(positions=None),
                guidance,
                temperature,
            )
            if jacobi_block is None:
                x, count = _sequential(chain, first, cache, noise)
            else:
                solve = _slide if "tolerance" in jacobi_limits else _jacobi
                x, count, residual = solve(
                    chain, first, cache, noise, jacobi_block, **jacobi_limits
                )
            x = x[:, ::-1] if block.reverse else x
        tokens.append(x)
        passes.insert(0, jnp.asarray(count, jnp.int32))
        residuals.insert(0, jnp.asarray(residual, z.dtype))
    return tokens[-1], jnp.stack(passes), jnp.stack(residuals), tokens


def is_guided(guidance: Guidance | None, block: BlockConfig) -> bool:
    """Return whether a block runs twice as many rows, normally because it reads a condition."""
    if guidance is None:
        return False
    return guidance.all_blocks or block.text or bool(block.flow.classes)


def _start_chain(
    params, noise, block, conditioning, guidance, temperature
) -> tuple[_Chain, jax.Array, Any]:
    """Return the chain of a block, y_0 [R, 1, D], and a cache that holds the text."""
    cfg, (batch, tokens, _) = block.flow, noise.shape
    text, labels, positions = conditioning.text, conditioning.labels, conditioning.positions
    rows, temperature = batch, jnp.asarray(temperature)
    block_guidance = guidance if is_guided(guidance, block) else None
    if guidance is not None:
        temperature = jnp.ones(())
        if guidance.temperature_on == "all":
            temperature = jnp.asarray(guidance.temperature)
    if block_guidance is not None:
        rows = 2 * batch
        labels, text = _append_null(block_guidance, block, batch, labels, text)
        if block_guidance.temperature_on == "unconditional":
            null = jnp.asarray(block_guidance.temperature, noise.dtype)
            null = jnp.broadcast_to(null, (batch,))
            temperature = jnp.concatenate([jnp.ones_like(null), null])
    prefix_len = text.shape[1] if block.text else 0
    if positions is None:
        positions = flow.block_positions(block, conditioning.grid, prefix_len)
    dtype = flow.compute_dtype(params, cfg)
    cache_size = prefix_len + tokens - (block.start != "token")
    cache = layers.empty_cache(block.layer, block.depth, rows, cache_size, dtype)
    if not isinstance(params["layers"], tuple):
        params = {**params, "layers": layers.unstack(params["layers"])}
    chain = _Chain(
        params=params,
        block=block,
        prefix_len=prefix_len,
        embedding_offset=flow.embed_class(params, labels, block)
        + flow.embed_positions(params, block),
        rope_tables=flow.rope_tables(block, positions, jnp.promote_types(dtype, jnp.float32)),
        temperature=temperature,
        guidance=block_guidance,
    )
    if block.text:
        h, cache = _layers(chain, flow.embed_text(params, text, rows, block), cache, 0)
    if block.start == "token":
        first = jnp.broadcast_to(params["start"].astype(noise.dtype), (batch, 1, cfg.channels))
    elif block.start == "shift":
        first = noise[:, :1]
    else:
        scale, mean = _gaussian(chain, h[:, -1:], 1 / tokens)
        first = mean + scale * noise[:, :1]
    return chain, first, cache


def _append_null(guidance, block, batch, labels, text):
    """Return the labels and the text of [conditional; null] rows."""
    if block.flow.classes:
        null = jnp.full((batch,), -1)
        labels = jnp.concatenate([null if labels is None else labels, null])
    if block.text:
        null = jnp.zeros_like(text[:1]) if guidance.text is None else guidance.text
        halves = [jnp.broadcast_to(t, (batch, *text.shape[1:])) for t in (text, null)]
        text = jnp.concatenate([t.astype(text.dtype) for t in halves])
    return labels, text


def _layers(chain, h, cache, start):
    """Apply the block's layers to new positions h [R, n, C], which begin at `start`, [] or [R]."""
    start, count = jnp.asarray(start), h.shape[1]
    size = cache.keys[0].shape[-2]
    mask = (start[..., None] + jnp.arange(count))[..., None] >= jnp.arange(size)
    return layers.apply_layers(
        chain.params["layers"],
        h,
        chain.block.layer,
        jax.tree.map(lambda t: _slice(t, start, count), chain.rope_tables),
        mask,
        cache=cache,
        temperature=chain.temperature,
    )


def _slice(a, start, count):
    """Return `count` positions of a [..., positions, channels] from `start`, [] or [R].

    With a start for each row, a is [positions, channels] or has a leading axis of R or one rows.
    """
    if not start.ndim:
        return jax.lax.dynamic_slice_in_dim(a, start, count, a.ndim - 2)
    index = start[:, None] + jnp.arange(count)
    return a[index] if a.ndim == 2 else jnp.take_along_axis(a, index[..., None], 1)


def _gaussian(chain, h, fraction):
    """Return (scale, mean) [B, n, D], guided if the block is."""
    scale, mean = flow.head(chain.params, h, chain.block)
    if chain.guidance is None:
        return scale, mean
    return combine(chain.guidance, scale, mean, fraction)


def _predict(chain, y, cache, p, predictions):
    """Return (scale, mean) [B, n, D] of the items after the inputs p ... p + n - 1, y [B, n, D].

    p is one number, or [B].
    """
    p = jnp.asarray(p)
    fraction = (p[..., None, None] + 1 + jnp.arange(y.shape[1])[:, None]) / predictions
    if chain.guidance is not None:
        y = jnp.concatenate([y, y])
        p = jnp.tile(p, 2) if p.ndim else p
    offset = chain.embedding_offset
    if not isinstance(offset, float) and offset.shape[-2] > 1:
        offset = _slice(offset, p, y.shape[1])
    h = flow.embed_tokens(chain.params, y, chain.block) + offset
    h, cache = _layers(chain, h, cache, chain.prefix_len + p)
    return *_gaussian(chain, h, fraction), cache


def _predicted_noise(chain, noise):
    """Return the noise of y_1 ... y_P."""
    return noise if chain.block.start == "token" else noise[:, 1:]


def _data_tokens(chain, first, rest):
    """Return the data tokens of y_0 and y_1 ... y_P."""
    return rest if chain.block.start == "token" else jnp.concatenate([first, rest], 1)


def _sequential(chain, first, cache, noise):
    noise = _predicted_noise(chain, noise)
    count = noise.shape[1]

    def step(carry, inputs):
        y, cache = carry
        p, noise_p = inputs
        scale, mean, cache = _predict(chain, y, cache, p, count)
        y = mean + scale * noise_p[:, None]
        return (y, cache), y[:, 0]

    p, noise = jnp.arange(count), noise.swapaxes(0, 1)
    y, outputs = first, []
    for start, end in _segments(count):
        cache = _resize(cache, chain.prefix_len + end)
        inputs = (p[start:end], noise[start:end])
        (y, cache), segment = jax.lax.scan(step, (y, cache), inputs)
        outputs.append(segment)
    return _data_tokens(chain, first, jnp.concatenate(outputs).swapaxes(0, 1)), count


def _segments(count):
    """Return the bounds (start, end) of the loops that run `count` steps."""
    number = min(SEGMENTS, max(count // SEGMENT_STEPS, 1)) if platform() == "cpu" else 1
    return list(itertools.pairwise(i * count // number for i in range(number + 1)))


def _resize(cache, size):
    """Return the cache with `size` slots, the last ones empty or removed."""

    def resize(a):
        padding = [(0, 0, 0)] * a.ndim
        padding[-2] = (0, size - a.shape[-2], 0)
        return jax.lax.pad(a, jnp.zeros((), a.dtype), padding)

    return cache.replace(
        keys=tuple(map(resize, cache.keys)), values=tuple(map(resize, cache.values))
    )


def _jacobi(chain, first, cache, noise, block_size, threshold, max_iterations):
    noise = _predicted_noise(chain, noise)
    count = noise.shape[1]
    y = jnp.concatenate([first, noise], 1)

    def solve_chunk(start, carry, size):
        y, cache, passes, _ = carry
        chunk_noise = jax.lax.dynamic_slice_in_dim(noise, start, size, 1)

        def not_converged(state):
            i, _, _, residual = state
            return ~(residual < threshold) & (i < max_iterations)

        def iterate(state):
            i, y, cache, _ = state
            # Writing at the same offset replaces the last iteration's keys and values.
            cache = cache.replace(length=jnp.asarray(chain.prefix_len + start, jnp.int32))
            inputs = jax.lax.dynamic_slice_in_dim(y, start, size, 1)
            old = jax.lax.dynamic_slice_in_dim(y, start + 1, size, 1)
            scale, mean, cache = _predict(chain, inputs, cache, start, count)
            new = mean + scale * chunk_noise
            residual = jnp.square(new - old).mean() / jnp.square(new).mean()
            return i + 1, jax.lax.dynamic_update_slice_in_dim(y, new, start + 1, 1), cache, residual

        state = (jnp.zeros((), jnp.int32), y, cache, jnp.full((), jnp.inf, y.dtype))
        i, y, cache, residual = jax.lax.while_loop(not_converged, iterate, state)
        return y, cache, passes + i, residual

    def body(c, carry):
        return solve_chunk(c * block_size, carry, block_size)

    carry = (y, cache, jnp.zeros((), jnp.int32), jnp.zeros((), y.dtype))
    full_chunks, rest = divmod(count, block_size)
    if full_chunks:  # Even an empty loop is traced, and a full chunk would not fit.
        carry = jax.lax.fori_loop(0, full_chunks, body, carry)
    if rest:
        carry = solve_chunk(full_chunks * block_size, carry, rest)
    y, _, passes, residual = carry
    return _data_tokens(chain, y[:, :1], y[:, 1:]), passes, residual


def _slide(chain, first, cache, noise, block_size, tolerance):
    noise = _predicted_noise(chain, noise)
    rows, count, _ = noise.shape
    size = min(block_size, count)
    # The cache of a single row has no batch axis, and one length.
    one_row = cache.keys[0].ndim == 3

    def not_done(state):
        return state[1].min() < count

    def iterate(state):
        passes, done, y, cache, residual = state  # y_0 ... y_done of each row are final
        start = jnp.minimum(done, count - size)
        p = start[0] if one_row else start
        branch_starts = start if chain.guidance is None else jnp.tile(start, 2)
        length = chain.prefix_len + (p if one_row else branch_starts)
        cache = cache.replace(length=length.astype(jnp.int32))
        scale, mean, cache = _predict(chain, _slice(y, start, size), cache, p, count)
        old, place = _slice(y, start + 1, size), start[:, None] + 1 + jnp.arange(size)
        is_final = place <= done[:, None]
        new = jnp.where(is_final[..., None], old, mean + scale * _slice(noise, start, size))
        change = jnp.abs(new - old).max(-1)
        # The item after those that have not changed was predicted from final ones.
        settled = jnp.cumprod(change <= tolerance, 1)
        done = start + jnp.minimum(settled.sum(1, dtype=jnp.int32) + 1, size)
        residual = jnp.maximum(residual, jnp.where(settled, change, 0).max())
        y = y.at[jnp.arange(rows)[:, None], place].set(new)
        return passes + 1, done, y, cache, residual

    length = jnp.zeros((), jnp.int32) if one_row else jnp.zeros(cache.keys[0].shape[0], jnp.int32)
    state = (
        jnp.zeros((), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.concatenate([first, noise], 1),
        cache.replace(length=length),
        jnp.zeros((), noise.dtype),
    )
    passes, _, y, _, residual = jax.lax.while_loop(not_done, iterate, state)
    return _data_tokens(chain, y[:, :1], y[:, 1:]), passes, residual
