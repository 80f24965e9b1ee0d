"""What an adapter of PEFT asks for: its adapter_config.json, strictly.

Keys that this module reads are followed, those that change nothing once an adapter is trained are
passed over, and any other that is set is refused by its name: it may change what is computed.

Source: PEFT 0.21 (`peft.LoraConfig`, `check_target_module_exists`, `get_pattern_key`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from sa2jax.errors import FileError, MissingFileError, TrainError
from sa2jax.files.json_files import read_json

CONFIG = "adapter_config.json"
# Read below, or of no effect on an adapter that is trained.
_KNOWN = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",  # of models whose head is their table
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
# First draws that leave the base as it is; others (pissa, olora, loftq …) change it.
_FIRST_DRAWS = ("gaussian", "eva", "orthogonal")
# More are refused: matching them could take for ever. Names alone, which trainers write, are quick.
_MAX_REPEATS, _MAX_LENGTH = 4, 2000  # of a pattern
_MAX_PATTERNS, _MAX_ALL_REPEATS = 1024, 32  # of a table
_REPEAT = re.compile(r"[*+]|\{\d*,\}")
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The settings of a LoRA; modules go by their names in the released model.

    Attributes:
        rank: width of the bottleneck, where `rank_pattern` does not say another.
        alpha: the product is scaled by alpha / rank, where `alpha_pattern` does not say another.
        rank_pattern: patterns of modules with their rank, the first that matches.
        alpha_pattern: patterns of modules with their alpha.
        use_rslora: the scale is alpha / √rank (rank-stabilised).
        use_dora: each output has a length of its own (arXiv 2402.09353).
        lora_bias: the second matrix has a bias.
        target_modules: ends of names of the adapted modules, or one pattern for the whole name;
            None: those of which there are matrices.
        exclude_modules: likewise, of modules that are not adapted.
        layers_to_transform: numbers of the adapted layers, None for all.
        layers_pattern: names of the lists of layers that are meant, empty for any.
        modules_to_save: ends of names of modules that the adapter holds whole.
        trainable_token_indices: rows of tables that the adapter holds, by end of the name.
    """

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...] = ()
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    target_modules: tuple[str, ...] | re.Pattern[str] | None = None
    exclude_modules: tuple[str, ...] | re.Pattern[str] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[int, ...]]

    def rank_of(self, module: str) -> int:
        """The rank of a module."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's matrices is multiplied by."""
        rank = self.rank_of(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def adapts(self, module: str) -> bool | None:
        """Whether a module has low-rank matrices; None if the settings do not say."""
        if self.exclude_modules is not None and _named(self.exclude_modules, module):
            return False
        if any(f".{name}." in f".{module}." for name in self.modules_to_save):
            return False
        if self.target_modules is None:
            return None
        if not _named(self.target_modules, module):
            return False
        if isinstance(self.target_modules, re.Pattern) or module in self.target_modules:
            return True  # by its whole name: the layers below do not count
        return self.layers_to_transform is None or self._layer_of(module) in (
            self.layers_to_transform
        )

    def saves(self, module: str) -> bool:
        """Whether the adapter holds a module whole."""
        parts = module.split(".")
        whole = (".".join(parts[: n + 1]) for n in range(len(parts)))
        return any(name.endswith(self.modules_to_save) for name in whole)

    def rows_of(self, module: str) -> tuple[int, ...]:
        """The rows of a table that the adapter holds."""
        found = [rows for name, rows in self.trainable_token_indices.items() if _ends(module, name)]
        return found[0] if found else ()

    def _layer_of(self, module: str) -> int | None:
        """The number of the layer that a module is in."""
        lists = "|".join(map(re.escape, self.layers_pattern)) or r"[^.]*"
        found = re.match(rf"(?:.*?\.)?(?:{lists})\.(\d+)\.", module)
        return int(found[1]) if found else None


def read_lora_config(folder: str | Path) -> LoraConfig:
    """Read the adapter_config.json of an adapter.

    Raises:
        TrainError: if it is missing, damaged, no LoRA, or asks for what is not understood.
    """
    path = Path(folder) / CONFIG
    try:
        raw = read_json(path)
    except MissingFileError:
        raise TrainError(f"no {CONFIG} in {folder}: expected an adapter saved by PEFT") from None
    except FileError as error:
        raise TrainError(f"{path} is damaged ({error.reason}): save the adapter again") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else raw
        raise TrainError(f"{path}: expected peft_type 'LORA', got {short(kind)}: no other is known")
    _refuse_unknown(raw, path)
    try:
        return _parse(raw)
    except _Odd as error:
        raise TrainError(f"{path}: {error}") from None


def _refuse_unknown(raw: Mapping[str, Any], path: Path) -> None:
    """Whatever is set and not understood is named."""
    more = [
        f"{key[:40]}={short(value)}"
        for key, value in raw.items()
        if key not in _KNOWN and not _is_empty(value)
    ]
    first = raw.get("init_lora_weights")
    if first not in (None, True, False, *_FIRST_DRAWS):
        more.append(f"init_lora_weights={short(first)} (it changes the base)")
    if raw.get("bias", "none") not in (None, "none", "all", "lora_only"):
        more.append(f"bias={short(raw['bias'])}")
    if more:
        rest = f" and {len(more) - 4} more" if len(more) > 4 else ""
        raise TrainError(
            f"{path} asks for {', '.join(more[:4])}{rest}, which is not supported: merge the "
            "adapter with PEFT and convert the merged model"
        )


class _Odd(Exception):
    """A value of the wrong kind."""


def _parse(raw: Mapping[str, Any]) -> LoraConfig:
    layers, tokens = raw.get("layers_to_transform"), raw.get("trainable_token_indices")
    if isinstance(tokens, list):
        tokens = {"embed_tokens": tokens}
    if not _is_empty(tokens) and not isinstance(tokens, dict):
        raise _Odd(f"expected numbers of tokens, got trainable_token_indices={short(tokens)}")
    _require_few("trainable_token_indices", tokens)
    _require_few("layers_to_transform", layers)
    flags = {key: raw.get(key) or False for key in ("use_rslora", "use_dora", "lora_bias")}
    if odd := [key for key, value in flags.items() if value not in (True, False)]:
        raise _Odd(f"expected true or false, got {odd[0]}={short(raw[odd[0]])}")
    return LoraConfig(
        rank=_rank("r", raw.get("r")),
        alpha=_alpha("lora_alpha", raw.get("lora_alpha")),
        rank_pattern=tuple(_patterns("rank_pattern", raw, _rank)),
        alpha_pattern=tuple(_patterns("alpha_pattern", raw, _alpha)),
        **flags,
        target_modules=_names_or_pattern("target_modules", raw.get("target_modules")),
        exclude_modules=_names_or_pattern("exclude_modules", raw.get("exclude_modules")),
        layers_to_transform=None if _is_empty(layers) else _whole("layers_to_transform", layers),
        layers_pattern=_names("layers_pattern", raw.get("layers_pattern")),
        modules_to_save=_names("modules_to_save", raw.get("modules_to_save")),
        trainable_token_indices={
            name: _whole("trainable_token_indices", rows) for name, rows in (tokens or {}).items()
        },
    )


def _require_few(key: str, value: Any) -> None:
    """Each of a table, or list, is compared with each module of the model."""
    if isinstance(value, dict | list) and len(value) > _MAX_PATTERNS:
        raise _Odd(f"expected at most {_MAX_PATTERNS} of {key}, got {len(value)}")


def _is_empty(value: Any) -> bool:
    """Whether a setting is not set; layer 0 is."""
    return value is None or value is False or value in ("", [], {})


def _rank(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 24:
        raise _Odd(f"expected {key} >= 1, got {short(value)}")
    return value


def _alpha(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise _Odd(f"expected a number {key}, got {short(value)}")
    return float(value)


def _whole(key: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in values):
        raise _Odd(f"expected whole numbers, got {key}={short(value)}")
    return tuple(values)


def _names(key: str, value: Any) -> tuple[str, ...]:
    values = [] if _is_empty(value) else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or any(not isinstance(v, str) or not v for v in values):
        raise _Odd(f"expected names, got {key}={short(value)}")
    _require_few(key, values)
    return tuple(values)


def _names_or_pattern(key: str, value: Any) -> tuple[str, ...] | re.Pattern[str] | None:
    """Names, one pattern, or None where all or none are meant."""
    if _is_empty(value) or value == "all-linear":
        return None
    return _compile(key, value) if isinstance(value, str) else _names(key, value)


def _patterns(key: str, raw: Mapping[str, Any], number: Any) -> Iterable[tuple[Any, Any]]:
    table = raw.get(key) or {}
    if not isinstance(table, dict):
        raise _Odd(f"expected names with numbers, got {key}={short(table)}")
    _require_few(key, table)
    if (repeats := sum(len(_REPEAT.findall(name)) for name in table)) > _MAX_ALL_REPEATS:
        raise _Odd(f"expected at most {_MAX_ALL_REPEATS} repeats in all of {key}, got {repeats}")
    for name, value in table.items():
        yield _compile(key, name, rf"(.*\.)?({name})$"), number(f"{key}[{short(name)}]", value)


def _compile(key: str, pattern: str, whole: str | None = None) -> re.Pattern[str]:
    too_much = len(pattern) > _MAX_LENGTH or len(_REPEAT.findall(pattern)) > _MAX_REPEATS
    if too_much or _REPEATED_GROUP.search(pattern):
        raise _Odd(
            f"expected a pattern of at most {_MAX_REPEATS} repeats and no repeated group, got "
            f"{key} {short(pattern)}"
        )
    try:
        return re.compile(whole or pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _Odd(f"expected a pattern, got {key} {short(pattern)} ({error})") from None


def _first_match(patterns: Iterable[tuple[re.Pattern[str], Any]], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _named(wanted: tuple[str, ...] | re.Pattern[str], module: str) -> bool:
    if isinstance(wanted, re.Pattern):
        return wanted.fullmatch(module) is not None
    return any(_ends(module, name) for name in wanted)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
