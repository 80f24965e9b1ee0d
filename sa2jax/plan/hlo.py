"""Cost model of a compiled program: FLOPs, HBM traffic and collectives, from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs; here every loop
counts as often as it turns. Counted are

* FLOPs of dots, convolutions (a TPU's dots are some) and sums of products (a TPU's product of a
  matrix and one vector is one). Other elementwise work is not.
* Bytes read from and written to the main memory (HBM). A buffer in another memory, such as a
  TPU's VMEM, costs nothing; fetching it from HBM does. Inside a fusion nothing is in memory.
  Operands of which only a slice is used, or replaced, count with that slice. Padding to a layout's
  tiles is not counted.
* Bytes that a device sends in collectives, as a ring would.

A Pallas kernel counts as its author's cost estimate says; one without (splash attention has none)
counts with its operands and results as traffic, and with no FLOPs.
"""

import json
import math
import re
from dataclasses import dataclass, field

import numpy as np

from sa2jax.errors import PlanError
from sa2jax.plan.hlo_text import Computation, Instruction, Shape, bits, parse, trips
from sa2jax.plan.opcodes import COLLECTIVES, FREE, NOTHING, SLICES, STEPS, UNARY, UPDATES


@dataclass(frozen=True)
class Collective:
    """Count of one kind of collective, and the bytes that each device sent for it."""

    count: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Cost:
    """Cost of one run on one device.

    Attributes:
        flops: multiplications and additions of matrix products.
        flops8: those among them whose factors are both 8-bit integers.
        read: bytes from HBM.
        written: bytes to HBM.
        collectives: by kind.
        open_loops: loops whose condition depends on data; they count as often as was asked for.
        traffic: bytes to and from HBM by instruction.
    """

    flops: float = 0
    flops8: float = 0
    read: float = 0
    written: float = 0
    collectives: dict[str, Collective] = field(default_factory=dict)
    open_loops: int = 0
    traffic: dict[str, float] = field(default_factory=dict)

    @property
    def hbm(self) -> float:
        """Bytes to and from HBM."""
        return self.read + self.written

    @property
    def sent(self) -> float:
        """Bytes sent to other devices."""
        return sum(kind.bytes for kind in self.collectives.values())

    def plus(self, other: "Cost", times: float = 1) -> "Cost":
        """The sum of this cost and `times` another."""
        kinds = dict(self.collectives)
        for name, add in other.collectives.items():
            old = kinds.get(name, Collective())
            kinds[name] = Collective(old.count + times * add.count, old.bytes + times * add.bytes)
        traffic = dict(self.traffic)
        for name, size in other.traffic.items():
            traffic[name] = traffic.get(name, 0) + times * size
        return Cost(
            flops=self.flops + times * other.flops,
            flops8=self.flops8 + times * other.flops8,
            read=self.read + times * other.read,
            written=self.written + times * other.written,
            collectives=kinds,
            open_loops=self.open_loops + other.open_loops,
            traffic=traffic,
        )


def cost(text: str, *, turns: int = 1) -> Cost:
    """Cost of a program.

    Args:
        text: `compiled.as_text()`.
        turns: how often a loop turns whose condition depends on data.

    Raises:
        PlanError: for a form of HLO that is not known here.
    """
    try:
        return Walker(text, turns=turns).cost()
    except (KeyError, IndexError, ValueError, StopIteration, AttributeError) as error:
        # XLA's text has no specification: a new form must not look like a failure of the model.
        raise PlanError(f"unknown form of compiled program: {error!r}") from error


class Walker:
    """Adds up the instructions of a program, each as often as it runs."""

    def __init__(self, text: str, *, turns: int = 1):
        self.computations, self.entry = parse(text)
        self.turns = turns
        self.devices = math.prod(
            int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text[:100_000])
        )
        self._memo: dict[tuple[str, bool], Cost] = {}
        self._starts: dict[str, set[str]] = {}
        self._links: dict[str, set[str]] = {}
        self._find_chains()

    def cost(self) -> Cost:
        """Cost of the program."""
        return self._computation(self.entry)

    def _computation(self, name: str, fused: bool = False) -> Cost:
        """Cost of one run of a computation; inside a fusion nothing is read or written."""
        if (name, fused) not in self._memo:
            total = Cost()
            inside = self.computations[name]
            for instruction in inside.instructions.values():
                total = total.plus(self._instruction(inside, instruction, fused))
            self._memo[name, fused] = total
        return self._memo[name, fused]

    def _find_chains(self) -> None:
        """Find the collectives that a TPU spreads over several fusions.

        One fusion starts it, others carry it on beside their products, maybe in loops, and one
        ends it. Each has a copy of the instruction, with the same channel, and hands its buffers
        on. Only the start counts, for the whole.
        """
        started = set()
        for body in self.computations.values():
            calls = [it for it in body.instructions.values() if _target(it) in STEPS]
            if any(_target(it) == "AsyncCollectiveStart" for it in calls):
                collectives = [it for it in body.instructions.values() if it.opcode in COLLECTIVES]
                self._starts[body.name] = {it.name for it in collectives}
                started |= {it.attribute("channel_id") or "none" for it in collectives}
        for body in self.computations.values():
            links = {
                it.name
                for it in body.instructions.values()
                if _target(it) in STEPS
                or (it.opcode in COLLECTIVES and it.attribute("channel_id") in started)
            }
            if links:
                root = body.root
                through = links | ({root.name} if root.opcode == "tuple" else set())
                self._links[body.name] = links | {
                    it.name
                    for it in body.parameters
                    if {user.name for user in body.users[it.name]} <= through
                }

    def _instruction(self, inside: Computation, it: Instruction, fused: bool) -> Cost:
        kind = it.opcode.removesuffix("-start")
        if it.opcode in FREE or it.opcode.endswith(("-done", "-update")):
            return Cost()
        if it.opcode == "while":
            return self._loop(inside, it)
        if it.opcode == "conditional":
            return max(
                map(self._computation, _branches(it)), key=lambda cost: (cost.hbm, cost.flops)
            )
        if kind in ("call", "async"):
            return self._computation(it.called("to_apply") or it.called("calls"), fused)
        if kind == "custom-call" and (other := self._other_core(it)):
            return self._computation(other, fused)
        if it.opcode == "custom-call" and (known := _estimate(it)) is not None:
            return known
        total = Cost(flops=self._flops(inside, it))
        if total.flops and all(
            bits(inside.instructions[n].shape.dtype) == 8 for n in it.operands[:2]
        ):
            total = Cost(flops=total.flops, flops8=total.flops)
        starts = it.name in self._starts.get(inside.name, ())
        if kind in COLLECTIVES and (starts or it.name not in self._links.get(inside.name, ())):
            total = total.plus(self._collective(inside, it, kind))
        if kind == "fusion":
            total = total.plus(self._fused(it))
        if fused:
            return total
        read, written = self._traffic(inside, it, kind)
        traffic = {it.name: read + written} if read + written else {}
        return total.plus(Cost(read=read, written=written, traffic=traffic))

    def _other_core(self, it: Instruction) -> str | None:
        """The computation that a custom call hands to another core of the chip, if it does so."""
        body = self.computations.get(it.called("called_computations"))
        if body is None or not body.instructions:
            return None
        output = body.root.shape
        same = (output.dtype, output.dims) == (it.shape.dtype, it.shape.dims)
        return body.name if same or it.opcode.endswith("-start") else None

    def _fused(self, it: Instruction) -> Cost:
        """FLOPs and collectives inside a fusion."""
        body = self.computations[it.called("calls")]
        inner = self._computation(body.name, fused=True)
        # A TPU's reduce-scatter: a fusion of an all-reduce with the slice that a device keeps.
        if "all-reduce" in inner.collectives and body.root.opcode == "dynamic-slice":
            kinds = dict(inner.collectives)
            was = kinds.pop("all-reduce")
            kinds["reduce-scatter"] = Collective(was.count, was.bytes / 2)
            return Cost(flops=inner.flops, flops8=inner.flops8, collectives=kinds)
        return inner

    def _loop(self, inside: Computation, it: Instruction) -> Cost:
        turns = trips(self.computations, inside, it)
        once = self._computation(it.called("body")).plus(self._computation(it.called("condition")))
        known = self.turns if turns is None else turns
        return Cost(open_loops=int(turns is None)).plus(once, times=known)

    # --- memory ---

    def _traffic(self, inside: Computation, it: Instruction, kind: str) -> tuple[float, float]:
        """Bytes read from and written to HBM by an instruction that is not in a fusion."""
        shapes = [inside.instructions[name].shape for name in it.operands]
        result = it.shape
        if it.opcode.endswith("-start") and result.parts and kind != "all-reduce":
            # (destination, source, context) of a copy; (source, destination, ...) of the rest.
            result = result.parts[0 if kind == "copy" else 1]
        if kind == "fusion":
            body = self.computations[it.called("calls")]
            read = sum(
                min(shape.hbm, self._used(body, parameter.name))
                for shape, parameter in zip(shapes, body.parameters, strict=True)
                if shape.hbm
            )
            written = self._made(body, result)
            for name in self._starts.get(body.name, ()):  # what the whole chain moves
                start = body.instructions[name]
                read += sum(body.instructions[given].shape.hbm for given in start.operands)
                written += start.shape.hbm
            return read, written
        if kind in SLICES:
            # The slice, and the indices; nothing of the rest.
            return min(_hbm(shapes[0], result.size), shapes[0].size) + sum(
                shape.hbm for shape in shapes[1:]
            ), result.hbm
        if kind in UPDATES:
            update = shapes[UPDATES[kind]]
            rest = sum(shape.hbm for shape in shapes[1:])
            return rest, _hbm(result, update.size)
        if kind in ("broadcast", "iota") and shapes:
            return shapes[0].hbm, result.hbm
        if _target(it) in NOTHING:
            return 0, 0
        return sum(shape.hbm for shape in shapes), result.hbm

    def _used(self, body: Computation, name: str) -> float:
        """Bytes of a value that a fused computation reads: what its results need, no more."""
        if name in self._links.get(body.name, ()):
            return 0
        size = body.instructions[name].shape.size
        used = size if name == body.root.name else 0.0
        for user in body.users[name]:
            if user.opcode in SLICES and user.operands[0] == name:
                used += user.shape.size
            elif user.opcode in UPDATES and user.operands[0] == name:
                pass  # replaced in place
            elif user.opcode in UNARY:
                used += size * self._needed(body, user)
            elif user.opcode == "fusion":
                inner = self.computations[user.called("calls")]
                used += self._needed(body, user) * sum(
                    self._used(inner, parameter.name)
                    for operand, parameter in zip(user.operands, inner.parameters, strict=True)
                    if operand == name
                )
            else:
                return size
        return min(used, size)

    def _needed(self, body: Computation, it: Instruction) -> float:
        """Fraction of a result that is read; 1 for a tuple."""
        return self._used(body, it.name) / it.shape.size if it.shape.dims else 1.0

    def _made(self, body: Computation, shape: Shape) -> float:
        """Bytes that a fusion writes to HBM; of an array updated in place, the update."""
        if not shape.hbm:
            return 0
        root = body.root
        if root.opcode == "tuple":
            return sum(
                self._written(body, body.instructions[name], part)
                for name, part in zip(root.operands, shape.parts, strict=True)
            )
        return self._written(body, root, shape)

    def _written(self, body: Computation, it: Instruction, shape: Shape) -> float:
        if shape.memory or it.name in self._links.get(body.name, ()):
            return 0
        while it.opcode in ("bitcast", "reshape"):
            it = body.instructions[it.operands[0]]
        if it.opcode == "fusion":
            return self._made(self.computations[it.called("calls")], shape)
        if it.opcode in UPDATES:
            return body.instructions[it.operands[UPDATES[it.opcode]]].shape.size
        return shape.hbm

    # --- arithmetic and network ---

    def _flops(self, inside: Computation, it: Instruction) -> float:
        shapes = [inside.instructions[name].shape for name in it.operands]
        if it.opcode == "dot":
            summed = math.prod(shapes[0].dims[i] for i in it.numbers("lhs_contracting_dims"))
            return 2.0 * it.shape.elements * summed
        if it.opcode == "convolution":
            return _convolution(it, shapes[0], shapes[1])
        if it.opcode == "reduce" and len(it.operands) == 2 and self._is_product(inside, it):
            return 2.0 * shapes[0].elements
        return 0

    def _is_product(self, inside: Computation, it: Instruction) -> bool:
        """Whether a reduction sums products."""
        if not any(
            i.opcode == "add" and i.root
            for i in self.computations[it.called("to_apply")].instructions.values()
        ):
            return False
        producer = inside.instructions[it.operands[0]]
        while producer.opcode in ("convert", "bitcast", "reshape", "copy", "transpose", "fusion"):
            if producer.opcode == "fusion":
                inside = self.computations[producer.called("calls")]
                producer = inside.root
            else:
                producer = inside.instructions[producer.operands[0]]
        return producer.opcode == "multiply"

    def _collective(self, inside: Computation, it: Instruction, kind: str) -> Cost:
        given = sum(inside.instructions[name].shape.size for name in it.operands)
        among = self._among(it)
        share = (among - 1) / among
        factor = {
            "all-gather": among - 1,
            "all-reduce": 2 * share,
            "reduce-scatter": share,
            "all-to-all": share,
            "ragged-all-to-all": share,
        }.get(kind, 1)
        return Cost(collectives={kind: Collective(1, given * factor)})

    def _among(self, it: Instruction) -> int:
        """Size of a collective's replica groups."""
        text = it.attributes
        if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
            return int(match[2])
        if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
            return match[1].count(",") + 1
        if match := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\] ?\{([^}]*)\}", text):
            sizes = {name: int(n) for name, n in re.findall(r"'?(\w+)'?=(\d+)", match[1])}
            # 'axis', or a part of one: 'axis':(stride)size
            axes = re.findall(r"'?([A-Za-z_]\w*)'?(?::\(\d+\)(\d+))?", match[2])
            return math.prod(int(part) if part else sizes[name] for name, part in axes)
        return max(1, self.devices)


def _target(it: Instruction) -> str:
    """Target of a custom call; empty for any other instruction."""
    target = it.attribute("custom_call_target") if it.opcode == "custom-call" else None
    return (target or "").strip('"')


def _branches(it: Instruction) -> list[str]:
    if listed := it.attribute("branch_computations"):
        return [name.strip().lstrip("%") for name in listed.split(",")]
    return [it.called("true_computation"), it.called("false_computation")]


def _estimate(it: Instruction) -> Cost | None:
    """Cost estimate that the author of a Pallas kernel gave, if any."""
    match = re.search(r'"?cost_estimate\\?"?:\s*(\{[^}]*\})', it.attributes)
    if match is None:
        return None
    estimate = json.loads(match[1].replace("\\", ""))
    size = float(estimate.get("bytes_accessed", 0))
    return Cost(flops=float(estimate.get("flops", 0)), read=size, traffic={it.name: size})


def _hbm(shape: Shape, size: float) -> float:
    return size if shape.hbm else 0


def _convolution(it: Instruction, lhs: Shape, rhs: Shape) -> float:
    """FLOPs of the products that a convolution needs, none for padding and the gaps of dilation.

    A TPU writes a batched dot as one whose "window" meets, for each output, a single input.
    """
    labels = it.attribute("dim_labels") or ""
    left, right, out = re.split(r"_|->", labels)
    window = dict(re.findall(r"(\w+)=(\S+)", it.attribute("window") or ""))
    spatial = sum(c.isdigit() for c in left)
    meets = 1.0
    for axis in range(spatial):

        def value(key, default):
            return (
                window[key].split("x")[axis] if key in window else default  # noqa: B023
            )

        low = int(value("pad", "0_0").split("_")[0])
        meets *= _meetings(
            lhs.dims[left.index(str(axis))],
            rhs.dims[right.index(str(axis))],
            it.shape.dims[out.index(str(axis))],
            int(value("stride", 1)),
            low,
            int(value("lhs_dilate", 1)),
            int(value("rhs_dilate", 1)),
        )
    groups = max(1, *(it.numbers("batch_group_count") or [1]))
    batch = lhs.dims[left.index("b")] / groups
    return 2.0 * batch * rhs.dims[right.index("i")] * rhs.dims[right.index("o")] * meets


def _meetings(
    size: int, window: int, outputs: int, stride: int, low: int, dilate: int, spread: int
) -> float:
    """Pairs of an output and a window's position at which there is an input."""
    if window == 1 and dilate == 1 and low == 0:
        return outputs
    at = np.arange(outputs, dtype=np.int64)[:, None] * stride - low
    at = at + np.arange(window, dtype=np.int64)[None] * spread
    return float(((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)).sum())
