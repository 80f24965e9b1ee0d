"""Streaming audio output: a wav file, or raw samples down a pipe."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    import numpy as np

    from sa2jax.pipeline.base import PipelineBase
    from sa2jax.pipeline.reply import Reply

PIPE = Path("-")  # standard output
_out = tyro.conf.arg(aliases=["-o"], metavar="WAV")
WavOut = Annotated[Path, _out]
MaybeWavOut = Annotated[Path | None, _out]
Write = Callable[["np.ndarray"], Any]


def check_out(out: Path) -> None:
    """Refuse before anything is loaded what could not be written in the end.

    Raises:
        AudioError: for another suffix or a missing folder.
    """
    from sa2jax.errors import AudioError

    if out.suffix.lower() != ".wav":
        raise AudioError(f"expected a file name ending in .wav, got {out}; rename it")
    if not os.path.isdir(out.absolute().parent):
        raise AudioError(f"no folder {out.parent}: make it first")


def check_out_or_pipe(out: Path, *, stream: bool) -> None:
    """The same where `-` stands for raw samples on standard output, as they come.

    Raises:
        AudioError: as `check_out`, or for a pipe without `stream` or to a terminal.
    """
    from sa2jax.errors import AudioError

    if out != PIPE:
        check_out(out)
    elif not stream:
        raise AudioError("-o - is for sound as it comes: add --stream, or name a wav file")
    elif sys.stdout.isatty():
        raise AudioError("-o - writes raw samples: pipe them into a player, or name a wav file")


@contextmanager
def sink(out: Path | None, model: "PipelineBase") -> Iterator[Write]:
    """Takes samples [-1, 1] as they come and writes them with 16 bit, mono.

    A wav file is there when it is complete; never if there was no sound, or an error came.

    Args:
        out: a wav file, `PIPE`, or None for nowhere.
        model: who speaks.

    Raises:
        AudioError: if the file cannot be written.
    """
    if out is None:
        yield lambda samples: None
    elif out == PIPE:
        yield partial(_write_pipe, parity=model.parity)
    else:
        import soundfile

        from sa2jax import audio
        from sa2jax.atomic_io import make_temporary

        with _disk_errors(out):
            temporary = make_temporary(out)
        try:
            with _disk_errors(out):
                file = soundfile.SoundFile(
                    temporary, "w", model.sample_rate, 1, "PCM_16", format="WAV"
                )

            def write(samples: "np.ndarray") -> None:
                with _disk_errors(out):
                    file.write(audio.pcm_16(samples, parity=model.parity))

            try:
                yield write
            finally:
                with _disk_errors(out):
                    file.close()
            if file.frames:
                with _disk_errors(out):
                    os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)


def speech_summary(out: Path, seconds: float, voice: str | None, took: float) -> str:
    """One line about a recording that was written: its length, its voice, the time it took."""
    name = "" if out == PIPE else f"{out}: "
    return f"{name}{seconds:.2f} s in the voice {voice}, made in {took:.1f} s"


def reply_summary(reply: "Reply", out: Path) -> str:
    """The same of an answer.

    Raises:
        AudioError: if it has no sound.
    """
    from sa2jax.errors import AudioError

    if not len(reply.audio) or reply.timings is None:
        why = " ".join(["the model spoke no words, so there is no recording", *reply.notes[:1]])
        raise AudioError(why if reply.notes else f"{why}: try another --seed")
    return speech_summary(out, reply.timings.speech, reply.voice, reply.timings.total)


def as_json(reply: "Reply", out: Path | None) -> dict[str, Any]:
    """An answer without its sound, but with the name of its file."""
    keys = ("text", "ids", "finish_reason", "thinking", "codes", "notes")
    return {key: getattr(reply, key) for key in keys} | {
        "tool_calls": [asdict(call) for call in reply.tool_calls],
        "timings": None if reply.timings is None else asdict(reply.timings),
        "file": str(out) if out is not None and len(reply.audio) else None,
    }


def _write_pipe(samples: "np.ndarray", *, parity: bool) -> None:
    from sa2jax import audio

    sys.stdout.buffer.write(audio.pcm_16(samples, parity=parity).astype("<i2").tobytes())
    sys.stdout.buffer.flush()


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    import soundfile

    from sa2jax.errors import AudioError

    try:
        yield
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"cannot write {out} ({error}); check the folder and its space") from None
