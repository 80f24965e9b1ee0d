"""What attention's back ends share: masks, logical axes, and their protocol."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sa2jax.sharding import axis_size

LANES = 128  # the width of a TPU's registers
HALF = (jnp.bfloat16, jnp.float16)
HEADS = ("batch", None, "heads", None)
KV_HEADS = ("batch", None, "kv_heads", None)
CACHE_AXES = (None, "batch", "kv_heads", None, None)  # layers, rows, heads, slots, head_dim
PLATFORMS = ("cpu", "gpu", "tpu")  # as `jax.default_backend` calls them


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "segments"], meta_fields=["causal"])
@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query may look at: what all of the rules given allow.

    Attributes:
        causal: those of its own place and before.
        keys: those that are marked, [B, S].
        segments: those of its own segment, [B, T].
    """

    causal: bool = False
    keys: Bool[Array, "B S"] | None = None
    segments: Int[Array, "B T"] | None = None

    def dense(self, steps: int) -> Bool[Array, "B T S"]:
        """The whole table; one row for the batch if all its rows are alike."""
        shape = (1, steps, steps)
        mask = jnp.tril(jnp.ones(shape, bool)) if self.causal else jnp.ones(shape, bool)
        if self.keys is not None:
            mask = mask & self.keys[:, None]
        if self.segments is not None:
            mask = mask & (self.segments[:, :, None] == self.segments[:, None])
        return mask


def split_alike(heads: int, kv_heads: int) -> bool:
    """Whether every device has the key heads of its queries."""
    return heads % axis_size("heads") == 0 and kv_heads % axis_size("kv_heads") == 0


def half_precision_refusal(q: Float[Array, "B T N H"]) -> str | None:
    """What hardware kernels say of float32, which is asked for to be exact: they would round it."""
    return None if q.dtype in HALF else f"expected bfloat16 or float16, got {q.dtype}"


def tile_refusal(q: Float[Array, "B T N H"], kv_heads: int, length: int, unit: str) -> str | None:
    """What hardware kernels say of operands; None for whole tiles, heads alike, half precision.

    Args:
        q: queries.
        kv_heads: heads of keys.
        length: of the axis that is cut into tiles, beside that of a head.
        unit: what it counts.
    """
    width = q.shape[3]
    if length % LANES or width % LANES:
        return f"expected {unit} and heads of a multiple of {LANES}, got {length} and {width}"
    if not split_alike(q.shape[2], kv_heads):
        return "expected a mesh that divides the heads of queries and keys"
    return half_precision_refusal(q)


def _takes_all(*operands: object) -> str | None:
    return None


class Operation(NamedTuple):
    """One operation of a back end.

    Attributes:
        run: computes it.
        refusal: why it cannot with these operands, those of `run`, in a few words; None if it can.
    """

    run: Callable[..., Array]
    refusal: Callable[..., str | None] = _takes_all


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A back end of attention; see `dispatch.IMPLEMENTATIONS`.

    Attributes:
        attention: over whole sequences, if it has that; operands as of `dispatch.attention`.
        cached_attention: over a cache, if it has that; operands as of `dispatch.cached_attention`.
        platforms: where it runs.
    """

    attention: Operation | None = None
    cached_attention: Operation | None = None
    platforms: tuple[str, ...] = PLATFORMS
