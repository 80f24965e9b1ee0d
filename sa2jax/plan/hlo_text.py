"""Parser of XLA's HLO text: computations, instructions, trip counts of loops."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from sa2jax.errors import PlanError

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclass(frozen=True)
class Shape:
    """An array, or a tuple of them.

    Attributes:
        dtype: such as `bf16`; empty for a tuple.
        dims: sizes of an array.
        memory: XLA's number of the memory space, 0 for HBM.
        parts: elements of a tuple, which may have none.
    """

    dtype: str
    dims: tuple[int, ...] = ()
    memory: int = 0
    parts: tuple["Shape", ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements of an array."""
        return math.prod(self.dims)

    @property
    def size(self) -> float:
        """Bytes in any memory space."""
        if not self.dtype:
            return sum(part.size for part in self.parts)
        return math.ceil(self.elements * bits(self.dtype) / 8)

    @property
    def hbm(self) -> float:
        """Bytes in HBM."""
        if not self.dtype:
            return sum(part.hbm for part in self.parts)
        return 0 if self.memory else self.size


@dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`.

    A constant has its value and a parameter its number in `literal`, and no operands.
    """

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    literal: str = ""

    def attribute(self, key: str) -> str | None:
        """Text of an attribute without enclosing braces, None if it is not there."""
        match = re.search(rf"[ ,]{key}=(?:\{{([^}}]*)\}}|([^,\s]+))", self.attributes)
        return None if match is None else match[1] if match[1] is not None else match[2]

    def called(self, key: str) -> str:
        """Name of the computation that an attribute refers to."""
        return (self.attribute(key) or "").lstrip("%")

    def numbers(self, key: str) -> list[int]:
        """A list of integers, empty if it is not there."""
        return [int(n) for n in re.findall(r"\d+", self.attribute(key) or "")]


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """The root instruction: its result is the computation's."""
        return next(i for i in reversed(self.instructions.values()) if i.root)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that use each."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    @cached_property
    def parameters(self) -> list[Instruction]:
        """Parameters in order."""
        parameters = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(parameters, key=lambda i: int(i.literal))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the first to run.

    Raises:
        PlanError: for what is not HLO, or a form that is not known here.
    """
    computations: dict[str, Computation] = {}
    entry = name = ""
    pending: list[str] = []  # lines of an instruction: a Pallas kernel's metadata takes several

    def finish() -> None:
        if pending:
            instruction = _instruction("".join(pending))
            here = computations[name].instructions
            here |= {given: _element(here, given) for given in instruction.operands if "#" in given}
            here[instruction.name] = instruction
            pending.clear()

    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line):
            finish()
            name = head[2]
            entry = name if head[1] else entry
            computations[name] = Computation(name, {})
        elif name and re.match(r"\s+(ROOT )?%?[\w.-]+ = ", line):
            finish()
            pending.append(line)
        elif re.match(r"\}(,|$)", line):
            finish()
            name = ""
        elif pending:
            pending.append(line)
    finish()
    if not entry:
        raise PlanError("the compiled program's text has no entry: expected XLA's optimised HLO")
    return computations, entry


def _instruction(line: str) -> Instruction:
    head = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if head is None:
        raise _unknown("instruction", line)
    shape, at = _shape(line, head.end())
    opcode = re.compile(r" ([\w-]+)\(").match(line, at)
    if opcode is None:
        raise _unknown("instruction", line)
    end = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : end]
    operands, literal = [], ""
    if opcode[1] in ("constant", "parameter"):
        literal = inside
    else:  # maybe with their shapes, which may hold commas
        operands = [word.strip().rsplit(" ", 1)[-1].lstrip("%") for word in _split(inside)]
    return Instruction(
        head[2], shape, opcode[1], tuple(operands), line[end + 1 :], bool(head[1]), literal
    )


def _element(here: dict[str, Instruction], name: str) -> Instruction:
    """What an operand such as `tuple.5#0` stands for."""
    operand, _, index = name.partition("#")
    shape = here[operand].shape.parts[int(index)]
    return Instruction(name, shape, "get-tuple-element", (operand,), f", index={index}", False)


def _shape(text: str, at: int) -> tuple[Shape, int]:
    """The shape that begins at a position, and the position after it."""
    if text[at] == "(":
        end = _closing(text, at)
        inner = _split(text[at + 1 : end])
        return Shape("", parts=tuple(_shape(part.strip(), 0)[0] for part in inner)), end + 1
    match = re.compile(r"(\w+)\[([^\]]*)\](\{[^}]*\})?").match(text, at)
    if match is None:
        raise _unknown("shape", text[at:])
    bits(match[1])  # complains of a type that is not known
    dims = tuple(int(n) for n in re.findall(r"\d+", match[2]))
    memory = re.search(r"S\((\d+)\)", match[3] or "")
    return Shape(match[1], dims, int(memory[1]) if memory else 0), match.end()


def _closing(text: str, at: int) -> int:
    """Position of the parenthesis that closes the one at a position."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, at):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise _unknown("parentheses", text[at:])


def _split(text: str) -> Iterator[str]:
    """Split at the commas that are in no brackets."""
    depth, start = 0, 0
    for match in re.finditer(r"[()\[\]{},]", text):
        if match[0] == "," and depth == 0:
            yield text[start : match.start()]
            start = match.end()
        elif match[0] != ",":
            depth += 1 if match[0] in "([{" else -1
    if text[start:].strip():
        yield text[start:]


def bits(dtype: str) -> int:
    """Bits of one element.

    Raises:
        PlanError: for a type that is not known here.
    """
    if dtype not in BITS:  # f32, s8, u4, f8e4m3fn, f4e2m1fn, ...
        match = re.match(r"[a-z](\d+)", dtype)
        if match is None:
            raise _unknown("type", dtype)
        return int(match[1])
    return BITS[dtype]


def _unknown(what: str, text: str) -> PlanError:
    return PlanError(f"unknown {what} in the compiled program: {text.strip()[:80]!r}")


# --- loops ---

Sum = dict[int, int]  # element that a loop carries -> how often it is in a sum
CONSTANT = -1  # key of a sum's constant
Frames = list[tuple[Computation, Instruction | None]]  # where a value is: fusions with their calls


def trips(
    computations: dict[str, Computation], inside: Computation, loop: Instruction
) -> int | None:
    """Trip count of a loop; None if it depends on data.

    The usual form is known: while i < n, i growing by a constant, which is 2 or more where XLA
    unrolled the loop.
    """
    if match := re.search(r'"known_trip_count":\s*\{"n":\s*"?(\d+)', loop.attributes):
        return int(match[1])
    condition, body = (computations[loop.called(key)] for key in ("condition", "body"))
    start = inside.instructions[loop.operands[0]]
    test, frames = condition.root, Frames([(condition, None)])
    if test.opcode == "fusion":  # one comparison, wrapped
        frames.append((computations[test.called("calls")], test))
        test = frames[-1][0].root
    direction = test.attribute("direction")
    if test.opcode != "compare" or direction not in ("LT", "LE") or start.opcode != "tuple":
        return None

    def turned(index: int) -> Sum | None:
        """A loop-carried element after one iteration."""
        if body.root.opcode != "tuple":
            return None
        return _sum(computations, [(body, None)], body.root.operands[index])

    left, right = (_sum(computations, frames, name) for name in test.operands)
    if left is None or right is None:
        return None
    counters = [index for index in left if index != CONSTANT]
    if len(counters) != 1 or left[counters[0]] != 1 or counters[0] in right:
        return None
    grown = turned(counters[0])
    if grown is None or set(grown) != {counters[0], CONSTANT} or grown[counters[0]] != 1:
        return None
    step, way = grown[CONSTANT], int(direction == "LE")
    for sides, sign in ((left, -1), (right, 1)):
        for index, times in sides.items():
            first: Sum | None = {CONSTANT: 1}
            if index != CONSTANT:
                if index != counters[0] and turned(index) != {index: 1}:
                    return None
                first = _sum(computations, [(inside, None)], start.operands[index])
            if first is None or set(first) != {CONSTANT}:
                return None
            way += sign * times * first[CONSTANT]
    return max(0, math.ceil(way / step)) if step > 0 else None


def _sum(computations: dict[str, Computation], frames: Frames, name: str) -> Sum | None:
    """A value as a sum of what a loop carries and a constant; None if it is something else.

    Args:
        computations: all.
        frames: the loop's body or condition, and the fusions that led here with their calls.
        name: of the value, in the last of them.
    """
    inside, call = frames[-1]
    it = inside.instructions[name]
    if it.opcode == "constant" and re.fullmatch(r"-?\d+", it.literal):
        return {CONSTANT: int(it.literal)}
    if it.opcode == "parameter" and call is not None:
        return _sum(computations, frames[:-1], call.operands[int(it.literal)])
    if it.opcode in ("copy", "bitcast", "convert"):
        return _sum(computations, frames, it.operands[0])
    if it.opcode == "add":
        one, two = (_sum(computations, frames, operand) for operand in it.operands)
        if one is None or two is None:
            return None
        return {key: one.get(key, 0) + two.get(key, 0) for key in one | two}
    index, source = int(it.attribute("index") or 0), it
    if it.opcode == "get-tuple-element":
        source = inside.instructions[it.operands[0]]
        if source.opcode == "parameter" and call is None:
            return {index: 1}
    if source.opcode == "fusion":
        body = computations[source.called("calls")]
        output = body.root.operands[index] if body.root.opcode == "tuple" else body.root.name
        return _sum(computations, [*frames, (body, source)], output)
    return None
