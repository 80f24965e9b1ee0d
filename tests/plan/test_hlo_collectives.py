"""Counting what a compiled program sends to other devices, or leaves to others of its own parts."""

import pytest
from helpers.hlo_programs import entry

from sa2jax.plan import hlo

SUM = """
    %sum (l: f32[], r: f32[]) -> f32[] {
      %l = f32[] parameter(0)
      %r = f32[] parameter(1)
      ROOT %s = f32[] add(%l, %r)
    }
"""


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("f32[32] all-gather(%a), replica_groups={{0,1},{2,3}}, dimensions={0}", "all-gather", 64),
        ("f32[16] all-reduce(%a), replica_groups=[1,4]<=[4], to_apply=%sum", "all-reduce", 96),
        ("f32[16] all-reduce(%a), replica_groups={}, to_apply=%sum", "all-reduce", 96),
        (
            "f32[16] all-reduce(%a), replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%sum",
            "all-reduce",
            64,
        ),
        (
            "f32[8] reduce-scatter(%a), replica_groups=mesh['x'=2] {'x'}, to_apply=%sum",
            "reduce-scatter",
            32,
        ),
        ("f32[16] all-to-all(%a), replica_groups={{0,1,2,3}}, dimensions={0}", "all-to-all", 48),
        (
            "f32[16] collective-permute(%a), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            64,
        ),
    ],
)
def test_collectives(line, kind, sent):
    done = entry(f"%a = f32[16]{{0:S(1)}} parameter(0)\nROOT %c = {line}", SUM)
    assert done.collectives == {kind: hlo.Collective(1, sent)}
    assert done.sent == sent
    assert done.read == 0


def test_async_collective_counts_once():
    done = entry("""
        %a = f32[16]{0} parameter(0)
        %s = (f32[16]{0}, f32[64]{0}) all-gather-start(%a), replica_groups=[1,4]<=[4], dimensions={0}
        ROOT %d = f32[64]{0} all-gather-done(%s)
    """)
    assert done.collectives == {"all-gather": hlo.Collective(1, 192)}
    assert (done.read, done.written) == (64, 256)


def test_fused_reduce_scatter():
    done = entry(
        """
        %a = f32[16]{0} parameter(0)
        ROOT %f = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
        """,
        SUM
        + """
    %all-reduce-scatter.1 (x: f32[16]) -> f32[4] {
      %x = f32[16]{0} parameter(0)
      %r.1 = f32[16]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%sum
      %i = u32[] partition-id()
      ROOT %o = f32[4]{0} dynamic-slice(%r.1, %i), dynamic_slice_sizes={4}
    }
    """,
    )
    assert done.collectives == {"reduce-scatter": hlo.Collective(1, 48)}
    assert (done.read, done.written) == (64, 16)


# A gather that is spread over fusions: started, carried on beside a product in each turn of a
# loop, ended. Each has a copy of the instruction.
GATHER = (
    "all-gather({}), channel_id=7, replica_groups=mesh['axis_0'=4] {{'axis_0'}}, dimensions={{0}}"
)
CHAIN = f"""
    %start (s: f32[16]) -> (f32[16], f32[64], u32[]) {{
      %s.1 = f32[16]{{0:S(1)}} parameter(0)
      %g.1 = f32[64]{{0}} {GATHER.format("%s.1")}
      ROOT %c.1 = (f32[16]{{0:S(1)}}, f32[64]{{0}}, u32[]{{:S(2)}}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
    }}
    %async_collective_fusion.1 (s: f32[16], o: f32[64], f: u32[], a: f32[8,8]) -> (f32[8,8], f32[16], f32[64], f32[64], u32[]) {{
      %a.2 = f32[8,8]{{1,0}} parameter(3)
      %p.2 = f32[8,8]{{1,0}} dot(%a.2, %a.2), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
      %s.2 = f32[16]{{0:S(1)}} parameter(0)
      %o.2 = f32[64]{{0}} parameter(1)
      %f.2 = u32[]{{:S(2)}} parameter(2)
      %g.2 = f32[64]{{0}} {GATHER.format("%s.2")}
      ROOT %t.2 = (f32[8,8]{{1,0}}, f32[16]{{0:S(1)}}, f32[64]{{0}}, f32[64]{{0}}, u32[]{{:S(2)}}) tuple(%p.2, %s.2, %o.2, %g.2, %f.2)
    }}
    %done (s: f32[16], o: f32[64], f: u32[]) -> f32[64] {{
      %s.3 = f32[16]{{0:S(1)}} parameter(0)
      %o.3 = f32[64]{{0}} parameter(1)
      %f.3 = u32[]{{:S(2)}} parameter(2)
      %g.3 = f32[64]{{0}} {GATHER.format("%s.3")}
      ROOT %c.3 = f32[64]{{0}} custom-call(%s.3, %o.3, %g.3, %f.3), custom_call_target="AsyncCollectiveDone"
    }}
    %condition (t: (s32[], f32[16], f32[64], u32[], f32[8,8])) -> pred[] {{
      %t = (s32[], f32[16]{{0:S(1)}}, f32[64]{{0}}, u32[]{{:S(2)}}, f32[8,8]{{1,0}}) parameter(0)
      %i = s32[]{{:S(6)}} get-tuple-element(%t), index=0
      %n = s32[]{{:S(6)}} constant(4)
      ROOT %lt = pred[]{{:S(6)}} compare(%i, %n), direction=LT
    }}
    %body (t: (s32[], f32[16], f32[64], u32[], f32[8,8])) -> (s32[], f32[16], f32[64], u32[], f32[8,8]) {{
      %t = (s32[], f32[16]{{0:S(1)}}, f32[64]{{0}}, u32[]{{:S(2)}}, f32[8,8]{{1,0}}) parameter(0)
      %i = s32[]{{:S(6)}} get-tuple-element(%t), index=0
      %two = s32[]{{:S(6)}} constant(2)
      %j = s32[]{{:S(6)}} add(%two, %i)
      %f = (f32[8,8]{{1,0}}, f32[16]{{0:S(1)}}, f32[64]{{0}}, f32[64]{{0}}, u32[]{{:S(2)}}) fusion(%t#1, %t#2, %t#3, %t#4), kind=kOutput, calls=%async_collective_fusion.1
      ROOT %r = (s32[], f32[16]{{0:S(1)}}, f32[64]{{0}}, u32[]{{:S(2)}}, f32[8,8]{{1,0}}) tuple(%j, %f#1, %f#2, %f#4, %f#0)
    }}
"""


def test_gather_spread_over_fusions_counts_once():
    done = entry(
        """
        %x = f32[16]{0:S(1)} parameter(0)
        %a = f32[8,8]{1,0} parameter(1)
        %zero = s32[]{:S(6)} constant(0)
        %s = (f32[16]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
        %t = (s32[], f32[16]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}, f32[8,8]{1,0}) tuple(%zero, %s#0, %s#1, %s#2, %a)
        %w = (s32[], f32[16]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}, f32[8,8]{1,0}) while(%t), condition=%condition, body=%body
        ROOT %d = f32[64]{0} fusion(%w#1, %w#2, %w#3), kind=kCustom, calls=%done
        """,
        CHAIN,
    )
    assert done.collectives == {"all-gather": hlo.Collective(1, 192)}
    assert done.traffic == {"s": 256, "f": 2 * 2 * 256}
    assert done.flops == 2 * 2 * 8 * 8 * 8


def test_windowed_product_counts_each_hop():
    """A ring of permutes beside products, unrolled so that a turn makes two of the four hops."""
    done = entry(
        """
        %x = f32[16]{0} parameter(0)
        %zero = u32[] constant(0)
        %t = (u32[], f32[16]{0}) tuple(%zero, %x)
        ROOT %w = (u32[], f32[16]{0}) while(%t), condition=%condition, body=%body
        """,
        """
        %condition (t: (u32[], f32[16])) -> pred[] {
          %t = (u32[], f32[16]{0}) parameter(0)
          %i = u32[] get-tuple-element(%t), index=0
          %n = u32[] constant(4)
          ROOT %lt = pred[] compare(%i, %n), direction=LT
        }
        %body (t: (u32[], f32[16])) -> (u32[], f32[16]) {
          %t = (u32[], f32[16]{0}) parameter(0)
          %x.1 = f32[16]{0} get-tuple-element(%t), index=1
          %p.1 = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x.1), source_target_pairs={{0,1},{1,0}}
          %x.2 = f32[16]{0} collective-permute-done(%p.1)
          %p.2 = (f32[16]{0}, f32[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x.2), source_target_pairs={{0,1},{1,0}}
          %x.3 = f32[16]{0} collective-permute-done(%p.2)
          %i = u32[] get-tuple-element(%t), index=0
          %two = u32[] constant(2)
          %j = u32[] add(%i, %two)
          ROOT %r = (u32[], f32[16]{0}) tuple(%j, %x.3)
        }
        """,
    )
    assert done.collectives == {"collective-permute": hlo.Collective(4, 4 * 64)}


# --- other cores and copies beside the program ---

SPARSE_CORE = """
    %rows (t: f32[100,128], i: s32[4]) -> f32[4,128] {
      %t.1 = f32[100,128]{1,0} parameter(0)
      %i.1 = s32[4]{0} parameter(1)
      ROOT %g = f32[4,128]{1,0} gather(%t.1, %i.1), offset_dims={1}
    }
    %called (t: f32[100,128], i: s32[4]) -> f32[4,128] {
      %t.2 = f32[100,128]{1,0} parameter(0)
      %i.2 = s32[4]{0} parameter(1)
      %s = ((f32[100,128], s32[4]), f32[4,128], u32[]) call-start(%t.2, %i.2), to_apply=%rows
      ROOT %e = f32[4,128]{1,0} call-done(%s)
    }, execution_thread="sparsecore"
    %wrapped (t: f32[100,128], i: s32[4]) -> f32[4,128] {
      %t.3 = f32[100,128]{1,0} parameter(0)
      %i.3 = s32[4]{0} parameter(1)
      ROOT %c = f32[4,128]{1,0} custom-call(%t.3, %i.3), custom_call_target="TODO", called_computations={%called}
    }, execution_thread="sparsecore"
"""


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        ("custom-call", 'custom_call_target="TODO", called_computations={%called}'),
        ("async", "calls=%wrapped"),
    ],
)
def test_gather_on_another_core(kind, calls):
    """The start has no operands, an update has them: an empty tuple is a shape too."""
    done = entry(
        f"""
        %a = f32[100,128]{{1,0}} parameter(0)
        %i = s32[4]{{0}} parameter(1)
        %s = ((), (), (s32[4]{{0}}, s32[9]{{0:S(11)}})) {kind}-start(), {calls}
        %u = ((f32[100,128], s32[4]), f32[4,128], (s32[4])) {kind}-update(%s, %a, %i)
        ROOT %d = f32[4,128]{{1,0}} {kind}-done(%u)
        """,
        SPARSE_CORE,
    )
    assert done.traffic == {"g": 2 * 2048 + 16}


def test_comparison_of_a_sort():
    """A custom call that only compares with what it calls."""
    done = entry(
        """
        %a = f32[8]{0} parameter(0)
        ROOT %c = f32[8]{0} custom-call(%a), custom_call_target="Sort", called_computations={%less}
        """,
        """
        %less (l: f32[], r: f32[]) -> pred[] {
          %l = f32[] parameter(0)
          %r = f32[] parameter(1)
          ROOT %b = pred[] compare(%l, %r), direction=LT
        }
        """,
    )
    assert (done.read, done.written) == (32, 32)


def test_async_slice():
    done = entry(
        """
        %a = f32[100,128]{1,0} parameter(0)
        %s = ((f32[100,128]{1,0}), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%sliced
        ROOT %d = f32[2,128]{1,0:S(1)} async-done(%s)
        """,
        """
        %sliced (x: f32[100,128]) -> f32[2,128] {
          %x = f32[100,128]{1,0} parameter(0)
          ROOT %y = f32[2,128]{1,0:S(1)} slice(%x), slice={[0:2], [0:128]}
        }
        """,
    )
    assert (done.read, done.written) == (1024, 0)


def test_element_named_in_short():
    done = entry("""
        %a = f32[8]{0} parameter(0)
        %t = (f32[8]{0}, f32[4]{0:S(1)}) custom-call(%a), custom_call_target="AllocateBuffer"
        ROOT %n = f32[8]{0} add(%t#0, %t#1)
    """)
    assert (done.read, done.written) == (32, 32)
