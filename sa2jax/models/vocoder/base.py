"""The `Vocoder` protocol: what speech synthesis needs of a vocoder."""

from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, Int, Key

VocoderState = Any
"""What streams carry from chunk to chunk: a pytree whose leaves all have the streams first."""


class VocoderSizes(Protocol):
    """What is known of a vocoder without its numbers."""

    @property
    def mels(self) -> int:
        """Bands of a mel frame."""

    @property
    def sample_rate(self) -> int:
        """Of the waveform, in Hz."""

    @property
    def samples(self) -> int:
        """Samples that one mel frame becomes."""

    @property
    def carry(self) -> int:
        """Mel frames that a stream holds back at most and gives out with the next chunk."""


class Vocoder(Protocol):
    """Mel frames to a waveform; a row of a batch does not depend on the others.

    A module bound to its parameters: all but `cfg` is called inside traced functions.
    """

    @property
    def cfg(self) -> VocoderSizes:
        """Sizes."""

    def __call__(
        self,
        mel: Float[Array, "B T M"],
        frames: Int[Array, "B"] | None = None,
        *,
        noise: Float[Array, "B N H"] | None = None,
        key: Key[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B N"], Any]:
        """Synthesise whole utterances.

        Args:
            mel: log-mel frames (50 Hz); rows may be padded on the right with anything.
            frames: mel frames of each row; by default all.
            noise: standard normal draws to use instead of own ones, for comparisons.
            key: random key of each row.

        Returns:
            Waveform in [-1, 1], N = samples · T, zero beyond each row's own; and what it was made
            of, which is the vocoder's own affair.
        """
        ...

    def start(self, rows: int, key: Key[Array, "B"]) -> VocoderState:
        """Streams that have not begun, each with its random key."""
        ...

    def step(
        self,
        state: VocoderState,
        mel: Float[Array, "B T M"],
        frames: Int[Array, "B"],
        *,
        last: Bool[Array, "B"],
        noise: Float[Array, "B N H"] | None = None,
        equal_gain: bool = False,
    ) -> tuple[VocoderState, Float[Array, "B N"], Int[Array, "B"]]:
        """Advance every stream by one chunk of mel frames.

        Args:
            state: of each stream.
            mel: new frames, padded on the right.
            frames: new frames of each row. A row without any, unless it is its last, stays as it
                was.
            last: whether a row's reply ends here; what was held back is returned.
            noise: see `__call__`; for frames held back and new ones, valid ones first.
            equal_gain: join chunks at an even level; the released ones are 8 % louder there.

        Returns:
            The new state, the waveform, N = samples · (carry + T) at most, and how many samples of
            it each row gives out; the rest is zero.
        """
        ...
