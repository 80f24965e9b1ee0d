"""Planner: memory and roofline of a model on hardware that is not here.

A program is compiled ahead of time for a real TPU topology (libtpu's compiler needs no TPU). XLA
says what memory it takes; what it computes, moves and sends is read off the optimised program
(`hlo`). Three times follow, each as if the chip did nothing else: compute at the peak rate, memory
at the peak bandwidth, network at all links' bandwidth. The longest is the roofline: no run can be
faster, real ones are somewhat slower. GPUs are judged on paper, with nothing compiled.
"""

import itertools
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.sharding import AbstractMesh, Mesh

from sa2jax import chips
from sa2jax.chips import Topology
from sa2jax.errors import PlanError
from sa2jax.plan import hlo
from sa2jax.plan.workloads import WORKLOADS, Spec, Work, config, per_chip
from sa2jax.sharding import (
    MESH_AXES,
    batch_axis_size,
    default_axis,
    make_mesh,
    parse_mesh,
    tensor_axis_size,
)

PASSES = 6  # bfloat16 products that make one float32 product, as `Precision.HIGHEST` asks for


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one chip needs and does; bytes and seconds are of a step.

    Attributes:
        spec: what was asked for.
        topology: its full name.
        chips: how many.
        mesh: sizes of its axes.
        on_paper: nothing was compiled.
        weights: bytes of the parameters that the program reads.
        rest: bytes of the model's other parts.
        cache: bytes of keys and values.
        moments: bytes of the optimizer's memory.
        temporaries: bytes of what the program holds between its parts.
        peak: bytes at most: arguments, temporaries and results that replace no argument.
        usable: bytes that a program may fill.
        fits: whether the peak is within them.
        reason: what XLA said if not.
        note: why there is no roofline, if the program was compiled but cannot be read.
        flops: of matrix products.
        hbm_bytes: read and written.
        ideal_bytes: weights and cache once.
        collectives: count and bytes sent, by kind.
        compute, memory, network: seconds at the peak rates.
        seconds: the longest of them.
        bound: which one.
        unit: of `rate`: tokens, or seconds of sound.
        rate: made in a second by all rows.
        each: by one row.
        realtime: how many times faster than conversation a row is; 0 where that means nothing.
        compile_seconds: taken.
    """

    spec: Spec
    topology: str
    chips: int
    mesh: dict[str, int]
    on_paper: bool
    weights: float
    rest: float
    cache: float
    moments: float = 0
    temporaries: float = 0
    peak: float
    usable: float
    fits: bool
    reason: str = ""
    note: str = ""
    flops: float = 0
    hbm_bytes: float = 0
    ideal_bytes: float = 0
    collectives: dict[str, hlo.Collective]
    compute: float = 0
    memory: float = 0
    network: float = 0
    seconds: float = 0
    bound: str = ""
    unit: str = "tokens"
    rate: float = 0
    each: float = 0
    realtime: float = 0
    compile_seconds: float = 0


def plan(spec: Spec) -> Plan:
    """Compile a workload for a topology, or judge it on paper for GPUs.

    Raises:
        PlanError: for what is unknown, or a mesh of another number of chips.
        ShardingError: for a mesh that the model cannot be spread over.
    """
    where = chips.topology(spec.topology)
    sizes = mesh_sizes(spec, where.chips)
    shape = tuple(sizes.values())
    abstract = AbstractMesh(shape, MESH_AXES)
    if not spec.batch:
        spec = replace(spec, batch=batch_axis_size(abstract))
    if where.chip.kind == "gpu":
        return _on_paper(spec, where, abstract)
    mesh = make_mesh(sizes, devices=chips.devices(where))
    work = WORKLOADS[spec.workload].work(spec, mesh)
    with tempfile.TemporaryDirectory(prefix="sa2jax-") as folder:
        options: Any = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        started = time.monotonic()
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                compiled = work.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            reason = re.sub(r"(?s)^.*?(?=Ran out)|\. HLO module.*", "", str(error))
            common = _common(spec, where, mesh, work, max(needed))
            return Plan(
                **common, fits=False, reason=reason, compile_seconds=time.monotonic() - started
            )
        taken = time.monotonic() - started
        return judge(spec, where, mesh, work, compiled, Path(folder), taken)


def judge(
    spec: Spec,
    where: Topology,
    mesh: Mesh | AbstractMesh,
    work: Work,
    compiled: Any,
    folder: Path,
    taken: float,
) -> Plan:
    """A compiled program's memory, and its roofline if it can be read.

    Args:
        spec: what was asked for.
        where: what it is for.
        mesh: likewise.
        work: what it does.
        compiled: the program.
        folder: where its compiler wrote it down.
        taken: seconds to compile it.
    """
    held = compiled.memory_analysis()
    temporaries = held.temp_size_in_bytes
    peak = (
        held.argument_size_in_bytes
        + temporaries
        + held.output_size_in_bytes
        - held.alias_size_in_bytes
    )
    fields = _common(spec, where, mesh, work, peak)
    try:
        done = hlo.cost(printed(compiled, folder), turns=work.turns)
        fields |= _roofline(spec, where, work, hlo.Cost().plus(done, times=1 / work.turns))
    except PlanError as error:
        fields |= {"note": f"no roofline: {error}"}
    return Plan(
        **fields, fits=peak <= where.chip.usable, temporaries=temporaries, compile_seconds=taken
    )


def printed(compiled: Any, folder: Path) -> str:
    """The optimised HLO of a compiled program.

    The compiler's own file is taken first: jaxlib 0.10 refuses to print programs in which a chip's
    sparse core runs a part, as on v6e in training, for an `async-update` of several operands.

    Args:
        compiled: the program.
        folder: given to the compiler as `xla_dump_to`.

    Raises:
        PlanError: if there is no file, and jaxlib cannot print it either.
    """
    files = list(folder.glob("*.after_optimizations.txt"))
    if files:
        return max(files, key=lambda path: path.stat().st_size).read_text()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    if not text:
        raise PlanError(f"jaxlib {jaxlib.__version__} cannot print the compiled program")
    return text


def search(spec: Spec, progress: Callable[[Plan], None] | None = None) -> list[Plan]:
    """Find the fewest chips that hold a workload, and the fastest mesh of them.

    Args:
        spec: its topology names the kinds of chip to try, such as `v5e` or `v5e,v6e`; a mesh, if
            there is one, is the only one tried.
        progress: called with each plan.

    Returns:
        All plans that were made, the best first.

    Raises:
        PlanError: if no topology holds it.
    """
    kinds = [name.split(":")[0].strip() for name in spec.topology.split(",")]
    places = sorted(
        (place for kind in kinds for place in chips.topologies(kind)), key=lambda place: place.chips
    )
    tried: list[Plan] = []
    for _, group in itertools.groupby(places, key=lambda place: place.chips):
        for place in group:
            for mesh in [spec.mesh] if spec.mesh else meshes(spec, place.chips):
                if spec.mesh and math.prod(parse_mesh(spec.mesh).values()) != place.chips:
                    continue
                result = plan(replace(spec, topology=place.name, mesh=mesh))
                tried.append(result)
                if progress is not None:
                    progress(result)
        if any(result.fits for result in tried):
            return sorted(tried, key=lambda result: (not result.fits, result.seconds or math.inf))
    largest = places[-1].name
    raise PlanError(
        f"{spec.workload} with batch {spec.batch} fits on no {spec.topology}, not even on {largest}"
    )


def meshes(spec: Spec, count: int) -> Iterator[str]:
    """Meshes of so many chips that make sense for a workload.

    A batch is split over data and fsdp and must divide. What is only read is kept whole on each
    data replica, so inference leaves fsdp alone. More tensor shards than key heads double as many
    of them, more than heads do not work.
    """
    heads = config(spec).decoder.heads
    for tensor in range(1, count + 1):
        if count % tensor or tensor > heads:
            continue
        rows = count // tensor
        for fsdp in range(1, rows + 1):
            if rows % fsdp or (spec.batch or rows) % rows or (fsdp > 1 and not spec.training):
                continue
            yield f"data={rows // fsdp},fsdp={fsdp},tensor={tensor}"


def mesh_sizes(spec: Spec, count: int) -> dict[str, int]:
    """Sizes of all axes of a spec's mesh.

    Raises:
        PlanError: if they do not multiply to the number of chips.
    """
    usual = default_axis(training=spec.training)
    given = {usual: count} if spec.mesh is None else parse_mesh(spec.mesh)
    if unknown := set(given) - set(MESH_AXES):
        raise PlanError(
            f"mesh {spec.mesh!r}: no axis {', '.join(sorted(unknown))}; expected "
            f"{', '.join(MESH_AXES)}"
        )
    sizes = {axis: given.get(axis, 1) for axis in MESH_AXES}
    if math.prod(sizes.values()) != count:
        raise PlanError(
            f"mesh {spec.mesh!r} is of {math.prod(sizes.values())} chips, but {spec.topology} "
            f"has {count}: expected sizes that multiply to {count}"
        )
    return sizes


def out_of_memory(message: str) -> list[float] | None:
    """Bytes that XLA's message says are needed; None if it is about something else."""
    if "RESOURCE_EXHAUSTED" not in message or "out of memory" not in message.lower():
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    matches = re.findall(
        r"\(([\d.]+)([KMGT]?)i?B?\) exceeds|Used ([\d.]+)([KMGT]?)i?B? of", message
    )
    sizes = [float(a or c) * units[b or d] for a, b, c, d in matches]
    return sizes or [math.inf]


def _common(
    spec: Spec, where: Topology, mesh: Mesh | AbstractMesh, work: Work, peak: float
) -> dict[str, Any]:
    return dict(
        spec=spec,
        topology=where.name,
        chips=where.chips,
        mesh=dict(mesh.shape),
        on_paper=where.chip.kind == "gpu",
        weights=per_chip(work.weights),
        rest=per_chip(work.rest),
        cache=per_chip(work.cache),
        moments=per_chip(work.moments),
        peak=peak,
        unit=work.unit,
        usable=where.chip.usable,
        ideal_bytes=work.ideal,
        collectives={},
    )


def _roofline(spec: Spec, where: Topology, work: Work, step: hlo.Cost) -> dict[str, Any]:
    """Times of a step at the peak rates, and what follows from them."""
    chip, slow = where.chip, PASSES if work.exact else 1
    times = {
        "compute": (step.flops - step.flops8) * slow / chip.bf16 + step.flops8 / chip.int8,
        "memory": step.hbm / chip.bandwidth,
        "network": step.sent / where.network if where.network else 0.0,
    }
    bound = max(times, key=lambda name: times[name])
    rate = work.output / times[bound]
    return dict(
        flops=step.flops,
        hbm_bytes=step.hbm,
        collectives=step.collectives,
        **times,
        seconds=times[bound],
        bound=bound,
        rate=rate,
        each=rate / spec.batch,
        realtime=rate / spec.batch / work.real if work.real else 0.0,
    )


def _on_paper(spec: Spec, where: Topology, mesh: AbstractMesh) -> Plan:
    """Decode and prefill by what any program must do: weights and cache once, no temporaries."""
    if spec.workload not in ("decode", "prefill"):
        raise PlanError(
            f"{spec.workload} on {where.name}: GPUs are judged on paper, decode and prefill only"
        )
    work = WORKLOADS[spec.workload].work(spec, mesh)
    cfg = config(spec).decoder
    ways = tensor_axis_size(mesh)
    tokens = spec.length if spec.workload == "prefill" else 1
    rows = spec.batch / batch_axis_size(mesh)
    width = cfg.heads * cfg.head_dim
    layer = 2 * cfg.embed * width + 2 * cfg.embed * cfg.kv_heads * cfg.head_dim
    layer += 3 * cfg.embed * cfg.mlp
    # Logits are needed for the last token only; of a prompt, a token sees half the others.
    products = tokens * cfg.layers * layer + cfg.vocab * cfg.embed
    seen = spec.length / 2 if tokens > 1 else spec.length
    products += tokens * cfg.layers * 2 * width * seen
    half = 4 if spec.dtype == "float32" else 2
    share = 2 * (ways - 1) / ways
    sent = cfg.layers * 2 * rows * tokens * cfg.embed * half * share
    reduced = hlo.Collective(2 * cfg.layers, sent)
    step = hlo.Cost(
        flops=2 * rows * products / ways,
        read=work.ideal,
        collectives={"all-reduce": reduced} if ways > 1 else {},
    )
    peak = per_chip(work.weights) + per_chip(work.cache)
    common = _common(spec, where, mesh, work, peak)
    return Plan(**common | _roofline(spec, where, work, step), fits=peak <= where.chip.usable)
