"""Memory of a program per device: declared, reported by the compiler, and that of the chip."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from starflow2_jax import config
from starflow2_jax.planning.hlo import Module

GIB = 2**30


@dataclass(frozen=True)
class MemoryUse:
    """Bytes per device."""

    declared: Mapping[str, int]  # bytes by purpose: params, ema, optimizer, frozen, batch
    activations: float  # our estimate of the saved activations, a part of the temporaries
    capacity: float  # memory of the device
    # Declared bytes that the program does not read. They occupy memory all the same.
    unused: int = 0
    padding: int = 0  # bytes that the tiles of the chip add to the arguments
    arguments: int | None = None  # figures of the compiler
    outputs: int | None = None
    aliased: int | None = None
    temporaries: int | None = None
    code: int | None = None
    # The sum of these and `unused`; None if the compiler refuses the program
    peak: float | None = None
    over: float = 0.0  # missing bytes; 0 if the program fits

    @property
    def fits(self) -> bool:
        """Return True if the program fits into the device's memory."""
        return self.over <= 0


def bytes_per_device(tree: Any) -> int:
    """Return the bytes of one device's shards of a tree of ShapeDtypeStructs with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def declared_bytes(program: Any) -> dict[str, int]:
    """Return the bytes per device of a training program's arguments, by purpose."""
    state = program.abstract_state
    trees = {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}
    counters = {
        name: getattr(state, name)
        for name in (field.name for field in dataclasses.fields(state))
        if name not in ("params", "ema", "opt_state")
    }
    trees |= {"frozen": program.abstract_frozen, "batch": (program.abstract_batch, counters)}
    return {name: bytes_per_device(tree) for name, tree in trees.items()}


def from_compiler(
    stats: Any, module: Module, declared: Mapping[str, int], activations: float, capacity: float
) -> MemoryUse:
    """Return the memory of a program; `stats` is the result of `Compiled.memory_analysis()`."""
    arguments = [s for i in module.entry.parameters().values() for s in i.shapes]
    bytes_read = sum(shape.bytes for shape in arguments)
    unused = sum(declared.values()) - bytes_read
    peak = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak += stats.temp_size_in_bytes + stats.generated_code_size_in_bytes + unused
    return MemoryUse(
        declared=declared,
        activations=activations,
        capacity=capacity,
        unused=unused,
        padding=stats.argument_size_in_bytes - bytes_read,
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=peak,
        over=max(peak - capacity, 0.0) if capacity else 0.0,
    )


def from_error(
    message: str, declared: Mapping[str, int], activations: float, capacity: float
) -> MemoryUse | None:
    """Parse the compiler's out-of-memory error; return None for other errors."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    # The messages of two versions of libtpu. The temporaries of the later one include the
    # arguments: for 14 GiB of arguments and two arrays of 2 GiB it reports 18.
    match = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)", message
    )
    if not match:
        return None

    def to_bytes(group):
        return float(match[group]) * 1024 ** " KMGT".index(match[group + 1] or " ")

    used, available = to_bytes(1), to_bytes(3)
    return MemoryUse(declared, activations, available, peak=used, over=used - available)


def advice(
    memory: MemoryUse, cfg: Mapping[str, Any], mesh: Mapping[str, int], rows: int
) -> list[str]:
    """Return changes that would make a program fit, the largest saving first."""
    if memory.fits:
        return []
    state = sum(memory.declared[part] for part in ("params", "ema", "optimizer", "frozen"))
    weight_shards = mesh["fsdp"] * mesh["tensor"]
    devices = math.prod(mesh.values())
    temporaries = (memory.peak or 0) - state
    suggestions = []
    if state > memory.capacity / 2:
        new_state, change = state / 2, "twice the chips"
        if weight_shards < devices:
            new_state = state * weight_shards / devices
            change = f"weights cut {devices} ways, not {weight_shards}"
        sizes = f"{state / GIB:,.1f} GiB to {new_state / GIB:,.1f} GiB"
        suggestions.append((state - new_state, f"{change}: weights and optimizer {sizes}"))
    if config.remat_policy(cfg["model"]) != "full":
        saving = memory.activations
        line = f"model.remat=full: most of {saving / GIB:,.1f} GiB of saved activations"
        suggestions.append((saving, line))
    microbatches = cfg["train"]["microbatches"]
    batch_shards = mesh["data"] * mesh["fsdp"]
    if rows // microbatches > batch_shards:
        factor = 2
        available = memory.capacity - state
        while temporaries / factor > available and rows // (microbatches * factor) > batch_shards:
            factor *= 2
        if rows % (microbatches * factor * batch_shards) == 0:
            line = (
                f"train.microbatches={microbatches * factor}: about 1/{factor} of "
                f"{temporaries / GIB:,.1f} GiB of temporaries"
            )
            suggestions.append((temporaries * (1 - 1 / factor), line))
    return [line for _, line in sorted(suggestions, reverse=True)]
