"""The engine of batched generation: prompts in, token ids out; one prefill, then decode steps.

Shapes are padded to buckets, so requests of any length share a handful of compiled programs;
`programs.TRACES` counts them. A conversation keeps its keys and values in a `PrefixCache`, which
uses chunked prefill (`Engine.prefill_chunks`).
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
from sa2jax.inference.programs import Batch, DecodeState
from sa2jax.inference.repetition import RepetitionGuard
from sa2jax.inference.requests import (
    Completion,
    FinishReason,
    GenerationConfig,
    Request,
    validate_request,
)
from sa2jax.models.decoder import KVCache
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Functional, Params

TOKEN_BUCKETS = tuple(2**n for n in range(6, 18))  # prompt and cache buckets, tokens
MEL_BUCKETS = (128, 256, 512, 1024, 1536, 2048, 2504)  # clip buckets, 10 ms frames
CLIP_BATCH = 8
# Tokens that a conversation reads at once: bounds memory and the number of programs.
PREFILL_CHUNK = 512

ClipGroup = tuple[Float[Array, "C S D"], int]  # embeddings with padding, and how many are clips


def bucket(size: int, sizes: Sequence[int]) -> int:
    """The smallest bucket that holds `size`; beyond the largest, `size` itself."""
    return next((s for s in sizes if s >= size), size)


def longest_clip(request: Request) -> int:
    """Mel frames of the longest clip of a prompt, 0 for none."""
    return max((mel.shape[1] for mel in request.mels), default=0)


class Engine:
    """Compiled programs around one model and its parameters.

    Args:
        model: the model's structure.
        params: its parameters.
        cfg: its config.
        mesh: the mesh the parameters are sharded over, if any.
        block: steps per compiled call of the batched loop; stop strings are looked for in between.
        parity: let the clips of a prompt feel each other's lengths as in the official code. A
            program is compiled for each length of a prompt's longest clip.
    """

    def __init__(
        self,
        model: Functional[StepAudio2Model],
        params: Params,
        cfg: StepAudio2Config,
        *,
        mesh: Mesh | None = None,
        block: int = 32,
        parity: bool = False,
    ):
        self.model, self.params, self.cfg, self.mesh, self.block = model, params, cfg, mesh, block
        self.parity = parity

        def jit(f, **options):
            return jax.jit(partial(f, model), **options)

        self._encode_audio = jit(programs.encode_audio, static_argnames=("official_batch",))
        self._logits = jit(programs.logits)
        # With clips or without, features have one dtype and one sharding: one program for both.
        self._compute = model.bind(model.abstract).decoder.policy.compute
        self._everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        # Partials of their own: what one engine has traced does not hide what another needs.
        self._scatter = jax.jit(
            partial(programs.scatter_features), donate_argnums=(0,), out_shardings=self._everywhere
        )
        self._reply_keys = jax.jit(
            partial(programs.reply_keys),
            static_argnames=("samples",),
            out_shardings=self._everywhere,
        )
        self._prefill = jit(programs.prefill, static_argnames=("samples", "size"))
        self._decode = jit(programs.decode, static_argnames=("block",), donate_argnums=(1,))
        self._empty_cache = jit(programs.empty_cache, static_argnames=("rows", "size"))
        self._grow_cache = jax.jit(partial(programs.grow_cache), static_argnames=("size",))
        self._prefill_chunk = jit(programs.prefill_chunk, donate_argnums=(1,))
        self._sample_first_token = jit(programs.sample_first_token, donate_argnums=(1,))

    def generate(
        self,
        requests: Sequence[Request],
        options: GenerationConfig,
        *,
        prompt_indices: Sequence[int] | None = None,
        decode_text: Callable[[Sequence[int]], str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Continue a batch of prompts of any lengths.

        Args:
            requests: the prompts.
            options: how to continue them.
            prompt_indices: index of each prompt: what it draws depends on this and the seed, and
                errors name it; by default its place in the batch.
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
        state = self.prefill(requests, options, prompt_indices)
        replies = [[token] for token in np.asarray(state.last_token).tolist()]
        made, done = np.asarray(state.num_generated), np.asarray(state.done)
        guards = [RepetitionGuard(options.max_repeat) for _ in replies]
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
                if row not in cut and (end := guards[row].push(reply[old:])) is not None:
                    cut[row] = (old + end, "repetition")
            if cut:
                done = done | np.isin(np.arange(len(done)), list(cut))
                state = replace(state, done=state.done | done)  # stays where it is on a mesh
            if done.all():
                break
            before = made
            state, tokens = self.decode(state, options, self.block)
            made, done = np.asarray(state.num_generated), np.asarray(state.done)
            for reply, row, new in zip(replies, np.asarray(tokens), made - before, strict=True):
                reply.extend(row[:new].tolist())
            if progress is not None:
                progress(int((made - before).max()))
        count = options.samples
        ended = [_completion(ids, cut.get(row), options) for row, ids in enumerate(replies)]
        return [ended[i * count : (i + 1) * count] for i in range(len(requests))]

    def encode_audio(
        self, mels: Sequence[Float[np.ndarray, "M L"]], *, longest: int | None = None
    ) -> list[ClipGroup]:
        """Audio embeddings (12.5 Hz) of clips of any lengths.

        Clips are encoded `CLIP_BATCH` at a time; a clip's result does not depend on the others.

        Args:
            mels: log-mel frames of each clip.
            longest: frames of the longest clip of the prompt, for `parity`: officially a clip's
                result depends on it, as all are padded to it.

        Returns:
            The embeddings of each group of clips, padding included, and how many clips it has.
        """
        groups: list[ClipGroup] = []
        official = longest if self.parity else None
        for first in range(0, len(mels), CLIP_BATCH):
            group = mels[first : first + CLIP_BATCH]
            frames = np.zeros(self._rows(len(group)), np.int32)
            frames[: len(group)] = [mel.shape[1] for mel in group]
            length = bucket(int(frames.max()), MEL_BUCKETS) if official is None else official
            batch = np.zeros((len(frames), group[0].shape[0], length), np.float32)
            for padded, mel in zip(batch, group, strict=False):
                padded[:, : mel.shape[1]] = mel
            with sharding.use_mesh(self.mesh):
                clips = self._encode_audio(
                    self.params, batch, frames, official_batch=official is not None
                )  # [C, S, D]
            groups.append((clips, len(group)))
        return groups

    # --- conversations; see `PrefixCache` ---------------------------------------------------------

    def ensure_cache(self, size: int, cache: KVCache | None = None) -> KVCache:
        """A cache for one conversation with at least `size` slots; uses up the one given."""
        size = min(bucket(size, TOKEN_BUCKETS), self.cfg.decoder.max_positions)
        with sharding.use_mesh(self.mesh):
            if cache is None:
                return self._empty_cache(rows=1, size=size)
            return cache if cache.size >= size else self._grow_cache(cache, size=size)

    def truncate_cache(self, cache: KVCache, length: int) -> KVCache:
        """The cache with only its first slots filled."""
        return replace(cache, length=self._put(np.full(1, length, np.int32)))

    def prefill_chunks(
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
        pending = [(mel, np.arange(at, at + n)) for mel, at, n in spans if at + n > start]
        clips = self.encode_audio([mel for mel, _ in pending], longest=longest_clip(request))
        hidden = None
        for first in range(start, len(request.ids), PREFILL_CHUNK):
            ids = request.ids[first : first + PREFILL_CHUNK]
            steps = bucket(len(ids), TOKEN_BUCKETS)
            padded, index = np.zeros((1, steps), np.int32), np.full((1, steps), -1, np.int32)
            padded[0, : len(ids)] = ids
            homes = []
            for _, places in pending:
                inside = (places >= first) & (places < first + len(ids))
                homes.append(np.where(inside, places - first, steps))
                index[0, places[inside] - first] = places[inside] - first
            batch = Batch(
                ids=self._put(padded),
                lengths=self._put(np.array([len(ids)], np.int32)),
                features=self._scatter_features(clips, homes, steps),
                feature_index=self._put(index),
            )
            with sharding.use_mesh(self.mesh):
                cache, hidden = self._prefill_chunk(self.params, cache, batch)
        assert hidden is not None, "nothing to read"
        return cache, hidden

    def sample_first_token(
        self,
        cache: KVCache,
        hidden: Float[Array, "1 D"],
        ids: Int[np.ndarray, "T"],
        options: GenerationConfig,
        prompt_index: int,
        limit: int,
    ) -> DecodeState:
        """Choose the first token of the reply to a prompt that was read; uses up the cache."""
        seen = np.zeros((1, self.cfg.decoder.vocab), bool)
        seen[0, ids] = True
        with sharding.use_mesh(self.mesh):
            return self._sample_first_token(
                self.params,
                cache,
                hidden,
                seen,
                self._keys(options, [prompt_index]),
                np.array([limit], np.int32),
                _stop_array(options),
                options.sampling.arrays(),
            )

    def replicas(self) -> list[Self]:
        """An engine for each index of the mesh's data axis, with the copies that lie there.

        Each works on its own: conversations are dealt out to them. In a multi-host program, those
        of this host.
        """
        return [
            type(self)(
                self.model,
                sharding.replica_of(self.params, mesh),
                self.cfg,
                mesh=mesh,
                block=self.block,
                parity=self.parity,
            )
            for mesh in sharding.replicas(self.mesh)
        ] or [self]

    def _keys(self, options: GenerationConfig, prompt_indices: Sequence[int]) -> PRNGKeyArray:
        """The random key of each reply to prompts of these numbers."""
        seed = np.uint32(options.seed % 2**32)
        return self._reply_keys(
            seed, np.asarray(prompt_indices, np.uint32), samples=options.samples
        )

    def _put(self, x: Any) -> Array:
        """An input on every device; of a multi-host mesh, too."""
        return jax.device_put(x, self._everywhere)

    def _rows(self, count: int) -> int:
        """Rows of a batch: a power of two, and a multiple of the parts it is split into."""
        ways = sharding.batch_axis_size(self.mesh)
        return -(-_power_of_two(count) // ways) * ways

    def decode(
        self, state: DecodeState, options: GenerationConfig, block: int
    ) -> tuple[DecodeState, Array]:
        """Up to `block` further tokens for each row that is not done; uses up the state."""
        sampling = options.sampling.arrays()
        with sharding.use_mesh(self.mesh):
            return self._decode(self.params, state, _stop_array(options), sampling, block=block)

    def prefill(
        self,
        requests: Sequence[Request],
        options: GenerationConfig,
        prompt_indices: Sequence[int] | None = None,
    ) -> DecodeState:
        """Pad a batch to its buckets and prefill it; see `generate`."""
        context = self.cfg.decoder.max_positions
        prompt_indices = range(len(requests)) if prompt_indices is None else prompt_indices
        batch = self._pad(requests, prompt_indices)
        rows, steps = batch.ids.shape
        size = min(bucket(steps + options.max_new_tokens, TOKEN_BUCKETS), context)
        limit = np.zeros(rows, np.int32)  # the rows that only pad the batch generate nothing
        for row, request in enumerate(requests):
            own = request.max_new_tokens or options.max_new_tokens
            limit[row] = min(own, options.max_new_tokens, context - len(request.ids))
        padded = [*prompt_indices, *[0] * (rows - len(requests))]
        with sharding.use_mesh(self.mesh):
            return self._prefill(
                self.params,
                batch,
                self._keys(options, padded),
                np.repeat(limit, options.samples),
                _stop_array(options),
                options.sampling.arrays(),
                samples=options.samples,
                size=size,
            )

    def logits(self, request: Request) -> Float[np.ndarray, "T V"]:
        """Scores of the next token after each position of a prompt."""
        batch = self._pad([request], [0])
        with sharding.use_mesh(self.mesh):
            scores = self._logits(self.params, batch)
        if not scores.is_fully_addressable:
            scores = multihost_utils.process_allgather(scores, tiled=True)
        return np.asarray(scores[0, : len(request.ids)])

    def _pad(self, requests: Sequence[Request], prompt_indices: Sequence[int]) -> Batch:
        """Check requests, encode their clips, and pad everything to buckets."""
        decoder = self.cfg.decoder
        for prompt_index, request in zip(prompt_indices, requests, strict=True):
            validate_request(prompt_index, request, self.cfg)
        longest = max(len(request.ids) for request in requests)
        steps = min(bucket(longest, TOKEN_BUCKETS), decoder.max_positions)
        rows = self._rows(len(requests))

        ids, index = np.zeros((rows, steps), np.int32), np.full((rows, steps), -1, np.int32)
        lengths = np.zeros(rows, np.int32)
        homes: list[np.ndarray] = []  # rows of `features` that each clip fills
        for row, request in enumerate(requests):
            lengths[row] = len(request.ids)
            ids[row, : lengths[row]] = request.ids
            for start, count in zip(request.starts, request.counts, strict=True):
                homes.append(row * steps + np.arange(start, start + count))
                index[row, start : start + count] = homes[-1]
        if self.parity:  # officially each prompt is a batch of its own
            heard = [self.encode_audio(r.mels, longest=longest_clip(r)) for r in requests]
            clips = [group for groups in heard for group in groups]
        else:
            clips = self.encode_audio([mel for request in requests for mel in request.mels])
        return Batch(
            ids=self._put(ids),
            lengths=self._put(lengths),
            features=self._scatter_features(clips, homes, rows * steps),
            feature_index=self._put(index),
        )

    def _scatter_features(
        self, clips: Sequence[ClipGroup], homes: Sequence[np.ndarray], size: int
    ) -> Float[Array, "R D"]:
        """Features of a program: each clip's frames in its rows, those from `size` on dropped."""
        features = jnp.zeros((size, self.cfg.decoder.embed), self._compute, device=self._everywhere)
        waiting = iter(homes)
        for group, count in clips:
            targets = np.full(group.shape[:2], size, np.int32)
            for target, home in zip(targets[:count], waiting, strict=False):
                target[: len(home)] = home
            features = self._scatter(features, group, targets)
        return features


def _find_stop(
    ids: list[int], options: GenerationConfig, decode_text: Callable[[Sequence[int]], str]
) -> int | None:
    """Length of the shortest beginning of a reply that holds a stop string, if there is one."""

    def holds(n):
        return any(s in decode_text(ids[:n]) for s in options.stop_strings)

    return bisect_left(range(len(ids)), True, key=holds) if holds(len(ids)) else None


def _completion(
    ids: list[int], cut: tuple[int, FinishReason] | None, options: GenerationConfig
) -> Completion:
    if cut is not None:
        return Completion(tuple(ids[: cut[0]]), cut[1])
    if ids and ids[-1] in options.stop_ids:
        return Completion(tuple(ids[:-1]), "stop")
    return Completion(tuple(ids), "length")


def _stop_array(options: GenerationConfig) -> Int[np.ndarray, "Z"]:
    return np.asarray(options.stop_ids or (-1,), np.int32)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
