"""The memory that arrays need, compared with that of the devices before anything is allocated."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

#: More bytes than any machine has, and fewer than would overflow an int64.
NO_MACHINE = 2**50


def nbytes(arrays: Iterable[Any]) -> int:
    """Return the bytes of arrays or ShapeDtypeStructs of any size."""
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)


def capacity(devices: Sequence[Any] | None = None) -> int:
    """Return the memory in bytes of jax devices, by default all; `NO_MACHINE` if it is unknown.

    CPU devices of one process share the memory of its machine.
    """
    import jax  # heavy

    devices = jax.devices() if devices is None else devices
    local = [d for d in devices if d.process_index == jax.process_index()]
    if not local:
        return NO_MACHINE
    if local[0].platform == "cpu":
        total = host_capacity()
    else:
        try:
            stats = [device.memory_stats() or {} for device in local]
        except (NotImplementedError, RuntimeError):  # devices of a machine that is only described
            return NO_MACHINE
        total = sum(s.get("bytes_limit", NO_MACHINE) for s in stats)
    return total * len(devices) // len(local)


def host_capacity() -> int:
    """Return the memory in bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check(what: str, needed: Mapping[str, int], limit: int) -> None:
    """Raise ValueError if the bytes of all parts of `what` exceed the limit."""
    total = sum(needed.values())
    if total > limit:
        parts = ", ".join(f"{name} {_amount(size)}" for name, size in needed.items() if size)
        available = "any machine has" if limit == NO_MACHINE else "there is"
        raise ValueError(
            f"{what} needs at least {_amount(total)} of memory ({parts}), more than {available} "
            f"({_amount(limit)})"
        )


def _amount(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
