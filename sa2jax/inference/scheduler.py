"""Scheduler: continuous batching of replies in the rows of a model runner.

Requests wait in the order in which they come. One that finds a row has its clips encoded and its
prompt read a chunk at a time, between the blocks of steps that all replies under way take together;
it leaves when it ends, or after the block in flight when it is cancelled. What happens depends on
the requests alone and not on time, so that the processes of a multi-host program do the same.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sa2jax.inference.generation import Generation
from sa2jax.inference.prefix_cache import (
    Keys,
    PrefixCache,
    Row,
    common_prefix,
    joined,
    position_keys,
)
from sa2jax.inference.requests import FinishReason
from sa2jax.inference.runner import (
    MIN_SLOTS,
    PREFILL_CHUNK,
    Chunk,
    Clip,
    ModelRunner,
    Start,
    Tokens,
    longest_clip,
)

MAX_IN_FLIGHT = 1  # programs that the devices have to do while the host reads what one gave


@dataclass(eq=False)
class _Reply:
    """A request that has a row.

    Attributes:
        generation: what its caller holds.
        row: the row.
        keys: of the prompt's positions.
        limit: tokens at most.
        position: positions that were read.
        unheard: numbers of the clips that are to be encoded; None until its reading begins.
        clips: those that are.
        started: whether the first token was asked for.
        dispatched: tokens that were asked for.
        made: ids that were generated and seen here.
        over: whether it has ended.
    """

    generation: Generation
    row: Row
    keys: Keys
    limit: int
    position: int
    unheard: list[int] | None = None
    clips: dict[int, Clip] = field(default_factory=dict)
    started: bool = False
    dispatched: int = 0
    made: list[int] = field(default_factory=list)
    over: bool = False


class Scheduler:
    """Joins requests to rows, and runs them.

    Args:
        runner: the rows.
        max_rows: rows that there may be; they grow in number as they are needed.
        block: steps of a block: a reply begins, ends or is cancelled between two.

    Attributes:
        cache: what the rows hold.
        reserved: whether the rows stay when nothing needs them.
    """

    def __init__(self, runner: ModelRunner, *, max_rows: int, block: int):
        self.runner, self.block = runner, block
        self.max_rows = -(-max_rows // runner.parts) * runner.parts
        self.cache = PrefixCache()
        self.reserved = False
        self._inbox: deque[list[Generation]] = deque()  # from other threads
        self._calls: deque[tuple[Callable[[], None], Future[None]]] = deque()  # likewise
        self._waiting: deque[Generation] = deque()
        self._replies: list[_Reply] = []
        self._in_flight: deque[tuple[list[tuple[int, _Reply]], Tokens]] = deque()
        # Prompts of which more samples may come, by identity: the row that has read one, and the
        # hidden state of its end.
        self._read_prompts: dict[int, tuple[Row, Any]] = {}
        self._events: list[tuple[Generation, Any]] = []
        self._lock = threading.Lock()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Take requests, all before the next turn; from any thread."""
        with self._lock:
            self._inbox.append(list(generations))

    def call(self, task: Callable[[], None], done: "Future[None]") -> None:
        """Run a task before the next turn; from any thread."""
        with self._lock:
            self._calls.append((task, done))

    @property
    def num_running(self) -> int:
        """Replies that have a row."""
        return len(self._replies)

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting) + sum(map(len, [*self._inbox]))

    # --- as a worker of the device loop ----------------------------------------------------

    def urgency(self) -> float:
        """Lower where a prompt is to be read."""
        return 2.0 if all(reply.started for reply in self._replies) else 1.0

    def has_work(self) -> bool:
        """Whether something can be done: a request is under way and not paused, or waits."""
        if self._calls or self._inbox or self._in_flight:
            return True
        if self._replies and all(r.started and r.generation.is_paused for r in self._replies):
            return False  # whoever takes their ids wakes it
        return bool(self._waiting or self._replies)

    def turn(self) -> bool:
        """Admit what waits, read a chunk, dispatch a block, and see what an earlier one gave."""
        self._run_calls()
        self._drop_cancelled()
        self._admit()
        self._read_some()
        dispatched = self._decode()
        while len(self._in_flight) > (MAX_IN_FLIGHT if dispatched else 0):
            self._collect()
        while self._in_flight and all(reply.over for reply, _ in self._under_way()):
            self._collect()
        self._retire()
        self._deliver()
        return self.has_work()

    def fail(self, error: BaseException) -> None:
        """All requests under way fail with this error; those that wait begin with new rows."""
        for reply in self._replies:
            self._events.append((reply.generation, error))
        self._replies.clear()
        self._in_flight.clear()
        self._read_prompts.clear()
        rows, slots = self.runner.rows, self.runner.slots
        self._forget_rows()
        if self.reserved:
            self.reserve(rows, slots)
        self._deliver()

    # --- rows ------------------------------------------------------------------------------

    def reserve(self, rows: int, slots: int, *, keep: bool = False) -> None:
        """Have at least so many rows and slots; with `keep` also when nothing needs them."""
        self.runner.reserve(rows, slots)
        self.cache.resize(self.runner.rows)
        if keep:
            self.reserved, self.max_rows = True, self.runner.rows

    def forget(self) -> None:
        """Forget what rows hold that no reply uses."""
        for row in self.cache.rows:
            if not row.busy:
                self.cache.forget(row)

    def _run_calls(self) -> None:
        while self._calls:
            task, done = self._calls.popleft()
            try:
                task()
            except BaseException as error:  # raised again where it is waited for
                done.set_exception(error)
            else:
                done.set_result(None)

    def _forget_rows(self) -> None:
        self.runner.release()
        self.cache.resize(0)

    def _admit(self) -> None:
        """Give rows to those that wait, in their order."""
        with self._lock:
            while self._inbox:
                self._waiting.extend(self._inbox.popleft())
        while self._waiting:
            if self._waiting[0].is_cancelled:
                self._waiting.popleft()
                continue
            if not self._place(self._waiting[0]):
                return
            self._waiting.popleft()

    def _place(self, generation: Generation) -> bool:
        """Give a request a row, if there is one."""
        request, options = generation.request, generation.options
        keys = position_keys(request, parity=self.runner.parity)
        room = self.runner.cfg.decoder.max_positions - len(keys)
        limit = min(options.max_new_tokens, request.max_new_tokens or room, room)
        if not self.cache.rows:
            self.reserve(min(len(self._waiting), self.max_rows), MIN_SLOTS)
        place = self.cache.place(keys, generation.conversation, self.runner.part_of)
        if (place is None or place.evicts) and self.runner.rows < self.max_rows:
            wanted = len(self._replies) + len(self._waiting)
            rows = max(2 * self.runner.rows, 1 << (wanted - 1).bit_length())
            self.reserve(min(rows, self.max_rows), MIN_SLOTS)
            place = self.cache.place(keys, generation.conversation, self.runner.part_of)
        if place is None:
            return False
        self.reserve(self.runner.rows, max(len(keys) + limit, MIN_SLOTS))
        known = keys[: place.known]
        self.cache.take(place.row, known, generation.conversation, keep=generation.keep)
        self._replies.append(_Reply(generation, place.row, keys, limit, place.known))
        return True

    def _drop_cancelled(self) -> None:
        for reply in self._replies:
            reply.over |= reply.generation.is_cancelled
        self._retire()

    def _retire(self) -> None:
        """Rows of replies that are over are free; what they hold stays known."""
        for reply in self._replies:
            if reply.over:
                reply.row.busy = False
        self._replies = [reply for reply in self._replies if not reply.over]
        if self._read_prompts:
            alive = [*(reply.generation for reply in self._replies), *self._waiting]
            known = {id(generation.request) for generation in alive}
            self._read_prompts = {
                key: found for key, found in self._read_prompts.items() if key in known
            }
        idle = not (self._replies or self._waiting or self._inbox)
        if idle and not self.reserved and self.cache.is_disposable:
            self._forget_rows()

    # --- reading ---------------------------------------------------------------------------

    def _read_some(self) -> None:
        """Encode a clip, or read a chunk, of the next prompt in each part of the devices."""
        chosen: dict[int, _Reply] = {}
        for reply in self._replies:
            if not reply.started:
                chosen.setdefault(self.runner.part_of(reply.row.index), reply)
        replies = [*chosen.values()]
        if not replies:
            return
        replies = [reply for reply in replies if not self._share_reading(reply)]
        if not replies:
            return
        for reply in replies:
            if reply.unheard is None:
                self._begin_reading(reply)
        if unheard := [(reply, reply.unheard) for reply in replies if reply.unheard]:
            for reply, clips in unheard:
                n, request = clips.pop(0), reply.generation.request
                (reply.clips[n],) = self.runner.encode_audio(
                    [request.mels[n]], longest=longest_clip(request)
                )
            return
        chunks = [self._chunk_of(reply) for reply in replies]
        hidden = self.runner.prefill_chunk(chunks)
        ready = []
        for reply, chunk in zip(replies, chunks, strict=True):
            reply.position += chunk.count
            reply.row.keys = reply.keys[: reply.position]
            if reply.position == len(reply.keys):
                ready.append(reply)
        if ready:
            self._start(ready, hidden)

    def _share_reading(self, reply: _Reply) -> bool:
        """Start another sample of a prompt from what the first has read of it, all alike.

        Returns:
            Whether it has: the first is read, in this part, and its row still holds the prompt.
        """
        found = self._read_prompts.get(id(reply.generation.request))
        if reply.unheard is not None or found is None:
            return False
        row, hidden = found
        part_of, own = self.runner.part_of, reply.row.index
        whole = common_prefix(row.keys, reply.keys) == len(reply.keys)
        if not whole or part_of(row.index) != part_of(own):
            return False
        self.runner.copy_row(row.index, own)
        reply.row.keys, reply.position, reply.unheard = reply.keys, len(reply.keys), []
        self._start([reply], hidden)
        return True

    def _begin_reading(self, reply: _Reply) -> None:
        """Copy what another row knows by now of the prompt; the rest is to be read."""
        request = reply.generation.request
        found = self.cache.better_source(reply.row, reply.keys, self.runner.part_of)
        if found is not None:
            source, reply.position = found
            self.runner.copy_row(source.index, reply.row.index)
            reply.row.keys = reply.keys[: reply.position]
        reply.generation.prefilled = len(reply.keys) - reply.position
        spans = enumerate(zip(request.starts, request.counts, strict=True))
        reply.unheard = [n for n, (start, count) in spans if start + count > reply.position]

    def _chunk_of(self, reply: _Reply) -> Chunk:
        request, first = reply.generation.request, reply.position
        count = min(PREFILL_CHUNK, len(reply.keys) - first)
        touched = {
            n: clip
            for n, clip in reply.clips.items()
            if request.starts[n] < first + count and request.starts[n] + request.counts[n] > first
        }
        return Chunk(reply.row.index, request, first, count, touched)

    def _start(self, replies: list[_Reply], hidden: Any) -> None:
        starts = [
            Start(
                reply.row.index,
                reply.generation.request,
                reply.generation.options,
                reply.limit,
                reply.generation.prompt_index,
                reply.generation.sample_index,
            )
            for reply in replies
        ]
        tokens = self.runner.start_rows(starts, hidden)
        for reply in replies:
            if reply.generation.options.samples > 1:
                self._read_prompts[id(reply.generation.request)] = reply.row, hidden
            reply.started, reply.dispatched = True, 1
            reply.clips.clear()
        lines = [(self.runner.part_of(reply.row.index), reply) for reply in replies]
        self._in_flight.append((lines, tokens))

    # --- generating ------------------------------------------------------------------------

    def _under_way(self) -> list[tuple[_Reply, int]]:
        """Replies whose tokens are in flight, with their lines."""
        return [(reply, line) for lines, _ in self._in_flight for line, reply in lines]

    def _decode(self) -> bool:
        """Dispatch a block of steps of all replies that have begun, if there are any."""
        running = [
            r
            for r in self._replies
            if r.started and r.dispatched < r.limit and not r.generation.is_paused
        ]
        if not running:
            return False
        longest = max(len(r.keys) + min(r.dispatched + self.block, r.limit) for r in running)
        tokens = self.runner.decode([r.row.index for r in running], self.block, longest)
        for reply in running:
            reply.dispatched = min(reply.dispatched + self.block, reply.limit)
        self._in_flight.append(([(reply.row.index, reply) for reply in running], tokens))
        return True

    def _collect(self) -> None:
        """Wait for the oldest tokens in flight, and hand out what there is."""
        lines, tokens = self._in_flight.popleft()
        ids, num_generated, done = tokens.read()
        for line, reply in lines:
            if reply.over:
                continue
            count = int(num_generated[line]) - len(reply.made)
            new = ids[line, :count].tolist()
            reply.made += new
            # The newest token was chosen but not read.
            reply.row.keys = joined([reply.keys, reply.made[:-1]])
            visible, finish_reason = reply.generation.accept(new) if new else ([], None)
            if visible:
                self._events.append((reply.generation, visible))
            if finish_reason is None and done[line]:
                finish_reason = "length"
            if finish_reason is not None:
                self._end(reply, finish_reason)

    def _end(self, reply: _Reply, finish_reason: FinishReason) -> None:
        reply.over = True
        self._events.append((reply.generation, finish_reason))

    def _deliver(self) -> None:
        """Hand out what came, once all that it concerns here is in order."""
        events, self._events = self._events, []
        for generation, event in events:
            generation.emit(event)
