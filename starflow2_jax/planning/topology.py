"""Machines by name: the devices to compile for, and the published figures of their chips.

A name is `v5p:4x4x8` (a TPU slice), `v5e:16x16*2` (two slices), `cpu` or `gpu` (the local devices),
or `cpu:8` (the first eight). TPU names need libtpu, but no TPU.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from starflow2_jax.config import nearest
from starflow2_jax.runtime import memory
from starflow2_jax.training.logging import throughput

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The figures of one device: a chip, or a part of one if jax sees parts. 0 means unknown."""

    flops: float  # dense bfloat16 FLOP/s
    memory: float  # bytes
    bandwidth: float  # bytes/s of the memory
    link: float  # bytes/s over one link to a neighbor, in one direction
    network: float  # bytes/s of this device's share of the data center network
    wraps: int = 0  # size of a slice dimension from which its ends are linked


# Per chip, from cloud.google.com/tpu/docs (pages v5e, v5p, v6e, tpu7x, "system architecture"):
# bfloat16 197, 459, 918, 2307 TFLOP/s; HBM 16, 95, 32, 192 GiB at 819, 2765, 1640, 7380 GB/s;
# inter-chip bidirectional 400, 1200, 800, 1200 GB/s over 4, 6, 4, 6 links, that is 50 or 100 GB/s a
# link and direction; data center network 12.5, 6.25, 12.5, 12.5 GB/s (100, 50, 100, 100 Gbit/s).
# A v5e or v6e torus closes at 16, a v5p or tpu7x one at 4. jax sees two devices in a tpu7x chip.
# The memory is the part that the compiler gives to programs, such as 15.75 GiB of a v5e.
TPUS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 12.5e9, wraps=16),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 100e9, 6.25e9, wraps=4),
    "v6e": Chip(918e12, 31.25 * GIB, 1640e9, 100e9, 12.5e9, wraps=16),
    "tpu7x": Chip(2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 50e9, 6.25e9, wraps=4),
}
# Data sheets of nvidia.com: bandwidth of the memory, NVLink one way, a 400 Gbit/s network card.
GPUS = {
    "H100": Chip(0, 0, 3350e9, 450e9, 50e9),
    "H200": Chip(0, 0, 4800e9, 450e9, 50e9),
    "B200": Chip(0, 0, 7700e9, 900e9, 50e9),
    "A100": Chip(0, 0, 2039e9, 300e9, 25e9),
}
_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
         "8x16x16", "16x16x16", "16x16x24")  # fmt: skip
SLICES = {"v5e": _PLANE, "v6e": _PLANE, "v5p": _CUBE, "tpu7x": _CUBE}
LOCAL = ("cpu", "gpu")


@dataclass(frozen=True)
class Topology:
    """The devices to compile for."""

    name: str  # name of the machine
    kind: str  # a key of `TPUS` or `GPUS`, or the platform
    devices: tuple  # the jax devices
    chip: Chip  # the figures of one device
    slices: int = 1  # number of TPU slices
    shape: tuple[int, ...] = ()  # shape of one slice, () for local devices

    def bandwidth(self, members: Sequence) -> float:
        """Return the bytes/s that a device can send in a ring over `members`, 0 if unknown.

        A ring uses both directions of a dimension whose ends are linked, and one link of an open
        line. Rings that cross slices use the data center network.
        """
        if len({getattr(d, "slice_index", 0) or 0 for d in members}) > 1:
            return self.chip.network
        if not self.shape:
            return self.chip.link
        coords = np.array([d.coords for d in members])
        links = 0
        for axis, size in enumerate(self.shape):
            extent = len(np.unique(coords[:, axis]))
            wrapped = extent == size and size >= self.chip.wraps and size > 2
            links += 0 if extent == 1 else 2 if wrapped else 1
        # The parts of one chip are linked six times as fast as two chips (tpu7x).
        return self.chip.link * (links or 12)


def parse(name: str) -> tuple[str, str, int]:
    """Parse a name such as `v5e:16x16*2` into kind, shape of a slice, and number of slices."""

    def num_chips(shape):
        return math.prod(int(n) for n in shape.split("x"))

    match = re.fullmatch(r"([a-z]\w*)(?::(\d+(?:x\d+)*))?(?:\*(\d+))?", name)
    kind, shape, slices = match.groups() if match else (name.partition(":")[0], None, None)
    kinds = (*SLICES, *LOCAL)
    if kind not in kinds:
        raise ValueError(
            f"topology: {name!r}: unknown machine {kind!r}{nearest(kind, kinds)} "
            f"(there are {', '.join(kinds)})"
        )
    if kind in LOCAL:
        if slices or (shape and "x" in shape) or not match:
            raise ValueError(f"topology: {name!r}: expected {kind} or {kind}:N for N devices")
        return kind, shape or "", 1
    if shape not in SLICES[kind] or not match:
        chips = max(num_chips(shape), 1) if shape else 1
        closest = sorted(SLICES[kind], key=lambda s: abs(math.log(num_chips(s) / chips)))[:3]
        names = [f"{kind}:{s}" for s in sorted(closest, key=num_chips)]
        raise ValueError(
            f"topology: {name!r} does not exist; similar ones are {', '.join(names)} (several "
            f"slices: {names[0]}*2)"
        )
    if slices is not None and int(slices) < 1:
        raise ValueError(f"topology: {name!r}: expected at least one slice")
    return kind, shape, int(slices or 1)


def find(name: str) -> Topology:
    """Return the machine of a name.

    Raises:
        ValueError: If there is no such machine, or it has more devices than this one.
        RuntimeError: If libtpu is not installed.
    """
    kind, shape, slices = parse(name)
    if kind in LOCAL:
        return _local(name, kind, int(shape) if shape else None)
    from jax.experimental import topologies

    # Only a TPU has a metadata server to query, and several processes may plan at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # libtpu reads XLA_FLAGS when it first compiles, and aborts at flags of other platforms. jax
    # has read them after its devices exist, so they can be removed.
    jax.devices()
    os.environ.pop("XLA_FLAGS", None)
    # libtpu describes whole hosts; a single chip is the first of one.
    host_shape = SLICES[kind][1] if set(shape) == {"1", "x"} else shape
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{host_shape}", num_slices=slices
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"topology: {name!r}: libtpu cannot describe it ({str(error).splitlines()[0]}); check "
            f"that it is installed: pip install 'starflow2_jax[plan]'"
        ) from error
    dims = tuple(int(n) for n in shape.split("x"))
    dims += (1,) * (3 - len(dims))
    devices = tuple(described.devices)
    if host_shape != shape:
        if slices > 1:
            raise ValueError(f"topology: {name!r}: slices of one chip are not supported")
        devices = devices[: 2 if kind == "tpu7x" else 1]
    return Topology(name, kind, devices, TPUS[kind], slices, dims)


def _local(name, platform, count):
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        raise ValueError(f"topology: {name!r}: this machine has no {platform}") from None
    if count is not None and not 0 < count <= len(devices):
        raise ValueError(f"topology: {name!r}: this machine has {len(devices)} {platform} devices")
    devices = devices[:count]
    described = devices[0].device_kind
    kind = next((k for k in GPUS if k in described), platform)
    peak = next((p for k, p in throughput.PEAKS.items() if k in described), 0.0)
    if platform == "cpu":
        chip = Chip(0, memory.host_capacity() / len(devices), 0, 0, 0)
        return Topology(name, kind, tuple(devices), chip)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    chip = dataclasses.replace(GPUS.get(kind, Chip(0, 0, 0, 0, 0)), flops=peak, memory=limit)
    return Topology(name, kind, tuple(devices), chip)
