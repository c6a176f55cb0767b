"""Cross entropy of the text of interleaved rows, as sums and counts.

Axes: B rows, T positions, V vocabulary, S records of a row.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# A record has at least this many positions.
LEAST_RECORD = 8
# What `sums` gives.
NAMES = ("nll", "tokens", "right", "records", "records_right")


def targets(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Bool [B, T - 1]: whether position t is to predict a text token at t + 1."""
    segments = batch["segments"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return same & batch["target"][:, 1:] & (batch["image"][:, 1:] < 0)


def _each(logits, batch):
    """Targets, the nats of each item and whether it is the likeliest, all [B, T - 1]."""
    wanted = batch["ids"][:, 1:]
    nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, wanted[..., None], -1)[..., 0]
    return targets(batch), nats, jnp.argmax(logits, -1) == wanted


def sums(logits: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Of each row [B], float32: `nll` in nats, target `tokens`, `right` ones (the likeliest),
    `records` with a target, and `records_right`, all of whose targets are.

    A record is right exactly where greedy decoding gives its answers word for word.

    Args:
        logits: at least float32 [B, T - 1, V], of the states before each item.
    """
    mask, nats, right = _each(logits, batch)
    count, wrong = by_record(batch, mask, mask & ~right)
    return {
        "nll": jnp.where(mask, nats, 0).sum(1),
        "tokens": mask.sum(1).astype(jnp.float32),
        "right": (mask & right).sum(1).astype(jnp.float32),
        "records": (count > 0).sum(1).astype(jnp.float32),
        "records_right": ((count > 0) & (wrong == 0)).sum(1).astype(jnp.float32),
    }


def by_record_score(logits: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Of each record [B, S]: target `tokens`, those that are `wrong` (not the likeliest), `nll`."""
    mask, nats, right = _each(logits, batch)
    names = ("tokens", "wrong", "nll")
    return dict(zip(names, by_record(batch, mask, mask & ~right, jnp.where(mask, nats, 0))))


def by_record(batch: Mapping[str, jax.Array], *values: jax.Array) -> tuple[Any, ...]:
    """Sums over each record of values [B, T - 1]: float32 [B, S] each."""
    segments = batch["segments"]
    number = jnp.arange(1, segments.shape[1] // LEAST_RECORD + 2)
    member = (segments[:, 1:, None] == number).astype(jnp.float32)
    return tuple(jnp.einsum("bts,bt->bs", member, v.astype(jnp.float32)) for v in values)
