"""Training of the vocoder: spectral reconstruction and pitch losses, recipe and trainer.

    model = vocoder(cfg)
    overrides = dict.fromkeys(FIRST_LAYERS, 2e-4)
    how = OptimizerConfig(learning_rate=2e-3, learning_rate_overrides=overrides, betas=(0.8, 0.99))
    optimizer = make_optimizer(how)
    step = make_loss_step(vocoder_loss, model, optimizer, VocoderLossConfig())
    state = init_state(model, optimizer, None, init_vocoder(cfg, seed=0))
    state, report = step(state, batch)  # the old state is used up

Source: HiFTNet (arXiv 2309.09493) with the multi-resolution STFT loss of Parallel WaveGAN (arXiv
1910.11480) and no discriminator. The vocoder hears mel frames that `audio.mel_24k` makes of the
recording, or those that a flow makes of its codes, which is what it will hear at run time. Its
source is mostly made from the recording's own pitch, so that the network behind it never learns
from the mistakes of a pitch predictor that is still bad.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sa2jax.audio import mel_24k
from sa2jax.errors import TrainError
from sa2jax.models.vocoder import HiFT, vocoder
from sa2jax.nn import Functional, Params, Policy, init_params, length_mask
from sa2jax.speech_config import VocoderConfig
from sa2jax.train.networks.batches import (
    VOCODER_HOP,
    VOCODER_MELS,
    VocoderBatch,
    abstract_vocoder_batch,
)
from sa2jax.train.networks.model_io import DetokenizerNetwork, open_detokenizer_network
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.speech_data import CropConfig, CropData
from sa2jax.train.networks.stft_loss import masked_mean, multi_resolution_stft_loss
from sa2jax.train.networks.trainer import NetworkTrainer

# Layers that are given mel frames. These have a mean far from 0, so an update moves all of them at
# once: a tenth of the usual rate learns faster.
FIRST_LAYERS = ("pre", "f0_predictor.conv0")
MEL_MEAN, MEL_STD = -4.5, 2.5  # mean and deviation of speech's log-mel frames, about
INITIAL_LOG_GAIN = -3.0  # added to the log magnitudes of a fresh vocoder
INITIAL_PITCH = 100.0  # a fresh predictor's pitches are about this, in Hz
PITCH_OFFSET = 10.0  # Hz; pitches are compared as log(f0 + SOFT), so that silence has one too


@dataclass(frozen=True, kw_only=True)
class VocoderLossConfig:
    """How the vocoder is taught.

    Attributes:
        resolutions: size and hop in samples of each window that compares spectra.
        convergence_weight: weight of the spectral convergence.
        magnitude_weight: weight of the distance of log magnitudes.
        mel_weight: weight of the distance of log-mel frames.
        pitch_weight: weight of the pitch predictor's error; it shares no parameter with the rest.
        teacher_forcing_prob: share of rows whose source is made from the true pitch, not the
            predicted one.
        edge_frames: mel frames at both ends of a row whose sound is not judged.
    """

    resolutions: tuple[tuple[int, int], ...] = ((256, 64), (512, 128), (1024, 256), (2048, 512))
    convergence_weight: float = 1.0
    magnitude_weight: float = 1.0
    mel_weight: float = 1.0
    pitch_weight: float = 1.0
    teacher_forcing_prob: float = 0.8
    edge_frames: int = 0

    def __post_init__(self):
        pairs = tuple((int(size), int(hop)) for size, hop in self.resolutions)
        object.__setattr__(self, "resolutions", pairs)  # lists when read from YAML
        if not pairs or any(hop < 1 or size % hop or size <= hop for size, hop in pairs):
            raise TrainError(f"resolutions={pairs}: expected sizes that are multiples of their hop")
        for name in (
            "convergence_weight",
            "magnitude_weight",
            "mel_weight",
            "pitch_weight",
            "edge_frames",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise TrainError(f"{name}={getattr(self, name)}: expected a number from 0 on")
        if not 0 <= self.teacher_forcing_prob <= 1:
            raise TrainError(
                f"teacher_forcing_prob={self.teacher_forcing_prob}: expected a number from 0 to 1"
            )


def init_vocoder(
    cfg: VocoderConfig, seed: int = 0, policy: Policy | None = None, mesh: Mesh | None = None
) -> Params:
    """Random parameters that begin near speech: centred mel frames, a quiet sound, some pitch.

    Log-mel frames lie around −4.5. What is multiplied with them as they are moves all at once with
    every update: biases and scales that centre them let learning begin at the full rate. Random
    parameters alone make full-scale noise and pitches of 1 Hz besides.

    Args:
        cfg: the vocoder's sizes.
        seed: of the parameters.
        policy: their dtype; by default float32.
        mesh: devices; None for one.
    """
    how = policy or Policy()
    places = None if mesh is None else vocoder(cfg, how).shardings(mesh)
    params = init_params(lambda: HiFT(cfg, policy=how, rngs=nnx.Rngs(seed)), places)
    for first in (params["pre"], params["f0_predictor"]["conv0"]):
        first["kernel"] = first["kernel"] / MEL_STD
        first["bias"] = first["bias"] - MEL_MEAN * jnp.sum(first["kernel"], (0, 1))
    post, out = params["post"], params["f0_predictor"]["out"]
    post["bias"] = post["bias"].at[: cfg.n_fft // 2 + 1].add(INITIAL_LOG_GAIN)
    out["kernel"] = out["kernel"] * INITIAL_PITCH
    return params


def vocoder_loss(
    model: Functional[HiFT],
    params: Params,
    batch: VocoderBatch[Array],
    key: Array,
    config: VocoderLossConfig | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """How far the vocoder's sound is from the recordings that its mel frames come from.

    Args:
        model: the vocoder's structure.
        params: its parameters.
        batch: rows.
        key: of the source's noise, and of which rows have the true pitch; what is drawn for a row
            depends on the key and its place only, not on the padding of the batch.
        config: how, by default `VocoderLossConfig()`.

    Returns:
        The weighted sum of the losses, and float32 scalars to report: each loss, that of the
        pitch as the mean distance of log(f0 + 10 Hz), the share of frames `voicing` whose voicing
        is predicted right, and the `frames` in all.
    """
    config = VocoderLossConfig() if config is None else config
    net = model.bind(params)
    if (net.cfg.samples, net.cfg.mels) != (VOCODER_HOP, VOCODER_MELS):
        raise TrainError(
            f"the vocoder makes {net.cfg.samples} samples of {net.cfg.mels} mel bands: expected "
            f"{VOCODER_HOP} of {VOCODER_MELS}, as audio.mel_24k has them"
        )
    frames, room = batch.frames, batch.f0.shape[1]
    valid = length_mask(frames, room)  # [B, T]
    own = length_mask(frames * VOCODER_HOP, room * VOCODER_HOP)
    sound = jnp.where(own, batch.sound.astype(jnp.float32), 0)

    with jax.named_scope("hear"):
        true = mel_24k(sound, frames * VOCODER_HOP).swapaxes(1, 2)  # [B, T, M]
        mel = true if batch.mel is None else batch.mel
    with jax.named_scope("f0"):
        found = net.f0(mel, frames)
        known = valid & (batch.f0 >= 0)
        pitch = masked_mean(
            _log_pitch_distance(found, jnp.maximum(batch.f0, 0)), known.astype(jnp.float32)
        )
        limit = net.cfg.voiced_threshold
        right = masked_mean(
            ((found > limit) == (batch.f0 > limit)).astype(jnp.float32), known.astype(jnp.float32)
        )
    with jax.named_scope("source"):
        forced, keys = _random_draws(key, sound.shape[0], config.teacher_forcing_prob)
        f0 = jnp.where(known & forced[:, None], batch.f0, jax.lax.stop_gradient(found))
        source = net.source(f0, frames, key=keys)
    made = net.decode(mel, source, frames)

    with jax.named_scope("loss"):
        first = jnp.full_like(frames, config.edge_frames)
        last = frames - config.edge_frames
        convergence, magnitude = multi_resolution_stft_loss(
            made, sound, first * VOCODER_HOP, last * VOCODER_HOP, config.resolutions
        )
        again = mel_24k(made, frames * VOCODER_HOP).swapaxes(1, 2)
        judged = length_mask(last, room) & ~length_mask(first, room)
        timbre = masked_mean(jnp.mean(jnp.abs(again - true), -1), judged.astype(jnp.float32))
        loss = config.convergence_weight * convergence + config.magnitude_weight * magnitude
        loss = loss + config.mel_weight * timbre + config.pitch_weight * pitch
    report = {
        "convergence": convergence,
        "magnitude": magnitude,
        "mel": timbre,
        "pitch": pitch,
        "voicing": right,
        "frames": jnp.sum(frames),
    }
    return loss, {name: jnp.asarray(value, jnp.float32) for name, value in report.items()}


def _log_pitch_distance(a: Float[Array, "B T"], b: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.abs(jnp.log(a + PITCH_OFFSET) - jnp.log(b + PITCH_OFFSET))


def _random_draws(key: Array, rows: int, share: float) -> tuple[Bool[Array, "B"], Array]:
    """Whether each row has the true pitch, and the key of its noise."""
    keys = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(key, row)))(jnp.arange(rows))
    return jax.vmap(jax.random.uniform)(keys[:, 0]) < share, keys[:, 1]


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VocoderRecipe(NetworkRecipe):
    """Of the vocoder; its parts are `f0_predictor`, `merge`, `pre`, `stage0` …, `post`."""

    kind = "vocoder"
    data: CropConfig
    loss: VocoderLossConfig = field(default_factory=VocoderLossConfig)


class VocoderTrainer(NetworkTrainer[DetokenizerNetwork, VocoderRecipe, CropData]):
    """How the vocoder is trained."""

    recipe = VocoderRecipe
    loss = staticmethod(vocoder_loss)
    open = staticmethod(partial(open_detokenizer_network, "vocoder"))

    def open_data(
        self,
        network: DetokenizerNetwork,
        recipe: VocoderRecipe,
        *,
        seed: int,
        training: CropData | None = None,
    ) -> CropData:
        """Pieces of clips."""
        return CropData(recipe.data, seed=seed)

    def abstract_batch(
        self, network: DetokenizerNetwork, recipe: VocoderRecipe, mesh: Mesh | None, rows: int
    ) -> VocoderBatch:
        """Shapes and places of a batch of whole pieces."""
        return abstract_vocoder_batch(mesh, rows, self.longest_row(recipe))

    def longest_row(self, recipe: VocoderRecipe) -> int:
        """Frames of a piece."""
        return recipe.data.crop


VOCODER_TRAINER = VocoderTrainer()
