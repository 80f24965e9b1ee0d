"""The command `run` for any prompt task, and what commands of tasks share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sa2jax.cli import common, wav_output
from sa2jax.cli.common import Files
from sa2jax.cli.options import Model, ModelOptions
from sa2jax.cli.wav_output import MaybeWavOut

if TYPE_CHECKING:
    from sa2jax.pipeline import StepAudio2
    from sa2jax.pipeline.reply import Reply

TaskName = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TASK")]]


def run(
    task: TaskName,
    files: Files,
    options: Model,
    *,
    text: str | None = None,
    question: str = "",
    out: MaybeWavOut = None,
    voice: str | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    json: bool = False,
):
    """Run a prompt task, any of those in `sa2jax/chat/template.py`, over recordings or a text.

    Args:
        task: Name of the task, such as asr or s2tt_en; another name lists all.
        files: Recordings: wav, flac, mp3 or ogg; for a spoken task, one.
        options: Model.
        text: A text in place of recordings.
        question: Text that follows each recording.
        out: Recording to write (wav, 24 kHz, 16 bit); for spoken tasks only.
        voice: Who speaks: name of a voice, a voice file, or a recording of the speaker.
        max_new_tokens: Limit of each answer, by default the task's.
        seed: Same seed, same answer.
        json: Print JSON.
    """
    from sa2jax.chat.template import Text
    from sa2jax.errors import PromptError
    from sa2jax.pipeline.task_runner import find_task

    chosen = find_task(task)
    if text is not None and files:
        raise PromptError("expected recordings or --text, not both")
    if chosen.spoken:
        run_spoken(
            files,
            options,
            text,
            out,
            json,
            lambda model, source: model.run(
                chosen,
                [source],
                question=question,
                voice=voice or "default",
                max_new_tokens=max_new_tokens,
                seed=seed,
            )[0],
        )
        return
    if not (out is voice is None):
        raise PromptError(f"the task {task} is written: leave -o and --voice out")
    if text is not None:
        model = options.load()
        (reply,) = model.run(
            chosen, [Text(text)], question=question, max_new_tokens=max_new_tokens, seed=seed
        )
        common.print_json({"text": reply.text}) if json else print(reply.text)
        return
    run_written(
        files,
        options,
        json,
        lambda model, progress: [
            reply.text
            for reply in model.run(
                chosen,
                common.paths(files),
                question=question,
                max_new_tokens=max_new_tokens,
                seed=seed,
                progress=progress,
            )
        ],
    )


def run_written(
    files: Sequence[Path],
    options: ModelOptions,
    as_json: bool,
    task: Callable[["StepAudio2", Callable[[int, int], None]], list[str]],
) -> None:
    """Run a written task over recordings and print a text for each.

    Args:
        files: the recordings.
        options: which model.
        as_json: print JSON.
        task: gives the texts, from the model and a progress callback.
    """
    from sa2jax.errors import AudioError

    if not files:
        raise AudioError("no recordings: expected at least one wav, flac, mp3 or ogg file")
    for path in files:
        common.require_file(path)
    model = options.load()
    with common.progress_bar("listening", unit="recordings") as progress:
        texts = task(model, progress)
    if as_json:
        common.print_json([{"file": str(f), "text": t} for f, t in zip(files, texts, strict=True)])
        return
    for path, text in zip(files, texts, strict=True):
        print(text if len(files) == 1 else f"{path}\t{text}")


def run_spoken(
    files: Sequence[Path],
    options: ModelOptions,
    text: str | None,
    out: Path | None,
    as_json: bool,
    task: Callable[["StepAudio2", Any], "Reply"],
) -> None:
    """Run a spoken task over one recording or text, write its speech and print its text.

    Args:
        files: the recording, if that is the source.
        options: which model.
        text: the text, if that is the source.
        out: the wav file.
        as_json: print JSON.
        task: gives the reply, from the model and the source.
    """
    from sa2jax.chat.template import Text
    from sa2jax.errors import PromptError

    if len(files) + (text is not None) != 1:
        raise PromptError("expected one recording, or --text, for a spoken answer")
    if out is None:
        raise PromptError("no file for the spoken answer: give -o")
    wav_output.check_out(out)
    for path in files:
        common.require_file(path)
    model = options.load()
    reply = task(model, files[0] if files else Text(text or ""))
    summary = wav_output.reply_summary(reply, out)
    with wav_output.sink(out, model) as write_samples:
        write_samples(reply.audio)
    if as_json:
        common.print_json(wav_output.as_json(reply, out))
    else:
        print(reply.text.strip())
        common.log(summary)
