"""The command `run` for any prompt task, and what commands of tasks share."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sa2jax.cli import common, wav_output
from sa2jax.cli.common import Files
from sa2jax.cli.options import Generation, Model, ModelOptions, Sound, SoundOptions
from sa2jax.cli.wav_output import MaybeWavOut

if TYPE_CHECKING:
    from sa2jax.chat.template import PromptTask
    from sa2jax.pipeline import StepAudio2
    from sa2jax.pipeline.reply import Reply

TaskName = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TASK")]]


def run(
    task: TaskName,
    files: Files,
    options: Model,
    sound: Sound,
    *,
    text: str | None = None,
    question: str = "",
    out: MaybeWavOut = None,
    generation: Generation,
):
    """Run a prompt task, any of those in `sa2jax/chat/template.py`, over recordings or a text.

    Args:
        task: Name of the task, such as asr or s2tt_en; another name lists all.
        files: Recordings: wav, flac, mp3 or ogg; for a spoken task, one.
        options: Model.
        sound: Recordings.
        text: A text in place of recordings.
        question: Text that follows each recording.
        out: Recording to write (wav, 24 kHz, 16 bit); for spoken tasks only.
        generation: Reply.
    """
    from sa2jax.chat.template import Text
    from sa2jax.errors import PromptError
    from sa2jax.pipeline.task_runner import find_task

    chosen = find_task(task)
    if text is not None and files:
        raise PromptError("expected recordings or --text, not both")

    speaker = generation.speaker()

    def replies(model: "StepAudio2", sources: Sequence[Any], **how: Any) -> "list[Reply]":
        return model.run(chosen, sources, question=question, **generation.limits(), **how)

    def speak(model: "StepAudio2", source: Any) -> "Reply":
        return replies(model, [source], voice=speaker or "default")[0]

    if chosen.spoken:
        run_spoken(files, options, sound, text, out, generation.json, speak)
        return
    if not (out is generation.voice is None):
        raise PromptError(f"the task {task} is written: leave -o and --voice out")
    if text is not None:
        (reply,) = replies(options.load(), [Text(text)])
        common.print_json(_written_json(reply)) if generation.json else print(reply.text)
        common.log_notes(None, reply.notes)
        return
    how = {"question": question} | generation.limits()
    run_written(files, options, sound, chosen, generation.json, **how)


def run_written(
    files: Sequence[Path],
    options: ModelOptions,
    sound: SoundOptions,
    task: "str | PromptTask",
    as_json: bool,
    **arguments: Any,
) -> None:
    """Run a written task over recordings and print a text for each.

    Those that cannot be read are named at the end, with exit code 1.

    Args:
        files: the recordings.
        options: which model.
        sound: what is heard of them.
        task: the task, or its name.
        as_json: print JSON.
        arguments: what `StepAudio2.run` takes beside them.
    """
    from sa2jax.errors import AudioError

    errors = common.require_files(files)
    there = [path for path in files if path not in errors]
    model = options.load()
    with common.progress_bar("listening", unit="recordings") as progress:
        heard = sound.sources(there)
        made = model.run(task, heard, skip_unreadable=True, progress=progress, **arguments)
    replies = dict(zip(there, made, strict=True))
    for path, reply in replies.items():
        if reply.finish_reason == "error":
            errors[path] = AudioError(" ".join(reply.notes))
        else:
            common.log_notes(path, reply.notes)
    common.exit_if_none(errors, files)
    if as_json:
        common.print_json(
            [
                {"file": str(path)}
                | ({"error": str(errors[path])} if path in errors else _written_json(replies[path]))
                for path in files
            ]
        )
    else:
        for path in files:
            if path not in errors:
                text = replies[path].text
                print(text if len(files) == 1 else f"{path}\t{text}")
    common.exit_for_errors(errors)


def _written_json(reply: "Reply") -> dict[str, Any]:
    """A written answer for JSON."""
    found = {key: getattr(reply, key) for key in ("text", "finish_reason", "notes")}
    return found | {"segments": [asdict(segment) for segment in reply.segments]}


def run_spoken(
    files: Sequence[Path],
    options: ModelOptions,
    sound: SoundOptions,
    text: str | None,
    out: Path | None,
    as_json: bool,
    task: Callable[["StepAudio2", Any], "Reply"],
) -> None:
    """Run a spoken task over one recording or text, write its speech and print its text.

    Args:
        files: the recording, if that is the source.
        options: which model.
        sound: what is heard of it.
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
    reply = task(model, sound.source(files[0]) if files else Text(text or ""))
    summary = wav_output.reply_summary(reply, out)
    common.log_notes(files[0] if files else None, reply.notes)
    with wav_output.sink(out, model) as write_samples:
        write_samples(reply.audio)
    if as_json:
        common.print_json(wav_output.as_json(reply, out))
    else:
        print(reply.text.strip())
        common.log(summary)
