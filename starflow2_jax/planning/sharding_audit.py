"""A comparison of a layout's intended communication and sharding with the compiled program."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jax.sharding import Mesh

from starflow2_jax import params
from starflow2_jax.mesh import LAYOUTS, weight_spec
from starflow2_jax.planning.cost import StepCost
from starflow2_jax.planning.hlo import Module

MIB = 2**20


def unexpected_collectives(
    declared: Mapping[str, Any],
    cost: StepCost,
    module: Module,
    device_mesh: Mesh,
    layout: str,
    large: int = MIB,
    trained: Collection[str] | None = None,
    rows: int = 1,
) -> list[str]:
    """Return a line for each all-gather and each replicated weight that a layout does not intend.

    A layout intends to gather single weights: those of one layer, over `fsdp`, in the part that
    `tensor` leaves to a device; over `context` the keys and values; and over `tensor` the states
    before a product (see `mesh.constrain_states`). Reported are therefore activations that cross
    devices because their sharding is lost on the way, and weights of which all layers are gathered
    at once. A large weight must be sharded if the layout has mesh axes for it. Nothing is reported
    below `large` bytes. Subtrees that are not in `trained` need not be read by the step. `rows` are
    those of one device in a microbatch.
    """
    lines = []
    layer_sizes = _layer_sizes(declared, device_mesh, layout)
    widths = {
        size
        for weight in params.flatten(declared).values()
        for size, axis in zip(weight.shape, weight.axes)
        if axis == "embed"
    }

    def is_states(num_elements):
        return any(num_elements % (rows * width) == 0 for width in widths)

    for collective in cost.collectives:
        if collective.kind != "all-gather" or collective.axes == "context":
            continue
        if collective.bytes < large:
            continue
        if collective.axes == "tensor" and all(map(is_states, collective.sizes)):
            continue
        is_weight = all(n in layer_sizes or 4 * n < large for n in collective.sizes)
        if not is_weight or collective.axes != "fsdp":
            lines.append(
                f"all-gather over {collective.axes} of {collective.bytes / MIB:,.2f} MiB, "
                f"{collective.times:g} times: not a layer's weight over fsdp ({collective.source})"
            )
    return lines + _replicated_weights(declared, module, device_mesh, layout, large, trained)


def redundant_allreduces(
    declared: Mapping[str, Any], cost: StepCost, device_mesh: Mesh, layout: str, large: int = MIB
) -> list[str]:
    """Return a line about weights that are all-reduced over `fsdp` instead of gathered.

    If `fsdp` spans the slice, the TPU compiler gathers by an all-reduce of zeros and one shard,
    which sends twice as much.
    """
    layer_sizes = _layer_sizes(declared, device_mesh, layout)
    wire = sum(
        collective.times * collective.wire
        for collective in cost.collectives
        if collective.kind == "all-reduce" and collective.axes == "fsdp"
        if collective.bytes >= large
        if any(n in layer_sizes and 2 * n >= large for n in collective.sizes)
    )
    if not wire:
        return []
    return [
        f"all-reduce over fsdp of weights, {wire / 1e9:,.3g} GB sent: twice what gathering or "
        f"scattering sends, because fsdp={device_mesh.shape['fsdp']} spans the whole slice; "
        "leave another axis of 2, such as data=2"
    ]


def _layer_sizes(declared, device_mesh, layout):
    """Return the element counts of single weights, per layer if stacked, as cut by `tensor`."""
    sizes = set()
    for name, weight in params.flatten(declared).items():
        spec = weight_spec(name, weight.shape, weight.axes, device_mesh, layout)
        local_shape = [
            size // (device_mesh.shape["tensor"] if axis == "tensor" else 1)
            for size, axis in zip(weight.shape, spec)
        ]
        is_stacked = bool(weight.axes) and weight.axes[0] == "layers"
        sizes.add(math.prod(local_shape[1:] if is_stacked else local_shape))
    return sizes


def _replicated_weights(declared, module, device_mesh, layout, large, trained):
    """Return a line for each large weight that the layout could shard but does not."""
    rules = set(LAYOUTS[layout].values())
    if all(device_mesh.shape[axis] == 1 for axis in rules):
        return []
    lines = []
    for name, weight in params.flatten(declared).items():
        spec = weight_spec(name, weight.shape, weight.axes, device_mesh, layout)
        shards = math.prod(device_mesh.shape[axis] for axis in spec if axis)
        if shards == 1 and 4 * math.prod(weight.shape) >= large and len(weight.shape) > 1:
            lines.append(f"weight {name} {list(weight.shape)} is whole on every device")
    arguments = {s.dims for i in module.entry.parameters().values() for s in i.shapes}
    required = {n: tree for n, tree in declared.items() if trained is None or n in trained}
    for name, weight in params.flatten(required).items():
        spec = weight_spec(name, weight.shape, weight.axes, device_mesh, layout)
        shard = tuple(
            size // (device_mesh.shape[axis] if axis else 1)
            for size, axis in zip(weight.shape, spec)
        )
        if 4 * math.prod(weight.shape) >= large and shard not in arguments:
            lines.append(f"weight {name}: no argument of the program is its shard {list(shard)}")
    return lines
