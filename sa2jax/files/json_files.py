"""JSON of unknown origin: one reader for all files, lines and texts.

Numbers are finite and fit 64 bits, texts can be written as UTF-8, and nothing is nested too deeply
to be printed: so whoever gets a value needs to expect no more than JSON's own types.
"""

import json
import math
import os
import re
from typing import Any

from sa2jax.errors import FileError
from sa2jax.files.limits import JSON, MAX_INT, Limits, require_depth
from sa2jax.files.raw import decode, read_bytes

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NAMES = {dict: "a JSON object", list: "a JSON list"}


def read_json(
    path: str | os.PathLike[str],
    kind: type | None = None,
    *,
    limits: Limits = JSON,
) -> Any:
    """The value in a JSON file.

    Args:
        path: the file, in UTF-8, with or without a byte order mark.
        kind: what it has to be, `dict` or `list`; by default anything.
        limits: what it may ask for.

    Raises:
        MissingFileError: if there is no file.
        FileError: if it cannot be read, is no JSON, or another kind of value.
    """
    return parse_json(read_bytes(path, limits), kind, where=str(path), limits=limits)


def parse_json(
    text: str | bytes,
    kind: type | None = None,
    *,
    where: str = "the text",
    limits: Limits = JSON,
    finite: bool = True,
) -> Any:
    """The value that a JSON text is.

    Args:
        text: the text, or its UTF-8.
        kind: what it has to be, `dict` or `list`; by default anything.
        where: what to call it in an error.
        limits: what it may ask for.
        finite: refuse NaN and infinite numbers, which Python writes though JSON has none.

    Raises:
        FileError: if it is no JSON, is more than the limits allow, or another kind of value.
    """
    if isinstance(text, bytes):
        text = decode(text, where)
    else:
        text = text.removeprefix("\ufeff")
        _require_unicode(text, where)
    _require_few(text, where, limits)
    try:
        value = (_DECODER if finite else _ANY_NUMBER).decode(text)
    except (ValueError, RecursionError) as error:
        raise FileError(where, f"not valid JSON ({_reason(error)})") from None
    _require_plain(text, value, where, limits)
    if kind is not None and not isinstance(value, kind):
        raise FileError(where, f"expected {_NAMES[kind]}, got {type(value).__name__}")
    return value


def _require_few(text: str, where: str, limits: Limits) -> None:
    """Before anything is made: no more values than allowed; commas in texts are none."""
    if _separators(text) > limits.nodes and _separators(_STRING.sub("", text)) > limits.nodes:
        raise FileError(where, f"expected at most {limits.nodes} values, got more")


def _separators(text: str) -> int:
    return text.count(",") + text.count("[") + text.count("{")


def _require_plain(text: str, value: Any, where: str, limits: Limits) -> None:
    if text.count("[") + text.count("{") > limits.depth:
        require_depth(value, limits, where)
    if _SURROGATE.search(text):
        _require_unicode(json.dumps(value, ensure_ascii=False), where)


def _require_unicode(text: str, where: str) -> None:
    """Half of a pair is no character: neither a terminal nor a tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FileError(where, f"not UTF-8 ({error.reason})") from None


def whole_number(text: str) -> int:
    """A whole number of 64 bits, or a ValueError."""
    if len(text) > 20 or not -MAX_INT <= (value := int(text)) <= MAX_INT:
        raise ValueError(f"a number of {len(text)} digits, expected one of 64 bits")
    return value


def finite_number(text: str) -> float:
    """A finite number, or a ValueError."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def no_constant(name: str) -> float:
    """A ValueError: JSON has no NaN and nothing infinite."""
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    parse_int=whole_number, parse_float=finite_number, parse_constant=no_constant
)
_ANY_NUMBER = json.JSONDecoder(parse_int=whole_number)


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
