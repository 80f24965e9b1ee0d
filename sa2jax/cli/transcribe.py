"""Commands that hear: `asr`, `translate`, `caption`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sa2jax.cli import common, wav_output
from sa2jax.cli.common import Files
from sa2jax.cli.options import Model, ModelOptions
from sa2jax.cli.wav_output import MaybeWavOut

if TYPE_CHECKING:
    from sa2jax.pipeline import StepAudio2


def asr(files: Files, options: Model, *, max_new_tokens: int | None = None, json: bool = False):
    """Write down what is said in recordings.

    Args:
        files: Recordings: wav, flac, mp3 or ogg.
        options: Model.
        max_new_tokens: Limit of each text; by default 256 for each 25 s.
        json: Print JSON.
    """
    _text_task(
        files, options, json,
        lambda model, tick: model.transcribe(
            common.paths(files), max_new_tokens=max_new_tokens, progress=tick
        ),
    )  # fmt: skip


def translate(
    files: Files,
    options: Model,
    *,
    to: Literal["zh", "en"] = "zh",
    speech: bool = False,
    text: str | None = None,
    out: MaybeWavOut = None,
    voice: str | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    json: bool = False,
):
    """Write down, or say, in another language what is said in recordings.

    Args:
        files: Recordings: wav, flac, mp3 or ogg; with --speech, one.
        options: Model.
        to: Language.
        speech: Say the translation, too.
        text: What to translate with --speech, instead of a recording.
        out: Recording to write with --speech (wav, 24 kHz, 16 bit).
        voice: Who speaks: name of a voice, a voice file, or a recording of the speaker.
        max_new_tokens: Limit of each text; by default 256 for each 25 s, of speech 2048.
        seed: Same seed, same translation.
        json: Print JSON.
    """
    from sa2jax.errors import PromptError

    if not speech:
        if not (out is text is voice is None):
            raise PromptError("-o, --text and --voice are for a spoken translation: add --speech")
        _text_task(
            files, options, json,
            lambda model, tick: model.translate(
                common.paths(files), to=to, max_new_tokens=max_new_tokens, seed=seed, progress=tick
            ),
        )  # fmt: skip
        return
    if len(files) + (text is not None) != 1:
        raise PromptError("expected one recording, or --text, for a spoken translation")
    if out is None:
        raise PromptError("no file for the spoken translation: give -o")
    from sa2jax.chat.template import Text

    wav_output.check_out(out)
    for path in files:
        common.require_file(path)
    model = options.load()
    reply = model.translate(
        files[0] if files else Text(text or ""), to=to, speech=True, voice=voice or "default",
        max_new_tokens=max_new_tokens, seed=seed,
    )  # fmt: skip
    made = wav_output.reply_summary(reply, out)
    with wav_output.sink(out, model) as write:
        write(reply.audio)
    if json:
        common.print_json(wav_output.as_json(reply, out))
    else:
        print(reply.text.strip())
        common.log(made)


def caption(
    files: Files, options: Model, *, max_new_tokens: int = 256, seed: int = 0, json: bool = False
):
    """Describe what happens in recordings.

    Args:
        files: Recordings: wav, flac, mp3 or ogg.
        options: Model.
        max_new_tokens: Limit of each text.
        seed: Same seed, same description.
        json: Print JSON.
    """
    _text_task(
        files, options, json,
        lambda model, tick: model.caption(
            common.paths(files), max_new_tokens=max_new_tokens, seed=seed, progress=tick
        ),
    )  # fmt: skip


def _text_task(
    files: Sequence[Path],
    options: ModelOptions,
    as_json: bool,
    run: Callable[["StepAudio2", Callable[[int, int], None]], list[str]],
) -> None:
    """Run a task with one text per recording and print the texts."""
    from sa2jax.errors import AudioError

    if not files:
        raise AudioError("no recordings: expected at least one wav, flac, mp3 or ogg file")
    for path in files:
        common.require_file(path)
    model = options.load()
    with common.progress_bar("listening", unit="recordings") as tick:
        texts = run(model, tick)
    if as_json:
        common.print_json([{"file": str(f), "text": t} for f, t in zip(files, texts, strict=True)])
        return
    for path, text in zip(files, texts, strict=True):
        print(text if len(files) == 1 else f"{path}\t{text}")
