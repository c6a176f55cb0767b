"""Reads a compiled program's text: computations, instructions, shapes, and how often each runs.

The text is what `jax.stages.Compiled.as_text` gives, for CPUs, GPUs and TPUs. A loop's body stands
there once; `walk` says how many times it is run.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    **{f"f{n}": n for n in (16, 32, 64)},
    **{f"{sign}{n}": n for sign in "su" for n in (2, 4, 8, 16, 32, 64)},
    **{"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8, "f4e2m1fn": 4},
}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Shape:
    """One array: dtype, dimensions, and what the layout says.

    Attributes:
        order: dimensions from the fastest to the slowest; tile: its first tile, () for none.
        space: memory space, 0 the main memory (HBM), others the chip's own.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the elements."""
        return -(-math.prod(self.dims) * BITS.get(self.dtype, 0) // 8)

    @property
    def padded(self) -> int:
        """Bytes that the array takes: dimensions rounded up to the tile."""
        dims = list(self.dims)
        if not dims and self.tile:
            dims = [self.tile[-1]]
        elif self.tile:
            # A tile of more dimensions than the array covers whole multiples of its last one.
            for axis, size in zip(self.order, reversed(self.tile)):
                dims[axis] = -(-dims[axis] // size) * size
        return -(-math.prod(dims) * BITS.get(self.dtype, 0) // 8)


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape as written, those of a tuple in turn; tokens left out."""
    found = []
    for dtype, dims, order, rest in _SHAPE.findall(text):
        if dtype not in BITS:
            continue
        tile = re.search(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        number = lambda text: tuple(int(n) for n in text.split(",") if n)
        found.append(
            Shape(
                dtype,
                number(dims),
                number(order),
                number(tile[1]) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


@dataclass
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str
    is_root: bool

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """What it gives, one or, from a tuple, several arrays."""
        return shapes(self.result)

    def attribute(self, name: str) -> str:
        """The text after `name=`, to the next comma outside brackets; empty where there is none."""
        at = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if not at:
            return ""
        return _until(self.attributes, at.end(), ",").strip()

    def called(self, name: str) -> list[str]:
        """Computations named by an attribute."""
        return _NAME.findall(self.attribute(name))


@dataclass
class Computation:
    """A function of the program."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name."""
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(i.inside): i for i in self.instructions if i.opcode == "parameter"}


@dataclass
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: Computation


def _until(text: str, start: int, stops: str) -> str:
    """Text from `start` to the first of `stops` that no bracket or quote opened since encloses."""
    depth, quoted = 0, False
    for at in range(start, len(text)):
        char = text[at]
        if char == '"' and text[at - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        if depth == 0 and char in stops:
            return text[start:at]
        depth += (char in "([{") - (char in ")]}")
    return text[start:]


def _instruction(line: str) -> Instruction | None:
    head, equals, rest = line.partition(" = ")
    if not equals:
        return None
    is_root = head.startswith("ROOT ")
    name = head.removeprefix("ROOT ").strip().lstrip("%")
    result = _until(rest, 0, " ")
    opcode, opened, _ = rest[len(result) + 1 :].partition("(")
    if not opened:
        return None
    begin = len(result) + 1 + len(opcode) + 1
    inside = _until(rest, begin, ")")
    attributes = rest[begin + len(inside) + 1 :].lstrip(", ")
    operands = tuple(_NAME.findall(inside))
    return Instruction(name, result, opcode, operands, inside, attributes, is_root)


def parse(text: str) -> Module:
    """A program's text.

    Raises:
        ValueError: text without an entry computation.
    """
    found: dict[str, Computation] = {}
    current = entry = None
    # What pallas says of a kernel is written over several lines.
    text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", text, flags=re.DOTALL)
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and " = " not in line.partition("(")[0]:
            current = found[head[2]] = Computation(head[2])
            entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = _instruction(line.strip())
            if instruction is not None:
                current.instructions.append(instruction)
    if entry is None:
        raise ValueError("the program's text has no ENTRY computation")
    return Module(found, entry)


def trips(module: Module, loop: Instruction, within: Computation) -> int | None:
    """How often a `while` runs its body; None where the program does not say.

    Either the compiler says so, or the condition is `counter < constant` and the counter goes up
    from a constant by a constant: by one in the loops that jax writes, by more where the compiler
    has unrolled its own (products of weights that arrive in parts).
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    (name,) = loop.called("condition")
    compare, constant, index = _comparison(module, module.computations[name])
    if compare != "LT" or constant is None:
        return None
    body = module.computations[loop.called("body")[0]]
    begin, step = _start(within, loop, index), _step(module, body, index)
    return None if step is None or begin is None else max(-(-(constant - begin) // step), 0)


def _step(module, body, index):
    """By how much a loop's body raises the counter, None where it cannot be followed."""
    if body.root.opcode != "tuple":
        return None

    def raised(scope, name, given):
        """(constant, whether the counter is in it) of a sum; None for anything else."""
        found = scope.by_name.get(name)
        if found is None:
            return None
        if found.opcode == "parameter" and given is not None:
            return given[int(found.inside)]
        if found.opcode == "constant" and re.fullmatch(r"\d+", found.inside):
            return int(found.inside), False
        if found.opcode == "get-tuple-element" and given is None:
            return (0, True) if int(found.attribute("index")) == index else None
        if found.opcode in ("copy", "bitcast"):
            return raised(scope, found.operands[0], given)
        if found.opcode == "add":
            parts = [raised(scope, operand, given) for operand in found.operands]
            if None not in parts:
                return parts[0][0] + parts[1][0], parts[0][1] or parts[1][1]
        if found.opcode == "fusion" and given is None and len(found.shapes) == 1:
            called = module.computations[found.called("calls")[0]]
            inner = [raised(scope, operand, None) for operand in found.operands]
            return raised(called, called.root.name, inner)
        return None

    found = raised(body, body.root.operands[index], None)
    return found[0] if found and found[1] and found[0] > 0 else None


def _comparison(module, condition):
    """(direction, constant, index of the counter in the carried tuple) of a loop's condition."""
    root, scope, passed = condition.root, condition, {}
    if root.opcode == "fusion":
        (name,) = root.called("calls")
        scope = module.computations[name]
        passed = {p.name: root.operands[n] for n, p in scope.parameters().items()}
        root = scope.root
    if root.opcode != "compare" or len(root.operands) != 2:
        return "", None, 0
    constant = index = None
    for operand in root.operands:
        found = scope.by_name.get(operand)
        if operand in passed:
            found = condition.by_name.get(passed[operand])
        if found is not None and found.opcode == "constant" and re.fullmatch(r"\d+", found.inside):
            constant = int(found.inside)
        elif found is not None and found.opcode == "get-tuple-element":
            index = int(found.attribute("index"))
    return root.attribute("direction"), constant, index or 0


def _start(within, loop, index):
    """The counter's first value, None where it cannot be followed."""
    carried = within.by_name.get(loop.operands[0])
    while carried is not None and carried.opcode == "tuple":
        carried = within.by_name.get(carried.operands[index])
    while carried is not None and carried.opcode == "copy":
        carried = within.by_name.get(carried.operands[0])
    if carried is None or carried.opcode != "constant":
        return None
    return int(carried.inside) if re.fullmatch(r"\d+", carried.inside) else None


def walk(
    module: Module, unknown: list[str] | None = None, unsaid: int = 1
) -> Iterator[tuple[Computation, Instruction, float]]:
    """Every instruction that is run, with how often: bodies of loops times their trips.

    What a fusion calls is not entered. A loop whose trips are not known counts `unsaid` times, and
    its name is added to `unknown`; of a conditional every branch is counted.
    """

    def enter(computation, times):
        for instruction in computation.instructions:
            yield computation, instruction, times
            if instruction.opcode == "while":
                count = trips(module, instruction, computation)
                if count is None and unknown is not None and instruction.name not in unknown:
                    unknown.append(instruction.name)
                runs = times * (unsaid if count is None else count or 1)
                for name in instruction.called("body"):
                    yield from enter(module.computations[name], runs)
            elif instruction.opcode == "conditional":
                names = instruction.called("branch_computations")
                for branch in ("true", "false"):
                    names += instruction.called(f"{branch}_computation")
                for name in names:
                    yield from enter(module.computations[name], times)
            elif instruction.opcode in ("call", "async-start"):
                names = instruction.called("to_apply") or instruction.called("calls")
                for name in names:
                    yield from enter(module.computations[name], times)

    yield from enter(module.entry, 1.0)
