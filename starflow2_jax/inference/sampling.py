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
class SamplingParams:
    """Sampling parameters. They are traced, so changing them does not recompile."""

    temperature: Any  #: temperature of tokens; 0 is greedy
    top_k: Any  #: number of the most likely tokens to sample from; 0 is all of them
    top_p: Any  #: probability mass of the most likely tokens to sample from; 1 is all of them
    image_temperature: Any  #: factor on the standard deviation of patches
    guidance: Guidance | None  #: guidance of patches; None without an unconditional branch


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
    plain, density = (scale[:rows], mean[:rows]), (scale, mean)
    if sampling.guidance is not None:
        guided = combine(sampling.guidance, scale[:, None], mean[:, None], fraction[:, None, None])
        density = tuple(a[:, 0] for a in guided)
    temperature = jnp.asarray(sampling.image_temperature, scale.dtype)
    density = (density[0] * temperature, density[1])
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
    u = density[1] + density[0] * noise

    def log_prob(scale, mean):
        z = (u - mean) / scale
        return -(0.5 * jnp.square(z) + jnp.log(scale) + HALF_LOG_2_PI).sum(-1)

    unconditional = log_prob(scale[-rows:], mean[-rows:])
    return u, jnp.stack([log_prob(*plain), log_prob(*density), unconditional], -1)


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
    is_greedy = jnp.asarray(sampling.temperature) <= 0
    scaled_logits = allowed_logits / jnp.where(is_greedy, 1.0, sampling.temperature)
    truncates = (jnp.asarray(sampling.top_k) > 0) | (jnp.asarray(sampling.top_p) < 1)
    scaled_logits = jax.lax.cond(
        truncates,
        lambda logits: truncate_logits(logits, sampling.top_k, sampling.top_p),
        lambda logits: logits,
        scaled_logits,
    )
    sampled = jax.vmap(jax.random.categorical)(keys, scaled_logits)
    token = jnp.where(is_greedy, jnp.argmax(allowed_logits, -1), sampled).astype(jnp.int32)

    def gather(log_probs):
        return jnp.take_along_axis(log_probs, token[:, None], -1)[:, 0]

    sampling_log_prob = gather(jax.nn.log_softmax(scaled_logits.astype(dtype)))
    sampling_log_prob = jnp.where(is_greedy, 0.0, sampling_log_prob)
    conditional, unconditional = plain_log_probs[:rows], plain_log_probs[-rows:]
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
