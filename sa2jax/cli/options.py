"""Options that commands share: which model, how it runs, and how it replies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sa2jax.cli import common
from sa2jax.cli.common import Attention, Devices, ModelDtype

if TYPE_CHECKING:
    from sa2jax.audio import AudioSource
    from sa2jax.pipeline import StepAudio2


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Devices):
    """Which model to use, and how."""

    model: Path | None = None
    """Model folder made by `sa2jax convert`, a Hugging Face folder, or `nano`; by default the
    latter, a small model for demonstrations, where the installation has it."""
    dtype: ModelDtype | None = None
    """Dtype of weights and computation; by default bfloat16, float32 on a CPU. int8 is that of
    the matrices alone."""
    int8_cache: bool = False
    """Keep what was read as int8: half the memory for long or many conversations."""
    attention: Attention | None = None
    """What computes the decoder's attention; by default chosen by platform and shapes. One that
    cannot is refused."""
    tokenizer: Path | None = None
    """Folder of the tokenizer files, if not the model's own."""
    detokenizer: Path | None = None
    """Folder of the detokenizer and its voices, if not the model's own."""
    prompt_style: Literal["chat", "base"] = "chat"
    """`base` for a pre-trained model that knows no turns."""
    batch_size: int = 8
    """Prompts that are answered at once."""
    parity: bool = False
    """Do everything as the official pipeline does, quirks included, to compare with it. Special
    tokens in what is said are recognised then: whoever says something can open turns."""

    def load(self) -> "StepAudio2":
        """Read the model, with a progress bar."""
        self.join_hosts()
        from sa2jax.pipeline import StepAudio2

        model = common.model_or_default(self.model)
        with common.progress_bar("loading") as progress:
            return StepAudio2.from_pretrained(
                model,
                dtype=self.dtype,
                mesh=self.mesh,
                int8_cache=self.int8_cache,
                attention=self.attention,
                tokenizer=self.tokenizer,
                speech=self.detokenizer,
                prompt_style=self.prompt_style,
                batch_size=self.batch_size,
                parity=self.parity,
                progress=progress,
            )


def voice_source(
    voice: str | None,
    channel: int | Literal["mean"] | None,
    option: str = "--voice-channel",
) -> "str | AudioSource | None":
    """A voice as it was named, with its channel if it is a recording.

    Raises:
        VoiceError: for a channel of anything else, which `option` gives.
    """
    if channel is None:
        return voice
    from sa2jax.audio import AudioSource
    from sa2jax.errors import VoiceError
    from sa2jax.speech.voices import is_recording

    if voice is None or not is_recording(voice):
        got = "no voice" if voice is None else f"{voice!r:.120}, which is none"
        raise VoiceError(f"{option} {channel} is for a recording of a voice, got {got}")
    return AudioSource(voice, channel)


@dataclass(frozen=True, kw_only=True)
class VoiceOptions:
    """Who speaks."""

    voice: str | None = None
    """Who speaks: name of a voice, a voice file, or a recording of the speaker; by default the
    model's default voice."""
    voice_channel: int | Literal["mean"] | None = None
    """Channel of that recording, counted from 0, or `mean` for the mean of all; by default the
    first, for mel frames the mean."""

    def speaker(self, voice: str | None = None) -> "str | AudioSource | None":
        """The voice that was asked for, None for none.

        Args:
            voice: another one, of which the channel is taken if it is a recording.

        Raises:
            VoiceError: for a channel without a recording.
        """
        if voice is None:
            return voice_source(self.voice, self.voice_channel)
        from sa2jax.speech.voices import is_recording

        return voice_source(voice, self.voice_channel if is_recording(voice) else None)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(VoiceOptions):
    """How replies are generated, and printed."""

    max_new_tokens: int | None = None
    """Limit of each reply, by default that of the task."""
    seed: int = 0
    """Same seed, same reply."""
    json: bool = False
    """Print JSON."""

    def limits(self) -> dict[str, Any]:
        """Keywords of every task: `max_new_tokens` and `seed`."""
        return {"max_new_tokens": self.max_new_tokens, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class ChannelOptions:
    """Which channel is heard."""

    channel: int | Literal["mean"] | None = None
    """Channel that is heard, counted from 0, or `mean` for the mean of all; by default the first,
    for mel frames at 24 kHz the mean."""


@dataclass(frozen=True, kw_only=True)
class SoundOptions(ChannelOptions):
    """What is heard of recordings."""

    max_seconds: float | None = None
    """Longest recording that is read; by default two hours, or a day where it is never held as a
    whole (asr, translate)."""

    def source(self, path: Path) -> "AudioSource":
        """A recording to be read so."""
        from sa2jax.audio import AudioSource

        return AudioSource(path, self.channel, self.max_seconds)

    def sources(self, paths: Sequence[Path]) -> list["AudioSource"]:
        """Recordings to be read so."""
        return [self.source(path) for path in paths]


Model = Annotated[ModelOptions, tyro.conf.arg(name="")]
Speaker = Annotated[VoiceOptions, tyro.conf.arg(name="")]
Generation = Annotated[GenerationOptions, tyro.conf.arg(name="")]
Hearing = Annotated[ChannelOptions, tyro.conf.arg(name="")]
Sound = Annotated[SoundOptions, tyro.conf.arg(name="")]
