"""The estimator of the flow: a diffusion transformer (DiT) modulated by the noise level.

Source: DiT (arXiv 2212.09748) as the official `cosyvoice2.flow.decoder_dit` has it: adaLN-zero
with a third branch, two causal convolutions, full attention without positions.

**Streaming.** Within a chunk attention is full; across chunks keys and values are cached, one set
per Euler step and layer, and bounded: the prompt's frames and `keep_frames` others of the reply
stay. Attention without positions does not depend on where a key lies, so a cache is a set of
`A = prompt + keep_frames` slots: a new frame takes the slot of an evicted one and nothing moves.
`slot_order` says which slot holds what and so *is* the eviction policy, as a few integers per row:

- default: `slot_order` is the frame's number in time. The prompt and the NEWEST `keep_frames` stay.
- `parity=True`: `slot_order` is the place in the official list, newest chunk first, from which
  `[:prompt] + [-keep_frames:]` remain: the newest `prompt` places and the OLDEST `keep_frames`.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sa2jax.models.convolution import Conv
from sa2jax.models.flow.layers import attend, window
from sa2jax.nn import LayerNorm, Linear, Policy, make_layers, over_layers, tap
from sa2jax.speech_config import EstimatorConfig

EPS = 1e-6  # of the norms that adaLN modulates
TIME_SCALE = 1000.0
ADALN_PARTS = 9  # shift, scale and gate of attention, MLP and convolution, in this order


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EstimatorState:
    """Key-value and convolution caches of each row, for each of E Euler steps and L layers.

    The axis of size 2 before the rows holds the conditional and the unconditional branch.

    Attributes:
        slot_order: which entry each slot holds, −1 for none.
        conv: last inputs of both convolutions, side by side.
        kv: keys and values.
    """

    slot_order: Int[Array, "B A"]
    conv: Float[Array, "E L 2 B K C"] = field(metadata={"batch_axis": 3})
    kv: Float[Array, "E L 2 2 B N A H"] = field(metadata={"batch_axis": 4})

    @classmethod
    def zeros(
        cls, cfg: EstimatorConfig, steps: int, batch: int, slots: int, dtype: DTypeLike
    ) -> Self:
        """Empty caches."""
        conv = (steps, cfg.layers, 2, batch, cfg.kernel - 1, 2 * cfg.embed)
        kv = (steps, cfg.layers, 2, 2, batch, cfg.heads, slots, cfg.head_dim)
        return cls(
            slot_order=jnp.full((batch, slots), -1, jnp.int32),
            conv=jnp.zeros(conv, dtype),
            kv=jnp.zeros(kv, dtype),
        )

    @property
    def slots(self) -> int:
        """Capacity in frames."""
        return self.slot_order.shape[1]

    @property
    def filled(self) -> Int[Array, "B"]:
        """Frames in the cache, of each row."""
        return jnp.sum(self.slot_order >= 0, axis=1)

    def grow(self, slots: int) -> Self:
        """Grow the cache to at least this many slots."""
        extra = max(slots - self.slots, 0)
        order = jnp.pad(self.slot_order, [(0, 0), (0, extra)], constant_values=-1)
        kv = jnp.pad(self.kv, [(0, 0)] * 6 + [(0, extra), (0, 0)])
        return replace(self, slot_order=order, kv=kv)

    def evict_and_insert(
        self,
        new: "CacheUpdate",
        counts: Int[Array, "B"],
        prompt: Int[Array, "B"],
        seen: Int[Array, "B"],
        *,
        keep_frames: int,
        parity: bool,
    ) -> Self:
        """Evict frames that no longer stay and insert the first `counts` new ones of each row.

        Args:
            new: entries of a chunk.
            counts: frames that count.
            prompt: frames of each row's prompt.
            seen: frames of each row before these.
            keep_frames: frames that stay beside the prompt.
            parity: which ones stay, see the module's text.
        """
        order, places = assign_slots(
            self.slot_order, new.kv.shape[5], counts, prompt, seen, keep_frames, parity
        )
        conv = new.conv.reshape(self.conv.shape).astype(self.conv.dtype)
        kv = new.kv.reshape(*self.kv.shape[:6], *new.kv.shape[5:]).astype(self.kv.dtype)
        kv = jax.lax.platform_dependent(
            self.kv, kv, places, cpu=_write_slots_in_loop, default=_scatter_slots
        )
        return replace(self, slot_order=order, conv=conv, kv=kv)


class CacheUpdate(NamedTuple):
    """New entries of the caches of each step and layer, for G = 2·B rows."""

    conv: Float[Array, "*L G K C"]
    kv: Float[Array, "*L 2 G N T H"]


def assign_slots(
    order: Int[Array, "B A"],
    new: int,
    counts: Int[Array, "B"],
    prompt: Int[Array, "B"],
    seen: Int[Array, "B"],
    keep_frames: int,
    parity: bool,
) -> tuple[Int[Array, "B A"], Int[Array, "B T"]]:
    """Assign slots to new entries, those of evicted ones first; see the module's text.

    Worked example, default policy, prompt 1, keep_frames 2, three slots, two new frames (3 and 4):

        slot_order  [0 1 2]  frames 1 and 2 are evicted, as 3 and 4 are the newest two
        slots       [1 2]    of frames 3 and 4
        returned    [0 3 4]

    Returns:
        The next `slot_order`, and the slot of each new entry, beyond the last if it is not kept.
    """

    def column(x):
        return x[:, None]

    fresh = jnp.broadcast_to(jnp.arange(new)[None], (len(order), new))
    real = fresh < column(counts)
    if parity:
        old = order + column(counts)
        filled = jnp.sum(order >= 0, axis=1) + counts
        start, end = prompt, filled - keep_frames
        removed = column(jnp.maximum(end - start, 0))

        def close_up(o):
            return jnp.where(o >= column(end), o - removed, o)
    else:
        old, fresh = order, fresh + column(seen)
        start, end = prompt, seen + counts - keep_frames

        def close_up(o):
            return o

    def stays(o):
        return (o < column(start)) | (o >= column(end))

    kept, taken = (order >= 0) & stays(old), real & stays(fresh)
    free = jnp.argsort(kept, axis=1, stable=True)  # free slots first
    slots = order.shape[1]
    rank = jnp.cumsum(taken, axis=1) - 1
    place = jnp.take_along_axis(free, jnp.clip(rank, 0, max(slots - 1, 0)), axis=1)
    # Entries that are not kept get slots of their own beyond the last, so that none is named twice.
    place = jnp.where(taken, place, slots + jnp.arange(new)[None])
    order = jnp.where(kept, close_up(old), -1)
    rows = jnp.arange(len(order))[:, None]
    order = order.at[rows, place].set(close_up(fresh), mode="drop", unique_indices=True)
    return order, place


def _scatter_slots(
    cache: Float[Array, "E L 2 2 B N A H"],
    new: Float[Array, "E L 2 2 B N T H"],
    places: Int[Array, "B T"],
) -> Float[Array, "E L 2 2 B N A H"]:
    """Write new entries into their slots; those beyond the last are dropped."""

    def put(c, f, at):
        return c.at[..., at, :].set(f, mode="drop", unique_indices=True)

    return jax.vmap(put, in_axes=(4, 4, 0), out_axes=4)(cache, new, places)


def _write_slots_in_loop(cache, new, places):
    """The same, one frame after the other: ten times as fast on a CPU."""
    rows, frames = places.shape
    size = (*cache.shape[:4], 1, cache.shape[5], 1, cache.shape[7])

    def one(i, cache):
        row, frame = i // frames, i % frames
        place = places[row, frame]
        at = (0, 0, 0, 0, row, 0, place, 0)  # a place beyond the last is read and written there
        fresh = jax.lax.dynamic_slice(new, (0, 0, 0, 0, row, 0, frame, 0), size)
        old = jax.lax.dynamic_slice(cache, at, size)
        kept = jnp.where(place < cache.shape[6], fresh, old)
        return jax.lax.dynamic_update_slice(cache, kept, at)

    return jax.lax.fori_loop(0, rows * frames, one, cache)


class Attention(nnx.Module):
    """Attention with a norm on each head's queries and keys."""

    def __init__(self, cfg: EstimatorConfig, *, policy: Policy, rngs: nnx.Rngs):
        embed, heads = {"embed": cfg.embed}, {"heads": cfg.heads, "head_dim": cfg.head_dim}
        self.q = Linear(embed, heads, policy=policy, rngs=rngs)
        self.k = Linear(embed, heads, policy=policy, rngs=rngs)
        self.v = Linear(embed, heads, policy=policy, rngs=rngs)
        self.q_norm = LayerNorm(cfg.head_dim, policy=policy, rngs=rngs)
        self.k_norm = LayerNorm(cfg.head_dim, policy=policy, rngs=rngs)
        self.o = Linear(heads, embed, policy=policy, rngs=rngs)

    def __call__(
        self, x: Float[Array, "G T D"], mask: Bool[Array, "G ..."], cache: Float[Array, "2 G N A H"]
    ) -> tuple[Float[Array, "G T D"], Float[Array, "2 G N T H"]]:
        """Attend to cached and new keys; gives the new keys and values too."""
        q, k, v = (f(x).swapaxes(1, 2) for f in (self.q, self.k, self.v))  # [G, N, T, H]
        q, k = self.q_norm(q), self.k_norm(k)
        keys, values = (
            jnp.concatenate([old.astype(x.dtype), new], axis=2)
            for old, new in zip(cache, (k, v), strict=True)
        )
        return self.o(attend(q, keys, values, mask)), jnp.stack([k, v])


class CausalConvs(nnx.Module):
    """Convolution, norm, mish, convolution; both look back only."""

    def __init__(self, cfg: EstimatorConfig, *, policy: Policy, rngs: nnx.Rngs):
        def conv():
            return Conv(
                cfg.embed, cfg.embed, kernel=cfg.kernel, padding="none", policy=policy, rngs=rngs
            )

        self.conv1 = conv()
        self.norm = LayerNorm(cfg.embed, policy=policy, rngs=rngs)
        self.conv2 = conv()

    def __call__(
        self, x: Float[Array, "G T D"], counts: Int[Array, "G"], cache: Float[Array, "G K C"]
    ) -> tuple[Float[Array, "G T D"], Float[Array, "G K C"]]:
        """Convolve new frames after the cached ones; gives the next cache too."""
        size = cache.shape[1]
        first, second = jnp.split(cache.astype(x.dtype), 2, axis=-1)
        x = jnp.concatenate([first, x], axis=1)
        y = jax.nn.mish(self.norm(self.conv1(x)))
        y = jnp.concatenate([second, y], axis=1)
        both = jnp.concatenate([window(x, counts, size), window(y, counts, size)], axis=-1)
        return self.conv2(y), both


class Block(nnx.Module):
    """Attention, convolutions and MLP, each shifted, scaled and gated by the noise level."""

    def __init__(self, cfg: EstimatorConfig, *, policy: Policy, rngs: nnx.Rngs):
        embed, wide = {"embed": cfg.embed}, {"mlp": cfg.mlp}
        self.attn = Attention(cfg, policy=policy, rngs=rngs)
        self.convs = CausalConvs(cfg, policy=policy, rngs=rngs)
        self.up = Linear(embed, wide, policy=policy, rngs=rngs)
        self.down = Linear(wide, embed, policy=policy, rngs=rngs)
        parts = {"part": ADALN_PARTS, "modulated": cfg.embed}
        self.modulation = Linear(embed, parts, policy=policy, rngs=rngs)

    def __call__(self, x, parts, mask, counts, cache, trace=None):
        """Add the three branches; gives what the caches need too."""
        conv_cache, kv_cache = cache
        attn, mlp, conv = parts[0:3], parts[3:6], parts[6:9]
        y, kv = self.attn(_modulate(x, *attn[:2]), mask, kv_cache)
        x = x + attn[2] * tap(trace, "attn", y)
        y, conv_cache = self.convs(_modulate(x, *conv[:2]), counts, conv_cache)
        x = x + conv[2] * y
        y = self.down(jax.nn.gelu(self.up(_modulate(x, *mlp[:2])), approximate=True))
        return x + mlp[2] * y, CacheUpdate(conv_cache, kv)


class DiT(nnx.Module):
    """Velocity of the flow at one noise level.

    With `stacked=False` blocks are a list in a loop instead of one scan, see `nn.unstack`.
    """

    def __init__(
        self,
        cfg: EstimatorConfig,
        mels: int,
        *,
        policy: Policy,
        rngs: nnx.Rngs,
        stacked: bool = True,
    ):
        self.cfg, self.policy = cfg, policy
        common, embed = {"policy": policy, "rngs": rngs}, {"embed": cfg.embed}
        self.time_in = Linear({"frequency": cfg.frequencies}, embed, **common)
        self.time_out = Linear(embed, {"time": cfg.embed}, **common)
        self.inputs = Linear({"inputs": 4 * mels}, embed, **common)

        def make(rngs):
            return Block(cfg, policy=policy, rngs=rngs)

        self.blocks = make_layers(make, cfg.layers, rngs, stacked=stacked)
        self.modulation = Linear(embed, {"part": 2, "modulated": cfg.embed}, **common)
        self.out = Linear(embed, {"mels": mels}, **common)

    def timestep_modulation(
        self, t: Float[np.ndarray, "E"], *, trace: dict[str, Array] | None = None
    ) -> tuple[Float[Array, "E L 9 D"], Float[Array, "E 2 D"]]:
        """AdaLN shift, scale and gate of each noise level, for each block and for the output.

        All steps at once: these matrices are half of the estimator's weights and are read once.

        Args:
            t: noise levels, 0 for noise and 1 for speech.
            trace: filled with intermediate results by name.
        """
        half = self.cfg.frequencies // 2
        rates = np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
        angle = (t * TIME_SCALE)[:, None] * rates
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        level = tap(trace, "t_emb", self.time_out(jax.nn.silu(self.time_in(waves))))
        level = jax.nn.silu(level)
        _, parts = over_layers(lambda none, x: (none, x[0].modulation(level)), None, self.blocks)
        return parts.swapaxes(0, 1), self.modulation(level)

    def __call__(
        self,
        x: Float[Array, "G T C"],
        parts: tuple[Float[Array, "L 9 D"], Float[Array, "2 D"]],
        mask: Bool[Array, "G S"] | Bool[Array, "G T S"],
        counts: Int[Array, "G"],
        state: EstimatorState,
        step: Int[Array, ""] | int,
        *,
        trace: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "G T M"], CacheUpdate]:
        """Velocity at one Euler step.

        Args:
            x: noisy mel, features, speaker and prompt mel of each frame, side by side.
            parts: what `timestep_modulation` gives for this step.
            mask: keys that exist, or those that each frame may see; cached ones first.
            counts: frames of each row that count.
            state: what the rows have seen.
            step: index of the Euler step, for the state.
            trace: filled with intermediate results by name.

        Returns:
            The velocity (float32) and what the caches need, stacked over layers.
        """

        def cached(array, layer, *lead):
            start = (step, layer, *(0,) * (array.ndim - 2))
            part = jax.lax.dynamic_slice(array, start, (1, 1, *array.shape[2:]))
            return part.reshape(*lead, len(x), *array.shape[4 + len(lead) :])

        x = tap(trace, "inputs", self.inputs(x))

        def block(x, block_and_index):
            module, i = block_and_index
            inner = None if trace is None else {}
            cache = cached(state.conv, i), cached(state.kv, i, 2)
            x, fresh = module(x, parts[0][i].astype(x.dtype), mask, counts, cache, inner)
            return x, (fresh, None if inner is None else inner | {"blocks": x})

        with jax.named_scope("blocks"):
            x, (fresh, outputs) = over_layers(block, x, self.blocks)
        if trace is not None:
            trace.update(outputs)
        velocity = self.out(_modulate(x, *parts[1].astype(x.dtype)))
        return velocity.astype(jnp.float32), fresh


def _modulate(x, shift, scale):
    """Norm without parameters, then scale and shift."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPS)
    return y.astype(x.dtype) * (1 + scale) + shift
