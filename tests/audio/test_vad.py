"""Long recordings are cut at pauses, whatever blocks they come in, and silence is left out."""

import tracemalloc

import numpy as np
import pytest

from sa2jax.audio import vad

RATE = 16_000
RNG = np.random.default_rng(0)


def speech(seconds: float) -> np.ndarray:
    return RNG.standard_normal(int(seconds * RATE)).astype(np.float32) / 10


def silence(seconds: float, level: float = 0.0) -> np.ndarray:
    return (RNG.standard_normal(int(seconds * RATE)) * level).astype(np.float32)


def spans(*blocks: np.ndarray, **options) -> list[tuple[float, float]]:
    """Begin and end of each segment, in seconds."""
    found = vad.split_at_pauses(blocks, **options)
    return [(s.start / RATE, (s.start + len(s.samples)) / RATE) for s in found]


def test_a_short_recording_stays_as_it_is():
    x = np.concatenate([silence(3), speech(2), silence(1), speech(2), silence(3)])
    (segment,) = vad.split_at_pauses([x])
    np.testing.assert_array_equal(segment.samples, x)


@pytest.mark.parametrize("room", [0.0, 1e-3])
def test_pauses_end_segments(room):
    """Of a room that is silent, and of one that is not."""
    lengths = [4, 10, 3, 15]
    x = np.concatenate([part for n in lengths for part in (speech(n), silence(1, room))])
    found = spans(x)
    starts = np.cumsum([0, 5, 11, 4])
    assert len(found) == 4
    for (begin, end), start, length in zip(found, starts, lengths, strict=True):
        assert start - 0.6 < begin <= start
        assert start + length <= end <= start + length + 1
    if not room:
        assert [end - begin for begin, end in found[1:]] == pytest.approx([10.16, 3.16, 15.16])


def test_without_pauses_the_quietest_moment_is_cut():
    x = speech(60)
    x[20 * RATE : int(20.4 * RATE)] /= 3  # too short and too loud for a pause
    found = spans(x)
    assert 20 < found[0][1] < 20.4
    assert max(end - begin for begin, end in found) <= 25
    assert [end for _, end in found[:-1]] == [begin for begin, _ in found[1:]]  # nothing is lost
    assert (found[0][0], found[-1][1]) == (0, 60)


def test_the_result_does_not_depend_on_the_blocks():
    x = np.concatenate([speech(30), silence(40), speech(2), silence(0.7), speech(9), silence(50)])
    whole = spans(x)
    assert len(whole) >= 4
    for size in (999, 16_000, 410_001):
        assert spans(*[x[n : n + size] for n in range(0, len(x), size)]) == whole


@pytest.mark.parametrize(
    "x",
    [
        silence(0.0),
        silence(90),
        speech(0.05),
        np.full(RATE, 0.3, np.float32),  # an offset
        np.concatenate([silence(30), speech(0.04), silence(30)]),  # a click
    ],
)
def test_silence_gives_nothing(x):
    assert spans(x) == []


def test_hours_of_silence_are_not_held():
    block = np.zeros(RATE * 10, np.float32)
    tracemalloc.start()
    assert spans(*[block] * 400) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
