"""A reader of recordings that uses tensorflow-io, as a process in an environment of its own.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.

    /path/to/tfio/bin/python tfio_reader.py

It imports TensorFlow, tensorflow-io and numpy, never sa2jax or jax, and answers on standard output
what it is asked on standard input, in the same order. A frame, either way, is

    8 bytes          length of the header, little-endian
    the header       JSON in UTF-8; `sizes` lists the bytes of each part
    the parts        one after another

    it starts       → {"ready": {"tensorflow": "2.16.2", "tensorflow_io": "0.37.1"}}
    {"read": path}  → {"clips": [{"rate": 16000, "channels": 2}]} and float32 samples [T, C]
                    → {"clips": [{"error": "why"}]} and nothing
    {"open": path, "skip": n}    a TFRecord file, after its first n records
                    → {"open": true}
    {"next": true}  → {"line": true, "clips": […]}, the record's line of jsonl and its clips
                    → {"end": true}
    whatever fails as a whole  → {"error": "why"}
"""

import json
import os
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

_LENGTH = struct.Struct("<Q")
_SUFFIXES = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg"}
Clip = tuple[np.ndarray, int]  # samples [T, C] and their rate in Hz


def write_frame(file: BinaryIO, header: dict[str, Any], parts: list[bytes] | None = None) -> None:
    """Send a frame."""
    parts = parts or []
    text = json.dumps(header | {"sizes": [len(part) for part in parts]}).encode()
    file.write(_LENGTH.pack(len(text)) + text)
    for part in parts:
        file.write(part)
    file.flush()


def read_frame(file: BinaryIO) -> tuple[dict[str, Any], list[bytes]]:
    """Wait for a frame.

    Raises:
        EOFError: if the other side has gone.
    """
    header = json.loads(_exactly(file, _LENGTH.unpack(_exactly(file, 8))[0]))
    return header, [_exactly(file, size) for size in header.pop("sizes")]


def _exactly(file: BinaryIO, size: int) -> bytes:
    found = file.read(size)
    if len(found) != size:
        raise EOFError
    return found


def serve(
    requests: BinaryIO,
    answers: BinaryIO,
    decode: Callable[[str], Clip],
    decode_bytes: Callable[[bytes], Clip],
    records: Callable[[str, int], Iterator[tuple[bytes, list[bytes]]]],
) -> None:
    """Answer until nobody asks any more.

    Args:
        requests: where frames come from.
        answers: where they go.
        decode: reads a file or URL.
        decode_bytes: reads the contents of an audio file.
        records: the line and the audio files of each record of a TFRecord file.
    """
    stream: Iterator[tuple[bytes, list[bytes]]] = iter(())
    while True:
        try:
            request, _ = read_frame(requests)
        except EOFError:
            return
        try:
            if "read" in request:
                header, part = _clip(decode, request["read"])
                write_frame(answers, {"clips": [header]}, [part])
            elif "open" in request:
                stream = records(request["open"], request["skip"])
                write_frame(answers, {"open": True})
            else:
                line, files = next(stream)
                clips = [_clip(decode_bytes, data) for data in files]
                header = {"line": True, "clips": [clip for clip, _ in clips]}
                write_frame(answers, header, [line, *(part for _, part in clips)])
        except StopIteration:
            write_frame(answers, {"end": True})
        except Exception as error:
            write_frame(answers, {"error": reason(error)})


def _clip(decode: Callable[[Any], Clip], source: Any) -> tuple[dict[str, Any], bytes]:
    try:
        samples, rate = decode(source)
        samples = np.ascontiguousarray(as_float(samples), "<f4")
        return {"rate": int(rate), "channels": samples.shape[1]}, samples.tobytes()
    except Exception as error:
        return {"error": reason(error)}, b""


def as_float(samples: np.ndarray) -> np.ndarray:
    """Samples as float32 in [-1, 1]: int16 by 1 / 32768, as libsndfile scales files."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    offset = 128.0 if samples.dtype == np.uint8 else 0.0
    scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
    return ((samples.astype(np.float64) - offset) / scale).astype(np.float32)


def holds_int32(head: bytes) -> bool:
    """Whether a file that starts so is a wav file with whole numbers of 32 bits."""
    at = head.find(b"fmt ") + 8
    if head[:4] != b"RIFF" or at < 8 or len(head) < at + 16:
        return False
    form, bits = struct.unpack("<H12xH", head[at : at + 16])
    if form == 0xFFFE:  # extensible: the real format stands further on
        form = int.from_bytes(head[at + 24 : at + 26], "little")
    return (form, bits) == (1, 32)


def reason(error: Exception) -> str:
    """An error in one line."""
    text = str(getattr(error, "message", "")) or str(error) or type(error).__name__
    text = re.sub(r"\{\{function_node [^}]*\}\}|\[Op:[^]]*\]", "", text)
    return " ".join(text.split())[:300]


# --- TensorFlow ---------------------------------------------------------------------------------


def _tensorflow() -> tuple[dict[str, str], tuple[Callable, Callable, Callable]]:
    """Versions and functions; one operation is run, as importing alone proves nothing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    import tensorflow as tf
    import tensorflow_io as tfio

    def decode(path: str) -> Clip:
        tensor = tfio.audio.AudioIOTensor(path)
        samples = tensor.to_tensor().numpy()
        if samples.dtype == np.float32:
            with tf.io.gfile.GFile(path, "rb") as file:
                if holds_int32(file.read(4096)):  # it takes their bits for those of floats
                    samples = samples.view(np.int32)
        return samples, int(tensor.rate.numpy())

    def decode_bytes(data: bytes) -> Clip:
        # Only files are read with their rate.
        with tempfile.NamedTemporaryFile(suffix=_SUFFIXES.get(data[:4], ".mp3")) as file:
            file.write(data)
            file.flush()
            return decode(file.name)

    def records(path: str, skip: int) -> Iterator[tuple[bytes, list[bytes]]]:
        if not tf.io.gfile.exists(path):
            raise FileNotFoundError(f"no such file: {path}")
        for blob in tf.data.TFRecordDataset(path).skip(skip):
            found = tf.train.Example.FromString(blob.numpy()).features.feature
            lines = list(found["json"].bytes_list.value)
            yield (lines[0] if lines else b""), list(found["audio"].bytes_list.value)

    tone = np.arange(-80, 80, dtype="<i2")
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        36 + 320,
        b"WAVE",
        b"fmt ",
        16,
        1,
        1,
        16_000,
        32_000,
        2,
        16,
        b"data",
        320,
    )
    found, rate = decode_bytes(head + tone.tobytes())
    if rate != 16_000 or not np.array_equal(found[:, 0], tone):
        raise RuntimeError("it does not read what was written")
    versions = {"tensorflow": tf.__version__, "tensorflow_io": tfio.__version__}
    return versions, (decode, decode_bytes, records)


def main() -> None:
    """Serve on standard input and output."""
    # Whatever libraries print must not get between the frames.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Nor must the files beside this one be taken for modules of theirs.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    try:
        versions, functions = _tensorflow()
    except Exception as error:
        write_frame(answers, {"error": f"{type(error).__name__}: {reason(error)}"})
        return
    write_frame(answers, {"ready": versions})
    serve(sys.stdin.buffer, answers, *functions)


if __name__ == "__main__":
    main()
