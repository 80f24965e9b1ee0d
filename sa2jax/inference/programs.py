"""Compiled programs of generation: pure functions of a model's structure, its parameters and data.

There is a single `step`; `decode` runs a block of them. A whole batch of prompts is read by
`prefill`; a conversation reads what is new with `extend` and goes on with `begin`.
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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "lengths", "features", "feature_index"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts padded to one shape.

    Attributes:
        ids: right-padded prompts, [B, T].
        lengths: tokens of each prompt, 0 for a row that only pads the batch, [B].
        features: audio embeddings of the whole batch, one row per position they fill, [B*T, D].
        feature_index: the row of `features` that stands at a position, −1 for a token, [B, T].
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    features: Float[Array, "R D"]
    feature_index: Int[Array, "B T"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "last_token", "seen", "keys", "num_generated", "limit", "done"],
    meta_fields=[],
)
@dataclass(frozen=True)
class DecodeState:
    """A batch of replies under way.

    Attributes:
        cache: keys and values of everything before `last_token`.
        last_token: the newest token of each row, [B].
        seen: tokens of prompt and reply, for the repetition penalty, [B, V].
        keys: random key of each row, [B].
        num_generated: tokens generated so far, [B].
        limit: tokens to generate at most, [B].
        done: rows that have ended, [B].
    """

    cache: KVCache
    last_token: Int[Array, "B"]
    seen: Bool[Array, "B V"]
    keys: PRNGKeyArray
    num_generated: Int[Array, "B"]
    limit: Int[Array, "B"]
    done: Bool[Array, "B"]


def encode_audio(
    model: Functional[StepAudio2Model],
    params: Params,
    mels: Float[Array, "C M L"],
    frames: Int[Array, "C"],
    *,
    official_batch: bool = False,
) -> Float[Array, "C S D"]:
    """Encode clips; see `StepAudio2Model.encode_audio`."""
    TRACES["encode_audio"] += 1
    return model.bind(params).encode_audio(
        shard(mels, "batch", None, None), frames, official_batch=official_batch
    )


def scatter_features(
    features: Float[Array, "R D"], clips: Float[Array, "C S D"], rows: Int[Array, "C S"]
) -> Float[Array, "R D"]:
    """Put what `listen` returned in its rows of `features`; rows beyond the last are dropped."""
    TRACES["scatter_features"] += 1
    return features.at[rows].set(clips, mode="drop")


def logits(
    model: Functional[StepAudio2Model], params: Params, batch: Batch
) -> Float[Array, "B T V"]:
    """Logits of every position of a batch of prompts, without a cache."""
    TRACES["logits"] += 1
    net = model.bind(params)
    hidden, _ = net(batch.ids, batch.features[None], batch.feature_index, None, batch.lengths)
    return shard(net.decoder.logits(hidden), "batch", None, "vocab")


def reply_keys(
    seed: UInt32[Array, ""], prompt_indices: UInt32[Array, "B"], *, samples: int
) -> PRNGKeyArray:
    """Random keys of replies: reply j to prompt n has the key (seed, n, j); [B * samples]."""
    fold = jax.random.fold_in

    def one(n):
        return jax.vmap(partial(fold, fold(jax.random.key(seed), n)))(jnp.arange(samples))

    return jax.vmap(one)(prompt_indices).reshape(-1)


def prefill(
    model: Functional[StepAudio2Model],
    params: Params,
    batch: Batch,
    keys: PRNGKeyArray,
    limit: Int[Array, "B"],
    stop_ids: Int[Array, "Z"],
    sampling: SamplingArrays,
    *,
    samples: int,
    size: int,
) -> DecodeState:
    """Read prompts and choose the first token of each reply.

    Args:
        model: the model's structure.
        params: its parameters.
        batch: the prompts.
        keys: random key of each reply, [B * samples].
        limit: tokens to generate at most, per reply.
        stop_ids: ids that end a reply.
        sampling: sampling.
        samples: replies per prompt; they share the prompt's prefill.
        size: slots of the cache.
    """
    TRACES["prefill"] += 1
    net = model.bind(params)
    count, steps = batch.ids.shape
    lengths = batch.lengths
    cache = KVCache.zeros(net.cfg.decoder, count, size, net.decoder.cache_dtype)
    hidden, cache = net(
        batch.ids, batch.features[None], batch.feature_index, cache, lengths, cache_is_empty=True
    )
    assert cache is not None
    hidden = hidden[jnp.arange(count), jnp.maximum(lengths - 1, 0)]  # [B, D]
    valid = jnp.arange(steps)[None] < lengths[:, None]
    nowhere = net.cfg.decoder.vocab
    rows = jnp.arange(count)[:, None]
    seen = jnp.zeros((count, nowhere), bool)
    seen = seen.at[rows, jnp.where(valid, batch.ids, nowhere)].set(True, mode="drop")

    repeat = partial(jnp.repeat, repeats=samples, axis=0)
    state = _init_state(cache.repeat(samples), repeat(seen), keys, limit)
    return _pinned(_choose(net, state, repeat(hidden), stop_ids, sampling))


def prefill_chunk(
    model: Functional[StepAudio2Model], params: Params, cache: KVCache, batch: Batch
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Read more of prompts whose beginnings are in the cache.

    Returns:
        The cache with these tokens added, and the hidden state of each row's last one.
    """
    TRACES["prefill_chunk"] += 1
    net = model.bind(params)
    hidden, grown = net(batch.ids, batch.features[None], batch.feature_index, cache, batch.lengths)
    assert grown is not None
    return grown, hidden[jnp.arange(len(hidden)), jnp.maximum(batch.lengths - 1, 0)]


def sample_first_token(
    model: Functional[StepAudio2Model],
    params: Params,
    cache: KVCache,
    hidden: Float[Array, "B D"],
    seen: Bool[Array, "B V"],
    keys: PRNGKeyArray,
    limit: Int[Array, "B"],
    stop_ids: Int[Array, "Z"],
    sampling: SamplingArrays,
) -> DecodeState:
    """Choose the first token of each reply to prompts that `extend` has read to their ends.

    Args:
        model: the model's structure.
        params: its parameters.
        cache: what has been read.
        hidden: hidden state of each prompt's last token.
        seen: all tokens of each prompt.
        keys: random key of each reply.
        limit: tokens to generate at most.
        stop_ids: ids that end a reply.
        sampling: sampling.
    """
    TRACES["sample_first_token"] += 1
    state = _init_state(cache, seen, keys, limit)
    return _pinned(_choose(model.bind(params), state, hidden, stop_ids, sampling))


def empty_cache(model: Functional[StepAudio2Model], *, rows: int, size: int) -> KVCache:
    """A cache of nothing."""
    TRACES["empty_cache"] += 1
    net = model.bind(model.abstract)
    return KVCache.zeros(net.cfg.decoder, rows, size, net.decoder.cache_dtype)


def grow_cache(cache: KVCache, *, size: int) -> KVCache:
    """The same cache with more slots."""
    TRACES["grow_cache"] += 1
    return cache.grow(size)


def abstract_state(
    model: Functional[StepAudio2Model], mesh: Mesh | None, *, rows: int, size: int
) -> DecodeState:
    """The shapes, dtypes and shardings of a batch of replies, to compile ahead of time.

    Args:
        model: the model's structure.
        mesh: the mesh it is spread over.
        rows: replies.
        size: slots of the cache.
    """

    def blank() -> DecodeState:
        net, none = model.bind(model.abstract), jnp.zeros(rows, jnp.int32)
        return DecodeState(
            cache=KVCache.zeros(net.cfg.decoder, rows, size, net.decoder.cache_dtype),
            last_token=none,
            seen=jnp.zeros((rows, net.cfg.decoder.vocab), bool),
            keys=jax.random.split(jax.random.key(0), rows),
            num_generated=none,
            limit=none,
            done=none > 0,
        )

    state = jax.eval_shape(blank)
    if mesh is None:
        return state

    def place(x: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x.shape, axes, mesh))

    return _on_mesh(state, place)


def step(
    net: StepAudio2Model, state: DecodeState, stop_ids: Int[Array, "Z"], sampling: SamplingArrays
) -> DecodeState:
    """Read the newest token of each row and choose the next."""
    x = net.decoder.embed(state.last_token[:, None])
    lengths = jnp.where(state.done, 0, 1)
    with jax.named_scope("decode_step"):
        hidden, cache = net.decoder(x, state.cache, lengths)
    assert cache is not None
    return _choose(net, replace(state, cache=cache), hidden[:, 0], stop_ids, sampling)


def decode(
    model: Functional[StepAudio2Model],
    params: Params,
    state: DecodeState,
    stop_ids: Int[Array, "Z"],
    sampling: SamplingArrays,
    *,
    block: int,
) -> tuple[DecodeState, Int[Array, "B S"]]:
    """Up to `block` steps, fewer once every row is done.

    Returns:
        The state, and the tokens chosen [B, block]; `DecodeState.num_generated` tells how many of
        a row's are new.
    """
    TRACES["decode"] += 1
    net = model.bind(params)
    tokens = jnp.zeros((state.last_token.shape[0], block), jnp.int32)

    def going(carry):
        i, state, _ = carry
        return (i < block) & ~jnp.all(state.done)

    def body(carry):
        i, state, tokens = carry
        state = step(net, state, stop_ids, sampling)
        return i + 1, state, tokens.at[:, i].set(state.last_token)

    _, state, tokens = jax.lax.while_loop(going, body, (0, state, tokens))
    return _pinned(state), shard(tokens, None, None)


def _init_state(
    cache: KVCache, seen: Bool[Array, "B V"], keys: PRNGKeyArray, limit: Int[Array, "B"]
) -> DecodeState:
    """The state before the first token of each reply."""
    nothing = jnp.zeros(limit.shape, jnp.int32)
    return DecodeState(
        cache=cache,
        last_token=nothing,
        seen=seen,
        keys=keys,
        num_generated=nothing,
        limit=limit,
        done=limit == 0,
    )


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


def _choose(
    net: StepAudio2Model,
    state: DecodeState,
    hidden: Float[Array, "B D"],
    stop_ids: Array,
    sampling: SamplingArrays,
) -> DecodeState:
    """Add the next token of each row that is not done."""
    logits = shard(net.decoder.logits(hidden), "batch", "vocab")
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.num_generated)
    token = sample(keys, logits, state.seen, sampling)
    token = jnp.where(state.done, state.last_token, token)
    num_generated = jnp.where(state.done, state.num_generated, state.num_generated + 1)
    stopped = jnp.any(token[:, None] == stop_ids[None], axis=-1)
    return replace(
        state,
        last_token=token,
        seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True),
        num_generated=num_generated,
        done=state.done | stopped | (num_generated >= state.limit),
    )
