"""Voice activity detection: how likely somebody speaks, and where speech begins and ends.

    for segment in speech_segments(audio.load_audio("call.wav")):
        print(segment.start / 16_000, segment.end / 16_000)  # s

    stream = SpeechStream()  # sound as it comes
    stream.push(samples)  # the probability of speech in each 32 ms that are complete

The network is Silero VAD (`silero`). A probability near 1 says that a voice is heard, be the room
quiet or not; whether something can be heard at all is for `levels`. Turns of a conversation are
found by `turns`, and long recordings cut by `pauses`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from jaxtyping import Float, Float32

from sa2jax.audio.levels import SILENT, levels
from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.audio.silero import CONTEXT, FRAME, UNITS, SileroVAD, shipped
from sa2jax.errors import AudioError, ConfigError

FRAME_MS = FRAME * 1000 // SAMPLE_RATE  # 32 ms
_HYSTERESIS = 0.15  # below the threshold by so much, or below half of it, speech is over
_LOUD = 0.1  # level, -20 dB, that the loudest 20 ms of a quiet block are brought to
_MAX_GAIN = 30
_BLOCK = 128 * FRAME  # 4 s: so much of a recording is computed at once, whatever blocks it comes in


@dataclass(frozen=True, eq=False)
class VADState:
    """What the detector remembers of streams, one a row.

    Attributes:
        context: the last samples of each.
        hidden: the LSTM's output.
        cell: its memory.
    """

    context: Float32[np.ndarray, "B 64"]
    hidden: Float32[np.ndarray, "B 128"]
    cell: Float32[np.ndarray, "B 128"]

    def __getitem__(self, rows: slice | Sequence[int]) -> "VADState":
        """The state of some of its streams."""
        return VADState(self.context[rows], self.hidden[rows], self.cell[rows])

    @classmethod
    def concat(cls, states: Sequence[Self]) -> Self:
        """One state of all these streams."""
        return cls(
            np.concatenate([state.context for state in states]),
            np.concatenate([state.hidden for state in states]),
            np.concatenate([state.cell for state in states]),
        )


class SpeechDetector:
    """Gives the probability of speech in each 32 ms of any number of streams.

    It has no state of its own: one detector serves all streams and threads.

    Args:
        network: by default the one that comes with the library.
    """

    def __init__(self, network: SileroVAD | None = None):
        self._network = shipped() if network is None else network

    def start(self, streams: int = 1) -> VADState:
        """The state of streams that begin."""
        return VADState(*(np.zeros((streams, n), np.float32) for n in (CONTEXT, UNITS, UNITS)))

    def step(
        self, samples: Float[np.ndarray, "B T"], state: VADState
    ) -> tuple[Float32[np.ndarray, "B K"], VADState]:
        """Hear the next samples of each stream.

        Args:
            samples: 16 kHz in [-1, 1], whole frames: T is 512 times K.
            state: what `start` or the step before gave; it is not changed.

        Returns:
            The probability of speech in each frame, and the state after the last.

        Raises:
            AudioError: if these are not whole frames of so many streams.
        """
        if samples.ndim != 2 or len(samples) != len(state.hidden) or samples.shape[1] % FRAME:
            raise AudioError(
                f"expected samples [{len(state.hidden)}, T] with T a multiple of {FRAME}, got "
                f"{list(samples.shape)}; SpeechStream takes blocks of any length"
            )
        found, state = self.step_each(list(samples), state)
        return np.stack(found), state

    def step_each(
        self, blocks: Sequence[Float[np.ndarray, " _"]], state: VADState
    ) -> tuple[list[Float32[np.ndarray, " _"]], VADState]:
        """`step` with a block for each stream, of any number of frames each, also none."""
        frames, contexts = [], []
        for block, context in zip(blocks, state.context, strict=True):
            joined = np.concatenate([context, block], dtype=np.float32)
            if len(block):
                frames.append(
                    np.lib.stride_tricks.sliding_window_view(joined, CONTEXT + FRAME)[::FRAME]
                )
            else:
                frames.append(np.zeros((0, CONTEXT + FRAME), np.float32))
            contexts.append(joined[len(joined) - CONTEXT :])
        hidden, cell = state.hidden.copy(), state.cell.copy()
        found = self._network(frames, hidden, cell)
        return found, VADState(np.stack(contexts), hidden, cell)


class SpeechStream:
    """One stream of samples in blocks of any length, and the probability of speech in it.

    Args:
        detector: by default one with the network that comes with the library.
    """

    def __init__(self, detector: SpeechDetector | None = None):
        self.detector = SpeechDetector() if detector is None else detector
        self.reset()

    @property
    def held(self) -> int:
        """How many samples wait for their frame to be complete."""
        return len(self._held)

    def reset(self) -> None:
        """Forget what was heard: what follows has nothing to do with it."""
        self._state = self.detector.start()
        self._held = np.zeros(0, np.float32)

    def push(self, samples: Float[np.ndarray, " T"]) -> Float32[np.ndarray, " K"]:
        """Hear the next samples, 16 kHz in [-1, 1].

        Returns:
            The probability of speech in each frame of 512 samples that they complete.

        Raises:
            AudioError: if these are no samples of one channel, or hold NaN or Inf.
        """
        (found,) = push_streams([self], [samples])
        return found


def push_streams(
    streams: Sequence[SpeechStream], blocks: Sequence[Float[np.ndarray, " _"]]
) -> list[Float32[np.ndarray, " _"]]:
    """`SpeechStream.push` for many streams of one detector in one computation.

    Raises:
        AudioError: as for `push`; nothing is heard then.
    """
    for block in blocks:
        if block.ndim != 1 or not np.issubdtype(block.dtype, np.floating):
            raise AudioError(
                f"expected float samples [T] in [-1, 1], got {block.dtype} {list(block.shape)}; "
                "divide int16 samples by 32768"
            )
        if not np.isfinite(block).all():
            raise AudioError("expected finite samples, got NaN or Inf")
    if not streams:
        return []
    whole = []
    for stream, block in zip(streams, blocks, strict=True):
        held = np.concatenate([stream._held, block], dtype=np.float32)
        complete = len(held) // FRAME * FRAME
        whole.append(held[:complete])
        stream._held = held[complete:].copy()
    states = VADState.concat([stream._state for stream in streams])
    found, states = streams[0].detector.step_each(whole, states)
    for n, stream in enumerate(streams):
        stream._state = states[n : n + 1]
    return found


def speech_probabilities(
    blocks: Iterable[Float[np.ndarray, " T"]], detector: SpeechDetector | None = None
) -> Iterator[tuple[Float32[np.ndarray, " _"], Float32[np.ndarray, " K"]]]:
    """The probability of speech all through a recording, some seconds at a time.

    Four seconds in which nothing is louder than -66 dB are not computed: 0, and what follows is
    heard as a beginning. Quiet ones are amplified by up to 30 dB: the network overhears who
    whispers from afar.

    Args:
        blocks: the recording, 16 kHz in [-1, 1], in blocks of any length; the result does not
            depend on them.
        detector: as for `SpeechStream`.

    Yields:
        Samples, and the probability of each 512 of them; the last may be of fewer.

    Raises:
        AudioError: as for `SpeechStream.push`.
    """
    stream = SpeechStream(detector)
    for samples in _regular(blocks):
        loudest = levels(samples).max()
        if loudest < SILENT:
            stream.reset()
            yield samples, np.zeros(-(-len(samples) // FRAME), np.float32)
        else:
            gain = min(_LOUD / loudest, 1 / np.abs(samples).max(), _MAX_GAIN)
            gain = np.float32(max(gain, 1))
            yield samples, stream.push(np.pad(gain * samples, (0, -len(samples) % FRAME)))


def _regular(blocks: Iterable[np.ndarray]) -> Iterator[Float32[np.ndarray, " _"]]:
    """Blocks of 4 s; the last is shorter."""
    held, length = [], 0
    for block in blocks:
        held.append(block)
        length += len(block)
        if length >= _BLOCK:
            joined = np.concatenate(held, dtype=np.float32)
            whole = length // _BLOCK * _BLOCK
            yield from np.split(joined[:whole], whole // _BLOCK)
            held, length = [joined[whole:].copy()], length - whole
    if length:
        yield np.concatenate(held, dtype=np.float32)


class SpeechTracker:
    """Where speech begins and ends, told frame by frame from its probability.

    Speech begins in a frame of at least the threshold and goes on until frames are below the
    threshold less 0.15, or below half of it, for long enough. Frames are of 32 ms.

    Attributes:
        frames: how many were seen.
        speaking: whether speech has begun and not ended.
        onset: the first frame of the speech that was told last.
        end: the one after its last frame.
        spoken: frames of speech since the onset, pauses not counted; 0 when nobody speaks.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.reset()

    def reset(self) -> None:
        """Forget speech that has begun: nobody is speaking."""
        self.speaking = False
        self.onset = self.end = self.frames
        self.spoken = 0

    @property
    def silence(self) -> int:
        """How many frames ago the last speech was."""
        return self.frames - self.end

    def push(
        self, probability: float, threshold: float, min_speech: int, min_silence: int
    ) -> Literal["began", "ended"] | None:
        """See the next frame.

        Args:
            probability: of speech in it.
            threshold: from which on it is speech.
            min_speech: frames of speech before it is told of.
            min_silence: frames without speech before it is told that speech ended.

        Returns:
            "began" and "ended" when it is told, None otherwise.
        """
        inside = self.spoken > 0
        self.frames += 1
        if probability >= (max(threshold - _HYSTERESIS, threshold / 2) if inside else threshold):
            if not inside:
                self.onset = self.frames - 1
            self.spoken, self.end = self.spoken + 1, self.frames
            if not self.speaking and self.spoken >= min_speech:
                self.speaking = True
                return "began"
        elif inside and self.silence >= min_silence:
            self.spoken = 0
            if self.speaking:
                self.speaking = False
                return "ended"
        return None


@dataclass(frozen=True)
class SpeechSegment:
    """A part of a recording in which somebody speaks.

    Attributes:
        start: its first sample in the recording, at 16 kHz.
        end: the one after its last.
    """

    start: int
    end: int


def speech_segments(
    recording: Float[np.ndarray, " T"] | Iterable[Float[np.ndarray, " _"]],
    *,
    threshold: float = 0.5,
    min_speech_ms: int = 250,
    min_silence_ms: int = 100,
    padding_ms: int = 30,
    detector: SpeechDetector | None = None,
) -> Iterator[SpeechSegment]:
    """Where in a recording somebody speaks, in order; memory does not grow with its length.

    Args:
        recording: 16 kHz in [-1, 1], whole or in blocks of any length.
        threshold: probability from which on a frame is speech.
        min_speech_ms: of speech in a segment at least, pauses not counted.
        min_silence_ms: a pause of that length ends a segment.
        padding_ms: what a segment has before and after its speech; of a shorter pause, half.
        detector: as for `SpeechStream`.

    Raises:
        AudioError: as for `SpeechStream.push`.
        ConfigError: for a setting that makes no sense.
    """
    if not 0 < threshold < 1 or min(min_speech_ms, min_silence_ms, padding_ms) < 0:
        raise ConfigError(
            f"expected a threshold between 0 and 1 and times of 0 ms or more, got {threshold}, "
            f"{min_speech_ms}, {min_silence_ms} and {padding_ms}"
        )
    return _segments(
        [recording] if isinstance(recording, np.ndarray) else recording,
        threshold,
        max(frames_of(min_speech_ms), 1),
        max(frames_of(min_silence_ms), 1),
        padding_ms * SAMPLE_RATE // 1000,
        detector,
    )


def frames_of(milliseconds: float) -> int:
    """The frames of 32 ms that last at least so long."""
    return math.ceil(milliseconds / FRAME_MS)


def _segments(
    blocks: Iterable[np.ndarray],
    threshold: float,
    min_speech: int,
    min_silence: int,
    padding: int,
    detector: SpeechDetector | None,
) -> Iterator[SpeechSegment]:
    tracker, total = SpeechTracker(), 0
    start, last = 0, None  # of the segment that is open; the one before, its end not padded yet
    for samples, probabilities in speech_probabilities(blocks, detector):
        total += len(samples)
        for probability in probabilities.tolist():
            told = tracker.push(probability, threshold, min_speech, min_silence)
            if told == "began":
                start = tracker.onset * FRAME
                room = padding if last is None else min(padding, (start - last.end) // 2)
                if last is not None:
                    yield SpeechSegment(last.start, last.end + room)
                last, start = None, max(start - room, 0)
            elif told == "ended":
                last = SpeechSegment(start, tracker.end * FRAME)
    if tracker.speaking:
        last = SpeechSegment(start, tracker.end * FRAME)
    if last is not None:
        yield SpeechSegment(last.start, min(last.end + padding, total))
