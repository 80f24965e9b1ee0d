"""The released `flow.yaml` as data.

The file is HyperPyYAML: its tags name Python classes, and the official code builds them by running
the file. Here a tag is a name to compare and nothing is imported or made.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sa2jax.errors import ConfigError, FileError, MissingFileError
from sa2jax.files.sizes import MAX_LAYERS, MAX_SIZE
from sa2jax.files.yaml_files import Loader, read_yaml

Values = dict[str, Any]


@dataclass(frozen=True)
class _Class:
    """What may stand under one class.

    Attributes:
        module: where the official code has it.
        keys: released name to ours.
        fixed: settings that must have one of these values; the first is the official default.
        parts: nested classes by key.
        inert: settings that change training only.
        optional: keys that have a default.
    """

    module: str
    keys: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


FLAGS = {"key_bias"}
LAYERS = {"num_blocks", "num_up_blocks", "depth"}
RATIOS = {"inference_cfg_rate", "mlp_ratio", "up_scale_factor"}  # the rest are whole numbers
ROOT = "CausalMaskedDiffWithXvec"
CLASSES = {
    ROOT: _Class(
        "cosyvoice2.flow.flow",
        {
            "input_size": "inputs",
            "output_size": "mels",
            "spk_embed_dim": "speaker",
            "vocab_size": "codes",
        },
        {"output_type": ("mel",), "input_embedding": (None,)},
        {"encoder": "UpsampleConformerEncoderV2", "decoder": "CausalConditionalCFM"},
    ),
    "UpsampleConformerEncoderV2": _Class(
        "cosyvoice2.transformer.upsample_encoder_v2",
        {
            "input_size": "inputs",
            "output_size": "embed",
            "pre_lookahead_len": "lookahead",
            "num_blocks": "layers",
            "num_up_blocks": "up_layers",
            "up_stride": "upsample",
            "up_scale_factor": "up_scale_factor",
            "attention_heads": "heads",
            "key_bias": "key_bias",
            "linear_units": "mlp",
        },
        {
            "input_layer": ("linear",),
            "pos_enc_layer_type": ("rel_pos_espnet",),
            "selfattention_layer_type": ("rel_selfattn",),
            "normalize_before": (True,),
            "activation_type": ("swish",),
        },
        inert=("dropout_rate", "positional_dropout_rate", "attention_dropout_rate"),
        optional=("pre_lookahead_len", "up_stride", "up_scale_factor", "key_bias"),
    ),
    "CausalConditionalCFM": _Class(
        "cosyvoice2.flow.flow_matching",
        {"inference_cfg_rate": "guidance"},
        parts={"estimator": "DiT"},
        optional=("inference_cfg_rate",),
    ),
    "DiT": _Class(
        "cosyvoice2.flow.decoder_dit",
        {
            "in_channels": "in_channels",
            "out_channels": "out_channels",
            "mlp_ratio": "mlp_ratio",
            "depth": "layers",
            "num_heads": "heads",
            "head_dim": "head_dim",
            "hidden_size": "embed",
        },
        optional=("mlp_ratio",),
    ),
}


def read_flow_yaml(path: str | Path) -> Values:
    """Sizes of a flow, under our names, nested as the classes are.

    Args:
        path: the file or its folder.

    Raises:
        ConfigError: for a missing or damaged file, another class, a tag that would run code, an
            unknown or missing key, or a setting that this library does not compute; all faults of
            the last three kinds together.
    """
    path = Path(path)
    path = path / "flow.yaml" if path.is_dir() else path
    try:
        raw = read_yaml(path, tags=_TAGS)
    except MissingFileError:
        raise ConfigError(f"no flow.yaml at {path}: expected a token2wav folder") from None
    except FileError as error:
        raise ConfigError(f"{path}: {error.reason}; expected a flow.yaml as released") from None
    if not isinstance(raw, dict) or "flow" not in raw:
        raise ConfigError(f"{path}: expected a key 'flow': this is not the flow.yaml of token2wav")
    names = {key: value for key, value in raw.items() if key != "flow"}
    used: set[str] = set()
    problems: list[str] = []
    flow = _take("flow", ROOT, _resolve(raw["flow"], names, used, problems), problems)
    problems += [f"unknown key {key}" for key in names if key not in used]
    problems = problems or _disagreements(flow)
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)}")
    return flow


def write_flow_yaml(flow: Values) -> str:
    """The text of a `flow.yaml` that the official code reads, from what `read_flow_yaml` gives."""
    return "\n".join(_lines("flow", ROOT, flow_settings(flow), 0)) + "\n"


def flow_settings(flow: Values) -> Values:
    """What the official classes are made with, nested as they are; see `write_flow_yaml`."""
    return _settings(ROOT, _complete(flow))


def _settings(name: str, values: Values) -> Values:
    spec = CLASSES[name]
    fixed = {hf: allowed[0] for hf, allowed in spec.fixed.items() if allowed[0] is not None}
    parts = {part: _settings(inner, values[part]) for part, inner in spec.parts.items()}
    return {hf: values[own] for hf, own in spec.keys.items()} | fixed | parts


def _lines(key: str, name: str, settings: Values, depth: int) -> list[str]:
    spec, indent = CLASSES[name], "    " * (depth + 1)
    lines = [f"{'    ' * depth}{key}: !new:{spec.module}.{name}"]
    for hf, value in settings.items():
        if hf in spec.parts:
            lines += _lines(hf, spec.parts[hf], value, depth + 1)
        else:
            lines.append(f"{indent}{hf}: {json.dumps(value)}")
    return lines


def _complete(flow: Values) -> Values:
    """With the sizes that others imply."""
    encoder, decoder = flow["encoder"], flow["decoder"]
    mels, upsample = flow["mels"], encoder["upsample"]
    estimator = decoder["estimator"] | {"in_channels": 4 * mels, "out_channels": mels}
    return flow | {
        "inputs": encoder["inputs"],
        "encoder": encoder | {"up_scale_factor": upsample},
        "decoder": decoder | {"estimator": estimator},
    }


def _disagreements(flow: Values) -> list[str]:
    """Sizes that are named twice must be the same; one of each is dropped from `flow`."""
    encoder, estimator = flow["encoder"], flow["decoder"]["estimator"]
    pairs = [
        ("input_size", flow.pop("inputs"), encoder["inputs"]),
        ("encoder.up_scale_factor", encoder.pop("up_scale_factor", None), encoder.get("upsample")),
        ("estimator.in_channels", estimator.pop("in_channels"), 4 * flow["mels"]),
        ("estimator.out_channels", estimator.pop("out_channels"), flow["mels"]),
    ]
    return [
        f"{key} is {value}, but the rest needs {needed}"
        for key, value, needed in pairs
        if value is not None and needed is not None and value != needed
    ]


def _take(key: str, name: str, raw: Any, problems: list[str]) -> Values:
    """One class and those nested in it, under our names."""
    spec = CLASSES[name]
    tag = raw.get("!new") if isinstance(raw, dict) else None
    if not isinstance(tag, str) or tag.rpartition(".")[2] != name:
        got = tag or f"{raw!r:.80}"
        problems.append(f"{key}: expected !new:{spec.module}.{name}, got {got}")
        return {}
    raw = {k: v for k, v in raw.items() if k != "!new"}
    values = {
        part: _take(part, inner, raw.get(part), problems) for part, inner in spec.parts.items()
    }
    for hf, value in raw.items():
        where = f"{key}.{hf}"
        if hf in spec.keys:
            values[spec.keys[hf]] = value
            problem = _not_a_size(hf, value)
            problems += [f"{where}: expected {problem}, got {value!r:.80}"] if problem else []
        elif hf in spec.fixed and value not in spec.fixed[hf]:
            expected = " or ".join(repr(v) for v in spec.fixed[hf])
            problems.append(f"{where} {value!r:.80} is not supported (expected {expected})")
        elif hf not in (*spec.fixed, *spec.inert, *spec.parts):
            problems.append(f"unknown key {where} (refusing to guess its meaning)")
    missing = [hf for hf in spec.keys if hf not in raw and hf not in spec.optional]
    if missing:
        problems.append(f"{key} lacks {', '.join(missing)}")
    return values


def _not_a_size(key: str, value: Any) -> str:
    """What a value should have been; nothing if it is that."""
    flag = isinstance(value, bool)
    if key in FLAGS:
        return "" if flag else "true or false"
    if key in RATIOS:
        fine = isinstance(value, int | float) and not flag and value > 0
        return "" if fine else "a number above 0"
    most = MAX_LAYERS if key in LAYERS else MAX_SIZE
    if not isinstance(value, int) or flag or value <= 0:
        return "a whole number above 0"
    return "" if value <= most else f"at most {most}"


def _construct_new(loader: Loader, suffix: str, node: yaml.Node) -> Values:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(
            None, None, f"expected keys under !new:{suffix}", node.start_mark
        )
    values = loader.construct_mapping(node, deep=True)
    return {"!new": suffix} | values


def _construct_ref(loader: Loader, suffix: str, node: yaml.Node) -> Values:
    if suffix or not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "expected !ref <key>", node.start_mark)
    return {"!ref": str(loader.construct_scalar(node)).strip()}


# `!new:module.Class` and `!ref <key>` are data here; any other tag is refused.
_TAGS = {"!new:": _construct_new, "!name:": _construct_new, "!ref": _construct_ref}


def _resolve(value: Any, names: Values, used: set[str], problems: list[str]) -> Any:
    """Replace `!ref <key>` by the plain value of a key at the top; arithmetic is refused."""
    if isinstance(value, list):
        return [_resolve(item, names, used, problems) for item in value]
    if not isinstance(value, dict):
        return value
    if "!ref" not in value:
        return {k: _resolve(v, names, used, problems) for k, v in value.items()}
    written = value["!ref"]
    key = written.removeprefix("<").removesuffix(">") if isinstance(written, str) else ""
    if written != f"<{key}>" or not isinstance(names.get(key), int | float | str):
        problems.append(f"!ref {written!s:.80}: expected <key> of a plain value at the top")
        return None
    used.add(key)
    return names[key]
