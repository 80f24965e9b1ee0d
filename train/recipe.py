"""Recipes: the complete configuration of a training run, in one YAML file.

    values = read_recipe_values("smoke")  # from configs/recipes, or a file

A recipe's head says in comments what it needs, how long it takes and what comes out. A key `kind`
at its top says what is trained: the language model, unless it is there; see `kinds`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import dacite

from sa2jax.errors import ConfigError, FileError
from sa2jax.files.yaml_files import parse_yaml, read_yaml


@dataclass(frozen=True, kw_only=True)
class Intervals:
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
                raise ConfigError(
                    f"intervals.{name}: expected at least 1, got {getattr(self, name)}"
                )


# What may change when a run goes on: nothing that its numbers depend on.
RESUMABLE_KEYS = ("mesh", "unroll", "intervals", "evaluate", "model.save_dtype", "data.max_rejects")

# Where things lie, by what they make: their contents count, see `loop.TrainingTask.metadata`.
LOCATION_KEYS = {
    "model": ("model.folder", "network.folder"),
    "data": ("data.sources", "data.folder", "model.tokenizer"),
}

DEFAULT_KIND = "language"  # what a recipe trains that names no kind


def recipe_names() -> list[str]:
    """Recipes that come with the library."""
    home = files("sa2jax.configs.recipes")
    folders = [("", home), *((f"{item.name}/", item) for item in home.iterdir() if item.is_dir())]
    return sorted(
        prefix + Path(item.name).stem
        for prefix, folder in folders
        for item in folder.iterdir()
        if item.name.endswith(".yaml")
    )


def read_recipe_values(source: str | Path) -> dict[str, Any]:
    """The values of a recipe, by its name or file, unchecked.

    A recipe with `extends: NAME` has the values of another one but those that it gives itself, by
    dotted key as in `apply_overrides`.

    Raises:
        ConfigError: if there is none, or it is no YAML.
    """
    return _read_extended(source, ())


def _read_extended(source: str | Path, before: tuple[str, ...]) -> dict[str, Any]:
    """The same, of a recipe which other recipes extend."""
    if str(source) in before:
        raise ConfigError(f"{before[0]}: recipes that extend each other in a circle")
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
        values = read_yaml(path) if item is path else parse_yaml(item.read_text(encoding="utf-8"))
    except FileError as error:
        raise ConfigError(f"{source} is no YAML: {error.reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected `key: value` lines, got {type(values).__name__}")
    other = values.pop("extends", None)
    if other is None:
        return values
    return apply_overrides(_read_extended(str(other), (*before, str(source))), values)


def recipe_values_of_kind(
    kind: str, source: str | Path, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values of a recipe that has to be of one kind, changed, without the kind.

    Raises:
        ConfigError: if there is none, or it is of another kind.
    """
    found, values = split_kind(apply_overrides(read_recipe_values(source), changes or {}))
    if found != kind:
        raise ConfigError(f"{source} is a recipe of kind {found}: expected one of kind {kind}")
    return values


def split_kind(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a recipe names as its kind, unchecked (see `kinds.find_kind`), and its other values."""
    rest = dict(values)
    return rest.pop("kind", DEFAULT_KIND), rest


def apply_overrides(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others in place of some, by dotted key."""
    values = dict(values)
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if rest:
            inner = values.get(first)
            value = apply_overrides(inner if isinstance(inner, dict) else {}, {rest: value})
        values[first] = value
    return values


def parse_overrides(words: tuple[str, ...]) -> dict[str, Any]:
    """`key=value` words, the values as YAML.

    Raises:
        ConfigError: for a word without a key and a value.
    """
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ConfigError(
                f"--set {word}: expected key=value, such as optimizer.learning_rate=1e-5"
            )
        try:
            changes[key] = parse_yaml(value)
        except FileError as error:
            raise ConfigError(f"--set {word}: the value is no YAML: {error.reason}") from None
    return changes


def build_config(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from nested values; unknown keys and values of other kinds are errors.

    Raises:
        ConfigError: naming the key and what it could be.
    """
    require_known_keys(kind, values, where)
    options = dacite.Config(strict=True, cast=[tuple], type_hooks={float: _as_float})
    try:
        return dacite.from_dict(kind, dict(values), options)
    except (dacite.DaciteError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def require_known_keys(kind: type, values: Any, where: str, prefix: str = "") -> None:
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
                require_known_keys(inner, value, where, f"{prefix}{key}.")


def differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two nested dicts differ, as `key: was → now`.

    `RESUMABLE_KEYS` and `LOCATION_KEYS` do not count; of sources, their weights do.
    """
    locations = [key for keys in LOCATION_KEYS.values() for key in keys]
    found = []
    for key in sorted({*was, *now}, key=str):
        name = f"{prefix}{key}"
        old, new = was.get(key), now.get(key)
        mappings = isinstance(old, Mapping) and isinstance(new, Mapping)
        if name == "data.sources" and mappings:
            before, after = [*old.values()], [*new.values()]
            if before != after:
                found.append(f"the weights in {name}: {_short(before)} → {_short(after)}")
        elif name in RESUMABLE_KEYS or name in locations:
            continue
        elif mappings:
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name}: {_short(old)} → {_short(new)}")
    return found


def moves(was: Mapping[str, Any], now: Mapping[str, Any], what: str) -> str:
    """Which `LOCATION_KEYS` of a recipe differ, in brackets; "" for none."""
    found = []
    for name in LOCATION_KEYS[what]:
        section, _, key = name.partition(".")
        old, new = ((recipe.get(section) or {}).get(key) for recipe in (was, now))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            old, new = [[*side] for side in (old, new)]
        if old != new:
            found.append(f"{name}: {_short(old)} → {_short(new)}")
    return f" ({'; '.join(found)})" if found else ""


def _short(value: Any) -> str:
    """The end of a long value: of paths it tells more than the beginning."""
    text = str(value)
    return text if len(text) <= 80 else f"…{text[-79:]}"


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
