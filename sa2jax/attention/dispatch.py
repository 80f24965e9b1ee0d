"""Which back end computes attention: `IMPLEMENTATIONS` has them all, `PREFERENCE` the order.

By default it is chosen by the platform that a program is compiled for: the first of its order that
takes the operands. A caller may name another; there is no fallback then, but an error.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sa2jax.attention.base import Implementation, Mask, Operation
from sa2jax.attention.decode import decode, decode_refusal
from sa2jax.attention.splash import splash, splash_refusal
from sa2jax.attention.xla import (
    attention_per_head,
    attention_xla,
    cudnn,
    cudnn_refusal,
    decode_xla,
    per_head_refusal,
)
from sa2jax.errors import ConfigError

FALLBACK = "xla"  # takes everything, on every platform
IMPLEMENTATIONS: dict[str, Implementation] = {
    "cudnn": Implementation(attention=Operation(cudnn, cudnn_refusal), platforms=("gpu",)),
    "decode": Implementation(
        cached_attention=Operation(decode, decode_refusal), platforms=("tpu",)
    ),
    "per_head": Implementation(attention=Operation(attention_per_head, per_head_refusal)),
    "splash": Implementation(attention=Operation(splash, splash_refusal), platforms=("tpu",)),
    "xla": Implementation(
        attention=Operation(attention_xla), cached_attention=Operation(decode_xla)
    ),
}
PREFERENCE = {"cpu": ("per_head",), "gpu": ("cudnn",), "tpu": ("splash", "decode")}
_COMPILED_FOR = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # what `platform_dependent` calls them

OperationName = Literal["attention", "cached_attention"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    *,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with a float32 softmax; float32 inputs are multiplied exactly.

    By default: one head after the other on a CPU, splash attention on a TPU and cuDNN's flash
    attention on a GPU where they can (half precision, causal, heads of 128),
    `jax.nn.dot_product_attention` otherwise.

    Args:
        q: queries; N is a multiple of K, and each group of N/K queries shares one key head.
        k: keys.
        v: values.
        mask: which keys a query may look at. A query that sees none yields a mean over all keys.
        implementation: a name of `IMPLEMENTATIONS`; by default chosen as above.

    Raises:
        ConfigError: if there is no such implementation, or it cannot take these operands or this
            process's platform.
    """
    return _dispatch("attention", implementation, {}, q, k, v, mask)


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Shaped[Array, "L B K S H"],
    v: Shaped[Array, "L B K S H"],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    scales: tuple[Float[Array, "L B K S"], Float[Array, "L B K S"]] | None = None,
    *,
    read: int | None = None,
    implementation: str | None = None,
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
        read: the first so many slots hold all that any query may look at; by default all do.
        implementation: see `attention`; by default the decode kernel on a TPU where it can.

    Raises:
        ConfigError: see `attention`.
    """
    options = {"read": read}
    return _dispatch("cached_attention", implementation, options, q, k, v, layer, positions, scales)


def check_implementation(name: str | None) -> None:
    """Refuse a name that no implementation has, or one that does not run on this platform.

    Raises:
        ConfigError: in that case.
    """
    if name is None:
        return
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"attention {name!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    platforms, platform = IMPLEMENTATIONS[name].platforms, jax.default_backend()
    if platform not in platforms:
        raise ConfigError(f"attention {name!r} runs on {' or '.join(platforms)}, not on {platform}")


def implementation_of(name: str | None, operation: OperationName) -> str | None:
    """The implementation of one operation if `name` is asked for both.

    One that lacks the operation leaves it to the default: `splash` has none over a cache.
    """
    if name is None or getattr(IMPLEMENTATIONS[name], operation) is None:
        return None
    return name


def _dispatch(
    operation: OperationName, name: str | None, options: dict[str, int | None], q: Array, *others
) -> Array:
    exact = "highest" if q.dtype == jnp.float32 else None
    with jax.default_matmul_precision(exact):
        if name is not None:
            return _named(operation, name, q, *others).run(q, *others, **options)
        choices = {
            _COMPILED_FOR[platform]: partial(found.run, **options)
            for platform, names in PREFERENCE.items()
            if (found := _first(operation, names, q, *others)) is not None
        }
        default = partial(getattr(IMPLEMENTATIONS[FALLBACK], operation).run, **options)
        return jax.lax.platform_dependent(q, *others, **choices, default=default)


def _first(operation: OperationName, names: tuple[str, ...], *operands) -> Operation | None:
    """The first that takes the operands."""
    for name in names:
        found: Operation | None = getattr(IMPLEMENTATIONS[name], operation)
        if found is not None and found.refusal(*operands) is None:
            return found
    return None


def _named(operation: OperationName, name: str, *operands) -> Operation:
    """The one that was asked for."""
    check_implementation(name)
    found: Operation | None = getattr(IMPLEMENTATIONS[name], operation)
    if found is None:
        able = [n for n, i in IMPLEMENTATIONS.items() if getattr(i, operation) is not None]
        raise ConfigError(f"attention {name!r} has no {operation}: expected {' or '.join(able)}")
    if (why := found.refusal(*operands)) is not None:
        raise ConfigError(f"attention {name!r} cannot compute this: {why}")
    return found
