"""Attention's back ends; `nn.attention` and `nn.cached_attention` choose between them.

Each `*_fits` says whether one that only some hardware has computes a case at all. Those take half
precision only: float32 is asked for to be exact, and they would round it.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from sa2jax.sharding import on_each_device, ways_of

if TYPE_CHECKING:
    from sa2jax.nn import Mask

LANES = 128  # the width of a TPU's registers
SPLASH_BLOCK = 512
DECODE_BLOCK = 1024  # slots that the decode kernel reads at a time: 2 MB of four heads
HALF = (jnp.bfloat16, jnp.float16)
HEADS = ("batch", None, "heads", None)
KV_HEADS = ("batch", None, "kv_heads", None)
CACHE = (None, "batch", "kv_heads", None, None)


def splash_fits(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"]) -> bool:
    """Whether splash attention takes these: half precision, whole tiles, heads split alike."""
    whole = q.shape[1] % LANES == 0 and q.shape[3] % LANES == 0
    return q.dtype in HALF and whole and _split_alike(q.shape[2], k.shape[2])


def cudnn_fits(q: Float[Array, "B T N H"]) -> bool:
    """Whether cuDNN's flash attention takes these; only asked where a GPU is the default."""
    return jax.default_backend() == "gpu" and q.dtype in HALF and q.shape[3] % 8 == 0


def decode_fits(q: Float[Array, "B T N H"], k: Shaped[Array, "L B K S H"]) -> bool:
    """Whether `decode` takes these: one query a row, half precision, whole tiles."""
    whole = k.shape[3] % LANES == 0 and k.shape[4] % LANES == 0
    one = q.shape[1] == 1 and q.dtype in HALF
    return one and whole and _split_alike(q.shape[2], k.shape[2])


# --- what every platform has ----------------------------------------------------------------


def all_heads(q: Array, k: Array, v: Array, mask: "Mask") -> Float[Array, "B T N H"]:
    """XLA's own attention over all heads at once."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask.dense(q.shape[1])[:, None])


def cudnn(q: Array, k: Array, v: Array, mask: "Mask") -> Float[Array, "B T N H"]:
    """CuDNN's flash attention; causal."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def head_by_head(q: Array, k: Array, v: Array, mask: "Mask") -> Float[Array, "B T N H"]:
    """One key head after the other: its scores stay in a CPU's cache (2-3 times faster there)."""
    B, T, N, H = q.shape
    K = k.shape[2]
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, N // K * T, H)
    keys, values = (x.swapaxes(1, 2).reshape(B * K, -1, H) for x in (k, v))
    dense = mask.dense(T)

    def head(index_rows_keys_values):
        index, q, k, v = index_rows_keys_values
        scores = jnp.einsum("mh,sh->ms", q, k, preferred_element_type=jnp.float32) * H**-0.5
        seen = jnp.tile(dense[index // K % len(dense)], (N // K, 1))  # [G*T, S]
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v

    out = jax.lax.map(head, (jnp.arange(B * K), rows, keys, values))
    return out.reshape(B, N, T, H).swapaxes(1, 2)


def folded(q, k, v, layer, positions, scales) -> Float[Array, "B T N H"]:
    """Queries of one key head are folded into rows of one matrix.

    Both products are then plain batched matrix products, and nothing of the cache is moved (on a
    CPU 3-4 times faster).
    """
    B, T, N, H = q.shape
    K, S = k.shape[2:4]
    k, v = k[layer].astype(q.dtype), v[layer].astype(q.dtype)
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = jnp.einsum("bkmh,bksh->bkms", rows, k, preferred_element_type=jnp.float32)
    if scales is not None:
        scores = scores * scales[0][layer][:, :, None]
    seen = jnp.arange(S)[None, None] <= positions[..., None]  # [B, T, S]
    scores = scores.reshape(B, N, T, S) * H**-0.5
    scores = jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).reshape(B, K, -1, S)
    if scales is not None:
        weights = weights * scales[1][layer][:, :, None]
    out = jnp.einsum("bkms,bksh->bkmh", weights.astype(v.dtype), v)
    return out.reshape(B, N, T, H).swapaxes(1, 2)


# --- splash attention -----------------------------------------------------------------------


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: "Mask",
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention that never holds its scores, with gradients.

    Args:
        q: queries; T is a multiple of 128.
        k: keys.
        v: values.
        mask: causal; its segments count, marked keys do not.
        interpret: run without a TPU, to test.
    """
    run = on_each_device(
        partial(_splash, interpret=interpret), (HEADS, KV_HEADS, KV_HEADS, ("batch", None)), HEADS
    )
    return run(q, k, v, mask.segments)


def _splash(q, k, v, segments, *, interpret: bool) -> Float[Array, "B T N H"]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as lib

    B, T, N, H = q.shape
    K = k.shape[2]
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
    kernel = _splash_kernel(N // K, T, interpret)
    ids = None if segments is None else lib.SegmentIds(segments, segments)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    y: Any = jax.vmap(over_heads, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids)
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _splash_kernel(group: int, steps: int, interpret: bool):
    """The kernel of one key head and its group of queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as lib
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(size for size in (SPLASH_BLOCK, 256, LANES) if steps % size == 0)
    sizes = lib.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((steps, steps))] * group)
    return lib.make_splash_mqa(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )


# --- decoding ---------------------------------------------------------------------------------


def decode(
    q: Float[Array, "B 1 N H"],
    k: Shaped[Array, "L B K S H"],
    v: Shaped[Array, "L B K S H"],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B 1"],
    scales: tuple[Float[Array, "L B K S"], Float[Array, "L B K S"]] | None = None,
    *,
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
        interpret: run without a TPU, to test.
    """
    size = k.shape[3]
    filled = jnp.where(positions[:, 0] < size, positions[:, 0] + 1, 0).astype(jnp.int32)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    axes = ((None,), ("batch",), HEADS, CACHE, CACHE, CACHE[:4])
    run = on_each_device(partial(_decode, interpret=interpret), axes, HEADS)
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
            scores = jax.lax.dot_general(
                q[head], k[head].astype(kind), (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            ) * H**-0.5  # fmt: skip
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


def _split_alike(heads: int, kv_heads: int) -> bool:
    """Whether every device has the key heads of its queries."""
    return all(count % ways_of("tensor") == 0 for count in (heads, kv_heads))
