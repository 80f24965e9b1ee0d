"""Formats of sound on the wire, 16-bit PCM at 24 kHz and G.711 at 8 kHz; resampling as it comes."""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Float32

from sa2jax.audio.io import pcm_16, resample
from sa2jax.audio.rates import SAMPLE_RATE, SPEECH_SAMPLE_RATE
from sa2jax.serve.realtime.checks import EventError, Fields

_CROSSINGS = 7  # of the resampler's sinc, rounded up: how far it reaches to each side


@dataclass(frozen=True)
class AudioFormat:
    """A format of sound in events.

    Attributes:
        name: OpenAI's name of it.
        rate: its sample rate, in Hz.
        width: bytes of a sample.
        subtype: libsndfile's name of it.
    """

    name: str
    rate: int
    width: int
    subtype: str

    def decode(self, data: bytes) -> Float32[np.ndarray, " N"]:
        """Samples in [-1, 1] at `rate`.

        Raises:
            EventError: if a sample was cut in two.
        """
        if len(data) % self.width:
            raise EventError(
                f"audio: expected whole samples of {self.width} bytes, got {len(data)} bytes",
                param="audio",
            )
        if self.width == 2:
            return np.frombuffer(data, "<i2").astype(np.float32) / 32768
        options: dict[str, Any] = {"format": "RAW", "subtype": self.subtype}
        return soundfile.read(
            io.BytesIO(data), dtype="float32", channels=1, samplerate=self.rate, **options
        )[0]

    def encode(self, samples: Float32[np.ndarray, " N"]) -> bytes:
        """Samples at `rate` as bytes."""
        pcm = pcm_16(samples)
        if self.width == 2:
            return pcm.astype("<i2").tobytes()
        file = io.BytesIO()
        soundfile.write(file, pcm, self.rate, format="RAW", subtype=self.subtype)
        return file.getvalue()

    def seconds(self, data: bytes) -> float:
        """How long so many bytes sound."""
        return len(data) / self.width / self.rate

    @property
    def json(self) -> dict[str, Any]:
        """It as an event has it."""
        return {"type": self.name} | ({"rate": self.rate} if self.width == 2 else {})


PCM = AudioFormat("audio/pcm", SPEECH_SAMPLE_RATE, 2, "PCM_16")
FORMATS = {
    form.name: form
    for form in (
        PCM,
        AudioFormat("audio/pcmu", 8000, 1, "ULAW"),
        AudioFormat("audio/pcma", 8000, 1, "ALAW"),
    )
}


def read_format(fields: Fields) -> AudioFormat:
    """The format that a session asks for.

    Raises:
        EventError: if there is none of that name, or not at that rate.
    """
    form = FORMATS[fields.choice("type", FORMATS)]
    fields.number("rate", form.rate, least=form.rate, most=form.rate, whole=True)
    fields.refuse_others()
    return form


class StreamResampler:
    """Resamples a stream piece by piece, to the same numbers as `audio.resample` of it all at once.

    Args:
        from_rate: rate of what comes in, in Hz.
        to_rate: rate of what goes out, in Hz.
    """

    def __init__(self, from_rate: int, to_rate: int):
        self._rates = from_rate, to_rate
        common = math.gcd(from_rate, to_rate)
        self._down, self._up = from_rate // common, to_rate // common
        reach = math.ceil(_CROSSINGS * self._down / min(self._down, self._up))
        self._reach = math.ceil(reach / self._down)  # in periods of `_down` samples
        self._held = np.zeros(0, np.float32)
        self._before = 0  # periods of `_held` that have been given out and are context

    def push(self, samples: Float32[np.ndarray, " N"]) -> Float32[np.ndarray, " M"]:
        """What is certain after these samples: it lags behind by the kernel's reach, < 1 ms."""
        if self._down == self._up:
            return samples
        self._held = np.concatenate([self._held, samples])
        ready = len(self._held) // self._down - self._reach
        if ready <= self._before:
            return np.zeros(0, np.float32)
        made = resample(self._held, *self._rates)[self._before * self._up : ready * self._up]
        keep = max(ready - self._reach, 0)
        self._held, self._before = self._held[keep * self._down :], ready - keep
        return made

    def flush(self) -> Float32[np.ndarray, " M"]:
        """The stream is over: the rest of it."""
        if self._down == self._up or not len(self._held):
            return np.zeros(0, np.float32)
        rest = resample(self._held, *self._rates)[self._before * self._up :]
        self._held, self._before = np.zeros(0, np.float32), 0
        return rest


def to_model_rate(form: AudioFormat) -> StreamResampler:
    """From what a client sends to what the model hears."""
    return StreamResampler(form.rate, SAMPLE_RATE)


def from_speech_rate(form: AudioFormat) -> StreamResampler:
    """From what the model speaks to what a client plays."""
    return StreamResampler(SPEECH_SAMPLE_RATE, form.rate)
