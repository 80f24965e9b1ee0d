"""Recipes: everything that a training run depends on, in one YAML file.

    recipe = read_recipe("smoke", {"optimizer.steps": 50})  # from configs/recipes, or a file

A recipe's head says in comments what it needs, how long it takes and what comes out. A key `kind`
at its top says what is trained: the language model, unless it is there; see `network_task`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_type_hints

import dacite
import yaml

from sa2jax.errors import ConfigError
from sa2jax.nn import Remat
from sa2jax.train.data import DataConfig
from sa2jax.train.lora import DECODER
from sa2jax.train.objective import CHUNK
from sa2jax.train.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Where training begins.

    Attributes:
        folder: a model folder of this library, or a Hugging Face one.
        preset: instead of a folder, sizes from configs/models for a model of random numbers.
        tokenizer: of a preset: a folder with tokenizer files, or `bytes` for one token a byte.
        dtype: of the parameters; `int8` (matrices) for LoRA alone.
        compute: of activations and products; by default bfloat16, on a CPU float32. With float32
            parameters and bfloat16 here, the parameters are master weights.
        save: dtype of the model that is written at the end, by default that of the folder.
    """

    folder: str | None = None
    preset: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    compute: Literal["float32", "bfloat16"] | None = None
    save: Literal["float32", "bfloat16"] | None = None


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank adaptation, see `lora.add_lora`.

    Attributes:
        rank: width of the bottleneck.
        alpha: the product is scaled by `alpha / rank`.
        targets: a regular expression for the paths of matrices.
        rate: learning rate of the low-rank matrices; everything else is frozen, unless
            `optimizer.rates` says otherwise.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = DECODER
    rate: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured beside training.

    Attributes:
        sources: data files or folders, as in `DataConfig`.
        batches: at most so many of the size of a training batch.
    """

    sources: Mapping[str, float]
    batches: int = 16


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often a run does what is not training.

    Attributes:
        log_every: updates between two lines of the log.
        evaluate_every: updates between two evaluations; 0 for none but at the end.
        save_every: updates between two checkpoints; one is always written at the end.
        keep: newest checkpoints that stay.
        keep_every: checkpoints of multiples of this stay, too.
    """

    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 500
    keep: int = 2
    keep_every: int | None = None

    def __post_init__(self):
        for name in ("log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"pace.{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run of the language model.

    Attributes:
        model: where it begins.
        data: what it learns from, and how that is packed.
        optimizer: how fast, and how long.
        lora: train low-rank additions instead of the model.
        evaluate: what is measured beside it.
        mesh: devices, such as `fsdp=8`; by default all on `fsdp`.
        remat: what the gradient computes again: `full`, `dots`, or null for nothing.
        chunk: positions of each row whose logits are held at a time.
        gradients: dtype in which the gradients of a batch's parts are added up.
        unroll: write out layers instead of a loop over them: faster on a CPU, longer to compile.
        seed: of data order and fresh parameters.
        pace: how often is logged, evaluated and saved.
    """

    model: ModelSpec
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraSpec | None = None
    evaluate: Evaluation | None = None
    mesh: str | None = None
    remat: Remat | None = "full"
    chunk: int = CHUNK
    gradients: Literal["float32", "bfloat16"] = "float32"
    unroll: bool = False
    seed: int = 0
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self):
        spec = self.model
        if (spec.folder is None) == (spec.preset is None):
            raise ConfigError(
                "model: expected either a folder or a preset, got "
                f"{'both' if spec.folder else 'neither'}; --model FOLDER gives one"
            )
        if spec.preset is not None and spec.tokenizer is None:
            raise ConfigError("model.tokenizer: a preset needs a tokenizer's folder, or `bytes`")
        if spec.dtype == "int8" and self.lora is None:
            raise ConfigError("model.dtype int8 cannot be trained itself: give a `lora` section")
        if self.chunk < 1:
            raise ConfigError(f"chunk: expected at least 1, got {self.chunk}")

    def plain(self) -> dict[str, Any]:
        """The recipe as YAML or JSON can hold it."""
        return json.loads(json.dumps(asdict(self), default=str))


# What may change when a run goes on: nothing that its numbers depend on.
FREE = ("mesh", "unroll", "pace", "evaluate", "model.save", "data.max_rejects")


# What a recipe may train: the model, or a part of it; or several things one after the other.
LANGUAGE, FLOW, STAGES = "language", "flow", "stages"
TOKENIZER, SPEAKER, VOCODER, ENCODER = "tokenizer", "speaker", "vocoder", "encoder"
KINDS = LANGUAGE, ENCODER, TOKENIZER, SPEAKER, FLOW, VOCODER, STAGES


def recipe_names() -> list[str]:
    """Recipes that come with the library."""
    home = files("sa2jax.configs.recipes")
    folders = [("", home), *((f"{item.name}/", item) for item in home.iterdir() if item.is_dir())]
    return sorted(
        prefix + Path(item.name).stem
        for prefix, folder in folders for item in folder.iterdir() if item.name.endswith(".yaml")
    )  # fmt: skip


def read_values(source: str | Path) -> dict[str, Any]:
    """The values of a recipe, by its name or file, unchecked.

    A recipe with `like: NAME` has the values of another one but those that it gives itself, by
    dotted key as in `with_changes`.

    Raises:
        ConfigError: if there is none, or it is no YAML.
    """
    return _read_values(source, ())


def _read_values(source: str | Path, before: tuple[str, ...]) -> dict[str, Any]:
    """The same, of a recipe that others on the way to it are like."""
    if str(source) in before:
        raise ConfigError(f"{before[0]}: recipes that are like each other in a circle")
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        item = files("sa2jax.configs.recipes") / f"{source}.yaml"
        if not item.is_file():
            raise ConfigError(
                f"no recipe {str(source)!r}: expected {', '.join(recipe_names())}, or a .yaml file"
            )
    else:
        item = path
        if not path.is_file():
            raise ConfigError(f"no such file: {path}")
    try:
        values = yaml.safe_load(item.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected `key: value` lines, got {type(values).__name__}")
    other = values.pop("like", None)
    if other is None:
        return values
    return with_changes(_read_values(str(other), (*before, str(source))), values)


def read_recipe(source: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe of the language model by its name or file.

    Args:
        source: a name from configs/recipes, or a YAML file.
        changes: values by dotted key that replace those of the file.

    Raises:
        ConfigError: for a key that does not exist, or a value of another kind.
    """
    return build(Recipe, values_of(LANGUAGE, source, changes), str(source))


def values_of(
    kind: str, source: str | Path, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values of a recipe that has to be of one kind, changed, without the kind.

    Raises:
        ConfigError: if there is none, or it is of another kind.
    """
    found, values = split_kind(with_changes(read_values(source), changes or {}), str(source))
    if found != kind:
        raise ConfigError(f"{source} is a recipe of kind {found}: expected one of kind {kind}")
    return values


def split_kind(values: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """What a recipe trains, and its other values.

    Raises:
        ConfigError: for a kind that there is not.
    """
    rest = dict(values)
    kind = rest.pop("kind", LANGUAGE)
    if kind not in KINDS:
        raise ConfigError(f"{where}: kind {kind!r}: expected {', '.join(KINDS)}")
    return kind, rest


def with_changes(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others in place of some, by dotted key."""
    values = dict(values)
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if rest:
            inner = values.get(first)
            value = with_changes(inner if isinstance(inner, dict) else {}, {rest: value})
        values[first] = value
    return values


def parse_changes(words: tuple[str, ...]) -> dict[str, Any]:
    """`key=value` words, the values as YAML.

    Raises:
        ConfigError: for a word without a key and a value.
    """
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ConfigError(f"--set {word}: expected key=value, such as optimizer.rate=1e-5")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {word}: the value is no YAML") from None
    return changes


def build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from nested values; unknown keys and values of other kinds are errors.

    Raises:
        ConfigError: naming the key and what it could be.
    """
    require_known(kind, values, where)
    options = dacite.Config(strict=True, cast=[tuple], type_hooks={float: _as_float})
    try:
        return dacite.from_dict(kind, dict(values), options)
    except (dacite.DaciteError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def require_known(kind: type, values: Any, where: str, prefix: str = "") -> None:
    """Complain about the first key that a nested dataclass does not have, or that is no number.

    Raises:
        ConfigError: naming it and those that there are.
    """
    if not isinstance(values, Mapping):
        return
    hints = get_type_hints(kind)
    names = [item.name for item in fields(kind)]
    for key, value in values.items():
        if key not in names:
            raise ConfigError(
                f"{where}: there is no {prefix}{key}; expected one of {', '.join(names)}"
            )
        kinds = hints[key], *getattr(hints[key], "__args__", ())
        if float in kinds and isinstance(value, str) and not _is_number(value):
            raise ConfigError(f"{where}: {prefix}{key}: expected a number, got {value!r}")
        for inner in kinds:
            if is_dataclass(inner) and isinstance(inner, type):
                require_known(inner, value, where, f"{prefix}{key}.")


def differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two nested dicts disagree about, as `key: was → now`; `FREE` keys do not count."""
    found = []
    for key in sorted({*was, *now}, key=str):
        name = f"{prefix}{key}"
        if name in FREE:
            continue
        old, new = was.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name}: {old} → {new}")
    return found


def _as_float(value: Any) -> Any:
    """YAML reads `1e-5` as text and `1` as a whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return value
    return float(value) if _is_number(value) else value


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
