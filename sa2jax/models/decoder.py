"""The language model: a Qwen2.5 decoder with an explicit key-value cache.

Source: Qwen2.5 (RMSNorm, grouped-query attention with biases on q, k and v, rotary halves, SwiGLU),
with an untied output matrix, as the Step-Audio 2 release uses it. Attention is full: the released
config turns the sliding window off.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from sa2jax.attention.base import CACHE_AXES, Mask
from sa2jax.attention.dispatch import attention, cached_attention, implementation_of
from sa2jax.config import DecoderConfig
from sa2jax.nn import Linear, Policy, Remat, RMSNorm, make_layers, over_layers, param, rotary
from sa2jax.quantize import quantize_rows
from sa2jax.sharding import per_device, shard

NEW_AXES = ("batch", None, "kv_heads", None)  # rows, new tokens, heads, head_dim


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "length", "scales"],
    meta_fields=["read"],
)
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens a row has seen, always contiguous from slot 0.

    Attributes:
        k: keys after rotation, [L, B, K, S, H]: heads outside, so that one head's slots lie side
            by side, as attention reads them.
        v: values, [L, B, K, S, H].
        length: filled slots of each row, [B].
        scales: of int8 keys and of int8 values, [L, B, K, S] each.
        read: slots that attention looks at where it would read all, None for all (static).
    """

    k: Shaped[Array, "L B K S H"]
    v: Shaped[Array, "L B K S H"]
    length: Int[Array, "B"]
    scales: tuple[Float[Array, "L B K S"], Float[Array, "L B K S"]] | None = None
    read: int | None = None

    @classmethod
    def zeros(cls, cfg: DecoderConfig, batch: int, size: int, dtype: DTypeLike) -> Self:
        """An empty cache with room for `size` tokens a row; int8 ones have scales."""
        shape = (cfg.layers, batch, cfg.kv_heads, size, cfg.head_dim)

        def empty(shape, dtype):
            return shard(jnp.zeros(shape, dtype), *CACHE_AXES[: len(shape)])

        scales = None
        if jnp.dtype(dtype) == jnp.int8:
            scales = empty(shape[:-1], jnp.float32), empty(shape[:-1], jnp.float32)
        length = shard(jnp.zeros(batch, jnp.int32), "batch")
        return cls(empty(shape, dtype), empty(shape, dtype), length, scales)

    @property
    def size(self) -> int:
        """Slots per row."""
        return self.k.shape[3]

    def grow(self, size: int) -> Self:
        """The same cache with `size` slots per row, at least as many as it has."""
        pads = [(0, 0)] * 3 + [(0, size - self.size), (0, 0)]
        return self._map_arrays(lambda x: jnp.pad(x, pads[: x.ndim]))

    def add_rows(self, count: int) -> Self:
        """The same cache with so many empty rows behind its own."""
        pads = [(0, 0), (0, count), (0, 0), (0, 0), (0, 0)]
        cache = self._map_arrays(lambda x: jnp.pad(x, pads[: x.ndim]))
        return replace(cache, length=jnp.pad(self.length, (0, count)))

    def take_rows(self, rows: Int[Array, "P"], slots: int) -> Self:
        """The first slots of one row of each of the P parts that rows are dealt to.

        Args:
            rows: of each part, counted within it.
            slots: how many.
        """

        def take(x: Array) -> Array:
            axes = CACHE_AXES[: x.ndim]

            def own(x, row):
                sizes = (x.shape[0], 1, x.shape[2], slots, *x.shape[4:])
                return jax.lax.dynamic_slice(x, (0, row[0], 0, 0, 0)[: x.ndim], sizes)

            return per_device(own, (axes, ("batch",)), axes)(x, rows)

        return replace(self._map_arrays(take), length=jnp.zeros_like(rows))

    def put_window(
        self,
        rows: Int[Array, "P"],
        other: Self,
        start: Int[Array, "P"],
        count: int,
        valid: Bool[Array, "P"],
    ) -> Self:
        """The same cache with slots of another, which has a row for each part.

        Args:
            rows: where they go, as of `take_rows`.
            other: what `take_rows` gave, changed.
            start: the first slot that differs.
            count: how many may differ; the slots before a window that would not fit are equal.
            valid: parts in which something is put.
        """

        def put(x: Array, new: Array) -> Array:
            axes = CACHE_AXES[: x.ndim]
            slots = min(count, new.shape[3])

            def own(x, new, row, start, valid):
                first = jnp.minimum(start[0], new.shape[3] - slots)
                sizes = (*new.shape[:3], slots, *new.shape[4:])
                window = jax.lax.dynamic_slice(new, (0, 0, 0, first, 0)[: x.ndim], sizes)
                at = (0, row[0], 0, first, 0)[: x.ndim]
                old = jax.lax.dynamic_slice(x, at, sizes)
                return jax.lax.dynamic_update_slice(x, jnp.where(valid[0], window, old), at)

            each = ("batch",)
            return per_device(own, (axes, axes, each, each, each), axes)(x, new, rows, start, valid)

        scales = None
        if self.scales is not None and other.scales is not None:
            scales = put(self.scales[0], other.scales[0]), put(self.scales[1], other.scales[1])
        return replace(self, k=put(self.k, other.k), v=put(self.v, other.v), scales=scales)

    def _map_arrays(self, change: Callable[[Array], Array]) -> Self:
        """The same cache with `change` applied to all that has layers, rows and slots."""
        scales = None if self.scales is None else tuple(map(change, self.scales))
        return replace(self, k=change(self.k), v=change(self.v), scales=scales)

    def write(
        self,
        layer: Int[Array, ""] | int,
        start: Int[Array, "B"],
        lengths: Int[Array, "B"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
    ) -> Self:
        """Put the first `lengths` of new keys and values in the slots from `start` on."""
        layer = jnp.asarray(layer, jnp.int32)

        def put(cache: Array, new: Array) -> Array:
            axes, new_axes = CACHE_AXES[: cache.ndim], NEW_AXES[: new.ndim]
            write = per_device(_write, (axes, new_axes, (), ("batch",), ("batch",)), axes)
            return write(cache, new.astype(cache.dtype), layer, start, lengths)

        if self.scales is None:
            return replace(self, k=put(self.k, k), v=put(self.v, v))
        (k, of_k), (v, of_v) = quantize_rows(k), quantize_rows(v)
        scales = put(self.scales[0], of_k), put(self.scales[1], of_v)
        return replace(self, k=put(self.k, k), v=put(self.v, v), scales=scales)


def _write(
    cache: Shaped[Array, "L B K S *H"],
    new: Shaped[Array, "B T K *H"],
    layer: Int[Array, ""],
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> Shaped[Array, "L B K S *H"]:
    """One slice after the other: a TPU's scatter would move the whole cache to another layout."""
    rows, size = new.shape[0], cache.shape[3]
    new = new[:, :size].swapaxes(1, 2)  # [B, K, T, *H]
    steps = new.shape[2]

    def write_row(row, cache):
        # A slice that does not fit is moved by XLA so that it does; its contents stay in place.
        first = jnp.minimum(start[row], size - steps)
        at = (layer, row, 0, first, 0)[: cache.ndim]
        ahead = start[row] - first
        old = jax.lax.dynamic_slice(cache, at, (1, 1, *new.shape[1:]))
        offsets = jnp.arange(steps).reshape(-1, *[1] * (new.ndim - 3))
        own = (offsets >= ahead) & (offsets < ahead + lengths[row])
        moved = new[row] if steps == 1 else jnp.roll(new[row], ahead, axis=1)
        return jax.lax.dynamic_update_slice(cache, jnp.where(own, moved, old[0, 0])[None, None], at)

    if rows == 1:
        return write_row(0, cache)
    # A loop lets a TPU keep the cache in another layout inside than outside; a CPU compiles it
    # sooner.
    return jax.lax.platform_dependent(
        cache,
        tpu=lambda cache: reduce(lambda cache, row: write_row(row, cache), range(rows), cache),
        default=lambda cache: jax.lax.fori_loop(0, rows, write_row, cache),
    )


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, cfg: DecoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        embed = {"embed": cfg.embed}
        heads = {"heads": cfg.heads, "head_dim": cfg.head_dim}
        kv_heads = {"kv_heads": cfg.kv_heads, "head_dim": cfg.head_dim}
        self.rope_theta = cfg.rope_theta
        self.implementation = implementation_of(policy.attention, "attention")
        self.cached_implementation = implementation_of(policy.attention, "cached_attention")
        self.q = Linear(embed, heads, policy=policy, rngs=rngs)
        self.k = Linear(embed, kv_heads, policy=policy, rngs=rngs)
        self.v = Linear(embed, kv_heads, policy=policy, rngs=rngs)
        self.o = Linear(heads, embed, bias=False, policy=policy, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B"],
        cache: KVCache | None,
        layer: Int[Array, ""] | int,
        cache_is_empty: bool,
        segments: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Add this call's keys and values to the cache and attend to it.

        With `cache_is_empty` attention looks at the new keys and values alone.
        """
        q = rotary(self.q(x), positions, self.rope_theta)
        k = rotary(self.k(x), positions, self.rope_theta)
        v = self.v(x)
        if cache is not None:
            cache = cache.write(layer, cache.length, lengths, k, v)
        if cache is None or cache_is_empty:
            mask = Mask(causal=True, segments=segments)
            return self.o(attention(q, k, v, mask, implementation=self.implementation)), cache
        how = self.cached_implementation
        y = cached_attention(
            q, cache.k, cache.v, layer, positions, cache.scales, read=cache.read, implementation=how
        )
        return self.o(y), cache


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

    def __call__(self, x, positions, lengths, cache, layer, cache_is_empty, segments):
        """Add attention, then the MLP."""
        y, cache = self.attn(
            self.attn_norm(x), positions, lengths, cache, layer, cache_is_empty, segments
        )
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

        def make(rngs):
            return DecoderLayer(cfg, policy=policy, rngs=rngs)

        self.layers = make_layers(make, cfg.layers, rngs, stacked=stacked)
        self.norm = RMSNorm(cfg.embed, eps=cfg.norm_eps, policy=policy, rngs=rngs)
        self.head = Linear(
            {"embed": cfg.embed}, {"vocab": cfg.vocab}, bias=False, policy=policy.of_head, rngs=rngs
        )

    @property
    def cache_dtype(self) -> DTypeLike:
        """Of keys and values in a cache."""
        return self.policy.compute if self.policy.cache is None else self.policy.cache

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings."""
        x = self.table[...][ids].astype(self.policy.compute)
        # First widths, then rows: in one step XLA would gather the whole on each device.
        return shard(shard(x, "rows", None, "embed"), "batch", None, None)

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
        cache_is_empty: bool = False,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        remat: Remat | None = None,
        trace: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Run the layers over new tokens.

        Args:
            x: embeddings of the new tokens, right-padded.
            cache: what each row has seen before; None to look at `x` alone.
            lengths: valid tokens of each row in `x`, by default all. Padding is not cached, and
                what comes out at its positions has no meaning.
            cache_is_empty: the cache is known to be empty: fill it, but attend to the new tokens
                only.
            segments: without a cache, which of a row's packed sequences each token belongs to; it
                looks at no other.
            positions: without a cache, of each token in its own sequence; by default in the row.
            remat: what a gradient computes again, see `nn.over_layers`.
            trace: filled with intermediate results by name, to compare implementations.

        Returns:
            Normed hidden states of the new tokens and the cache with these tokens added.
        """
        batch, steps = x.shape[:2]
        start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
        lengths = jnp.full(batch, steps, jnp.int32) if lengths is None else lengths
        offsets = jnp.arange(steps)[None]
        size = steps if cache is None else cache.size
        # Padding gets a position that no slot has.
        if positions is None:
            inside = offsets < lengths[:, None]
            positions = jnp.where(inside, start[:, None] + offsets, size + offsets)

        def layer(carry, xs):
            (x, cache), (module, index) = carry, xs
            x, cache = module(x, positions, lengths, cache, index, cache_is_empty, segments)
            x = shard(x, "batch", None, None)
            return (x, cache), x if trace is not None else None

        with jax.named_scope("layers"):
            (x, cache), outputs = over_layers(layer, (x, cache), self.layers, remat)
        x = self.norm(x)
        if trace is not None:
            trace |= {"layers": outputs, "norm": x}
        if cache is not None:
            cache = replace(cache, length=start + lengths)
        return x, cache
