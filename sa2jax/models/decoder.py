"""The language model: a Qwen2.5 decoder with an explicit key-value cache.

Source: Qwen2.5 (RMSNorm, grouped-query attention with biases on q, k and v, rotary halves, SwiGLU),
with an untied output matrix, as the Step-Audio 2 release uses it. Attention is full: the released
config turns the sliding window off.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sa2jax.config import DecoderConfig
from sa2jax.nn import (
    Linear,
    Policy,
    RMSNorm,
    attention,
    cached_attention,
    over_layers,
    param,
    rotary,
    stack,
)
from sa2jax.sharding import shard


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "length"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens a row has seen, always contiguous from slot 0.

    Attributes:
        k: keys after rotation, [L, B, K, S, H]: heads outside, so that one head's slots lie side
            by side, as attention reads them.
        v: values, [L, B, K, S, H].
        length: filled slots of each row, [B].
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    length: Int[Array, "B"]

    @classmethod
    def zeros(cls, cfg: DecoderConfig, batch: int, size: int, dtype: DTypeLike) -> Self:
        """An empty cache with room for `size` tokens a row."""
        shape = (cfg.layers, batch, cfg.kv_heads, size, cfg.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    @property
    def size(self) -> int:
        """Slots per row."""
        return self.k.shape[3]

    def write(
        self,
        layer: Int[Array, ""] | int,
        slots: Int[Array, "B T"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
    ) -> Self:
        """Put new keys and values in their slots; slots beyond the cache are dropped."""
        rows = jnp.arange(slots.shape[0])[:, None]
        at = lambda cache: cache.at[layer, rows, :, slots]  # noqa: E731
        put = {"mode": "drop", "unique_indices": True}
        return replace(
            self,
            k=at(self.k).set(k.astype(self.k.dtype), **put),
            v=at(self.v).set(v.astype(self.v.dtype), **put),
        )


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, cfg: DecoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        embed = {"embed": cfg.embed}
        heads = {"heads": cfg.heads, "head_dim": cfg.head_dim}
        kv_heads = {"kv_heads": cfg.kv_heads, "head_dim": cfg.head_dim}
        self.rope_theta = cfg.rope_theta
        self.q = Linear(embed, heads, policy=policy, rngs=rngs)
        self.k = Linear(embed, kv_heads, policy=policy, rngs=rngs)
        self.v = Linear(embed, kv_heads, policy=policy, rngs=rngs)
        self.o = Linear(heads, embed, bias=False, policy=policy, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cache: KVCache | None,
        layer: Int[Array, ""] | int,
        fresh: bool,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Add this call's keys and values to the cache and attend to it, or to them if `fresh`."""
        q = rotary(self.q(x), positions, self.rope_theta)
        k = rotary(self.k(x), positions, self.rope_theta)
        v = self.v(x)
        if cache is not None:
            cache = cache.write(layer, positions, k, v)
        if cache is None or fresh:
            return self.o(attention(q, k, v, mask)), cache
        k, v = cache.k[layer].astype(q.dtype), cache.v[layer].astype(q.dtype)
        return self.o(cached_attention(q, k, v, mask)), cache


class Mlp(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) · up(x))`."""

    def __init__(self, cfg: DecoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        embed, wide = {"embed": cfg.embed}, {"mlp": cfg.mlp}
        self.gate = Linear(embed, wide, bias=False, policy=policy, rngs=rngs)
        self.up = Linear(embed, wide, bias=False, policy=policy, rngs=rngs)
        self.down = Linear(wide, embed, bias=False, policy=policy, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to each token."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, cfg: DecoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.embed, eps=cfg.norm_eps, policy=policy, rngs=rngs)
        self.attn = SelfAttention(cfg, policy=policy, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.embed, eps=cfg.norm_eps, policy=policy, rngs=rngs)
        self.mlp = Mlp(cfg, policy=policy, rngs=rngs)

    def __call__(self, x, positions, mask, cache, layer, fresh):
        """Add attention, then the MLP."""
        y, cache = self.attn(self.attn_norm(x), positions, mask, cache, layer, fresh)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """Embeddings in, hidden states and a grown cache out.

    Layers are one stacked module in a scan, or, with `stacked=False`, a list in a loop: see
    `nn.unstack` for why a CPU wants the latter.
    """

    def __init__(self, cfg: DecoderConfig, *, policy: Policy, rngs: nnx.Rngs, stacked: bool = True):
        self.cfg, self.policy = cfg, policy
        self.table = param(
            rngs, (cfg.vocab, cfg.embed), ("vocab", "embed"), dtype=policy.param, scale=0.02
        )
        make = lambda rngs: DecoderLayer(cfg, policy=policy, rngs=rngs)  # noqa: E731
        if stacked:
            self.layers = stack(make, cfg.layers, rngs)
        else:
            self.layers = nnx.List([make(rngs) for _ in range(cfg.layers)])
        self.norm = RMSNorm(cfg.embed, eps=cfg.norm_eps, policy=policy, rngs=rngs)
        self.head = Linear(
            {"embed": cfg.embed}, {"vocab": cfg.vocab}, bias=False, policy=policy, rngs=rngs
        )

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings."""
        return self.table[...][ids].astype(self.policy.compute)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores of each token as the next one, float32."""
        with jax.named_scope("head"):
            return self.head(hidden).astype(jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache | None = None,
        lengths: Int[Array, "B"] | None = None,
        *,
        fresh: bool = False,
        trace: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Run the layers over new tokens.

        Args:
            x: embeddings of the new tokens, right-padded.
            cache: what each row has seen before; None to look at `x` alone.
            lengths: valid tokens of each row in `x`, by default all. Padding is not cached, and
                what comes out at its positions has no meaning.
            fresh: the cache is known to be empty: fill it, but look at the new tokens only.
            trace: filled with intermediate results by name, to compare implementations.

        Returns:
            Normed hidden states of the new tokens and the cache with these tokens added.
        """
        batch, steps = x.shape[:2]
        start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
        lengths = jnp.full(batch, steps, jnp.int32) if lengths is None else lengths
        offsets = jnp.arange(steps)[None]
        size = steps if cache is None else cache.size
        # Padding gets a position that no slot has: it is never written, so never seen.
        positions = jnp.where(offsets < lengths[:, None], start[:, None] + offsets, size + offsets)
        seen = steps if fresh else size
        mask = jnp.arange(seen)[None, None] <= positions[..., None]  # [B, T, S]

        def layer(carry, xs):
            (x, cache), (module, index) = carry, xs
            x, cache = module(x, positions, mask, cache, index, fresh)
            x = shard(x, "batch", None, None)
            return (x, cache), x if trace is not None else None

        with jax.named_scope("layers"):
            (x, cache), outputs = over_layers(layer, (x, cache), self.layers)
        x = self.norm(x)
        if trace is not None:
            trace |= {"layers": outputs, "norm": x}
        if cache is not None:
            cache = replace(cache, length=start + lengths)
        return x, cache
