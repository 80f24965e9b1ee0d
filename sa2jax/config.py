"""Model configurations: frozen dataclasses, read from and written to `config.json`.

The names here are the library's own and say what a number means; `from_hf` and `to_hf` know the
names of the released files. Both are driven by the same tables, so they cannot drift apart.

Source of the defaults: `configuration_step_audio_2.py` of the release (transformers 4.49).
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self

from sa2jax.errors import ConfigError, FileError, MissingFileError
from sa2jax.files import json_files
from sa2jax.files.sizes import MAX_LAYERS, MAX_SIZE
from sa2jax.files.yaml_files import parse_yaml


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

    def to_hf(self) -> dict[str, Any]:
        """The sizes by their names in `config.json`, those of a `transformers.Qwen2Config`."""
        return {name: getattr(self, own) for name, (own, _) in _TEXT_KEYS.items()}


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

        Keys that are not there have the values of the released class; keys that change nothing are
        kept for export, whatever they are called.

        Args:
            source: the parsed JSON, or a path to the file or its folder.

        Raises:
            ConfigError: for another architecture, a size that is no size, or a setting that this
                implementation does not compute (a scaled rotary embedding, say).
        """
        raw = dict(source) if isinstance(source, Mapping) else read_json(source)
        named = architectures_of(raw)
        if cls.architecture not in named and cls.model_type not in named:
            raise ConfigError(
                f"expected a config.json with architectures [{cls.architecture!r}], got "
                f"{reprlib.repr(named)}: this is another model's checkpoint"
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
        problems += _unsupported(text_rest, _FUNCTION_KEYS)
        for part in (kept["top"], audio_rest):
            problems += _unsupported(part, _STORAGE_KEYS)
        text["rope_theta"] = _rope_theta(text_raw, text["rope_theta"], problems)
        groups, llm_dim = text_rest.get("num_attention_groups"), audio.pop("llm_dim")
        for key, value, other, expected in (
            ("num_attention_groups", groups, "num_key_value_heads", text["kv_heads"]),
            ("llm_dim", llm_dim, "hidden_size", text["embed"]),
        ):
            if value is not None and value != expected:
                values = f"{key}={_short(value)} and {other}={_short(expected)}"
                problems.append(f"{values} must be equal")
        if text_raw.get("max_position_embeddings") is None and text_rest.get("max_seq_len"):
            text["max_positions"] = text_rest["max_seq_len"]
        adapter = {k: audio.pop(k) for k in ("hidden", "kernel", "stride")}
        names = [part.get(key) for part in (text_rest, raw) for key in ("torch_dtype", "dtype")]
        dtype = next((name for name in names if name is not None), "bfloat16")
        if not isinstance(dtype, str):
            problems.append(f"torch_dtype must be a name such as 'bfloat16', got {_short(dtype)}")
        if problems:
            raise ConfigError("config.json: " + "; ".join(problems))
        return cls(
            decoder=DecoderConfig(**text),
            audio_encoder=AudioEncoderConfig(**audio),
            adapter=AdapterConfig(**adapter),
            dtype=dtype,
            hf=kept,
            flat=flat,
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model, in the form it came in."""
        text = self.decoder.to_hf()
        if self.decoder.head_dim * self.decoder.heads == self.decoder.embed:
            del text["head_dim"]
        encoder = {
            **asdict(self.audio_encoder),
            **asdict(self.adapter),
            "llm_dim": self.decoder.embed,
        }
        audio = {hf: encoder[own] for hf, (own, _) in _AUDIO_KEYS.items()}
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


# Released name -> ours, and the value of the released class, which saving may leave out.
_TEXT_KEYS: Mapping[str, tuple[str, Any]] = {
    "vocab_size": ("vocab", 64012),
    "hidden_size": ("embed", 4096),
    "intermediate_size": ("mlp", 11008),
    "num_hidden_layers": ("layers", 48),
    "num_attention_heads": ("heads", 32),
    "num_key_value_heads": ("kv_heads", 4),
    "head_dim": ("head_dim", 0),
    "max_position_embeddings": ("max_positions", 8192),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 1e6),
}
_AUDIO_KEYS: Mapping[str, tuple[str, Any]] = {
    "n_mels": ("mels", 128),
    "n_audio_ctx": ("max_positions", 1500),
    "n_audio_state": ("embed", 512),
    "n_audio_head": ("heads", 8),
    "n_audio_layer": ("layers", 6),
    "llm_dim": ("llm_dim", 4096),
    "kernel_size": ("kernel", 3),
    "adapter_stride": ("stride", 2),
    "adapter_hidden": ("hidden", 2048),  # ours
}
_NULLABLE = {  # null means that they are not there
    "head_dim",
    "max_position_embeddings",
    "kernel_size",
    "adapter_stride",
    "adapter_hidden",
}
_FLOATS = {"rms_norm_eps", "rope_theta"}
_NUMBERS: Mapping[Any, str] = {
    int: f"a whole number above 0, at most {MAX_SIZE}",
    float: "a number above 0",
}
# Keys that would change how the weights are read, and the one value that does not.
_STORAGE_KEYS: Mapping[str, Any] = {"quantization_config": None}
# Keys of decoders of this kind that would change what is computed. All others change nothing here.
_FUNCTION_KEYS: Mapping[str, Any] = {
    **_STORAGE_KEYS,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "attention_bias": True,
    "mlp_bias": False,
    "qk_norm": False,
    "use_qk_norm": False,
    "use_mrope": False,
    "partial_rotary_factor": 1,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "num_experts": None,
    "num_local_experts": None,
    "n_routed_experts": None,
    "pruned_heads": {},
}
_ROPE_KEYS: Mapping[str, Any] = {  # of rope_parameters (transformers 5) and rope_scaling
    "rope_type": "default",
    "type": "default",
    "factor": 1,
    "partial_rotary_factor": 1,
    "mrope_section": None,
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
    return parse_yaml(path.read_text(encoding="utf-8"), where=path.name)


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
        if f.name == "layers":
            require(value <= MAX_LAYERS, f"expected at most {MAX_LAYERS} layers", config)


def _is_number(value: object, kind: Any) -> bool:
    """Whether a value is an int up to `MAX_SIZE` (or, for float, any finite number) above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind is float:
        return 0 < value < math.inf
    return isinstance(value, int) and 0 < value <= MAX_SIZE


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
        return json_files.read_json(path, dict)
    except MissingFileError:
        raise ConfigError(f"no config.json at {path}: expected a Step-Audio 2 folder") from None
    except FileError as error:
        raise ConfigError(str(error)) from None


def _take_mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.pop(key, None)
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: expected an object under {key!r}, got {_short(value)}")
    return dict(value)


def _split(
    raw: Mapping[str, Any], table: Mapping[str, tuple[str, Any]], where: str, problems: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part one section of config.json into our fields, all of them, and the rest."""
    own = dict(table.values())
    rest = {}
    for key, value in raw.items():
        if key not in table or (value is None and key in _NULLABLE):
            rest[key] = value
            continue
        own[table[key][0]] = value
        kind = float if key in _FLOATS else int
        if not _is_number(value, kind):
            problems.append(f"{where}.{key} must be {_NUMBERS[kind]}, got {_short(value)}")
    return own, rest


def _unsupported(section: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """Settings that would change the arithmetic in a way this library does not follow."""
    problems = [
        f"{key}={_short(section[key])} is not supported (expected {value!r})"
        for key, value in table.items()
        if section.get(key) not in (None, value)
    ]
    if table is _FUNCTION_KEYS:
        layers = section.get("layer_types")
        if layers is not None and (
            not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)
        ):
            problems.append(
                f"layer_types={_short(layers)} is not supported (expected 'full_attention' alone)"
            )
    return problems


def _rope_theta(text: Mapping[str, Any], default: Any, problems: list[str]) -> Any:
    """The base of the rotary embedding, wherever it stands; a scaled embedding is a problem."""
    found = {"rope_theta": text["rope_theta"]} if "rope_theta" in text else {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping) or _is_scaled(rope):
            expected = "expected none, or rope_type 'default'"
            problems.append(f"{key}={_short(rope)} is not supported ({expected})")
        elif (theta := rope.get("rope_theta")) is not None:
            found[f"{key}.rope_theta"] = theta
            if not _is_number(theta, float):
                problems.append(f"{key}.rope_theta must be {_NUMBERS[float]}, got {_short(theta)}")
    if any(theta != next(iter(found.values())) for theta in found.values()):
        values = " and ".join(f"{key}={_short(theta)}" for key, theta in found.items())
        problems.append(f"{values} must be equal")
    return next(iter(found.values()), default)


def _is_scaled(rope: Mapping[str, Any]) -> bool:
    """Whether rope settings change more than the base; without a type they can be nothing else."""
    named = "rope_type" in rope or "type" in rope or set(rope) <= {"rope_theta"}
    return not named or any(rope.get(k) not in (None, plain) for k, plain in _ROPE_KEYS.items())


def _short(value: object) -> str:
    """A value from a file for a message, which must stay one line."""
    return reprlib.repr(value)
