"""Speech as bytes of a format, all at once or as it is made."""

import importlib.util
import io
import struct
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import soundfile
from jaxtyping import Float

from sa2jax.audio import pcm_16
from sa2jax.serve.errors import ApiError

MEDIA_TYPES: Mapping[str, str] = {
    "pcm": "audio/pcm",
    "pcm16": "audio/pcm",
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "opus": "audio/ogg",
    "aac": "audio/aac",
}
_SOUNDFILE = {
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "flac": ("FLAC", "PCM_16"),
    "opus": ("OGG", "OPUS"),
}
_UNKNOWN = 0xFFFFFFFF  # a length that is not known when the header is sent


class Encoder(Protocol):
    """Takes samples and gives bytes."""

    def push(self, samples: Float[np.ndarray, "N"]) -> bytes:
        """The bytes that these samples complete; perhaps none."""
        ...

    def finish(self) -> bytes:
        """The last bytes."""
        ...


def require_format(name: str, param: str) -> None:
    """Refuse a format that cannot be written here, before anything is computed.

    Args:
        name: the format, a name of `MEDIA_TYPES`.
        param: the field of the request that names it.

    Raises:
        ApiError: 400.
    """
    if name not in MEDIA_TYPES:
        raise ApiError(f"{param}: expected one of {', '.join(MEDIA_TYPES)}", param=param)
    if name == "aac" and importlib.util.find_spec("av") is None:
        raise ApiError(
            f"{param}: aac needs PyAV on the server (pip install 'sa2jax[serve-av]'); "
            "take mp3, opus, flac, wav or pcm",
            param=param,
            code="unsupported_format",
        )


def open_encoder(name: str, rate: int, *, stream: bool = True) -> Encoder:
    """An encoder of mono speech.

    Args:
        name: a format that `require_format` has let pass.
        rate: sample rate, in Hz.
        stream: whether the bytes are sent as they come. Otherwise all come from `finish`, and
            headers tell the length.
    """
    if name in ("pcm", "pcm16", "wav"):
        return _Pcm(rate, wav=name == "wav", stream=stream)
    if name == "aac":
        return _Aac(rate)
    return _SoundFile(*_SOUNDFILE[name], rate, stream=stream)


def encode(name: str, rate: int, samples: Float[np.ndarray, "N"]) -> bytes:
    """Whole speech as bytes."""
    encoder = open_encoder(name, rate, stream=False)
    return encoder.push(samples) + encoder.finish()


class _Pcm:
    """16-bit little-endian samples, bare or behind a wav header."""

    def __init__(self, rate: int, *, wav: bool, stream: bool):
        self._rate, self._wav, self._stream = rate, wav, stream
        self._held: list[bytes] = []
        self._begun = not wav

    def push(self, samples: Float[np.ndarray, "N"]) -> bytes:
        data = pcm_16(samples).astype("<i2").tobytes()
        if not self._stream:
            self._held.append(data)
            return b""
        head = b"" if self._begun else _wav_header(self._rate, None)
        self._begun = True
        return head + data

    def finish(self) -> bytes:
        if self._stream:
            return b"" if self._begun else _wav_header(self._rate, None)
        data = b"".join(self._held)
        return (_wav_header(self._rate, len(data)) if self._wav else b"") + data


def _wav_header(rate: int, size: int | None) -> bytes:
    """Header of a 16-bit mono wav; without a size it says that it goes on to the end."""
    whole = _UNKNOWN if size is None else size + 36
    data = _UNKNOWN if size is None else size
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", whole, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", data),
    )


class _Pipe(io.RawIOBase):
    """A file that is sent while it is written: what is written again, such as a header, is not.

    libsndfile asks it to seek; it does so within what it believes to have written.
    """

    def __init__(self):
        self._at = self._end = 0
        self._new: list[bytes] = []

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        size = len(data)
        fresh = bytes(data)[max(self._end - self._at, 0) :]
        self._at += size
        if fresh:
            self._new.append(fresh)
            self._end = self._at
        return size

    def take(self) -> bytes:
        """What was written since the last time."""
        data = b"".join(self._new)
        self._new.clear()
        return data


class _SoundFile:
    """What libsndfile writes; when streamed, headers keep what they said at first."""

    def __init__(self, form: str, subtype: str, rate: int, *, stream: bool):
        self._out: _Pipe | io.BytesIO = _Pipe() if stream else io.BytesIO()
        # Of a constant bit rate, 64 kbit/s, an mp3 needs no header to tell how long it is.
        mode, level = ("CONSTANT", 0.6) if form == "MP3" else (None, None)
        self._file = soundfile.SoundFile(
            cast(BinaryIO, self._out),
            "w",
            samplerate=rate,
            channels=1,
            format=form,
            subtype=subtype,
            bitrate_mode=mode,
            compression_level=level,
        )

    def push(self, samples: Float[np.ndarray, "N"]) -> bytes:
        self._file.write(np.clip(samples, -1, 1))
        return self._out.take() if isinstance(self._out, _Pipe) else b""

    def finish(self) -> bytes:
        self._file.close()
        return self._out.take() if isinstance(self._out, _Pipe) else self._out.getvalue()


class _Aac:
    """AAC with ADTS headers, by PyAV."""

    def __init__(self, rate: int):
        import av

        self._av, self._rate, self._time = av, rate, 0
        self._out = _Pipe()
        self._container = av.open(self._out, "w", format="adts")
        self._stream = self._container.add_stream("aac", rate=rate, layout="mono")
        self._fifo = av.AudioFifo()

    def push(self, samples: Float[np.ndarray, "N"]) -> bytes:
        if len(samples):
            frame = self._av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples[None], np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = self._rate, self._time
            frame.time_base = Fraction(1, self._rate)
            self._time += len(samples)
            self._fifo.write(frame)
        for frame in self._fifo.read_many(1024):
            self._container.mux(self._stream.encode(frame))
        return self._out.take()

    def finish(self) -> bytes:
        if (rest := self._fifo.read(partial=True)) is not None:
            self._container.mux(self._stream.encode(rest))
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._out.take()
