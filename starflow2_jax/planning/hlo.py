"""A parser of compiled programs: computations, instructions, shapes, and how often each runs.

It reads the text of `jax.stages.Compiled.as_text` for CPUs, GPUs and TPUs. The text has the body of
a loop once; `walk` yields its instructions with the number of times they run.
"""

import math
import re
import warnings
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
_OPERAND = re.compile(r"%([^\s,()]+)")


@dataclass(frozen=True)
class Shape:
    """An array of the program."""

    dtype: str  # name of the element type in HLO
    dims: tuple[int, ...]  # sizes of the dimensions
    order: tuple[int, ...] = ()  # dimensions from the fastest to the slowest in memory
    tile: tuple[int, ...] = ()  # the first tile of the layout, () for none
    space: int = 0  # memory space; 0 is the main memory (HBM), the rest are memories of the chip

    @property
    def bytes(self) -> int:
        """Return the bytes of the elements."""
        return -(-math.prod(self.dims) * BITS.get(self.dtype, 0) // 8)

    @property
    def padded(self) -> int:
        """Return the bytes in memory, with dimensions rounded up to the tile."""
        dims = list(self.dims)
        if not dims and self.tile:
            dims = [self.tile[-1]]
        elif self.tile:
            # A tile of more dimensions than the array covers whole multiples of its last one.
            for axis, size in zip(self.order, reversed(self.tile)):
                dims[axis] = -(-dims[axis] // size) * size
        return -(-math.prod(dims) * BITS.get(self.dtype, 0) // 8)


def shapes(text: str) -> tuple[Shape, ...]:
    """Parse a shape into its arrays, in order if it is a tuple; tokens are left out."""

    def numbers(text):
        return tuple(int(n) for n in text.split(",") if n)

    arrays = []
    for dtype, dims, order, rest in _SHAPE.findall(text):
        if dtype not in BITS:
            continue
        tile = re.search(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        arrays.append(
            Shape(
                dtype,
                dims=numbers(dims),
                order=numbers(order),
                tile=numbers(tile[1]) if tile else (),
                space=int(space[1]) if space else 0,
            )
        )
    return tuple(arrays)


@dataclass
class Instruction:
    """A line of the form `name = shape opcode(operands), attributes`."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str
    is_root: bool

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Return the arrays of the result, several if it is a tuple."""
        return shapes(self.result)

    @cached_property
    def elements(self) -> tuple[str, ...]:
        """Return the text of every element of the result if it is a tuple, otherwise ()."""
        if not self.result.startswith("("):
            return ()
        text, start, elements = re.sub(r"/\*.*?\*/", "", self.result[1:-1]), 0, []
        while start < len(text):
            elements.append(_text_until(text, start, ","))
            start += len(elements[-1]) + 1
        return tuple(element.strip() for element in elements)

    def attribute(self, name: str) -> str:
        """Return the text after `name=` up to a comma outside brackets, or an empty string."""
        match = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if not match:
            return ""
        return _text_until(self.attributes, match.end(), ",").strip()

    def called(self, name: str) -> list[str]:
        """Return the names of the computations in an attribute."""
        return _NAME.findall(self.attribute(name))


@dataclass
class Computation:
    """A function of the program."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Return the instructions by name."""
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        """Return the instruction whose result is that of the computation."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def parameters(self) -> dict[int, Instruction]:
        """Return the parameters by number."""
        return {int(i.inside): i for i in self.instructions if i.opcode == "parameter"}


@dataclass
class Module:
    """A program."""

    computations: dict[str, Computation]
    entry: Computation


def _text_until(text: str, start: int, stops: str) -> str:
    """Return the text from `start` to the first of `stops` outside of brackets and quotes."""
    depth, quoted = 0, False
    for position in range(start, len(text)):
        char = text[position]
        if char == '"' and text[position - 1] != "\\":
            quoted = not quoted
        if quoted:
            continue
        if depth == 0 and char in stops:
            return text[start:position]
        depth += (char in "([{") - (char in ")]}")
    return text[start:]


def _instruction(line: str) -> Instruction | None:
    head, equals, rest = line.partition(" = ")
    if not equals:
        return None
    is_root = head.startswith("ROOT ")
    name = head.removeprefix("ROOT ").strip().lstrip("%")
    result = _text_until(rest, 0, " ")
    opcode, opened, _ = rest[len(result) + 1 :].partition("(")
    if not opened:
        return None
    begin = len(result) + 1 + len(opcode) + 1
    inside = _text_until(rest, begin, ")")
    attributes = rest[begin + len(inside) + 1 :].lstrip(", ")
    operands = tuple(_OPERAND.findall(inside))
    return Instruction(name, result, opcode, operands, inside, attributes, is_root)


def _define_operand(name, defined):
    """Return True if an operand is defined, after adding the instruction that it abbreviates.

    The dumps of libtpu for jax 0.12 omit `get-tuple-element` (XLA's `xla_dump_compact_gte`): `%x#1`
    is element 1 of the tuple `%x`, and `%x#1#0` is element 0 of that element.
    """
    if name in defined:
        return True
    source, _, index = name.rpartition("#")
    if not source or not index.isdecimal() or not _define_operand(source, defined):
        return False
    elements, number = defined[source].elements, int(index)
    if number < len(elements):
        defined[name] = Instruction(
            name=name,
            result=elements[number],
            opcode="get-tuple-element",
            operands=(source,),
            inside=f"%{source}",
            attributes=f"index={number}",
            is_root=False,
        )
    return name in defined


def parse(text: str) -> Module:
    """Parse the text of a program.

    Operands in the short form `%tuple#index` become `get-tuple-element` instructions.

    Raises:
        ValueError: The text has no entry computation, or an operand that is not defined.
    """
    computations: dict[str, Computation] = {}
    defined: dict[str, Instruction] = {}
    current = entry = None
    # The metadata of a Pallas kernel spans several lines.
    text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", text, flags=re.DOTALL)
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and " = " not in line.partition("(")[0]:
            current, defined = Computation(head[2]), {}
            computations[current.name] = current
            entry = current if head[1] else entry
        elif current is None:
            continue
        elif line.startswith("}"):
            current.instructions += defined.values()
            current = None
        elif (instruction := _instruction(line.strip())) is not None:
            for operand in instruction.operands:
                if not _define_operand(operand, defined):
                    raise ValueError(
                        f"computation {current.name}: operand %{operand} of %{instruction.name} is "
                        "not defined before its use; the parser of planning/hlo.py needs to learn "
                        "this form of the compiler's text"
                    )
            defined[instruction.name] = instruction
    if entry is None:
        raise ValueError("the program's text has no ENTRY computation")
    return Module(computations, entry)


def trip_count(module: Module, loop: Instruction, caller: Computation) -> int | None:
    """Return the number of times a `while` runs its body, or None if the text does not tell.

    Either the compiler annotates it, or the condition is `counter < constant` and the counter
    starts at a constant and grows by a constant: by one in the loops of jax, by more in unrolled
    loops of the compiler (products of weights that arrive in parts).
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    (name,) = loop.called("condition")
    compare, constant, index = _comparison(module, module.computations[name])
    if compare != "LT" or constant is None or index is None:
        return None
    body = module.computations[loop.called("body")[0]]
    start, step = _counter_start(caller, loop, index), _counter_step(module, body, index)
    return None if step is None or start is None else max(-(-(constant - start) // step), 0)


def _counter_step(module, body, index):
    """Return the increment of a loop's counter, or None if it cannot be followed."""
    if body.root.opcode != "tuple":
        return None

    def evaluate(scope, name, arguments):
        """Return (constant, True if the counter is added) of a sum, or None for anything else."""
        node = scope.by_name.get(name)
        if node is None:
            return None
        if node.opcode == "parameter" and arguments is not None:
            return arguments[int(node.inside)]
        if node.opcode == "constant" and re.fullmatch(r"\d+", node.inside):
            return int(node.inside), False
        if node.opcode == "get-tuple-element" and arguments is None:
            return (0, True) if int(node.attribute("index")) == index else None
        if node.opcode in ("copy", "bitcast"):
            return evaluate(scope, node.operands[0], arguments)
        if node.opcode == "add":
            terms = [evaluate(scope, operand, arguments) for operand in node.operands]
            if None not in terms:
                return terms[0][0] + terms[1][0], terms[0][1] or terms[1][1]
        if node.opcode == "fusion" and arguments is None and len(node.shapes) == 1:
            called = module.computations[node.called("calls")[0]]
            values = [evaluate(scope, operand, None) for operand in node.operands]
            return evaluate(called, called.root.name, values)
        return None

    value = evaluate(body, body.root.operands[index], None)
    return value[0] if value and value[1] and value[0] > 0 else None


def _comparison(module, condition):
    """Return the direction, the constant and the counter's tuple index of a loop's condition.

    The constant or the index is None if it cannot be followed.
    """
    root, scope, arguments = condition.root, condition, {}
    if root.opcode == "fusion":
        (name,) = root.called("calls")
        scope = module.computations[name]
        arguments = {p.name: root.operands[n] for n, p in scope.parameters().items()}
        root = scope.root
    if root.opcode != "compare" or len(root.operands) != 2:
        return "", None, None
    constant = index = None
    for operand in root.operands:
        node = scope.by_name.get(operand)
        if operand in arguments:
            node = condition.by_name.get(arguments[operand])
        if node is not None and node.opcode == "constant" and re.fullmatch(r"\d+", node.inside):
            constant = int(node.inside)
        elif node is not None and node.opcode == "get-tuple-element":
            index = int(node.attribute("index"))
    return root.attribute("direction"), constant, index


def _counter_start(caller, loop, index):
    """Return the initial value of a loop's counter, or None if it cannot be followed."""
    carried = caller.by_name.get(loop.operands[0])
    while carried is not None and carried.opcode == "tuple":
        carried = caller.by_name.get(carried.operands[index])
    while carried is not None and carried.opcode == "copy":
        carried = caller.by_name.get(carried.operands[0])
    if carried is None or carried.opcode != "constant":
        return None
    return int(carried.inside) if re.fullmatch(r"\d+", carried.inside) else None


def walk(
    module: Module, unknown_loops: list[str] | None = None, default_trips: int | None = None
) -> Iterator[tuple[Computation, Instruction, float]]:
    """Yield every executed instruction with its computation and the number of times it runs.

    The bodies of fusions are not entered. A loop with an unknown trip count runs `default_trips`
    times; without that number it counts once, with a warning. Its name is appended to
    `unknown_loops`. Every branch of a conditional counts.
    """

    def enter(computation, times):
        for instruction in computation.instructions:
            yield computation, instruction, times
            if instruction.opcode == "while":
                count = trip_count(module, instruction, computation)
                is_unknown = count is None and unknown_loops is not None
                if is_unknown and instruction.name not in unknown_loops:
                    unknown_loops.append(instruction.name)
                if count is None and default_trips is None:
                    warnings.warn(
                        f"the trip count of loop {instruction.name} in computation "
                        f"{computation.name} cannot be read from the program's text; its body "
                        "counts once, so the costs are too low",
                        stacklevel=2,
                    )
                runs = times * ((default_trips if count is None else count) or 1)
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
