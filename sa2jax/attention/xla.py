"""Attention by XLA, on every platform, and by cuDNN."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sa2jax import sharding
from sa2jax.attention.base import Mask, half_precision_refusal


def cudnn_refusal(q: Array, k: Array, v: Array, mask: Mask) -> str | None:
    """Why `cudnn` cannot take these; None for half precision and a mask that is causal alone."""
    if jax.default_backend() != "gpu":  # elsewhere it cannot even be traced
        return "expected a GPU as the default device"
    if not mask.causal or mask.keys is not None or mask.segments is not None:
        return "expected a causal mask without marked keys or segments"
    if q.shape[3] % 8:
        return f"expected heads of a multiple of 8, got {q.shape[3]}"
    return half_precision_refusal(q)


def per_head_refusal(q: Array, k: Array, v: Array, mask: Mask) -> str | None:
    """Why `attention_per_head` should not take these; None if it can."""
    # Heads that are spread over devices are not gone through one by one.
    return "expected heads that are not spread over a mesh" if sharding.is_sharded() else None


def attention_xla(q: Array, k: Array, v: Array, mask: Mask) -> Float[Array, "B T N H"]:
    """XLA's own attention over all heads at once."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask.dense(q.shape[1])[:, None])


def cudnn(q: Array, k: Array, v: Array, mask: Mask) -> Float[Array, "B T N H"]:
    """CuDNN's flash attention; causal."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def attention_per_head(q: Array, k: Array, v: Array, mask: Mask) -> Float[Array, "B T N H"]:
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


def decode_xla(
    q, k, v, layer, positions, scales=None, *, read: int | None = None
) -> Float[Array, "B T N H"]:
    """Queries of one key head are folded into rows of one matrix; see `dispatch.cached_attention`.

    Both products are then plain batched matrix products, and nothing of the cache is moved (on a
    CPU 3-4 times faster).
    """
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[3] if read is None else read
    k, v = (x[layer][:, :, :S].astype(q.dtype) for x in (k, v))
    if scales is not None:
        scales = [x[layer][:, :, None, :S] for x in scales]
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = jnp.einsum("bkmh,bksh->bkms", rows, k, preferred_element_type=jnp.float32)
    if scales is not None:
        scores = scores * scales[0]
    seen = jnp.arange(S)[None, None] <= positions[..., None]  # [B, T, S]
    scores = scores.reshape(B, N, T, S) * H**-0.5
    scores = jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).reshape(B, K, -1, S)
    if scales is not None:
        weights = weights * scales[1]
    out = jnp.einsum("bkms,bksh->bkmh", weights.astype(v.dtype), v)
    return out.reshape(B, N, T, H).swapaxes(1, 2)
