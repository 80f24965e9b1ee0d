"""TPU kernels in interpret mode, against the default; and the dispatcher's choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax.attention.base import Mask
from sa2jax.attention.decode import decode, decode_refusal
from sa2jax.attention.dispatch import attention, cached_attention
from sa2jax.attention.splash import splash, splash_refusal
from sa2jax.attention.xla import attention_per_head, attention_xla, decode_xla
from sa2jax.quantize import quantize_rows

HALF = jnp.bfloat16
ROUNDING = 0.02  # of bfloat16, for numbers around 2


def normal(seed, *shape, dtype=HALF):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4)])
def test_splash(heads, kv_heads, packed):
    q, k, v = normal(0, 2, 256, heads, 128), *(normal(n, 2, 256, kv_heads, 128) for n in (1, 2))
    segments = jnp.repeat(jnp.array([[0, 1], [0, 2]]), 128, axis=1) if packed else None
    mask = Mask(causal=True, segments=segments)
    expected = attention_xla(q, k, v, mask)
    got = splash(q, k, v, mask, interpret=True)
    assert got.dtype == HALF
    np.testing.assert_allclose(*map(np.float32, (got, expected)), atol=ROUNDING)


def test_splash_has_the_gradients_of_the_default():
    q, k, v = (normal(n, 1, 128, 2, 128) for n in range(3))
    causal = Mask(causal=True)

    def loss(f):
        return lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v).astype(jnp.float32)))

    default = loss(lambda *x: attention_xla(*x, causal))
    expected = jax.grad(default, (0, 1, 2))(q, k, v)
    got = jax.grad(loss(lambda *x: splash(*x, causal, interpret=True)), (0, 1, 2))(q, k, v)
    for ours, theirs in zip(got, expected, strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(*map(np.float32, (ours, theirs)), atol=ROUNDING * scale)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (7, 1), (4, 4)])
def test_decode_kernel(heads, kv_heads, int8):
    """Rows of any length, an almost empty and a full one among them."""
    layers, rows, size = 2, 4, 2048
    q = normal(0, rows, 1, heads, 128)
    k, v = (normal(n, layers, rows, kv_heads, size, 128) for n in (1, 2))
    scales = None
    if int8:
        (k, of_k), (v, of_v) = quantize_rows(k), quantize_rows(v)
        scales = of_k, of_v
    positions = jnp.array([[0], [2047], [1024], [700]])
    expected = decode_xla(q, k, v, 1, positions, scales)
    got = decode(q, k, v, 1, positions, scales, interpret=True)
    np.testing.assert_allclose(*map(np.float32, (got, expected)), atol=ROUNDING)


def test_decode_kernel_skips_blocks_that_are_empty():
    q = normal(0, 2, 1, 2, 128)
    k, v = (normal(n, 1, 2, 2, 2048, 128) for n in (1, 2))
    positions = jnp.array([[100], [2048]])  # the second row is padding
    dirty = [x.at[:, 0, :, 1024:].set(jnp.nan).at[:, 1].set(jnp.nan) for x in (k, v)]
    got = decode(q, *dirty, 0, positions, interpret=True)
    expected = decode_xla(q, k, v, 0, positions, None)
    np.testing.assert_allclose(*map(np.float32, (got[0], expected[0])), atol=ROUNDING)
    np.testing.assert_array_equal(np.float32(got[1]), 0)


@pytest.mark.parametrize(
    ("dtype", "steps", "width", "mask", "why"),
    [
        (HALF, 256, 128, Mask(causal=True), None),
        (jnp.float32, 256, 128, Mask(causal=True), "expected bfloat16 or float16, got float32"),
        (HALF, 250, 128, Mask(causal=True), "of a multiple of 128, got 250 and 128"),
        (HALF, 256, 64, Mask(causal=True), "of a multiple of 128, got 256 and 64"),
        (HALF, 256, 128, Mask(), "expected a causal mask"),
        (HALF, 256, 128, Mask(causal=True, keys=jnp.ones((1, 256), bool)), "without marked keys"),
    ],
)
def test_splash_takes_half_precision_whole_tiles_and_causal_masks(dtype, steps, width, mask, why):
    q, k = jnp.zeros((1, steps, 4, width), dtype), jnp.zeros((1, steps, 2, width), dtype)
    refusal = splash_refusal(q, k, k, mask)
    assert refusal is None if why is None else why in str(refusal)


@pytest.mark.parametrize(
    ("dtype", "steps", "slots", "why"),
    [
        (HALF, 1, 1024, None),
        (HALF, 2, 1024, "expected one query a row, got 2"),
        (HALF, 1, 1000, "of a multiple of 128, got 1000 and 128"),
        (jnp.float32, 1, 1024, "expected bfloat16 or float16, got float32"),
    ],
)
def test_decode_kernel_takes_one_query_a_row(dtype, steps, slots, why):
    q, k = jnp.zeros((1, steps, 4, 128), dtype), jnp.zeros((3, 1, 2, slots, 128), dtype)
    refusal = decode_refusal(q, k)
    assert refusal is None if why is None else why in str(refusal)


def lowered_for_tpu(run, *args):
    return jax.jit(run).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(("dtype", "kernel"), [(HALF, True), (jnp.float32, False)])
def test_a_tpu_program_has_the_kernels_where_they_fit(dtype, kernel):
    q, k, v = (normal(n, 1, 256, 2, 128, dtype=dtype) for n in range(3))
    text = lowered_for_tpu(lambda *x: attention(*x, Mask(causal=True)), q, k, v)
    assert ("tpu_custom_call" in text) == kernel
    cache = [normal(n, 1, 1, 2, 256, 128, dtype=dtype) for n in (1, 2)]

    def step(q, k, v):
        return cached_attention(q, k, v, 0, jnp.array([[3]]))

    assert ("tpu_custom_call" in lowered_for_tpu(step, q[:, :1], *cache)) == kernel


def test_a_tpu_program_of_masked_keys_has_the_default():
    q, k, v = (normal(n, 1, 256, 2, 128) for n in range(3))
    mask = Mask(keys=jnp.arange(256)[None] < 200)
    assert "tpu_custom_call" not in lowered_for_tpu(lambda *x: attention(*x, mask), q, k, v)


def test_masks_are_what_all_their_rules_allow():
    keys = jnp.array([[True, True, False, True]])
    segments = jnp.array([[0, 0, 1, 1]])
    mask = Mask(causal=True, keys=keys, segments=segments).dense(4)
    assert np.asarray(mask[0]).astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 1],
    ]


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=True),
        Mask(keys=jnp.arange(40)[None] < jnp.array([[40], [17]])),
        Mask(causal=True, segments=jnp.arange(40)[None] // jnp.array([[9], [40]])),
    ],
)
def test_one_head_after_the_other_equals_all_at_once(mask):
    q, k, v = (normal(n, 2, 40, heads, 16, dtype=jnp.float32) for n, heads in enumerate((6, 2, 2)))
    with jax.default_matmul_precision("highest"):
        expected, loop = attention_xla(q, k, v, mask), attention_per_head(q, k, v, mask)
    np.testing.assert_allclose(loop, expected, atol=1e-5)
