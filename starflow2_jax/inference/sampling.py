"""Sample the next token or patch of every row, and compute its log-probabilities.

Shapes: B rows, R = B or 2B rows (followed by those of the unconditional branch), D latent channels.
`log_probs` [B, 3] are nats under the plain model, under the density that is sampled from, and under
the unconditional branch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from starflow2_jax.inference.guidance import Guidance, combine
from starflow2_jax.training.losses.flow import HALF_LOG_2_PI


class SpecialTokens(NamedTuple):
    """Token ids that the loop treats specially."""

    vision_start: int  #: begins an image
    vision_end: int  #: ends an image
    turn_ends: tuple[int, ...]  #: any of these ends the row's turn
    banned: tuple[int, ...]  #: never sampled
    vocab_size: int  #: number of ids that the tokenizer has


@struct.dataclass
class Branches:
    """Unconditional branches of single rows, which are rows of the batch like all others."""

    source: Any  #: int32 [B], the row whose items a row reads: its own, but for unconditional rows
    null: Any  #: int32 [B], the unconditional branch of a row; itself if it has none


@struct.dataclass
class SamplingParams:
    """Sampling parameters, numbers or [B]. They are traced, so changing them does not recompile."""

    temperature: Any  #: temperature of tokens; 0 is greedy
    top_k: Any  #: number of the most likely tokens to sample from; 0 is all of them
    top_p: Any  #: probability mass of the most likely tokens to sample from; 1 is all of them
    image_temperature: Any  #: factor on the standard deviation of patches
    guidance: Guidance | None  #: guidance of patches; None without an unconditional branch
    #: The branches of rows that have them independently of one another. None if the second half of
    #: the rows, if any, is the unconditional branch of the first.
    branches: Branches | None = None


def _columns(value: Any, ndim: int = 2) -> jax.Array:
    """Return a number or numbers [B] with trailing axes, to be combined with [B, ...]."""
    return jnp.reshape(jnp.asarray(value), (-1, *(1,) * (ndim - 1)))


def _null_rows(a: jax.Array, count: int, sampling: SamplingParams) -> jax.Array:
    """Return a [R, ...] of the unconditional branch of each of `count` rows."""
    return a[-count:] if sampling.branches is None else a[sampling.branches.null]


def sample_patch(
    scale: jax.Array,
    mean: jax.Array,
    keys: jax.Array,
    fraction: jax.Array,
    sampling: SamplingParams,
) -> tuple[jax.Array, jax.Array]:
    """Return a sample u [B, D] of the next patch, and log_probs [B, 3].

    Args:
        scale, mean: predicted Gaussian [R, D].
        fraction: (n + 1) / N of patch n [B], for annealed guidance.
    """
    rows = len(keys)
    plain = density = scale[:rows], mean[:rows]
    null = tuple(_null_rows(a, rows, sampling) for a in (scale, mean))
    if sampling.guidance is not None:
        weight = _columns(sampling.guidance.weight, 3)
        pairs = (jnp.concatenate([a, b])[:, None] for a, b in zip(plain, null))
        guided = combine(sampling.guidance.replace(weight=weight), *pairs, fraction[:, None, None])
        # A row without guidance must not depend on the rounding of the rule.
        density = tuple(jnp.where(weight[:, 0] == 0, a, g[:, 0]) for a, g in zip(plain, guided))
    temperature = _columns(sampling.image_temperature).astype(scale.dtype)
    density = (density[0] * temperature, density[1])
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
    u = density[1] + density[0] * noise

    def log_prob(scale, mean):
        z = (u - mean) / scale
        return -(0.5 * jnp.square(z) + jnp.log(scale) + HALF_LOG_2_PI).sum(-1)

    return u, jnp.stack([log_prob(*plain), log_prob(*density), log_prob(*null)], -1)


def sample_token(
    logits: jax.Array,
    keys: jax.Array,
    may_begin_image: jax.Array,
    sampling: SamplingParams,
    special: SpecialTokens,
    dtype: Any,
    needs_copy: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return a sampled token int32 [B] for logits [R, V], and log_probs [B, 3].

    Args:
        may_begin_image: bool [B], whether `<|vision_start|>` is allowed.
        needs_copy: bool [B], whether only `<|vision_start|>` and the end of the turn are allowed.
    """
    rows = len(keys)
    plain_log_probs = jax.nn.log_softmax(logits.astype(dtype))
    ids = jnp.arange(logits.shape[-1])
    is_allowed = (ids < special.vocab_size) & ~jnp.isin(ids, jnp.asarray(special.banned))
    is_allowed = is_allowed & (may_begin_image[:, None] | (ids != special.vision_start))
    if needs_copy is not None:
        begins_copy = jnp.isin(ids, jnp.asarray((special.vision_start, *special.turn_ends)))
        is_allowed = jnp.where(needs_copy[:, None], begins_copy, is_allowed)
    allowed_logits = jnp.where(is_allowed, logits[:rows], -jnp.inf)
    temperature, top_k, top_p = (
        _columns(value) for value in (sampling.temperature, sampling.top_k, sampling.top_p)
    )
    is_greedy = temperature <= 0
    scaled_logits = allowed_logits / jnp.where(is_greedy, 1.0, temperature)
    truncates = (top_k > 0) | (top_p < 1)

    def truncate(logits):  # A row without limits must not depend on the limits of others.
        return jnp.where(truncates, truncate_logits(logits, top_k, top_p), logits)

    scaled_logits = jax.lax.cond(truncates.any(), truncate, lambda logits: logits, scaled_logits)
    sampled = jax.vmap(jax.random.categorical)(keys, scaled_logits)
    is_greedy = is_greedy[:, 0]
    token = jnp.where(is_greedy, jnp.argmax(allowed_logits, -1), sampled).astype(jnp.int32)

    def gather(log_probs):
        return jnp.take_along_axis(log_probs, token[:, None], -1)[:, 0]

    sampling_log_prob = gather(jax.nn.log_softmax(scaled_logits.astype(dtype)))
    sampling_log_prob = jnp.where(is_greedy, 0.0, sampling_log_prob)
    conditional = plain_log_probs[:rows]
    unconditional = _null_rows(plain_log_probs, rows, sampling)
    return token, jnp.stack([gather(conditional), sampling_log_prob, gather(unconditional)], -1)


def truncate_logits(logits: jax.Array, top_k: Any, top_p: Any) -> jax.Array:
    """Set logits [..., V] outside the top k (0 for all) and the top p to -inf."""
    ordered = -jnp.sort(-logits, axis=-1)
    size = logits.shape[-1]
    limit = jnp.where(jnp.asarray(top_k) > 0, jnp.clip(top_k, 1, size), size)
    ordered = jnp.where(jnp.arange(size) < limit, ordered, -jnp.inf)
    probs = jax.nn.softmax(ordered)
    # A token stays while those before it sum to less than top_p; the most likely one always does.
    mass_before = jnp.cumsum(probs, -1) - probs
    stays = (mass_before < top_p) & (ordered > -jnp.inf)
    threshold = jnp.where(stays, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= jnp.minimum(threshold, ordered[..., :1]), logits, -jnp.inf)
