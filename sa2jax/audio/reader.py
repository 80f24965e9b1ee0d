"""An open recording: its blocks as they are decoded, and what was noticed of it.

Every sound that the library hears comes through here, so limits, notes and refusals are the same
for all: files of any format, bytes, open files and arrays.
"""

import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import soundfile
from jaxtyping import Float

from sa2jax.audio.headers import PatchedFile, check_header, missing_tag
from sa2jax.errors import AudioError

Audio: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | tuple[np.ndarray, int]
"""A path, the bytes of an audio file, an open binary file, or an array with its rate in Hz."""
Channel: TypeAlias = int | Literal["mean"]
"""A channel, counted from 0, or the mean of all."""
Blocks: TypeAlias = Iterator[Float[np.ndarray, "C T"]]

SILENCE = 1e-3  # what stays below this, -60 dB of full scale, cannot be heard
MAX_SECONDS = 7200.0  # of a recording that is held in memory, unless the caller says otherwise
MIN_RATE, MAX_RATE = 1000, 1_000_000  # Hz of a recording
_BLOCK = 1 << 19  # samples that are in flight at once, all channels together
_MAX_CHANNELS = 64  # more are samples: a transposed array
_MAX_PIPE = 1 << 30  # bytes that are read from what cannot seek
_FULL_SCALE = {"int8": 2.0**7, "uint8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}
_UNKNOWN_FRAMES = 2**62  # libsndfile names more where it does not know
# Float samples: up to LOUD is headroom; 16-bit numbers are whole, or larger than any gain makes.
_LOUD, _NUMBERS, _LARGEST = 2.0, 128.0, 65536.0
_QUIET = 1e-4  # ratio of energies, -40 dB: a channel beside one that speaks


@dataclass(frozen=True, eq=False)
class AudioSource:
    """A recording that is still to be read, and how.

    Attributes:
        source: a path, also as a str, bytes, an open binary file or `(array, rate)`.
        channel: the channel that is heard, or "mean" for the mean of all; by default the first, and
            for the mel frames of a voice the mean, as officially.
        max_seconds: a longer one is refused; by default two hours, or a day where it is read in
            blocks and never as a whole (`transcribe`, `translate`).
    """

    source: Audio
    channel: Channel | None = None
    max_seconds: float | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return source_name(self.source)


@dataclass(eq=False)
class AudioReader:
    """An open recording; made by `open_audio`.

    Attributes:
        name: for messages.
        rate: its sample rate, in Hz.
        channels: how many it has.
        seconds: its length, None if it is not known before the end.
        notes: what the user should know; complete when all blocks were read.
    """

    name: str
    rate: int
    channels: int
    seconds: float | None
    _blocks: Blocks = field(repr=False)
    notes: list[str] = field(default_factory=list)

    def all_channels(self) -> Blocks:
        """Float32 samples of all channels, [C, T]; once.

        Raises:
            AudioError: for damage further on, NaN or Inf, or a recording beyond its limit.
        """
        return _finite(self._blocks, self.name)

    def one_channel(self, channel: Channel = 0) -> Blocks:
        """Float32 samples of one channel, or of the mean of all, [1, T]; once.

        Raises:
            AudioError: as `all_channels`, or if there is no such channel.
        """
        known = isinstance(channel, int) and not isinstance(channel, bool)
        if channel != "mean" and not (known and 0 <= channel < self.channels):
            has = "1 channel" if self.channels == 1 else f"{self.channels} channels"
            raise AudioError(
                f"{self.name} has {has}: expected a channel from 0 to {self.channels - 1}, or "
                f"'mean', got {channel!r}"
            )
        return _finite(self._mixed(channel), self.name)

    def _mixed(self, channel: Channel) -> Blocks:
        energies, peaks = np.zeros(self.channels), np.zeros(self.channels)
        own_energy, own_peak = 0.0, 0.0
        for block in self._blocks:
            if channel == "mean":
                mixed = block.mean(0, keepdims=True)
            else:
                mixed = block[channel : channel + 1]
            if self.channels > 1:
                with np.errstate(all="ignore"):  # of what is not a number, which is refused later
                    energies += np.einsum("ct,ct->c", block, block, dtype=np.float64)
                    peaks = np.fmax(peaks, np.abs(block).max(axis=1))
                    own_energy += float(np.einsum("ct,ct->", mixed, mixed, dtype=np.float64))
                    own_peak = max(own_peak, float(np.abs(mixed).max()))
            yield mixed
        loudest = int(np.argmax(energies))
        silent = own_peak < SILENCE or own_energy < _QUIET * energies[loudest]
        if self.channels > 1 and silent and peaks[loudest] >= SILENCE:
            heard = "the mean of the channels" if channel == "mean" else f"channel {channel}"
            self.notes.append(
                f"{heard} is silent or nearly so, channel {loudest} is not: choose it with "
                f"--channel {loudest}, in Python with AudioSource(..., channel={loudest})"
            )


@contextmanager
def open_audio(
    source: Audio, rate: int | None = None, *, max_seconds: float | None = MAX_SECONDS
) -> Iterator[AudioReader]:
    """Open a recording of any kind.

    Args:
        source: the recording.
        rate: sample rate of a bare array, in Hz; not for other sources, which carry their own.
        max_seconds: a longer one is refused; None for no limit.

    Raises:
        AudioError: no such file, not audio, bad rate or shape, too long.
    """
    if isinstance(source, tuple):
        if len(source) != 2 or rate is not None:
            raise AudioError(f"expected (array, rate), got {len(source)} items and rate={rate}")
        source, rate = source
    elif not hasattr(source, "__array__") and rate is not None:
        raise AudioError(f"rate={rate} is for a bare array; a file carries its own, leave rate out")
    if hasattr(source, "__array__"):
        if rate is None:
            raise AudioError("expected an array with its sample rate; pass (array, rate)")
        yield _array_reader(as_samples(source), check_rate(rate, MIN_RATE), max_seconds)
        return
    name = source_name(source)
    with ExitStack() as stack:
        try:
            file, header = _open_file(source, name, stack)
        except (soundfile.SoundFileError, TypeError, OSError) as error:
            raise _unreadable(name, error) from error
        sample_rate = check_rate(file.samplerate, MIN_RATE, name)
        frames = header.frames
        if frames is None and file.frames < _UNKNOWN_FRAMES:
            frames = file.frames
        reader = AudioReader(name, sample_rate, file.channels, None, iter(()))
        reader.notes += [header.note] if header.note else []
        if frames is not None:
            reader.seconds = frames / sample_rate
            _check_length(reader, frames, max_seconds)

        def blocks(named: int | None = None) -> Blocks:
            return _file_blocks(file, reader, named, max_seconds)

        def again(named: int | None = None) -> Blocks:
            file.seek(0)  # which other forms do not all allow, such as GSM 6.10
            return blocks(named)

        is_float = file.subtype in ("FLOAT", "DOUBLE")
        reader._blocks = _scaled(again, reader, frames) if is_float else blocks(frames)
        yield reader


def source_name(source: Any) -> str:
    """What messages call a source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes):
        return "the bytes"
    return "the array" if isinstance(source, tuple) else str(getattr(source, "name", "the file"))


class _ForwardFile(soundfile.SoundFile):
    """A file that is read from its beginning to its end.

    Where soundfile can seek, it seeks after each block, which fails for FLAC of unknown length.
    """

    def seekable(self) -> bool:
        return False


def _open_file(source: Any, name: str, stack: ExitStack) -> tuple[soundfile.SoundFile, Any]:
    """The sound file and what was said of its header; the stack closes them."""
    binary = stack.enter_context(_binary(source, name))
    if not binary.read(1):
        raise AudioError(f"expected audio, but {name} is empty (0 bytes); record or copy it again")
    binary.seek(0)
    header = check_header(binary)
    binary.seek(0)
    where: Any = os.fspath(source) if isinstance(source, str | os.PathLike) else binary
    lead = missing_tag(binary) if where is binary else b""
    binary.seek(0)
    if header.patches or lead:
        where = io.BufferedReader(PatchedFile(binary, header.patches, lead), 1 << 16)
    return stack.enter_context(_ForwardFile(where)), header


@contextmanager
def _binary(source: Any, name: str) -> Iterator[BinaryIO]:
    """A binary file that can seek; one that is given stays open."""
    if isinstance(source, str | os.PathLike):
        _check_path(source, name)
        with open(source, "rb") as file:
            yield file
    else:
        yield _seekable(source)


def _check_path(source: str | os.PathLike[str], name: str) -> None:
    try:
        mode = os.stat(source).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise AudioError(
            f"expected an audio file, but {name} does not exist; check the path"
        ) from None
    if stat.S_ISDIR(mode):
        raise AudioError(f"expected an audio file, but {name} is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise AudioError(f"expected an audio file, but {name} is a pipe or a device; save it first")


def _seekable(source: Any) -> BinaryIO:
    """A binary file that can seek, of bytes or an open file."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not hasattr(source, "read"):
        raise AudioError(
            f"expected a path, bytes, a binary file or (array, rate), got {type(source).__name__}"
        )
    if not (hasattr(source, "seekable") and source.seekable()):
        data = source.read(_MAX_PIPE + 1)
        if len(data) > _MAX_PIPE:
            raise AudioError(f"expected at most {_MAX_PIPE} bytes from a pipe; save it first")
        return io.BytesIO(data)
    source.seek(0)  # read before, perhaps: a voice is loaded at two rates
    return source


def _unreadable(name: str, error: Exception) -> AudioError:
    said = str(getattr(error, "error_string", error))  # without the name, which is said here
    cause = (said.splitlines() or [type(error).__name__])[0].removeprefix("Error : ").rstrip(".")
    return AudioError(
        f"expected wav, flac, mp3 or ogg audio, but {name} cannot be read ({cause}); "
        "convert it to wav, for example with ffmpeg"
    )


def _file_blocks(
    file: soundfile.SoundFile, reader: AudioReader, named: int | None, max_seconds: float | None
) -> Blocks:
    """Decode a file; a note if it holds another length than its header names."""
    read, size = 0, max(_BLOCK // file.channels, 1)
    try:
        while len(block := file.read(size, dtype="float32", always_2d=True)):
            read += len(block)
            _check_length(reader, read, max_seconds)
            yield block.T
    except soundfile.SoundFileError as error:  # damaged further on
        raise _unreadable(reader.name, error) from error
    if named is None:
        return
    # The length of an mp3 may be an estimate.
    slack = max((0.1 if file.format == "MP3" else 0.01) * named, reader.rate / 10)
    if abs(read - named) > slack:
        reader.notes.append(
            f"its header names {named / reader.rate:.1f} s, it holds {read / reader.rate:.1f} s: "
            "read to the end of the file"
        )


def _check_length(reader: AudioReader, frames: int, max_seconds: float | None) -> None:
    if max_seconds is not None and frames > max_seconds * reader.rate:
        raise AudioError(
            f"{reader.name} is longer than {max_seconds:g} s: cut it, or allow more with "
            "max_seconds (--max-seconds)"
        )


# ---- samples -------------------------------------------------------------------------------------


def as_samples(array: Any) -> Float[np.ndarray, "C T"]:
    """Any real array [T] or [C, T] as float32 [C, T], integers scaled to [-1, 1].

    Raises:
        AudioError: for another shape or dtype.
    """
    array = np.asarray(array)
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] > _MAX_CHANNELS):
        raise AudioError(f"expected samples [T] or [C, T], got shape {array.shape}; transpose them")
    if (scale := _FULL_SCALE.get(array.dtype.name)) is not None:
        offset = scale if array.dtype.kind == "u" else 0.0
        array = (array.astype(np.float32) - np.float32(offset)) / np.float32(scale)
    elif array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise AudioError(f"expected float, int16 or int32 samples, got {array.dtype}; convert them")
    return np.atleast_2d(np.asarray(array, np.float32))


def slices(samples: Float[np.ndarray, "C T"]) -> Blocks:
    """Samples in blocks: views."""
    for start in range(0, samples.shape[1], _BLOCK):
        yield samples[:, start : start + _BLOCK]


def check_rate(rate: Any, least: int = 1, name: str = "") -> int:
    """A sample rate as an int, in Hz.

    Raises:
        AudioError: if it is none, or too low or too high.
    """
    if isinstance(rate, bool | np.bool_) or not hasattr(rate, "__index__"):
        raise AudioError(f"expected a sample rate as a whole number of Hz, got {rate!r}")
    if not least <= int(rate) <= MAX_RATE:
        of = f"{name} has a rate of {rate} Hz: " if name else ""
        got = "" if name else f", got {rate}"
        raise AudioError(f"{of}expected a sample rate of {least} to {MAX_RATE} Hz{got}")
    return int(rate)


def join(blocks: Iterable[Float[np.ndarray, "C T"]], name: str) -> Float[np.ndarray, "C T"]:
    """All blocks as one array.

    Raises:
        AudioError: for NaN or Inf, or if there are none.
    """
    parts = list(_finite(blocks, name))
    if not parts:
        raise AudioError(f"expected audio, but {name} holds no samples; record it again")
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def _array_reader(
    samples: Float[np.ndarray, "C T"], rate: int, max_seconds: float | None
) -> AudioReader:
    channels, length = samples.shape
    reader = AudioReader("the array", rate, channels, length / rate, iter(()))
    _check_length(reader, length, max_seconds)
    reader._blocks = _scaled(lambda _=None: slices(samples), reader, None)
    return reader


def _finite(blocks: Iterable[Float[np.ndarray, "C T"]], name: str) -> Blocks:
    for block in blocks:
        if not np.isfinite(block).all():
            raise AudioError(
                f"expected finite samples, but {name} holds NaN or Inf; export it anew"
            )
        yield block


def _loudness(blocks: Blocks) -> tuple[float, bool]:
    """The largest magnitude of finite samples, and whether all are whole numbers."""
    peak, whole = 0.0, True
    for block in blocks:
        size = np.abs(block)
        peak = max(peak, float(size.max(initial=0.0, where=np.isfinite(size))))
        with np.errstate(invalid="ignore"):  # of what is not a number, which is refused later
            whole = whole and bool((np.rint(size) == size).all())
    return peak, whole


def _scale(peak: float, whole: bool, reader: AudioReader) -> float:
    """What float samples are divided by, with a note if they are far from [-1, 1].

    Raises:
        AudioError: if nobody can say what they are.
    """
    if peak <= _LOUD:
        return 1.0
    if peak > _LARGEST:
        raise AudioError(
            f"expected float samples in [-1, 1], but {reader.name} reaches {peak:.3g}; divide them "
            "by their full scale"
        )
    if whole or peak > _NUMBERS:
        reader.notes.append(
            f"its float samples reach {peak:g}: taken for 16-bit numbers, divided by 32768"
        )
        return 2.0**15
    reader.notes.append(
        f"its samples reach {peak:.1f}, far above full scale (1): taken as they are"
    )
    return 1.0


def _scaled(
    blocks: Callable[[int | None], Blocks], reader: AudioReader, frames: int | None
) -> Blocks:
    """Float samples, read twice: what they are divided by depends on the loudest."""
    scale = np.float32(_scale(*_loudness(blocks(None)), reader))
    for block in blocks(frames):
        yield block if scale == 1 else block / scale
