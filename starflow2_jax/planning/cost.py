"""The cost of a compiled program for one device: FLOPs, bytes of main memory, and collectives.

It is counted from the program's text, with loop bodies times their trip counts, because the
compiler's own analysis counts a loop's body once. A multiply-add is two FLOPs.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from starflow2_jax.planning import hlo
from starflow2_jax.planning.hlo import Computation, Instruction, Module, Shape

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
SLICES = "slices"
# Operations that neither read nor write memory.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
         "call", "after-all", "partition-id", "replica-id", "add-dependency", "opt-barrier",
         "iota")  # fmt: skip
# Matrix products per block of attention scores in the forward and backward kernels.
_SPLASH = {"fwd": 2, "dkv": 4, "dq": 3}


@dataclass(frozen=True)
class Collective:
    """A collective operation between devices."""

    kind: str  # one of `KINDS`
    # Mesh axes that it crosses, joined by `+`; `SLICES` for an exchange between the hosts of
    # several TPU slices
    axes: str
    group: tuple[int, ...]  # positions in the flattened mesh of one group of devices, or the slices
    bytes: int  # bytes of the result of an all-gather, else of the operand, on one device
    sizes: tuple[int, ...]  # elements of each of its arrays
    wire: float  # bytes that a device sends in a ring
    times: float  # number of times per step
    source: str  # the operation of the jax program


@dataclass(frozen=True)
class StepCost:
    """The cost of a step for one device."""

    flops: float  # FLOPs of matrix products
    kernel_flops: float  # the part of them in attention kernels, from their shapes
    bytes: float  # bytes read from and written to main memory
    # (flops, bytes, times) of each operation, for a roofline estimate
    operations: tuple[tuple[float, float, float], ...]
    collectives: tuple[Collective, ...]  # all collective operations
    unknown_loops: tuple[str, ...]  # names of loops with an unknown trip count


def analyze(
    module: Module, mesh_shape: Mapping[str, int], slices: int = 1, default_trips: int | None = None
) -> StepCost:
    """Return the cost of a program; loops of unknown length count as in `hlo.walk`."""
    unknown_loops: list[str] = []
    operations, collectives = [], []
    kernel_flops = 0.0
    counted: set[tuple[str, str]] = set()
    for computation, instruction, times in hlo.walk(module, unknown_loops, default_trips):
        collectives += [
            _collective(scope, collective, times, mesh_shape, caller, slices)
            for scope, collective, caller in _find_collectives(module, computation, instruction)
            if _is_new(counted, computation, collective)
        ]
        flops = instruction_flops(module, computation, instruction)
        num_bytes = 0
        if not _kind(instruction):
            num_bytes = instruction_bytes(module, computation, instruction)
        if instruction.opcode == "custom-call":
            kernel_flops += flops * times
        if flops or num_bytes:
            operations.append((float(flops), float(num_bytes), times))
    return StepCost(
        flops=sum(f * times for f, _, times in operations),
        kernel_flops=kernel_flops,
        bytes=sum(b * times for _, b, times in operations),
        operations=tuple(operations),
        collectives=tuple(collectives),
        unknown_loops=tuple(unknown_loops),
    )


# ---------------------------------------------------------------------------------------- products


def instruction_flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Return the FLOPs of one instruction, including the instructions inside a fusion."""
    if instruction.opcode == "fusion":
        return sum(
            instruction_flops(module, module.computations[name], inner)
            for name in instruction.called("calls")
            for inner in module.computations[name].instructions
        )
    if instruction.opcode == "reduce" and _is_product(instruction):
        (operand, *_) = (computation.by_name[n] for n in instruction.operands)
        return 2.0 * math.prod(operand.shapes[0].dims)
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0.0
    shapes = [
        computation.by_name[name].shapes[0]
        for name in instruction.operands
        if name in computation.by_name and computation.by_name[name].shapes
    ]
    operands = [shape.dims for shape in shapes]
    if instruction.opcode == "custom-call":
        return _kernel_flops(instruction, shapes)
    out = math.prod(instruction.shapes[0].dims)
    if instruction.opcode == "dot":
        return 2 * out * _contracted(operands[0], instruction.attribute("lhs_contracting_dims"))
    return _convolution_flops(instruction, operands)


def _is_product(instruction):
    """Return whether a sum is that of a matrix-vector product, as TPU programs express it."""
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return source is not None and source[1].endswith("dot_general")


def _contracted(lhs, dimensions):
    return math.prod(lhs[int(d)] for d in re.findall(r"\d+", dimensions))


def _convolution_flops(instruction, operands):
    # TPU programs express products with batch dimensions as convolutions that mostly meet padding,
    # so only positions of the kernel inside the input count.
    lhs_labels, rest = instruction.attribute("dim_labels").split("_", 1)
    rhs_labels, out_labels = rest.split("->")
    lhs, rhs = operands[:2]
    out = instruction.shapes[0].dims
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute("window")))
    spatial = sorted(char for char in lhs_labels if char.isdigit())

    def window_values(name, default):
        return window[name].split("x") if name in window else [default] * len(spatial)

    padding = [int(p.split("_")[0]) for p in window_values("pad", "0_0")]
    strides = list(map(int, window_values("stride", 1)))
    lhs_dilation = list(map(int, window_values("lhs_dilate", 1)))
    rhs_dilation = list(map(int, window_values("rhs_dilate", 1)))
    num_products = 1
    for n, char in enumerate(spatial):
        size_in, size_kernel = lhs[lhs_labels.index(char)], rhs[rhs_labels.index(char)]
        x = np.arange(out[out_labels.index(char)])[:, None] * strides[n] - padding[n]
        x = x + np.arange(size_kernel)[None, :] * rhs_dilation[n]
        inside = (x >= 0) & (x <= (size_in - 1) * lhs_dilation[n]) & (x % lhs_dilation[n] == 0)
        num_products *= int(inside.sum())
    rows, features = out[out_labels.index("b")], out[out_labels.index("f")]
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    return 2 * rows * features * num_products * rhs[rhs_labels.index("i")] // batch_groups


def _kernel_flops(instruction, shapes):
    target = instruction.attribute("custom_call_target").strip('"')
    operands = [shape.dims for shape in shapes]
    if "gemm" in target or "matmul" in target:
        match = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        out = math.prod(instruction.shapes[0].dims)
        return 2 * out * _contracted(operands[0], match[1] if match else str(len(operands[0]) - 1))
    if "fmha" in target:
        batch, length, heads, channels = operands[0]
        products = 5 if "Backward" in target else 2
        return products * batch * heads * length * length * channels
    splash = re.match(r"splash_m[hq]a_(fwd|dkv|dq)", instruction.name)
    if target == "tpu_custom_call" and splash:
        queries, keys = [s.dims for s in shapes if len(s.dims) >= 3 and s.dtype[0] in "bf"][:2]
        rows, length, channels = math.prod(queries[:-2]), queries[-2], queries[-1]
        # A causal mask leaves half of the blocks of scores, and those on the diagonal.
        tables = [s.dims for s in shapes if s.dtype in ("s8", "s32") and len(s.dims) == 3]
        down, across = tables[0][-2:] if tables else (1, 1)
        share = 1 - (across - 1) / (2 * across) if down <= across else 1.0
        return _SPLASH[splash[1]] * 2 * rows * length * keys[-2] * channels * share
    return 0.0


# ------------------------------------------------------------------------------------------- bytes


def instruction_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Return the bytes of main memory that one instruction reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    if opcode.endswith("-start"):  # (destination, source, ...)
        return sum(_main_memory_bytes(shape) for shape in instruction.shapes[:2])
    operands = [computation.by_name[n] for n in instruction.operands if n in computation.by_name]
    if opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * sum(map(_main_memory_bytes, instruction.shapes))
    if opcode == "dynamic-update-slice":
        return 2 * sum(map(_main_memory_bytes, operands[1].shapes))
    if opcode == "fusion":
        (name,) = instruction.called("calls")
        called = module.computations[name]
        inner = called.parameters()
        bytes_read = sum(
            _bytes_read(module, called, inner[n], operand.shapes) if n in inner else 0.0
            for n, operand in enumerate(operands)
        )
        return bytes_read + _bytes_written(module, called, instruction.shapes)
    return sum(_main_memory_bytes(s) for i in (instruction, *operands) for s in i.shapes)


def _main_memory_bytes(shape: Shape) -> int:
    return 0 if shape.space else shape.bytes


def _users(called, name):
    return [i for i in called.instructions if name in i.operands]


def _bytes_read(module, called, parameter, shapes):
    # Only slices are read of an operand if all its uses are slices.
    total = sum(map(_main_memory_bytes, shapes))
    if not total:
        return 0.0
    stack, slices = [parameter], 0.0
    while stack:
        current = stack.pop()
        for user in _users(called, current.name):
            if user.opcode == "bitcast":
                stack.append(user)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                slices += sum(s.bytes for s in user.shapes)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == current.name:
                continue  # written in place
            elif user.opcode == "fusion":
                (name,) = user.called("calls")
                inner = module.computations[name]
                slices += sum(
                    _bytes_read(module, inner, inner_parameter, shapes)
                    for n, inner_parameter in inner.parameters().items()
                    if user.operands[n] == current.name
                )
            else:
                return total
    return min(slices, total)


def _bytes_written(module, called, shapes):
    # Only a slice is written of an array that is updated in place.
    root = called.root
    parts = [called.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(shapes):
        return sum(map(_main_memory_bytes, shapes))
    total = 0.0
    for part, shape in zip(parts, shapes):
        while part.opcode == "bitcast" and part.operands[0] in called.by_name:
            part = called.by_name[part.operands[0]]
        if part.opcode == "fusion" and len(part.shapes) == 1:
            (name,) = part.called("calls")
            total += _bytes_written(module, module.computations[name], [shape])
        elif part.opcode == "dynamic-update-slice" and not shape.space:
            total += sum(s.bytes for s in called.by_name[part.operands[1]].shapes)
        else:
            total += _main_memory_bytes(shape)
    return total


# ------------------------------------------------------------------------------------- collectives


def _kind(instruction: Instruction) -> str:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "send":
        match = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', instruction.attributes)
        opcode = match[1].lower().replace("_", "-") if match else opcode
    return opcode if opcode in KINDS else ""


def _find_collectives(module, computation, instruction):
    if _kind(instruction):
        yield computation, instruction, computation.name
    elif instruction.opcode == "fusion":
        for name in instruction.called("calls"):
            for inner in module.computations[name].instructions:
                yield from _find_collectives(module, module.computations[name], inner)


def _is_new(counted, body, instruction):
    # TPU programs spread one collective over several fusions with the same channel. Transfers
    # between slices go through the hosts, whose channels have numbers of their own.
    is_transfer = instruction.opcode == "send"
    channel = None if is_transfer else instruction.attribute("channel_id")
    key = (body.name, channel or instruction.name)
    if key in counted:
        return False
    counted.add(key)
    return True


_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{([\d,{}]*)\}")


def replica_groups(instruction: Instruction, devices: int) -> list[tuple[int, ...]]:
    """Return the groups of device positions that exchange with one another."""
    text = instruction.attributes

    def numbers(text):
        return [int(n) for n in text.split(",") if n]

    def order(dims, transposed):
        grid = np.arange(math.prod(dims)).reshape(dims)
        return (grid.transpose(numbers(transposed)) if transposed else grid).ravel()

    if iota := _IOTA_GROUPS.search(text):
        rows = order(numbers(iota[2]), iota[3]).reshape(numbers(iota[1]))
    elif named := _MESH_GROUPS.search(text):
        sizes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])]
        # A group may span a part of an axis: 'a':(2)4 is a factor of size 4 after one of size 2.
        in_group, split = [], []
        parts = {
            n: (int(p), int(k)) for n, p, k in re.findall(r"'([^']+)':\((\d+)\)(\d+)", named[4])
        }
        full_axes = re.findall(r"'([^']+)'(?!:)", named[4])
        for name, size in sizes:
            before, span = parts.get(name, (1, size if name in full_axes else 1))
            in_group += [False, True, False]
            split += [before, span, size // before // span]
        dims = numbers(named[2]) if named[2] else [size for _, size in sizes]
        grid = order(dims, named[3]).reshape(split)
        last = [n for n, grouped in enumerate(in_group) if grouped]
        rest = [n for n, grouped in enumerate(in_group) if not grouped]
        rows = grid.transpose(rest + last).reshape(-1, math.prod(split[n] for n in last))
    elif listed := _LISTED_GROUPS.search(text):
        groups = [tuple(numbers(g)) for g in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [tuple(range(devices))]
    else:
        raise ValueError(f"{instruction.name}: unknown form of device groups: {text[:120]!r}")
    return [tuple(row) for row in rows.tolist()]


def mesh_axes(groups: list[tuple[int, ...]], mesh_shape: Mapping[str, int]) -> str:
    """Return the mesh axes along which the members of any group differ, joined by `+`."""
    sizes = tuple(mesh_shape.values())
    varying: set[int] = set()
    for group in groups:
        coords = np.stack(np.unravel_index(np.array(group), sizes))
        varying |= set(np.flatnonzero((coords != coords[:, :1]).any(1)).tolist())
    return "+".join(name for n, name in enumerate(mesh_shape) if n in varying)


def _collective(scope, instruction, times, mesh_shape, caller, slices):
    kind = _kind(instruction)
    if instruction.opcode == "send":
        group, axes = tuple(range(slices)), SLICES
    else:
        groups = replica_groups(instruction, math.prod(mesh_shape.values()))
        group, axes = max(groups, key=len), mesh_axes(groups, mesh_shape)
    arrays = [
        s for n in instruction.operands if n in scope.by_name for s in scope.by_name[n].shapes
    ]
    group_size = len(group)
    factor = group_size if kind == "all-gather" else 1
    size = factor * sum(s.bytes for s in arrays)
    if kind == "all-reduce" and caller.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    share = (group_size - 1) / group_size
    wire_factors = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(
        kind=kind,
        axes=axes,
        group=group,
        bytes=size,
        sizes=tuple(factor * math.prod(s.dims) for s in arrays),
        wire=size * wire_factors.get(kind, share),
        times=times,
        source=source[1] if source else "",
    )
