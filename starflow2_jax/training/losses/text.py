"""Cross entropy of the text of interleaved rows, as sums and counts.

Shapes: B rows, T positions, V vocabulary, S slots for the records of a row.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Lower bound of the number of positions of a record.
MIN_RECORD_LENGTH = 8
# Keys of `row_sums`.
NAMES = ("nll", "tokens", "right", "records", "records_right")


def targets(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return bool [B, T - 1]: whether position t predicts a target text token at t + 1."""
    segments = batch["segments"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return same & batch["target"][:, 1:] & (batch["image"][:, 1:] < 0)


def _token_terms(logits, batch):
    """Return, all [B, T - 1]: which items are targets, their nats, and which are the likeliest."""
    ids = batch["ids"][:, 1:]
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, ids[..., None], -1)[..., 0]
    return targets(batch), nll, jnp.argmax(logits, -1) == ids


def row_sums(logits: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return sums over each row [B] from logits [B, T - 1, V]; their names are `NAMES`.

    `nll` is in nats. The others are counts: target `tokens`; `right`, the targets that are the
    likeliest token; `records` with a target; `records_right`, the records whose targets are all
    right, so that greedy decoding reproduces their answers word for word.
    """
    mask, nll, correct = _token_terms(logits, batch)
    count, wrong = sum_by_record(batch, mask, mask & ~correct)
    return {
        "nll": jnp.where(mask, nll, 0).sum(1),
        "tokens": mask.sum(1).astype(jnp.float32),
        "right": (mask & correct).sum(1).astype(jnp.float32),
        "records": (count > 0).sum(1).astype(jnp.float32),
        "records_right": ((count > 0) & (wrong == 0)).sum(1).astype(jnp.float32),
    }


def record_sums(logits: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return target `tokens`, `wrong` ones (not the likeliest) and `nll` of each record [B, S]."""
    mask, nll, correct = _token_terms(logits, batch)
    sums = sum_by_record(batch, mask, mask & ~correct, jnp.where(mask, nll, 0))
    return dict(zip(("tokens", "wrong", "nll"), sums))


def sum_by_record(batch: Mapping[str, jax.Array], *values: jax.Array) -> tuple[Any, ...]:
    """Return sums over each record of values [B, T - 1]: float32 [B, S] each."""
    segments = batch["segments"]
    number = jnp.arange(1, segments.shape[1] // MIN_RECORD_LENGTH + 2)
    member = (segments[:, 1:, None] == number).astype(jnp.float32)
    return tuple(jnp.einsum("bts,bt->bs", member, v.astype(jnp.float32)) for v in values)
