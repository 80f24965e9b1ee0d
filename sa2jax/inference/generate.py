"""Prompts in, token ids out: prefill once, then one step per token.

There is a single `step`. The batched loop runs many of them inside one compiled program, the
streaming iterator a few at a time; both therefore give the same ids. Shapes are padded to buckets,
so requests of any length share a handful of compiled programs; `TRACES` counts them.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sa2jax.config import StepAudio2Config
from sa2jax.errors import PromptError
from sa2jax.inference.sampling import Knobs, Sampling, sample
from sa2jax.models.audio_encoder import adapter_length, encoder_length
from sa2jax.models.decoder import KVCache
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Functional, Params
from sa2jax.sharding import shard

TRACES: Counter[str] = Counter()  # how often each program has been traced, by name

LENGTHS = tuple(2**n for n in range(6, 18))  # prompt and cache buckets, tokens
MEL_FRAMES = (128, 256, 512, 1024, 1536, 2048, 2504)  # clip buckets, 10 ms frames
CLIPS_AT_ONCE = 8


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        ids: token ids, [T]; each clip's frames stand at a run of placeholder ids.
        mels: log-mel frames of each clip, [M, L] each.
        starts: position in `ids` of each clip's first frame.
        counts: number of positions each clip fills.
        max_new_tokens: limit of this reply, where it is lower than that of the options.
    """

    ids: Int[np.ndarray, "T"]
    mels: tuple[Float[np.ndarray, "M L"], ...] = ()
    starts: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to continue a prompt.

    Attributes:
        sampling: how the next token is chosen.
        max_new_tokens: upper limit of the reply's length; the context may be reached before.
        stop_ids: ids that end the reply; they are not part of it.
        stop_strings: texts that end the reply; they are part of it.
        seed: same seed, same reply. Reply j to prompt i of a batch draws from (seed, i, j).
        samples: replies per prompt.
    """

    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0))
    max_new_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    samples: int = 1

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.samples < 1:
            raise PromptError(
                f"max_new_tokens={self.max_new_tokens}, samples={self.samples}: expected at least 1"
            )


@dataclass(frozen=True)
class Generation:
    """One reply.

    Attributes:
        ids: the generated ids without the stop id.
        finish: `stop` (a stop id), `string` (a stop string) or `length`.
    """

    ids: tuple[int, ...]
    finish: Literal["stop", "string", "length"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "lengths", "features", "slots"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts padded to one shape.

    Attributes:
        ids: right-padded prompts, [B, T].
        lengths: tokens of each prompt, 0 for a row that only pads the batch, [B].
        features: audio embeddings of the whole batch, one row per position they fill, [B*T, D].
        slots: the row of `features` that stands at a position, −1 for a token, [B, T].
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    features: Float[Array, "R D"]
    slots: Int[Array, "B T"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "token", "seen", "keys", "made", "limit", "done"],
    meta_fields=[],
)
@dataclass(frozen=True)
class State:
    """A batch of replies under way.

    Attributes:
        cache: keys and values of everything before `token`.
        token: the newest token of each row, [B].
        seen: tokens of prompt and reply, for the repetition penalty, [B, V].
        keys: random key of each row, [B].
        made: tokens generated so far, [B].
        limit: tokens to generate at most, [B].
        done: rows that have ended, [B].
    """

    cache: KVCache
    token: Int[Array, "B"]
    seen: Bool[Array, "B V"]
    keys: PRNGKeyArray
    made: Int[Array, "B"]
    limit: Int[Array, "B"]
    done: Bool[Array, "B"]


def bucket(size: int, sizes: Sequence[int]) -> int:
    """The smallest bucket that holds `size`; beyond the largest, `size` itself."""
    return next((s for s in sizes if s >= size), size)


def listen(
    model: Functional[StepAudio2Model],
    params: Params,
    mels: Float[Array, "C M L"],
    frames: Int[Array, "C"],
) -> Float[Array, "C S D"]:
    """Encode clips; see `StepAudio2Model.listen`."""
    TRACES["listen"] += 1
    return model.bind(params).listen(mels, frames)


def place(
    features: Float[Array, "R D"], clips: Float[Array, "C S D"], rows: Int[Array, "C S"]
) -> Float[Array, "R D"]:
    """Put what `listen` returned in its rows of `features`; rows beyond the last are dropped."""
    TRACES["place"] += 1
    return features.at[rows].set(clips, mode="drop")


def score(
    model: Functional[StepAudio2Model], params: Params, batch: Batch
) -> Float[Array, "B T V"]:
    """Logits of every position of a batch of prompts, without a cache."""
    TRACES["score"] += 1
    net = model.bind(params)
    hidden, _ = net(batch.ids, batch.features[None], batch.slots, None, batch.lengths)
    return net.decoder.logits(hidden)


def prefill(
    model: Functional[StepAudio2Model],
    params: Params,
    batch: Batch,
    keys: PRNGKeyArray,
    limit: Int[Array, "B"],
    stop_ids: Int[Array, "Z"],
    knobs: Knobs,
    *,
    samples: int,
    size: int,
) -> State:
    """Read prompts and choose the first token of each reply.

    Args:
        model: the model's structure.
        params: its parameters.
        batch: the prompts.
        keys: random key of each reply, [B * samples].
        limit: tokens to generate at most, per reply.
        stop_ids: ids that end a reply.
        knobs: sampling.
        samples: replies per prompt; they share the prompt's prefill.
        size: slots of the cache.
    """
    TRACES["prefill"] += 1
    net = model.bind(params)
    count, steps = batch.ids.shape
    lengths = batch.lengths
    cache = KVCache.zeros(net.cfg.decoder, count, size, net.decoder.policy.compute)
    hidden, cache = net(batch.ids, batch.features[None], batch.slots, cache, lengths, fresh=True)
    assert cache is not None
    hidden = hidden[jnp.arange(count), jnp.maximum(lengths - 1, 0)]  # [B, D]
    valid = jnp.arange(steps)[None] < lengths[:, None]
    nowhere = net.cfg.decoder.vocab
    rows = jnp.arange(count)[:, None]
    seen = jnp.zeros((count, nowhere), bool)
    seen = seen.at[rows, jnp.where(valid, batch.ids, nowhere)].set(True, mode="drop")

    repeat = partial(jnp.repeat, repeats=samples, axis=0)
    cache = replace(
        cache,
        k=jnp.repeat(cache.k, samples, axis=1),
        v=jnp.repeat(cache.v, samples, axis=1),
        length=repeat(cache.length),
    )
    state = State(
        cache=cache,
        token=jnp.zeros(count * samples, jnp.int32),
        seen=repeat(seen),
        keys=keys,
        made=jnp.zeros(count * samples, jnp.int32),
        limit=limit,
        done=limit == 0,
    )
    return _choose(net, state, repeat(hidden), stop_ids, knobs)


def step(net: StepAudio2Model, state: State, stop_ids: Int[Array, "Z"], knobs: Knobs) -> State:
    """Read the newest token of each row and choose the next."""
    x = net.decoder.embed(state.token[:, None])
    lengths = jnp.where(state.done, 0, 1)
    with jax.named_scope("decode_step"):
        hidden, cache = net.decoder(x, state.cache, lengths)
    assert cache is not None
    return _choose(net, replace(state, cache=cache), hidden[:, 0], stop_ids, knobs)


def decode(
    model: Functional[StepAudio2Model],
    params: Params,
    state: State,
    stop_ids: Int[Array, "Z"],
    knobs: Knobs,
    *,
    block: int,
) -> tuple[State, Int[Array, "B S"]]:
    """Up to `block` steps, fewer once every row is done.

    Returns:
        The state, and the tokens chosen [B, block]; how many of a row's are new, `State.made`
        tells.
    """
    TRACES["decode"] += 1
    net = model.bind(params)
    tokens = jnp.zeros((state.token.shape[0], block), jnp.int32)

    def going(carry):
        i, state, _ = carry
        return (i < block) & ~jnp.all(state.done)

    def body(carry):
        i, state, tokens = carry
        state = step(net, state, stop_ids, knobs)
        return i + 1, state, tokens.at[:, i].set(state.token)

    _, state, tokens = jax.lax.while_loop(going, body, (0, state, tokens))
    return state, tokens


def _choose(
    net: StepAudio2Model, state: State, hidden: Float[Array, "B D"], stop_ids: Array, knobs: Knobs
) -> State:
    """Add the next token of each row that is not done."""
    logits = shard(net.decoder.logits(hidden), "batch", "vocab")
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.made)
    token = sample(keys, logits, state.seen, knobs)
    token = jnp.where(state.done, state.token, token)
    made = jnp.where(state.done, state.made, state.made + 1)
    stopped = jnp.any(token[:, None] == stop_ids[None], axis=-1)
    return replace(
        state,
        token=token,
        seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True),
        made=made,
        done=state.done | stopped | (made >= state.limit),
    )


class Generator:
    """Compiled programs around one model and its parameters.

    Args:
        model: the model's structure.
        params: its parameters.
        cfg: its config.
        mesh: the mesh the parameters are sharded over, if any.
        block: steps per compiled call of the batched loop; stop strings are looked for in between.
    """

    def __init__(
        self,
        model: Functional[StepAudio2Model],
        params: Params,
        cfg: StepAudio2Config,
        *,
        mesh: Mesh | None = None,
        block: int = 32,
    ):
        self.model, self.params, self.cfg, self.mesh, self.block = model, params, cfg, mesh, block
        self._listen = jax.jit(partial(listen, model))
        # With clips or without, features have one dtype and one sharding: one program for both.
        self._compute = model.bind(model.abstract).decoder.policy.compute
        self._everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._place = jax.jit(place, donate_argnums=(0,), out_shardings=self._everywhere)
        self._score = jax.jit(partial(score, model))
        self._prefill = jax.jit(partial(prefill, model), static_argnames=("samples", "size"))
        self._decode = jax.jit(
            partial(decode, model), static_argnames=("block",), donate_argnums=(1,)
        )

    def generate(
        self,
        requests: Sequence[Request],
        options: Options,
        *,
        numbers: Sequence[int] | None = None,
        decode_text: Callable[[Sequence[int]], str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Generation]]:
        """Continue a batch of prompts of any lengths.

        Args:
            requests: the prompts.
            options: how to continue them.
            numbers: number of each prompt: what it draws depends on this and the seed, and errors
                name it; by default its place in the batch.
            decode_text: ids to text, needed for stop strings.
            progress: called with the number of tokens that were added to the longest reply.

        Returns:
            For each prompt its `options.samples` replies.

        Raises:
            PromptError: if a prompt is empty, leaves no room in the model's context, holds an
                unknown id, or has clips that do not fit their places.
        """
        if options.stop_strings and decode_text is None:
            raise PromptError("stop strings need decode_text to turn ids into text")
        if not requests:
            return []
        state = self.start(requests, options, numbers)
        replies = [[token] for token in np.asarray(state.token).tolist()]
        made, done = np.asarray(state.made), np.asarray(state.done)
        cut: dict[int, int] = {}  # row -> length of a reply that a stop string ended
        while True:
            if options.stop_strings and decode_text is not None:
                for row in np.flatnonzero(made > 0).tolist():
                    if row not in cut:
                        cut |= _find_stop(row, replies[row], options, decode_text)
                done = done | np.isin(np.arange(len(done)), list(cut))
                state = replace(state, done=state.done | done)  # stays where it is on a mesh
            if done.all():
                break
            before = made
            state, tokens = self.run(state, options, self.block)
            made, done = np.asarray(state.made), np.asarray(state.done)
            for reply, row, new in zip(replies, np.asarray(tokens), made - before, strict=True):
                reply.extend(row[:new].tolist())
            if progress is not None:
                progress(int((made - before).max()))
        count = options.samples
        ended = [_finish(ids, cut.get(row), options) for row, ids in enumerate(replies)]
        return [ended[i * count : (i + 1) * count] for i in range(len(requests))]

    def stream(self, request: Request, options: Options, *, block: int = 1) -> Iterator[int]:
        """The ids of one reply as they are made, without the stop id.

        The next step is under way while the caller handles an id. The caller looks for stop
        strings and may stop at any time.

        Args:
            request: the prompt.
            options: how to continue it; `samples` must be 1.
            block: steps per compiled call; more is faster but comes in bursts.
        """
        if options.samples != 1:
            raise PromptError("stream gives one reply: expected samples=1")
        state = self.start([request], options)
        fresh, made, done = np.asarray(state.token).tolist(), 1, np.asarray(state.done)[0]
        while fresh:
            ahead = None if done else self.run(state, options, block)
            for token in fresh:
                if token in options.stop_ids:
                    return
                yield token
            if ahead is None:
                return
            state, tokens = ahead
            total, done = int(np.asarray(state.made)[0]), np.asarray(state.done)[0]
            fresh, made = np.asarray(tokens)[0, : total - made].tolist(), total

    def listen(self, mels: Sequence[Float[np.ndarray, "M L"]]) -> list[Float[Array, "C S D"]]:
        """Audio embeddings (12.5 Hz) of clips of any lengths.

        Clips are encoded `CLIPS_AT_ONCE`; a clip's result does not depend on the others.

        Returns:
            The embeddings of each group of clips, padding included.
        """
        groups: list[Array] = []
        for first in range(0, len(mels), CLIPS_AT_ONCE):
            group = mels[first : first + CLIPS_AT_ONCE]
            frames = np.zeros(_power_of_two(len(group)), np.int32)
            frames[: len(group)] = [mel.shape[1] for mel in group]
            length = bucket(int(frames.max()), MEL_FRAMES)
            batch = np.zeros((len(frames), group[0].shape[0], length), np.float32)
            for padded, mel in zip(batch, group, strict=False):
                padded[:, : mel.shape[1]] = mel
            with self._mesh():
                groups.append(self._listen(self.params, batch, frames))  # [C, S, D]
        return groups

    def _mesh(self) -> AbstractContextManager:
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def run(self, state: State, options: Options, block: int) -> tuple[State, Array]:
        """Up to `block` further tokens for each row that is not done; uses up the state."""
        knobs = options.sampling.knobs()
        with self._mesh():
            return self._decode(self.params, state, _stop_array(options), knobs, block=block)

    def start(
        self, requests: Sequence[Request], options: Options, numbers: Sequence[int] | None = None
    ) -> State:
        """Pad a batch to its buckets and prefill it; see `generate`."""
        context = self.cfg.decoder.max_positions
        numbers = range(len(requests)) if numbers is None else numbers
        batch = self._pad(requests, numbers)
        rows, steps = batch.ids.shape
        size = min(bucket(steps + options.max_new_tokens, LENGTHS), context)
        limit = np.zeros(rows, np.int32)  # the rows that only pad the batch generate nothing
        for row, request in enumerate(requests):
            own = request.max_new_tokens or options.max_new_tokens
            limit[row] = min(own, options.max_new_tokens, context - len(request.ids))
        padded = [*numbers, *[0] * (rows - len(requests))]
        seeds = (jax.random.fold_in(jax.random.key(options.seed), n) for n in padded)
        keys = jnp.stack([jax.random.fold_in(s, n) for s in seeds for n in range(options.samples)])
        with self._mesh():
            return self._prefill(
                self.params, batch, keys, np.repeat(limit, options.samples), _stop_array(options),
                options.sampling.knobs(), samples=options.samples, size=size,
            )  # fmt: skip

    def logits(self, request: Request) -> Float[np.ndarray, "T V"]:
        """Scores of the next token after each position of a prompt."""
        batch = self._pad([request], [0])
        with self._mesh():
            return np.asarray(self._score(self.params, batch)[0, : len(request.ids)])

    def _pad(self, requests: Sequence[Request], numbers: Sequence[int]) -> Batch:
        """Check requests, encode their clips, and pad everything to buckets."""
        decoder = self.cfg.decoder
        for number, request in zip(numbers, requests, strict=True):
            _check(number, request, self.cfg)
        longest = max(len(request.ids) for request in requests)
        steps = min(bucket(longest, LENGTHS), decoder.max_positions)
        rows = _power_of_two(len(requests))

        ids, slots = np.zeros((rows, steps), np.int32), np.full((rows, steps), -1, np.int32)
        lengths = np.zeros(rows, np.int32)
        homes: list[range] = []  # rows of `features` that each clip fills
        filled = 0
        for row, request in enumerate(requests):
            lengths[row] = len(request.ids)
            ids[row, : lengths[row]] = request.ids
            for start, count in zip(request.starts, request.counts, strict=True):
                homes.append(range(filled, filled + count))
                slots[row, start : start + count] = homes[-1]
                filled += count
        features = jnp.zeros((rows * steps, decoder.embed), self._compute, device=self._everywhere)
        waiting = iter(homes)
        for group in self.listen([mel for request in requests for mel in request.mels]):
            targets = np.full(group.shape[:2], rows * steps, np.int32)  # beyond the end: dropped
            for target, home in zip(targets, waiting, strict=False):
                target[: len(home)] = home
            features = self._place(features, group, targets)
        return Batch(
            ids=jnp.asarray(ids),
            lengths=jnp.asarray(lengths),
            features=features,
            slots=jnp.asarray(slots),
        )


def _check(number: int, request: Request, cfg: StepAudio2Config) -> None:
    ids, vocab, context = request.ids, cfg.decoder.vocab, cfg.decoder.max_positions
    if not 0 < len(ids) < context:
        raise PromptError(
            f"prompt {number} has {len(ids)} tokens: expected 1 to {context - 1}, since the "
            f"model's context of {context} must also hold a reply"
        )
    if ids.min() < 0 or ids.max() >= vocab:
        raise PromptError(
            f"prompt {number} holds id {ids.max() if ids.min() >= 0 else ids.min()}, outside the "
            f"vocabulary of {vocab}: is this the checkpoint's own tokenizer?"
        )
    clips = (request.mels, request.starts, request.counts)
    if len({len(part) for part in clips}) > 1:
        raise PromptError(
            f"prompt {number} has {' and '.join(str(len(part)) for part in clips)} mels, starts "
            "and counts: expected one of each per clip"
        )
    for mel, start, count in zip(*clips, strict=True):
        frames = mel.shape[1]
        embeddings = adapter_length(encoder_length(frames), cfg.adapter)
        longest = 2 * cfg.audio_encoder.max_positions
        if start < 0 or start + count > len(ids) or not 0 <= count <= max(embeddings, 0):
            raise PromptError(
                f"prompt {number}: a clip of {frames} frames gives {max(embeddings, 0)} embeddings "
                f"and cannot fill {count} positions from {start} on of {len(ids)}"
            )
        if mel.shape[0] != cfg.audio_encoder.mels or frames > longest:
            raise PromptError(
                f"prompt {number}: expected clips of {cfg.audio_encoder.mels} mels and at most "
                f"{longest} frames, got {list(mel.shape)}"
            )


def _find_stop(
    row: int, ids: list[int], options: Options, decode_text: Callable[[Sequence[int]], str]
) -> dict[int, int]:
    """The shortest beginning of a reply that holds a stop string, if there is one."""
    holds = lambda n: any(s in decode_text(ids[:n]) for s in options.stop_strings)  # noqa: E731
    if not holds(len(ids)):
        return {}
    return {row: bisect_left(range(len(ids)), True, key=holds)}


def _finish(ids: list[int], cut: int | None, options: Options) -> Generation:
    if cut is not None:
        return Generation(tuple(ids[:cut]), "string")
    if ids and ids[-1] in options.stop_ids:
        return Generation(tuple(ids[:-1]), "stop")
    return Generation(tuple(ids), "length")


def _stop_array(options: Options) -> Int[np.ndarray, "Z"]:
    return np.asarray(options.stop_ids or (-1,), np.int32)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
