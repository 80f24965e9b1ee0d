"""The public API of speech alone: codes, voices and sound.

speech = Speech.from_pretrained("mini")              # a model folder, or its token2wav/ alone
codes = speech.tokenize("a.wav")                     # 25 per second
wave = speech.vocode(codes, voice="default")         # 24 kHz
same = speech.reconstruct("a.wav")                   # codes and back, in the clip's own voice
for piece in speech.stream(codes, voice="me.wav"): ...
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from sa2jax import audio
from sa2jax.errors import ConfigError
from sa2jax.runtime import enable_compilation_cache
from sa2jax.sharding import make_mesh
from sa2jax.speech.layout import SYNTHESIS
from sa2jax.speech.store import SpeechFolder
from sa2jax.speech.token2wav import CHUNK, Codes, Token2Wav
from sa2jax.speech.voices import MAX_SECONDS, Voice

AnyVoice = Voice | str | Path | audio.AudioSource
"""A voice, its name or file, or a recording of it; an `AudioSource` says which channel is heard."""
# Codes (a minute) of a reply that is spoken in one piece; longer ones are streamed.
MAX_WHOLE_CODES = 1500


class Speech:
    """The detokenizer of a checkpoint and its voices. What is not needed is not loaded.

    Args:
        folder: where it lies.
        dtype: of the flow; the other networks need float32.
        steps: Euler steps of the flow: fewer are faster and rougher.
        guidance: weight of what the voice and the codes change, by default the checkpoint's.
        batch_size: replies that are made at once.
        mesh: devices to spread over.

    Attributes:
        parity: whether it streams and tokenises as the official code does, see docs/parity.md.
    """

    def __init__(
        self,
        folder: SpeechFolder,
        *,
        dtype: Any = jnp.float32,
        steps: int = 10,
        guidance: float | None = None,
        batch_size: int = 8,
        mesh: str | Mesh | None = None,
    ):
        if steps < 1 or batch_size < 1:
            raise ConfigError(f"expected steps and batch_size >= 1, got {steps} and {batch_size}")
        self.folder, self.parity = folder, folder.parity
        self._options = {
            "dtype": dtype,
            "steps": steps,
            "guidance": guidance,
            "batch_size": batch_size,
            "mesh": make_mesh(mesh) if isinstance(mesh, str) else mesh,
        }

    @classmethod
    def from_pretrained(cls, home: str | Path, *, parity: bool = False, **options: Any) -> Self:
        """Open a model folder of this library, a released one, or a detokenizer's folder alone.

        Args:
            home: the folder.
            parity: stream and tokenise as the official code does, quirks included.
            **options: see the class.

        Raises:
            CheckpointError: if the folder has no detokenizer, or a damaged one.
            ShardingError: for a mesh that does not fit the devices.
        """
        enable_compilation_cache()
        return cls(SpeechFolder(home, parity=parity), **options)

    @cached_property
    def token2wav(self) -> Token2Wav:
        """Flow and vocoder, loaded."""
        return Token2Wav(self.folder.cfg, self.folder.params(SYNTHESIS), **self._options)

    @cached_property
    def replicas(self) -> list[Token2Wav]:
        """One for each index of the mesh's data axis, for conversations."""
        return self.token2wav.replicas()

    @property
    def sample_rate(self) -> int:
        """Of what is spoken, in Hz."""
        return self.folder.cfg.vocoder.sample_rate

    def voice(self, wanted: AnyVoice = "default") -> Voice:
        """A voice by its name, its file or a recording of it; see `SpeechFolder.voice`."""
        return wanted if isinstance(wanted, Voice) else self.folder.voice(wanted)

    @overload
    def tokenize(self, sources: list) -> list[Int[np.ndarray, "P"]]: ...
    @overload
    def tokenize(self, sources: audio.Audio | audio.AudioSource) -> Int[np.ndarray, "P"]: ...
    def tokenize(self, sources):
        """Codes (25 Hz) of a recording of any length, or of each of a list of them.

        Raises:
            AudioError: if a recording cannot be read.
        """
        many = isinstance(sources, list)
        codes = self.folder.analyzer.codes(sources if many else [sources])
        return codes if many else codes[0]

    @overload
    def vocode(
        self, codes: Codes, voice: AnyVoice = "default", *, seed: int = 0
    ) -> Float[np.ndarray, "N"]: ...
    @overload
    def vocode(
        self, codes: Sequence[Codes], voice: AnyVoice | list[AnyVoice] = "default", *, seed: int = 0
    ) -> list[Float[np.ndarray, "N"]]: ...
    def vocode(self, codes, voice="default", *, seed=0):
        """Speak codes, or a list of replies; see `Token2Wav.__call__`.

        Args:
            codes: codes (25 Hz) of a reply, or a list of replies.
            voice: one voice, or a list with one for each reply.
            seed: another one gives another reading.

        Raises:
            CodeError: for codes that no recording has.
            VoiceError: if there is no such voice.
        """
        many = isinstance(voice, list)
        voices = [self.voice(v) for v in voice] if many else self.voice(voice)
        return self.token2wav(codes, voices, seed=seed)

    def stream(
        self,
        codes: Iterable[int],
        voice: AnyVoice = "default",
        *,
        chunk: int = CHUNK,
        first: int | None = None,
        seed: int = 0,
    ) -> Iterator[Float[np.ndarray, "N"]]:
        """Speak codes while they arrive; see `Token2Wav.stream`."""
        yield from self.token2wav.stream(
            codes, self.voice(voice), chunk=chunk, first=first, seed=seed, parity=self.parity
        )

    def speak(
        self, replies: Sequence[Sequence[int]], voice: AnyVoice = "default", *, seed: int = 0
    ) -> list[Float[np.ndarray, "N"]]:
        """Speak the codes of generated replies, of any length and also none.

        Args:
            replies: codes (25 Hz) of each, pads included.
            voice: the voice of all.
            seed: another one gives another reading.
        """
        chosen, longest = self.voice(voice), MAX_WHOLE_CODES
        if self.parity:  # officially a reply is one piece, whatever its length
            longest = max(map(len, replies), default=0)
        waves = [np.zeros(0, np.float32) for _ in replies]
        short = [n for n, codes in enumerate(replies) if 0 < len(codes) <= longest]
        if short:
            spoken = self.vocode([list(replies[n]) for n in short], chosen, seed=seed)
            for n, wave in zip(short, spoken, strict=True):
                waves[n] = wave
        for n, codes in enumerate(replies):
            if len(codes) > longest:
                waves[n] = np.concatenate([*self.stream(codes, chosen, seed=seed)])
        return waves

    def analyze(
        self, source: audio.Audio | audio.AudioSource
    ) -> tuple[Int[np.ndarray, "P"], Voice]:
        """Codes of a whole recording, and its voice, taken from the first 30 s at most.

        With `parity` the voice, too, is taken from all of it.

        Raises:
            AudioError: if the recording cannot be read.
            VoiceError: if it is too short or silent.
        """
        voice = Voice.from_wav(source, self.folder.analyzer)
        if self.parity or voice.seconds < MAX_SECONDS:  # it was not cut
            return voice.codes, voice
        return self.tokenize(source), voice

    def reconstruct(
        self, source: audio.Audio | audio.AudioSource, *, seed: int = 0
    ) -> Float[np.ndarray, "N"]:
        """A recording as codes and back, in its own voice.

        Raises:
            AudioError: if the recording cannot be read.
            VoiceError: if it is too short or silent.
        """
        codes, voice = self.analyze(source)
        return self.token2wav(codes, voice, seed=seed)
