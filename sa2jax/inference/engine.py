"""Prompts in, token ids out, in batches: prefill once, then one step per token.

Shapes are padded to buckets, so requests of any length share a handful of compiled programs;
`programs.TRACES` counts them. A conversation, which goes on from what it has read, is a `Session`.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sa2jax import sharding
from sa2jax.config import StepAudio2Config
from sa2jax.errors import PromptError
from sa2jax.inference import programs
from sa2jax.inference.programs import Batch, State
from sa2jax.inference.repetition import LoopWatch
from sa2jax.inference.requests import FinishReason, Generation, Options, Request, check
from sa2jax.models.decoder import KVCache
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Functional, Params

LENGTHS = tuple(2**n for n in range(6, 18))  # prompt and cache buckets, tokens
MEL_FRAMES = (128, 256, 512, 1024, 1536, 2048, 2504)  # clip buckets, 10 ms frames
CLIPS_AT_ONCE = 8
PIECE = 512  # tokens that a conversation reads at once: bounds memory and the number of programs


def bucket(size: int, sizes: Sequence[int]) -> int:
    """The smallest bucket that holds `size`; beyond the largest, `size` itself."""
    return next((s for s in sizes if s >= size), size)


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
        jit = lambda f, **options: jax.jit(partial(f, model), **options)
        self._listen, self._score = jit(programs.listen), jit(programs.score)
        # With clips or without, features have one dtype and one sharding: one program for both.
        self._compute = model.bind(model.abstract).decoder.policy.compute
        self._everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        # Partials of their own: what one generator has traced does not hide what another needs.
        self._place = jax.jit(
            partial(programs.place), donate_argnums=(0,), out_shardings=self._everywhere
        )
        self._draws = jax.jit(
            partial(programs.draws), static_argnames=("samples",), out_shardings=self._everywhere
        )
        self._prefill = jit(programs.prefill, static_argnames=("samples", "size"))
        self._decode = jit(programs.decode, static_argnames=("block",), donate_argnums=(1,))
        self._empty = jit(programs.empty, static_argnames=("rows", "size"))
        self._grow = jax.jit(partial(programs.grow), static_argnames=("size",))
        self._extend = jit(programs.extend, donate_argnums=(1,))
        self._begin = jit(programs.begin, donate_argnums=(1,))

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
        watches = [LoopWatch(options.max_repeat) for _ in replies]
        cut: dict[
            int, tuple[int, FinishReason]
        ] = {}  # row -> where and why a reply ends before its time
        before = np.zeros_like(made)
        while True:
            for row in np.flatnonzero(made > before).tolist():
                reply, old = replies[row], int(before[row])
                if options.stop_strings and decode_text is not None:
                    end = _find_stop(reply, options, decode_text)
                    if end is not None:
                        cut[row] = (end, "string")
                if row not in cut and (end := watches[row].push(reply[old:])) is not None:
                    cut[row] = (old + end, "repeat")
            if cut:
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

    def listen(self, mels: Sequence[Float[np.ndarray, "M L"]]) -> list[Float[Array, "C S D"]]:
        """Audio embeddings (12.5 Hz) of clips of any lengths.

        Clips are encoded `CLIPS_AT_ONCE`; a clip's result does not depend on the others.

        Returns:
            The embeddings of each group of clips, padding included.
        """
        groups: list[Array] = []
        for first in range(0, len(mels), CLIPS_AT_ONCE):
            group = mels[first : first + CLIPS_AT_ONCE]
            frames = np.zeros(self._rows(len(group)), np.int32)
            frames[: len(group)] = [mel.shape[1] for mel in group]
            length = bucket(int(frames.max()), MEL_FRAMES)
            batch = np.zeros((len(frames), group[0].shape[0], length), np.float32)
            for padded, mel in zip(batch, group, strict=False):
                padded[:, : mel.shape[1]] = mel
            with sharding.using(self.mesh):
                groups.append(self._listen(self.params, batch, frames))  # [C, S, D]
        return groups

    # --- conversations; see `Session` ---------------------------------------------------------

    def room(self, size: int, cache: KVCache | None = None) -> KVCache:
        """A cache for one conversation with at least `size` slots; uses up the one given."""
        size = min(bucket(size, LENGTHS), self.cfg.decoder.max_positions)
        with sharding.using(self.mesh):
            if cache is None:
                return self._empty(rows=1, size=size)
            return cache if cache.size >= size else self._grow(cache, size=size)

    def rewind(self, cache: KVCache, length: int) -> KVCache:
        """The cache with only its first slots filled."""
        return replace(cache, length=self._put(np.full(1, length, np.int32)))

    def read(
        self, cache: KVCache, request: Request, start: int
    ) -> tuple[KVCache, Float[Array, "1 D"]]:
        """Read a prompt from a position on, a piece at a time; uses up the cache.

        Args:
            cache: holds the positions before.
            request: the whole prompt; clips that end before `start` are not encoded again.
            start: the first position to read, before the prompt's end.

        Returns:
            The cache, and the hidden state of the last token.
        """
        spans = zip(request.mels, request.starts, request.counts, strict=True)
        fresh = [(mel, np.arange(at, at + n)) for mel, at, n in spans if at + n > start]
        clips = self.listen([mel for mel, _ in fresh])
        hidden = None
        for first in range(start, len(request.ids), PIECE):
            ids = request.ids[first : first + PIECE]
            steps = bucket(len(ids), LENGTHS)
            padded, slots = np.zeros((1, steps), np.int32), np.full((1, steps), -1, np.int32)
            padded[0, : len(ids)] = ids
            homes = []
            for _, places in fresh:
                inside = (places >= first) & (places < first + len(ids))
                homes.append(np.where(inside, places - first, steps))
                slots[0, places[inside] - first] = places[inside] - first
            batch = Batch(
                ids=self._put(padded),
                lengths=self._put(np.array([len(ids)], np.int32)),
                features=self._arrange(clips, homes, steps),
                slots=self._put(slots),
            )
            with sharding.using(self.mesh):
                cache, hidden = self._extend(self.params, cache, batch)
        assert hidden is not None, "nothing to read"
        return cache, hidden

    def begin(
        self,
        cache: KVCache,
        hidden: Float[Array, "1 D"],
        ids: Int[np.ndarray, "T"],
        options: Options,
        number: int,
        limit: int,
    ) -> State:
        """Choose the first token of the reply to a prompt that was read; uses up the cache."""
        seen = np.zeros((1, self.cfg.decoder.vocab), bool)
        seen[0, ids] = True
        with sharding.using(self.mesh):
            return self._begin(
                self.params, cache, hidden, seen, self._keys(options, [number]),
                np.array([limit], np.int32), _stop_array(options), options.sampling.knobs(),
            )  # fmt: skip

    def replicas(self) -> list[Self]:
        """A generator for each index of the mesh's data axis, with the copies that lie there.

        Each works on its own: conversations are dealt out to them. In a multi-host program, those
        of this host.
        """
        return [
            type(self)(
                self.model, sharding.replica_of(self.params, mesh), self.cfg, mesh=mesh,
                block=self.block,
            )
            for mesh in sharding.replicas(self.mesh)
        ] or [self]  # fmt: skip

    def _keys(self, options: Options, numbers: Sequence[int]) -> PRNGKeyArray:
        """The random key of each reply to prompts of these numbers."""
        seed = np.uint32(options.seed % 2**32)
        return self._draws(seed, np.asarray(numbers, np.uint32), samples=options.samples)

    def _put(self, x: Any) -> Array:
        """An input on every device; of a multi-host mesh, too."""
        return jax.device_put(x, self._everywhere)

    def _rows(self, count: int) -> int:
        """Rows of a batch: a power of two, and a multiple of the parts it is split into."""
        ways = sharding.batch_ways(self.mesh)
        return -(-_power_of_two(count) // ways) * ways

    def run(self, state: State, options: Options, block: int) -> tuple[State, Array]:
        """Up to `block` further tokens for each row that is not done; uses up the state."""
        knobs = options.sampling.knobs()
        with sharding.using(self.mesh):
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
        with sharding.using(self.mesh):
            return self._prefill(
                self.params, batch, self._keys(options, padded), np.repeat(limit, options.samples),
                _stop_array(options), options.sampling.knobs(), samples=options.samples, size=size,
            )  # fmt: skip

    def logits(self, request: Request) -> Float[np.ndarray, "T V"]:
        """Scores of the next token after each position of a prompt."""
        batch = self._pad([request], [0])
        with sharding.using(self.mesh):
            scores = self._score(self.params, batch)
        if not scores.is_fully_addressable:
            scores = multihost_utils.process_allgather(scores, tiled=True)
        return np.asarray(scores[0, : len(request.ids)])

    def _pad(self, requests: Sequence[Request], numbers: Sequence[int]) -> Batch:
        """Check requests, encode their clips, and pad everything to buckets."""
        decoder = self.cfg.decoder
        for number, request in zip(numbers, requests, strict=True):
            check(number, request, self.cfg)
        longest = max(len(request.ids) for request in requests)
        steps = min(bucket(longest, LENGTHS), decoder.max_positions)
        rows = self._rows(len(requests))

        ids, slots = np.zeros((rows, steps), np.int32), np.full((rows, steps), -1, np.int32)
        lengths = np.zeros(rows, np.int32)
        homes: list[np.ndarray] = []  # rows of `features` that each clip fills
        for row, request in enumerate(requests):
            lengths[row] = len(request.ids)
            ids[row, : lengths[row]] = request.ids
            for start, count in zip(request.starts, request.counts, strict=True):
                homes.append(row * steps + np.arange(start, start + count))
                slots[row, start : start + count] = homes[-1]
        clips = self.listen([mel for request in requests for mel in request.mels])
        return Batch(
            ids=self._put(ids),
            lengths=self._put(lengths),
            features=self._arrange(clips, homes, rows * steps),
            slots=self._put(slots),
        )

    def _arrange(
        self, clips: Sequence[Float[Array, "C S D"]], homes: Sequence[np.ndarray], size: int
    ) -> Float[Array, "R D"]:
        """Features of a program: each clip's frames in its rows, those from `size` on dropped."""
        features = jnp.zeros((size, self.cfg.decoder.embed), self._compute, device=self._everywhere)
        waiting = iter(homes)
        for group in clips:
            targets = np.full(group.shape[:2], size, np.int32)
            for target, home in zip(targets, waiting, strict=False):
                target[: len(home)] = home
            features = self._place(features, group, targets)
        return features


def _find_stop(
    ids: list[int], options: Options, decode_text: Callable[[Sequence[int]], str]
) -> int | None:
    """Length of the shortest beginning of a reply that holds a stop string, if there is one."""
    holds = lambda n: any(s in decode_text(ids[:n]) for s in options.stop_strings)
    return bisect_left(range(len(ids)), True, key=holds) if holds(len(ids)) else None


def _finish(ids: list[int], cut: tuple[int, FinishReason] | None, options: Options) -> Generation:
    if cut is not None:
        return Generation(tuple(ids[: cut[0]]), cut[1])
    if ids and ids[-1] in options.stop_ids:
        return Generation(tuple(ids[:-1]), "stop")
    return Generation(tuple(ids), "length")


def _stop_array(options: Options) -> Int[np.ndarray, "Z"]:
    return np.asarray(options.stop_ids or (-1,), np.int32)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
