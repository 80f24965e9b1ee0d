"""Pallas TPU kernel of decode attention: one query a row over the filled slots of a cache."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from sa2jax.attention.base import CACHE_AXES, HEADS, LANES, tile_refusal
from sa2jax.sharding import per_device

DECODE_BLOCK = 1024  # slots that the decode kernel reads at a time: 2 MB of four heads


def decode_refusal(
    q: Float[Array, "B T N H"], k: Shaped[Array, "L B K S H"], *others: object
) -> str | None:
    """Why `decode` cannot take these; None for one query a row, half precision, whole tiles."""
    if q.shape[1] != 1:
        return f"expected one query a row, got {q.shape[1]}"
    return tile_refusal(q, k.shape[2], k.shape[3], "slots")


def decode(
    q: Float[Array, "B 1 N H"],
    k: Shaped[Array, "L B K S H"],
    v: Shaped[Array, "L B K S H"],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B 1"],
    scales: tuple[Float[Array, "L B K S"], Float[Array, "L B K S"]] | None = None,
    *,
    read: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B 1 N H"]:
    """Attention of one query a row over one layer of a cache; slots that are empty are not read.

    Args:
        q: queries.
        k: keys of all layers.
        v: values of all layers.
        layer: the layer to look at.
        positions: the last slot to look at; from S on the row is padding, and zeros come out.
        scales: of int8 keys and values.
        read: has no meaning here: what is filled is read.
        interpret: run without a TPU, to test.
    """
    size = k.shape[3]
    filled = jnp.where(positions[:, 0] < size, positions[:, 0] + 1, 0).astype(jnp.int32)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    axes = ((None,), ("batch",), HEADS, CACHE_AXES, CACHE_AXES, CACHE_AXES[:4])
    run = per_device(partial(_decode, interpret=interpret), axes, HEADS)
    return run(layer, filled, q, k, v, scales)


def _decode(layer, filled, q, k, v, scales, *, interpret: bool) -> Float[Array, "B 1 N H"]:
    B, _, N, H = q.shape
    K, S = k.shape[2:4]
    group = N // K
    rows = -(-group // 16) * 16  # whole tiles of half precision
    queries = jnp.pad(q.reshape(B, K, group, H), ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    block = next(size for size in (DECODE_BLOCK, 512, 256, LANES) if S % size == 0)

    def last(row, at, filled):  # a block beyond the last is not fetched: it is the last again
        return jnp.minimum(at, jax.lax.div(jnp.maximum(filled[row] - 1, 0), block))

    def of_cache(row, at, layer, filled):
        return layer[0], row, 0, last(row, at, filled), 0

    def of_scales(row, at, layer, filled):
        return layer[0], row, 0, last(row, at, filled)

    whole = pl.BlockSpec((None, K, rows, H), lambda row, at, layer, filled: (row, 0, 0, 0))
    part = pl.BlockSpec((None, None, K, block, H), of_cache)
    weights = pl.BlockSpec((None, None, K, block), of_scales)
    scales = () if scales is None else scales
    read = 2 * B * K * S * (H * k.dtype.itemsize + (4 if scales else 0))
    y = pl.pallas_call(
        partial(_decode_block, block=block, scaled=bool(scales)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, S // block),
            in_specs=[whole, part, part, *[weights] * len(scales)],
            out_specs=whole,
            scratch_shapes=[
                pltpu.VMEM((K, rows, LANES), jnp.float32),
                pltpu.VMEM((K, rows, LANES), jnp.float32),
                pltpu.VMEM((K, rows, H), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * S * H, transcendentals=B * N * S, bytes_accessed=read + 2 * q.nbytes
        ),
        interpret=interpret,
        name="decode_attention",
    )(layer, filled, queries, k, v, *scales)
    return y[:, :, :group].reshape(B, 1, N, H)


def _decode_block(layer, filled, q, k, v, *rest, block: int, scaled: bool):
    """One block of slots of one row: softmax so far, as flash attention keeps it."""
    of_k, of_v, out, top, total, sums = rest if scaled else (None, None, *rest)
    row, at = pl.program_id(0), pl.program_id(1)

    @pl.when(at == 0)
    def _():
        top[...] = jnp.full(top.shape, -1e30, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when(at * block < filled[row])
    def _():
        K, rows, H = q.shape
        slots = at * block + jax.lax.broadcasted_iota(jnp.int32, (rows, block), 1)
        for head in range(K):
            kind = q.dtype
            scores = (
                jax.lax.dot_general(
                    q[head],
                    k[head].astype(kind),
                    (((1,), (1,)), ((), ())),
                    preferred_element_type=jnp.float32,
                )
                * H**-0.5
            )
            if of_k is not None:
                scores = scores * of_k[head][None]
            scores = jnp.where(slots < filled[row], scores, -1e30)
            before = top[head][:, :1]
            now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            weights, fade = jnp.exp(scores - now), jnp.exp(before - now)
            gained = jnp.sum(weights, axis=1, keepdims=True)
            top[head] = jnp.broadcast_to(now, (rows, LANES))
            total[head] = jnp.broadcast_to(fade * total[head][:, :1] + gained, (rows, LANES))
            if of_v is not None:
                weights = weights * of_v[head][None]
            new = jnp.dot(
                weights.astype(kind), v[head].astype(kind), preferred_element_type=jnp.float32
            )
            sums[head] = fade * sums[head] + new

    @pl.when(at == pl.num_programs(1) - 1)
    def _():
        for head in range(q.shape[0]):
            share = jnp.maximum(total[head][:, :1], 1e-30)
            out[head] = (sums[head] / share).astype(out.dtype)
