"""A reply under way: what a caller holds of a request that an engine has taken."""

import queue
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self

from sa2jax.inference.repetition import RepetitionGuard
from sa2jax.inference.requests import Completion, FinishReason, GenerationConfig, Request

DecodeText = Callable[[Sequence[int]], str]


class Generation(Iterator[list[int]]):
    """A reply under way; iterate for its ids as they come.

    Args:
        request: the prompt.
        options: how to continue it.
        prompt_index: what is drawn depends on it, the seed and the next.
        sample_index: number of the reply to the prompt.
        keep: whether the conversation goes on: what was read is kept for the next prompt.
        conversation: something that stands for it, if it is known: its row is gone on with also
            where most of it was undone, and is free for others once this is no more.
        decode_text: ids to text, needed for stop strings.
        wake: called when it is cancelled.

    Attributes:
        ids: all ids handed out or waiting, without the stop id.
        prefilled: positions of the prompt that had to be read; those in the prefix cache had not.
        finish_reason: why it ended; `abandoned` until it has, and when it was cancelled.
    """

    def __init__(
        self,
        request: Request,
        options: GenerationConfig,
        *,
        prompt_index: int = 0,
        sample_index: int = 0,
        keep: bool = False,
        conversation: object | None = None,
        decode_text: DecodeText | None = None,
        wake: Callable[[], None] = lambda: None,
    ):
        self.request, self.options = request, options
        self.keep, self.conversation = keep, conversation
        self.prompt_index, self.sample_index = prompt_index, sample_index
        self.ids: list[int] = []
        self.prefilled = 0
        self.finish_reason: FinishReason | Literal["abandoned"] = "abandoned"
        self._decode_text, self._wake = decode_text, wake
        self._guard = RepetitionGuard(options.max_repeat)
        self._events: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._over = False

    # --- for the caller --------------------------------------------------------------------

    def __next__(self) -> list[int]:
        """The next ids, at most a block of them; waits for them.

        Raises:
            Exception: what went wrong on the devices.
        """
        event = None if self._over else self._events.get()
        if isinstance(event, list):
            return event
        self._over = True
        if event is not None:
            raise event
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give it up if it is still under way; the row is free after the block in flight."""
        self._over = True
        self._cancelled.set()
        self._wake()

    def result(self) -> Completion:
        """Wait for the whole reply.

        Raises:
            Exception: what went wrong on the devices.
        """
        for _ in self:
            pass
        assert self.finish_reason != "abandoned", "it was given up"
        return Completion(tuple(self.ids), self.finish_reason)

    # --- for the scheduler -----------------------------------------------------------------

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled.is_set()

    def accept(self, new: list[int]) -> tuple[list[int], FinishReason | None]:
        """Take ids that were generated, the stop id included.

        Returns:
            Those to hand out, and why the reply ends with them, if it does before its limit.
        """
        options, old = self.options, len(self.ids)
        self.ids += new
        finish_reason: FinishReason | None = None
        if options.stop_strings and self._decode_text is not None:
            end = _find_stop(self.ids, options.stop_strings, self._decode_text)
            if end is not None:
                self.ids, finish_reason = self.ids[:end], "string"
        if finish_reason is None and (count := self._guard.push(new)) is not None:
            self.ids, finish_reason = self.ids[: old + count], "repetition"
        if finish_reason is None and self.ids[-1] in options.stop_ids:
            self.ids, finish_reason = self.ids[:-1], "stop"
        return self.ids[old:], finish_reason

    def emit(self, event: list[int] | BaseException | FinishReason) -> None:
        """Hand something to the caller: ids, a failure, or the end."""
        if isinstance(event, str):
            self.finish_reason = event
            self._events.put(None)
        else:
            self._events.put(event)


def _find_stop(ids: list[int], strings: Sequence[str], decode_text: DecodeText) -> int | None:
    """Length of the shortest beginning of a reply that holds a stop string, if there is one."""

    def holds(n: int) -> bool:
        return any(s in decode_text(ids[:n]) for s in strings)

    return bisect_left(range(len(ids)), True, key=holds) if holds(len(ids)) else None
