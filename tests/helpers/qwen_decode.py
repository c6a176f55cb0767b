"""Text generation with Qwen2.5-VL alone and a key-value cache, to compare with transformers."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.models import layers, qwen, qwen_vision


class Prompt(NamedTuple):
    """Inputs of the model.

    Attributes:
        ids: int32 [B, T], padded.
        valid: bool [B, T].
        positions: int32 [B, T, 3].
        next_position: int32 [B], the position of the next token.
        patches: float32 [N, P] of all images, or None.
        grids: int [images, 3].
    """

    ids: np.ndarray
    valid: np.ndarray
    positions: np.ndarray
    next_position: np.ndarray
    patches: np.ndarray | None
    grids: np.ndarray


def generate(params, cfg, prompt: Prompt, *, max_tokens=256, stop=(), temperature=0.0, seed=0):
    """Return the token ids that continue each row, up to the first of `stop` and without it."""
    plan = None if prompt.patches is None else qwen_vision.plan(prompt.grids, cfg.vision)
    ids, counts = _generate(
        params,
        prompt._asdict() | {"grids": None, "plan": plan},
        jnp.asarray(stop, jnp.int32),
        jnp.float32(temperature),
        jax.random.key(seed),
        cfg,
        max_tokens,
    )
    return [row[:count].tolist() for row, count in zip(np.asarray(ids), np.asarray(counts))]


@functools.partial(jax.jit, static_argnums=(5, 6))
def _generate(params, prompt: dict[str, Any], stop, temperature, key, cfg, max_tokens):
    ids, valid = prompt["ids"], prompt["valid"]
    batch_size, length = ids.shape
    h = qwen.embed_multimodal(params, ids, cfg, prompt["patches"], prompt["plan"])
    params = {**params, "layers": layers.unstack(params["layers"])}
    cache = qwen.empty_cache(cfg, batch_size, length + max_tokens, h.dtype)
    visible = jnp.pad(valid, ((0, 0), (0, max_tokens)), constant_values=True)
    slots = jnp.arange(length + max_tokens)
    mask = visible[:, None, :] & (slots <= jnp.arange(length)[:, None])
    states, cache = qwen.apply_layers(params, h, cfg, prompt["positions"], mask, cache=cache)
    last = length - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    state = states[jnp.arange(batch_size), last]
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch_size))

    def sample(state, index):
        logits = qwen.logits(params, state, cfg)
        step_keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
        scaled_logits = logits / jnp.maximum(temperature, 1e-6)
        sampled = jax.vmap(jax.random.categorical)(step_keys, scaled_logits)
        return jnp.where(temperature > 0, sampled, jnp.argmax(logits, -1)).astype(jnp.int32)

    def not_done(carry):
        index, _, _, counts, _ = carry
        return (index < max_tokens) & (counts == index).any()

    def step(carry):
        index, state, out, counts, cache = carry
        token = sample(state, index)
        is_active = (counts == index) & ~(token[:, None] == stop).any(-1)
        position = (prompt["next_position"] + index)[:, None, None]
        position = jnp.broadcast_to(position, (batch_size, 1, 3))
        mask = visible[:, None, :] & (slots <= length + index)
        h = qwen.embed(params, token[:, None], cfg)
        states, cache = qwen.apply_layers(params, h, cfg, position, mask, cache=cache)
        out = out.at[:, index].set(token)
        return index + 1, states[:, 0], out, counts + is_active, cache

    out = jnp.zeros((batch_size, max_tokens), jnp.int32)
    counts = jnp.zeros(batch_size, jnp.int32)
    carry = (jnp.int32(0), state, out, counts, cache)
    _, _, out, counts, _ = jax.lax.while_loop(not_done, step, carry)
    return out, counts
