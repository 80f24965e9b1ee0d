"""Turns, from probabilities of speech; and once from sound."""

import numpy as np
import pytest
from helpers.sound import voice

from sa2jax.audio.turns import (
    EAGERNESS,
    AdaptiveSilence,
    IdleTimeout,
    SpeechStarted,
    SpeechStopped,
    TurnDetector,
    TurnSettings,
    push_turns,
)
from sa2jax.errors import AudioError, ConfigError

MS = 32  # of a frame
YES, NO = 0.9, 0.1


def frames(*parts: tuple[float, int]) -> list[float]:
    """Probabilities, each for so many ms."""
    return [p for p, duration in parts for _ in range(duration // MS)]


def events(*parts: tuple[float, int], responding: bool = False, **settings) -> list:
    detector = TurnDetector(TurnSettings(**settings))
    return detector.push_probabilities(frames(*parts), responding=responding)


def test_a_turn():
    found = events((NO, 960), (YES, 960), (NO, 960))
    assert found == [
        SpeechStarted(960 - 300),
        SpeechStopped(1920 + 512, 1920),
    ]  # 500 ms, rounded up


def test_it_is_told_at_once():
    """After 100 ms of speech, and after 500 ms of silence: not in a later block."""
    detector, told = TurnDetector(), []
    for n, p in enumerate(frames((NO, 320), (YES, 640), (NO, 640))):
        told += [(n + 1, type(event)) for event in detector.push_probabilities([p])]
        assert detector.speaking == (len(told) == 1)
    assert told == [(10 + 4, SpeechStarted), (30 + 16, SpeechStopped)]


@pytest.mark.parametrize(
    ("parts", "settings", "expected"),
    [
        # The beginning: not before the stream, nor before the end of the last turn.
        ([(YES, 320)], {}, [SpeechStarted(0)]),
        (
            [(YES, 320), (NO, 320), (YES, 320)],
            {"silence_duration_ms": 256},
            [SpeechStarted(0), SpeechStopped(576, 320), SpeechStarted(576)],
        ),
        ([(NO, 960), (YES, 320)], {"prefix_padding_ms": 0}, [SpeechStarted(960)]),
        # Too short for speech, and what is forgotten between.
        ([(NO, 320), (YES, 96), (NO, 960)], {}, []),
        ([(YES, 96), (NO, 96), (YES, 32)], {}, [SpeechStarted(0)]),
        ([(YES, 96), (NO, 192), (YES, 96), (NO, 640)], {}, []),
        ([(YES, 32)], {"min_speech_ms": 0}, [SpeechStarted(0)]),
        # A pause is no end; the threshold down is 0.15 lower.
        ([(YES, 320), (NO, 480), (YES, 320)], {}, [SpeechStarted(0)]),
        ([(YES, 320), (0.4, 960)], {}, [SpeechStarted(0)]),
        ([(0.45, 960)], {}, []),
        ([(YES, 320), (0.6, 960)], {"threshold": 0.8}, [SpeechStarted(0), SpeechStopped(832, 320)]),
        ([(0.45, 960)], {"threshold": 0.4}, [SpeechStarted(0)]),
        # A low one is no trap: half of it ends speech.
        (
            [(0.1, 320), (0.04, 960)],
            {"threshold": 0.1},
            [SpeechStarted(0), SpeechStopped(832, 320)],
        ),
        (
            [(YES, 320), (NO, 32)],
            {"silence_duration_ms": 0},
            [SpeechStarted(0), SpeechStopped(352, 320)],
        ),
    ],
)
def test_settings(parts, settings, expected):
    assert events(*parts, **settings) == expected


def test_an_interruption_takes_longer_speech():
    assert events((NO, 320), (YES, 192), (NO, 640), responding=True) == []
    assert events((NO, 320), (YES, 224), responding=True) == [SpeechStarted(20)]
    assert events((YES, 96), responding=True, min_interruption_ms=96) == [SpeechStarted(0)]


def test_settings_may_change():
    detector = TurnDetector()
    assert detector.push_probabilities(frames((YES, 320), (NO, 320))) == [SpeechStarted(0)]
    detector.settings = TurnSettings.server_vad(silence_duration_ms=200)
    assert detector.push_probabilities([NO]) == [SpeechStopped(672, 320)]


def test_a_turn_that_is_taken_or_cleared_is_forgotten():
    detector = TurnDetector()
    detector.push_probabilities(frames((YES, 640)))
    assert (detector.speaking, detector.position_ms) == (True, 640)
    detector.reset()
    assert not detector.speaking
    assert detector.push_probabilities(frames((NO, 960))) == []
    detector.push_probabilities(frames((YES, 96)))
    detector.reset()  # also what has not been told of
    assert detector.push_probabilities(frames((YES, 160))) == [SpeechStarted(1696)]


# --- idle timeout ---


def test_nobody_speaks_after_an_answer():
    detector = TurnDetector(TurnSettings.server_vad(idle_timeout_ms=5000))
    assert detector.push_probabilities(frames((NO, 9600))) == []  # no answer yet
    detector.wait_for_speech(10_000)  # when it will have been played
    found = detector.push_probabilities(frames((NO, 9600)))
    assert found == [IdleTimeout(10_000, 15_008)]  # once
    detector.wait_for_speech()
    assert detector.push_probabilities(frames((NO, 6400))) == [IdleTimeout(19_200, 24_224)]


def test_speech_ends_the_wait():
    detector = TurnDetector(TurnSettings.server_vad(idle_timeout_ms=1000))
    detector.wait_for_speech()
    found = detector.push_probabilities(frames((NO, 960), (YES, 320), (NO, 6400)))
    assert found == [SpeechStarted(660), SpeechStopped(1792, 1280)]
    detector.wait_for_speech()
    detector.stop_waiting()
    assert detector.push_probabilities(frames((NO, 6400))) == []
    detector.settings = TurnSettings.server_vad()
    detector.wait_for_speech()
    assert detector.push_probabilities(frames((NO, 6400))) == []


# --- adaptive silence ---


def pauses_of(detector: TurnDetector, *pauses: int) -> list:
    """A turn of words with these pauses, then a long silence."""
    parts = [(YES, 640)]
    for pause in pauses:
        parts += [(NO, pause), (YES, 640)]
    return detector.push_probabilities(frames(*parts, (NO, 6400)))


def test_the_wait_adapts_to_the_speaker():
    detector = TurnDetector(TurnSettings.semantic_vad())
    assert detector.silence_ms == 640
    for _ in range(12):  # who makes no pauses is answered sooner and sooner
        assert len(pauses_of(detector)) == 2
    assert 250 <= detector.silence_ms < 270
    # Who pauses was taken for done once; then one waits.
    assert len(pauses_of(detector, 320)) == 4
    assert detector.silence_ms > 400
    assert len(pauses_of(detector, 320, 320)) == 2


def test_a_pause_within_a_turn_counts_at_once():
    detector = TurnDetector(TurnSettings.semantic_vad("low"))
    detector.push_probabilities(frames((YES, 640), (NO, 1120), (YES, 640)))
    assert detector.silence_ms == 1680  # half as long again
    detector.push_probabilities(frames((NO, 1600), (YES, 640), (NO, 2240), (YES, 320)))
    assert detector.silence_ms == 3000  # at most
    detector.push_probabilities(frames((NO, 4000)))
    assert detector.silence_ms == 3000
    pauses_of(detector)
    assert detector.silence_ms == 3000 - 0.25 * (3000 - 500)


def test_an_early_answer_to_a_later_turn_is_no_pause():
    detector = TurnDetector(TurnSettings.semantic_vad("high"))
    pauses_of(detector)
    before = detector.silence_ms
    pauses_of(detector)  # seconds later
    assert detector.silence_ms < before


def test_sound_that_was_taken_is_no_pause():
    detector = TurnDetector(TurnSettings.semantic_vad())
    pauses_of(detector)
    detector.push_probabilities(frames((NO, 9600)))
    before = detector.silence_ms
    detector.reset()
    detector.push_probabilities(frames((YES, 640)))
    assert detector.silence_ms == before


@pytest.mark.parametrize("eagerness", ["low", "medium", "high", "auto"])
def test_eagerness(eagerness):
    adaptive = TurnSettings.semantic_vad(eagerness).adaptive
    assert adaptive == EAGERNESS["medium" if eagerness == "auto" else eagerness]
    found = events((YES, 640), (NO, 6400), adaptive=adaptive)
    silence = -(-adaptive.first_ms // MS) * MS
    assert found == [SpeechStarted(0), SpeechStopped(640 + silence, 640)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TurnSettings(threshold=1.5), "threshold between 0 and 1, got 1.5"),
        (
            lambda: TurnSettings(silence_duration_ms=-1),
            "silence_duration_ms of 0 to 600000, got -1",
        ),
        (lambda: TurnSettings(idle_timeout_ms=10**9), "idle_timeout_ms of 0 to 600000"),
        (lambda: TurnSettings.semantic_vad("eager"), "eagerness of auto, low, medium, high"),
        (lambda: AdaptiveSilence(100, 200, 300), "shortest_ms <= first_ms <= longest_ms"),
    ],
)
def test_settings_without_sense_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# --- sound ---


@pytest.mark.both_pairs
def test_turns_of_many_speakers():
    """Heard together in blocks of 20 ms as alone in one."""
    rng = np.random.default_rng(0)

    def session(begin: float, end: float) -> np.ndarray:
        x = rng.standard_normal(16_000 * 5).astype(np.float32) / 500
        x[int(begin * 16_000) : int(end * 16_000)] += voice(end - begin, begin)
        return x

    sounds = np.stack([session(1, 2), session(0.5, 4), session(2, 2.7)])
    detectors = [TurnDetector() for _ in sounds]
    together: list[list] = [[], [], []]
    for n in range(0, sounds.shape[1], 320):
        told = push_turns(detectors, list(sounds[:, n : n + 320]), [False] * 3)
        for row, found in zip(together, told, strict=True):
            row += found
    for row, samples, (begin, end) in zip(
        together, sounds, [(1, 2), (0.5, 4), (2, 2.7)], strict=True
    ):
        started, stopped = row
        assert started.audio_start_ms == pytest.approx(1000 * begin - 300, abs=100)
        assert stopped.speech_end_ms == pytest.approx(1000 * end, abs=150)
        assert stopped.audio_end_ms == stopped.speech_end_ms + 512
        alone = TurnDetector()
        assert alone.push(samples) == row
        assert alone.position_ms == 5000
    with pytest.raises(AudioError, match="divide int16"):
        detectors[0].push(np.zeros(320, np.int16))
