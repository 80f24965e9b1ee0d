"""Counting what a compiled program does: rule by rule, on a CPU, and on a TPU's compiler."""

import jax
import jax.numpy as jnp
import pytest
from helpers.devices import needs_libtpu
from helpers.hlo_programs import entry
from jax import ShapeDtypeStruct as Abstract

from sa2jax.errors import PlanError
from sa2jax.plan import hlo


def test_dot():
    done = entry("""
        %a = bf16[3,8,16]{2,1,0} parameter(0)
        %b = bf16[3,16,32]{2,1,0} parameter(1)
        ROOT %dot.1 = f32[3,8,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
    """)
    assert done.flops == 2 * 3 * 8 * 16 * 32
    assert done.flops8 == 0
    assert done.read == 2 * 3 * (8 * 16 + 16 * 32)
    assert done.written == 4 * 3 * 8 * 32
    assert done.traffic == {"dot.1": done.hbm}


def test_dot_of_int8():
    done = entry("""
        %a = s8[8,16]{1,0} parameter(0)
        %b = s8[16,32]{1,0} parameter(1)
        ROOT %dot.1 = s32[8,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    """)
    assert done.flops8 == done.flops == 2 * 8 * 16 * 32
    assert done.read == 8 * 16 + 16 * 32


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "pairs"),
    [
        ("8,16", "16,32", "8,32", "dim_labels=bf_io->bf", 8 * 16 * 32),
        # A kernel of 3 over 10 positions without and with padding, and every second position.
        ("1,10,4", "3,4,5", "1,8,5", "window={size=3}, dim_labels=b0f_0io->b0f", 8 * 3 * 20),
        ("1,10,4", "3,4,5", "1,10,5", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 28 * 20),
        ("1,10,4", "3,4,5", "1,4,5", "window={size=3 stride=2}, dim_labels=b0f_0io->b0f", 12 * 20),
        (
            "1,10,4",
            "3,4,5",
            "1,6,5",
            "window={size=3 rhs_dilate=2}, dim_labels=b0f_0io->b0f",
            6 * 3 * 20,
        ),
        # Each group of inputs has outputs of its own.
        (
            "1,10,4",
            "3,1,4",
            "1,8,4",
            "window={size=3}, dim_labels=b0f_0io->b0f, feature_group_count=4",
            8 * 3 * 4,
        ),
        # A TPU's batched dot: 4 of [7, 4096] x [4096, 128].
        (
            "4,7,4096",
            "4,4096,128",
            "4,7,128",
            "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            4 * 7 * 4096 * 128,
        ),
    ],
)
def test_convolution(lhs, rhs, out, attributes, pairs):
    done = entry(f"""
        %a = bf16[{lhs}] parameter(0)
        %b = bf16[{rhs}] parameter(1)
        ROOT %c = bf16[{out}] convolution(%a, %b), {attributes}
    """)
    assert done.flops == 2 * pairs


def test_product_with_a_vector():
    """A TPU multiplies a matrix and one vector element by element, then sums."""
    done = entry(
        """
        %w = bf16[2,64,32]{2,1,0} parameter(0)
        %x = bf16[32]{0} parameter(1)
        %i = s32[]{:S(6)} parameter(2)
        ROOT %f = bf16[64]{0} fusion(%w, %x, %i), kind=kLoop, calls=%fused
        """,
        """
        %add (l: f32[], r: f32[]) -> f32[] {
          %l = f32[] parameter(0)
          %r = f32[] parameter(1)
          ROOT %s = f32[] add(%l, %r)
        }
        %fused (w: bf16[2,64,32], x: bf16[32], i: s32[]) -> bf16[64] {
          %w.1 = bf16[2,64,32]{2,1,0} parameter(0)
          %x.1 = bf16[32]{0} parameter(1)
          %i.1 = s32[] parameter(2)
          %zero = s32[] constant(0)
          %one = bf16[1,64,32]{2,1,0} dynamic-slice(%w.1, %i.1, %zero, %zero), dynamic_slice_sizes={1,64,32}
          %b = bf16[64,32]{1,0} bitcast(%one)
          %bx = bf16[64,32]{1,0} broadcast(%x.1), dimensions={1}
          %m = bf16[64,32]{1,0} multiply(%b, %bx)
          %mf = f32[64,32]{1,0} convert(%m)
          %none = f32[] constant(0)
          %r.1 = f32[64]{0} reduce(%mf, %none), dimensions={1}, to_apply=%add
          ROOT %c = bf16[64]{0} convert(%r.1)
        }
        """,
    )
    assert done.flops == 2 * 64 * 32
    assert done.read == 2 * (64 * 32 + 32)  # one layer of the two
    assert done.written == 2 * 64


# --- memory ---


def test_other_memories_cost_nothing():
    done = entry("""
        %a = f32[8,128]{1,0:T(8,128)} parameter(0)
        %s = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
        %d = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%s)
        %n = f32[8,128]{1,0:T(8,128)S(1)} negate(%d)
        %e = f32[8,128]{1,0:T(8,128)S(1)} exponential(%n)
        ROOT %r = f32[8,128]{1,0:T(8,128)} add(%e, %n)
    """)
    assert (done.read, done.written) == (4096, 4096)  # fetched once, written once
    assert set(done.traffic) == {"s", "r"}


def test_what_moves_nothing():
    done = entry("""
        %a = f32[8,128]{1,0} parameter(0)
        %c = f32[8,128]{1,0} constant({...})
        %t = (f32[8,128]{1,0}, /*index=1*/f32[8,128]{1,0}) tuple(%a, %c)
        %g = f32[8,128]{1,0} get-tuple-element(%t), index=1
        ROOT %b = f32[1024]{0} bitcast(%g)
    """)
    assert done.hbm == done.flops == 0


def test_slices_and_updates():
    done = entry("""
        %a = f32[100,128]{1,0} parameter(0)
        %i = s32[4]{0} parameter(1)
        %k = s32[]{:S(6)} parameter(2)
        %s = f32[2,128]{1,0} dynamic-slice(%a, %k, %k), dynamic_slice_sizes={2,128}
        %g = f32[4,128]{1,0} gather(%a, %i), offset_dims={1}
        ROOT %u = f32[100,128]{1,0} dynamic-update-slice(%a, %s, %k, %k)
    """)
    assert done.traffic == {"s": 2 * 1024, "g": 2 * 2048 + 16, "u": 2 * 1024}


FUSED_UPDATE = """
    %inner (x: f32[100,128]) -> f32[1,128] {
      %x = f32[100,128]{1,0} parameter(0)
      ROOT %s = f32[1,128]{1,0} slice(%x), slice={[3:4], [0:128]}
    }
    %fused (c: f32[100,128], d: f32[100,128], v: f32[1,128], i: s32[]) -> (f32[100,128], f32[1]) {
      %c = f32[100,128]{1,0} parameter(0)
      %d = f32[100,128]{1,0} parameter(1)
      %v = f32[1,128]{1,0} parameter(2)
      %i = s32[] parameter(3)
      %n = f32[1,128]{1,0} fusion(%d), kind=kLoop, calls=%inner
      %m = f32[1,128]{1,0} add(%n, %v)
      %u = f32[100,128]{1,0} dynamic-update-slice(%c, %m, %i, %i)
      %o = f32[1]{0} slice(%v), slice={[0:1], [0:1]}
      ROOT %t = (f32[100,128]{1,0}, f32[1]{0}) tuple(%u, %o)
    }
"""


def test_fusion_reads_slices_and_updates_in_place():
    done = entry(
        """
        %c = f32[100,128]{1,0} parameter(0)
        %d = f32[100,128]{1,0} parameter(1)
        %v = f32[1,128]{1,0} parameter(2)
        %i = s32[]{:S(6)} parameter(3)
        ROOT %f = (f32[100,128]{1,0}, f32[1]{0:S(1)}) fusion(%c, %d, %v, %i), kind=kLoop, calls=%fused
        """,
        FUSED_UPDATE,
    )
    assert done.read == 512 + 512  # a row of d through the inner fusion, and v; nothing of c
    assert done.written == 512  # the new row of c; the other result is not in HBM


def test_fusion_reads_through_copies():
    """A copy that XLA says is none, then a slice of it; and a fusion that only renames."""
    done = entry(
        """
        %w = s8[8,64,32]{2,1,0} parameter(0)
        %x = f32[64,32]{1,0} parameter(1)
        %i = s32[]{:S(6)} parameter(2)
        ROOT %f = f32[64,32]{1,0} fusion(%w, %x, %i), kind=kLoop, calls=%fused
        """,
        """
        %same (w: s8[8,64,32]) -> s8[8,64,32] {
          %w.1 = s8[8,64,32]{2,1,0} parameter(0)
          ROOT %c = s8[8,64,32]{2,1,0} copy(%w.1)
        }
        %renamed (x: f32[64,32]) -> f32[64,32] {
          %x.1 = f32[64,32]{1,0} parameter(0)
          ROOT %b = f32[64,32]{1,0} bitcast(%x.1)
        }
        %fused (w: s8[8,64,32], x: f32[64,32], i: s32[]) -> f32[64,32] {
          %w.2 = s8[8,64,32]{2,1,0} parameter(0)
          %x.2 = f32[64,32]{1,0} parameter(1)
          %i.2 = s32[] parameter(2)
          %s = s8[8,64,32]{2,1,0} fusion(%w.2), kind=kLoop, calls=%same
          %wide = f32[8,64,32]{2,1,0} convert(%s)
          %one = f32[1,64,32]{2,1,0} dynamic-slice(%wide, %i.2, %i.2, %i.2), dynamic_slice_sizes={1,64,32}
          %flat = f32[64,32]{1,0} bitcast(%one)
          %y = f32[64,32]{1,0} fusion(%x.2), kind=kLoop, calls=%renamed
          ROOT %sum = f32[64,32]{1,0} add(%flat, %y)
        }
        """,
    )
    assert done.read == 64 * 32 + 4 * 64 * 32
    assert done.written == 4 * 64 * 32


# --- control ---

LOOP = """
    %condition (t: (s32[], f32[8])) -> pred[] {{
      %t = (s32[], f32[8]{{0}}) parameter(0)
      %i = s32[] get-tuple-element(%t), index=0
      %n = s32[]{{:S(6)}} constant(28)
      {root}%lt = pred[]{{:S(6)}} compare(%i, %n), direction=LT{more}
    }}
    %body (t: (s32[], f32[8])) -> (s32[], f32[8]) {{
      %t = (s32[], f32[8]{{0}}) parameter(0)
      %i = s32[]{{:S(6)}} get-tuple-element(%t), index=0
      %x = f32[8]{{0}} get-tuple-element(%t), index=1
      %one = s32[]{{:S(6)}} constant(1)
      %j = s32[]{{:S(6)}} add(%i, %one)
      %y = f32[8]{{0}} negate(%x)
      ROOT %r = (s32[], f32[8]{{0}}) tuple(%j, %y)
    }}
"""
MAIN = """
    %x = f32[8]{{0}} parameter(0)
    %start = s32[] constant({start})
    %copied = s32[]{{:S(6)}} copy(%start)
    %t = (s32[], f32[8]{{0}}) tuple(%copied, %x)
    ROOT %w = (s32[], f32[8]{{0}}) while(%t), condition=%condition, body=%body{config}
"""
COUNTED = LOOP.format(root="ROOT ", more="")
OPEN = LOOP.format(
    root="",
    more="""
      %more = pred[]{:S(6)} get-tuple-element(%t), index=2
      ROOT %b = pred[]{:S(6)} and(%lt, %more)""",
)


@pytest.mark.parametrize(
    ("start", "config", "turns"),
    [(0, "", 28), (3, "", 25), (0, ', backend_config={"known_trip_count":{"n":"7"}}', 7)],
)
def test_counted_loop(start, config, turns):
    done = entry(MAIN.format(start=start, config=config), COUNTED, turns=5)
    assert done.open_loops == 0
    assert done.traffic["y"] == turns * 64


STEPPED = """
    %grow (i: s32[], two: s32[]) -> (f32[], s32[]) {{
      %i.g = s32[] parameter(0)
      %two.g = s32[] parameter(1)
      %one.g = s32[] constant(1)
      %zero.g = f32[] constant(0)
      %once = s32[] add(%i.g, %two.g)
      %twice = s32[] add(%once, %one.g)
      ROOT %both = (f32[], s32[]) tuple(%zero.g, %twice)
    }}
    %condition (t: (s32[], f32[8], s32[])) -> pred[] {{
      %t = (s32[], f32[8]{{0}}, s32[]) parameter(0)
      %i = s32[] get-tuple-element(%t), index=0
      %n = s32[] get-tuple-element(%t), index=2
      ROOT %lt = pred[] compare(%i, %n), direction={direction}
    }}
    %body (t: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
      %t = (s32[], f32[8]{{0}}, s32[]) parameter(0)
      %i = s32[] get-tuple-element(%t), index=0
      %x = f32[8]{{0}} get-tuple-element(%t), index=1
      %n = s32[] get-tuple-element(%t), index=2
      %two = s32[] constant(2)
      %f = (f32[], s32[]) fusion(%i, %two), kind=kLoop, calls=%grow
      %j = s32[] get-tuple-element(%f), index=1
      %y = f32[8]{{0}} negate(%x)
      ROOT %r = (s32[], f32[8]{{0}}, s32[]) tuple(%j, %y, {last})
    }}
"""
STEPPED_MAIN = """
    %x = f32[8]{0} parameter(0)
    %start = s32[] constant(0)
    %end = s32[] constant(9)
    %t = (s32[], f32[8]{0}, s32[]) tuple(%start, %x, %end)
    ROOT %w = (s32[], f32[8]{0}, s32[]) while(%t), condition=%condition, body=%body
"""


@pytest.mark.parametrize(
    ("direction", "last", "turns"),
    [("LT", "%n", 3), ("LE", "%n", 4), ("LT", "%j", None), ("GT", "%n", None)],
)
def test_loop_that_counts_in_steps(direction, last, turns):
    """As where XLA unrolled it; the end may be carried, but must not change."""
    done = entry(STEPPED_MAIN, STEPPED.format(direction=direction, last=last), turns=7)
    assert done.open_loops == (turns is None)
    assert done.traffic["y"] == (turns or 7) * 64


def test_open_loop():
    done = entry(MAIN.format(start=0, config=""), OPEN, turns=5)
    assert done.open_loops == 1
    assert done.traffic["y"] == 5 * 64


def test_costliest_branch():
    branch = """
        %{name} (x: f32[{n}]) -> f32[{n}] {{
          %x = f32[{n}]{{0}} parameter(0)
          ROOT %r.{name} = f32[{n}]{{0}} negate(%x)
        }}
    """
    done = entry(
        """
        %p = s32[]{:S(6)} parameter(0)
        %a = f32[8]{0} parameter(1)
        %b = f32[80]{0} parameter(2)
        ROOT %c = f32[] conditional(%p, %a, %b), branch_computations={%small, %large}
        """,
        branch.format(name="small", n=8) + branch.format(name="large", n=80),
    )
    assert done.traffic == {"r.large": 640}


def test_custom_call():
    call = '%c = f32[16]{0} custom-call(%a), custom_call_target="tpu_custom_call"'
    plain = entry(f"%a = f32[8]{{0}} parameter(0)\nROOT {call}")
    assert (plain.read, plain.written) == (32, 64)
    said = (
        ', backend_config={"custom_call_config": {"body": "TUw=", "cost_estimate": '
        '{"flops": 700, "transcendentals": 0, "bytes_accessed": 123}}}'
    )
    known = entry(f"%a = f32[8]{{0}} parameter(0)\nROOT {call}{said}")
    assert (known.hbm, known.flops) == (123, 700)


def test_kernel_whose_metadata_takes_lines():
    done = entry("""
        %a = f32[8]{0} parameter(0)
        ROOT %c = f32[16]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
        "xprof_metadata":"{\\"block_q\\": 512}"
        }}, backend_config={"custom_call_config": {"cost_estimate": {"flops": 700, "bytes_accessed": 12}}}
    """)
    assert (done.hbm, done.flops) == (12, 700)


@pytest.mark.parametrize("target", ["AllocateBuffer", "ConcatBitcast"])
def test_custom_call_that_names_memory(target):
    done = entry(f"""
        %a = f32[8]{{0}} parameter(0)
        ROOT %c = f32[16]{{0}} custom-call(%a, %a), custom_call_target="{target}"
    """)
    assert done.hbm == 0


# --- what is not known ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%a = wide[8]{0} parameter(0)", "unknown type in the compiled program: 'wide'"),
        ("%a = <f32> parameter(0)", "unknown shape in the compiled program: '<f32> parameter"),
        ("%a = f32[8]{0}", "unknown instruction in the compiled program: 'ROOT %a = f32"),
        (
            "%a = f32[8]{0} negate((%b)",
            "unknown parentheses in the compiled program: '\\(\\(%b",
        ),
        ("%a = f32[8]{0} negate(%b)", "unknown form of compiled program: KeyError"),
        ("%a = f32[8]{0} while()", "unknown form of compiled program"),
    ],
)
def test_unknown_form(line, message):
    with pytest.raises(PlanError, match=message):
        entry(f"ROOT {line}")


def test_no_program():
    with pytest.raises(PlanError, match="text has no entry: expected XLA's optimised HLO"):
        hlo.cost("")


# --- programs ---


def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_scan_on_a_cpu():
    count, rows, width = 6, 24, 64
    shapes = Abstract((rows, width), jnp.float32), Abstract((count, width, width), jnp.float32)
    done = hlo.cost(jax.jit(layers).lower(*shapes).compile().as_text())
    assert done.flops == count * 2 * rows * width * width
    weights = 4 * count * width * width
    assert weights <= done.read <= 1.5 * weights + 20 * 4 * count * rows * width
    assert done.open_loops == 0


def test_nested_and_open_loops_on_a_cpu():
    def more(carry):
        return (carry[0] < 10) & (jnp.max(carry[1]) > 0)

    def until(x, weights):
        return jax.lax.while_loop(more, lambda c: (c[0] + 1, layers(c[1], weights)), (0, x))

    shapes = Abstract((8, 32), jnp.float32), Abstract((3, 32, 32), jnp.float32)
    text = jax.jit(until).lower(*shapes).compile().as_text()
    for turns in (1, 4):
        done = hlo.cost(text, turns=turns)
        assert done.open_loops == 1
        assert done.flops == turns * 3 * 2 * 8 * 32 * 32


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("rows", [1, 16])
def test_scan_on_a_tpu(rows):
    """A stack of weights is read once, one layer in each turn."""
    from jax.sharding import SingleDeviceSharding

    from sa2jax import chips

    where = SingleDeviceSharding(chips.devices(chips.topology("v5e:1x1"))[0])

    def place(*shape):
        return Abstract(shape, jnp.bfloat16, sharding=where)

    program = jax.jit(layers).lower(place(rows, 2048), place(12, 2048, 2048))
    done = hlo.cost(program.compile().as_text())
    weights = 2 * 12 * 2048 * 2048
    assert 1.0 <= done.hbm / weights <= 1.02
    assert done.flops == pytest.approx(12 * 2 * rows * 2048 * 2048)
