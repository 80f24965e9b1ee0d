"""Training of the CAM++ speaker encoder by speaker classification: loss, recipe and trainer.

    model = speaker_encoder_with_heads(config, speakers=40)
    params = init_speaker_encoder(config, speakers=40)
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=2e-3, warmup_steps=50, steps=600, learning_rate_overrides=FROZEN
        )
    )
    step = make_loss_step(speaker_encoder_loss, model, optimizer)
    state = init_state(model, optimizer, None, params)
    state, report = step(state, batch)
    vectors = speaker_encoder(config).bind(network_params(state.params))(fbank, frames)

Source: CAM++ (arXiv 2303.00332), here with a softmax of additive margin (AM-softmax, arXiv
1801.05599): a clip's cosine with its own voice has to win by a margin. What is drawn: loudness,
noise, hidden bands and moments, and which part of a long clip is heard.

The network of `models.speaker_encoder` has batch norms with given statistics, so that clips do not
feel each other. That is kept here: statistics stay at mean 0 and variance 1 (see `FROZEN`), scales
and biases are learnt, and matrices begin with the gain that a rectifier takes away. Training and
use are then the same arithmetic, and no running means have to be carried along.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sa2jax.audio.features import HOP, fbank
from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.errors import TrainError
from sa2jax.models.speaker_encoder import SpeakerEncoder
from sa2jax.nn import Functional, Params, Policy, init_params, param, structure_of
from sa2jax.speech_config import SpeakerEncoderConfig
from sa2jax.train.networks.augmentation import Augmentation, augment_waveform, spec_augment
from sa2jax.train.networks.batches import SoundBatch
from sa2jax.train.networks.model_io import DetokenizerNetwork, open_detokenizer_network
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.recognition import RecognitionOutput, loss_from_forward
from sa2jax.train.networks.speech_data import ClipConfig, read_speech_info
from sa2jax.train.networks.trainer import ClipTrainer
from sa2jax.train.optimizer import param_name

# Rates of what is given, not learnt: statistics of norms, but for the mean of vectors, which is the
# only bias that these have.
FROZEN: Mapping[str, float] = {
    r"model\.blocks\..*norm\.(mean|variance)": 0.0,
    r"model\.norm\.variance": 0.0,
}
BEFORE_RELU = ("conv", "tdnn", "squeeze", "context", "local")  # what a rectifier follows
WINDOW = 400  # samples of a filterbank frame


@dataclass(frozen=True, kw_only=True)
class SpeakerEncoderLossConfig:
    """How the speaker encoder is taught.

    Attributes:
        augmentation: of what it hears; None for none.
        max_seconds: longest part of a clip that is heard at once.
        margin: by which the cosine with the own voice has to win.
        scale: of cosines as logits.
    """

    augmentation: Augmentation | None = field(default_factory=Augmentation)
    max_seconds: float = 2.0
    margin: float = 0.2
    scale: float = 20.0

    def __post_init__(self):
        if not 0 <= self.margin < 2:
            raise TrainError(f"margin={self.margin}: expected a number from 0 to 2")
        for name, least in (("max_seconds", WINDOW / SAMPLE_RATE), ("scale", 1.0)):
            if not getattr(self, name) >= least:
                raise TrainError(f"{name}={getattr(self, name)}: expected {least} or more")


class SpeakerHeads(nnx.Module):
    """A direction for each voice."""

    def __init__(self, embed: int, speakers: int, *, policy: Policy, rngs: nnx.Rngs):
        axes = ("speakers", "embed")
        self.kernel = param(rngs, (speakers, embed), axes, dtype=policy.param, scale=embed**-0.5)

    def __call__(self, vectors: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Cosines of vectors of unit length with each voice."""
        return vectors @ l2_normalize(self.kernel[...].astype(jnp.float32)).T


class SpeakerEncoderWithHeads(nnx.Module):
    """A speaker encoder and what it is taught with: parameters `model` and `heads`."""

    def __init__(self, cfg: SpeakerEncoderConfig, speakers: int, *, policy: Policy, rngs: nnx.Rngs):
        self.cfg = cfg
        self.model = SpeakerEncoder(cfg, policy=policy, rngs=rngs)
        self.heads = SpeakerHeads(cfg.embed, speakers, policy=policy, rngs=rngs)


def speaker_encoder_with_heads(
    cfg: SpeakerEncoderConfig, policy: Policy | None = None, *, speakers: int
) -> Functional[SpeakerEncoderWithHeads]:
    """The structure of a config's encoder and a head of so many voices, see `nn.structure_of`."""
    return structure_of(SpeakerEncoderWithHeads, cfg, policy, speakers=speakers)


def init_speaker_encoder(
    cfg: SpeakerEncoderConfig, policy: Policy | None = None, *, speakers: int, seed: int = 0
) -> Params:
    """Random parameters that keep the size of activations through rectifiers (He et al., 2015)."""
    policy = Policy() if policy is None else policy

    def rngs():
        return nnx.Rngs(seed)

    params = init_params(lambda: SpeakerEncoderWithHeads(cfg, speakers, policy=policy, rngs=rngs()))

    def gained(path, x):
        *_, part, leaf = ["", *param_name(path).split(".")]
        is_matrix = leaf in ("kernel", "tdnn")
        follows = leaf.startswith(BEFORE_RELU) or part.startswith(BEFORE_RELU)
        return x * 2**0.5 if is_matrix and follows else x

    return params | {"model": jax.tree.map_with_path(gained, params["model"])}


def l2_normalize(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def am_softmax_loss(
    cosines: Float[Array, "B V"], speaker: Int[Array, "B"], margin: float, scale: float
) -> Float[Array, "B"]:
    """Cross entropy of cosines, the own voice's less by a margin, in nats (AM-softmax)."""
    own = jax.nn.one_hot(speaker, cosines.shape[1])
    logits = scale * (cosines - margin * own)
    return -jnp.sum(own * jax.nn.log_softmax(logits), axis=-1)


def speaker_encoder_forward(
    model: Functional[SpeakerEncoderWithHeads],
    params: Params,
    batch: SoundBatch[Array],
    key: Array | None = None,
    config: SpeakerEncoderLossConfig | None = None,
) -> RecognitionOutput:
    """How badly voices can be told apart.

    Args:
        model: the structure of encoder and head.
        params: their parameters.
        batch: clips; letters are not looked at.
        key: of all that is drawn; None to disturb nothing and to hear each clip's beginning.
        config: how, by default `SpeakerEncoderLossConfig()`.

    Returns:
        Nats per clip, vectors of unit length, and scalars to report: how many `rows` there are, the
        `accuracy` among known voices (without margin), and the mean cosine of two clips of the
        same voice (`same_speaker`) and of others (`other_speaker`), 0 where the batch has no such
        two.
    """
    config = SpeakerEncoderLossConfig() if config is None else config
    teacher = model.bind(params)
    real = batch.lengths >= WINDOW
    with jax.named_scope("front_end"):
        batch = _random_crop(batch, key, round(config.max_seconds * SAMPLE_RATE))
        frames = jnp.where(real, 1 + (batch.lengths - WINDOW) // HOP, 0)
        sound = augment_waveform(batch, key, config.augmentation)
        energies = fbank(sound, batch.lengths, n_mels=teacher.cfg.mels, subtract_mean=True)
        energies = spec_augment(energies.swapaxes(1, 2), frames, key, config.augmentation)
    vectors = l2_normalize(teacher.model(energies.swapaxes(1, 2), frames).astype(jnp.float32))
    with jax.named_scope("voices"):
        cosines = teacher.heads(vectors)
        count = jnp.maximum(jnp.sum(real), 1)
        cost = am_softmax_loss(cosines, batch.speaker, config.margin, config.scale)
        loss = jnp.sum(jnp.where(real, cost, 0)) / count
        right = real & (jnp.argmax(cosines, axis=-1) == batch.speaker)
    pairs = speaker_similarity(vectors, batch.speaker, real)
    report = {
        "rows": jnp.sum(real),
        "accuracy": jnp.sum(right) / count,
        "same_speaker": pairs.same,
        "other_speaker": pairs.other,
    }
    report = {name: jnp.asarray(x, jnp.float32) for name, x in report.items()}
    return RecognitionOutput(loss, report, vectors=vectors)


speaker_encoder_loss = loss_from_forward(speaker_encoder_forward)


def _random_crop(batch: SoundBatch[Array], key: Array | None, size: int) -> SoundBatch:
    """A part of each clip that is longer than `size` samples: any, or without a key the first."""
    if batch.sound.shape[1] <= size:
        return batch
    rows = jnp.arange(len(batch.sound))
    start = jnp.zeros_like(batch.lengths)
    if key is not None:

        def draw(row):
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 2), row))

        spare = jnp.maximum(batch.lengths - size, 0)
        start = (jax.vmap(draw)(rows) * (spare + 1)).astype(jnp.int32)

    def take(x, at):
        return jax.lax.dynamic_slice(x, (at,), (size,))

    lengths = jnp.minimum(batch.lengths, size)
    return replace(batch, sound=jax.vmap(take)(batch.sound, start), lengths=lengths)


class SpeakerSimilarity(NamedTuple):
    """Mean cosine of two clips.

    Attributes:
        same: of one voice.
        other: of two voices.
    """

    same: Float[Array, ""]
    other: Float[Array, ""]


def speaker_similarity(
    vectors: Float[Array, "B D"], speaker: Int[Array, "B"], real: Bool[Array, "B"]
) -> SpeakerSimilarity:
    """How alike vectors of unit length are, over all pairs of different real clips."""
    cosines = vectors @ vectors.T
    pairs = real[:, None] & real & ~jnp.eye(len(real), dtype=bool)
    same = speaker[:, None] == speaker

    def mean(which):
        return jnp.sum(jnp.where(which, cosines, 0)) / jnp.maximum(which.sum(), 1)

    return SpeakerSimilarity(mean(pairs & same), mean(pairs & ~same))


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpeakerEncoderRecipe(NetworkRecipe):
    """Of the speaker encoder."""

    kind = "speaker_encoder"
    data: ClipConfig
    loss: SpeakerEncoderLossConfig = field(default_factory=SpeakerEncoderLossConfig)


class SpeakerEncoderTrainer(ClipTrainer[DetokenizerNetwork, SpeakerEncoderRecipe]):
    """How the speaker encoder is trained."""

    recipe = SpeakerEncoderRecipe
    loss = staticmethod(speaker_encoder_loss)
    forward = staticmethod(speaker_encoder_forward)
    open = staticmethod(partial(open_detokenizer_network, "speaker_encoder"))
    with_heads = staticmethod(speaker_encoder_with_heads)
    init_with_heads = staticmethod(init_speaker_encoder)

    def head_sizes(self, recipe: SpeakerEncoderRecipe) -> dict[str, int]:
        """As many speakers as the data has."""
        about, _ = read_speech_info(Path(recipe.data.folder), SAMPLE_RATE)
        return {"speakers": len(about["speakers"])}


SPEAKER_ENCODER_TRAINER = SpeakerEncoderTrainer()
