"""What is promised of mini on TPUs, compiled for real: what fits, and what a step moves."""

import os

import pytest
from helpers.devices import needs_libtpu

from sa2jax.plan import Spec
from sa2jax.plan import planner as plan

pytestmark = [pytest.mark.slow, needs_libtpu]
GIB = 2**30
LONG = pytest.mark.skipif("SA2JAX_LONG" not in os.environ, reason="minutes: set SA2JAX_LONG")
# Each chip, each dtype, and one row or many; with SA2JAX_LONG the rest.
ONE = [("v5e:1x1", "int8", 32), ("v6e:1x1", "bfloat16", 1), ("v5p:1x1x1", "bfloat16", 8)]
MORE = [
    *(("v5e:1x1", "int8", batch) for batch in (1, 8)),
    *(("v6e:1x1", "bfloat16", batch) for batch in (8, 32)),
    ("v6e:1x1", "int8", 32),
    ("v5p:1x1x1", "bfloat16", 32),
    ("v5p:1x1x1", "int8", 32),
]


def check_decode(made, most):
    assert made.fits
    assert 0.99 <= made.hbm_bytes / made.ideal_bytes <= most
    assert made.temporaries <= 0.02 * made.cache
    assert made.peak == pytest.approx(made.weights + made.cache + made.temporaries, rel=0.01)
    assert made.bound == "memory"


@pytest.mark.parametrize(
    ("topology", "dtype", "batch"), [*ONE, *(pytest.param(*case, marks=LONG) for case in MORE)]
)
def test_decode_on_one_chip_moves_weights_and_cache_once(topology, dtype, batch):
    check_decode(plan.plan(Spec(topology=topology, dtype=dtype, batch=batch)), 1.05)


@pytest.mark.parametrize(
    ("topology", "dtype", "most"),
    [
        ("v5e:2x2", "bfloat16", 1.05),
        ("v5e:2x4", "int8", 1.15),
        pytest.param("v5e:2x2", "int8", 1.05, marks=LONG),
        pytest.param("v5e:2x4", "bfloat16", 1.15, marks=LONG),
    ],
)
def test_decode_on_tensor_shards(topology, dtype, most):
    made = plan.plan(Spec(topology=topology, dtype=dtype, batch=8))
    check_decode(made, most)
    # Two for each of 28 layers, one for embeddings; logits are gathered once.
    assert 57 <= made.collectives["all-reduce"].count <= 60
    assert set(made.collectives) <= {"all-reduce", "all-gather"}


def test_int8_and_32_long_caches_fit_one_v5e():
    made = plan.plan(Spec(topology="v5e:1x1", dtype="int8", batch=32, length=4096))
    assert made.fits
    assert made.peak < 14.8 * GIB


def test_an_int8_cache_is_half_the_cache():
    made = plan.plan(Spec(topology="v5e:1x1", dtype="int8", int8_cache=True, batch=32))
    check_decode(made, 1.05)
    assert made.cache == pytest.approx((0.5 + 1 / 64) * 7 * GIB)  # a scale for 128 numbers


def test_int8_with_a_16k_cache_leaves_half_of_one_v5e():
    """A conversation of the full context: decoder and encoder on one chip."""
    made = plan.plan(Spec(topology="v5e:1x1", dtype="int8", length=16384))
    assert made.fits
    assert made.peak + made.rest < 0.65 * made.usable


@LONG
def test_its_voice_fits_beside_it():
    """Decoder, encoder and detokenizer on one chip."""
    thinks = plan.plan(Spec(topology="v5e:1x1", dtype="int8", length=16384))
    speaks = plan.plan(Spec(topology="v5e:1x1", workload="token2wav", length=1))
    assert speaks.fits
    assert thinks.peak + thinks.rest + speaks.peak < 0.7 * thinks.usable


def test_bfloat16_fits_one_v6e():
    made = plan.plan(Spec(topology="v6e:1x1", length=16384))
    assert made.fits
    assert made.peak + made.rest < 0.6 * made.usable


@LONG
@pytest.mark.parametrize(
    ("topology", "dtype"),
    [("v6e:2x4", "float32"), ("v6e:2x2", "bfloat16"), ("v5e:2x4", "bfloat16")],
)
def test_a_step_of_fine_tuning_fits(topology, dtype):
    made = plan.plan(Spec(topology=topology, dtype=dtype, workload="train"))
    assert made.fits
    assert made.moments > 0
