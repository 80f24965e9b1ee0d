"""Readers of recordings for `sa2jax data prepare`: libsndfile in process, tensorflow-io outside.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.

tensorflow-io cannot be installed beside jax, so it runs in an environment of its own, as a process
that is asked for one file after another (`tfio_reader`). It opens what libsndfile does not,
URLs such as gs:// and TFRecord files; resampling and features are this library's either way.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from sa2jax.errors import AudioError, DataError
from sa2jax.train.data import tfio_reader
from sa2jax.train.data.tfio_reader import read_frame, write_frame

Sound = tuple[np.ndarray, int]
"""Samples [C, T] and their rate in Hz, as `audio.load_audio` takes them."""

MAKE_ENVIRONMENT = (
    "make it with `python3.11 -m venv tfio; tfio/bin/pip install -r requirements-tfio.txt` and "
    "give --tfio-python tfio/bin/python"
)


@dataclass(frozen=True)
class TfRecord:
    """One record of a TFRecord file.

    Attributes:
        line: its line of jsonl.
        clips: its recordings, or why one cannot be read.
    """

    line: bytes
    clips: tuple[Sound | AudioError, ...]


class TfioReader:
    """tensorflow-io in another environment; a context, as its process must be ended.

    Args:
        python: the environment's interpreter.

    Raises:
        DataError: if there is no such environment, or it does not work.
    """

    def __init__(self, python: str | Path | None):
        if python is None:
            raise DataError(f"--reader tfio needs an environment of its own: {MAKE_ENVIRONMENT}")
        if not Path(python).is_file():
            raise DataError(f"no interpreter {python}: {MAKE_ENVIRONMENT}")
        self.python = Path(python)
        self.versions: Any = {}  # of TensorFlow and tensorflow-io
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def read(self, path: str) -> Sound:
        """Read a file or URL.

        Raises:
            AudioError: if it cannot be read.
            DataError: if the reader does not work any more.
        """
        try:
            header, parts = self._ask({"read": path})
        except EOFError:
            self._start()  # one broken file must not end the others
            raise AudioError(f"{path} cannot be read: tensorflow-io crashed on it") from None
        if "error" in header:
            raise DataError(f"the reader of {self.python} failed: {header['error']}")
        clip = _clip(header["clips"][0], parts[0], path)
        if isinstance(clip, AudioError):
            raise clip
        return clip

    def records(self, path: str) -> Iterator[TfRecord | AudioError]:
        """The records of a TFRecord file; an error for one that made the process crash.

        Each is a `tf.train.Example` with the features `json`, a line of jsonl, and `audio`, the
        contents of an audio file for each of its `audios`.

        Raises:
            DataError: if the file cannot be read.
        """
        done, crashed = 0, False
        self._open(path, done)
        while True:
            try:
                header, parts = self._ask({"next": True})
            except EOFError:
                if crashed:  # it is not one record that is broken
                    raise self._crash(path) from None
                crashed = True
                self._start()
                self._open(path, done + 1)
                yield AudioError("tensorflow-io crashed on it")
            else:
                crashed = False
                if "end" in header:
                    return
                if "error" in header:
                    raise DataError(
                        f"{path} cannot be read as TFRecord after {done} records: {header['error']}"
                    )
                line, *sounds = parts
                yield TfRecord(
                    line,
                    tuple(
                        _clip(clip, data, f"audio {n}")
                        for n, (clip, data) in enumerate(zip(header["clips"], sounds, strict=True))
                    ),
                )
            done += 1

    def _open(self, path: str, skip: int) -> None:
        try:
            header, _ = self._ask({"open": path, "skip": skip})
        except EOFError:
            raise self._crash(path) from None
        if "error" in header:
            raise DataError(f"{path} cannot be read as TFRecord: {header['error']}")

    def _crash(self, path: str) -> DataError:
        return DataError(f"tensorflow-io crashed on {path}{self._last_words()}")

    def _start(self) -> None:
        self._stop()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [self.python, tfio_reader.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                process_group=0,  # Ctrl-C is for us; it ends when its input does
            )
            header, _ = read_frame(self._process.stdout)  # type: ignore[arg-type]
        except OSError as error:
            raise DataError(f"{self.python} cannot be run ({error}): {MAKE_ENVIRONMENT}") from None
        except (EOFError, ValueError):
            header = {"error": f"it ends at once{self._last_words()}"}
        if "ready" not in header:
            self._stop()
            raise DataError(
                f"the environment of {self.python} does not work ({header.get('error')}): "
                f"{MAKE_ENVIRONMENT}"
            )
        self.versions = header["ready"]

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        process = self._process
        try:
            write_frame(process.stdin, request)  # type: ignore[arg-type]
        except BrokenPipeError:
            raise EOFError from None
        return read_frame(process.stdout)  # type: ignore[arg-type]

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def _stop(self) -> None:
        process = self.__dict__.pop("_process", None)
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # it had gone before it read all
                pipe.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._errors.close()


def _clip(header: dict[str, Any], data: bytes, name: str) -> Sound | AudioError:
    if "error" in header:
        return AudioError(f"{name} cannot be read by tensorflow-io: {header['error']}")
    if not data:
        return AudioError(f"expected audio, but {name} holds no samples")
    samples = np.frombuffer(data, "<f4").reshape(-1, header["channels"])
    return np.ascontiguousarray(samples.T), header["rate"]
