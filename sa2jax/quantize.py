"""Int8 quantization: weights with a scale for each output, and key-value caches.

A product with int8 weights is `(x · kernel) * scale`: activations keep their dtype, and a device
reads half the bytes of bfloat16 for each token. The numbers are those of `qwix.quantize`
(symmetric, calibrated to the largest value of each row); `qarrays` gives them as qwix arrays.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jaxtyping import Array, Float, Int8

KERNEL, SCALE = ".kernel", ".scale"


def quantize_rows(x: Float[Array, "*B D"]) -> tuple[Int8[Array, "*B D"], Float[Array, "*B"]]:
    """int8 numbers and the float32 scale of each row, such that `numbers * scale` is near `x`."""
    rows = tuple(range(x.ndim - 1))
    quantized = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=rows)
    return quantized.qvalue, quantized.scale[..., 0]


quantize_block = jax.jit(quantize_rows)
dequantize_block = jax.jit(lambda numbers, scale: numbers.astype(jnp.float32) * scale[..., None])


def scale_of(leaf: str) -> str:
    """The name of the scales of a kernel's leaf."""
    return leaf.removesuffix(KERNEL) + SCALE


def quantized_leaves(leaves: Mapping[str, Any]) -> list[str]:
    """Dotted names of the kernels that have scales in a model or a checkpoint."""
    return [name for name in leaves if name.endswith(KERNEL) and scale_of(name) in leaves]


def quantize_leaf(
    name: str, leaf: Float[Array, "*B D"], goals: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """A float leaf as the int8 model has it: a kernel is numbers and scales under their names.

    Args:
        name: of the leaf, dotted.
        leaf: its numbers.
        goals: leaves of the int8 model, `jax.ShapeDtypeStruct` with or without a sharding.
    """
    if goals[name].dtype != jnp.int8:
        return {name: leaf.astype(goals[name].dtype)}
    names = name, scale_of(name)
    places = [goals[n].sharding for n in names]
    if None in places:
        return dict(zip(names, quantize_block(leaf), strict=True))
    return dict(zip(names, jax.jit(quantize_rows, out_shardings=(*places,))(leaf), strict=True))


def quantize_params(params: Any, like: Any) -> Any:
    """Parameters of a float model as those of its int8 twin, one leaf after the other.

    Args:
        params: a plain nested dict.
        like: the parameters wanted, such as `Functional.abstract` of the int8 model.
    """
    from sa2jax.checkpoint import flatten, unflatten

    have, goals = flatten(params), flatten(like)
    done: dict[str, Any] = {}
    for name, leaf in have.items():
        done |= quantize_leaf(name, leaf, goals)
    return unflatten(done)


def round_to_int8(x: Float[np.ndarray, "*B D"]) -> Float[np.ndarray, "*B D"]:
    """The float32 numbers that are left of a matrix."""
    return np.asarray(dequantize_block(*quantize_block(x)))


def qarrays(params: Any) -> dict[str, qwix.QArray]:
    """The int8 kernels of a model by dotted name, as arrays that qwix's functions take."""
    from sa2jax.checkpoint import flatten

    leaves = flatten(params)
    return {
        name: qwix.QArray(leaves[name], leaves[scale_of(name)][..., None], qtype=jnp.int8)
        for name in quantized_leaves(leaves)
    }
