"""Audio files: read any format, mix to mono, resample, write wav.

Samples are float32 in [-1, 1], channels first: [C, T] with T in samples. Long files stream through
in blocks: an hour of 48 kHz stereo costs `load_audio` about twice the 16 kHz mono that it returns.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
from jaxtyping import Float, Int16

from sa2jax.atomic_io import new_file
from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.audio.reader import (
    MAX_SECONDS,
    Audio,
    AudioReader,
    AudioSource,
    Blocks,
    Channel,
    as_samples,
    check_rate,
    join,
    open_audio,
    slices,
)
from sa2jax.audio.resampling import resample_blocks
from sa2jax.errors import AudioError

log = logging.getLogger(__name__)


# ---- reading -------------------------------------------------------------------------------------


def read_audio(
    source: Audio, *, rate: int | None = None, max_seconds: float | None = MAX_SECONDS
) -> tuple[Float[np.ndarray, "C T"], int]:
    """Read a whole recording as it is: every channel, its own sample rate.

    Args:
        source: path, bytes or open binary file (wav, flac, mp3, ogg: whatever libsndfile reads), an
            `(array, rate)` pair, or an array [T] or [C, T] together with `rate`. Integer arrays are
            scaled as libsndfile scales files: int16 by 1 / 32768.
        rate: sample rate in Hz of a bare array; not for other sources, which carry their own.
        max_seconds: a longer recording is refused; None for no limit.

    Returns:
        float32 samples [C, T] in [-1, 1] and the sample rate in Hz.

    Raises:
        AudioError: no such file, not audio, no samples, NaN or Inf, bad rate or shape, too long.
    """
    with open_audio(source, rate, max_seconds=max_seconds) as reader:
        samples = join(reader.all_channels(), reader.name)
        log_notes(reader.name, reader.notes)
        return samples, reader.rate


def load_audio(
    source: Audio | AudioSource,
    rate: int = SAMPLE_RATE,
    *,
    channel: Channel = 0,
    max_seconds: float | None = MAX_SECONDS,
) -> Float[np.ndarray, " T"]:
    """Read a recording as one channel at the rate a model wants.

    Args:
        source: as for `read_audio`; an array must come as `(array, rate)`. An `AudioSource` has a
            channel and perhaps a limit of its own, which count.
        rate: wanted sample rate in Hz.
        channel: 0 keeps the first (listening, voice codes, speaker: `utils.load_audio` of the
            official code), "mean" averages all (voice mel at 24 kHz: `Token2wav._prepare_prompt`).
        max_seconds: a longer recording is refused; None for no limit.

    Returns:
        float32 samples [T] at `rate`.

    Raises:
        AudioError: as for `read_audio`, or if there is no such channel.
    """
    with open_mono(source, rate, channel=channel, max_seconds=max_seconds) as (reader, blocks):
        samples = join(blocks, reader.name)[0]
        log_notes(reader.name, reader.notes)
        return samples


@contextmanager
def open_mono(
    source: Audio | AudioSource,
    rate: int = SAMPLE_RATE,
    *,
    channel: Channel = 0,
    max_seconds: float | None = MAX_SECONDS,
) -> Iterator[tuple[AudioReader, Blocks]]:
    """Open a recording and read it in blocks [1, T], float32 at `rate`; as `load_audio` otherwise.

    Raises:
        AudioError: as for `load_audio`, when the recording is opened or while it is read.
    """
    rate = check_rate(rate)
    if isinstance(source, AudioSource):
        channel = channel if source.channel is None else source.channel
        max_seconds = max_seconds if source.max_seconds is None else source.max_seconds
        source = source.source
    with open_audio(source, max_seconds=max_seconds) as reader:
        # Mixing commutes with resampling, so one channel is resampled instead of all.
        yield reader, resample_blocks(reader.one_channel(channel), reader.rate, rate)


def log_notes(name: str, notes: list[str] | tuple[str, ...]) -> None:
    """Log what was noticed of a recording as warnings."""
    for note in notes:
        log.warning("%s: %s", name, note)


# ---- resampling ----------------------------------------------------------------------------------


def resample(
    samples: Float[np.ndarray, "*C T"], from_rate: int, to_rate: int
) -> Float[np.ndarray, "*C T2"]:
    """Change the sample rate exactly as `torchaudio.transforms.Resample` with its defaults.

    A sinc with a Hann window, 6 zero crossings to each side, cut off at 0.99 of the lower Nyquist
    frequency.

    Args:
        samples: float [T] or [C, T].
        from_rate: rate of `samples` in Hz.
        to_rate: wanted rate in Hz.

    Returns:
        float32 [T2] or [C, T2] with T2 = ceil(T * to_rate / from_rate).

    Raises:
        AudioError: bad rate or shape, no samples, NaN or Inf.
    """
    rates = check_rate(from_rate), check_rate(to_rate)
    out = join(resample_blocks(slices(as_samples(samples)), *rates), "the array")
    return out[0] if np.ndim(samples) == 1 else out


# ---- writing -------------------------------------------------------------------------------------


def pcm_16(samples: Float[np.ndarray, "*N"], *, parity: bool = False) -> Int16[np.ndarray, "*N"]:
    """Samples in [-1, 1] as 16 bit: clipped and rounded to 1 / 32768.

    Args:
        samples: the samples.
        parity: scale by 32767 and cut what is left, as the official streaming does.

    Raises:
        AudioError: for NaN or Inf.
    """
    if not np.isfinite(samples).all():
        raise AudioError("expected finite samples, got NaN or Inf")
    if parity:
        return (np.clip(samples, -1, 1) * np.float32(32767)).astype(np.int16)
    return np.clip(np.round(samples * np.float32(32768)), -32768, 32767).astype(np.int16)


def write_wav(
    path: str | os.PathLike[str],
    samples: Float[np.ndarray, "*C T"],
    rate: int,
    *,
    subtype: Literal["FLOAT", "PCM_16"] = "FLOAT",
) -> None:
    """Write a wav file, whole or not at all: under a temporary name first, then renamed.

    Args:
        path: where to; must end in .wav.
        samples: [T] or [C, T] in [-1, 1] (or int16).
        rate: sample rate in Hz; 24 000 for speech the model makes.
        subtype: "FLOAT" (32 bit, exact) or "PCM_16" (clipped and rounded to 1 / 32768, so that what
            was read from a 16 bit file comes back unchanged).

    Raises:
        AudioError: not a .wav name, no such folder, no samples, NaN or Inf, bad rate or shape.
    """
    path, rate = Path(path), check_rate(rate)
    if path.suffix.lower() != ".wav":
        raise AudioError(f"expected a file name ending in .wav, got {path}; rename it")
    if subtype not in ("FLOAT", "PCM_16"):
        raise AudioError(f"expected subtype 'FLOAT' or 'PCM_16', got {subtype!r}")
    data = join(slices(as_samples(samples)), "the array").T  # [T, C]
    if subtype == "PCM_16":
        data = pcm_16(data)
    try:
        with new_file(path) as temporary:
            soundfile.write(temporary, data, rate, subtype=subtype, format="WAV")
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(
            f"cannot write {path} ({error}); check the folder and its space"
        ) from error
