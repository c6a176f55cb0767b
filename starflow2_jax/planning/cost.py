"""What one device does in a compiled program: products, bytes of main memory, collectives.

Counted from the program's text with loops times their trips, since the compiler's own analysis
counts a loop's body once. Of a multiply-add both count.
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
# Nothing is read or written: names for what is there, and the second halves of asynchronous pairs.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
         "call", "after-all", "partition-id", "replica-id", "add-dependency", "opt-barrier",
         "iota")  # fmt: skip
# Matrix products of one block of scores in each of the attention kernels, forward and backward.
_SPLASH = {"fwd": 2, "dkv": 4, "dq": 3}


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
        kind: one of `KINDS`; axes: mesh axes over which it goes, joined by `+`; `SLICES` where the
            hosts of several TPU slices do it over their network.
        group: positions (in the mesh, flattened) of one set of devices that takes part, or slices.
        bytes: what the result of an all-gather holds, else the operand, on one device; sizes:
            elements of each array in it, since one exchange may carry several.
        wire: what a device sends, by a ring.
        times: how often in a step; source: the operation of the program it comes from.
    """

    kind: str
    axes: str
    group: tuple[int, ...]
    bytes: int
    sizes: tuple[int, ...]
    wire: float
    times: float
    source: str


@dataclass(frozen=True)
class Work:
    """One device's share of a step.

    Attributes:
        flops: of matrix products; kernel_flops: those in it of attention kernels, by their shapes.
        bytes: read from and written to main memory.
        operations: (flops, bytes, times) of each operation, for a roofline of the whole.
        unknown_loops: loops whose trips the program does not say; they count once.
    """

    flops: float
    kernel_flops: float
    bytes: float
    operations: tuple[tuple[float, float, float], ...]
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]


def analyse(
    module: Module, mesh_shape: Mapping[str, int], slices: int = 1, unsaid: int = 1
) -> Work:
    """Count a compiled program whose devices are a mesh of `mesh_shape`, in its order, on a number
    of TPU slices.

    Args:
        unsaid: how often a loop runs of which the program does not say it.
    """
    unknown: list[str] = []
    operations, collectives = [], []
    kernels = 0.0
    seen: set[tuple[str, str]] = set()
    for computation, instruction, times in hlo.walk(module, unknown, unsaid):
        collectives += [
            _collective(scope, each, times, mesh_shape, called, slices)
            for scope, each, called in _exchanges(module, computation, instruction)
            if _is_new(seen, computation, each)
        ]
        flops = flops_of(module, computation, instruction)
        moved = 0 if _kind(instruction) else bytes_of(module, computation, instruction)
        if instruction.opcode == "custom-call":
            kernels += flops * times
        if flops or moved:
            operations.append((float(flops), float(moved), times))
    return Work(
        flops=sum(f * times for f, _, times in operations),
        kernel_flops=kernels,
        bytes=sum(b * times for _, b, times in operations),
        operations=tuple(operations),
        collectives=tuple(collectives),
        unknown_loops=tuple(unknown),
    )


# ---------------------------------------------------------------------------------------- products


def flops_of(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Of one instruction; of a fusion those of what it calls."""
    if instruction.opcode == "fusion":
        return sum(
            flops_of(module, module.computations[name], each)
            for name in instruction.called("calls")
            for each in module.computations[name].instructions
        )
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0.0
    given = [
        computation.by_name[name].shapes[0]
        for name in instruction.operands
        if name in computation.by_name and computation.by_name[name].shapes
    ]
    operands = [shape.dims for shape in given]
    if instruction.opcode == "custom-call":
        return _kernel_flops(instruction, given)
    out = math.prod(instruction.shapes[0].dims)
    if instruction.opcode == "dot":
        return 2 * out * _contracted(operands[0], instruction.attribute("lhs_contracting_dims"))
    return _convolution_flops(instruction, operands)


def _contracted(lhs, dimensions):
    return math.prod(lhs[int(d)] for d in re.findall(r"\d+", dimensions))


def _convolution_flops(instruction, operands):
    """Only positions of the kernel that lie on the input count: TPUs write products with batch
    dimensions as convolutions that mostly meet padding.
    """
    lhs_of, rest = instruction.attribute("dim_labels").split("_", 1)
    rhs_of, out_of = rest.split("->")
    lhs, rhs = operands[:2]
    out = instruction.shapes[0].dims
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute("window")))
    each = lambda name, default: window[name].split("x") if name in window else default
    spatial = sorted(char for char in lhs_of if char.isdigit())
    count = len(spatial)
    pads = [tuple(map(int, p.split("_"))) for p in each("pad", ["0_0"] * count)]
    strides = list(map(int, each("stride", [1] * count)))
    spread = list(map(int, each("lhs_dilate", [1] * count)))
    gaps = list(map(int, each("rhs_dilate", [1] * count)))
    met = 1
    for n, char in enumerate(spatial):
        size_in, size_k = lhs[lhs_of.index(char)], rhs[rhs_of.index(char)]
        at = np.arange(out[out_of.index(char)])[:, None] * strides[n] - pads[n][0]
        at = at + np.arange(size_k)[None, :] * gaps[n]
        met *= int(((at >= 0) & (at <= (size_in - 1) * spread[n]) & (at % spread[n] == 0)).sum())
    rows, features = out[out_of.index("b")], out[out_of.index("f")]
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    return 2 * rows * features * met * rhs[rhs_of.index("i")] // batch_groups


def _kernel_flops(instruction, given):
    """Of a call into a library or a kernel of our own, by its name and shapes."""
    target = instruction.attribute("custom_call_target").strip('"')
    operands = [shape.dims for shape in given]
    if "gemm" in target or "matmul" in target:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        out = math.prod(instruction.shapes[0].dims)
        return 2 * out * _contracted(operands[0], found[1] if found else str(len(operands[0]) - 1))
    if "fmha" in target:
        batch, length, heads, channels = operands[0]
        products = 5 if "Backward" in target else 2
        return products * batch * heads * length * length * channels
    splash = re.match(r"splash_m[hq]a_(fwd|dkv|dq)", instruction.name)
    if target == "tpu_custom_call" and splash:
        queries, keys = [s.dims for s in given if len(s.dims) >= 3 and s.dtype[0] in "bf"][:2]
        rows, length, channels = math.prod(queries[:-2]), queries[-2], queries[-1]
        # Which blocks of scores are looked at: with a causal mask, half and those on the diagonal.
        tables = [s.dims for s in given if s.dtype in ("s8", "s32") and len(s.dims) == 3]
        down, across = tables[0][-2:] if tables else (1, 1)
        share = 1 - (across - 1) / (2 * across) if down <= across else 1.0
        return _SPLASH[splash[1]] * 2 * rows * length * keys[-2] * channels * share
    return 0.0


# ------------------------------------------------------------------------------------------- bytes


def bytes_of(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Main memory that one instruction reads and writes; the chip's own memory is free."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    if opcode.endswith("-start"):  # (to, from, ...)
        return sum(_held(shape) for shape in instruction.shapes[:2])
    operands = [computation.by_name[n] for n in instruction.operands if n in computation.by_name]
    if opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * sum(map(_held, instruction.shapes))
    if opcode == "dynamic-update-slice":
        return 2 * sum(map(_held, operands[1].shapes))
    if opcode == "fusion":
        (name,) = instruction.called("calls")
        called = module.computations[name]
        inner = called.parameters()
        read = sum(
            _read(module, called, inner[n], operand.shapes) if n in inner else 0.0
            for n, operand in enumerate(operands)
        )
        return read + _written(module, called, instruction.shapes)
    return sum(_held(s) for i in (instruction, *operands) for s in i.shapes)


def _held(shape: Shape) -> int:
    return 0 if shape.space else shape.bytes


def _users(called, name):
    return [i for i in called.instructions if name in i.operands]


def _read(module, called, parameter, given):
    """Of an operand of a fusion: only the slices, where nothing else is read of it, there or in
    fusions inside.
    """
    whole = sum(map(_held, given))
    if not whole:
        return 0.0
    waiting, parts = [parameter], 0.0
    while waiting:
        current = waiting.pop()
        for user in _users(called, current.name):
            if user.opcode == "bitcast":
                waiting.append(user)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                parts += sum(s.bytes for s in user.shapes)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == current.name:
                continue  # written in place
            elif user.opcode == "fusion":
                (name,) = user.called("calls")
                inner = module.computations[name]
                taken = [
                    p for n, p in inner.parameters().items() if user.operands[n] == current.name
                ]
                parts += sum(_read(module, inner, each, given) for each in taken)
            else:
                return whole
    return min(parts, whole)


def _written(module, called, given):
    """Of a fusion's results: only the part, where a larger array is updated in place."""
    root = called.root
    parts = [called.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(given):
        return sum(map(_held, given))
    total = 0.0
    for part, shape in zip(parts, given):
        while part.opcode == "bitcast" and part.operands[0] in called.by_name:
            part = called.by_name[part.operands[0]]
        if part.opcode == "fusion" and len(part.shapes) == 1:
            (name,) = part.called("calls")
            total += _written(module, module.computations[name], [shape])
        elif part.opcode == "dynamic-update-slice" and not shape.space:
            total += sum(s.bytes for s in called.by_name[part.operands[1]].shapes)
        else:
            total += _held(shape)
    return total


# ------------------------------------------------------------------------------------- collectives


def _kind(instruction: Instruction) -> str:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "send":
        across = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', instruction.attributes)
        opcode = across[1].lower().replace("_", "-") if across else opcode
    return opcode if opcode in KINDS else ""


def _exchanges(module, computation, instruction):
    """(scope, collective, name of the computation it stands in), also inside fusions."""
    if _kind(instruction):
        yield computation, instruction, computation.name
    elif instruction.opcode == "fusion":
        for name in instruction.called("calls"):
            for each in module.computations[name].instructions:
                yield from _exchanges(module, module.computations[name], each)


def _is_new(seen, body, instruction):
    """Whether a collective of a loop's body has not been met: TPUs spread one over several fusions,
    all with its channel.
    """
    channel = instruction.attribute("channel_id")
    key = (body.name, channel or instruction.name)
    if key in seen:
        return False
    seen.add(key)
    return True


_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{([\d,{}]*)\}")


def groups(instruction: Instruction, devices: int) -> list[tuple[int, ...]]:
    """Positions of the devices that exchange with one another.

    Raises:
        ValueError: they are written in a way that is not known.
    """
    text, numbers = instruction.attributes, lambda text: [int(n) for n in text.split(",") if n]

    def order(dims, transposed):
        found = np.arange(math.prod(dims)).reshape(dims)
        return (found.transpose(numbers(transposed)) if transposed else found).ravel()

    if iota := _IOTA_GROUPS.search(text):
        rows = order(numbers(iota[2]), iota[3]).reshape(numbers(iota[1]))
    elif named := _MESH_GROUPS.search(text):
        sizes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])]
        # An axis may be taken in part: 'a':(2)4 are its digits of weight 4 behind 2 others.
        chosen, split = [], []
        parts = {
            n: (int(p), int(k)) for n, p, k in re.findall(r"'([^']+)':\((\d+)\)(\d+)", named[4])
        }
        whole = re.findall(r"'([^']+)'(?!:)", named[4])
        for name, size in sizes:
            before, taken = parts.get(name, (1, size if name in whole else 1))
            chosen += [False, True, False]
            split += [before, taken, size // before // taken]
        dims = numbers(named[2]) if named[2] else [size for _, size in sizes]
        grid = order(dims, named[3]).reshape(split)
        last = [n for n, taken in enumerate(chosen) if taken]
        rest = [n for n, taken in enumerate(chosen) if not taken]
        rows = grid.transpose(rest + last).reshape(-1, math.prod(split[n] for n in last))
    elif listed := _LISTED_GROUPS.search(text):
        found = [tuple(numbers(g)) for g in re.findall(r"\{([\d,]+)\}", listed[1])]
        return found or [tuple(range(devices))]
    else:
        raise ValueError(f"{instruction.name}: groups of devices written as {text[:120]!r}")
    return [tuple(row) for row in rows.tolist()]


def axes_of(found: list[tuple[int, ...]], mesh_shape: Mapping[str, int]) -> str:
    """Mesh axes along which the members of any group differ, joined by `+`."""
    sizes = tuple(mesh_shape.values())
    varying: set[int] = set()
    for group in found:
        where = np.stack(np.unravel_index(np.array(group), sizes))
        varying |= set(np.flatnonzero((where != where[:, :1]).any(1)).tolist())
    return "+".join(name for n, name in enumerate(mesh_shape) if n in varying)


def _collective(scope, instruction, times, mesh_shape, called, slices):
    kind = _kind(instruction)
    if instruction.opcode == "send":
        group, axes = tuple(range(slices)), SLICES
    else:
        found = groups(instruction, math.prod(mesh_shape.values()))
        group, axes = max(found, key=len), axes_of(found, mesh_shape)
    arrays = [
        s for n in instruction.operands if n in scope.by_name for s in scope.by_name[n].shapes
    ]
    ways = len(group)
    whole = ways if kind == "all-gather" else 1
    size = whole * sum(s.bytes for s in arrays)
    if kind == "all-reduce" and called.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    share = (ways - 1) / ways
    wire = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(
        kind=kind,
        axes=axes,
        group=group,
        bytes=size,
        sizes=tuple(whole * math.prod(s.dims) for s in arrays),
        wire=size * wire.get(kind, share),
        times=times,
        source=source[1] if source else "",
    )
