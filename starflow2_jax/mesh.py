"""The device mesh and the named sharding layouts.

A parameter names the logical axis of each of its dimensions (`embed`, `heads`, `mlp`, ...), and a
layout is a table from logical axes to mesh axes. Activations depend on the mesh alone (see
`ACTIVATIONS`). A mesh axis of size 1 shards nothing.

`context` works with every layout, in training and evaluation: layers shard by position and gather
keys and values. It is for rows that do not fit on a device; otherwise shard the batch, since with a
causal mask the devices with the first positions wait for those with the last.

A *slice* is a set of devices with fast links: a TPU slice, elsewhere the devices of one process.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")

# In order of preference, since a mesh axis shards at most one dimension of a parameter.
_FSDP = {"embed": "fsdp", "mlp": "fsdp"}
_TENSOR = {a: "tensor" for a in ("heads", "kv_heads", "mlp", "vocab", "text")}
LAYOUTS: dict[str, dict[str, str]] = {
    "dp": {},
    "fsdp": _FSDP,
    "tp": _TENSOR,
    "fsdp_tp": {**_FSDP, **_TENSOR},
    # Parameters are gathered over fast links only; gradients cross slices, once a step.
    "hybrid": _FSDP,
}

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    # Positions of the states between the products of layers, which `tensor` would replicate.
    "states": ("context", "tensor"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}


def parse_mesh(text: str) -> dict[str, int]:
    """Parse `"data=2,fsdp=-1"` to `{"data": 2, "fsdp": -1}`."""
    sizes: dict[str, int] = {}
    for entry in filter(None, text.replace(" ", "").split(",")):
        axis, equals, size = entry.partition("=")
        if not equals or not re.fullmatch(r"-?\d{1,9}", size):
            raise ValueError(f"mesh: {entry!r} is not axis=size (for example data=2,fsdp=4)")
        if axis in sizes:
            raise ValueError(f"mesh: axis {axis!r} is named twice in {text!r}")
        sizes[axis] = int(size)
    return sizes


def make_mesh(
    sizes: Mapping[str, int] | str | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return a mesh over `AXES` whose axes are all `AxisType.Auto`.

    Args:
        sizes: size of each axis, 1 by default. One of them may be -1, for all remaining devices.
            None puts every device on `data`.
        devices: the devices to use, by default all of them. Several TPU slices lie along `data`, or
            along `fsdp` if their number does not divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = parse_mesh(sizes) if isinstance(sizes, str) else dict(sizes or {"data": -1})
    unknown = [axis for axis in sizes if axis not in AXES]
    if unknown:
        raise ValueError(f"mesh: unknown axis {unknown[0]!r}; the axes are {', '.join(AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise ValueError(f"mesh: sizes must be positive, at most one of them -1; got {sizes}")
    if -1 in shape:
        known = math.prod(n for n in shape if n != -1)
        shape[shape.index(-1)] = max(len(devices) // known, 1)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh: {dict(zip(AXES, shape))} needs {math.prod(shape)} devices, "
            f"{len(devices)} are there"
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    return Mesh(_arrange_devices(shape, devices), AXES, axis_types=axis_types)


def _arrange_devices(shape, devices):
    """Order devices so that neighbors on a mesh axis are neighbors on the machine."""
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices == 1:
        # A dimension of the machine may be shared by two mesh axes, whatever the kind of chip.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    dimension = next((n for n, size in enumerate(shape[:2]) if size % slices == 0), None)
    if dimension is None:
        raise ValueError(
            f"mesh: {dict(zip(AXES, shape))}: neither data nor fsdp is a multiple of the "
            f"{slices} slices"
        )
    across_slices = [slices if n == dimension else 1 for n in range(len(shape))]
    inside_slices = [size // parts for size, parts in zip(shape, across_slices)]
    return mesh_utils.create_hybrid_device_mesh(
        inside_slices, across_slices, devices, allow_split_physical_axes=True
    )


def slice_of(device: Any) -> int:
    """Return the number of the slice that a device belongs to."""
    number = getattr(device, "slice_index", None)
    if number is not None:
        return number
    return 0 if device.platform == "tpu" else device.process_index


def check_layout(layout: str, device_mesh: Mesh) -> None:
    """Raise ValueError if a layout is unknown or, for `hybrid`, if `fsdp` crosses slices."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == "hybrid" and isinstance(device_mesh, Mesh):
        slices = np.vectorize(slice_of)(device_mesh.devices)
        if (slices != slices[:, :1]).any():
            raise ValueError(
                f"layout 'hybrid': mesh axis fsdp={device_mesh.shape['fsdp']} crosses slices (of "
                f"TPUs, else processes): put their number, {len(np.unique(slices))}, on data"
            )


def frozen_layout(cfg: Mapping[str, Any]) -> str:
    """Return the layout of an experiment's frozen parameters: `frozen_layout`, or else `layout`."""
    return cfg.get("frozen_layout") or cfg["layout"]


def weight_spec(
    name: str, shape: Sequence[int], axes: Sequence[str | None], device_mesh: Mesh, layout: str
) -> PartitionSpec:
    """Return the PartitionSpec of a parameter from the logical axis of each dimension."""
    check_layout(layout, device_mesh)
    mesh_axes: dict[str | None, str] = {}
    for logical, axis in LAYOUTS[layout].items():
        if logical in axes and axis not in mesh_axes.values():
            mesh_axes[logical] = axis
    spec = []
    for dimension, (size, logical) in enumerate(zip(shape, axes)):
        axis = mesh_axes.get(logical)
        if axis is not None and size % device_mesh.shape[axis]:
            raise ValueError(
                f"layout {layout!r}: weight {name} has {size} in dimension {dimension} "
                f"({logical}), which mesh axis {axis!r} of size {device_mesh.shape[axis]} does not "
                f"divide"
            )
        spec.append(axis)
    return PartitionSpec(*spec)


def batch_sharding(device_mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over `data` and `fsdp`."""
    return NamedSharding(device_mesh, PartitionSpec(ACTIVATIONS["batch"]))


def replicated(device_mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts the whole value on every device."""
    return NamedSharding(device_mesh, PartitionSpec())


def cache_sharding(shape: Sequence[int], device_mesh: Mesh) -> NamedSharding:
    """Return the sharding of the keys or values [B, K, S, D] or [K, S, D] of a cache.

    Rows are sharded over `data` and `fsdp`, heads over `tensor`, if these divide them.
    """
    return NamedSharding(device_mesh, _cache_spec(shape, device_mesh))


def _cache_spec(shape: Sequence[int], device_mesh: Mesh | AbstractMesh) -> PartitionSpec:
    heads = "tensor" if shape[-3] % device_mesh.shape["tensor"] == 0 else None
    if len(shape) == 3:
        return PartitionSpec(heads)
    rows = None if shape[0] % _batch_shards(device_mesh) else ACTIVATIONS["batch"]
    return PartitionSpec(rows, heads)


def constrain_cache(a: jax.Array) -> jax.Array:
    """Pin the sharding of keys or values, as in `cache_sharding`, on the mesh of `jax.set_mesh`."""
    abstract_mesh = jax.sharding.get_abstract_mesh()
    if abstract_mesh.empty or abstract_mesh.size == 1:
        return a
    return jax.lax.with_sharding_constraint(a, _cache_spec(a.shape, abstract_mesh))


def params_mesh(params: Any) -> Mesh | None:
    """Return the mesh that parameters are spread over, None on one device or while traced."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    return sharding.mesh if sharding.mesh.size > 1 else None


def decoding_mesh(params: Any, rows: int) -> AbstractContextManager:
    """Return `jax.set_mesh` of the mesh that parameters are on, for a decoding of so many rows.

    It changes nothing if the mesh does not divide the rows: every device then has all of them.
    """
    device_mesh = params_mesh(params)
    if device_mesh is None:
        return nullcontext()
    is_whole = device_mesh.shape["context"] > 1 or rows % _batch_shards(device_mesh)
    return nullcontext() if is_whole else jax.set_mesh(device_mesh)


def to_host(a: jax.Array) -> np.ndarray:
    """Gather an array to the host. If several processes share it, all of them must call this."""
    if a.is_fully_addressable or a.is_fully_replicated:
        return np.asarray(a)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(a, tiled=True)


def _batch_shards(device_mesh: Mesh | AbstractMesh) -> int:
    return int(np.prod([device_mesh.shape[axis] for axis in ACTIVATIONS["batch"]]))


def check_batch(rows: int, device_mesh: Mesh, name: str = "train.batch_size") -> None:
    """Raise ValueError if the mesh's batch axes do not divide the number of rows."""
    shards = _batch_shards(device_mesh)
    if rows % shards:
        raise ValueError(
            f"{name}={rows} is not divisible by data x fsdp = {device_mesh.shape['data']} x "
            f"{device_mesh.shape['fsdp']} = {shards}"
        )


def platform() -> str:
    """Return `cpu`, `gpu` or `tpu`: the platform of `jax.set_mesh`, else of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def activation_shards() -> dict[str, int]:
    """Return the number of shards of each of `ACTIVATIONS` on the mesh of `jax.set_mesh`."""
    shape = jax.sharding.get_abstract_mesh().shape
    return {
        name: int(np.prod([shape.get(axis, 1) for axis in axes]))
        for name, axes in ACTIVATIONS.items()
    }


def host_rows(rows: int, device_mesh: Mesh) -> np.ndarray:
    """Return the indices int [n] of this process's rows of a global batch, in order.

    Processes along `data` and `fsdp` have different rows; those that differ along `tensor` or
    `context` alone have the same ones. On a TPU slice the rows need not be contiguous.
    """
    indices = batch_sharding(device_mesh).addressable_devices_indices_map((rows,))
    slices = [index[0] for index in indices.values() if index]
    blocks = sorted({(block.start or 0, block.stop or rows) for block in slices})
    return np.concatenate([np.arange(*block) for block in blocks])


def place_rows(local: np.ndarray, device_mesh: Mesh) -> jax.Array:
    """Return the global array of a batch, given this process's rows of it (see `host_rows`)."""
    shards = _batch_shards(device_mesh)
    local_shards = host_rows(shards, device_mesh).tolist()
    shard_rows = len(local) // len(local_shards)

    def read(index: Any) -> np.ndarray:
        first = local_shards.index((index[0].start or 0) // shard_rows) * shard_rows
        return local[first : first + shard_rows]

    shape = (shard_rows * shards, *local.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(device_mesh), read)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin the sharding of x; `names` are in `ACTIVATIONS`, or None, one per leading dimension."""
    abstract_mesh = jax.sharding.get_abstract_mesh()
    if abstract_mesh.empty or abstract_mesh.size == 1:
        return x
    spec = PartitionSpec(*(None if name is None else ACTIVATIONS[name] for name in names))
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_states(x: jax.Array) -> jax.Array:
    """Pin the sharding of states [B, T, C] between the products of a layer.

    Positions are sharded over `context` and `tensor` if these divide T, otherwise over `context`.
    """
    shards = activation_shards()["states"]
    return constrain(x, "batch", "length" if x.shape[1] % shards else "states")


def gather_weight(w: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Return a weight as a product reads it: whole, or in one part per device of `tensor`.

    Without this, the partitioner may gather a weight in many pieces between small products. The
    gradient is reduced and sharded over `fsdp` at once.

    Args:
        w: the weight in the dtype of the product, so that no more bytes than that are sent.
        axes: the logical axis of each dimension.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    if all(size == 1 for size in shape.values()):
        return w
    tensor = _matching_axes(_TENSOR, w.shape, axes, shape)
    remaining = [None if axis else logical for axis, logical in zip(tensor, axes)]
    fsdp = _matching_axes(_FSDP, w.shape, remaining, shape)
    gradient = (t or f or PartitionSpec.UNCONSTRAINED for t, f in zip(tensor, fsdp))
    return _gather(w, PartitionSpec(*tensor), PartitionSpec(*gradient))


def _matching_axes(rules, sizes, axes, mesh_shape):
    """Return the mesh axis of each dimension by the first rule for one of them, if it divides."""
    first = next((logical for logical in rules if logical in axes), None)
    shards = [mesh_shape.get(rules.get(logical), 1) for logical in axes]
    return [
        rules[first] if logical == first and parts > 1 and size % parts == 0 else None
        for size, logical, parts in zip(sizes, axes, shards)
    ]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w, spec, gradient_spec):
    return jax.lax.with_sharding_constraint(w, spec)


def _gather_forward(w, spec, gradient_spec):
    return jax.lax.with_sharding_constraint(w, spec), None


def _gather_backward(spec, gradient_spec, _, gradient):
    if any(spec):
        # The compiler turns a sum that is then cut into a reduce-scatter. With `tensor` it would
        # split a product whose result is to be cut into many small ones.
        gradient = jax.lax.with_sharding_constraint(gradient, spec)
    return (jax.lax.with_sharding_constraint(gradient, gradient_spec),)


_gather.defvjp(_gather_forward, _gather_backward)
