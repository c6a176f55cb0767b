"""Weights of a layer as XLA multiplies them fastest on a CPU; the results are the same.

Shapes: C width, H query heads, K key/value heads, D channels of a head.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.params import Tree

# Number of columns in one panel of a tall weight in a decode step.
PANEL = 64
QKV = ("query", "key", "value")


def decode_layer(layer: Tree) -> Tree:
    """Return a layer's parameters for a few rows at a time.

    Query, key and value become one linear, and a down-projection with more inputs than outputs
    becomes `panels`, consecutive blocks of PANEL columns.
    """
    rest = {name: tree for name, tree in layer.items() if name not in QKV}
    rest["mlp_down"] = _as_panels(rest["mlp_down"])
    return {"query_key_value": join_qkv(layer), **rest}


def join_qkv(layer: Tree) -> dict[str, jax.Array]:
    """Return one linear for queries, keys and values, [C, (H + 2 K) D]."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *(layer[n] for n in QKV))


def _as_panels(tree: Tree) -> Tree:
    inputs, outputs = tree["weight"].shape
    if inputs <= outputs or outputs % PANEL:
        return tree
    rest = {name: leaf for name, leaf in tree.items() if name != "weight"}
    return {"panels": tree["weight"].reshape(inputs, -1, PANEL).swapaxes(0, 1), **rest}


def with_half_pairs(layer: Tree, head_dim: int) -> dict[str, Any]:
    """Return a layer whose RoPE pairs are channels (i, i + D/2) instead of (2i, 2i + 1).

    The columns of queries and keys are permuted alike, so that no score changes. Neighbors in
    memory are then rotated by one vector instruction, and not one by one.
    """

    def permute(leaf):
        pairs = leaf.reshape(*leaf.shape[:-1], -1, head_dim // 2, 2)
        return pairs.swapaxes(-1, -2).reshape(leaf.shape)

    names = [name for name in ("query", "key", "query_norm", "key_norm") if name in layer]
    permuted: Mapping[str, Any] = {name: jax.tree.map(permute, layer[name]) for name in names}
    return {**layer, **permuted}
