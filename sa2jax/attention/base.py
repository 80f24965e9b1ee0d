"""What attention's back ends share: which keys a query may look at, and axes by name."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sa2jax.sharding import axis_size

LANES = 128  # the width of a TPU's registers
HALF = (jnp.bfloat16, jnp.float16)
HEADS = ("batch", None, "heads", None)
KV_HEADS = ("batch", None, "kv_heads", None)
CACHE_AXES = (None, "batch", "kv_heads", None, None)  # layers, rows, heads, slots, head_dim


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
