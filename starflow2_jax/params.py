"""Declarations of parameters: how each array is initialized and where it lives on the mesh.

A model declares a nested dict of `ParamSpec` leaves. Arrays, abstract shapes, shardings and counts
are all derived from that one tree.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from starflow2_jax import mesh

Tree = Mapping[str, Any]
Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
#: Initializers of arrays of zeros and of ones.
zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones


def normal(std: float) -> Init:
    """Return an initializer of independent Gaussians with standard deviation `std`."""

    def init(key, shape, dtype):
        return std * jax.random.normal(key, shape, dtype)

    return init


def fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw uniformly from ±1/sqrt(inputs) for [..., inputs, outputs], as PyTorch's Linear does."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclass(frozen=True)
class ParamSpec:
    """A declared parameter: its shape, the logical axis of each dimension, and its initializer."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init = fan_in

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"ParamSpec: {len(self.axes)} axes {self.axes} for shape {self.shape}")


def flatten(tree: Tree) -> dict[str, Any]:
    """Flatten a nested dict to `{"blocks/0/start": leaf}`, in sorted order."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def _map(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    return unflatten({name: function(name, leaf) for name, leaf in flatten(tree).items()})


def init(key: jax.Array, tree: Tree, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Draw every declared parameter; under `jax.jit` with `out_shardings`, directly sharded.

    A parameter's key is folded from its name, so that adding a parameter changes no other.
    """

    def draw(name: str, spec: ParamSpec) -> jax.Array:
        return spec.init(jax.random.fold_in(key, zlib.crc32(name.encode())), spec.shape, dtype)

    return _map(draw, tree)


def shardings(tree: Tree, device_mesh: Mesh, layout: str) -> dict[str, Any]:
    """Return the NamedSharding of every declared parameter (see `mesh.weight_spec`)."""

    def sharding(name: str, spec: ParamSpec) -> NamedSharding:
        partition = mesh.weight_spec(name, spec.shape, spec.axes, device_mesh, layout)
        return NamedSharding(device_mesh, partition)

    return _map(sharding, tree)


def abstract(
    tree: Tree, device_mesh: Mesh | None = None, layout: str = "dp", dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Return a ShapeDtypeStruct of every declared parameter, with a sharding if there is a mesh."""
    by_name = {} if device_mesh is None else flatten(shardings(tree, device_mesh, layout))

    def struct(name: str, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=by_name.get(name))

    return _map(struct, tree)


def draw(
    seed: int,
    tree: Tree,
    device_mesh: Mesh | None = None,
    layout: str = "dp",
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """Draw every declared parameter from a seed, directly sharded if there is a mesh."""
    out_shardings = None if device_mesh is None else shardings(tree, device_mesh, layout)
    jitted = jax.jit(partial(init, tree=tree, dtype=dtype), out_shardings=out_shardings)
    return jitted(jax.random.key(seed))


def gather_layer(layer: Any, specs: Any, dtype: Any) -> Any:
    """Return one layer's parameters as `mesh.gather_weight` does; matrices in this dtype.

    Args:
        layer: arrays of one layer, without the leading layers axis.
        specs: the declarations of stacked layers.
    """

    def gather(w, spec):
        return mesh.gather_weight(w.astype(dtype) if w.ndim > 1 else w, spec.axes[1:])

    device_mesh = jax.sharding.get_abstract_mesh()
    is_single = device_mesh.empty or device_mesh.size == 1
    return layer if is_single else jax.tree.map(gather, layer, specs)


def count(tree: Tree) -> int:
    """Count the parameters in a tree of ParamSpecs, arrays or ShapeDtypeStructs."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())


def split(tree: Tree, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a tree into the top-level subtrees in `names`, which must exist, and the rest."""
    missing = [name for name in names if name not in tree]
    if missing:
        raise ValueError(f"params: no subtree {missing[0]!r}; there are {', '.join(sorted(tree))}")
    selected = {name: subtree for name, subtree in tree.items() if name in names}
    return selected, {name: subtree for name, subtree in tree.items() if name not in names}


def table(tree: Tree, note: Callable[[str], str] = lambda name: "") -> list[str]:
    """Return lines with the name, shape, count and note of every parameter, and the total."""
    rows = [
        (name, "x".join(map(str, leaf.shape)) or "scalar", count({name: leaf}), note(name))
        for name, leaf in flatten(tree).items()
    ]
    width = max(len(row[0]) for row in rows)
    lines = [f"{n:{width}}  {s:>18}  {c:>14,}  {e}".rstrip() for n, s, c, e in rows]
    return [*lines, f"{'total':{width}}  {'':>18}  {count(tree):>14,}"]
