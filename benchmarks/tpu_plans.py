"""The table of docs/tpu.md: mini compiled for TPU topologies, one line of Markdown for each plan.

python benchmarks/tpu_plans.py [decode|prefill|encode|train|lora …] >> plans.md
"""

import sys

from sa2jax.cli.common import use_cpu
from sa2jax.errors import Sa2jaxError
from sa2jax.plan import Plan, Spec
from sa2jax.plan import planner as plan

GIB = 2**30
ONE, FOUR, EIGHT = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1"), ("v5e:2x2", "v6e:2x2"), ("v5e:2x4",)
READING = [*ONE, *FOUR, *EIGHT]
TRAINING = {
    "train": [
        ("v5e:2x4", "bfloat16"),
        ("v6e:2x2", "bfloat16"),
        ("v6e:2x4", "float32"),
        ("v5p:2x2x1", "float32"),
        ("v5e:8x8", "float32"),
        ("v6e:8x8", "float32"),
        ("v5p:4x4x4", "float32"),
    ],
    "lora": [
        ("v6e:1x1", "bfloat16"),
        ("v5e:1x1", "int8"),
        ("v6e:1x1", "int8"),
        ("v5p:1x1x1", "bfloat16"),
    ],
}
SPECS = {
    "decode": [
        Spec(topology=topology, dtype=dtype, batch=batch)
        for topology in READING
        for dtype in ("bfloat16", "int8")
        for batch in (1, 8, 32)
    ]
    + [
        Spec(topology=topology, dtype="bfloat16", batch=batch, mesh=mesh)
        for topology, mesh, batch in (
            ("v5e:4x4", "data=4,tensor=4", 32),
            ("v5e:8x8", "data=16,tensor=4", 128),
            ("v6e:8x8", "data=16,tensor=4", 128),
            ("v5p:4x4x4", "data=64", 256),
        )
    ],
    "prefill": [
        Spec(topology=topology, dtype=dtype, workload="prefill")
        for topology in READING
        for dtype in ("bfloat16", "int8")
    ],
    "encode": [Spec(topology=topology, workload="encode") for topology in ONE],
} | {
    workload: [Spec(topology=topology, dtype=dtype, workload=workload) for topology, dtype in where]
    for workload, where in TRAINING.items()
}


def command(spec: Spec) -> str:
    """What a user types for it."""
    words = [f"--topology {spec.topology} --workload {spec.workload}"]
    words += [f"--batch {spec.batch}"] if spec.batch > 1 else []
    words += [f"--dtype {spec.dtype}"] if spec.dtype != "bfloat16" else []
    words += [f"--mesh {spec.mesh}"] if spec.mesh else []
    return " ".join(words)


def line(made: Plan) -> str:
    """A row of the table."""
    sizes = ",".join(f"{axis}={size}" for axis, size in made.mesh.items() if size > 1) or "1"
    cells = [made.topology, sizes, made.spec.dtype, str(made.spec.batch)]
    cells.append(f"{made.peak / GIB:.1f} / {made.usable / GIB:.1f}{'' if made.fits else ' **no**'}")
    if made.bound:
        ratio = f"{made.hbm_bytes / made.ideal_bytes:.2f}" if made.ideal_bytes else ""
        cells += [ratio, f"{1e3 * made.seconds:.3g}", made.bound, rounded(made.rate)]
        cells.append(rounded(made.realtime) if made.realtime else "")
    else:
        cells += [""] * 5
    return f"| {' | '.join(cells)} | `{command(made.spec)}` |"


def rounded(x: float) -> str:
    """Three or more digits, thousands apart."""
    return f"{float(f'{x:.4g}'):,.0f}".replace(",", " ") if x >= 100 else f"{x:.3g}"


def main(workloads: list[str]) -> None:
    """Print the rows of some workloads as they are made."""
    use_cpu()
    for name in workloads or SPECS:
        for spec in SPECS[name]:
            try:
                print(line(plan.plan(spec)), flush=True)
            except Sa2jaxError as error:
                print(f"{command(spec)}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
