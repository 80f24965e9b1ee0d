"""Background synthesis: a thread that turns codes into sound while they are still generated."""

import atexit
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from sa2jax.speech.token2wav import CHUNK, Token2Wav
from sa2jax.speech.voices import Voice

_WORKERS: "weakref.WeakSet[SynthesisWorker]" = weakref.WeakSet()


class SynthesisWorker:
    """A thread that speaks one reply; the sound is that of `Token2Wav.stream`, whenever codes come.

    Args:
        token2wav: flow and vocoder.
        voice: the voice.
        chunk: codes (25 Hz) that are spoken at once.
        first: codes of the first chunk, by default `chunk`.
        seed: another one gives another reading.
    """

    def __init__(
        self,
        token2wav: Token2Wav,
        voice: Voice,
        *,
        chunk: int = CHUNK,
        first: int | None = None,
        seed: int = 0,
    ):
        self._codes: queue.SimpleQueue[Sequence[int] | None] = queue.SimpleQueue()
        self._pieces: queue.SimpleQueue[np.ndarray | BaseException | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._stream = token2wav.stream(
            self._arriving_codes(), voice, chunk=chunk, first=first, seed=seed
        )
        self._thread = threading.Thread(target=self._run, name="sa2jax-synthesis", daemon=True)
        _WORKERS.add(self)
        self._thread.start()

    def put(self, codes: Sequence[int]) -> None:
        """Append these codes to the queue."""
        if codes:
            self._codes.put(codes)

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
                return
            yield _raise_if_error(piece)

    def finish(self) -> Iterator[Float[np.ndarray, "N"]]:
        """Close the queue and yield the remaining pieces of sound."""
        self._codes.put(None)
        while (piece := self._pieces.get()) is not None:
            yield _raise_if_error(piece)
        self._thread.join()

    def stop(self) -> None:
        """Cancel: no further chunk is begun; the one in flight is not waited for."""
        self._stopped.set()
        self._codes.put(None)

    def _arriving_codes(self) -> Iterator[int]:
        nothing = True
        while (codes := self._codes.get()) is not None:
            for code in codes:
                if self._stopped.is_set():
                    raise _StoppedError
                nothing = False
                yield code
        if nothing or self._stopped.is_set():
            raise _StoppedError

    def _run(self) -> None:
        try:
            for piece in self._stream:
                self._pieces.put(piece)
        except _StoppedError:
            pass
        except BaseException as error:  # re-raised by the consumer
            self._pieces.put(error)
        finally:
            self._pieces.put(None)


@atexit.register
def _end_all() -> None:
    """Join all threads before the interpreter shuts down."""
    workers = [*_WORKERS]
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker._thread.join()


class _StoppedError(Exception):
    """Nothing more is to be spoken."""


def _raise_if_error(piece: np.ndarray | BaseException) -> np.ndarray:
    if isinstance(piece, BaseException):
        raise piece
    return piece
