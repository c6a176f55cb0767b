"""The device mesh and the named layouts.

Weights name the logical axis of every dimension (`embed`, `heads`, `mlp`, ...). A layout is a table
from logical axis to mesh axis, so comparing two layouts is comparing two small dictionaries.
Activations follow the mesh alone: a batch is cut over `data` and `fsdp`, positions over `context`,
heads and hidden channels over `tensor`; a mesh axis of size 1 cuts nothing.

`context` works under every layout, for the full-sequence passes of training and evaluation: what is
kept of a layer is cut by position, queries stay where they are, keys and values are gathered for
each layer. It is for rows of which a device cannot hold one; where rows abound, cut those: a causal
mask leaves the first positions' devices waiting for the last ones'. Decoding does not use it.

A *slice* is a set of devices with fast links: a TPU slice, elsewhere the devices of one process.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")

# In order of preference: a mesh axis cuts one dimension of a weight.
_FSDP = {"embed": "fsdp", "mlp": "fsdp"}
_TENSOR = {a: "tensor" for a in ("heads", "kv_heads", "mlp", "vocab", "text")}
LAYOUTS: dict[str, dict[str, str]] = {
    "dp": {},
    "fsdp": _FSDP,
    "tp": _TENSOR,
    "fsdp_tp": {**_FSDP, **_TENSOR},
    # Weights are gathered over fast links only: what crosses slices is the gradient, once a step.
    "hybrid": _FSDP,
}

ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=2,fsdp=-1"` to `{"data": 2, "fsdp": -1}`.

    Raises:
        ValueError: an entry that is not `axis=size`, an unknown axis, or one named twice.
    """
    sizes: dict[str, int] = {}
    for entry in filter(None, text.replace(" ", "").split(",")):
        axis, equals, size = entry.partition("=")
        if not equals or not re.fullmatch(r"-?\d+", size):
            raise ValueError(f"mesh: {entry!r} is not axis=size (for example data=2,fsdp=4)")
        if axis in sizes:
            raise ValueError(f"mesh: axis {axis!r} is named twice in {text!r}")
        sizes[axis] = int(size)
    return sizes


def make_mesh(
    sizes: Mapping[str, int] | str | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over `AXES` whose axes are all `AxisType.Auto`.

    Args:
        sizes: size of each named axis, 1 where left out; one of them may be -1 and takes what is
            left. None puts every device on `data`.
        devices: the devices to use, all of them by default. Several TPU slices are laid along
            `data`, or along `fsdp` where their number does not divide `data`.

    Raises:
        ValueError: an unknown axis, two -1, a product that is not the number of devices, or slices
            whose number divides neither `data` nor `fsdp`.
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
        known = int(np.prod([n for n in shape if n != -1]))
        shape[shape.index(-1)] = max(len(devices) // known, 1)
    if int(np.prod(shape)) != len(devices):
        raise ValueError(
            f"mesh: {dict(zip(AXES, shape))} needs {int(np.prod(shape))} devices, "
            f"{len(devices)} are there"
        )
    return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape, devices):
    """Devices so that neighbours on a mesh axis are neighbours on the machine."""
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices == 1:
        # A dimension of the machine may be shared by two mesh axes, whatever the kind of chip.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    over = next((n for n, size in enumerate(shape[:2]) if size % slices == 0), None)
    if over is None:
        raise ValueError(
            f"mesh: {dict(zip(AXES, shape))}: neither data nor fsdp is a multiple of the "
            f"{slices} slices"
        )
    across = [slices if n == over else 1 for n in range(len(shape))]
    inside = [size // ways for size, ways in zip(shape, across)]
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )


def slice_of(device: jax.Device) -> int:
    """Which slice a device is in."""
    number = getattr(device, "slice_index", None)
    if number is not None:
        return number
    return 0 if device.platform == "tpu" else device.process_index


def check_layout(layout: str, mesh: Mesh) -> None:
    """Raises ValueError for an unknown layout, or `hybrid` where `fsdp` leaves a slice."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == "hybrid" and isinstance(mesh, Mesh):
        where = np.vectorize(slice_of)(mesh.devices)
        if (where != where[:, :1]).any():
            raise ValueError(
                f"layout 'hybrid': mesh axis fsdp={mesh.shape['fsdp']} crosses slices (of TPUs, "
                f"else processes): put their number, {len(np.unique(where))}, on data"
            )


def weight_spec(
    name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, layout: str
) -> PartitionSpec:
    """Where one weight lives under a layout.

    Raises:
        ValueError: an unknown layout, or a mesh axis that does not divide the dimension it is to
            cut; names the weight, the dimension and the axis.
    """
    check_layout(layout, mesh)
    cut: dict[str, str] = {}
    for logical, axis in LAYOUTS[layout].items():
        if logical in axes and axis not in cut.values():
            cut[logical] = axis
    spec = []
    for dimension, (size, logical) in enumerate(zip(shape, axes)):
        axis = cut.get(logical)
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"layout {layout!r}: weight {name} has {size} in dimension {dimension} "
                f"({logical}), which mesh axis {axis!r} of size {mesh.shape[axis]} does not divide"
            )
        spec.append(axis)
    return PartitionSpec(*spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`; the other dimensions whole."""
    return NamedSharding(mesh, PartitionSpec(ACTIVATIONS["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def to_host(a: jax.Array) -> np.ndarray:
    """The whole of an array. Where other processes hold parts of it, all of them have to call."""
    if a.is_fully_addressable or a.is_fully_replicated:
        return np.asarray(a)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(a, tiled=True)


def check_batch(rows: int, mesh: Mesh, what: str = "train.batch_size") -> None:
    """Raises ValueError where the mesh's batch axes do not divide the number of rows."""
    ways = int(np.prod([mesh.shape[axis] for axis in ACTIVATIONS["batch"]]))
    if rows % ways:
        raise ValueError(
            f"{what}={rows} is not divisible by data x fsdp = {mesh.shape['data']} x "
            f"{mesh.shape['fsdp']} = {ways}"
        )


def platform() -> str:
    """`cpu`, `gpu` or `tpu`, for which the program being traced is meant: by `jax.set_mesh`, which
    may hold devices of another machine, else the default device's.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def activation_ways() -> dict[str, int]:
    """Into how many parts the mesh set by `jax.set_mesh` cuts each of `ACTIVATIONS`."""
    shape = jax.sharding.get_abstract_mesh().shape
    return {
        name: int(np.prod([shape.get(axis, 1) for axis in axes]))
        for name, axes in ACTIVATIONS.items()
    }


def host_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a global batch this process holds, in order: int [n].

    Processes along `data` and `fsdp` share the rows out; those that differ along `tensor` or
    `context` alone hold the same ones. On a TPU slice they need not be one block.
    """
    where = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    blocks = sorted({(index[0].start or 0, index[0].stop or rows) for index in where.values()})
    return np.concatenate([np.arange(*block) for block in blocks])


def place_rows(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """The global array of a batch, from this process's rows of it (`host_rows`)."""
    ways = int(np.prod([mesh.shape[axis] for axis in ACTIVATIONS["batch"]]))
    mine = host_rows(ways, mesh).tolist()
    size = len(local) // len(mine)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        first = mine.index((index[0].start or 0) // size) * size
        return local[first : first + size]

    shape = (size * ways, *local.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), read)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin an activation to the mesh set by `jax.set_mesh`; without one, x as it is.

    Args:
        x: any array; names: one of `ACTIVATIONS` or None for each of its leading dimensions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = PartitionSpec(*(None if name is None else ACTIVATIONS[name] for name in names))
    return jax.lax.with_sharding_constraint(x, spec)
