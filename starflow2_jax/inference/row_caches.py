"""The caches of single rows: programs that read prompts into them, and copy them to a pool.

Shapes: R rows of a pool, S slots of a cache, T new items.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.inference import decode_loop
from starflow2_jax.inference.row_items import RowContent, RowItems, prefill_inputs
from starflow2_jax.models.backbone import BackboneConfig, BackboneInputs
from starflow2_jax.models.layers import KVCache
from starflow2_jax.params import Tree

# Prompts are read in pieces of these sizes, each by one program.
PREFILL_SIZES = (256, 64, 16)
# Slots that an answer may not use: padding of the last piece, and an item behind the row's end.
SPARE_SLOTS = PREFILL_SIZES[-1] + 2
# What a row has read is kept in this number of slots, or a power of two times as many.
_KEPT_SLOTS = 64

Caches = tuple[KVCache, ...]


@dataclass(frozen=True, eq=False)
class ReadRow:
    """The caches of one row, without a batch axis, and what they have read."""

    caches: Caches  # with a length int32 []
    content: RowContent  # the items in the first slots, one each


@partial(jax.jit, static_argnames="cfg", donate_argnames="caches")
def _prefill_piece(
    params: Tree, caches: Caches, inputs: BackboneInputs, is_real: Any, *, cfg: BackboneConfig
) -> Caches:
    """Read items [1, T] into the caches of one row."""
    length, size = caches[0].length, caches[0].keys[0].shape[-2]
    valid = (jnp.arange(size) < length)[None]
    _, _, caches, _ = decode_loop.forward_cached(params, caches, valid, inputs, is_real, cfg)
    length = length + is_real.sum(dtype=jnp.int32)
    return tuple(cache.replace(length=length) for cache in caches)


@partial(jax.jit, donate_argnames="caches")
def write_row(caches: Caches, row_caches: Caches, row: Any) -> Caches:
    """Copy the caches of one row to a row of the pool."""
    pairs = zip(caches, row_caches)
    return tuple(jax.tree.map(lambda a, b: a.at[row].set(b), *pair) for pair in pairs)


@partial(jax.jit, static_argnames="slots")
def read_row(caches: Caches, row: Any, *, slots: int) -> Caches:
    """Return a copy of the first slots of a row of the pool."""
    rows = decode_loop.map_caches(lambda a: a[row, :, :slots], caches)
    return tuple(cache.replace(length=cache.length[row]) for cache in rows)


@partial(jax.jit, static_argnames="slots")
def first_items(caches: Caches, count: Any, *, slots: int) -> Caches:
    """Return a copy of a row's caches with its first items alone, in a number of slots."""

    def resize(a: jax.Array) -> jax.Array:
        missing = max(slots - a.shape[-2], 0)
        return jnp.pad(a[..., :slots, :], [(0, 0)] * (a.ndim - 2) + [(0, missing), (0, 0)])

    rows = decode_loop.map_caches(resize, caches)
    return tuple(cache.replace(length=jnp.asarray(count, jnp.int32)) for cache in rows)


def prefill(
    params: Tree, caches: Caches, items: RowItems, first: int, cfg: BackboneConfig, offset: int = 0
) -> Caches:
    """Read the items from `first` on, but for the last, into the caches of one row.

    The arrays of `caches` are donated. `offset` is the slot of item 0.
    """
    num_slots = caches[0].keys[0].shape[-2]
    while first < len(items) - 1:
        size = prefill_size(len(items) - 1 - first, num_slots - offset - first)
        inputs, is_real, count = prefill_inputs(items, first, size)
        caches = _prefill_piece(params, caches, inputs, is_real, cfg=cfg)
        first += count
    return caches


def prefill_size(count: int, room: int) -> int:
    """Return the size of the next piece of a prompt of `count` items, padding included.

    `room` is the number of free slots. Less than half of a piece is padding, but for the smallest.
    """
    sizes = [size for size in PREFILL_SIZES if size <= room and size < 2 * count]
    return sizes[0] if sizes else PREFILL_SIZES[-1]


def kept_slots(length: int, num_slots: int) -> int:
    """Return the slots in which a row of so many items is kept: few sizes, each a program."""
    pieces = max(length - 1, 0) // _KEPT_SLOTS
    return min(_KEPT_SLOTS << pieces.bit_length(), num_slots)
