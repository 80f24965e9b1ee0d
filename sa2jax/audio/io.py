"""Audio files: read any format, mix to mono, resample, split into chunks, write wav.

Samples are float32 in [-1, 1], channels first: [C, T] with T in samples. Long files stream through
in blocks: an hour of 48 kHz stereo costs `load_audio` about twice the 16 kHz mono that it returns.
"""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import soundfile
from jaxtyping import Float, Int16

from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.audio.resampling import resample_blocks
from sa2jax.errors import AudioError

Audio: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | tuple[np.ndarray, int]
"""A path, the bytes of an audio file, an open binary file, or an array with its rate in Hz."""

_BLOCK = 1 << 19  # samples per channel that are in flight at once
_MAX_RATE = 1_000_000
_MAX_CHANNELS = 64  # more are samples: a transposed array
_FULL_SCALE = {"int8": 2.0**7, "uint8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}


# ---- reading -------------------------------------------------------------------------------------


def read_audio(source: Audio, *, rate: int | None = None) -> tuple[Float[np.ndarray, "C T"], int]:
    """Read a whole recording as it is: every channel, its own sample rate.

    Args:
        source: path, bytes or open binary file (wav, flac, mp3, ogg: whatever libsndfile reads), an
            `(array, rate)` pair, or an array [T] or [C, T] together with `rate`. Integer arrays are
            scaled as libsndfile scales files: int16 by 1 / 32768.
        rate: sample rate in Hz of a bare array; not for other sources, which carry their own.

    Returns:
        float32 samples [C, T] in [-1, 1] and the sample rate in Hz.

    Raises:
        AudioError: no such file, not audio, no samples, NaN or Inf, bad rate or shape.
    """
    with _open(source, rate) as (name, sample_rate, blocks):
        return _join(blocks, name), sample_rate


def load_audio(
    source: Audio, rate: int = SAMPLE_RATE, *, mono: Literal["first", "mean"] = "first"
) -> Float[np.ndarray, " T"]:
    """Read a recording as one channel at the rate a model wants.

    Args:
        source: as for `read_audio`; an array must come as `(array, rate)`.
        rate: wanted sample rate in Hz.
        mono: "first" keeps channel 0 (listening, voice codes, speaker: `utils.load_audio` of the
            official code), "mean" averages all (voice mel at 24 kHz: `Token2wav._prepare_prompt`).

    Returns:
        float32 samples [T] at `rate`.

    Raises:
        AudioError: as for `read_audio`.
    """
    if mono not in ("first", "mean"):
        raise AudioError(f"expected mono='first' or 'mean', got {mono!r}")
    to_rate = _check_rate(rate)
    with _open(source, None) as (name, from_rate, blocks):
        # Mixing commutes with resampling, so one channel is resampled instead of all.
        mixed = (b[:1] if mono == "first" else b.mean(0, keepdims=True) for b in blocks)
        return _join(resample_blocks(_finite(mixed, name), from_rate, to_rate), name)[0]


@contextmanager
def _open(
    source: Audio, rate: int | None
) -> Iterator[tuple[str, int, Iterator[Float[np.ndarray, "C T"]]]]:
    """Yield the name, the rate and the finite blocks of any source."""
    if isinstance(source, tuple):
        if len(source) != 2 or rate is not None:
            raise AudioError(f"expected (array, rate), got {len(source)} items and rate={rate}")
        source, rate = source
    elif not hasattr(source, "__array__") and rate is not None:
        raise AudioError(f"rate={rate} is for a bare array; a file carries its own, leave rate out")
    if hasattr(source, "__array__"):
        if rate is None:
            raise AudioError("expected an array with its sample rate; pass (array, rate)")
        array = _as_samples(source)
        yield "the array", _check_rate(rate), _slices(array)
        return
    name = _name(source)
    try:
        file = soundfile.SoundFile(_openable(source, name))
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        raise _unreadable(name, error) from error
    with file:
        yield name, _check_rate(file.samplerate), _file_blocks(file, name)


def _unreadable(name: str, error: Exception) -> AudioError:
    cause = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return AudioError(
        f"expected wav, flac, mp3 or ogg audio, but {name} cannot be read ({cause}); "
        "convert it to wav, for example with ffmpeg"
    )


def _name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return "the bytes" if isinstance(source, bytes) else str(getattr(source, "name", "the file"))


def _openable(source: Any, name: str) -> str | BinaryIO:
    """What soundfile can open: an existing path or a seekable binary file at its start."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        if os.path.isdir(source):
            raise AudioError(f"expected an audio file, but {name} is a folder; name a file in it")
        if not os.path.exists(source):
            raise AudioError(f"expected an audio file, but {name} does not exist; check the path")
        return os.fspath(source)
    if not hasattr(source, "read"):
        raise AudioError(
            f"expected a path, bytes, a binary file or (array, rate), got {type(source).__name__}"
        )
    if not (hasattr(source, "seekable") and source.seekable()):
        source = io.BytesIO(source.read())  # a pipe
    source.seek(0)  # read before, perhaps: a voice is loaded at two rates
    return source


def _file_blocks(file: soundfile.SoundFile, name: str) -> Iterator[Float[np.ndarray, "C T"]]:
    try:
        while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
            yield block.T
    except soundfile.SoundFileError as error:  # damaged further on
        raise _unreadable(name, error) from error


def _slices(samples: Float[np.ndarray, "C T"]) -> Iterator[Float[np.ndarray, "C T"]]:
    for start in range(0, samples.shape[1], _BLOCK):
        yield samples[:, start : start + _BLOCK]


def _as_samples(array: Any) -> Float[np.ndarray, "C T"]:
    """Any real array [T] or [C, T] as float32 [C, T], integers scaled to [-1, 1]."""
    array = np.asarray(array)
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] > _MAX_CHANNELS):
        raise AudioError(f"expected samples [T] or [C, T], got shape {array.shape}; transpose them")
    if (scale := _FULL_SCALE.get(array.dtype.name)) is not None:
        offset = scale if array.dtype.kind == "u" else 0.0
        array = (array.astype(np.float32) - np.float32(offset)) / np.float32(scale)
    elif array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise AudioError(f"expected float, int16 or int32 samples, got {array.dtype}; convert them")
    return np.atleast_2d(np.asarray(array, np.float32))


def _check_rate(rate: Any) -> int:
    if isinstance(rate, bool | np.bool_) or not hasattr(rate, "__index__"):
        raise AudioError(f"expected a sample rate as a whole number of Hz, got {rate!r}")
    if not 1 <= int(rate) <= _MAX_RATE:
        raise AudioError(f"expected a sample rate of 1 to {_MAX_RATE} Hz, got {rate}")
    return int(rate)


def _finite(
    blocks: Iterable[Float[np.ndarray, "C T"]], name: str
) -> Iterator[Float[np.ndarray, "C T"]]:
    for block in blocks:
        if not np.isfinite(block).all():
            raise AudioError(
                f"expected finite samples, but {name} holds NaN or Inf; export it anew"
            )
        yield block


def _join(blocks: Iterable[Float[np.ndarray, "C T"]], name: str) -> Float[np.ndarray, "C T"]:
    parts = list(_finite(blocks, name))
    if not parts:
        raise AudioError(f"expected audio, but {name} holds no samples; record it again")
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


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
    rates = _check_rate(from_rate), _check_rate(to_rate)
    out = _join(resample_blocks(_slices(_as_samples(samples)), *rates), "the array")
    return out[0] if np.ndim(samples) == 1 else out


# ---- writing -------------------------------------------------------------------------------------


def pcm_16(samples: Float[np.ndarray, "*N"]) -> Int16[np.ndarray, "*N"]:
    """Samples in [-1, 1] as 16 bit: clipped and rounded to 1 / 32768."""
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
    path, rate = Path(path), _check_rate(rate)
    if path.suffix.lower() != ".wav":
        raise AudioError(f"expected a file name ending in .wav, got {path}; rename it")
    if subtype not in ("FLOAT", "PCM_16"):
        raise AudioError(f"expected subtype 'FLOAT' or 'PCM_16', got {subtype!r}")
    data = _join(_slices(_as_samples(samples)), "the array").T  # [T, C]
    if subtype == "PCM_16":
        data = pcm_16(data)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        soundfile.write(temporary, data, rate, subtype=subtype, format="WAV")
        os.replace(temporary, path)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(
            f"cannot write {path} ({error}); check the folder and its space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
