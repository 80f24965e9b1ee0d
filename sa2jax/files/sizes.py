"""Sizes of networks as files claim them: none that no machine could hold."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from sa2jax.errors import ConfigError

MAX_SIZE = 1 << 24  # of a width, a vocabulary, a length: a hundred times what models have
MAX_LAYERS = 1024  # of layers, and of whatever else a network has in a row


def misfit(name: str, value: Any, kind: Any) -> str:
    """What a value of a parsed file should have been; nothing if it is that.

    Args:
        name: of the field, which tells how large a whole number may be.
        value: the value.
        kind: of the field: int, float, bool, or a tuple of any number of one of these.
    """
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or len(value) > MAX_LAYERS:
            return f"a list of at most {MAX_LAYERS} values"
        inner = get_args(kind)[0]
        return next(filter(None, (misfit(name, item, inner) for item in value)), "")
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        return "" if number and math.isfinite(value) else "a finite number"
    if kind is int:
        most = MAX_LAYERS if "layers" in name else MAX_SIZE
        fine = number and isinstance(value, int) and 0 <= value <= most
        return "" if fine else f"a whole number up to {most}"
    return ""


def from_nested(kind: Any, values: Any, where: str) -> Any:
    """A config and the configs inside it from nested dicts, as JSON has them.

    Args:
        kind: the config's class.
        values: its fields by name.
        where: what to call them in an error.

    Raises:
        ConfigError: for an unknown or missing field, or a value that no network has.
    """
    known = {f.name: f for f in fields(kind)}
    if not isinstance(values, Mapping) or set(values) != set(known):
        odd = sorted(set(known) ^ set(values)) if isinstance(values, Mapping) else values
        raise ConfigError(f"{where}: unknown or missing settings: {odd}")
    made = dict(values)
    for name, f in known.items():
        value = made[name]
        if is_dataclass(f.type):
            made[name] = from_nested(f.type, value, f"{where}.{name}")
        elif wanted := misfit(name, value, f.type):
            raise ConfigError(f"{where}.{name}: expected {wanted}, got {value!r:.80}")
    try:
        return kind(**made)
    except (ArithmeticError, ValueError, TypeError) as error:  # sizes that do not divide
        raise ConfigError(f"{where}: sizes that no network has ({error})") from None
