"""Layers that both halves of the flow share: cached attention, windows of ragged chunks."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_SCORES = 4 * 2**20  # of attention that a CPU makes at a time: 16 MB


def attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N S H"],
    v: Float[Array, "B N S H"],
    mask: Bool[Array, "B S"] | Bool[Array, "B T S"],
    bias: Float[Array, "B N T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention with heads before time, as the caches lie in memory; float32 softmax.

    Args:
        q: queries.
        k: keys, cached ones and new ones.
        v: values.
        mask: keys that exist, or those that each query may see; a query without any yields a mean
            over all.
        bias: added to the products before they are scaled.
    """
    B, N, T, H = q.shape
    mask = jnp.repeat(mask if mask.ndim == 3 else mask[:, None], N, axis=0)  # [B*N, 1 or T, S]
    q, k, v = (x.reshape(B * N, -1, H) for x in (q, k, v))
    operands = (q, k, v, mask, None if bias is None else bias.reshape(B * N, T, -1))
    y = jax.lax.platform_dependent(operands, cpu=_attend_in_blocks, default=_attend_all_heads)
    return y.reshape(B, N, T, H).swapaxes(1, 2)


def _attend_all_heads(operands: tuple[Any, ...]) -> Float[Array, "G T H"]:
    """All heads of all rows in one batch."""
    q, k, v, mask, bias = operands
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("gth,gsh->gts", q, k, precision=exact, preferred_element_type=jnp.float32)
    scores = (scores if bias is None else scores + bias) * q.shape[-1] ** -0.5
    scores = scores + jnp.where(mask, 0.0, -1e30)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    # Dividing after the product is the same and touches far fewer numbers.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    y = jnp.einsum("gts,gsh->gth", weights.astype(v.dtype), v, precision=exact)
    return (y / total).astype(v.dtype)


def _attend_in_blocks(operands: tuple[Any, ...]) -> Float[Array, "G T H"]:
    """A few heads at a time: more scores than `MAX_SCORES` are slow to come by on a CPU."""
    (heads, frames, _), keys = operands[0].shape, operands[1].shape[1]
    blocks = -(-heads * frames * keys // MAX_SCORES)
    blocks = next(n for n in range(min(blocks, heads), heads + 1) if heads % n == 0)
    if blocks == 1:
        return _attend_all_heads(operands)
    parts = jax.tree.map(lambda x: x.reshape(blocks, heads // blocks, *x.shape[1:]), operands)
    return jax.lax.map(_attend_all_heads, parts).reshape(operands[0].shape)


def window(x: Array, start: Int[Array, "B"], size: int, *, time: int = 1, batch: int = 0) -> Array:
    """`size` frames of each row from its own start on.

    With `x` a cache followed by new frames and `start` the number of new frames that count, this
    is the next cache: its newest frame is the last that counts, and a row without new frames keeps
    its old cache.

    Args:
        x: rows of frames.
        start: first frame of each row.
        size: frames to take.
        time: axis of the frames.
        batch: axis of the rows, before `time`.
    """

    def cut(row, first):
        return jax.lax.dynamic_slice_in_dim(row, first, size, time - 1)

    return jax.vmap(cut, in_axes=(batch, 0), out_axes=batch)(x, start)
