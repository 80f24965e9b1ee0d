"""A voice that speaks in a thread of its own while the codes are still being made."""

import atexit
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from sa2jax.speech.token2wav import CHUNK, Token2Wav
from sa2jax.speech.voices import Voice

_SPEAKING: "weakref.WeakSet[Speaker]" = weakref.WeakSet()


class Speaker:
    """Speaks one reply; the sound is that of `Token2Wav.stream`, whenever the codes come.

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
        self._pieces_of = token2wav.stream(
            self._arriving(), voice, chunk=chunk, first=first, seed=seed
        )
        self._thread = threading.Thread(target=self._work, name="sa2jax-speaker", daemon=True)
        _SPEAKING.add(self)
        self._thread.start()

    def say(self, codes: Sequence[int]) -> None:
        """Speak these codes next."""
        if codes:
            self._codes.put(codes)

    def ready(self) -> Iterator[Float[np.ndarray, "N"]]:
        """What was spoken since the last time; does not wait.

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
            yield _checked(piece)

    def finish(self) -> Iterator[Float[np.ndarray, "N"]]:
        """The reply is complete: what is still to be spoken, as it is."""
        self._codes.put(None)
        while (piece := self._pieces.get()) is not None:
            yield _checked(piece)
        self._thread.join()

    def stop(self) -> None:
        """Be silent: no chunk is begun any more; the one under way is not waited for."""
        self._stopped.set()
        self._codes.put(None)

    def _arriving(self) -> Iterator[int]:
        nothing = True
        while (codes := self._codes.get()) is not None:
            for code in codes:
                if self._stopped.is_set():
                    raise _StoppedError
                nothing = False
                yield code
        if nothing or self._stopped.is_set():
            raise _StoppedError

    def _work(self) -> None:
        try:
            for piece in self._pieces_of:
                self._pieces.put(piece)
        except _StoppedError:
            pass
        except BaseException as error:  # for the thread that listens
            self._pieces.put(error)
        finally:
            self._pieces.put(None)


@atexit.register
def _end_all() -> None:
    """Let no thread be inside a computation when Python goes."""
    speaking = [*_SPEAKING]
    for speaker in speaking:
        speaker.stop()
    for speaker in speaking:
        speaker._thread.join()


class _StoppedError(Exception):
    """Nothing more is to be spoken."""


def _checked(piece: np.ndarray | BaseException) -> np.ndarray:
    if isinstance(piece, BaseException):
        raise piece
    return piece
