"""Batches of single networks: what a data set yields and a loss takes, on host or devices."""

from dataclasses import dataclass
from typing import Generic

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float, Int

from sa2jax.nn import ArrayT
from sa2jax.speech_config import FlowConfig
from sa2jax.train.networks.step import abstract_network_batch

VOCODER_HOP, VOCODER_MELS = 480, 80  # samples and bands of a mel frame of the vocoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FlowBatch(Generic[ArrayT]):
    """Recordings of one padded length.

    Attributes:
        codes: codes (25 Hz), right-padded, [B, P].
        mels: log-mel frames (50 Hz), `upsample` for each code, [B, upsample · P, M].
        lengths: codes of each row, 0 for an empty one, [B].
        speaker: speaker vectors, of any length, [B, C].
    """

    codes: Int[ArrayT, "B P"]
    mels: Float[ArrayT, "B Q M"]
    lengths: Int[ArrayT, "B"]
    speaker: Float[ArrayT, "B C"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class VocoderBatch(Generic[ArrayT]):
    """Recordings, or pieces of recordings, of one padded length.

    Attributes:
        sound: samples at 24 kHz, right-padded, [B, 480 · T].
        f0: pitch in Hz in the middle of each mel frame (20 ms), 0 where there is none, −1 where it
            is not known, [B, T].
        frames: mel frames of each row, 0 for an empty one, [B].
        mel: log-mel frames that the vocoder hears, [B, T, M]; None for those of the sound.
    """

    sound: Float[ArrayT, "B N"]
    f0: Float[ArrayT, "B T"]
    frames: Int[ArrayT, "B"]
    mel: Float[ArrayT, "B T M"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SoundBatch(Generic[ArrayT]):
    """Clips of one padded length.

    Attributes:
        sound: samples in [-1, 1] at 16 kHz, right-padded, [B, N].
        lengths: samples of each clip, 0 for an empty row, [B].
        letters: what is said, see `letter_ids`, right-padded with 0, [B, U].
        letter_counts: letters of each clip, [B].
        speaker: number of the voice, [B].
    """

    sound: Float[ArrayT, "B N"]
    lengths: Int[ArrayT, "B"]
    letters: Int[ArrayT, "B U"]
    letter_counts: Int[ArrayT, "B"]
    speaker: Int[ArrayT, "B"]


def abstract_flow_batch(cfg: FlowConfig, mesh: Mesh | None, rows: int, codes: int) -> FlowBatch:
    """A batch's shapes and places.

    Args:
        cfg: the flow's sizes.
        mesh: devices; None for one.
        rows: of all devices together.
        codes: of each row.
    """

    def make():
        return FlowBatch(
            codes=jnp.zeros((rows, codes), jnp.int32),
            mels=jnp.zeros((rows, cfg.encoder.upsample * codes, cfg.mels), jnp.float32),
            lengths=jnp.zeros(rows, jnp.int32),
            speaker=jnp.zeros((rows, cfg.speaker), jnp.float32),
        )

    return abstract_network_batch(make, mesh)


def abstract_vocoder_batch(mesh: Mesh | None, rows: int, frames: int) -> VocoderBatch:
    """A batch's shapes and places.

    Args:
        mesh: devices; None for one.
        rows: of all devices together.
        frames: mel frames of each row.
    """

    def make():
        return VocoderBatch(
            sound=jnp.zeros((rows, VOCODER_HOP * frames), jnp.float32),
            f0=jnp.zeros((rows, frames), jnp.float32),
            frames=jnp.zeros(rows, jnp.int32),
        )

    return abstract_network_batch(make, mesh)


def abstract_sound_batch(mesh: Mesh | None, rows: int, samples: int, letters: int) -> SoundBatch:
    """A batch's shapes and places.

    Args:
        mesh: devices; None for one.
        rows: of all devices together.
        samples: of each row.
        letters: of each row.
    """

    def make():
        return SoundBatch(
            sound=jnp.zeros((rows, samples), jnp.float32),
            lengths=jnp.zeros(rows, jnp.int32),
            letters=jnp.zeros((rows, letters), jnp.int32),
            letter_counts=jnp.zeros(rows, jnp.int32),
            speaker=jnp.zeros(rows, jnp.int32),
        )

    return abstract_network_batch(make, mesh)
