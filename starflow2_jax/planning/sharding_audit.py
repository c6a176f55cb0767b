"""What a layout means to exchange and to cut, held against what the compiled program does."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jax.sharding import Mesh

from starflow2_jax import params
from starflow2_jax.mesh import LAYOUTS, weight_spec
from starflow2_jax.planning.cost import Work
from starflow2_jax.planning.hlo import Module

MIB = 2**20


def unintended(
    declared: Mapping[str, Any],
    found: Work,
    module: Module,
    mesh: Mesh,
    layout: str,
    large: int = MIB,
    trained: Collection[str] | None = None,
) -> list[str]:
    """What a compiled step gathers or holds that its layout does not mean to, a line each.

    Meant to be gathered are single weights: one layer's, over `fsdp`, in the part that `tensor`
    leaves a device; and over `context` the keys and values. So an activation is found that crosses
    devices because its sharding is lost on the way, and a weight of which all layers are gathered
    at once. A large weight must be cut wherever the layout's mesh axes are there to cut it.

    Args:
        declared: ParamSpecs of the model; found, module: of the step's compiled text; large: bytes
            below which nothing is said; trained: names of the subtrees that are (None: all). A
            step need not read the others.
    """
    lines = []
    one_layer = _one_layer(declared, mesh, layout)
    for each in found.collectives:
        if each.kind != "all-gather" or each.axes == "context" or each.bytes < large:
            continue
        strange = [n for n in each.sizes if n not in one_layer and 4 * n >= large]
        if strange or each.axes != "fsdp":
            lines.append(
                f"all-gather over {each.axes} of {each.bytes / MIB:,.2f} MiB, {each.times:g} "
                f"times: not a layer's weight over fsdp ({each.source})"
            )
    return lines + _whole(declared, module, mesh, layout, large, trained)


def twice(
    declared: Mapping[str, Any], found: Work, mesh: Mesh, layout: str, large: int = MIB
) -> list[str]:
    """Weights that a TPU's program adds up over `fsdp` where it could gather or scatter them: a
    line for all of them.

    The compiler gathers by an all-reduce of zeros and one part, which sends twice as much, where
    parts are no whole tiles of memory (of 16 rows of bfloat16).
    """
    one_layer = _one_layer(declared, mesh, layout)
    wire = sum(
        each.times * each.wire
        for each in found.collectives
        if each.kind == "all-reduce" and each.axes == "fsdp" and each.bytes >= large
        if any(n in one_layer and 2 * n >= large for n in each.sizes)
    )
    if not wire:
        return []
    return [
        f"all-reduce over fsdp of weights, {wire / 1e9:,.3g} GB sent: twice what gathering or "
        f"scattering sends, as parts at fsdp={mesh.shape['fsdp']} are no whole tiles; try a "
        "smaller fsdp, the rest on data"
    ]


def _one_layer(declared, mesh, layout):
    """Numbers of elements of single weights, of stacked ones a layer's, as `tensor` cuts them."""
    sizes = set()
    for name, weight in params.flatten(declared).items():
        spec = weight_spec(name, weight.shape, weight.axes, mesh, layout)
        part = [
            size // (mesh.shape["tensor"] if axis == "tensor" else 1)
            for size, axis in zip(weight.shape, spec)
        ]
        stacked = bool(weight.axes) and weight.axes[0] == "layers"
        sizes.add(math.prod(part[1:] if stacked else part))
    return sizes


def _whole(declared, module, mesh, layout, large, trained):
    """Large weights that a layout with axes to cut them leaves whole on every device."""
    rules = set(LAYOUTS[layout].values())
    if all(mesh.shape[axis] == 1 for axis in rules):
        return []
    lines = []
    for name, weight in params.flatten(declared).items():
        spec = weight_spec(name, weight.shape, weight.axes, mesh, layout)
        ways = math.prod(mesh.shape[axis] for axis in spec if axis)
        if ways == 1 and 4 * math.prod(weight.shape) >= large and len(weight.shape) > 1:
            lines.append(f"weight {name} {list(weight.shape)} is whole on every device")
    arguments = {s.dims for i in module.entry.parameters().values() for s in i.shapes}
    read = {n: tree for n, tree in declared.items() if trained is None or n in trained}
    for name, weight in params.flatten(read).items():
        spec = weight_spec(name, weight.shape, weight.axes, mesh, layout)
        shard = tuple(
            size // (mesh.shape[axis] if axis else 1) for size, axis in zip(weight.shape, spec)
        )
        if 4 * math.prod(weight.shape) >= large and shard not in arguments:
            lines.append(f"weight {name}: no argument of the program is its shard {list(shard)}")
    return lines
