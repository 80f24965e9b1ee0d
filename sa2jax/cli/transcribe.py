"""Commands of speech understanding: `asr`, `translate`, `caption`."""

from typing import Literal

from sa2jax.cli import common
from sa2jax.cli.common import Files
from sa2jax.cli.options import Model
from sa2jax.cli.run import run_spoken, run_written
from sa2jax.cli.wav_output import MaybeWavOut


def asr(files: Files, options: Model, *, max_new_tokens: int | None = None, json: bool = False):
    """Write down what is said in recordings.

    Args:
        files: Recordings: wav, flac, mp3 or ogg.
        options: Model.
        max_new_tokens: Limit of each text; by default 256 for each 25 s.
        json: Print JSON.
    """
    run_written(
        files,
        options,
        json,
        lambda model, progress: model.transcribe_batch(
            common.paths(files), max_new_tokens=max_new_tokens, progress=progress
        ),
    )


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
        run_written(
            files,
            options,
            json,
            lambda model, progress: model.translate_batch(
                common.paths(files),
                to=to,
                max_new_tokens=max_new_tokens,
                seed=seed,
                progress=progress,
            ),
        )
        return
    run_spoken(
        files,
        options,
        text,
        out,
        json,
        lambda model, source: model.translate_speech(
            source, to=to, voice=voice or "default", max_new_tokens=max_new_tokens, seed=seed
        ),
    )


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
    run_written(
        files,
        options,
        json,
        lambda model, progress: model.caption_batch(
            common.paths(files), max_new_tokens=max_new_tokens, seed=seed, progress=progress
        ),
    )
