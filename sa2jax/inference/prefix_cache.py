"""Prefix cache of one conversation: only what follows the longest common prefix is prefilled.

prefix_cache = PrefixCache(engine)
for ids in prefix_cache.reply(request, options): ...
prefix_cache.prefilled  # positions that this reply had to prefill

Each prompt is given whole and compared with what the cache holds, clips included. A conversation
that goes on prefills its new turn only; one whose last turns were undone, cut or dropped prefills
what changed. No bookkeeping is needed for that.
"""

import hashlib
from collections.abc import Generator
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sa2jax.errors import PromptError
from sa2jax.inference.engine import Engine, longest_clip
from sa2jax.inference.requests import GenerationConfig, Request, validate_request
from sa2jax.models.decoder import KVCache

DECODE_STEPS = 5  # steps per compiled call: a word and its four codes
MIN_CACHE_SIZE = 1024  # slots: large enough that a cache is seldom replaced by a larger one
CLIP_POSITIONS = 4096  # more positions than a clip has


class PrefixCache:
    """The prefix cache of a conversation, and the replies that are generated with it.

    Args:
        engine: the model's programs.

    Attributes:
        prefilled: positions of the newest reply's prompt that were not in the cache.
        finish_reason: why the newest reply ended: `stop`, `length`, or `abandoned` by the caller.
    """

    def __init__(self, engine: Engine):
        self.prefilled = 0
        self.finish_reason: Literal["stop", "length", "abandoned"] = "abandoned"
        self._engine = engine
        self._cache: KVCache | None = None
        self._keys = _no_keys()  # of the positions in the cache, see `_position_keys`

    def reply(
        self,
        request: Request,
        options: GenerationConfig,
        *,
        prompt_index: int = 0,
        block: int = DECODE_STEPS,
    ) -> Generator[list[int]]:
        """Continue a prompt; keys and values of prompt and reply are kept for the next one.

        The next block is under way while the caller handles one. The caller looks for stop strings
        and may stop at any time.

        Args:
            request: the whole conversation up to here.
            options: how to continue it; `samples` must be 1.
            prompt_index: what is drawn depends on it and on the seed.
            block: steps per compiled call.

        Yields:
            The next ids, at most `block` of them, without the stop id.

        Raises:
            PromptError: for a prompt that does not fit the model, see `Engine.generate`.
        """
        if options.samples != 1:
            raise PromptError("a conversation has one reply: expected samples=1")
        engine, context = self._engine, self._engine.cfg.decoder.max_positions
        validate_request(prompt_index, request, engine.cfg)
        length = len(request.ids)
        limit = min(options.max_new_tokens, request.max_new_tokens or context, context - length)
        keys = _position_keys(request, parity=engine.parity)
        # The last position is always prefilled: its hidden state chooses the first token.
        known = min(_common_prefix(self._keys, keys), length - 1)
        cache, self._cache, self._keys = self._cache, None, _no_keys()  # if this fails, start anew
        cache = engine.truncate_cache(
            engine.ensure_cache(max(length + limit, MIN_CACHE_SIZE), cache), known
        )
        self.prefilled, self.finish_reason = length - known, "abandoned"
        cache, hidden = engine.prefill_chunks(cache, request, known)
        state = engine.sample_first_token(cache, hidden, request.ids, options, prompt_index, limit)
        made, new = 1, np.asarray(state.last_token).tolist()
        ids = list(new)
        ahead: Array | None = None
        try:
            while True:
                if not np.asarray(state.done)[0]:
                    state, ahead = engine.decode(state, options, block)
                stopped = new[-1] in options.stop_ids
                if visible := new[: len(new) - stopped]:
                    yield visible
                if ahead is None:
                    self.finish_reason = "stop" if stopped else "length"
                    return
                made, before = int(np.asarray(state.num_generated)[0]), made
                new = np.asarray(ahead)[0, : made - before].tolist()
                ahead = None
                ids += new
        finally:
            if not state.num_generated.is_deleted():  # by a call that was interrupted
                if ahead is not None:  # made already, though nobody waits for them
                    ids += np.asarray(ahead)[0].tolist()
                # The newest token is in the reply but not in the cache.
                count = int(np.asarray(state.num_generated)[0]) - 1
                self._keys = np.concatenate([keys, np.array(ids[:count], np.int64)])
                self._cache = state.cache

    def fork(self) -> Self:
        """A copy of the cache, for another conversation that goes on from here."""
        other = type(self)(self._engine)
        if self._cache is not None:
            other._cache, other._keys = jax.tree.map(jnp.copy, self._cache), self._keys
        return other


def _no_keys() -> Int[np.ndarray, "0"]:
    return np.zeros(0, np.int64)


def _position_keys(request: Request, *, parity: bool) -> Int[np.ndarray, "T"]:
    """What stands at each position: a token's id, or a negative number for a frame of a clip.

    With `parity` a clip is another one once a longer clip is said: officially all are padded to it.
    """
    keys = request.ids.astype(np.int64)
    salt = longest_clip(request).to_bytes(8) if parity else b""
    for mel, start, count in zip(request.mels, request.starts, request.counts, strict=True):
        data = np.ascontiguousarray(mel).tobytes()
        digest = hashlib.blake2b(data, digest_size=6, salt=salt).digest()
        keys[start : start + count] = (
            -1 - np.arange(count) - CLIP_POSITIONS * int.from_bytes(digest)
        )
    return keys


def _common_prefix(a: Int[np.ndarray, "S"], b: Int[np.ndarray, "T"]) -> int:
    """Length of the beginning that two rows share."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size
