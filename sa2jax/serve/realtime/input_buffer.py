"""The user's sound as it comes: decoded, resampled to 16 kHz, and cut into turns."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.audio.turns import TurnDetector, TurnEvent
from sa2jax.serve.realtime.audio_formats import PCM, AudioFormat, to_model_rate
from sa2jax.serve.realtime.session_config import TurnDetection

MS = SAMPLE_RATE // 1000  # samples
MIN_COMMIT_MS = 100


class InputBuffer:
    """The input audio buffer of a session.

    Without turn detection it holds all sound since the last commit. With it, it holds the turn
    under way, and before one begins only as much as may belong to it.

    Args:
        max_seconds: longest turn.
        make_detector: makes the detector of turns; called if one is asked for.
    """

    def __init__(
        self,
        *,
        max_seconds: float,
        make_detector: Callable[[], TurnDetector] = TurnDetector,
    ):
        self._most, self._make_detector = round(max_seconds * SAMPLE_RATE), make_detector
        self._blocks: list[Float32[np.ndarray, " N"]] = []
        self._start = self._end = 0  # samples of the session at which they begin and end
        self._turn: int | None = None  # sample at which the turn under way begins
        self._resampler, self._format = to_model_rate(PCM), PCM
        self._detector: TurnDetector | None = None
        self._settings: TurnDetection | None = None
        self._offset = 0  # ms of the session before the detector heard anything

    @property
    def written_ms(self) -> int:
        """All sound of the session, in ms."""
        return self._end // MS

    @property
    def held_ms(self) -> float:
        """What a commit would take, in ms."""
        return (self._end - (self._start if self._turn is None else self._turn)) / MS

    @property
    def speaking(self) -> bool:
        """Whether a turn has begun that is not over."""
        return self._turn is not None

    @property
    def room(self) -> float:
        """Seconds that the turn may still grow by."""
        return max(self._most - (self._end - self._start), 0) / SAMPLE_RATE

    @property
    def is_full(self) -> bool:
        """Whether the turn is as long as it may be."""
        return self._end - self._start >= self._most

    def configure(self, form: AudioFormat, detection: TurnDetection | None) -> None:
        """Take the settings of a session from now on."""
        if form != self._format:
            self._hold(self._resampler.flush())
            self._resampler, self._format = to_model_rate(form), form
        if detection == self._settings:
            return
        self._settings = detection
        if detection is None:
            self._detector = None
            return
        if self._detector is None:
            self._detector, self._offset = self._make_detector(), self.written_ms
        self._detector.settings = detection.settings

    def append(self, data: bytes, *, responding: bool) -> list[TurnEvent]:
        """Hear more of the user's sound.

        Args:
            data: in the input format.
            responding: whether speech in it would interrupt an answer.

        Returns:
            Turns that begin and end; their times are ms of the detector, see `session_ms`.

        Raises:
            EventError: if a sample was cut in two.
        """
        samples = self._resampler.push(self._format.decode(data))
        self._hold(samples)
        if self._detector is None:
            return []
        found = self._detector.push(samples, responding=responding) if len(samples) else []
        if self._turn is None and not found:
            self._forget_silence()
        return found

    def session_ms(self, detector_ms: float) -> int:
        """A time of the detector as one of the session."""
        return round(detector_ms) + self._offset

    def begin_turn(self, start_ms: int) -> None:
        """A turn began at this time of the session."""
        self._turn = max(start_ms * MS, self._start)

    def take(self, end_ms: int | None = None) -> Float32[np.ndarray, " N"]:
        """The turn's sound; what comes after it stays, all before it is forgotten.

        Args:
            end_ms: where it ends in the session, None for all there is.
        """
        if end_ms is None:
            self._hold(self._resampler.flush())
        start = self._start if self._turn is None else self._turn
        end = self._end if end_ms is None else min(end_ms * MS, self._end)
        held = np.concatenate([np.zeros(0, np.float32), *self._blocks])
        taken = held[start - self._start : end - self._start].copy()
        self._blocks, self._start, self._turn = [held[end - self._start :].copy()], end, None
        if end_ms is None and self._detector is not None:
            self._detector.reset()
        return taken

    def clear(self) -> None:
        """Forget all sound, and a turn that has begun."""
        self.take()

    def wait_for_speech(self, after_ms: float) -> None:
        """Begin the idle timeout.

        Args:
            after_ms: how long from now the answer is still being played.
        """
        if self._detector is not None:
            self._detector.wait_for_speech(self._detector.position_ms + after_ms)

    def stop_waiting(self) -> None:
        """End the idle timeout."""
        if self._detector is not None:
            self._detector.stop_waiting()

    def _hold(self, samples: Float32[np.ndarray, " N"]) -> None:
        if len(samples):
            self._blocks.append(samples)
            self._end += len(samples)

    def _forget_silence(self) -> None:
        """Before a turn only its padding is kept, and what the detector has not told of yet."""
        assert self._settings is not None
        settings = self._settings.settings
        keep = settings.prefix_padding_ms + settings.min_interruption_ms + 2000
        least = self._end - keep * MS
        while self._blocks and self._start + len(self._blocks[0]) <= least:
            self._start += len(self._blocks.pop(0))
