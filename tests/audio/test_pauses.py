"""Long recordings are cut at pauses, whatever blocks they come in; non-speech is left out."""

import tracemalloc

import numpy as np
import pytest
from helpers.sound import tone, voice

from sa2jax.audio import Recording, levels, pauses
from sa2jax.audio.levels import SILENT

RATE = 16_000
RNG = np.random.default_rng(0)


def room(seconds: float, level: float = 0.0) -> np.ndarray:
    return (RNG.standard_normal(round(seconds * RATE)) * level).astype(np.float32)


def spans(*blocks: np.ndarray, **options) -> list[tuple[float, float]]:
    """Begin and end of each clip, in seconds."""
    found = pauses.split_at_pauses(blocks, **options)
    return [(clip.start / RATE, (clip.start + len(clip.samples)) / RATE) for clip in found]


def test_a_short_recording_stays_as_it_is():
    x = np.concatenate([room(3), voice(2), room(1), voice(2), room(3)])
    (clip,) = pauses.split_at_pauses([x])
    np.testing.assert_array_equal(clip.samples, x)


@pytest.mark.parametrize(("level", "gain"), [(0.0, 1), (1e-3, 1), (5e-3, 1), (0.0, 5e-3)])
def test_pauses_end_clips(level, gain):
    """In a silent room, in one that is not, in a loud one; of who is quiet."""
    lengths = [4, 10, 3, 15]
    x = np.concatenate([part for n in lengths for part in (voice(n, n), room(1))])
    found = spans(x * np.float32(gain) + room(len(x) / RATE, level))
    starts = np.cumsum([0, 5, 11, 4])
    assert len(found) == 4
    for (begin, end), start, length in zip(found, starts, lengths, strict=True):
        assert start - 0.4 < begin <= start
        assert start + length <= end <= start + length + 0.6


def test_without_pauses_the_quietest_moment_is_cut():
    x = voice(60)
    x[20 * RATE : int(20.4 * RATE)] /= 100  # too short for a pause
    found = spans(x)
    assert 20 < found[0][1] < 20.4
    assert max(end - begin for begin, end in found) <= 25
    assert [end for _, end in found[:-1]] == [begin for begin, _ in found[1:]]  # nothing is lost
    assert (found[0][0], found[-1][1]) == (0, 60)


@pytest.mark.parametrize("extra", [0, 1, 511])
def test_a_recording_may_end_anywhere(extra):
    x = voice(26 + extra / RATE)
    found = list(pauses.split_at_pauses([x]))
    np.testing.assert_array_equal(np.concatenate([clip.samples for clip in found]), x)


def test_the_result_does_not_depend_on_the_blocks():
    x = np.concatenate([voice(30), room(20), voice(2), room(1.2, 1e-2), voice(9), room(30)])
    whole = spans(x)
    assert len(whole) >= 4
    for size in (999, 16_000, 410_001):
        assert spans(*[x[n : n + size] for n in range(0, len(x), size)]) == whole


@pytest.mark.parametrize(
    "x",
    [
        np.zeros(0, np.float32),
        room(0.0),
        room(90),
        room(0.05, 0.1),
        room(3, 1e-3),
        room(3, 0.1),
        room(40, 0.01),
        np.cumsum(room(10, 0.01), dtype=np.float32) / 50,  # rumble
        np.full(RATE, 0.3, np.float32),  # an offset
        np.concatenate([room(30), room(0.04, 0.1), room(30)]),  # a click
        tone(5, rate=RATE, frequency=120),  # hum
    ],
)
def test_what_is_no_speech_gives_nothing(x):
    assert spans(x) == []
    assert not pauses.has_speech(x)


@pytest.mark.parametrize("gain", [1, 0.03, 0.003])
def test_who_is_quiet_is_heard(gain):
    x = voice(2) * np.float32(gain)
    assert Recording(x).has_speech
    assert levels.levels(x).max() > SILENT


def test_speech_in_noise_is_heard():
    x = voice(2)
    assert pauses.has_speech(x + room(2, float(x.std())))  # as loud as the voice


def test_hours_without_speech_are_not_held():
    """Neither silence nor noise nor, after what may be speech for a moment, any of them."""
    silence, noise = np.zeros(RATE * 10, np.float32), room(10, 1e-2)
    start = np.concatenate([voice(0.04), noise])
    tracemalloc.start()
    assert spans(*[silence] * 400, start, *[noise] * 20) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_hours_of_speech_are_not_held():
    block = voice(10)
    tracemalloc.start()
    count = sum(1 for _ in pauses.split_at_pauses(block for _ in range(30)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count >= 12
    assert peak < 20e6


def test_it_is_said_why_there_is_no_speech():
    assert "80 ms are too short" in pauses.no_speech_note(0.08, sound=False)
    assert "its 3.00 s are silent" in pauses.no_speech_note(3, sound=False)
    assert "no voice is heard in its 3.00 s of sound" in pauses.no_speech_note(3, sound=True)
