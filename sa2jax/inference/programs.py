"""Compiled programs of generation: pure functions of a model's structure, its parameters and data.

The state holds a fixed number of rows. A prompt is read into one of them a chunk at a time
(`prefill_chunk`), `start_rows` chooses its first token, and `decode` runs a block of steps for all
rows that are under way. Which rows these are, and how each is sampled, is data: rows begin and end
between calls, and nothing is compiled for them.

On a mesh with a data axis each of its P parts holds R / P rows; P prompts, one of each part, are
read at once.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from sa2jax.attention.base import CACHE_AXES
from sa2jax.inference.sampling import SamplingArrays, sample
from sa2jax.models.decoder import KVCache
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Functional, Params
from sa2jax.sharding import shard, sharding_of

TRACES: Counter[str] = Counter()  # how often each program has been traced, by name
MAX_STOP_IDS = 8


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "lengths", "features", "feature_index"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts, or chunks of them, padded to one shape.

    Attributes:
        ids: right-padded ids, [B, T].
        lengths: tokens of each row, 0 for a row that only pads the batch, [B].
        features: audio embeddings of the whole batch, one row per position they fill, [B*T, D].
        feature_index: the row of `features` that stands at a position, −1 for a token, [B, T].
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    features: Float[Array, "R D"]
    feature_index: Int[Array, "B T"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sampling", "stop_ids", "limit", "seed", "prompt_index", "sample_index"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How replies are generated, one of each row.

    Attributes:
        sampling: how tokens are chosen.
        stop_ids: ids that end a reply, padded with −1, [B, Z].
        limit: tokens to generate at most, [B].
        seed: with the two below it makes the random key, [B].
        prompt_index: number of the prompt, [B].
        sample_index: number of the reply to it, [B].
    """

    sampling: SamplingArrays
    stop_ids: Int[Array, "B Z"]
    limit: Int[Array, "B"]
    seed: UInt32[Array, "B"]
    prompt_index: UInt32[Array, "B"]
    sample_index: UInt32[Array, "B"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "last_token", "seen", "num_generated", "done", "settings"],
    meta_fields=[],
)
@dataclass(frozen=True)
class DecodeState:
    """The rows of an engine.

    Attributes:
        cache: keys and values of everything before `last_token`.
        last_token: the newest token of each row, [R].
        seen: tokens of prompt and reply, for the repetition penalty, [R, V].
        num_generated: tokens generated so far, [R].
        done: rows that have ended, [R].
        settings: of the replies.
    """

    cache: KVCache
    last_token: Int[Array, "R"]
    seen: Bool[Array, "R V"]
    num_generated: Int[Array, "R"]
    done: Bool[Array, "R"]
    settings: RowSettings


def encode_audio(
    model: Functional[StepAudio2Model],
    params: Params,
    mels: Float[Array, "P M L"],
    frames: Int[Array, "P"],
    *,
    official_batch: bool = False,
    size: int,
) -> tuple[Float[Array, "S D"], ...]:
    """Encode clips; see `StepAudio2Model.encode_audio`.

    Returns:
        The embeddings of each clip, padded to `size` of them.
    """
    TRACES["encode_audio"] += 1
    clips = model.bind(params).encode_audio(
        shard(mels, "batch", None, None), frames, official_batch=official_batch
    )
    clips = jnp.pad(clips, [(0, 0), (0, size - clips.shape[1]), (0, 0)])
    return tuple(shard(clip, None, None) for clip in clips)


def scatter_features(
    features: Float[Array, "R D"], clip: Float[Array, "S D"], rows: Int[Array, "S"]
) -> Float[Array, "R D"]:
    """Put the embeddings of a clip in their rows; those that go beyond the last are dropped."""
    TRACES["scatter_features"] += 1
    return features.at[rows].set(clip.astype(features.dtype), mode="drop")


def logits(
    model: Functional[StepAudio2Model], params: Params, batch: Batch
) -> Float[Array, "B T V"]:
    """Logits of every position of a batch of prompts, without a cache."""
    TRACES["logits"] += 1
    net = model.bind(params)
    hidden, _ = net(batch.ids, batch.features[None], batch.feature_index, None, batch.lengths)
    return shard(net.decoder.logits(hidden), "batch", None, "vocab")


def reply_keys(settings: RowSettings) -> PRNGKeyArray:
    """The random key of each reply: of (seed, prompt_index, sample_index)."""

    def one(seed, prompt_index, sample_index):
        fold = jax.random.fold_in
        return fold(fold(jax.random.key(seed), prompt_index), sample_index)

    return jax.vmap(one)(settings.seed, settings.prompt_index, settings.sample_index)


def prefill_chunk(
    model: Functional[StepAudio2Model],
    params: Params,
    state: DecodeState,
    rows: Int[Array, "P"],
    start: Int[Array, "P"],
    batch: Batch,
    *,
    read: int,
    cache_is_empty: bool,
) -> tuple[DecodeState, Float[Array, "P D"]]:
    """Read a chunk of a prompt into one row of each part of the data axis.

    Args:
        model: the model's structure.
        params: its parameters.
        state: the rows; what they hold behind `start` is overwritten.
        rows: a row of each part, counted within the part.
        start: positions that are in the row already.
        batch: the chunks; one of length 0 leaves its part as it is.
        read: slots that are looked at: `start` and the chunk fit in them.
        cache_is_empty: whether all chunks are the first of their prompts.

    Returns:
        The state, and the hidden state of each chunk's last token.
    """
    TRACES["prefill_chunk"] += 1
    net = model.bind(params)
    if cache_is_empty:
        count, steps = batch.ids.shape
        cache = KVCache.zeros(net.cfg.decoder, count, steps, net.decoder.cache_dtype)
    else:
        cache = replace(state.cache.take_rows(rows, read), length=start)
    hidden, grown = net(
        batch.ids,
        batch.features[None],
        batch.feature_index,
        cache,
        batch.lengths,
        cache_is_empty=cache_is_empty,
    )
    assert grown is not None
    steps, valid = batch.ids.shape[1], batch.lengths > 0
    cache = state.cache.put_window(rows, grown, start, steps, valid)
    last = hidden[jnp.arange(len(hidden)), jnp.maximum(batch.lengths - 1, 0)]
    return _pinned(replace(state, cache=cache)), shard(last, None, None)


def start_rows(
    model: Functional[StepAudio2Model],
    params: Params,
    state: DecodeState,
    rows: Int[Array, "P"],
    lengths: Int[Array, "P"],
    hidden: Float[Array, "P D"],
    seen: Bool[Array, "P V"],
    settings: RowSettings,
) -> tuple[DecodeState, Int[Array, "P 3"]]:
    """Choose the first tokens of replies whose prompts have been read.

    Args:
        model: the model's structure.
        params: its parameters.
        state: the rows.
        rows: where the replies stand, R for none.
        lengths: of their prompts.
        hidden: hidden state of each prompt's last token.
        seen: all tokens of each prompt.
        settings: of each reply.

    Returns:
        The state, and as of `decode` what was chosen [P, 3].
    """
    TRACES["start_rows"] += 1
    logits = model.bind(params).decoder.logits(hidden)
    nothing = jnp.zeros(len(rows), jnp.int32)
    token, seen, num_generated, done = _chosen(
        logits, seen, nothing, nothing, nothing > 0, settings
    )

    def put(old, new):
        return old.at[rows].set(new, mode="drop")

    for part in range(len(rows)):  # not a scatter: the rows may be spread over devices
        here = (jnp.arange(len(state.done)) == rows[part])[:, None]
        whole = jnp.where(here, seen[part], state.seen if part == 0 else whole)
    state = DecodeState(
        cache=replace(state.cache, length=put(state.cache.length, lengths)),
        last_token=put(state.last_token, token),
        seen=whole,
        num_generated=put(state.num_generated, num_generated),
        done=put(state.done, done),
        settings=jax.tree.map(put, state.settings, settings),
    )
    return _pinned(state), _chosen_table(token[:, None], num_generated, done)


def decode(
    model: Functional[StepAudio2Model],
    params: Params,
    state: DecodeState,
    active: Bool[Array, "R"],
    *,
    block: int,
    read: int,
) -> tuple[DecodeState, Int[Array, "R W"]]:
    """Up to `block` steps of the rows that are active, fewer once all of them are done.

    Args:
        model: the model's structure.
        params: its parameters.
        state: the rows.
        active: those that go on; the others stay as they are.
        block: steps.
        read: slots that are looked at: all active rows fit in them.

    Returns:
        The state, and for the host in one array [R, block + 2]: the tokens chosen, how many the
        reply has with them, and whether it has ended.
    """
    TRACES["decode"] += 1
    net = model.bind(params)
    tokens = jnp.zeros((state.last_token.shape[0], block), jnp.int32)

    def going(carry):
        i, state, _ = carry
        return (i < block) & jnp.any(active & ~state.done)

    def body(carry):
        i, state, tokens = carry
        state = step(net, state, active)
        return i + 1, state, tokens.at[:, i].set(state.last_token)

    state = replace(state, cache=replace(state.cache, read=read))
    _, state, tokens = jax.lax.while_loop(going, body, (0, state, tokens))
    state = replace(state, cache=replace(state.cache, read=None))
    return _pinned(state), _chosen_table(tokens, state.num_generated, state.done)


def _chosen_table(
    tokens: Int[Array, "B S"], num_generated: Int[Array, "B"], done: Bool[Array, "B"]
) -> Int[Array, "B W"]:
    table = jnp.concatenate([tokens, num_generated[:, None], done[:, None]], axis=1)
    return shard(table, None, None)


def step(net: StepAudio2Model, state: DecodeState, active: Bool[Array, "R"]) -> DecodeState:
    """Read the newest token of each row that is active and choose the next."""
    running = active & ~state.done
    x = net.decoder.embed(state.last_token[:, None])
    with jax.named_scope("decode_step"):
        hidden, cache = net.decoder(x, state.cache, jnp.where(running, 1, 0))
    assert cache is not None
    logits = shard(net.decoder.logits(hidden[:, 0]), "batch", "vocab")
    token, seen, num_generated, done = _chosen(
        logits, state.seen, state.last_token, state.num_generated, ~running, state.settings
    )
    return replace(
        state,
        cache=cache,
        last_token=token,
        seen=seen,
        num_generated=num_generated,
        done=jnp.where(running, done, state.done),
    )


def copy_rows(state: DecodeState, source: Int[Array, "P"], target: Int[Array, "P"]) -> DecodeState:
    """Copy what a row of each part holds to another of the same part; all counted within it."""
    TRACES["copy_rows"] += 1
    cache = state.cache
    taken = cache.take_rows(source, cache.size)
    start = jnp.zeros_like(target)
    cache = cache.put_window(target, taken, start, cache.size, source != target)
    return _pinned(replace(state, cache=cache))


def empty_state(model: Functional[StepAudio2Model], *, rows: int, slots: int) -> DecodeState:
    """Rows of nothing."""
    TRACES["empty_state"] += 1
    net = model.bind(model.abstract)
    none = jnp.zeros(rows, jnp.int32)
    numbers = jnp.zeros(rows, jnp.float32)
    sampling = SamplingArrays(
        temperature=numbers, top_k=none, top_p=numbers + 1, repetition_penalty=numbers + 1
    )
    settings = RowSettings(
        sampling=sampling,
        stop_ids=jnp.full((rows, MAX_STOP_IDS), -1, jnp.int32),
        limit=none,
        seed=none.astype(jnp.uint32),
        prompt_index=none.astype(jnp.uint32),
        sample_index=none.astype(jnp.uint32),
    )
    state = DecodeState(
        cache=KVCache.zeros(net.cfg.decoder, rows, slots, net.decoder.cache_dtype),
        last_token=none,
        seen=jnp.zeros((rows, net.cfg.decoder.vocab), bool),
        num_generated=none,
        done=none == 0,
        settings=settings,
    )
    return _pinned(state)


def grow_state(state: DecodeState, *, rows: int, slots: int) -> DecodeState:
    """The same rows with more slots, and more rows."""
    TRACES["grow_state"] += 1
    more = rows - len(state.done)
    cache = state.cache.grow(slots).add_rows(more)
    rest = jax.tree.map(
        lambda x: jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)), replace(state, cache=None)
    )
    done = rest.done | (jnp.arange(rows) >= rows - more)
    return _pinned(replace(rest, cache=cache, done=done))


def abstract_state(
    model: Functional[StepAudio2Model], mesh: Mesh | None, *, rows: int, slots: int
) -> DecodeState:
    """The shapes, dtypes and shardings of an engine's rows, to compile ahead of time.

    Args:
        model: the model's structure.
        mesh: the mesh it is spread over.
        rows: replies.
        slots: of each row's cache.
    """
    state = jax.eval_shape(partial(empty_state, model, rows=rows, slots=slots))
    if mesh is None:
        return state

    def place(x: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x.shape, axes, mesh))

    return _on_mesh(state, place)


def _on_mesh(
    state: DecodeState, place: Callable[[Any, tuple[str | None, ...]], Any]
) -> DecodeState:
    """Give each array of a state to `place` with its logical axes.

    What the host reads is whole on every device, and so on every host.
    """
    whole = jax.tree.map(lambda x: place(x, (None,) * x.ndim), state)
    cache = jax.tree.map(lambda x: place(x, CACHE_AXES[: x.ndim]), state.cache)
    cache = replace(cache, length=place(state.cache.length, ("batch",)))
    return replace(whole, cache=cache, seen=place(state.seen, ("batch", None)))


def _pinned(state: DecodeState) -> DecodeState:
    """The state as every program returns it and takes it: one sharding, one program."""
    return _on_mesh(state, lambda x, axes: shard(x, *axes))


def _chosen(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    last_token: Int[Array, "B"],
    num_generated: Int[Array, "B"],
    held: Bool[Array, "B"],
    settings: RowSettings,
) -> tuple[Int[Array, "B"], Bool[Array, "B V"], Int[Array, "B"], Bool[Array, "B"]]:
    """The next token of each row that is not held, and the row's state with it."""
    keys = jax.vmap(jax.random.fold_in)(reply_keys(settings), num_generated)
    token = sample(keys, logits, seen, settings.sampling, ~held)
    token = jnp.where(held, last_token, token)
    num_generated = jnp.where(held, num_generated, num_generated + 1)
    stopped = jnp.any(token[:, None] == settings.stop_ids, axis=-1)
    marked = seen.at[jnp.arange(token.shape[0]), token].max(~held)
    return token, marked, num_generated, stopped | (num_generated >= settings.limit)
