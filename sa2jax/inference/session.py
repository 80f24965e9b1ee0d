"""One conversation's key-value cache: what the model has read stays read.

session = Session(generator)
for ids in session.reply(request, options): ...
session.prefilled  # positions that this reply had to read

Each prompt is given whole. Its longest beginning that the cache already holds, clips included, is
not read again; so a conversation that goes on reads its new turn only, and one whose last turns
were undone, cut or dropped reads what changed. Nothing has to be told.
"""

import hashlib
from collections import abc
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sa2jax.errors import PromptError
from sa2jax.inference.engine import Generator
from sa2jax.inference.requests import Options, Request, check
from sa2jax.models.decoder import KVCache

BLOCK = 5  # steps per compiled call: a word and its four codes
SLOTS = 1024  # of a conversation's cache at least: it is replaced by a larger one seldom
CLIP = 4096  # more positions than a clip has


class Session:
    """A conversation's cache.

    Args:
        generator: the model's programs.

    Attributes:
        prefilled: positions that the newest reply's prompt had to read.
        finish_reason: why the newest reply ended: `stop`, `length`, or `abandoned` by the caller.
    """

    def __init__(self, generator: Generator):
        self.prefilled = 0
        self.finish_reason: Literal["stop", "length", "abandoned"] = "abandoned"
        self._generator = generator
        self._cache: KVCache | None = None
        self._marks = _nothing()  # of the positions in the cache

    def reply(
        self, request: Request, options: Options, *, number: int = 0, block: int = BLOCK
    ) -> abc.Generator[list[int]]:
        """Continue a prompt; what was read and made is kept for the next one.

        The next block is under way while the caller handles one. The caller looks for stop strings
        and may stop at any time.

        Args:
            request: the whole conversation up to here.
            options: how to continue it; `samples` must be 1.
            number: what is drawn depends on it and on the seed.
            block: steps per compiled call.

        Yields:
            The next ids, at most `block` of them, without the stop id.

        Raises:
            PromptError: for a prompt that does not fit the model, see `Generator.generate`.
        """
        if options.samples != 1:
            raise PromptError("a conversation has one reply: expected samples=1")
        generator, context = self._generator, self._generator.cfg.decoder.max_positions
        check(number, request, generator.cfg)
        length = len(request.ids)
        limit = min(options.max_new_tokens, request.max_new_tokens or context, context - length)
        marks = _marks_of(request)
        # The last position is always read: its hidden state chooses the first token.
        known = min(_shared(self._marks, marks), length - 1)
        cache, self._cache, self._marks = self._cache, None, _nothing()  # if this fails, start anew
        cache = generator.rewind(generator.room(max(length + limit, SLOTS), cache), known)
        self.prefilled, self.finish_reason = length - known, "abandoned"
        cache, hidden = generator.read(cache, request, known)
        state = generator.begin(cache, hidden, request.ids, options, number, limit)
        made, fresh = 1, np.asarray(state.token).tolist()
        ids = list(fresh)
        ahead: Array | None = None
        try:
            while True:
                if not np.asarray(state.done)[0]:
                    state, ahead = generator.run(state, options, block)
                stopped = fresh[-1] in options.stop_ids
                if words := fresh[: len(fresh) - stopped]:
                    yield words
                if ahead is None:
                    self.finish_reason = "stop" if stopped else "length"
                    return
                made, before = int(np.asarray(state.made)[0]), made
                fresh = np.asarray(ahead)[0, : made - before].tolist()
                ahead = None
                ids += fresh
        finally:
            if not state.made.is_deleted():  # by a call that was interrupted
                if ahead is not None:  # made already, though nobody waits for them
                    ids += np.asarray(ahead)[0].tolist()
                # The newest token is in the reply but not in the cache.
                count = int(np.asarray(state.made)[0]) - 1
                self._marks = np.concatenate([marks, np.array(ids[:count], np.int64)])
                self._cache = state.cache

    def fork(self) -> Self:
        """Another conversation that has read the same."""
        other = type(self)(self._generator)
        if self._cache is not None:
            other._cache, other._marks = jax.tree.map(jnp.copy, self._cache), self._marks
        return other


def _nothing() -> Int[np.ndarray, "0"]:
    return np.zeros(0, np.int64)


def _marks_of(request: Request) -> Int[np.ndarray, "T"]:
    """What stands at each position: a token's id, or a negative number for a frame of a clip."""
    marks = request.ids.astype(np.int64)
    for mel, start, count in zip(request.mels, request.starts, request.counts, strict=True):
        digest = hashlib.blake2b(np.ascontiguousarray(mel).tobytes(), digest_size=6).digest()
        marks[start : start + count] = -1 - np.arange(count) - CLIP * int.from_bytes(digest)
    return marks


def _shared(a: Int[np.ndarray, "S"], b: Int[np.ndarray, "T"]) -> int:
    """Length of the beginning that two rows share."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size
