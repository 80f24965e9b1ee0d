"""Turn detection: when a speaker in a conversation begins, and when it is our turn.

    detector = TurnDetector(TurnSettings.server_vad(silence_duration_ms=700))
    for event in detector.push(samples):  # 16 kHz, blocks of any length
        match event:
            case SpeechStarted(audio_start_ms): ...  # stop speaking
            case SpeechStopped(audio_end_ms): ...  # answer what was said

Settings and times are those of OpenAI's Realtime API: `server_vad` waits for a silence of a given
length, `semantic_vad` for one that adapts to the speaker. Time is that of the samples which were
pushed, from the first on; nothing here looks at a clock.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from jaxtyping import Float

from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.audio.vad import (
    FRAME_MS,
    SpeechDetector,
    SpeechStream,
    SpeechTracker,
    frames_of,
    push_streams,
)
from sa2jax.errors import ConfigError

Eagerness = Literal["low", "medium", "high", "auto"]
_CLICK = 6  # frames, 192 ms: after such a silence, sound too short for speech is forgotten
_PATIENCE = 1.5  # the wait for the end of a turn, of the longest pause within one
_FORGET = 0.25  # of what a wait was longer than needed, after each turn
_TOO_EARLY = 400  # ms after a turn: who goes on so soon has heard no answer, and had not finished


@dataclass(frozen=True)
class SpeechStarted:
    """Somebody began to speak.

    Attributes:
        audio_start_ms: where the turn's sound begins, the padding before its speech included.
    """

    audio_start_ms: int


@dataclass(frozen=True)
class SpeechStopped:
    """The turn is over.

    Attributes:
        audio_end_ms: where the turn's sound ends, the silence that was waited for included.
        speech_end_ms: where its speech ends.
    """

    audio_end_ms: int
    speech_end_ms: int


@dataclass(frozen=True)
class IdleTimeout:
    """Nobody spoke for too long after the last answer.

    Attributes:
        audio_start_ms: when the wait began.
        audio_end_ms: when it was over.
    """

    audio_start_ms: int
    audio_end_ms: int


TurnEvent = SpeechStarted | SpeechStopped | IdleTimeout


@dataclass(frozen=True)
class AdaptiveSilence:
    """How long a silence ends a turn, by the pauses that this speaker makes.

    A pause within a turn makes it half as long again as that pause, if that is more; so does the
    gap to a turn that begins again so soon that the one before was ended too early. A turn with
    shorter pauses takes it a quarter of the way back, to half as long again as the longest of them.

    Attributes:
        first_ms: before anything is known of the speaker.
        shortest_ms: at least.
        longest_ms: at most.

    Raises:
        ConfigError: if they are in another order.
    """

    first_ms: int
    shortest_ms: int
    longest_ms: int

    def __post_init__(self):
        if not 0 <= self.shortest_ms <= self.first_ms <= self.longest_ms <= 600_000:
            raise ConfigError(
                "turn detection: expected 0 <= shortest_ms <= first_ms <= longest_ms <= 600000, "
                f"got {self.shortest_ms}, {self.first_ms} and {self.longest_ms}"
            )


EAGERNESS = {
    "low": AdaptiveSilence(1200, 500, 3000),
    "medium": AdaptiveSilence(640, 250, 2000),
    "high": AdaptiveSilence(320, 200, 1200),
}


@dataclass(frozen=True, kw_only=True)
class TurnSettings:
    """What is speech, and how long one waits. Frames are of 32 ms: times are rounded up to them.

    Attributes:
        threshold: probability from which on a frame is speech; below that less 0.15, it is over.
        prefix_padding_ms: sound before the speech that belongs to a turn.
        silence_duration_ms: the silence that ends a turn.
        min_speech_ms: of speech before it is told of.
        min_interruption_ms: the same while the model speaks; a cough does not interrupt it.
        idle_timeout_ms: see `TurnDetector.wait_for_speech`; None for no limit.
        adaptive: what ends a turn instead of `silence_duration_ms`.

    Raises:
        ConfigError: for a setting that makes no sense.
    """

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500
    min_speech_ms: int = 100
    min_interruption_ms: int = 200
    idle_timeout_ms: int | None = None
    adaptive: AdaptiveSilence | None = None

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise ConfigError(
                f"turn detection: expected a threshold between 0 and 1, got {self.threshold}"
            )
        for name in (
            "prefix_padding_ms",
            "silence_duration_ms",
            "min_speech_ms",
            "min_interruption_ms",
            "idle_timeout_ms",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 600_000:
                raise ConfigError(f"turn detection: expected {name} of 0 to 600000, got {value}")

    @classmethod
    def server_vad(
        cls,
        *,
        threshold: float = 0.5,
        prefix_padding_ms: int = 300,
        silence_duration_ms: int = 500,
        idle_timeout_ms: int | None = None,
    ) -> Self:
        """OpenAI's `server_vad`: a silence of a given length ends a turn."""
        return cls(
            threshold=threshold,
            prefix_padding_ms=prefix_padding_ms,
            silence_duration_ms=silence_duration_ms,
            idle_timeout_ms=idle_timeout_ms,
        )

    @classmethod
    def semantic_vad(cls, eagerness: Eagerness = "auto") -> Self:
        """OpenAI's `semantic_vad`, by sound alone: an `AdaptiveSilence`, nobody reads the words.

        Args:
            eagerness: a key of `EAGERNESS`; "auto" is "medium".

        Raises:
            ConfigError: for another eagerness.
        """
        name = "medium" if eagerness == "auto" else eagerness
        if name not in EAGERNESS:
            raise ConfigError(
                f"expected an eagerness of auto, {', '.join(EAGERNESS)}, got {eagerness!r}"
            )
        return cls(adaptive=EAGERNESS[name])


class _Pace:
    """The silence of an `AdaptiveSilence` for one speaker, as it changes."""

    def __init__(self, limits: AdaptiveSilence):
        self.limits = limits
        self.wait = float(limits.first_ms)
        self._longest = 0.0  # pause of the turn, in ms

    def pause(self, duration: float) -> None:
        """Nobody spoke for so many ms, and the turn went on."""
        self._longest = max(self._longest, duration)
        self.wait = max(self.wait, self._after(duration))

    def turn_ended(self) -> None:
        """The turn with those pauses is over."""
        self.wait -= _FORGET * max(self.wait - self._after(self._longest), 0)
        self._longest = 0.0

    def _after(self, pause: float) -> float:
        limits = self.limits
        return min(max(_PATIENCE * pause, limits.shortest_ms), limits.longest_ms)


class TurnDetector:
    """Finds the turns of one speaker in a stream.

    Args:
        settings: by default OpenAI's.
        detector: of speech; by default one with the network that comes with the library.

    Attributes:
        settings: may be changed at any time.
    """

    def __init__(
        self, settings: TurnSettings | None = None, *, detector: SpeechDetector | None = None
    ):
        self.settings = TurnSettings() if settings is None else settings
        self._stream = SpeechStream(detector)
        self._tracker = SpeechTracker()
        self._pace: _Pace | None = None
        self._turn_end = 0  # ms where the last turn's sound ends
        self._speech_end: int | None = None  # ms where its speech ends
        self._waiting: float | None = None  # since when for speech, in ms

    @property
    def position_ms(self) -> int:
        """How much sound was heard."""
        return self._now + self._stream.held * 1000 // SAMPLE_RATE

    @property
    def speaking(self) -> bool:
        """Whether a turn has begun and is not over."""
        return self._tracker.speaking

    @property
    def silence_ms(self) -> float:
        """How long a silence ends a turn now."""
        adaptive = self.settings.adaptive
        if adaptive is None:
            return self.settings.silence_duration_ms
        if self._pace is None or self._pace.limits != adaptive:
            self._pace = _Pace(adaptive)
        return self._pace.wait

    def push(
        self, samples: Float[np.ndarray, " T"], *, responding: bool = False
    ) -> list[TurnEvent]:
        """Hear the next samples, 16 kHz in [-1, 1].

        Args:
            samples: a block of any length.
            responding: whether the model speaks meanwhile, so that speech would interrupt it.

        Raises:
            AudioError: as for `SpeechStream.push`.
        """
        return self.push_probabilities(self._stream.push(samples), responding=responding)

    def push_probabilities(
        self, probabilities: Iterable[float], *, responding: bool = False
    ) -> list[TurnEvent]:
        """Like `push`, where the probability of speech in each 32 ms is known."""
        found: list[TurnEvent] = []
        for probability in probabilities:
            found += self._frame(float(probability), responding)
        return found

    def wait_for_speech(self, from_ms: float | None = None) -> None:
        """Begin the idle timeout: an answer was given, and it is the speaker's turn.

        If nobody speaks for `idle_timeout_ms`, there is one `IdleTimeout`.

        Args:
            from_ms: from when on, such as when the answer will have been played; by default now.
        """
        self._waiting = self.position_ms if from_ms is None else from_ms

    def stop_waiting(self) -> None:
        """End the idle timeout: another answer is on its way."""
        self._waiting = None

    def reset(self) -> None:
        """Forget a turn that has begun: its sound was cleared, or taken as it is. Time goes on."""
        self._tracker.reset()
        self._turn_end, self._speech_end = self._now, None

    @property
    def _now(self) -> int:
        return self._tracker.frames * FRAME_MS

    def _frame(self, probability: float, responding: bool) -> Iterator[TurnEvent]:
        settings, tracker = self.settings, self._tracker
        least = settings.min_interruption_ms if responding else settings.min_speech_ms
        silence = max(frames_of(self.silence_ms), 1)
        before = tracker.silence if tracker.speaking else 0
        told = tracker.push(
            probability,
            settings.threshold,
            max(frames_of(least), 1),
            silence if tracker.speaking else min(silence, _CLICK),
        )
        if told == "began":
            yield self._begin_turn()
        elif told == "ended":
            yield self._end_turn()
        elif before and not tracker.silence and self._pace is not None:
            self._pace.pause(before * FRAME_MS)
        limit = settings.idle_timeout_ms
        if limit is None or self._waiting is None or tracker.spoken:
            return
        if self._now >= self._waiting + limit:
            yield IdleTimeout(round(self._waiting), self._now)
            self._waiting = None

    def _begin_turn(self) -> SpeechStarted:
        self._waiting = None
        onset = self._tracker.onset * FRAME_MS
        early = onset - self._turn_end <= _TOO_EARLY
        if self._pace is not None and self._speech_end is not None and early:
            self._pace.pause(onset - self._speech_end)
        return SpeechStarted(max(onset - self.settings.prefix_padding_ms, self._turn_end))

    def _end_turn(self) -> SpeechStopped:
        self._turn_end, self._speech_end = self._now, self._tracker.end * FRAME_MS
        if self._pace is not None:
            self._pace.turn_ended()
        return SpeechStopped(self._turn_end, self._speech_end)


def push_turns(
    detectors: Sequence[TurnDetector],
    blocks: Sequence[Float[np.ndarray, " _"]],
    responding: Sequence[bool],
) -> list[list[TurnEvent]]:
    """`TurnDetector.push` for many sessions in one computation, a block for each.

    Raises:
        AudioError: as for `SpeechStream.push`; nothing is heard then.
    """
    found = push_streams([detector._stream for detector in detectors], blocks)
    return [
        detector.push_probabilities(probabilities, responding=speaks)
        for detector, probabilities, speaks in zip(detectors, found, responding, strict=True)
    ]
