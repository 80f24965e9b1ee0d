"""Long recordings cut at pauses into clips that are heard one by one, and what is no speech."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Float

from sa2jax.audio.features import CHUNK_SAMPLES
from sa2jax.audio.levels import silence_note
from sa2jax.audio.vad import FRAME, SpeechTracker, speech_probabilities

# Sound that is taken for speech in vain costs a prompt, speech that is not costs words: so the
# threshold is below that of conversations.
THRESHOLD = 0.3
MIN_SPEECH = 5  # frames of 32 ms: a chord that sets in, or hum, looks like speech for some
PAUSE = 19  # frames, 0.6 s: a pause of that length ends a clip
MARGIN = 9  # frames, 0.29 s, that are kept before and after speech
_DIP = 9  # frames: where there is no pause, cuts are in the middle of the quietest 0.29 s


@dataclass(frozen=True, eq=False)
class Clip:
    """A part of a recording that the model hears at once.

    Attributes:
        start: its first sample in the recording, at 16 kHz.
        samples: its samples.
    """

    start: int
    samples: Float[np.ndarray, " T"]


def has_speech(samples: Float[np.ndarray, " T"]) -> bool:
    """Whether somebody speaks in 16 kHz samples."""
    tracker = SpeechTracker()
    for _, probabilities in speech_probabilities([samples]):
        for probability in probabilities.tolist():
            if tracker.push(probability, THRESHOLD, MIN_SPEECH, PAUSE):
                return True
    return False


def no_speech_note(seconds: float, sound: bool) -> str:
    """Why a recording of that length without speech has no words; `sound`: something is heard."""
    if not sound:
        return silence_note(seconds)
    return f"no speech: no voice is heard in its {seconds:.2f} s of sound"


def split_at_pauses(
    blocks: Iterable[Float[np.ndarray, " T"]], longest: int = CHUNK_SAMPLES
) -> Iterator[Clip]:
    """Cut a recording into clips that the model hears one by one, each whole if it is short.

    A clip ends in the first pause of 0.6 s, or, where there is none, in the quietest moment of
    the second half of what it may hold. Of what is no speech 0.29 s are kept before and after a
    clip. A recording of at most `longest` samples is left as it is, if there is speech in it.
    Memory: `longest` samples and a block.

    Args:
        blocks: the recording, 16 kHz, in blocks of any length; the result does not depend on them.
        longest: samples of a clip at most; by default 25 s.
    """
    blocks = iter(blocks)
    first, length = [], 0
    for block in blocks:
        first.append(block)
        length += len(block)
        if length > longest:
            yield from _Cutter(longest).clips(chain(first, blocks))
            return
    if length and has_speech(whole := np.concatenate(first)):
        yield Clip(0, whole)


class _Cutter:
    """Cuts one recording; what it holds begins at a frame."""

    def __init__(self, longest: int):
        self._longest = longest // FRAME  # frames
        self._tracker = SpeechTracker()
        self._first = 0  # frame that is held from
        self._samples = np.zeros(0, np.float32)
        self._begin = 0  # frame where the clip begins that is not complete
        self._done = 0  # frame where the last ended

    def clips(self, blocks: Iterable[np.ndarray]) -> Iterator[Clip]:
        for samples, probabilities in speech_probabilities(blocks):
            self._samples = np.concatenate([self._samples, samples])
            for probability in probabilities.tolist():
                yield from self._push(probability)
            self._forget()
        if self._tracker.speaking:
            yield from self._clip(self._tracker.end + MARGIN)

    def _push(self, probability: float) -> Iterator[Clip]:
        tracker = self._tracker
        told = tracker.push(probability, THRESHOLD, MIN_SPEECH, PAUSE)
        if told == "began":
            self._begin = max(tracker.onset - MARGIN, self._done)
        elif told == "ended":
            yield from self._clip(tracker.end + MARGIN)
        elif tracker.speaking and tracker.frames - self._begin >= self._longest:
            yield from self._clip(self._quietest())

    def _clip(self, end: int) -> Iterator[Clip]:
        """The clip up to a frame; none if it was all heard in the one before."""
        if self._tracker.end > self._begin:
            cut = self._samples[(self._begin - self._first) * FRAME : (end - self._first) * FRAME]
            yield Clip(self._begin * FRAME, cut.copy())
        self._begin = self._done = end

    def _quietest(self) -> int:
        """Where to cut: the last of the quietest moments in the second half of a clip."""
        begin = self._begin - self._first
        heard = self._samples[begin * FRAME : (begin + self._longest) * FRAME]
        frames = heard[: len(heard) // FRAME * FRAME].reshape(-1, FRAME)
        energy = np.square(frames.std(axis=1), dtype=np.float64)
        smooth = np.convolve(energy, np.ones(_DIP), mode="valid")  # each from its frame on
        half = len(energy) // 2
        later = smooth[half:]
        return self._begin + half + int(np.flatnonzero(later == later.min())[-1]) + _DIP // 2

    def _forget(self) -> None:
        """Drop what no clip can hold any more."""
        tracker = self._tracker
        keep = tracker.onset if tracker.spoken else tracker.frames
        keep = self._begin if tracker.speaking else max(keep - MARGIN, self._done)
        self._samples = self._samples[(keep - self._first) * FRAME :].copy()
        self._first = keep
