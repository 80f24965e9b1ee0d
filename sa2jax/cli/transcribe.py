"""Commands of speech understanding: `asr`, `translate`, `caption`."""

from typing import TYPE_CHECKING, Any, Literal

from sa2jax.cli.common import Files
from sa2jax.cli.options import Generation, Model, Sound
from sa2jax.cli.run import run_spoken, run_written
from sa2jax.cli.wav_output import MaybeWavOut

if TYPE_CHECKING:
    from sa2jax.pipeline import StepAudio2
    from sa2jax.pipeline.reply import Reply


def asr(
    files: Files,
    options: Model,
    sound: Sound,
    *,
    max_new_tokens: int | None = None,
    json: bool = False,
):
    """Write down what is said in recordings.

    Args:
        files: Recordings: wav, flac, mp3 or ogg.
        options: Model.
        sound: Recordings.
        max_new_tokens: Limit of the text of each segment of at most 25 s; by default 256.
        json: Print JSON.
    """
    run_written(files, options, sound, "asr", json, max_new_tokens=max_new_tokens)


def translate(
    files: Files,
    options: Model,
    sound: Sound,
    *,
    to: Literal["zh", "en"] = "zh",
    speech: bool = False,
    text: str | None = None,
    out: MaybeWavOut = None,
    generation: Generation,
):
    """Write down, or say, in another language what is said in recordings.

    A text has by default at most 256 tokens for each segment of 25 s, speech 2048.

    Args:
        files: Recordings: wav, flac, mp3 or ogg; with --speech, one.
        options: Model.
        sound: Recordings.
        to: Language.
        speech: Say the translation, too.
        text: What to translate with --speech, instead of a recording.
        out: Recording to write with --speech (wav, 24 kHz, 16 bit).
        generation: Reply.
    """
    from sa2jax.errors import PromptError

    speaker = generation.speaker()

    def speak(model: "StepAudio2", source: Any) -> "Reply":
        voice = speaker or "default"
        return model.translate_speech(source, to=to, voice=voice, **generation.limits())

    if not speech:
        if not (out is text is generation.voice is None):
            raise PromptError("-o, --text and --voice are for a spoken translation: add --speech")
        run_written(files, options, sound, f"s2tt_{to}", generation.json, **generation.limits())
        return
    run_spoken(files, options, sound, text, out, generation.json, speak)


def caption(
    files: Files,
    options: Model,
    sound: Sound,
    *,
    max_new_tokens: int = 256,
    seed: int = 0,
    json: bool = False,
):
    """Describe what happens in recordings.

    Args:
        files: Recordings: wav, flac, mp3 or ogg.
        options: Model.
        sound: Recordings.
        max_new_tokens: Limit of each text.
        seed: Same seed, same description.
        json: Print JSON.
    """
    limits = {"max_new_tokens": max_new_tokens, "seed": seed}
    run_written(files, options, sound, "caption", json, **limits)
