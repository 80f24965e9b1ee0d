"""Where speech begins and ends: from probabilities, and from sound."""

import numpy as np
import pytest
from helpers.sound import voice

from sa2jax.audio import vad
from sa2jax.audio.vad import SpeechSegment, SpeechTracker, speech_segments
from sa2jax.errors import ConfigError

RATE = 16_000
FRAME = vad.FRAME


class Told:
    """A detector that gives the probabilities that it is told."""

    def __init__(self, *probabilities: float):
        self.left = list(probabilities)

    def start(self, streams=1):
        return vad.SpeechDetector().start(streams)

    def step_each(self, blocks, state):
        counts = [len(block) // FRAME for block in blocks]
        found = [np.array([self.left.pop(0) for _ in range(n)], np.float32) for n in counts]
        return found, state


def segments(*probabilities: float, **options) -> list[tuple[int, int]]:
    """Segments of a recording with these probabilities, in frames."""
    x = np.random.default_rng(0).standard_normal(len(probabilities) * FRAME).astype(np.float32)
    found = speech_segments(x, detector=Told(*probabilities), **{"padding_ms": 0} | options)
    return [(segment.start / FRAME, segment.end / FRAME) for segment in found]


@pytest.mark.parametrize(
    ("probabilities", "options", "expected"),
    [
        ([0, 0.9, 0.9, 0, 0], {}, [(1, 3)]),
        ([0.9] * 4, {}, [(0, 4)]),
        ([0, 0.4, 0.49, 0], {}, []),  # below the threshold
        ([0.5, 0.36, 0.36, 0.34, 0.36], {}, [(0, 3)]),  # goes on until 0.15 below it
        ([0.9, 0, 0.9, 0, 0, 0.9], {"min_silence_ms": 64}, [(0, 3), (5, 6)]),
        ([0.9, 0, 0.9, 0.9, 0, 0.9], {"min_speech_ms": 64}, [(2, 4)]),
        ([0.9, 0, 0.9], {"min_speech_ms": 64, "min_silence_ms": 64}, [(0, 3)]),
        ([0.9, 0.9, 0.9], {"min_speech_ms": 128}, []),
        ([0, 0.3, 0.3, 0], {"threshold": 0.2}, [(1, 3)]),
        # Padding: up to the ends of the recording, and half of a pause that is shorter.
        ([0, 0, 0.9, 0, 0], {"padding_ms": 32}, [(1, 4)]),
        ([0.9, 0, 0.9], {"padding_ms": 64}, [(0, 1.5), (1.5, 3)]),
        ([0, 0.9, 0, 0, 0, 0, 0.9, 0], {"padding_ms": 64}, [(0, 4), (4, 8)]),
    ],
)
def test_segments(probabilities, options, expected):
    defaults = {"min_speech_ms": 32, "min_silence_ms": 32}
    assert segments(*probabilities, **defaults | options) == expected


def test_segments_of_sound():
    pause = np.zeros(RATE, np.float32)
    x = np.concatenate([pause, voice(2), pause, voice(3, 2), pause])
    found = [*speech_segments(x, min_silence_ms=300)]
    assert len(found) == 2
    for segment, begin, end in zip(found, (1, 4), (3, 7), strict=True):
        assert abs(segment.start / RATE - begin) < 0.15
        assert abs(segment.end / RATE - end) < 0.15
    blocks = [x[n : n + 777] for n in range(0, len(x), 777)]
    assert [*speech_segments(blocks, min_silence_ms=300)] == found
    assert isinstance(found[0], SpeechSegment)
    assert [*speech_segments(x[:RATE])] == [*speech_segments(x[:0])] == []
    assert [*speech_segments(voice(1)[:-100])][-1].end == RATE - 100  # not beyond the recording


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0}, {"threshold": 1}, {"threshold": float("nan")}, {"min_silence_ms": -1}],
)
def test_settings_without_sense_are_refused(options):
    with pytest.raises(ConfigError, match="expected a threshold between 0 and 1 and times of 0 ms"):
        speech_segments(np.zeros(RATE, np.float32), **options)


def test_too_little_speech_is_forgotten():
    """A tracker begins anew after it: what comes later does not count with it."""
    tracker = SpeechTracker()
    told = [tracker.push(p, 0.5, 3, 2) for p in (0.9, 0.9, 0, 0, 0.9, 0.9, 0, 0.9)]
    assert told == [None] * 7 + ["began"]
    assert (tracker.onset, tracker.end, tracker.spoken, tracker.silence) == (4, 8, 3, 0)
    tracker.reset()
    assert (tracker.speaking, tracker.spoken, tracker.frames) == (False, 0, 8)
    assert tracker.push(0.0, 0.5, 1, 1) is None
