"""Speech codes (25 Hz) to mel frames (50 Hz): a conformer encoder with an upsampling in the middle.

Source: CosyVoice 2 (arXiv 2412.10117), the official `UpsampleConformerEncoderV2`: a look-ahead of
three codes, attention with relative positions as in espnet (Transformer-XL, arXiv 1901.02860,
appendix B), nearest-neighbour upsampling with a causal convolution, attention again.

**One path for whole replies and for streams.** A call encodes `T` new codes of each row after what
the row's state holds; an empty state makes it the offline encoder. The state keeps the keys and
values of every code seen, because the official attention looks back without limit. They lie
*right-aligned* in a buffer of fixed capacity: the newest in the last slot, empty slots in front.
So the distance between a query and a slot is the same for every row of a batch, whatever the rows'
lengths, one table of positions serves them all and the shift by which queries see it is static.
The buffer is as long as the caller asks (`capacity`, in codes): growing it in a few named sizes
is what keeps the number of compiled programs small. Beyond it the oldest codes are forgotten.
Positions are computed for the distances at hand, so there is no cap on length.
"""

from dataclasses import dataclass, field, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sa2jax.models.convolution import Conv
from sa2jax.models.flow.layers import attend, window
from sa2jax.nn import LayerNorm, Linear, Policy, length_mask, make_layers, over_layers, param, tap
from sa2jax.speech_config import ConformerConfig

LAYER_EPS = 1e-12  # of the norms inside layers; the others have 1e-5
SLOTS = 4  # axis of the slots in the caches


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConformerState:
    """Key-value and convolution caches of the encoder, for each row.

    Attributes:
        length: codes seen so far.
        lookahead_conv: last inputs of the second look-ahead convolution.
        up_conv: last inputs of the upsampling convolution.
        kv: keys and values of the first layers, the newest in the last slot.
        up_kv: those of the layers after the upsampling, with `upsample` times as many slots.
    """

    length: Int[Array, "B"]
    lookahead_conv: Float[Array, "B 2 D"]
    up_conv: Float[Array, "B C D"]
    kv: Float[Array, "L 2 B N S H"] = field(metadata={"batch_axis": 2})
    up_kv: Float[Array, "U 2 B N R H"] = field(metadata={"batch_axis": 2})

    @classmethod
    def zeros(cls, cfg: ConformerConfig, batch: int, capacity: int, dtype: DTypeLike) -> Self:
        """Empty caches with room for `capacity` codes a row."""
        up_capacity = cfg.upsample * capacity
        low = (cfg.layers, 2, batch, cfg.heads, capacity, cfg.head_dim)
        high = (cfg.up_layers, 2, batch, cfg.heads, up_capacity, cfg.head_dim)
        return cls(
            length=jnp.zeros(batch, jnp.int32),
            lookahead_conv=jnp.zeros((batch, cfg.look_kernel - 1, cfg.embed), dtype),
            up_conv=jnp.zeros((batch, cfg.up_kernel - 1, cfg.embed), dtype),
            kv=jnp.zeros(low, dtype),
            up_kv=jnp.zeros(high, dtype),
        )

    @property
    def capacity(self) -> int:
        """Codes that fit."""
        return self.kv.shape[SLOTS]

    def grow(self, capacity: int) -> Self:
        """Grow the caches to hold at least this many codes."""
        extra = max(capacity - self.capacity, 0)
        if not extra:
            return self
        up_extra = extra * self.up_kv.shape[SLOTS] // self.capacity

        def pad(x, front):
            return jnp.pad(x, [(0, 0)] * SLOTS + [(front, 0), (0, 0)])

        return replace(self, kv=pad(self.kv, extra), up_kv=pad(self.up_kv, up_extra))


def relative_positions(new: int, cached: int, size: int) -> Float[Array, "R D"]:
    """Relative position encoding: sinusoids of the distance from a query to a key, farthest first.

    Args:
        new: queries, which are also the newest keys.
        cached: keys before them.
        size: width of a row, sine and cosine interleaved.

    Returns:
        Rows for the distances `cached + new − 1` (past) down to `1 − new` (future).
    """
    rates = np.exp(np.arange(0, size, 2) * -(np.log(10000.0) / size)).astype(np.float32)
    distance = (cached + new - 1) - jnp.arange(cached + 2 * new - 1, dtype=jnp.float32)
    angle = distance[:, None] * rates
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(len(angle), size)


def chunk_mask(chunks: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Chunk-causal mask [B, queries, keys]: keys of a query's own chunk and earlier ones."""
    return chunks[:, None] <= chunks[:, :, None]


def relative_shift(scores: Float[Array, "B N T R"], keys: int) -> Float[Array, "B N T S"]:
    """Scores by distance, farthest first, to scores by key (the shift of Transformer-XL).

    Query i sees column `j + T − 1 − i` at key j.
    """
    b, n, t, r = scores.shape
    flat = jnp.pad(scores, [(0, 0)] * 3 + [(1, 0)]).reshape(b, n, t * (r + 1))
    return flat[..., t:].reshape(b, n, t, r)[..., :keys]


class RelativeAttention(nnx.Module):
    """Attention with a score for content and one for relative position (Transformer-XL)."""

    def __init__(self, cfg: ConformerConfig, *, policy: Policy, rngs: nnx.Rngs):
        embed, heads = {"embed": cfg.embed}, {"heads": cfg.heads, "head_dim": cfg.head_dim}
        self.policy = policy
        self.q = Linear(embed, heads, policy=policy, rngs=rngs)
        self.k = Linear(embed, heads, bias=cfg.key_bias, policy=policy, rngs=rngs)
        self.v = Linear(embed, heads, policy=policy, rngs=rngs)
        self.o = Linear(heads, embed, policy=policy, rngs=rngs)
        self.position = Linear(embed, heads, bias=False, policy=policy, rngs=rngs)
        shape, axes = (cfg.heads, cfg.head_dim), ("heads", "head_dim")
        self.content_bias = param(rngs, shape, axes, dtype=policy.param, scale=0.02)
        self.position_bias = param(rngs, shape, axes, dtype=policy.param, scale=0.02)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        table: Float[Array, "R D"],
        mask: Bool[Array, "B T S"],
        cache: Float[Array, "2 B N C H"],
    ) -> tuple[Float[Array, "B T D"], Float[Array, "2 B N T H"]]:
        """Attend to cached and new keys; gives the new keys and values too."""
        q = self.q(x)
        new = jnp.stack([self.k(x), self.v(x)]).swapaxes(2, 3)  # [2, B, N, T, H]
        k, v = jnp.concatenate([cache.astype(new.dtype), new], axis=3)
        position = self.position(table).swapaxes(0, 1)  # [N, R, H]
        content = (q + self.content_bias[...].astype(q.dtype)).swapaxes(1, 2)
        place = (q + self.position_bias[...].astype(q.dtype)).swapaxes(1, 2)
        scores = jnp.einsum(
            "bnth,nrh->bntr",
            place,
            position,
            precision=self.policy.precision,
            preferred_element_type=jnp.float32,
        )
        return self.o(attend(content, k, v, mask, relative_shift(scores, k.shape[2]))), new


class ConformerLayer(nnx.Module):
    """A pre-norm layer: relative attention, then an MLP with swish. There is no convolution."""

    def __init__(self, cfg: ConformerConfig, *, policy: Policy, rngs: nnx.Rngs):
        embed, wide = {"embed": cfg.embed}, {"mlp": cfg.mlp}
        self.attn_norm = LayerNorm(cfg.embed, eps=LAYER_EPS, policy=policy, rngs=rngs)
        self.attn = RelativeAttention(cfg, policy=policy, rngs=rngs)
        self.mlp_norm = LayerNorm(cfg.embed, eps=LAYER_EPS, policy=policy, rngs=rngs)
        self.up = Linear(embed, wide, policy=policy, rngs=rngs)
        self.down = Linear(wide, embed, policy=policy, rngs=rngs)

    def __call__(self, x, table, mask, cache):
        """Add attention, then the MLP."""
        y, new = self.attn(self.attn_norm(x), table, mask, cache)
        x = x + y
        return x + self.down(jax.nn.silu(self.up(self.mlp_norm(x)))), new


class InputProjection(nnx.Module):
    """Input projection: linear, norm and the factor √D that relative positions are trained with."""

    def __init__(self, inputs: int, embed: int, *, policy: Policy, rngs: nnx.Rngs):
        self.scale = embed**0.5
        self.linear = Linear({"inputs": inputs}, {"embed": embed}, policy=policy, rngs=rngs)
        self.norm = LayerNorm(embed, policy=policy, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T D"]:
        """Apply to each frame."""
        return self.norm(self.linear(x)) * self.scale


class UpsampleConformer(nnx.Module):
    """Embedded codes to features at `upsample` times their rate.

    With `stacked=False` layers are a list in a loop instead of one scan, see `nn.unstack`.
    """

    def __init__(
        self, cfg: ConformerConfig, *, policy: Policy, rngs: nnx.Rngs, stacked: bool = True
    ):
        self.cfg, self.policy = cfg, policy
        common = {"policy": policy, "rngs": rngs}

        def conv(taps):
            return Conv(cfg.embed, cfg.embed, kernel=taps, padding="none", **common)

        def make(rngs):
            return ConformerLayer(cfg, policy=policy, rngs=rngs)

        def layers(count):
            return make_layers(make, count, rngs, stacked=stacked)

        self.embed = InputProjection(cfg.inputs, cfg.embed, **common)
        self.look_ahead = conv(cfg.lookahead + 1)
        self.look_back = conv(cfg.look_kernel)
        self.layers = layers(cfg.layers)
        self.up_conv = conv(cfg.up_kernel)
        self.up_embed = InputProjection(cfg.inputs, cfg.embed, **common)
        self.up_layers = layers(cfg.up_layers)
        self.norm = LayerNorm(cfg.embed, policy=policy, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T+A C"],
        present: Int[Array, "B"],
        counts: Int[Array, "B"],
        state: ConformerState,
        *,
        chunks: Int[Array, "B T"] | None = None,
        capacity: int | None = None,
        trace: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B R D"], ConformerState]:
        """Encode the next codes of each row.

        Args:
            x: embedded codes (25 Hz), the look-ahead of A included, right-padded.
            present: codes of each row that are there; what lies beyond is a zero after embedding,
                as at the end of a reply.
            counts: codes of each row to encode, of T at most; the others are looked at only.
            state: what the rows have seen.
            chunks: number of the chunk in which a stream would receive each code, rising along a
                row: none is seen by codes of earlier chunks. None if all are there at once.
            capacity: room for codes in the state to return, by default as much as now.
            trace: filled with intermediate results by name.

        Returns:
            Features at `upsample` times the rate, of which each row's first `upsample · counts`
            have a meaning, and the next state. A row with count 0 keeps its state.
        """
        cfg = self.cfg
        ratio, new = cfg.upsample, x.shape[1] - cfg.lookahead
        with jax.named_scope("look_ahead"):
            x = self.embed(x)
            x = jnp.where(length_mask(present, x.shape[1])[..., None], x, 0)
            tap(trace, "embed", x[:, :new])
            y = jax.nn.leaky_relu(self.look_ahead(x), 0.01)
            y = jnp.concatenate([state.lookahead_conv.astype(y.dtype), y], axis=1)
            lookahead_conv = window(y, counts, state.lookahead_conv.shape[1])
            x = tap(trace, "look_ahead", self.look_back(y) + x[:, :new])
        with jax.named_scope("layers"):
            x, kv = self._attend(
                self.layers, x, counts, chunks, state.length, state.kv, trace, "layers"
            )
        with jax.named_scope("upsample"):
            x = jnp.concatenate(
                [state.up_conv.astype(x.dtype), jnp.repeat(x, ratio, axis=1)], axis=1
            )
            up_conv = window(x, ratio * counts, state.up_conv.shape[1])
            x = tap(trace, "up", self.up_conv(x))
            x = tap(trace, "up_embed", self.up_embed(x))
        with jax.named_scope("up_layers"):
            x, up_kv = self._attend(
                self.up_layers,
                x,
                ratio * counts,
                None if chunks is None else jnp.repeat(chunks, ratio, axis=1),
                ratio * state.length,
                state.up_kv,
                trace,
                "up_layers",
            )
        size = state.capacity if capacity is None else capacity
        state = ConformerState(
            length=state.length + counts,
            lookahead_conv=lookahead_conv.astype(state.lookahead_conv.dtype),
            up_conv=up_conv.astype(state.up_conv.dtype),
            kv=_append(state.kv, kv, counts, size),
            up_kv=_append(state.up_kv, up_kv, ratio * counts, ratio * size),
        )
        return tap(trace, "encoder_out", self.norm(x)), state

    def _attend(self, layers, x, counts, chunks, seen, cache, trace, name):
        """Run one stack of layers; gives the new keys and values of all of them."""
        new, cached = x.shape[1], cache.shape[SLOTS]
        table = relative_positions(new, cached, x.shape[2]).astype(x.dtype)
        old = jnp.arange(cached)[None] >= cached - seen[:, None]
        mask = jnp.concatenate([old, length_mask(counts, new)], axis=1)[:, None]
        if chunks is not None:
            mask = mask & jnp.pad(
                chunk_mask(chunks), [(0, 0), (0, 0), (cached, 0)], constant_values=True
            )

        def layer(x, layer_and_index):
            module, i = layer_and_index
            x, kv = module(x, table, mask, cache[i])
            return x, (kv, x if trace is not None else None)

        x, (kv, outputs) = over_layers(layer, x, layers)
        tap(trace, name, outputs)
        return x, kv


def _append(
    cache: Float[Array, "L 2 B N S H"], new: Array, counts: Int[Array, "B"], size: int
) -> Float[Array, "L 2 B N R H"]:
    """The newest `size` of the cached and the first `counts` new entries, right-aligned."""
    missing = max(size - cache.shape[SLOTS], 0)
    front = jnp.zeros((*cache.shape[:SLOTS], missing, cache.shape[-1]), cache.dtype)
    line = jnp.concatenate([front, cache, new.astype(cache.dtype)], axis=SLOTS)
    start = counts + (line.shape[SLOTS] - new.shape[SLOTS] - size)
    return window(line, start, size, time=SLOTS, batch=2)
