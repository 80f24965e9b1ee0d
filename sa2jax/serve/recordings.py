"""Recordings that clients send: base64 in JSON, or files of a form."""

import base64
import binascii
import importlib.util
import io
import re
import tempfile
from typing import Any, BinaryIO, cast

import numpy as np
import soundfile

from sa2jax.audio import AudioSource
from sa2jax.audio.rates import SPEECH_SAMPLE_RATE
from sa2jax.errors import AudioError
from sa2jax.serve.errors import ApiError

FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "pcm16", "webm", "m4a", "mp4", "aac")
_HEAD = 16  # bytes that tell a container


class NamedFile(io.RawIOBase):
    """An open file that messages call by a name of its own, never by where it lies.

    Args:
        file: the file.
        name: what to call it.
    """

    def __init__(self, file: Any, name: str):
        self._file, self.name = file, re.sub(r"[^\w. ()-]", "_", name)[-80:] or "the file"

    def __repr__(self) -> str:
        return self.name

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Bytes of it."""
        return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        """Bytes of it, into a buffer."""
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go somewhere in it."""
        self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        """Where one is."""
        return self._file.tell()


def decode_recording(data: object, form: object, *, param: str, max_seconds: float) -> AudioSource:
    """A recording in base64, as `input_audio` has it.

    Args:
        data: the base64 text, or a data URL.
        form: its format, one of `FORMATS`; pcm16 is 24 kHz, mono, little-endian. The others are
            told by their content.
        param: the field of the request, for errors.
        max_seconds: a longer one is refused.

    Raises:
        ApiError: 400 if it is none.
        AudioError: if it cannot be read.
    """
    if not isinstance(data, str) or not data:
        raise ApiError(f"{param}.data: expected base64 text", param=f"{param}.data")
    if form not in FORMATS:
        expected = ", ".join(FORMATS)
        raise ApiError(f"{param}.format: expected one of {expected}", param=f"{param}.format")
    text = data.partition(",")[2] if data.startswith("data:") else data
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(f"{param}.data: not valid base64", param=f"{param}.data") from None
    if form == "pcm16":
        if len(raw) < 2 or len(raw) % 2:
            raise ApiError(f"{param}.data: expected samples of two bytes", param=f"{param}.data")
        samples = np.frombuffer(raw, "<i2").astype(np.int16)
        return AudioSource((samples, SPEECH_SAMPLE_RATE), max_seconds=max_seconds)
    return open_recording(io.BytesIO(raw), f"the {form} recording", max_seconds=max_seconds)


def open_recording(
    file: BinaryIO, name: str, *, max_seconds: float, rate: int | None = None
) -> AudioSource:
    """An uploaded file as a recording; in a worker thread.

    What libsndfile cannot read (webm, m4a, aac) is decoded by PyAV into a temporary file.

    Args:
        file: the file.
        name: what messages call it.
        max_seconds: a longer one is refused.
        rate: in Hz, of the temporary file, mono then; by default the recording's own.

    Raises:
        ApiError: 400 for a format that needs PyAV, where it is missing.
        AudioError: if it cannot be decoded.
    """
    file.seek(0)
    container = _container(file.read(_HEAD))
    file.seek(0)
    if container is None:
        return AudioSource(cast(BinaryIO, NamedFile(file, name)), max_seconds=max_seconds)
    if importlib.util.find_spec("av") is None:
        raise ApiError(
            f"{name} is {container}: that needs PyAV on the server "
            "(pip install 'sa2jax[serve-av]'); send wav, mp3, flac or ogg",
            code="unsupported_format",
        )
    wave = _decode(NamedFile(file, name), container, max_seconds, rate)
    return AudioSource(cast(BinaryIO, NamedFile(wave, name)), max_seconds=max_seconds)


def _container(head: bytes) -> str | None:
    """FFmpeg's name of what libsndfile cannot read, None for anything else."""
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "webm"
    if head[4:8] == b"ftyp":
        return "mp4"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # layer 0: no mp3
        return "aac"
    return None


def _decode(file: NamedFile, container: str, max_seconds: float, rate: int | None) -> BinaryIO:
    """Decode with the one demuxer of that container: no other is tried, no other file opened."""
    import av

    wave = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with av.open(file, "r", format={"webm": "matroska"}.get(container, container)) as opened:
            if not opened.streams.audio:
                raise AudioError(f"expected audio, but {file.name} holds none")
            stream = opened.streams.audio[0]
            rate = rate or stream.rate
            layout = "mono" if rate != stream.rate else stream.layout.name
            resampler = av.AudioResampler(format="s16", layout=layout, rate=rate)
            channels = 1 if layout == "mono" else stream.channels
            left = int(max_seconds * rate) + 1
            with soundfile.SoundFile(
                wave, "w", rate, channels, format="RF64", subtype="PCM_16"
            ) as out:
                for frame in opened.decode(stream):
                    for part in resampler.resample(frame):
                        samples = part.to_ndarray().reshape(-1, channels)[:left].astype(np.int16)
                        out.write(samples)
                        left -= len(samples)
                    if left <= 0:
                        raise AudioError(
                            f"{file.name} is longer than {max_seconds:g} s: cut it, or raise the "
                            "server's limit"
                        )
    except (av.error.FFmpegError, ValueError) as error:
        wave.close()
        raise AudioError(f"{file.name} cannot be decoded as {container} ({error})") from None
    except BaseException:
        wave.close()
        raise
    wave.seek(0)
    return wave
