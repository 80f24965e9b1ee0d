"""Where sound is and where it pauses: levels, silence, and long recordings cut at pauses.

Voice activity detection by level alone: what is called silent cannot be heard by anybody. Whether a
sound is speech is for the model to say.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sa2jax.audio.features import CHUNK_SAMPLES
from sa2jax.audio.rates import SAMPLE_RATE

FRAME = SAMPLE_RATE // 50  # 20 ms
MIN_SPEECH = 0.1  # s of sound without which there are no words
_SILENT = 5e-4  # standard deviation of a frame, -66 dB of full scale; an offset is no sound
_MARGIN = 4  # frames of silence, 80 ms, that are kept at both ends of a segment
_PAUSE = 30  # frames, 0.6 s: a pause of that length ends a segment
_FIRST = 50  # frames, 1 s: of a segment at least
_QUIET = 0.05  # of the loud frames' level, -26 dB: a pause, also in a room that is not silent
_DIP = 15  # frames: where there is no pause, cuts are in the middle of the quietest 0.3 s


@dataclass(frozen=True, eq=False)
class SpeechSegment:
    """A part of a recording.

    Attributes:
        start: its first sample in the recording, at 16 kHz.
        samples: its samples.
    """

    start: int
    samples: Float[np.ndarray, " T"]


def levels(samples: Float[np.ndarray, " T"]) -> Float[np.ndarray, " F"]:
    """The level of each 20 ms of 16 kHz samples: their standard deviation; the last may be cut."""
    whole = len(samples) // FRAME * FRAME
    found = samples[:whole].reshape(-1, FRAME).std(axis=1)
    return np.append(found, samples[whole:].std()) if whole < len(samples) else found


def sound_seconds(samples: Float[np.ndarray, " T"]) -> float:
    """How much of 16 kHz samples can be heard, in seconds."""
    return float((levels(samples) >= _SILENT).sum()) * FRAME / SAMPLE_RATE


def has_sound(samples: Float[np.ndarray, " T"]) -> bool:
    """Whether there is enough sound for a word in 16 kHz samples."""
    return len(samples) >= MIN_SPEECH * SAMPLE_RATE and sound_seconds(samples) >= MIN_SPEECH


def no_speech_note(seconds: float) -> str:
    """Why a recording of that length without sound cannot hold speech."""
    if seconds < MIN_SPEECH:
        return f"no speech: {seconds * 1000:.0f} ms are too short, expected at least 100 ms"
    return f"no speech: its {seconds:.2f} s are silent, nothing is louder than -66 dB for 0.1 s"


def split_at_pauses(
    blocks: Iterable[Float[np.ndarray, " T"]], longest: int = CHUNK_SAMPLES
) -> Iterator[SpeechSegment]:
    """Cut a recording into segments that the model hears one by one, each whole if it is short.

    A segment ends in the first pause of 0.6 s, or, where there is none, in the quietest moment of
    the second half of what it may hold. Silence between segments is left out but for 80 ms, and so
    is a segment in which nothing can be heard. A recording of at most `longest` samples is left as
    it is. Memory: `longest` samples and a block.

    Args:
        blocks: the recording, 16 kHz, in blocks of any length; the result does not depend on them.
        longest: samples of a segment at most, a multiple of 640; by default 25 s.
    """
    held, start, whole = np.zeros(0, np.float32), 0, True
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > longest:
            whole = False
            if skipped := _leading_silence(held[: 4 * longest]):
                held, start = held[skipped:], start + skipped
                continue
            cut = _first_pause(held[:longest]) or _quietest(held[:longest])
            yield from _trimmed(held[:cut], start)
            held, start = held[cut:], start + cut
        held = held.copy()  # not a view of all that was read
    if whole and has_sound(held):
        yield SpeechSegment(start, held)
    while not whole and len(held):
        skipped = _leading_silence(held)
        held, start = held[skipped:], start + skipped
        cut = _first_pause(held) or len(held)
        yield from _trimmed(held[:cut], start)
        held, start = held[cut:], start + cut


def _leading_silence(samples: Float[np.ndarray, " T"]) -> int:
    """Samples of silence that can be left out at the beginning: whole frames."""
    loud = np.flatnonzero(levels(samples) >= _SILENT)
    frames = loud[0] if len(loud) else len(samples) // FRAME
    return max(int(frames) - _MARGIN, 0) * FRAME


def _first_pause(samples: Float[np.ndarray, " T"]) -> int:
    """The middle of the first pause after which there is sound, in samples; 0 if there is none."""
    found = levels(samples)
    quiet = found < max(_SILENT, _QUIET * np.percentile(found, 95))
    quiet[:_FIRST] = False
    edges = np.flatnonzero(np.diff(quiet, prepend=False, append=False))
    for begin, end in edges.reshape(-1, 2).tolist():
        if end - begin >= _PAUSE and end < len(found):
            return (begin + end) // 2 * FRAME
    return 0


def _quietest(samples: Float[np.ndarray, " T"]) -> int:
    """Where to cut, in samples: the last of the quietest moments in the second half."""
    energy = np.square(levels(samples), dtype=np.float64)
    smooth = np.convolve(energy, np.ones(_DIP), mode="valid")  # [F - 14], each from its frame on
    first = len(energy) // 2
    if first >= len(smooth):
        return len(samples)
    later = smooth[first:]
    return (first + int(np.flatnonzero(later == later.min())[-1]) + _DIP // 2) * FRAME


def _trimmed(samples: Float[np.ndarray, " T"], start: int) -> Iterator[SpeechSegment]:
    """A segment without silence at its end; nothing if it is silent altogether."""
    loud = np.flatnonzero(levels(samples) >= _SILENT)
    if len(loud) * FRAME < MIN_SPEECH * SAMPLE_RATE:
        return
    yield SpeechSegment(start, samples[: (loud[-1] + 1 + _MARGIN) * FRAME].copy())
