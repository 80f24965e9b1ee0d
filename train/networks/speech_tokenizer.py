"""Training of the S3 speech tokenizer by CTC through its quantizer: loss, recipe and trainer.

    model = speech_tokenizer_with_heads(config)
    params = init_speech_tokenizer(config)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-3, steps=1500))
    step = make_loss_step(speech_tokenizer_loss, model, optimizer)
    state = init_state(model, optimizer, None, params)
    state, report = step(state, batch)
    codes = speech_tokenizer(config).bind(network_params(state.params))

Source: CosyVoice 2 (arXiv 2412.10117), section 2.2: finite scalar quantization (arXiv 2309.15505)
inside a speech recogniser, with gradients that pass the rounding unchanged. There the recogniser's
later half reads the codes; here a few layers do, and spell by CTC. A second head has to tell each
code's mel frames, given the clip's mean and deviation of every band, so that codes keep what the
letters leave open but need not tell voices apart.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sa2jax.audio.features import HOP, s3_log_mel
from sa2jax.errors import TrainError
from sa2jax.models.convolution import Conv
from sa2jax.models.speech_tokenizer import FSQ_SCALE, LEVELS, Layer, SpeechTokenizer, code_length
from sa2jax.nn import (
    Functional,
    LayerNorm,
    Linear,
    Params,
    Policy,
    init_params,
    length_mask,
    over_layers,
    stack,
    structure_of,
)
from sa2jax.speech_config import SpeechTokenizerConfig
from sa2jax.train.networks.augmentation import Augmentation, augment_waveform, spec_augment
from sa2jax.train.networks.batches import SoundBatch
from sa2jax.train.networks.model_io import DetokenizerNetwork, open_detokenizer_network
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.recognition import (
    CTCHead,
    CTCLogits,
    RecognitionOutput,
    ctc_greedy_decode,
    ctc_loss,
    loss_from_forward,
    scale_conv_init,
)
from sa2jax.train.networks.speech_data import ClipConfig
from sa2jax.train.networks.trainer import ClipTrainer

FRAMES = 4  # mel frames (100 Hz) of a code (25 Hz)


@dataclass(frozen=True, kw_only=True)
class SpeechTokenizerLossConfig:
    """How the tokenizer is taught.

    Attributes:
        augmentation: of what it hears; None for none. Mel frames are told as they were before it.
        intermediate_ctc_weight: weight of the letters that are read before the rounding.
        mel_weight: weight of the mel frames' error.
        codebook_weight: weight of what keeps digits apart and their levels equally frequent, see
            `codebook_balance_loss` and `saturation_loss`; without it a tokenizer uses a handful of
            codes before it hears its first letters.
    """

    augmentation: Augmentation | None = field(default_factory=Augmentation)
    intermediate_ctc_weight: float = 1.0
    mel_weight: float = 1.0
    codebook_weight: float = 1.0

    def __post_init__(self):
        for name in ("intermediate_ctc_weight", "mel_weight", "codebook_weight"):
            if not getattr(self, name) >= 0:
                raise TrainError(f"{name}={getattr(self, name)}: expected a number of 0 or more")


class SpeechTokenizerHeads(nnx.Module):
    """What reads letters and mel frames from digits.

    Args:
        cfg: sizes of the tokenizer; the heads are as wide.
        layers: transformer layers that read the digits.
        policy: dtypes.
        rngs: source of randomness.
    """

    def __init__(self, cfg: SpeechTokenizerConfig, layers: int, *, policy: Policy, rngs: nnx.Rngs):
        make = {"policy": policy, "rngs": rngs}
        embed = {"embed": cfg.embed}
        self.embed = Linear({"digits": cfg.digits}, embed, **make)
        self.layers = stack(lambda rngs: Layer(cfg, policy=policy, rngs=rngs), layers, rngs)
        self.norm = LayerNorm(cfg.embed, **make)
        self.letters = CTCHead(cfg.embed, **make)
        self.early_norm = LayerNorm(cfg.embed, **make)
        self.early = CTCHead(cfg.embed, **make)
        self.near = Conv(cfg.digits, cfg.embed, kernel=5, **make)
        self.voice = Linear({"statistics": 2 * cfg.mels}, embed, **make)
        self.mix = Linear(embed, embed, **make)
        self.mels = Linear(embed, {"frames": FRAMES, "bands": cfg.mels}, **make)

    def ctc_logits(self, digits: Float[Array, "B S G"], lengths: Int[Array, "B"]) -> CTCLogits:
        """Logits of letters, see `CTCHead`."""
        own = length_mask(lengths, digits.shape[1])

        def layer(x, layer_and_index):
            return layer_and_index[0](x, own), None

        x, _ = over_layers(layer, self.embed(digits), self.layers)
        return self.letters(self.norm(x), lengths)

    def intermediate_ctc_logits(
        self, hidden: Float[Array, "B S D"], lengths: Int[Array, "B"]
    ) -> CTCLogits:
        """Logits of letters from what is rounded later."""
        return self.early(self.early_norm(hidden), lengths)

    def predict_mels(
        self, digits: Float[Array, "B S G"], voice: Float[Array, "B C"]
    ) -> Float[Array, "B S F M"]:
        """The mel frames of each code, from it and its neighbours, in bands of mean 0."""
        x = jax.nn.gelu(self.near(digits) + self.voice(voice)[:, None])
        return self.mels(jax.nn.gelu(self.mix(x)))


class SpeechTokenizerWithHeads(nnx.Module):
    """A tokenizer and what it is taught with: parameters `model` and `heads`."""

    def __init__(
        self, cfg: SpeechTokenizerConfig, *, layers: int = 1, policy: Policy, rngs: nnx.Rngs
    ):
        self.cfg = cfg
        self.model = SpeechTokenizer(cfg, policy=policy, rngs=rngs)
        self.heads = SpeechTokenizerHeads(cfg, layers, policy=policy, rngs=rngs)


def speech_tokenizer_with_heads(
    cfg: SpeechTokenizerConfig, policy: Policy | None = None, *, layers: int = 1
) -> Functional[SpeechTokenizerWithHeads]:
    """The structure of a config's tokenizer and its heads, see `nn.structure_of`."""
    return structure_of(SpeechTokenizerWithHeads, cfg, policy, layers=layers)


def init_speech_tokenizer(
    cfg: SpeechTokenizerConfig, policy: Policy | None = None, *, layers: int = 1, seed: int = 0
) -> Params:
    """Random parameters of tokenizer and heads, see `scale_conv_init`."""
    policy = Policy() if policy is None else policy
    params = init_params(
        lambda: SpeechTokenizerWithHeads(cfg, layers=layers, policy=policy, rngs=nnx.Rngs(seed))
    )
    return params | {"model": scale_conv_init(params["model"])}


def straight_through_digits(x: Float[Array, "B S G"]) -> Float[Array, "B S G"]:
    """Digits −1, 0 and 1 of what tanh is taken of; their gradient is that before the rounding."""
    x = jnp.tanh(x) * FSQ_SCALE
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def saturation_loss(x: Float[Array, "B S G"], lengths: Int[Array, "B"]) -> Float[Array, ""]:
    """Mean squared distance beyond −1 and 1 of what tanh is taken of.

    Where tanh is flat no gradient brings a digit back: without this 98 % of them end as −1 or 1,
    and a codebook of 243 is one of 32.
    """
    own = length_mask(lengths, x.shape[1])[..., None]
    beyond = jnp.maximum(jnp.abs(x) - 1, 0)
    count = jnp.maximum(jnp.sum(own) * x.shape[-1], 1)
    return jnp.sum(jnp.where(own, jnp.square(beyond), 0)) / count


def codebook_balance_loss(
    digits: Float[Array, "B S G"], lengths: Int[Array, "B"]
) -> Float[Array, ""]:
    """How far digits are from three levels that are equally frequent and independent; 0 is best.

    The squared distance, per digit, of the mean from 0 and of the covariance from 2/3 on the
    diagonal and 0 beside it, over all frames of a batch.
    """
    own = length_mask(lengths, digits.shape[1])[..., None]
    count = jnp.maximum(jnp.sum(own), 1)
    x = jnp.where(own, digits, 0).reshape(-1, digits.shape[-1])
    mean = x.sum(0) / count
    spread = x.T @ x / count - jnp.outer(mean, mean)
    off = spread - (LEVELS**2 - 1) / 12 * jnp.eye(len(mean))
    return (jnp.sum(jnp.square(mean)) + jnp.sum(jnp.square(off))) / len(mean)


def codes_from_digits(digits: Float[Array, "B S G"], lengths: Int[Array, "B"]) -> Int[Array, "B S"]:
    """Codes of digits, 0 beyond each clip's own."""
    whole = jnp.round(digits).astype(jnp.int32) + LEVELS // 2
    codes = whole @ (LEVELS ** jnp.arange(digits.shape[-1], dtype=jnp.int32))
    return jnp.where(length_mask(lengths, codes.shape[1]), codes, 0)


def speech_tokenizer_forward(
    model: Functional[SpeechTokenizerWithHeads],
    params: Params,
    batch: SoundBatch[Array],
    key: Array | None = None,
    config: SpeechTokenizerLossConfig | None = None,
) -> RecognitionOutput:
    """How badly letters and mel frames can be read from a batch's codes.

    Args:
        model: the structure of tokenizer and heads.
        params: their parameters.
        batch: clips.
        key: of all that is drawn; None to disturb nothing.
        config: how, by default `SpeechTokenizerLossConfig()`.

    Returns:
        The weighted sum of errors, letters, codes, and scalars to report: `ctc` and
        `intermediate_ctc` (nats per letter), `mel_error` (of `s3_log_mel`), `codebook_balance`,
        `saturation`, `codebook_usage` (share of the codebook that the batch uses), `letters` and
        `skipped`, see `ctc_loss`.
    """
    config = SpeechTokenizerLossConfig() if config is None else config
    teacher = model.bind(params)
    net, heads, bands = teacher.model, teacher.heads, teacher.cfg.mels
    with jax.named_scope("front_end"):
        frames = batch.lengths // HOP
        clean = s3_log_mel(batch.sound, batch.lengths, n_mels=bands)
        mels = clean
        if key is not None and config.augmentation is not None:
            sound = augment_waveform(batch, key, config.augmentation)
            mels = s3_log_mel(sound, batch.lengths, n_mels=bands)
            mels = spec_augment(mels, frames, key, config.augmentation)
    hidden, lengths = net.encode(mels, frames), code_length(frames)
    raw = net.digits(hidden).astype(jnp.float32)
    digits = straight_through_digits(raw)
    digits = jnp.where(length_mask(lengths, digits.shape[1])[..., None], digits, 0)
    with jax.named_scope("letters"):
        spelled = heads.ctc_logits(digits, lengths)
        ctc, report = ctc_loss(*spelled, batch.letters, batch.letter_counts)
        early = heads.intermediate_ctc_logits(hidden, lengths)
        early, _ = ctc_loss(*early, batch.letters, batch.letter_counts)
    with jax.named_scope("mels"):
        error = _mel_error(heads, digits, clean, frames)
    codes = codes_from_digits(digits, lengths)
    seen = jnp.zeros(teacher.cfg.codebook).at[codes].max(length_mask(lengths, codes.shape[1]))
    bent, beyond = codebook_balance_loss(digits, lengths), saturation_loss(raw, lengths)
    report |= {
        "ctc": ctc,
        "intermediate_ctc": early,
        "mel_error": error,
        "codebook_balance": bent,
        "saturation": beyond,
        "codebook_usage": seen.mean(),
    }
    spread = config.codebook_weight * (bent + beyond)
    loss = ctc + config.intermediate_ctc_weight * early + config.mel_weight * error + spread
    return RecognitionOutput(loss, report, letters=ctc_greedy_decode(*spelled), codes=codes)


speech_tokenizer_loss = loss_from_forward(speech_tokenizer_forward)


def _mel_error(
    heads: SpeechTokenizerHeads,
    digits: Float[Array, "B S G"],
    mels: Float[Array, "B M T"],
    frames: Int[Array, "B"],
) -> Float[Array, ""]:
    """Mean distance of told mel frames from the clip's own, each band less its mean."""
    own = length_mask(frames, mels.shape[2])[:, None]  # [B, 1, T]
    count = jnp.maximum(frames, 1)[:, None, None]
    mean = jnp.sum(jnp.where(own, mels, 0), axis=2, keepdims=True) / count
    mels = jnp.where(own, mels - mean, 0)
    spread = jnp.sqrt(jnp.sum(jnp.square(mels), axis=2, keepdims=True) / count + 1e-8)
    voice = jnp.concatenate([mean, spread], axis=1)[..., 0]
    told = heads.predict_mels(digits, voice)  # [B, S, F, M]
    told = told.reshape(told.shape[0], -1, told.shape[-1]).swapaxes(1, 2)[..., : mels.shape[2]]
    total = jnp.maximum(jnp.sum(frames) * mels.shape[1], 1)
    return jnp.sum(jnp.where(own, jnp.abs(told - mels), 0)) / total


def codebook_usage(codes: Int[np.ndarray, "N"]) -> dict[str, float]:
    """How many different codes there are, and how many there would be if all were equally frequent.

    Args:
        codes: of any clips, those alone that count.

    Returns:
        `codes` and `perplexity`.
    """
    _, counts = np.unique(codes, return_counts=True)
    share = counts / max(counts.sum(), 1)
    return {
        "codes": float(len(counts)),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpeechTokenizerRecipe(NetworkRecipe):
    """Of the speech tokenizer."""

    kind = "speech_tokenizer"
    data: ClipConfig
    loss: SpeechTokenizerLossConfig = field(default_factory=SpeechTokenizerLossConfig)


class SpeechTokenizerTrainer(ClipTrainer[DetokenizerNetwork, SpeechTokenizerRecipe]):
    """How the speech tokenizer is trained."""

    recipe = SpeechTokenizerRecipe
    loss = staticmethod(speech_tokenizer_loss)
    forward = staticmethod(speech_tokenizer_forward)
    open = staticmethod(partial(open_detokenizer_network, "speech_tokenizer"))
    with_heads = staticmethod(speech_tokenizer_with_heads)
    init_with_heads = staticmethod(init_speech_tokenizer)

    def code_metrics(self, codes: Int[np.ndarray, "N"]) -> dict[str, float]:
        """How much of the codebook is used."""
        return codebook_usage(codes)


SPEECH_TOKENIZER_TRAINER = SpeechTokenizerTrainer()
