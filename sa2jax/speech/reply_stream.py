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

    def validate_codes(
        self, codes: Any, *, empty: bool = False, first: int = 0
    ) -> Int[np.ndarray, "T"]:
        """Codes without pads."""
        ...


class ReplyStream:
    """The stream of one reply; nothing is computed but in `start`, `step` and `end`.

    Args:
        token2wav: flow and vocoder.
        voice: the voice.
        chunk: codes (25 Hz) that are spoken at once.
        first: codes of the first chunk, by default `chunk`; fewer let the reply begin sooner.
        seed: another one gives another reading.
        parity: stream exactly as the official code does.

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
        self._state: Any = None
        self._waiting: list[int] = []
        self._wanted = token2wav.lookahead + (first or chunk)
        self.num_given = 0  # codes, pads included

    def start(self) -> None:
        """Compute what the voice alone decides, so that the first chunk is sooner there."""
        if self._state is None:
            self._state = self.token2wav.start([self._voice], seed=self._seed, parity=self._parity)

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
        return len(self._waiting) >= self._wanted

    def step(self) -> Float[np.ndarray, "N"]:
        """Speak the next chunk: samples in [-1, 1] at the synthesizer's rate."""
        self.start()
        now, self._waiting = self._waiting[: self._wanted], self._waiting[self._wanted :]
        self._wanted = self._chunk
        self._state, (piece,) = self.token2wav.step(self._state, [now])
        return piece

    def end(self) -> Float[np.ndarray, "N"]:
        """Speak what is left; a reply of pads alone is silence.

        Raises:
            CodeError: if there were no codes at all.
        """
        if not self.num_given:
            raise CodeError("no codes: expected at least one")
        self.start()
        self._state, (piece,) = self.token2wav.step(self._state, [self._waiting], last=True)
        if int(self._state.num_codes[0]) == len(self._voice.codes):
            return np.zeros(self.num_given * self.token2wav.sample_rate // CODE_RATE, np.float32)
        return piece
