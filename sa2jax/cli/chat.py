"""Commands that answer and read aloud: `chat`, `tts`."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sa2jax.cli import chat_session, common, wav_output
from sa2jax.cli.common import Files
from sa2jax.cli.options import Generation, Model, Sound, Speaker
from sa2jax.cli.wav_output import PIPE, MaybeWavOut, WavOut

if TYPE_CHECKING:
    from sa2jax.pipeline.reply import Reply

MaybeText = tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[FILE.txt]")]]


def chat(
    files: Files,
    options: Model,
    sound: Sound,
    *,
    text: str | None = None,
    system: str = "You are a helpful assistant.",
    out: MaybeWavOut = None,
    plot: Path | None = None,
    stream: bool = False,
    first: int | None = None,
    tools: Path | None = None,
    history: Path | None = None,
    think: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float = 1.05,
    generation: Generation,
):
    """Ask by recordings, text or both, and get an answer as text or speech.

    Without a question, a conversation is held: each line of standard input is one, `/help` tells
    more. An answer has by default at most 1024 tokens if written and 4096 if spoken.

    Args:
        files: Recordings that belong to the question.
        options: Model.
        sound: Recordings.
        text: Written part of the question; it follows the recordings.
        system: System prompt.
        out: Speak the answer into this file (wav, 24 kHz, 16 bit); with --stream, `-` writes raw
            samples (16 bit, mono, 24 kHz) to standard output, and text to stderr. The answers of a
            conversation are numbered: reply-1.wav, reply-2.wav.
        plot: Draw question and spoken answer, waves and mel spectra, into this file (.png).
        stream: Print and write the answer as it comes.
        first: Codes of the first chunk of sound (25 are a second); fewer begin sooner.
        tools: JSON file with a list of the schemas of what the model may call.
        history: Conversation (.json) to go on with, if there is one, and to be kept.
        think: Let a Think model think first; the thoughts go to stderr.
        temperature: Divides the logits, 0 for the most likely answer.
        top_p: Keep the most likely tokens that together reach this probability.
        top_k: Keep this many most likely tokens, 0 for all.
        repetition_penalty: Above 1, repeating becomes less likely.
        generation: Reply.
    """
    from sa2jax.chat.template import Text
    from sa2jax.cli.plot import make_plotter
    from sa2jax.errors import PromptError
    from sa2jax.inference.requests import GenerationConfig
    from sa2jax.inference.sampling import SamplingParams

    interactive = not files and text is None
    if generation.json and (interactive or out == PIPE):
        raise PromptError("--json is for one answer: give a recording or --text, and no -o -")
    if generation.voice is not None and out is None and not interactive:
        raise PromptError("a voice, but no file for what it says: give -o")
    speaker = None if interactive and generation.voice is None else generation.speaker()
    if plot is not None and (out is None or interactive):
        raise PromptError("--plot is of one spoken answer: give a question, and -o")
    plotter = None if plot is None else make_plotter(plot)
    if first is not None and first < 1:
        raise PromptError(f"expected a first chunk of at least 1 code, got {first}")
    if history is not None and history.suffix != ".json":
        raise PromptError(f"expected a conversation's name to end in .json, got {history}")
    if out is not None:
        wav_output.check_out_or_pipe(out, stream=stream or interactive)
    sampling = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty
    )
    limit = generation.max_new_tokens
    config = GenerationConfig(
        sampling=sampling, max_new_tokens=1024 if limit is None else limit, seed=generation.seed
    )
    schemas = None if tools is None else _read_tools(tools)
    for path in files:
        common.require_file(path)
    model = options.load()
    held = model.chat(system, voice=speaker, tools=schemas, think=think, options=config)
    screen = sys.stderr if out == PIPE else sys.stdout
    live = chat_session.LiveChat(
        held,
        text=screen if (stream or interactive) and not generation.json else None,
        first=first,
        limit=limit,
        history=history,
        interactive=interactive,
    )
    if history is not None and os.path.exists(history):
        line = live.resume(history)
        if interactive:
            common.log(line)
    if out is not None and held.voice is None:
        held.voice = "default"
    if interactive:
        chat_session.Repl(live, out or Path("reply.wav"), sound, generation).run()
        return
    heard = sound.sources(files)
    reply = live.ask([*heard, *([Text(text)] if text is not None else [])], out)
    if generation.json:
        common.print_json(wav_output.as_json(reply, out))
    else:
        if not stream:
            _print(reply)
        if calls := chat_session.unanswered(reply):
            print(*map(chat_session.call_text, calls), sep="\n", file=screen)
            common.log("nobody ran these calls; in a conversation you are asked for the results")
        chat_session.print_summary(reply, out, times=stream or out is not None)
    if plotter is not None:
        plotter(reply, heard)
        common.log(f"plot: {plot}")
    live.save()


def tts(
    options: Model,
    file: MaybeText = None,
    *,
    out: WavOut,
    text: str | None = None,
    speaker: Speaker,
    stream: bool = False,
    max_new_tokens: int | None = None,
    seed: int = 0,
):
    """Read a text aloud.

    Args:
        options: Model.
        file: File with the text, `-` for standard input.
        out: Recording to write (wav, 24 kHz, 16 bit); with --stream, `-` writes raw samples (16
            bit, mono, 24 kHz) to standard output.
        text: The text itself, instead of a file.
        speaker: Reply.
        stream: Write the speech as it comes.
        max_new_tokens: Limit; a second of speech takes 31, by default 2048.
        seed: Same seed, same reading.
    """
    from sa2jax.errors import PromptError

    if (file is None) == (text is None):
        raise PromptError("expected one text: give a file or --text")
    if stream and options.prompt_style == "base":
        raise PromptError("a base model cannot read aloud with --stream: leave it out")
    wav_output.check_out_or_pipe(out, stream=stream)
    voice = speaker.speaker() or "default"
    words = _read_text(file) if file is not None else text or ""
    model = options.load()
    if stream:
        from sa2jax.chat.template import TASKS, Text
        from sa2jax.pipeline.task_runner import task_options

        task = TASKS["tts"]
        limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
        generation = replace(task_options(task), seed=seed)
        held = model.chat(task.system, voice=voice, options=generation)
        reply = chat_session.LiveChat(held, text=None, limit=limit).ask([Text(words)], out)
    else:
        reply = model.tts(words, voice, max_new_tokens=max_new_tokens, seed=seed)
        with wav_output.sink(out, model) as write:
            write(reply.audio)
    common.log_notes(None, reply.notes)
    print(wav_output.reply_summary(reply, out), file=sys.stderr if out == PIPE else sys.stdout)


def _print(reply: "Reply") -> None:
    if reply.thinking:
        common.log(reply.thinking.strip())
    if reply.text or not reply.tool_calls:
        print(reply.text.strip())


def _read_tools(path: Path) -> str:
    """The JSON text of a list of schemas.

    Raises:
        PromptError: if it is none.
    """
    from sa2jax.chat.toolbox import Toolbox
    from sa2jax.errors import PromptError

    text = _read_text(path)
    try:
        Toolbox(text)
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from None
    return text


def _read_text(path: Path) -> str:
    from sa2jax.errors import FileError, PromptError
    from sa2jax.files.raw import read_text

    try:
        return sys.stdin.read() if path == PIPE else read_text(path)
    except FileError as error:
        raise PromptError(f"{path} cannot be read ({error.reason}): expected text") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} cannot be read ({error.reason}): expected UTF-8") from None
