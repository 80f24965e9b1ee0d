"""CTC pre-training of the audio encoder: its loss, recipe and trainer.

    model = audio_encoder_with_heads(config)
    params = init_audio_encoder(config)
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=2e-3, steps=1500, weight_decay=0.01, learning_rate_overrides=FROZEN
        )
    )
    step = make_loss_step(audio_encoder_loss, model, optimizer)
    state = init_state(model, optimizer, None, params)
    state, report = step(state, batch)
    language = language_params | {"audio_encoder": network_params(state.params)}

Step-Audio 2 (arXiv 2507.16632, section 2) takes its encoder from a trained recogniser and keeps it
frozen. One from scratch has to learn what speech is first: a linear head spells from the features
(25 Hz, two symbols each) that the adapter will get, by CTC (Graves et al., ICML 2006).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sa2jax.audio.features import log_mel, num_frames
from sa2jax.config import AudioEncoderConfig
from sa2jax.models.audio_encoder import AudioEncoder, encoder_length
from sa2jax.nn import Functional, Params, Policy, init_params, structure_of
from sa2jax.train.networks.augmentation import Augmentation, augment_waveform, spec_augment
from sa2jax.train.networks.batches import SoundBatch
from sa2jax.train.networks.model_io import EncoderNetwork, open_audio_encoder
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.recognition import (
    CTCHead,
    RecognitionOutput,
    ctc_greedy_decode,
    ctc_loss,
    loss_from_forward,
    scale_conv_init,
)
from sa2jax.train.networks.speech_data import ClipConfig
from sa2jax.train.networks.trainer import ClipTrainer

FROZEN: Mapping[str, float] = {"model.positions": 0.0}  # rates: sinusoids stay what they are
WAVELENGTH = 10_000.0  # longest of the sinusoids, over 2π


@dataclass(frozen=True, kw_only=True)
class AudioEncoderLossConfig:
    """How the encoder is taught.

    Attributes:
        augmentation: of what it hears; None for none.
    """

    augmentation: Augmentation | None = field(default_factory=Augmentation)


class AudioEncoderWithHeads(nnx.Module):
    """An encoder and what it is taught with: parameters `model` and `heads`."""

    def __init__(self, cfg: AudioEncoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.cfg = cfg
        self.model = AudioEncoder(cfg, policy=policy, rngs=rngs)
        self.heads = CTCHead(cfg.embed, policy=policy, rngs=rngs)


def audio_encoder_with_heads(
    cfg: AudioEncoderConfig, policy: Policy | None = None
) -> Functional[AudioEncoderWithHeads]:
    """The structure of a config's encoder and its head, see `nn.structure_of`."""
    return structure_of(AudioEncoderWithHeads, cfg, policy)


def init_audio_encoder(
    cfg: AudioEncoderConfig, policy: Policy | None = None, *, seed: int = 0
) -> Params:
    """Random parameters of encoder and head, with sinusoidal positions; see `scale_conv_init`."""
    policy = Policy() if policy is None else policy
    params = init_params(lambda: AudioEncoderWithHeads(cfg, policy=policy, rngs=nnx.Rngs(seed)))
    table = sinusoids(cfg.max_positions, cfg.embed).astype(policy.param)
    return params | {"model": scale_conv_init(params["model"]) | {"positions": table}}


def sinusoids(length: int, width: int) -> Float[Array, "T D"]:
    """Positions as Whisper (arXiv 2212.04356) gives them: sines, then cosines, of slower waves."""
    half = width // 2
    rates = WAVELENGTH ** (-jnp.arange(half) / max(half - 1, 1))
    angles = jnp.arange(length)[:, None] * rates
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(waves, ((0, 0), (0, width - 2 * half)))


def audio_encoder_forward(
    model: Functional[AudioEncoderWithHeads],
    params: Params,
    batch: SoundBatch[Array],
    key: Array | None = None,
    config: AudioEncoderLossConfig | None = None,
) -> RecognitionOutput:
    """How badly a batch's letters can be read from the encoder's features.

    Args:
        model: the structure of encoder and head.
        params: their parameters.
        batch: clips.
        key: of all that is drawn; None to disturb nothing.
        config: how, by default `AudioEncoderLossConfig()`.

    Returns:
        Nats per letter, scalars to report (`letters` and `skipped`, see `ctc_loss`), and letters.
    """
    config = AudioEncoderLossConfig() if config is None else config
    teacher = model.bind(params)
    with jax.named_scope("front_end"):
        frames = jnp.where(batch.lengths > 0, num_frames(batch.lengths), 0)
        sound = augment_waveform(batch, key, config.augmentation)
        mels = log_mel(sound, batch.lengths, n_mels=teacher.cfg.mels)
        mels = spec_augment(mels, frames, key, config.augmentation)
    x = teacher.model(mels, frames)
    lengths = jnp.maximum(encoder_length(frames), 0)
    with jax.named_scope("letters"):
        spelled = teacher.heads(x, lengths)
        loss, report = ctc_loss(*spelled, batch.letters, batch.letter_counts)
    return RecognitionOutput(loss, report, letters=ctc_greedy_decode(*spelled))


audio_encoder_loss = loss_from_forward(audio_encoder_forward)


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AudioEncoderRecipe(NetworkRecipe):
    """Of a model's audio encoder."""

    kind = "audio_encoder"
    data: ClipConfig
    loss: AudioEncoderLossConfig = field(default_factory=AudioEncoderLossConfig)


class AudioEncoderTrainer(ClipTrainer[EncoderNetwork, AudioEncoderRecipe]):
    """How a model's audio encoder is trained."""

    recipe = AudioEncoderRecipe
    loss = staticmethod(audio_encoder_loss)
    forward = staticmethod(audio_encoder_forward)
    open = staticmethod(open_audio_encoder)
    with_heads = staticmethod(audio_encoder_with_heads)
    init_with_heads = staticmethod(init_audio_encoder)


AUDIO_ENCODER_TRAINER = AudioEncoderTrainer()
