"""What a model is made of: frozen dataclasses, read from and written to `config.json`.

The names here are the library's own and say what a number means; `from_hf` and `to_hf` know the
names of the released files. Both are driven by the same tables, so they cannot drift apart.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml

from sa2jax.errors import ConfigError
from sa2jax.flow_yaml import read_flow_yaml, write_flow_yaml

ARCHITECTURE = "StepAudio2ForCausalLM"
MODEL_TYPE = "step_audio_2"


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The language model: a Qwen2.5 decoder with an untied output matrix."""

    vocab: int
    layers: int
    embed: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int = 0  # 0: embed / heads
    max_positions: int = 16384
    norm_eps: float = 1e-6
    rope_theta: float = 1e6

    def __post_init__(self):
        _require_numbers(self, zero=("head_dim",))
        if not self.head_dim:
            _require(self.embed % self.heads == 0, "decoder embed must divide into its heads", self)
            object.__setattr__(self, "head_dim", self.embed // self.heads)
        _require(
            self.heads % self.kv_heads == 0, "decoder heads must be a multiple of kv_heads", self
        )
        _require(self.head_dim % 2 == 0, "decoder head_dim must be even (rotary halves)", self)


@dataclass(frozen=True, kw_only=True)
class AudioEncoderConfig:
    """The listening side: a Whisper-style encoder of 100 Hz log-mel frames, 25 Hz out."""

    mels: int
    layers: int
    embed: int
    heads: int
    max_positions: int = 1500  # 20 ms frames, after the second convolution
    mlp_ratio: int = 4

    def __post_init__(self):
        _require_numbers(self)
        _require(self.embed % self.heads == 0, "encoder embed must be a multiple of heads", self)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed // self.heads


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The bridge from encoder frames (25 Hz) to decoder embeddings (12.5 Hz)."""

    hidden: int = 2048
    kernel: int = 3
    stride: int = 2

    def __post_init__(self):
        _require_numbers(self)


@dataclass(frozen=True, kw_only=True)
class StepAudio2Config:
    """One Step-Audio 2 model: encoder, adapter and decoder.

    Attributes:
        decoder: sizes of the language model.
        audio_encoder: sizes of the audio encoder.
        adapter: sizes of the bridge between the two.
        dtype: the dtype the released weights are stored in.
        hf: keys of `config.json` that say nothing about sizes, kept word for word for export.
        flat: whether `config.json` held the text fields at its top level (the 32 B siblings).
    """

    decoder: DecoderConfig
    audio_encoder: AudioEncoderConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    dtype: str = "bfloat16"
    hf: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False, repr=False)
    flat: bool = False

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> Self:
        """Read a Hugging Face `config.json`, nested (mini) or flat (32 B siblings).

        Args:
            source: the parsed JSON, or a path to the file or its folder.

        Raises:
            ConfigError: for another architecture, an unknown or missing key, or a setting that
                this implementation does not compute (a scaled rotary embedding, say).
        """
        raw = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        named = raw.get("architectures") or raw.get("model_type")
        named = named if isinstance(named, list | tuple) else [named]
        if ARCHITECTURE not in named and MODEL_TYPE not in named:
            raise ConfigError(
                f"expected a config.json with architectures [{ARCHITECTURE!r}], got {named!r}: "
                "this is another model's checkpoint"
            )
        flat = "text_config" not in raw
        top = dict(raw)
        encoder_raw = _take_mapping(top, "audio_encoder_config")
        text_raw = top if flat else _take_mapping(top, "text_config")
        problems: list[str] = []
        text, text_rest = _split(text_raw, _TEXT_KEYS, "text_config", problems)
        audio, audio_rest = _split(encoder_raw, _AUDIO_KEYS, "audio_encoder_config", problems)
        kept = {"text_config": text_rest, "audio_encoder_config": audio_rest}
        kept["top"] = {} if flat else top
        for name, rest in (("text_config", text_rest), *(() if flat else (("config.json", top),))):
            problems += _unknown(rest, name)
        problems += _unknown(audio_rest, "audio_encoder_config")
        problems += _unsupported(text_rest)
        for section, key, other in (
            (text_rest, "num_attention_groups", "num_key_value_heads"),
            (encoder_raw, "llm_dim", "hidden_size"),
        ):
            value, expected = section.get(key), text_raw.get(other)
            if None not in (value, expected) and value != expected:
                problems.append(f"{key}={value!r} and {other}={expected!r} must be equal")
        if problems:
            raise ConfigError("config.json: " + "; ".join(problems))
        audio.pop("llm_dim")
        if text_rest.get("max_seq_len"):
            text.setdefault("max_positions", text_rest["max_seq_len"])
        adapter = {k: audio.pop(k) for k in ("kernel", "stride")}
        dtype = text_rest.get("torch_dtype") or text_rest.get("dtype") or raw.get("torch_dtype")
        return cls(
            decoder=DecoderConfig(**text),
            audio_encoder=AudioEncoderConfig(**audio),
            adapter=AdapterConfig(**adapter),
            dtype=dtype or "bfloat16",
            hf=kept,
            flat=flat,
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model, in the form it came in."""
        decoder = asdict(self.decoder)
        if self.decoder.head_dim * self.decoder.heads == self.decoder.embed:
            decoder.pop("head_dim")
        encoder = {
            **asdict(self.audio_encoder),
            **asdict(self.adapter),
            "llm_dim": decoder["embed"],
        }
        text = {hf: decoder[own] for hf, own in _TEXT_KEYS.items() if own in decoder}
        audio = {hf: encoder[own] for hf, own in _AUDIO_KEYS.items()}
        kept = self.hf or {
            "top": {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE},
            "text_config": {"num_attention_groups": self.decoder.kv_heads, "rope_scaling": None,
                            "torch_dtype": self.dtype},
            "audio_encoder_config": {"n_codebook_size": 4096},
        }  # fmt: skip
        text |= kept["text_config"]
        audio |= kept["audio_encoder_config"]
        if self.flat:
            return {**kept["top"], **text, "audio_encoder_config": audio}
        return {**kept["top"], "text_config": text, "audio_encoder_config": audio}

    @classmethod
    def preset(cls, name: str) -> Self:
        """A named size from `configs/models`, such as `mini` or `tiny`.

        Raises:
            ConfigError: if there is no such preset.
        """
        folder = resources.files("sa2jax.configs.models")
        path = folder / f"{name}.yaml"
        if not path.is_file():
            known = sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))
            raise ConfigError(f"no model preset {name!r}: expected one of {', '.join(known)}")
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return cls(
            decoder=DecoderConfig(**raw["decoder"]),
            audio_encoder=AudioEncoderConfig(**raw["audio_encoder"]),
            adapter=AdapterConfig(**raw["adapter"]),
        )

    def with_dtype(self, dtype: str) -> Self:
        """The same model with its stored dtype changed."""
        return replace(self, dtype=dtype)


# Released name -> ours. What is not listed here and not known to be inert is an error.
_TEXT_KEYS = {
    "vocab_size": "vocab",
    "hidden_size": "embed",
    "intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
}
_AUDIO_KEYS = {
    "n_mels": "mels",
    "n_audio_ctx": "max_positions",
    "n_audio_state": "embed",
    "n_audio_head": "heads",
    "n_audio_layer": "layers",
    "llm_dim": "llm_dim",
    "kernel_size": "kernel",
    "adapter_stride": "stride",
}
_OPTIONAL = {"head_dim", "max_position_embeddings", "kernel_size", "adapter_stride"}
_DEFAULTS = {"kernel": 3, "stride": 2}
_FLOATS = {"norm_eps", "rope_theta"}
_NUMBERS: Mapping[Any, str] = {int: "a whole number above 0", float: "a number above 0"}
# Keys that change nothing this library computes: kept for export.
_INERT_KEYS = {
    "_attn_implementation", "_name_or_path", "architectures", "attention_bias", "attention_dropout",
    "auto_map", "bos_token_id", "dtype", "eos_token_id", "hidden_act", "initializer_range",
    "is_encoder_decoder", "layer_types", "max_seq_len", "max_window_layers", "model_type",
    "n_codebook_size", "num_attention_groups", "output_attentions", "output_hidden_states",
    "pad_token_id", "quantization_config", "return_dict", "rope_scaling", "sliding_window",
    "tie_word_embeddings", "torch_dtype", "torchscript", "transformers_version", "use_cache",
    "use_sliding_window",
}  # fmt: skip


def _require(condition: bool, message: str, config: object) -> None:
    if not condition:
        values = ", ".join(f"{f.name}={getattr(config, f.name)}" for f in fields(config))  # type: ignore[arg-type]
        raise ConfigError(f"{message} (got {values})")


def _require_numbers(config: Any, zero: tuple[str, ...] = ()) -> None:
    """Every field must be a number of its kind and above 0; those named in `zero` may be 0."""
    for f in fields(config):
        value = getattr(config, f.name)
        good = _is_number(value, f.type) or (f.name in zero and value == 0)
        _require(good, f"{f.name} must be {_NUMBERS[f.type]}", config)


def _is_number(value: object, kind: Any) -> bool:
    """Whether a value is an int (or, for float, any finite number) above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf and (kind is float or isinstance(value, int))


def _read_json(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config.json at {path}: expected a Step-Audio 2 folder") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _take_mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.pop(key, None)
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: expected an object under {key!r}, got {value!r}")
    return dict(value)


def _split(
    raw: Mapping[str, Any], table: Mapping[str, str], where: str, problems: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part one section of config.json into our fields and the rest."""
    own, rest = {}, {}
    for key, value in raw.items():
        if key not in table or (value is None and key in _OPTIONAL):
            rest[key] = value
            continue
        own[table[key]] = value
        kind = float if table[key] in _FLOATS else int
        if not _is_number(value, kind):
            problems.append(f"{where}.{key} must be {_NUMBERS[kind]}, got {value!r}")
    missing = [k for k in table if table[k] not in own and k not in _OPTIONAL]
    if missing:
        problems.append(f"{where} lacks {', '.join(missing)}")
    for key in _OPTIONAL & set(table):
        if table[key] in _DEFAULTS:
            own.setdefault(table[key], _DEFAULTS[table[key]])
    return own, rest


def _unknown(rest: Mapping[str, Any], where: str) -> list[str]:
    # A key that is optional here was left without a value: it changes nothing either.
    unknown = sorted(set(rest) - _INERT_KEYS - _OPTIONAL)
    if not unknown:
        return []
    return [f"{where} has unknown keys {', '.join(unknown)} (refusing to guess their meaning)"]


def _unsupported(text: Mapping[str, Any]) -> list[str]:
    """Settings that would change the arithmetic in a way this library does not follow."""
    checks = {
        "rope_scaling": (None,),
        "hidden_act": ("silu", None),
        "tie_word_embeddings": (False, None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "attention_bias": (True, None),
    }
    return [
        f"{key}={text[key]!r} is not supported (expected {allowed[0]!r})"
        for key, allowed in checks.items()
        if key in text and text[key] not in allowed
    ]


# ---- voice analysis ------------------------------------------------------------------------------


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
        _require(self.embed % self.head_dim == 0, "embed must be a multiple of head_dim", self)

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
        _require(same, "each block of layers needs one dilation", self)
        _require(self.mels % self.shrink == 0, f"mels must be a multiple of {self.shrink}", self)

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
        _require(self.embed % self.heads == 0, "encoder embed must be a multiple of heads", self)
        _require(self.embed % 2 == 0, "encoder embed must be even (sine and cosine)", self)
        _require(self.inputs == self.embed, "encoder input and output sizes must be equal", self)

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
        flow = asdict(self)
        return write_flow_yaml(
            flow | {"decoder": {"guidance": self.guidance, "estimator": flow["estimator"]}}
        )


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
    sample_rate: int = 24000
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
        _require(len(stages) == 1, "rates, kernels and source blocks must be of one length", self)
        same = len(self.block_kernels) == len(self.block_dilations)
        _require(same, "each residual block needs its dilations", self)
        _require(self.n_fft % (2 * self.hop) == 0, "n_fft must be a multiple of 2 hop", self)
        _require(self.channels % 2 ** len(self.rates) == 0, "channels must halve evenly", self)
        even = all(
            (k - u) % 2 == 0 and k >= u for u, k in zip(self.rates, self.kernels, strict=True)
        )
        _require(even, "kernels must exceed rates by an even number", self)

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
