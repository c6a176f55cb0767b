"""Bytes that a device holds: as declared, as the compiler says, and whether they fit."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from starflow2_jax.planning import options
from starflow2_jax.planning.hlo import Module

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        declared: by what they are for: params, ema, optimizer, frozen, batch.
        unused: those in it that the program does not read; they lie there all the same.
        padding: what tiles of the chip add to the arguments.
        arguments, outputs, aliased, temporaries, code: the compiler's.
        peak: all of these at once, and what is unused; None where the program was too large.
        activations: our estimate, part of the temporaries.
        capacity: of the device; over: what is missing, 0 where it fits.
    """

    declared: Mapping[str, int]
    activations: float
    capacity: float
    unused: int = 0
    padding: int = 0
    arguments: int | None = None
    outputs: int | None = None
    aliased: int | None = None
    temporaries: int | None = None
    code: int | None = None
    peak: float | None = None
    over: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return self.over <= 0


def per_device(tree: Any) -> int:
    """Bytes of one device's shards of a tree of ShapeDtypeStructs with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def declared(program: Any) -> dict[str, int]:
    """Bytes on each device of a training program's arguments, by what they are for."""
    state = program.abstract_state
    parts = {"params": state.params, "ema": state.ema, "optimizer": state.opt_state}
    rest = {
        name: getattr(state, name)
        for name in (field.name for field in dataclasses.fields(state))
        if name not in ("params", "ema", "opt_state")
    }
    parts |= {"frozen": program.abstract_frozen, "batch": (program.abstract_batch, rest)}
    return {name: per_device(tree) for name, tree in parts.items()}


def compiled(
    found: Any, module: Module, given: Mapping[str, int], activations: float, capacity: float
) -> Memory:
    """What the compiler says of a program that it could compile.

    Args:
        found: `Compiled.memory_analysis()`; module: its text; given: bytes as declared.
    """
    arguments = [s for i in module.entry.parameters().values() for s in i.shapes]
    read = sum(shape.bytes for shape in arguments)
    unused = sum(given.values()) - read
    peak = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    peak += found.temp_size_in_bytes + found.generated_code_size_in_bytes + unused
    return Memory(
        declared=given,
        activations=activations,
        capacity=capacity,
        unused=unused,
        padding=found.argument_size_in_bytes - read,
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        peak=peak,
        over=max(peak - capacity, 0.0) if capacity else 0.0,
    )


def too_large(
    message: str, given: Mapping[str, int], activations: float, capacity: float
) -> Memory | None:
    """What the compiler's refusal of a program says; None where that is not about memory."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    # In two versions of libtpu. What the later one calls temporaries counts the arguments as well:
    # of 14 GiB of these and two arrays of 2 GiB it says 18.
    found = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)", message
    )
    if not found:
        return None
    number = lambda n: float(found[n]) * 1024 ** " KMGT".index(found[n + 1] or " ")
    used, available = number(1), number(3)
    return Memory(given, activations, available, peak=used, over=used - available)


def advice(memory: Memory, cfg: Mapping[str, Any], mesh: Mapping[str, int], rows: int) -> list[str]:
    """What would make a program that does not fit smaller, the largest saving first."""
    if memory.fits:
        return []
    state = sum(memory.declared[name] for name in ("params", "ema", "optimizer", "frozen"))
    ways = mesh["fsdp"] * mesh["tensor"]
    devices = math.prod(mesh.values())
    held = (memory.peak or 0) - state
    gib = lambda n: f"{n / GIB:,.1f} GiB"
    found = []
    if state > memory.capacity / 2:
        less, how = state / 2, "twice the chips"
        if ways < devices:
            less, how = state * ways / devices, f"weights cut {devices} ways, not {ways}"
        found.append((state - less, f"{how}: weights and optimizer {gib(state)} to {gib(less)}"))
    if options.remat(cfg["model"]) != "full":
        saved = memory.activations
        found.append((saved, f"model.remat=full: most of {gib(saved)} of kept activations"))
    parts = cfg["train"]["microbatches"]
    share = mesh["data"] * mesh["fsdp"]
    if rows // parts > share:
        needed = 2
        while held / needed > memory.capacity - state and rows // (parts * needed) > share:
            needed *= 2
        if rows % (parts * needed * share) == 0:
            found.append((held * (1 - 1 / needed), f"train.microbatches={parts * needed}: about "
                          f"1/{needed} of {gib(held)} of temporaries"))  # fmt: skip
    return [line for _, line in sorted(found, reverse=True)]
