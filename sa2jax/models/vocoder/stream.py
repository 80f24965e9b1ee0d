"""Streaming vocoder: chunks of mel frames, an overlap carried between them, cross-fades.

The last mel frames of a chunk are computed again at the head of the next one, where they see what
follows; the source goes on unchanged, and the two waveforms are cross-faded. Source: the official
`Token2wav.stream`, with its one global cache as an explicit state with a row for each stream.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sa2jax.speech_config import VocoderConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HiFTState:
    """Overlap that streams carry from chunk to chunk; each row is one stream.

    Attributes:
        mel: the last mel frames, valid ones first.
        source: the source of those frames, 24 kHz.
        speech: their waveform, not returned yet.
        frames: how many of these frames are valid; 0 for a stream that has not begun.
        key: random key of each stream; a stream's draws do not depend on its neighbours.
    """

    mel: Float[Array, "B C M"]
    source: Float[Array, "B S"]
    speech: Float[Array, "B S"]
    frames: Int[Array, "B"]
    key: Key[Array, "B"]


def vocoder_state(
    cfg: VocoderConfig, rows: int = 1, key: Key[Array, ""] | Key[Array, "B"] | None = None
) -> HiFTState:
    """Streams that have not begun.

    Args:
        cfg: sizes.
        rows: number of streams.
        key: one key, or one for each stream; by default key 0.
    """
    keys = jax.random.key(0) if key is None else key

    def silence():
        return jnp.zeros((rows, cfg.carry * cfg.samples))  # each its own, to be donated

    return HiFTState(
        mel=jnp.zeros((rows, cfg.carry, cfg.mels)),
        source=silence(),
        speech=silence(),
        frames=jnp.zeros((rows,), jnp.int32),
        key=keys if keys.ndim else jax.random.split(keys, rows),
    )


def vocoder_step(
    synthesize: Callable[..., tuple[Float[Array, "B N"], Float[Array, "B N"]]],
    cfg: VocoderConfig,
    state: HiFTState,
    mel: Float[Array, "B T M"],
    frames: Int[Array, "B"] | None = None,
    *,
    last: bool | Bool[Array, "B"] = False,
    noise: Float[Array, "B N H"] | None = None,
    equal_gain: bool = False,
) -> tuple[HiFTState, Float[Array, "B N"], Int[Array, "B"]]:
    """Advance every stream by one chunk of mel frames.

    Chunks of one size T share one compiled program: the first, the last and the ones between, and
    streams in different places of their replies.

    Args:
        synthesize: makes a waveform and its source, as `HiFT` does when it is called.
        cfg: sizes.
        state: of each stream.
        mel: new frames (50 Hz), padded on the right; the released chunk has 50.
        frames: new frames of each row; by default all. A row without any, unless it is its last,
            is left as it was.
        last: whether a row's reply ends here; what was held back is returned, and the row can
            begin another reply.
        noise: standard normal draws for carried and new frames, valid ones first.
        equal_gain: cross-fade with weights that add up to 1 (hann) instead of the released hamming
            window, which lifts the level by 8 % for 160 ms at each joint.

    Returns:
        The new state, the waveform (24 kHz, N = 480·(C + T)), and how many samples of it each row
        gives out; the rest is zero.
    """
    rows, size, _ = mel.shape
    step, span = cfg.samples, cfg.carry * cfg.samples
    fresh = jnp.full((rows,), size) if frames is None else frames
    last = jnp.broadcast_to(jnp.asarray(last), (rows,))
    total = state.frames + fresh
    split = jax.vmap(jax.random.split)(state.key)

    joined = jnp.pad(state.mel, ((0, 0), (0, size), (0, 0)))
    joined = jax.vmap(_put)(joined, mel.astype(joined.dtype), state.frames)
    held = state.frames * step
    speech, source = synthesize(
        joined, total, noise=noise, key=split[:, 0], cache_source=state.source, cached=held
    )
    with jax.named_scope("crossfade"):
        rise, fall = crossfade_weights(held, span, equal_gain=equal_gain)
        head = jnp.where(
            jnp.arange(span) < held[:, None],
            speech[:, :span] * rise + state.speech * fall,
            speech[:, :span],
        )
        speech = jnp.concatenate([head, speech[:, span:]], axis=1)

    carried = jnp.minimum(total, cfg.carry)
    first = total - carried
    count = (total - jnp.where(last, 0, carried)) * step
    after = HiFTState(
        mel=jax.vmap(lambda x, i: _cut(x, i, cfg.carry))(joined, first),
        source=jax.vmap(lambda x, i: _cut(x, i, span))(source, first * step),
        speech=jax.vmap(lambda x, i: _cut(x, i, span))(speech, first * step),
        frames=jnp.where(last, 0, carried),
        key=split[:, 1],
    )
    idle = (fresh == 0) & ~last
    count = jnp.where(idle, 0, count)
    after = jax.tree.map(lambda old, new: _choose(idle, old, new), state, after)
    inside = jnp.arange(speech.shape[1]) < count[:, None]
    return after, jnp.where(inside, speech, 0), count


def crossfade_weights(
    held: Int[Array, "B"], size: int, *, equal_gain: bool = False
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Weights of the new and of the old waveform where two chunks meet.

    Args:
        held: samples that overlap in each row.
        size: width of the result.
        equal_gain: the halves of a hann window, which add up to 1, instead of a hamming window's,
            which add up to 1.08.
    """
    count, place = jnp.maximum(held, 1)[:, None], jnp.arange(size)
    if equal_gain:
        rise = 0.5 - 0.5 * jnp.cos(jnp.pi * (place + 0.5) / count)
        return rise, 1 - rise

    def hamming(n):
        return 0.54 - 0.46 * jnp.cos(2 * jnp.pi * n / (2 * count - 1))

    return hamming(place), hamming(place + count)


def _put(row: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice(row, part, (start, *(0 for _ in row.shape[1:])))


def _cut(row: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(row, start, size)


def _choose(rows: Bool[Array, "B"], one: Array, other: Array) -> Array:
    return jnp.where(rows.reshape(-1, *(1 for _ in one.shape[1:])), one, other)
