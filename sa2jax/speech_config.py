"""Configs of the speech side: codes, voices and sound.

A `Token2WavConfig` holds the sizes of the four networks between audio codes and a waveform. Strict:
what is unknown, missing or out of range is an error.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sa2jax.audio.rates import SPEECH_SAMPLE_RATE
from sa2jax.config import read_preset, require
from sa2jax.errors import ConfigError
from sa2jax.files.sizes import from_nested
from sa2jax.flow_yaml import flow_settings, read_flow_yaml, write_flow_yaml


@dataclass(frozen=True, kw_only=True)
class SpeechTokenizerConfig:
    """The S3 speech tokenizer, version 2: 100 Hz log-mel frames to 25 Hz codes.

    Attributes:
        mels: mel bands.
        layers: transformer layers.
        embed: width.
        mlp: width inside the MLP.
        memory: frames that the FSMN memory of each layer sees.
        digits: base-3 digits of a code.
        head_dim: width of one attention head; 64 in every release.
    """

    mels: int
    layers: int
    embed: int
    mlp: int
    memory: int
    digits: int
    head_dim: int = 64

    def __post_init__(self):
        fine = self.embed % self.head_dim == 0 and self.digits <= 12
        require(fine, "embed must be a multiple of head_dim, digits at most 12", self)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.embed // self.head_dim

    @property
    def codebook(self) -> int:
        """Number of codes."""
        return 3**self.digits


@dataclass(frozen=True, kw_only=True)
class SpeakerEncoderConfig:
    """The CAM++ speaker encoder: 100 Hz filterbank energies to one vector.

    Attributes:
        mels: filterbank bands.
        head: channels of the two-dimensional convolutions.
        stages: residual blocks in each stage of the head; each stage halves the bands.
        channels: channels after the first convolution over time.
        growth: channels that each densely connected layer adds.
        bottleneck: channels inside a densely connected layer.
        mask: channels inside the context-aware mask.
        layers: densely connected layers in each block.
        dilations: spacing of the taps over time in each block.
        embed: width of the speaker vector.
        kernel: taps of the first convolution over time, which halves the rate.
        taps: taps of the densely connected layers.
        segment: frames that share one local context.
    """

    mels: int
    head: int
    stages: tuple[int, ...]
    channels: int
    growth: int
    bottleneck: int
    mask: int
    layers: tuple[int, ...]
    dilations: tuple[int, ...]
    embed: int
    kernel: int = 5
    taps: int = 3
    segment: int = 100

    def __post_init__(self):
        for name in ("stages", "layers", "dilations"):  # lists when read from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        same = len(self.layers) == len(self.dilations)
        require(same, "each block of layers needs one dilation", self)
        require(self.mels % self.shrink == 0, f"mels must be a multiple of {self.shrink}", self)

    @property
    def shrink(self) -> int:
        """How many times fewer bands leave the head than enter it."""
        return 2 ** (len(self.stages) + 1)


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """The flow's encoder: embedded speech codes (25 Hz) to features at `upsample` times the rate.

    Attributes:
        inputs: width of an embedded code.
        embed: width of the layers.
        heads: attention heads.
        mlp: width inside the MLPs.
        layers: layers before the upsampling.
        up_layers: layers after it.
        lookahead: codes that are looked at before they are due.
        upsample: frames per code.
        key_bias: whether attention keys have a bias.
        look_kernel: taps of the causal convolution behind the look-ahead.
    """

    inputs: int
    embed: int
    heads: int
    mlp: int
    layers: int
    up_layers: int
    lookahead: int = 3
    upsample: int = 2
    key_bias: bool = True
    look_kernel: int = 3

    def __post_init__(self):
        require(self.embed % self.heads == 0, "encoder embed must be a multiple of heads", self)
        require(self.embed % 2 == 0, "encoder embed must be even (sine and cosine)", self)
        require(self.inputs == self.embed, "encoder input and output sizes must be equal", self)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed // self.heads

    @property
    def up_kernel(self) -> int:
        """Taps of the causal convolution behind the upsampling."""
        return 2 * self.upsample + 1


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """The flow's estimator: a diffusion transformer.

    Attributes:
        embed: width of the blocks.
        heads: attention heads.
        head_dim: width of one head.
        layers: blocks.
        mlp_ratio: width inside the MLPs over `embed`.
        frequencies: sinusoids that a noise level becomes.
        kernel: taps of the causal convolutions.
    """

    embed: int
    heads: int
    head_dim: int
    layers: int
    mlp_ratio: float = 4.0
    frequencies: int = 256
    kernel: int = 3

    @property
    def mlp(self) -> int:
        """Width inside the MLPs."""
        return int(self.embed * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Speech codes and a voice to mel frames.

    Attributes:
        codes: size of the code book.
        mels: bands of the mel spectrogram (50 Hz).
        speaker: length of a speaker vector.
        encoder: sizes of the encoder.
        estimator: sizes of the estimator.
        guidance: weight of what the condition changes (classifier-free guidance).
    """

    codes: int
    mels: int
    speaker: int
    encoder: ConformerConfig
    estimator: EstimatorConfig
    guidance: float = 0.7

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read the `flow.yaml` of a release as data: its tags name classes, nothing is run.

        Args:
            path: the file or its folder.

        Raises:
            ConfigError: for a missing or damaged file, another class, a tag that would run code,
                an unknown or missing key, or a setting that this library does not compute.
        """
        flow = read_flow_yaml(path)
        decoder = flow.pop("decoder")
        encoder = ConformerConfig(**flow.pop("encoder"))
        estimator = EstimatorConfig(**decoder.pop("estimator"))
        return cls(**flow, **decoder, encoder=encoder, estimator=estimator)

    def to_yaml(self) -> str:
        """The text of a `flow.yaml` that the official code reads."""
        return write_flow_yaml(self._nested())

    def to_official(self) -> dict[str, Any]:
        """What the official classes are made with, by their names, nested as they are."""
        return flow_settings(self._nested())

    def _nested(self) -> dict[str, Any]:
        flow = asdict(self)
        return flow | {"decoder": {"guidance": self.guidance, "estimator": flow["estimator"]}}


@dataclass(frozen=True, kw_only=True)
class VocoderConfig:
    """The HiFT vocoder: 50 Hz mel frames to a waveform. The defaults are the released sizes.

    Attributes:
        mels: bands of the mel spectrogram.
        channels: width after the first convolution; each upsampling halves it.
        harmonics: overtones of the source beside the fundamental.
        sample_rate: of the waveform, in Hz.
        sine_amplitude: of each harmonic.
        noise_std: of the noise in voiced frames; elsewhere it is a third of the amplitude.
        voiced_threshold: in Hz; frames at or below it are unvoiced.
        rates: factor of each upsampling.
        kernels: taps of each upsampling.
        n_fft: length of the inverse Fourier transform at the end.
        hop: its step.
        block_kernels: taps of the parallel residual blocks of every stage.
        block_dilations: spacing of the taps of each convolution in them.
        source_kernels: taps of the residual block on the source, per stage.
        source_dilations: spacing of the taps of each convolution in it.
        slope: of the leaky relu before each upsampling.
        limit: the waveform is clipped here.
        f0_channels: width of the pitch predictor.
        f0_layers: convolutions of the pitch predictor.
        carry: mel frames that a stream computes again with the next chunk.
    """

    mels: int = 80
    channels: int = 512
    harmonics: int = 8
    sample_rate: int = SPEECH_SAMPLE_RATE
    sine_amplitude: float = 0.1
    noise_std: float = 0.003
    voiced_threshold: float = 10.0
    rates: tuple[int, ...] = (8, 5, 3)
    kernels: tuple[int, ...] = (16, 11, 7)
    n_fft: int = 16
    hop: int = 4
    block_kernels: tuple[int, ...] = (3, 7, 11)
    block_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    source_kernels: tuple[int, ...] = (7, 7, 11)
    source_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    slope: float = 0.1
    limit: float = 0.99
    f0_channels: int = 512
    f0_layers: int = 5
    carry: int = 8

    def __post_init__(self):
        for name in ("rates", "kernels", "block_kernels", "source_kernels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("block_dilations", "source_dilations"):
            object.__setattr__(self, name, tuple(map(tuple, getattr(self, name))))
        stages = {len(self.rates), len(self.kernels)}
        stages |= {len(self.source_kernels), len(self.source_dilations)}
        require(len(stages) == 1, "rates, kernels and source blocks must be of one length", self)
        same = len(self.block_kernels) == len(self.block_dilations)
        require(same, "each residual block needs its dilations", self)
        require(self.n_fft % (2 * self.hop) == 0, "n_fft must be a multiple of 2 hop", self)
        require(self.channels % 2 ** len(self.rates) == 0, "channels must halve evenly", self)
        even = all(
            (k - u) % 2 == 0 and k >= u for u, k in zip(self.rates, self.kernels, strict=True)
        )
        require(even, "kernels must exceed rates by an even number", self)

    @property
    def samples(self) -> int:
        """Samples of one mel frame."""
        return math.prod(self.rates) * self.hop

    @classmethod
    def from_official(
        cls,
        generator: Mapping[str, Any] | None = None,
        f0_predictor: Mapping[str, Any] | None = None,
    ) -> Self:
        """From the constructor arguments of the official `HiFTGenerator` and `ConvRNNF0Predictor`.

        Raises:
            ConfigError: for an argument that is not known or not supported.
        """
        own: dict[str, Any] = {}
        spectral = dict(generator or {})
        spectral |= spectral.pop("istft_params", {})
        for where, given, table in (
            ("HiFTGenerator", spectral, _HIFT_KEYS),
            ("ConvRNNF0Predictor", dict(f0_predictor or {}), _F0_KEYS),
        ):
            unknown = sorted(set(given) - set(table))
            if unknown:
                raise ConfigError(f"{where} has unknown arguments {', '.join(unknown)}")
            for key, value in given.items():
                if own.setdefault(table[key], value) != value:
                    raise ConfigError(f"{where}: {key} {value} must be {own[table[key]]}")
        if own.pop("classes", 1) != 1:
            raise ConfigError("ConvRNNF0Predictor: num_class must be 1")
        return cls(**own)


@dataclass(frozen=True, kw_only=True)
class Token2WavConfig:
    """Everything between audio codes and a waveform, and what analyses a voice.

    Attributes:
        flow: codes and a voice to mel frames.
        vocoder: mel frames to a waveform.
        speech_tokenizer: a recording to codes.
        speaker_encoder: a recording to a speaker vector.
    """

    flow: FlowConfig
    vocoder: VocoderConfig
    speech_tokenizer: SpeechTokenizerConfig
    speaker_encoder: SpeakerEncoderConfig

    def __post_init__(self):
        same = self.flow.mels == self.vocoder.mels
        require(same, "flow and vocoder must have the same mel bands", self)
        same = self.flow.codes == self.speech_tokenizer.codebook
        require(same, "flow and speech tokenizer must have the same code book", self)
        same = self.flow.speaker == self.speaker_encoder.embed
        require(same, "flow and speaker encoder must have the same speaker vectors", self)

    @classmethod
    def released(cls) -> Self:
        """The sizes of the released Step-Audio 2 detokenizer."""
        return cls(
            flow=FlowConfig(
                codes=6561,
                mels=80,
                speaker=192,
                encoder=ConformerConfig(
                    inputs=512, embed=512, heads=8, mlp=2048, layers=6, up_layers=4
                ),
                estimator=EstimatorConfig(embed=512, heads=8, head_dim=64, layers=16),
            ),
            vocoder=VocoderConfig(),
            speech_tokenizer=SpeechTokenizerConfig(
                mels=128, layers=6, embed=1280, mlp=5120, memory=31, digits=8
            ),
            speaker_encoder=SpeakerEncoderConfig(
                mels=80,
                head=32,
                stages=(2, 2),
                channels=128,
                growth=32,
                bottleneck=128,
                mask=64,
                layers=(12, 24, 16),
                dilations=(1, 2, 2),
                embed=192,
            ),
        )

    @classmethod
    def preset(cls, name: str) -> Self:
        """Named sizes from `configs/token2wav`, such as `nano`.

        Raises:
            ConfigError: if there is no such preset.
        """
        raw = read_preset("token2wav", "detokenizer", name)
        flow = raw["flow"]
        return cls(
            flow=FlowConfig(
                **flow
                | {
                    "encoder": ConformerConfig(**flow["encoder"]),
                    "estimator": EstimatorConfig(**flow["estimator"]),
                }
            ),
            vocoder=VocoderConfig(**raw["vocoder"]),
            speech_tokenizer=SpeechTokenizerConfig(**raw["speech_tokenizer"]),
            speaker_encoder=SpeakerEncoderConfig(**raw["speaker_encoder"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From what `to_dict` gave, also after a way through JSON.

        Raises:
            ConfigError: for an unknown or missing key.
        """
        return from_nested(cls, values, "token2wav")


# Constructor arguments of the official vocoder -> ours.
_HIFT_KEYS = {
    "in_channels": "mels",
    "base_channels": "channels",
    "nb_harmonics": "harmonics",
    "sampling_rate": "sample_rate",
    "nsf_alpha": "sine_amplitude",
    "nsf_sigma": "noise_std",
    "nsf_voiced_threshold": "voiced_threshold",
    "upsample_rates": "rates",
    "upsample_kernel_sizes": "kernels",
    "n_fft": "n_fft",
    "hop_len": "hop",
    "resblock_kernel_sizes": "block_kernels",
    "resblock_dilation_sizes": "block_dilations",
    "source_resblock_kernel_sizes": "source_kernels",
    "source_resblock_dilation_sizes": "source_dilations",
    "lrelu_slope": "slope",
    "audio_limit": "limit",
}
_F0_KEYS = {"in_channels": "mels", "cond_channels": "f0_channels", "num_class": "classes"}
