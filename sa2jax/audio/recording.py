"""A recording in memory: its samples and its log-mel frames."""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from jaxtyping import Float32

from sa2jax.audio import io, levels, pauses
from sa2jax.audio.chunks import split_chunks
from sa2jax.audio.features import log_mel
from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.audio.reader import Audio, AudioSource, join
from sa2jax.errors import AudioError


@dataclass(frozen=True, eq=False)
class Recording:
    """A recording in memory, 16 kHz mono, with its log-mel frames.

    Attributes:
        samples: 16 kHz mono, a read-only copy of what is given.
        notes: what the user should know of it, such as that nothing can be heard.

    Raises:
        AudioError: if these are no samples.
    """

    samples: Float32[np.ndarray, "N"]
    notes: tuple[str, ...] = ()
    _mels: dict[int, tuple[np.ndarray, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        samples = np.array(self.samples)
        if samples.dtype != np.float32 or samples.ndim != 1 or not samples.size:
            raise AudioError(
                f"expected float32 samples [N], got {samples.dtype} {samples.shape}; read the "
                "audio with Recording.from_source"
            )
        if not np.isfinite(samples).all():
            raise AudioError("expected finite samples, got NaN or Inf")
        samples.flags.writeable = False
        object.__setattr__(self, "samples", samples)

    @classmethod
    def from_source(cls, source: Audio | AudioSource) -> Self:
        """Read a recording of any rate and channels, as `audio.load_audio` does.

        Raises:
            AudioError: if it cannot be read.
        """
        with io.open_mono(source) as (reader, blocks):
            samples = join(blocks, reader.name)[0]
        seconds = len(samples) / SAMPLE_RATE
        silent = () if levels.has_sound(samples) else (levels.silence_note(seconds),)
        return cls(samples, (*reader.notes, *silent))

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples) / SAMPLE_RATE

    @property
    def has_sound(self) -> bool:
        """Whether there is enough sound in it for a word."""
        return levels.has_sound(self.samples)

    @property
    def has_speech(self) -> bool:
        """Whether somebody speaks in it; computed anew each time, some 1.5 ms for a second."""
        return pauses.has_speech(self.samples)

    def mels(self, n_mels: int) -> list[Float32[np.ndarray, "M frames"]]:
        """Log-mel frames of each 25 s of it; computed once and kept, read-only."""
        if n_mels not in self._mels:
            chunks = split_chunks(self.samples)
            mels = tuple(np.asarray(log_mel(chunk, n_mels=n_mels)) for chunk in chunks)
            for mel in mels:
                mel.flags.writeable = False
            self._mels[n_mels] = mels
        return [*self._mels[n_mels]]

    def split(self, max_samples: int) -> list[Self]:
        """Parts of at most so many samples, in order: views that are not checked again."""
        if len(self.samples) <= max_samples:
            return [self]
        return [self.part(samples) for samples in split_chunks(self.samples, max_samples)]

    @classmethod
    def part(cls, samples: Float32[np.ndarray, "N"]) -> Self:
        """A recording of samples that were checked before."""
        part = object.__new__(cls)
        object.__setattr__(part, "samples", samples)
        object.__setattr__(part, "notes", ())
        object.__setattr__(part, "_mels", {})
        return part
