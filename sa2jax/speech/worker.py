"""Background synthesis: a thread that turns codes into sound while they are still generated.

One thread for each `Token2Wav` speaks all replies, a chunk at a time in turn, and lasts as long as
it: a thread for each reply would leave an allocator's arena behind, tens of MB of each.
"""

import atexit
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from sa2jax.speech.reply_stream import ReplyStream, StreamingSynthesizer


class BackgroundReply:
    """A reply that is spoken in the background; the sound is that of `Token2Wav.stream`.

    Args:
        reply: the stream that speaks it; the worker's alone from here on.
    """

    def __init__(self, reply: ReplyStream):
        self._pieces: queue.SimpleQueue[np.ndarray | BaseException | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._reply: ReplyStream | None = reply  # None once all is said
        self._complete = False
        self._worker = _worker_of(reply.token2wav)
        self._worker.tasks.put((self, ()))  # to start while the first codes are generated

    def put(self, codes: Sequence[int]) -> None:
        """Append these codes to the queue."""
        if codes:
            self._worker.tasks.put((self, codes))

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
        self._worker.tasks.put((self, None))
        while (piece := self._pieces.get()) is not None:
            yield _raise_if_error(piece)

    def stop(self) -> None:
        """Cancel: no further chunk is begun; the one in flight is not waited for."""
        self._stopped.set()
        self._worker.tasks.put((self, ()))

    def take(self, codes: Sequence[int] | None) -> bool:
        """Take codes, None for no more; the worker calls it.

        Returns:
            Whether there is something to do now.
        """
        if self._reply is None:
            return False
        self._complete |= codes is None
        try:
            self._reply.add(codes or ())
        except BaseException as error:  # re-raised by the consumer
            self._fail(error)
        return self._reply is not None

    def speak(self) -> bool:
        """Speak a chunk, if there is one; the worker calls it.

        Returns:
            Whether there is more to do.
        """
        reply = self._reply
        if reply is None:
            return False
        try:
            if not self._stopped.is_set():
                reply.start()
                if reply.is_ready:
                    self._pieces.put(reply.step())
                    return reply.is_ready or self._complete
                if self._complete and reply.num_given:
                    self._pieces.put(reply.end())
        except BaseException as error:  # re-raised by the consumer
            self._fail(error)
        if self._complete or self._stopped.is_set():
            self._end()
        return False

    def _fail(self, error: BaseException) -> None:
        self._pieces.put(error)
        self._stopped.set()
        self._end()

    def _end(self) -> None:
        if self._reply is not None:
            self._reply = None
            self._pieces.put(None)


class _Worker:
    """A thread that serves the replies of one `Token2Wav`.

    Attributes:
        tasks: replies with codes for them; None ends the thread.
    """

    def __init__(self):
        self.tasks: queue.SimpleQueue[tuple[BackgroundReply, Sequence[int] | None] | None] = (
            queue.SimpleQueue()
        )
        self._closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="sa2jax-synthesis", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End the thread after the chunk in flight, which is not waited for."""
        self._closed.set()
        self.tasks.put(None)

    def _run(self) -> None:
        active: deque[BackgroundReply] = deque()  # those with something to speak, in turn
        while not self._closed.is_set():
            try:
                task = self.tasks.get(block=not active)
            except queue.Empty:
                reply = active.popleft()
                if reply.speak():
                    active.append(reply)
            else:
                if task is None:
                    return
                reply, codes = task
                if reply.take(codes) and reply not in active:
                    active.append(reply)
                del task
            del reply  # nothing is kept alive by a thread that waits


_WORKERS: "weakref.WeakKeyDictionary[StreamingSynthesizer, _Worker]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _worker_of(token2wav: StreamingSynthesizer) -> _Worker:
    with _LOCK:
        worker = _WORKERS.get(token2wav)
        if worker is None or not worker.thread.is_alive():  # as after a fork
            worker = _WORKERS[token2wav] = _Worker()
            weakref.finalize(token2wav, worker.close)
    return worker


@atexit.register
def _end_all() -> None:
    """Join all threads before the interpreter shuts down."""
    workers = [*_WORKERS.values()]
    for worker in workers:
        worker.close()
    for worker in workers:
        worker.thread.join()


def _raise_if_error(piece: np.ndarray | BaseException) -> np.ndarray:
    if isinstance(piece, BaseException):
        raise piece
    return piece
