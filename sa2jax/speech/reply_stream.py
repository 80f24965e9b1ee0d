"""One reply as a stream: codes go in as they come, sound comes out chunk by chunk.

reply = ReplyStream(token2wav, voice, first=10)
reply.add(codes)
while reply.is_ready:
    play(reply.step())
play(reply.end())
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from sa2jax.audio.rates import CODE_RATE
from sa2jax.errors import CodeError
from sa2jax.speech.batching import CHUNK
from sa2jax.speech.voices import Voice


class StreamingSynthesizer(Protocol):
    """What a reply's stream needs of `Token2Wav`."""

    sample_rate: int
    max_streams: int

    @property
    def lookahead(self) -> int:
        """Codes that a chunk needs to hear ahead."""
        ...

    def start(self, voices: Sequence[Voice], *, seed: int = 0, parity: bool = False) -> Any:
        """Streams that have said nothing yet."""
        ...

    def step(
        self, state: Any, codes: Sequence[Any], last: bool = False
    ) -> tuple[Any, list[Float[np.ndarray, "N"]]]:
        """Speak the next codes of each."""
        ...

    def step_each(
        self, states: Sequence[Any], codes: Sequence[Any], last: Sequence[bool]
    ) -> tuple[list[Any], list[Float[np.ndarray, "N"]]]:
        """Speak the next codes of streams that are apart."""
        ...

    def validate_codes(
        self, codes: Any, *, empty: bool = False, first: int = 0
    ) -> Int[np.ndarray, "T"]:
        """Codes without pads."""
        ...


class ReplyStream:
    """The stream of one reply; nothing is computed but in `start`, `step` and `end`.

    The chunks begin small, so that the first sound is soon there, and each is at most twice as long
    as the one before: while it is made, that one is heard.

    Args:
        token2wav: flow and vocoder.
        voice: the voice.
        chunk: codes (25 Hz) that are spoken at once.
        first: codes of the first chunk, by default `chunk`; fewer let the reply begin sooner.
        seed: another one gives another reading.
        parity: stream exactly as the official code does; all chunks but the first are alike then.

    Raises:
        CodeError: for an empty chunk.
    """

    def __init__(
        self,
        token2wav: StreamingSynthesizer,
        voice: Voice,
        *,
        chunk: int = CHUNK,
        first: int | None = None,
        seed: int = 0,
        parity: bool = False,
    ):
        if chunk < 1 or (first is not None and first < 1):
            raise CodeError(f"expected chunks of at least 1 code, got {chunk} and {first}")
        self.token2wav, self._voice = token2wav, voice
        self._chunk, self._seed, self._parity = chunk, seed, parity
        self._size = first or chunk  # of the next chunk
        self._look = token2wav.lookahead  # codes that the next step needs beside its own
        self._waiting: list[int] = []
        self._ended = False
        self.state: Any = None  # None until `start`
        self.num_given = 0  # codes, pads included

    def start(self) -> None:
        """Compute what the voice alone decides, so that the first chunk is sooner there."""
        if self.state is None:
            self.state = self.token2wav.start([self._voice], seed=self._seed, parity=self._parity)

    def add(self, codes: Sequence[int]) -> None:
        """Append codes; pads are left out.

        Raises:
            CodeError: for codes that no recording has.
        """
        found = self.token2wav.validate_codes(codes, empty=True, first=self.num_given)
        self._waiting += found.tolist()
        self.num_given += len(codes)

    @property
    def is_ready(self) -> bool:
        """Whether a whole chunk waits."""
        return len(self._waiting) >= self._size + self._look

    def take(self, *, complete: bool = False) -> tuple[list[int], bool] | None:
        """Codes for the next step, and whether they are the last.

        Args:
            complete: whether there will be no more than were added.

        Returns:
            None if no chunk waits, or all is said.
        """
        if self.is_ready:
            count = self._size + self._look
            now, self._waiting = self._waiting[:count], self._waiting[count:]
            self._size = self._chunk if self._parity else min(2 * self._size, self._chunk)
            self._look = 0
            return now, False
        if complete and self.num_given and not self._ended:
            now, self._waiting, self._ended = self._waiting, [], True
            return now, True
        return None

    def advance(
        self, state: Any, piece: Float[np.ndarray, "N"], *, last: bool
    ) -> Float[np.ndarray, "N"]:
        """Go on with what a step of `take`'s codes gave.

        Returns:
            The sound: a reply of pads alone is silence.
        """
        self.state = state
        if last and int(state.num_codes[0]) == len(self._voice.codes):
            return np.zeros(self.num_given * self.token2wav.sample_rate // CODE_RATE, np.float32)
        return piece

    def step(self, *, complete: bool = False) -> Float[np.ndarray, "N"]:
        """Speak the next chunk: samples in [-1, 1] at the synthesizer's rate.

        Raises:
            CodeError: if there is none.
        """
        taken = self.take(complete=complete)
        if taken is None:
            raise CodeError("no codes: expected at least one")
        self.start()
        codes, last = taken
        state, (piece,) = self.token2wav.step(self.state, [codes], last)
        return self.advance(state, piece, last=last)

    def end(self) -> Float[np.ndarray, "N"]:
        """Speak what is left; a reply of pads alone is silence.

        Raises:
            CodeError: if there were no codes at all.
        """
        pieces = [self.step(complete=True)]
        while not self._ended:
            pieces.append(self.step(complete=True))
        return np.concatenate(pieces)
