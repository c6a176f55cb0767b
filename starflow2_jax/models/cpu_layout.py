"""Weights of a layer as XLA multiplies them fastest on a CPU; the results are the same.

Shapes: C width, H query heads, K key/value heads, D channels of a head, R rows, P panels of a
weight.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.params import Tree

# Number of columns in one panel of a weight in a decode step, and of the rows up to which a product
# with panels takes less time than one with a matrix.
PANEL, PANEL_ROWS = 64, 32
QKV = ("query", "key", "value")
LINEARS = ("query_key_value", "out", "mlp_gate", "mlp_up", "mlp_down")


def decode_layer(layer: Tree) -> Tree:
    """Return a layer's parameters for a few rows at a time.

    Query, key and value become one linear. On one device float32 weights become `panels`
    [P, in, PANEL], consecutive blocks of columns, if XLA hands products with panels to its library.
    """
    layer = {
        "query_key_value": join_qkv(layer),
        **{name: tree for name, tree in layer.items() if name not in QKV},
    }
    return {name: _as_panels(tree) if name in LINEARS else tree for name, tree in layer.items()}


def join_qkv(layer: Tree) -> dict[str, jax.Array]:
    """Return one linear for queries, keys and values, [C, (H + 2 K) D]."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *(layer[n] for n in QKV))


def _as_panels(tree: Tree) -> Tree:
    inputs, outputs = tree["weight"].shape
    is_float32 = tree["weight"].dtype == jnp.float32
    # A mesh shards the columns of a weight, not its panels.
    is_sharded = jax.sharding.get_abstract_mesh().size > 1
    if outputs % PANEL or not is_float32 or is_sharded or not reads_panels():
        return tree
    rest = {name: leaf for name, leaf in tree.items() if name != "weight"}
    return {"panels": tree["weight"].reshape(inputs, -1, PANEL).swapaxes(0, 1), **rest}


def multiply_panels(x: jax.Array, panels: jax.Array) -> jax.Array:
    """Multiply x [R, in] with the weight of panels [P, in, PANEL]; return [R, P PANEL]."""
    if x.dtype != panels.dtype or len(x) > PANEL_ROWS:
        return x @ panels.astype(x.dtype).swapaxes(0, 1).reshape(x.shape[1], -1)
    # XLA hands this sum to its CPU library as a product that reads every panel in place, in all
    # threads. It packs the weight of a plain matrix product again at every call, multiplies a
    # single row in one thread, and does not recognize this sum with one row: so zeros follow it.
    # They are padding because jax 0.10 hands a row that is there twice to the library as a
    # broadcast, and the library multiplies that wrongly. The barrier keeps what comes before out
    # of the sum.
    rows = jnp.pad(x, ((0, 1), (0, 0))) if len(x) == 1 else x
    y = _sum_products(jax.lax.optimization_barrier(rows), panels)
    return y[:, : len(x)].swapaxes(0, 1).reshape(len(x), -1)


def _sum_products(x, panels):
    return (x[None, :, :, None] * panels[:, None]).sum(2)


@functools.cache
def reads_panels() -> bool:
    """Return whether XLA hands products with panels to its library, which must multiply correctly.

    Without the library they take ten times as long as products with matrices.
    """
    inputs = 3 * PANEL
    panels = np.sin(np.arange(2 * inputs * PANEL, dtype=np.float32)).reshape(2, inputs, PANEL)
    for rows in (1, 2):
        x = np.cos(np.arange(rows * inputs, dtype=np.float32)).reshape(rows, inputs)
        product = jax.jit(multiply_panels).lower(x, panels).compile()
        if "__ynn_fusion" not in product.as_text():
            return False
        expected = np.einsum("ri,pio->rpo", x, panels).reshape(rows, -1)
        if not np.allclose(product(x, panels), expected, atol=1e-3):
            return False
    return True


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
