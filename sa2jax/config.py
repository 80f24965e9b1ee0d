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
from typing import Any, ClassVar, Self

import yaml

from sa2jax.errors import ConfigError


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
            require(self.embed % self.heads == 0, "decoder embed must divide into its heads", self)
            object.__setattr__(self, "head_dim", self.embed // self.heads)
        require(
            self.heads % self.kv_heads == 0, "decoder heads must be a multiple of kv_heads", self
        )
        require(self.head_dim % 2 == 0, "decoder head_dim must be even (rotary halves)", self)


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
        require(self.embed % self.heads == 0, "encoder embed must be a multiple of heads", self)

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
        architecture: what `config.json` calls it under `architectures`.
        model_type: and under `model_type`.
    """

    architecture: ClassVar[str] = "StepAudio2ForCausalLM"
    model_type: ClassVar[str] = "step_audio_2"

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
        raw = dict(source) if isinstance(source, Mapping) else read_json(source)
        named = architectures_of(raw)
        if cls.architecture not in named and cls.model_type not in named:
            raise ConfigError(
                f"expected a config.json with architectures [{cls.architecture!r}], got {named!r}: "
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
        adapter = {k: audio.pop(k) for k in ("hidden", "kernel", "stride")}
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
        if self.adapter.hidden == AdapterConfig.hidden:  # the released code has no other
            del audio["adapter_hidden"]
        kept = self.hf or {
            "top": {"architectures": [self.architecture], "model_type": self.model_type},
            "text_config": {
                "num_attention_groups": self.decoder.kv_heads,
                "rope_scaling": None,
                "torch_dtype": self.dtype,
            },
            "audio_encoder_config": {"n_codebook_size": 4096},
        }
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
        raw = read_preset("models", "model", name)
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
    "adapter_hidden": "hidden",  # ours
}
_OPTIONAL = {
    "head_dim",
    "max_position_embeddings",
    "kernel_size",
    "adapter_stride",
    "adapter_hidden",
}
_DEFAULTS = {"kernel": 3, "stride": 2, "hidden": 2048}
_FLOATS = {"norm_eps", "rope_theta"}
_NUMBERS: Mapping[Any, str] = {int: "a whole number above 0", float: "a number above 0"}
# Keys that change nothing this library computes: kept for export.
_INERT_KEYS = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attention_bias",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "is_encoder_decoder",
    "layer_types",
    "max_seq_len",
    "max_window_layers",
    "model_type",
    "n_codebook_size",
    "num_attention_groups",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "quantization_config",
    "return_dict",
    "rope_scaling",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
}


def read_preset(folder: str, what: str, name: str) -> dict[str, Any]:
    """The values of a named preset.

    Args:
        folder: of `configs`.
        what: what it is a preset of, for what is said.
        name: without `.yaml`.

    Raises:
        ConfigError: if there is no such preset.
    """
    home = resources.files(f"sa2jax.configs.{folder}")
    path = home / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.name[:-5] for p in home.iterdir() if p.name.endswith(".yaml"))
        raise ConfigError(f"no {what} preset {name!r}: expected one of {', '.join(known)}")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def require(condition: bool, message: str, config: object) -> None:
    """Raise a ConfigError with the values of a config unless a condition holds."""
    if not condition:
        values = ", ".join(f"{f.name}={getattr(config, f.name)}" for f in fields(config))  # type: ignore[arg-type]
        raise ConfigError(f"{message} (got {values})")


def _require_numbers(config: Any, zero: tuple[str, ...] = ()) -> None:
    """Every field must be a number of its kind and above 0; those named in `zero` may be 0."""
    for f in fields(config):
        value = getattr(config, f.name)
        good = _is_number(value, f.type) or (f.name in zero and value == 0)
        require(good, f"{f.name} must be {_NUMBERS[f.type]}", config)


def _is_number(value: object, kind: Any) -> bool:
    """Whether a value is an int (or, for float, any finite number) above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf and (kind is float or isinstance(value, int))


def architectures_of(raw: Mapping[str, Any]) -> list[Any]:
    """What a parsed `config.json` calls its model: `architectures`, else `model_type`."""
    named = raw.get("architectures") or raw.get("model_type")
    return list(named) if isinstance(named, list | tuple) else [named]


def read_json(path: str | Path) -> dict[str, Any]:
    """Parse a `config.json`.

    Args:
        path: the file, or its folder.

    Raises:
        ConfigError: if it is missing, unreadable, or holds no JSON object.
    """
    path = Path(path)
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
