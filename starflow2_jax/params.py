"""Declarations of parameters: how each array is initialized and where it lives on the mesh.

A model declares a nested dict of `ParamSpec` leaves. Arrays, abstract shapes, shardings and counts
are all derived from that one tree.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from starflow2_jax.mesh import weight_spec

Tree = Mapping[str, Any]
Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """All zeros."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """All ones."""
    del key
    return jnp.ones(shape, dtype)


def normal(std: float) -> Init:
    """Independent Gaussians of standard deviation `std`."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform in ±1/sqrt(inputs) for [..., inputs, outputs], as PyTorch's linear layers."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclass(frozen=True)
class ParamSpec:
    """One declared array: its shape, the logical axis of each dimension, and its initialiser."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init = fan_in

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"ParamSpec: {len(self.axes)} axes {self.axes} for shape {self.shape}")


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dict to `{"blocks/0/start": leaf}`, in sorted order."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def _map(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    return unflatten({name: function(name, leaf) for name, leaf in flatten(tree).items()})


def init(key: jax.Array, tree: Tree, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Draw every declared weight. Under `jax.jit` with `out_shardings` they are born sharded.

    A weight's key is folded from its name, so that adding one weight changes no other.
    """

    def draw(name: str, weight: ParamSpec) -> jax.Array:
        return weight.init(jax.random.fold_in(key, zlib.crc32(name.encode())), weight.shape, dtype)

    return _map(draw, tree)


def shardings(tree: Tree, mesh: Mesh, layout: str) -> dict[str, Any]:
    """NamedShardings of every declared weight.

    Raises:
        ValueError: the layout does not fit a weight (see `mesh.weight_spec`).
    """
    return _map(
        lambda name, w: NamedSharding(mesh, weight_spec(name, w.shape, w.axes, mesh, layout)),
        tree,
    )


def abstract(
    tree: Tree, mesh: Mesh | None = None, layout: str = "dp", dtype: Any = jnp.float32
) -> dict[str, Any]:
    """ShapeDtypeStructs of every declared weight, with shardings where a mesh is given."""
    if mesh is None:
        return _map(lambda _, w: jax.ShapeDtypeStruct(w.shape, dtype), tree)
    where = flatten(shardings(tree, mesh, layout))
    return _map(lambda name, w: jax.ShapeDtypeStruct(w.shape, dtype, sharding=where[name]), tree)


def count(tree: Tree) -> int:
    """Number of parameters in a tree of ParamSpecs, arrays or ShapeDtypeStructs."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())


def split(tree: Tree, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Top-level subtrees in `names`, and the others.

    Raises:
        ValueError: a name that the tree does not have.
    """
    missing = [name for name in names if name not in tree]
    if missing:
        raise ValueError(f"params: no subtree {missing[0]!r}; there are {', '.join(sorted(tree))}")
    chosen = {k: v for k, v in tree.items() if k in names}
    return chosen, {k: v for k, v in tree.items() if k not in names}


def table(tree: Tree, extra: Callable[[str], str] = lambda name: "") -> list[str]:
    """Lines for people: name, shape, parameters, and what `extra` says of each; the sum last."""
    rows = [
        (name, "x".join(map(str, leaf.shape)) or "scalar", count({name: leaf}), extra(name))
        for name, leaf in flatten(tree).items()
    ]
    wide = max(len(row[0]) for row in rows)
    lines = [f"{n:{wide}}  {s:>18}  {c:>14,}  {e}".rstrip() for n, s, c, e in rows]
    return [*lines, f"{'total':{wide}}  {'':>18}  {count(tree):>14,}"]
