"""The command `plan`: memory and roofline on hardware that is not here."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from sa2jax.cli import common

if TYPE_CHECKING:
    from sa2jax.plan import Plan

GIB = 2**30


def plan(
    *,
    topology: str = "v5e:1x1",
    workload: Literal["decode", "prefill", "encode", "token2wav", "train", "lora"] = "decode",
    batch: int | None = None,
    length: int | None = None,
    dtype: Literal["bfloat16", "int8", "float32"] = "bfloat16",
    float_head: bool = False,
    int8_cache: bool = False,
    mesh: str | None = None,
    model: str = "mini",
    search: bool = False,
    json: bool = False,
):
    """Tell whether a model fits on a TPU or GPU that is not here, and how fast it can be.

    For TPUs the program is compiled as for the real thing, which needs libtpu but no TPU. GPUs are
    judged on paper. Times are a roofline: no run is faster.

    Args:
        topology: Chips, such as v5e:2x4 or h100:8; with --search, kinds, such as v5e,v6e.
        workload: What to run.
        batch: Rows at once, of all chips together: conversations, prompts, clips. By default one;
            in training one for each part that a batch is split into.
        length: Of each: slots of decode's cache (by default 4096), tokens of a prompt (2048) or of
            a training sequence (4096, LoRA 2048), seconds of a clip (25) or of speech (10).
        dtype: Of weights and computation; int8 is that of the matrices alone. In training that of
            the parameters: float32 ones are master weights.
        float_head: With int8, keep the matrix that makes logits in bfloat16.
        int8_cache: Keep keys and values as int8.
        mesh: How to spread, such as data=2,tensor=4; by default all on one axis.
        model: Preset from configs/models, or a folder with a config.json.
        search: Find the fewest chips that hold it, and the fastest mesh of them.
        json: Print JSON.
    """
    common.use_cpu()
    from sa2jax import plan as planning
    from sa2jax.errors import PlanError

    for name, value in (("length", length), ("batch", batch)):
        if value is not None and value < 1:
            raise PlanError(f"{name} {value}: expected at least 1")
    spec = planning.Spec(
        model=model,
        topology=topology,
        workload=workload,
        batch=batch or 0,
        length=length or 0,
        dtype=dtype,
        float_head=float_head,
        int8_cache=int8_cache,
        mesh=mesh,
    )
    if not search:
        plans = [planning.plan(spec)]
    else:
        plans = planning.search(spec, lambda result: common.log(_line(result)))
    if json:
        common.print_json(asdict(plans[0]))
    else:
        common.wide_console().print(_table(plans[0]))


def _line(result: "Plan") -> str:
    """One plan of a search."""
    sizes = ",".join(f"{axis}={size}" for axis, size in result.mesh.items() if size > 1)
    head = f"{result.topology} {sizes or 'one chip'}: {result.peak / GIB:.2f} GiB"
    if not result.fits:
        return f"{head} of {result.usable / GIB:.2f}, does not fit"
    return f"{head}, {1e3 * result.seconds:.3g} ms" if result.bound else head


def _table(result: "Plan") -> Table:
    """A plan as a table."""
    from sa2jax.plan.workloads import WORKLOADS

    spec = result.spec
    how = "on paper" if result.on_paper else f"compiled in {result.compile_seconds:.1f} s"
    table = Table(
        title=f"{spec.workload} of {spec.model}, {spec.dtype}, on {result.topology} ({how})",
        show_header=False,
        title_justify="left",
    )

    def size(bytes_: float) -> str:
        return f"{bytes_ / GIB:.2f} GiB"

    def part(seconds: float) -> str:
        return f"{1e3 * seconds:.3g} ms"

    sizes = ", ".join(f"{axis} {count}" for axis, count in result.mesh.items() if count > 1)
    table.add_row("batch", f"{spec.batch}, each {spec.length} {WORKLOADS[spec.workload].counted}")
    table.add_row("mesh", sizes or "one chip")
    table.add_row("fits", "yes" if result.fits else f"no: {result.reason or 'too large'}")
    table.add_row("memory per chip", f"{size(result.peak)} of {size(result.usable)}")
    table.add_row("  weights", size(result.weights))
    if result.cache:
        table.add_row("  cache", size(result.cache))
    if result.moments:
        table.add_row("  optimizer", size(result.moments))
    if not result.on_paper and (result.bound or result.note):
        table.add_row("  temporaries", size(result.temporaries))
    if result.rest:
        table.add_row("rest of the model", f"{size(result.rest)}, not counted above")
    if result.note:
        table.add_row("roofline", result.note)
    if not result.bound:
        return table
    table.add_row("matrix products", f"{result.flops / 1e9:.4g} GFLOP a step")
    moved = f"{result.hbm_bytes / 1e9:.4g} GB a step"
    if not result.on_paper and result.ideal_bytes:
        moved += f", {result.hbm_bytes / result.ideal_bytes:.3f} times weights and cache"
    table.add_row("memory traffic", moved)
    for kind, done in result.collectives.items():
        table.add_row(kind, f"{done.count:.4g}, {done.bytes / 1e6:.4g} MB sent a step")
    times = f"compute {part(result.compute)}, memory {part(result.memory)}, "
    table.add_row("roofline", f"{times}network {part(result.network)}")
    table.add_row("step", f"{part(result.seconds)}, bound by {result.bound}")
    table.add_row("rate", f"{result.rate:.4g} {result.unit}/s, {result.each:.4g} of each row")
    if result.realtime:
        table.add_row("real time", f"{result.realtime:.3g} x")
    return table
