"""Splash attention: causal attention on TPU that never materialises its scores, with gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sa2jax.attention.base import (
    HEADS,
    KV_HEADS,
    LANES,
    Mask,
    tile_refusal,
)
from sa2jax.sharding import per_device

SPLASH_BLOCK = 512


def splash_refusal(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], mask: Mask
) -> str | None:
    """Why `splash` cannot take these; None if it can.

    It takes half precision, whole tiles, heads split alike, and a mask that is causal, with
    segments or without.
    """
    if not mask.causal or mask.keys is not None:
        return "expected a causal mask without marked keys"
    return tile_refusal(q, k.shape[2], q.shape[1], "tokens")


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
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
    run = per_device(
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
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((steps, steps))] * group)
    return lib.make_splash_mqa(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
