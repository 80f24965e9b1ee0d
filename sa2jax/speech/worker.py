"""Speech in the background: codes to sound, in the device loop, while codes are still generated.

All replies of a detokenizer that have a whole chunk are spoken in one call, where that costs less
than one after the other. If some are pressing, those whose sound would run out within a second go
first, and first of all those that have said nothing yet.
"""

import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from sa2jax.device_loop import DeviceLoop
from sa2jax.speech.reply_stream import ReplyStream, StreamingSynthesizer

PRESSING = 1.0  # seconds of sound ahead of its player, below which a reply is in a hurry

FIRST_CHUNK, HURRY, START, LATER = 0.0, 0.5, 1.5, 3.0  # urgencies, see `device_loop`


class BackgroundReply:
    """A reply that is spoken in the background; the sound is that of `Token2Wav.stream`.

    Args:
        stream: what speaks it; the worker's alone from here on.
        loop: the thread that runs the programs.
    """

    def __init__(self, stream: ReplyStream, loop: DeviceLoop):
        self.stream = stream
        self.complete = False
        self._pieces: queue.SimpleQueue[np.ndarray | BaseException | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._over = False
        self._sent, self._since = 0.0, 0.0  # seconds of sound, and since when
        self._worker = _worker_of(stream.token2wav, loop)
        self._worker.tell(self, ())  # to start while the first codes are generated

    # --- for the caller --------------------------------------------------------------------

    def put(self, codes: Sequence[int]) -> None:
        """Append these codes to the queue."""
        if codes:
            self._worker.tell(self, codes)

    def poll(self) -> Iterator[Float[np.ndarray, "N"]]:
        """Pieces of sound that are ready; does not wait.

        Raises:
            Sa2jaxError: if speaking failed.
        """
        while True:
            try:
                piece = self._pieces.get_nowait()
            except queue.Empty:
                return
            if piece is None:
                self._pieces.put(None)  # `finish` waits for it
                return
            yield _raise_if_error(piece)

    def finish(self) -> Iterator[Float[np.ndarray, "N"]]:
        """Close the queue and yield the remaining pieces of sound."""
        self._worker.tell(self, None)
        while (piece := self._pieces.get()) is not None:
            yield _raise_if_error(piece)

    def stop(self) -> None:
        """Cancel: no further chunk is begun; the one in flight is not waited for."""
        self._stopped.set()
        self._worker.tell(self, ())

    # --- for the worker --------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be said."""
        return self._over

    @property
    def is_stopped(self) -> bool:
        """Whether it was cancelled."""
        return self._stopped.is_set()

    @property
    def has_chunk(self) -> bool:
        """Whether there is something to speak now."""
        return self.stream.is_ready or (self.complete and self.stream.num_given > 0)

    def slack(self, now: float) -> float:
        """Seconds until a player that began at once would have nothing to play."""
        return self._sent - (now - self._since) if self._sent else -math.inf

    def emit(self, piece: Float[np.ndarray, "N"], *, last: bool) -> None:
        """Hand out a piece of sound."""
        if not self._sent:
            self._since = time.perf_counter()
        self._sent += len(piece) / self.stream.token2wav.sample_rate
        self._pieces.put(piece)
        if last:
            self.end()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will be said."""
        if not self._over:
            self._over = True
            if error is not None:
                self._pieces.put(error)
            self._pieces.put(None)


class SpeechWorker:
    """Speaks the replies of one detokenizer; a worker of the device loop."""

    def __init__(self, loop: DeviceLoop):
        self._loop = loop
        self._inbox: deque[tuple[BackgroundReply, Sequence[int] | None]] = deque()
        self._active: list[BackgroundReply] = []  # those with something to do

    def tell(self, reply: BackgroundReply, codes: Sequence[int] | None) -> None:
        """Give a reply codes, None for no more; from any thread."""
        self._inbox.append((reply, codes))
        self._loop.wake(self)

    def urgency(self) -> float:
        """By the reply that is in the greatest hurry."""
        ready = [reply for reply in self._active if reply.has_chunk]
        if self._inbox or not ready:
            return START if not ready else FIRST_CHUNK
        slack = min(reply.slack(time.perf_counter()) for reply in ready)
        if slack == -math.inf:
            return FIRST_CHUNK
        return HURRY if slack < PRESSING else LATER

    def has_work(self) -> bool:
        """Whether a reply has something to do."""
        return bool(self._inbox or self._active)

    def turn(self) -> bool:
        """Take what was given, then start a reply, or speak a chunk of those that are due."""
        while self._inbox:
            reply, codes = self._inbox.popleft()
            self._take(reply, codes)
        self._active = [reply for reply in self._active if not reply.is_over]
        if ready := [reply for reply in self._active if reply.has_chunk]:
            now = time.perf_counter()
            pressing = [reply for reply in ready if reply.slack(now) < PRESSING]
            chosen = sorted(pressing or ready, key=lambda reply: reply.slack(now))
            self._speak(chosen[: chosen[0].stream.token2wav.max_streams])
        else:
            for reply in self._active:
                if reply.stream.state is None:
                    self._try(reply, reply.stream.start)
                    return True
        for reply in self._active:
            if reply.complete and not reply.stream.num_given:
                reply.end()  # nothing was to be said
        self._active = [r for r in self._active if r.has_chunk and not r.is_over]
        return self.has_work()

    def fail(self, error: BaseException) -> None:
        """All replies end with this error."""
        for reply in self._active:
            reply.end(error)
        self._active.clear()

    def _take(self, reply: BackgroundReply, codes: Sequence[int] | None) -> None:
        if reply.is_stopped:
            reply.end()
        if reply.is_over:
            return
        reply.complete |= codes is None
        if self._try(reply, lambda: reply.stream.add(codes or ())) and reply not in self._active:
            self._active.append(reply)

    def _speak(self, replies: Sequence[BackgroundReply]) -> None:
        """Speak the next chunk of each."""
        replies = [reply for reply in replies if self._try(reply, reply.stream.start)]
        taken = [(reply, reply.stream.take(complete=reply.complete)) for reply in replies]
        chunks = [(reply, *chunk) for reply, chunk in taken if chunk is not None]
        if not chunks:
            return
        token2wav = chunks[0][0].stream.token2wav
        if len(chunks) > 1:
            states = [reply.stream.state for reply, _, _ in chunks]
            codes, last = [own for _, own, _ in chunks], [end for _, _, end in chunks]
            try:
                made = zip(*token2wav.step_each(states, codes, last), strict=True)
            except Exception:  # one of them, so each for itself
                pass
            else:
                for (reply, _, end), (state, piece) in zip(chunks, made, strict=True):
                    reply.emit(reply.stream.advance(state, piece, last=end), last=end)
                return
        for reply, own, end in chunks:
            self._try(reply, lambda r=reply, own=own, end=end: self._speak_alone(r, own, end))

    def _speak_alone(self, reply: BackgroundReply, codes: list[int], last: bool) -> None:
        state, (piece,) = reply.stream.token2wav.step(reply.stream.state, [codes], last)
        reply.emit(reply.stream.advance(state, piece, last=last), last=last)

    def _try(self, reply: BackgroundReply, task) -> bool:
        """Do something for one reply; if it fails, that one ends."""
        try:
            task()
        except BaseException as error:  # raised again where it is waited for
            reply.end(error)
            return False
        return True


_WorkersByLoop = weakref.WeakKeyDictionary[DeviceLoop, SpeechWorker]
_WORKERS: weakref.WeakKeyDictionary[StreamingSynthesizer, _WorkersByLoop] = (
    weakref.WeakKeyDictionary()
)
_LOCK = threading.Lock()


def _worker_of(token2wav: StreamingSynthesizer, loop: DeviceLoop) -> SpeechWorker:
    with _LOCK:
        by_loop = _WORKERS.setdefault(token2wav, weakref.WeakKeyDictionary())
        if loop not in by_loop:
            by_loop[loop] = SpeechWorker(loop)
        return by_loop[loop]


def _raise_if_error(piece: np.ndarray | BaseException) -> np.ndarray:
    if isinstance(piece, BaseException):
        raise piece
    return piece
