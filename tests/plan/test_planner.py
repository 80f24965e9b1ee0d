"""Plans: what is refused, arithmetic on paper, and programs compiled for TPUs that are not here."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxlib
import pytest
from helpers.devices import needs_libtpu
from jax import ShapeDtypeStruct
from jax.sharding import AbstractMesh, SingleDeviceSharding

from sa2jax import chips
from sa2jax.chips import CHIPS, GIB
from sa2jax.errors import PlanError, ShardingError
from sa2jax.plan import Spec, hlo
from sa2jax.plan import planner as plan
from sa2jax.plan.workloads import Work, Workload

GPU = Spec(topology="h100")
ONE = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))


# --- bad input ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"workload": "dance"},
            "unknown workload 'dance'; known: decode, prefill, encode",
        ),
        ({"dtype": "int4"}, "dtype 'int4': expected bfloat16, int8, float32"),
        ({"batch": -2}, "batch -2, length 0: expected at least 1, or 0"),
        ({"length": -1}, "batch 0, length -1"),
    ],
)
def test_bad_spec(wrong, message):
    with pytest.raises(PlanError, match=message):
        Spec(**wrong)


@pytest.mark.parametrize(
    ("mesh", "topology", "message"),
    [
        ("tensor=4", "v5e:2x4", "mesh 'tensor=4' is of 4 chips, but v5e:2x4 has 8"),
        ("data=2,tensor=2", "h100:8", "mesh 'data=2,tensor=2' is of 4 chips, but h100:8 has 8"),
        ("model=8", "v5e:2x4", "mesh 'model=8': no axis model; expected data, fsdp, tensor"),
    ],
)
def test_mesh_of_other_chips(mesh, topology, message):
    with pytest.raises(PlanError, match=message):
        plan.plan(Spec(topology=topology, mesh=mesh))


def test_more_shards_than_heads():
    with pytest.raises(ShardingError, match="8 tensor shards for 4 heads"):
        plan.plan(Spec(model="tiny", topology="h100:8"))


def test_unknown_topology_comes_first():
    with pytest.raises(PlanError, match="unknown topology 'v9:1'; known: v4"):
        plan.plan(Spec(topology="v9:1", mesh="tensor=3"))


@pytest.mark.parametrize("workload", ["encode", "token2wav"])
def test_gpus_are_for_the_language_model(workload):
    with pytest.raises(PlanError, match=f"{workload} on h100:1: GPUs are judged on paper"):
        plan.plan(replace(GPU, workload=workload))


def test_usual_lengths():
    assert [Spec(workload=kind).length for kind in ("decode", "prefill", "encode")] == [
        4096,
        2048,
        25,
    ]
    assert Spec(length=64).length == 64


# --- arithmetic ---


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (16.65G) exceeds available HBM (15.75G). HLO "
            "module: jit_f",
            [16.65 * GIB],
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 45.21G of 31.24G hbm.",
            [45.21 * GIB],
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory, no more is known", [math.inf]),
        ("RESOURCE_EXHAUSTED: too many requests", None),
        ("INVALID_ARGUMENT: Ran out of memory", None),
    ],
)
def test_what_xla_says_when_memory_is_short(message, sizes):
    assert plan.out_of_memory(message) == sizes


def work(**changes) -> Work:
    def never():
        return pytest.fail("nothing is compiled here")

    return Work(
        **{"lower": never, "weights": {}, "ideal": 1.0, "output": 4, "real": 31.25} | changes
    )


@pytest.mark.parametrize(
    ("step", "bound", "seconds"),
    [
        (hlo.Cost(flops=197e12), "compute", 1.0),
        (hlo.Cost(flops=393e12, flops8=393e12), "compute", 1.0),
        (hlo.Cost(flops=1e12, read=400e9, written=419e9), "memory", 1.0),
        (hlo.Cost(collectives={"all-reduce": hlo.Collective(3, 100e9)}), "network", 1.0),
    ],
)
def test_roofline(step, bound, seconds):
    spec = Spec(topology="v5e:2x2", batch=4)
    made = plan._roofline(spec, chips.topology("v5e:2x2"), work(), step)
    assert made["bound"] == bound
    assert made["seconds"] == made[bound] == pytest.approx(seconds)
    assert made["rate"] == pytest.approx(4)
    assert made["each"] == pytest.approx(1)
    assert made["realtime"] == pytest.approx(1 / 31.25)


def test_float32_takes_six_products():
    step, place = hlo.Cost(flops=197e12), chips.topology("v5e:1x1")
    made = plan._roofline(Spec(dtype="float32"), place, replace(work(), exact=True), step)
    assert made["compute"] == pytest.approx(6)


def test_decode_on_paper():
    """Weights and cache over bandwidth, by hand for mini: 7.07 G numbers besides the table."""
    made = plan.plan(GPU)
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    small = (3584 + 2 * 512) + 2 * 3584  # biases and norms
    weights = 2 * (28 * (layer + small) + 3584 + 158720 * 3584 + 3584)
    cache = 2 * 2 * 28 * 4096 * 512
    assert made.on_paper
    assert made.fits
    assert made.ideal_bytes == made.hbm_bytes == weights + cache
    assert made.cache == cache
    assert made.weights == weights - 2 * 3584 + 2 * 158720 * 3584  # all rows of the table
    assert made.bound == "memory"
    assert made.seconds == pytest.approx((weights + cache) / CHIPS["h100"].bandwidth)
    assert made.flops == pytest.approx(2 * weights / 2 + 4 * 28 * 3584 * 4096, rel=1e-3)
    assert made.each == made.rate == pytest.approx(1 / made.seconds)
    assert made.realtime == pytest.approx(made.each / 31.25)
    assert made.collectives == {}


def test_shards_on_paper():
    one, four = plan.plan(GPU), plan.plan(Spec(topology="h100:4"))
    assert four.cache == one.cache / 4
    assert four.weights == pytest.approx(one.weights / 4, rel=1e-3)
    assert four.collectives["all-reduce"].count == 56
    assert four.network > 0


def test_int8_on_paper():
    whole, small = plan.plan(GPU), plan.plan(replace(GPU, dtype="int8"))
    assert 0.5 < small.weights / whole.weights < 0.56  # the table stays bfloat16


def test_prefill_on_paper():
    made = plan.plan(replace(GPU, workload="prefill", length=1024))
    assert made.bound == "compute"
    assert made.rate == pytest.approx(1024 / made.seconds)
    assert made.realtime == 0
    assert made.flops == pytest.approx(2 * 1024 * 6.53e9, rel=0.03)
    with pytest.raises(PlanError, match="--batch 2: expected 1; a prompt is read at a time"):
        plan.plan(replace(GPU, workload="prefill", batch=2))


def test_too_large_on_paper():
    made = plan.plan(Spec(topology="t4", batch=8))
    assert not made.fits
    assert made.peak > made.usable


def test_json():
    made = asdict(plan.plan(replace(GPU, topology="h100:2")))
    assert json.loads(json.dumps(made)) == made | {"collectives": made["collectives"]}


# --- what a compiler leaves ---

PROGRAM = """HloModule m

ENTRY %main (p: f32[]) -> f32[] {
  %p = f32[1000000]{0} parameter(0)
  ROOT %n = f32[1000000]{0} negate(%p)
}
"""


class Compiled:
    """A program with memory, and text unless that is None."""

    def __init__(self, text: str | None):
        self.text = text

    def memory_analysis(self):
        return SimpleNamespace(
            argument_size_in_bytes=5 * GIB,
            temp_size_in_bytes=2 * GIB,
            output_size_in_bytes=4 * GIB,
            alias_size_in_bytes=3 * GIB,
        )

    def as_text(self) -> str:
        if self.text is None:
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")
        return self.text


def judged(compiled: Compiled, folder: Path) -> plan.Plan:
    place = chips.topology("v5e:1x1")
    here = SingleDeviceSharding(jax.devices()[0])
    weights = {"w": ShapeDtypeStruct((GIB,), jnp.int8, sharding=here)}
    return plan.judge(
        Spec(), place, ONE, work(weights=weights, moments=weights), compiled, folder, 7.5
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, f"jaxlib {jaxlib.__version__} cannot print the compiled program"),
        (PROGRAM.replace("f32[1", "wide[1"), "unknown type in the compiled program: 'wide'"),
    ],
)
def test_program_that_cannot_be_read(text, why, tmp_path):
    """What it needs is known all the same."""
    made = judged(Compiled(text), tmp_path)
    assert made.note == f"no roofline: {why}"
    assert made.fits
    assert (made.peak, made.temporaries) == (8 * GIB, 2 * GIB)
    assert made.weights == made.moments == GIB
    assert made.compile_seconds == 7.5
    assert made.bound == ""
    assert made.flops == made.hbm_bytes == made.seconds == made.rate == made.network == 0
    assert made.collectives == {}


def test_text_of_a_program(tmp_path):
    made = judged(Compiled(PROGRAM), tmp_path)
    assert (made.note, made.bound, made.hbm_bytes) == ("", "memory", 8e6)


def test_the_compilers_own_text_is_taken_first(tmp_path):
    name = "module_0000.jit_f.after_optimizations{}.txt"
    (tmp_path / name.format("")).write_text(PROGRAM)
    (tmp_path / name.format("_before_buffer_assignment")).write_text("another")
    (tmp_path / "module_0001.jit_g.after_optimizations.txt").write_text("a small one")
    assert judged(Compiled(None), tmp_path).hbm_bytes == 8e6


def test_plan_of_a_program_that_cannot_be_read(monkeypatch):
    compiling = SimpleNamespace(compile=lambda compiler_options: Compiled(None))
    broken = Workload(lambda spec, mesh: work(lower=lambda: compiling), 4096, "slots")
    monkeypatch.setitem(plan.WORKLOADS, "decode", broken)
    monkeypatch.setattr(chips, "devices", lambda where: None)
    monkeypatch.setattr(plan, "make_mesh", lambda sizes, devices: ONE)
    made = plan.plan(Spec())
    assert made.fits
    assert made.note.endswith("cannot print the compiled program")
    assert json.loads(json.dumps(asdict(made)))["bound"] == ""


# --- search ---


def test_meshes():
    def of(count, **changes):
        return list(plan.meshes(Spec(**changes), count))

    assert of(4) == ["data=1,fsdp=1,tensor=4"]  # one row cannot be split
    assert of(4, batch=2) == ["data=2,fsdp=1,tensor=2", "data=1,fsdp=1,tensor=4"]
    assert "data=1,fsdp=4,tensor=1" in of(4, batch=4, workload="train")
    assert of(64, batch=2) == []  # 32 tensor shards of 28 heads


def test_search_takes_the_fewest_chips():
    tried = plan.search(Spec(topology="t4,l4", batch=8))
    best = tried[0]
    assert best.fits
    assert not any(made.fits for made in tried if made.chips < best.chips)
    assert {made.spec.topology.split(":")[0] for made in tried} == {"t4", "l4"}


def test_search_takes_the_fastest_mesh():
    tried = plan.search(Spec(topology="l4", batch=32))
    alike = [made for made in tried if made.fits]
    assert tried[0].chips == 2
    assert tried[0].mesh["tensor"] == 2  # the weights are read by both
    assert tried[0].seconds == min(made.seconds for made in alike)


def test_search_keeps_to_a_mesh():
    seen = []
    tried = plan.search(Spec(topology="h100", mesh="tensor=4"), seen.append)
    assert seen == tried
    assert [made.topology for made in tried] == ["h100:4"]


def test_search_puts_what_cannot_be_read_last(monkeypatch):
    real = plan.plan

    def unread(spec):
        return replace(real(spec), seconds=0, bound="")

    def pick(spec):
        return unread(spec) if "tensor=1" in spec.mesh else real(spec)

    monkeypatch.setattr(plan, "plan", pick)
    tried = plan.search(Spec(topology="l4", batch=32))
    fitting = [made for made in tried if made.fits]
    assert [made.bound for made in fitting][-1] == ""
    assert fitting[0].bound


def test_nothing_is_large_enough():
    with pytest.raises(PlanError, match="decode with batch 2000 fits on no t4, not even on t4:8"):
        plan.search(Spec(topology="t4", batch=2000))


# --- compiled ---


@pytest.mark.slow
@needs_libtpu
def test_text_where_a_sparse_core_gathers(tmp_path):
    """Of a program that jaxlib 0.10 cannot print."""
    where = SingleDeviceSharding(chips.devices(chips.topology("v6e:1x1"))[0])

    def place(shape, dtype):
        return ShapeDtypeStruct(shape, dtype, sharding=where)

    table, rows = place((158720, 896), jnp.bfloat16), place((4, 4096), jnp.int32)
    matrix = place((4096, 4096), jnp.bfloat16)
    lowered = jax.jit(lambda t, i, m: (t[i], m @ m)).lower(table, rows, matrix)
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options=options)
    text = plan.printed(compiled, tmp_path)
    assert "gather_offload" in text
    done = hlo.cost(text)
    assert done.flops == 2 * 4096**3
    gathered, product = 2 * 4 * 4096 * 896, 3 * 2 * 4096**2
    assert 2 * gathered <= done.hbm <= 1.05 * (2 * gathered + product)


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit():
    made = plan.plan(Spec(topology="v5e:1x1", batch=32))
    assert not made.fits
    assert made.peak == pytest.approx(21.3 * GIB, rel=0.01)
    assert made.reason.startswith("Ran out of memory on HBM")
    assert made.rate == 0


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("workload", ["prefill", "encode"])
def test_small_programs(workload):
    length = {"prefill": 256, "encode": 2}[workload]
    made = plan.plan(Spec(model="tiny", topology="v5e:1x1", workload=workload, length=length))
    assert made.fits
    assert made.flops > 0
    assert made.rate > 0
    assert made.unit == {"prefill": "tokens", "encode": "seconds"}[workload]


@pytest.mark.slow
@needs_libtpu
def test_search_compiles():
    tried = plan.search(Spec(model="tiny", topology="v5e", length=256))
    assert [made.topology for made in tried] == ["v5e:1x1"]
    assert jax.default_backend() != "tpu"


@pytest.mark.slow
@needs_libtpu
def test_token2wav_is_traced():
    """Compiling it takes minutes."""
    from sa2jax.plan.workloads import per_chip, token2wav
    from sa2jax.sharding import make_mesh

    spec = Spec(workload="token2wav", length=1)
    mesh = make_mesh("tensor=1", devices=chips.devices(chips.topology(spec.topology)))
    made = token2wav(spec, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        wave = made.lower().out_info
    assert wave.shape == (1, 24000)
    assert made.ideal == per_chip(made.weights) > 0.3 * GIB
    with pytest.raises(PlanError, match="token2wav in int8: expected bfloat16 or float32"):
        token2wav(replace(spec, dtype="int8"), mesh)
