"""Which back end computes attention, chosen by the platform that a program is compiled for.

Each `*_fits` says whether one that only some hardware has computes a case at all. Those take half
precision only: float32 is asked for to be exact, and they would round it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sa2jax import sharding
from sa2jax.attention.base import Mask
from sa2jax.attention.decode import decode, decode_fits
from sa2jax.attention.splash import splash, splash_fits
from sa2jax.attention.xla import attention_per_head, attention_xla, cudnn, cudnn_fits, decode_xla


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with a float32 softmax; float32 inputs are multiplied exactly.

    The back end is chosen by the platform that a program is compiled for: one head after the other
    on a CPU, splash attention on a TPU and cuDNN's flash attention on a GPU where they fit (half
    precision, causal, heads of 128), `jax.nn.dot_product_attention` otherwise.

    Args:
        q: queries; N is a multiple of K, and each group of N/K queries shares one key head.
        k: keys.
        v: values.
        mask: which keys a query may look at. A query that sees none yields a mean over all keys.
    """
    exact = "highest" if q.dtype == jnp.float32 else None
    # Heads that are spread over devices are not gone through one by one.
    choices = {"cpu": attention_xla if sharding.is_sharded() else attention_per_head}
    if mask.causal and mask.keys is None:
        if splash_fits(q, k):
            choices["tpu"] = splash
        if cudnn_fits(q) and mask.segments is None:
            choices["cuda"] = cudnn
    with jax.default_matmul_precision(exact):
        return jax.lax.platform_dependent(q, k, v, mask, **choices, default=attention_xla)


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Shaped[Array, "L B K S H"],
    v: Shaped[Array, "L B K S H"],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    scales: tuple[Float[Array, "L B K S"], Float[Array, "L B K S"]] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention over the keys and values of one layer of a cache, as far as each query's position.

    Args:
        q: queries.
        k: keys of all layers, heads before slots.
        v: values of all layers.
        layer: the layer to look at.
        positions: the last slot that each query may look at; a query of a position that no slot
            has is padding, and its result has no meaning.
        scales: of int8 keys and values, one for each head and slot.
    """
    exact = "highest" if q.dtype == jnp.float32 else None
    choices = {"tpu": decode} if decode_fits(q, k) else {}
    with jax.default_matmul_precision(exact):
        return jax.lax.platform_dependent(
            q, k, v, layer, positions, scales, **choices, default=decode_xla
        )
