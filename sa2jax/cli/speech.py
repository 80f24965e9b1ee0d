"""Commands of speech alone: `vocode`, `tokenize`, `reconstruct`, `voice add|list|show`."""

import json as json_module
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sa2jax.cli import common, wav_output
from sa2jax.cli.common import Devices, Files
from sa2jax.cli.options import Hearing, Sound, Speaker, voice_source
from sa2jax.cli.wav_output import WavOut

if TYPE_CHECKING:
    from sa2jax.speech import Speech

Name = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
Recording = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="WAV")]]
CodesFile = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CODES")]]


@dataclass(frozen=True, kw_only=True)
class ModelFolderOptions:
    """Where the detokenizer and its voices are."""

    model: Path | None = None
    """Model folder made by `sa2jax convert`, a released one, its token2wav folder alone, or `nano`;
    by default the latter, a small model for demonstrations, where the installation has it."""
    parity: bool = False
    """Stream, tokenise and analyse voices exactly as the official code does, quirks included."""

    @property
    def folder(self) -> Path:
        """The folder."""
        return common.model_or_default(self.model)


@dataclass(frozen=True, kw_only=True)
class SpeechOptions(ModelFolderOptions, Devices):
    """Which detokenizer to use, and how."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the flow."""
    steps: int = 10
    """Euler steps of the flow: fewer are faster and rougher."""
    guidance: float | None = None
    """Weight of what voice and codes change; by default the checkpoint's."""
    stream: bool = False
    """Speak in chunks, as in a conversation, instead of in one piece."""
    chunk: int = 25
    """Codes of a chunk; 25 are a second."""
    seed: int = 0
    """Same seed, same sound."""

    def load(self) -> "Speech":
        """Open the detokenizer."""
        self.join_hosts()
        from sa2jax.speech import Speech

        return Speech.from_pretrained(
            self.folder,
            parity=self.parity,
            dtype=self.dtype,
            steps=self.steps,
            guidance=self.guidance,
            mesh=self.mesh,
        )


Folder = Annotated[ModelFolderOptions, tyro.conf.arg(name="")]
Options = Annotated[SpeechOptions, tyro.conf.arg(name="")]


def vocode(codes: CodesFile, options: Options, speaker: Speaker, *, out: WavOut):
    """Speak audio codes: a JSON list of numbers, as `sa2jax tokenize` prints it.

    Args:
        codes: File with the codes, `-` for standard input.
        options: Model.
        speaker: Reply.
        out: Recording to write (wav, 24 kHz, 16 bit).
    """
    voice = speaker.speaker() or "default"
    line = _read_codes(codes)
    wav_output.check_out(out)
    speech = options.load()
    _speak(speech, line, speech.voice(voice), options, out)


def tokenize(files: Files, options: Folder, sound: Sound, *, json: bool = False):
    """Print the audio codes (25 per second) of recordings.

    Args:
        files: Recordings: wav, flac, mp3 or ogg.
        options: Model.
        sound: Recordings.
        json: Print a JSON object for each file, also if there is only one.
    """
    from sa2jax import audio
    from sa2jax.errors import AudioError

    errors = common.require_files(files)
    analyzer = _open(options).folder.analyzer
    mels = {}
    for path in files:
        try:
            if path not in errors:
                mels[path] = analyzer.mel_of(audio.load_audio(sound.source(path)))
        except AudioError as error:
            errors[path] = error
    common.exit_if_none(errors, files)
    codes = dict(zip(mels, analyzer.codes_of_mels(list(mels.values())), strict=True))
    if len(files) == 1 and not json:
        print(json_module.dumps(codes[files[0]].tolist()))
    else:
        results = [
            {"file": str(path)}
            | ({"error": str(errors[path])} if path in errors else {"codes": codes[path].tolist()})
            for path in files
        ]
        print(json_module.dumps(results if len(files) > 1 else results[0]))
    common.exit_for_errors(errors)


def reconstruct(wav: Recording, options: Options, sound: Sound, *, out: WavOut):
    """Turn a recording into codes and back, in its own voice.

    Args:
        wav: Recording: wav, flac, mp3 or ogg, of at least 1 s.
        options: Model.
        sound: Recording.
        out: Recording to write (wav, 24 kHz, 16 bit).
    """
    common.require_file(wav)
    wav_output.check_out(out)
    speech = options.load()
    codes, voice = speech.analyze(sound.source(wav))
    _speak(speech, codes, voice, options, out)


def _add(name: Name, wav: Recording, options: Folder, sound: Sound, *, overwrite: bool = False):
    """Make a voice of a recording of 1 to 30 s.

    Args:
        name: What to call it.
        wav: Recording of one speaker: wav, flac, mp3 or ogg, any rate and channels.
        options: Model.
        sound: Recording.
        overwrite: Replace a voice of this name.
    """
    common.require_file(wav)
    added = _speech_folder(options).add(name, sound.source(wav), overwrite=overwrite)
    print(f"{added.name}: {added.seconds:.1f} s, {len(added.codes)} codes")


def _list(options: Folder, *, json: bool = False):
    """List the voices of a model.

    Args:
        options: Model.
        json: Print JSON.
    """
    known = _speech_folder(options).voices
    if json:
        common.print_json({name: str(path) for name, path in known.items()})
    else:
        for name, path in known.items():
            print(f"{name}\t{path}")


def _show(name: Name, options: Folder, hearing: Hearing, *, json: bool = False):
    """Show what is known of a voice.

    Args:
        name: Name of a voice, a voice file, or a recording.
        options: Model.
        hearing: Recording.
        json: Print JSON.
    """
    from sa2jax.speech.voices import describe

    wanted = voice_source(name, hearing.channel, "--channel") or name
    facts = describe(_speech_folder(options).voice(wanted))
    if json:
        common.print_json(facts)
    else:
        for title, fact in facts.items():
            print(f"{title}\t{fact}")


# Each action is run where it is parsed, as the value of `action`.
def voice(
    action: Annotated[
        Annotated[Any, tyro.conf.subcommand(name="add", constructor=_add)]
        | Annotated[Any, tyro.conf.subcommand(name="list", constructor=_list)]
        | Annotated[Any, tyro.conf.subcommand(name="show", constructor=_show)],
        tyro.conf.arg(name=""),
    ],
):
    """Make, list and show voices.

    Args:
        action: What to do.
    """


def _open(options: ModelFolderOptions) -> "Speech":
    from sa2jax.speech import Speech

    return Speech.from_pretrained(options.folder, parity=options.parity)


def _speech_folder(options: ModelFolderOptions) -> Any:
    return _open(options).folder


def _speak(speech: "Speech", codes: Any, voice: Any, options: SpeechOptions, out: Path) -> None:
    """Write what the codes sound like, and say how long it is."""
    import time

    import numpy as np

    from sa2jax import audio

    started = time.perf_counter()
    wave: np.ndarray
    if options.stream:
        with common.progress_bar("speaking", unit="chunks") as progress:
            stream: Iterable[np.ndarray] = speech.stream(
                codes, voice, chunk=options.chunk, seed=options.seed
            )
            pieces = []
            for piece in stream:
                pieces.append(piece)
                progress(len(pieces), -(-len(codes) // options.chunk))
        wave = np.concatenate(pieces)
    else:
        wave = speech.vocode(codes, voice, seed=options.seed)
    pcm = audio.pcm_16(wave, parity=options.parity)
    audio.write_wav(out, pcm, speech.sample_rate, subtype="PCM_16")
    length, took = len(wave) / speech.sample_rate, time.perf_counter() - started
    print(wav_output.speech_summary(out, length, voice.name, took))


def _read_codes(path: Path) -> list[int]:
    """Codes from a JSON file: a list, or an object that has one under "codes".

    Raises:
        CodeError: if there are none.
    """
    from sa2jax.errors import CodeError, FileError
    from sa2jax.files.json_files import parse_json, read_json

    try:
        value = parse_json(sys.stdin.read()) if str(path) == "-" else read_json(path)
    except FileError as error:
        raise CodeError(
            f"{path} cannot be read ({error.reason}): expected a JSON list of numbers"
        ) from None
    except UnicodeDecodeError as error:
        raise CodeError(f"{path} cannot be read ({error.reason}): expected UTF-8") from None
    codes = value.get("codes") if isinstance(value, dict) else value
    if not isinstance(codes, list) or not all(type(code) is int for code in codes):
        raise CodeError(f"{path}: expected a JSON list of whole numbers, such as [4218, 12, 7]")
    if not codes:
        raise CodeError(f"{path}: no codes, expected at least one")
    return codes
