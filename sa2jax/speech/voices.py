"""Voices: the speaker prompt of the detokenizer, made from one short recording.

analyzer = VoiceAnalyzer(cfg, params)
voice = Voice.from_wav("me.wav", analyzer)
voice.save("me.safetensors")

Source: the official `Token2wav._prepare_prompt`. A voice is keyed by a hash of the
recording and one of the weights that analysed it, never by a path.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import save

from sa2jax import audio
from sa2jax.atomic_io import disk_errors, new_file
from sa2jax.audio.rates import CODE_RATE, SPEECH_MEL_RATE, SPEECH_SAMPLE_RATE
from sa2jax.errors import AudioError, FileError, VoiceError
from sa2jax.files.limits import ARRAYS
from sa2jax.files.raw import is_file, read_bytes
from sa2jax.files.safetensors_files import parse_safetensors
from sa2jax.models.speaker_encoder import speaker_encoder
from sa2jax.models.speech_tokenizer import (
    WINDOW,
    speech_tokenizer,
    tokenize,
    unstack_speech_tokenizer,
)
from sa2jax.nn import Params
from sa2jax.runtime import round_up, uses_scan
from sa2jax.speech_config import FlowConfig, Token2WavConfig

log = logging.getLogger(__name__)

FORMAT = "sa2jax voice 1"
SUFFIX = ".safetensors"
MIN_SECONDS, MAX_SECONDS = 1.0, 30.0
LARGEST_SPEAKER, LARGEST_MEL = 1e4, 50.0  # far beyond what any recording gives
MAX_HASH = 128  # characters
MEL_HOP = SPEECH_SAMPLE_RATE // SPEECH_MEL_RATE  # samples of one mel frame
CLIPS_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class Voice:
    """A speaker.

    Attributes:
        name: what users call it.
        codes: codes (25 Hz) of the recording.
        speaker: speaker vector, not normalised.
        mel: log-mel frames (50 Hz) of the recording, two for each code.
        audio_hash: SHA-256 of the samples that were analysed.
        analysis_hash: hash of the weights that analysed them, see `checkpoint.content_hash`.
    """

    name: str
    codes: Int[np.ndarray, "P"]
    speaker: Float[np.ndarray, "C"]
    mel: Float[np.ndarray, "Q M"]
    audio_hash: str
    analysis_hash: str

    @classmethod
    def from_wav(
        cls,
        source: audio.Audio | audio.AudioSource,
        analyzer: "VoiceAnalyzer",
        name: str | None = None,
    ) -> Self:
        """Analyse a recording of 1 to 30 s, of any rate and channels; a longer one is cut.

        With the analyzer's `parity` none is.

        Channel 0 at 16 kHz gives the codes and the speaker vector, the mean of all channels at
        24 kHz the mel frames, as in the official code. Of an `AudioSource`, its channel gives all.

        Args:
            source: the recording.
            analyzer: the networks that analyse it.
            name: what to call the voice; by default after the file, with "-" for what names cannot
                have.

        Raises:
            AudioError: if the recording cannot be read.
            VoiceError: if it is too short or silent, or for a name that cannot be a file's.
        """
        if name is None:
            inner = source.source if isinstance(source, audio.AudioSource) else source
            name = _name_of(Path(inner)) if isinstance(inner, str | Path) else "voice"
        check_name(name)
        low = audio.load_audio(source, audio.SAMPLE_RATE)
        with audio.open_mono(source, SPEECH_SAMPLE_RATE, channel="mean") as (_, blocks):
            high = np.concatenate([*blocks], axis=1)[0]  # noted and checked above
        seconds = len(low) / audio.SAMPLE_RATE
        if seconds < MIN_SECONDS:
            raise VoiceError(
                f"voice {name}: expected {MIN_SECONDS:g} to {MAX_SECONDS:g} s of speech, got "
                f"{seconds:.2f} s; record some more"
            )
        if seconds > MAX_SECONDS and not analyzer.parity:
            log.warning(
                "voice %s: only the first %g s of %.1f s are used", name, MAX_SECONDS, seconds
            )
            low = low[: int(MAX_SECONDS * audio.SAMPLE_RATE)]
            high = high[: int(MAX_SECONDS * SPEECH_SAMPLE_RATE)]
        for what, samples in (("channel 0", low), ("the mean of the channels", high)):
            if np.abs(samples).max() < audio.SILENCE:
                raise VoiceError(
                    f"voice {name}: expected speech, but {what} stays below -60 dB of full scale; "
                    "use a recording that can be heard, or another --channel (--voice-channel)"
                )
        codes = analyzer.codes_of([low])[0]
        frames = 2 * len(codes)
        mel = audio.mel_24k(high).T[:frames]  # [Q, M]
        mel = np.pad(mel, ((0, frames - len(mel)), (0, 0)), mode="edge")
        audio_hash = hashlib.sha256(low.tobytes() + high.tobytes()).hexdigest()
        return cls(name, codes, analyzer.speaker_of(low), mel, audio_hash, analyzer.analysis_hash)

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return len(self.codes) / CODE_RATE

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the numbers: equal for voices that sound alike, whatever their names."""
        digest = hashlib.sha256(self.analysis_hash.encode())
        for array in (self.codes, self.speaker, self.mel):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the voice as one safetensors file, whole or not at all.

        Raises:
            CheckpointError: if it cannot be written.
        """
        path = Path(path)
        described = {"name": self.name, "audio": self.audio_hash, "analysis": self.analysis_hash}
        described |= {"format": FORMAT, "hash": self.hash}
        arrays = {"codes": self.codes, "speaker": self.speaker, "mel": self.mel}
        data = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata=described)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as temporary:
                temporary.write_bytes(data)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            VoiceError: if it is no voice file, is damaged, or holds what no recording gives.
        """
        path = Path(path)
        try:
            arrays, described = parse_safetensors(read_bytes(path, ARRAYS), str(path))
        except FileError as error:
            raise VoiceError(
                f"{path} cannot be read ({error.reason}): add the voice again"
            ) from None
        if described.get("format") != FORMAT:
            raise VoiceError(f"{path} is no voice: expected a file made by `sa2jax voice add`")
        try:
            _require_voice(described, arrays)
        except VoiceError as error:
            raise VoiceError(f"{path} holds no voice ({error}): add the voice again") from None
        try:
            voice = cls(
                described["name"],
                arrays["codes"],
                arrays["speaker"],
                arrays["mel"],
                described["audio"],
                described["analysis"],
            )
            intact = described["hash"] == voice.hash
        except KeyError as error:
            raise VoiceError(f"{path} lacks {error}: add the voice again") from None
        if not intact:
            raise VoiceError(f"{path} is damaged (its hash differs): add the voice again")
        return voice

    def require_fit(self, cfg: FlowConfig) -> None:
        """Compare the voice with the flow that is to speak in it.

        Raises:
            VoiceError: if its codes or sizes are those of another one.
        """
        problem = ""
        if self.codes.size and int(self.codes.max()) >= cfg.codes:
            problem = f"code {self.codes.max()}, expected 0 to {cfg.codes - 1}"
        elif self.speaker.shape != (cfg.speaker,):
            problem = f"{self.speaker.size} numbers of a speaker, expected {cfg.speaker}"
        elif self.mel.shape[1:] != (cfg.mels,):
            problem = f"{self.mel.shape[1]} mel bands, expected {cfg.mels}"
        if problem:
            raise VoiceError(f"voice {self.name} does not fit this model: {problem}; add it again")


def _require_voice(described: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse what `Voice.save` never writes, whatever hash it has.

    Raises:
        VoiceError: saying what was expected.
    """
    for key in ("audio", "analysis"):
        if not re.fullmatch(rf"[\w.-]{{0,{MAX_HASH}}}", str(described.get(key, ""))):
            raise VoiceError(f"expected a hash under {key!r}")
    check_name(str(described.get("name", "")))
    forms = {"codes": (np.int32, 1), "speaker": (np.float32, 1), "mel": (np.float32, 2)}
    if set(arrays) != set(forms):
        raise VoiceError(f"expected {', '.join(forms)}, got {', '.join(sorted(arrays))[:200]}")
    for name, (dtype, ndim) in forms.items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != ndim or not array.size:
            raise VoiceError(
                f"{name}: expected {np.dtype(dtype).name} with {ndim} axes, got {array.dtype} "
                f"{list(array.shape)}"
            )
    codes, speaker, mel = (arrays[name] for name in forms)
    longest = int(MAX_SECONDS * CODE_RATE)
    if not MIN_SECONDS * CODE_RATE <= len(codes) <= longest or len(mel) != 2 * len(codes):
        raise VoiceError(
            f"expected {MIN_SECONDS * CODE_RATE:g} to {longest} codes and two mel frames for each, "
            f"got {len(codes)} and {len(mel)}"
        )
    if codes.min() < 0:
        raise VoiceError(f"code {codes.min()}, expected 0 or more")
    for name, array, most in (("speaker", speaker, LARGEST_SPEAKER), ("mel", mel, LARGEST_MEL)):
        if not (np.abs(array) <= most).all():  # NaN is not, either
            raise VoiceError(f"{name}: expected numbers within ±{most:g}")
    if not speaker.any():
        raise VoiceError("speaker: expected a vector that is not 0")


class VoiceAnalyzer:
    """The two networks that analyse a voice: S3 speech tokenizer and CAM++.

    Args:
        cfg: sizes.
        params: parameters under `speech_tokenizer` and `speaker_encoder`.
        analysis_hash: hash of these parameters.
        parity: open the windows of a long recording that the official code opens, which may lose up
            to 2 s at its end, and take a voice from all of a recording, not from 30 s of it.
    """

    def __init__(
        self, cfg: Token2WavConfig, params: Params, analysis_hash: str, *, parity: bool = False
    ):
        self.cfg, self.analysis_hash, self.parity = cfg, analysis_hash, parity
        stacked = uses_scan()
        tokenizer_params = params["speech_tokenizer"]
        self._params = {
            "speech_tokenizer": tokenizer_params
            if stacked
            else unstack_speech_tokenizer(tokenizer_params),
            "speaker_encoder": params["speaker_encoder"],
        }
        tokenizer = speech_tokenizer(cfg.speech_tokenizer, stacked=stacked)
        speaker = speaker_encoder(cfg.speaker_encoder)
        self._tokenize = jax.jit(
            lambda p, mels, frames: tokenize(
                tokenizer.bind(p), mels, frames, official_windows=parity
            )
        )
        self._identify = jax.jit(lambda p, x, frames: speaker.bind(p)(x, frames))

    def codes(
        self, sources: Sequence[audio.Audio | audio.AudioSource]
    ) -> list[Int[np.ndarray, "P"]]:
        """Codes (25 Hz) of each of some recordings of any length.

        Raises:
            AudioError: if a recording cannot be read, or is shorter than 20 ms.
        """
        clips = [audio.load_audio(one, audio.SAMPLE_RATE) for one in sources]
        return self.codes_of(clips)

    def codes_of(self, clips: Sequence[Float[np.ndarray, "T"]]) -> list[Int[np.ndarray, "P"]]:
        """Codes of samples at 16 kHz; clips of like length are analysed together."""
        return self.codes_of_mels([self.mel_of(clip) for clip in clips])

    def mel_of(self, clip: Float[np.ndarray, "T"]) -> Float[np.ndarray, "M F"]:
        """Input of the tokenizer, log-mel frames (100 Hz), of samples at 16 kHz."""
        if len(clip) < 2 * audio.HOP:
            raise AudioError(
                f"expected at least {2 * audio.HOP} samples at 16 kHz (20 ms), got {len(clip)}"
            )
        return audio.s3_log_mel(clip, n_mels=self.cfg.speech_tokenizer.mels)

    def codes_of_mels(self, mels: Sequence[Float[np.ndarray, "M F"]]) -> list[Int[np.ndarray, "P"]]:
        """Codes of what `mel_of` gave; clips of like length are analysed together."""
        order = sorted(range(len(mels)), key=lambda i: mels[i].shape[1])
        codes: list[np.ndarray] = [np.empty(0, np.int32)] * len(mels)
        for start in range(0, len(order), CLIPS_AT_ONCE):
            chosen = order[start : start + CLIPS_AT_ONCE]
            size = _bucket(max(mels[i].shape[1] for i in chosen))
            batch, frames = audio.pad_mels([mels[i] for i in chosen], size)
            found, counts = self._tokenize(self._params["speech_tokenizer"], batch, frames)
            for i, row, count in zip(chosen, *map(np.asarray, (found, counts)), strict=True):
                codes[i] = row[:count].astype(np.int32)
        return codes

    def speaker_of(self, samples: Float[np.ndarray, "T"]) -> Float[np.ndarray, "C"]:
        """Speaker vector of samples at 16 kHz."""
        energies = audio.fbank(
            samples, n_mels=self.cfg.speaker_encoder.mels, subtract_mean=True
        )  # [T, M]
        frames = np.array([len(energies)], np.int32)
        padded = np.pad(energies, ((0, _bucket(len(energies)) - len(energies)), (0, 0)))
        return np.asarray(self._identify(self._params["speaker_encoder"], padded[None], frames))[0]


def check_name(name: str) -> None:
    """Refuse a name that cannot be a file's.

    Raises:
        VoiceError: for such a name.
    """
    if not re.fullmatch(r"\w[\w.-]{0,63}", name):
        raise VoiceError(
            f"voice name {name!r:.80}: expected up to 64 letters, digits, '-', '_' and '.', the "
            "first a letter or digit"
        )


def _name_of(path: Path) -> str:
    """A voice's name like a file's."""
    words = re.findall(r"[\w.]+", path.stem)
    return "-".join(words).lstrip(".")[:64] or "voice"


def is_recording(name: str | Path) -> bool:
    """Whether this is a recording of a voice, and not a voice's name or file."""
    suffix = Path(name).suffix
    return bool(suffix) and suffix != SUFFIX and is_file(name)


def describe(voice: Voice) -> dict[str, object]:
    """What `sa2jax voice show` prints."""
    level = 20 * np.log10(max(float(np.exp(voice.mel).mean()), 1e-12))
    return {
        "name": voice.name,
        "seconds": round(voice.seconds, 2),
        "codes": len(voice.codes),
        "different codes": len(set(voice.codes.tolist())),
        "speaker vector": f"{voice.speaker.size} numbers, norm {np.linalg.norm(voice.speaker):.2f}",
        "mean mel level": f"{level:.1f} dB",
        "recording": voice.audio_hash,
        "analysed by": voice.analysis_hash,
        "hash": voice.hash,
    }


def _bucket(frames: int) -> int:
    """Frames (100 Hz) that a clip is padded to."""
    return round_up(frames, 100) if frames <= WINDOW else round_up(frames, WINDOW // 3)
