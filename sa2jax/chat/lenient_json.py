"""JSON as models write it: what has one meaning is read, the rest is an error.

Read beside JSON: raw newlines and tabs in texts, commas before a closing bracket, single quotes,
and Python's True, False and None. Refused are keys that come twice, NaN, numbers too large for a
float, and quotes inside a text that are not escaped: what they mean is a guess.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from sa2jax.files.json_files import finite_number, no_constant, whole_number

_TOKEN = re.compile(
    r"""(?P<double>"[^"\\]*(?:\\.[^"\\]*)*")
    | '(?P<single>[^'\\]*(?:\\.[^'\\]*)*)'
    | (?P<comma>,(?=\s*[}\]]))
    | (?P<bracket>[{}\[\]])
    | (?P<word>[^\s"'{}\[\],:]+)
    | (?P<rest>[\s,:])""",
    re.VERBOSE | re.DOTALL,
)
MAX_CHARS = 1 << 15  # of a value that is not quite JSON; what has no end is looked at so far
_WORDS = {"True": "true", "False": "false", "None": "null"}


def decode_lenient(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends.

    Raises:
        ValueError: if there is none that has one meaning; the message is fit for the model.
        RecursionError: if it is nested too deep.
    """
    try:
        return _JSON.raw_decode(text, start)
    except ValueError as error:
        plain, end = _normalize(text, start)
        if plain is None:
            raise error from None
        try:
            return _JSON.decode(plain), end
        except json.JSONDecodeError:
            raise error from None  # whose place is one in the text as written


def _normalize(text: str, start: int) -> tuple[str | None, int]:
    """A bracketed value with JSON's quotes, commas and words, and its end; None if it has none."""
    parts, depth, at = [], 0, start
    while at - start < MAX_CHARS and (token := _TOKEN.match(text, at)):
        at = token.end()
        if token["single"] is not None:
            parts.append(f'"{_QUOTES.sub(_requote, token["single"])}"')
        elif token["comma"] is None:
            parts.append(_WORDS.get(token[0], token[0]))
        if token["bracket"] is not None:
            depth += 1 if token[0] in "{[" else -1
        if depth <= 0:
            return ("".join(parts), at) if token["bracket"] is not None else (None, at)
    return None, at


_QUOTES = re.compile(r"""\\.|\"""", re.DOTALL)


def _requote(match: re.Match[str]) -> str:
    """A quote of a text in single quotes, as one in double quotes has it."""
    return {"\\'": "'", '"': '\\"'}.get(match[0], match[0])


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:40]!r} is given twice")
        found[key] = value
    return found


_JSON = json.JSONDecoder(
    parse_constant=no_constant,
    parse_float=finite_number,
    parse_int=whole_number,
    object_pairs_hook=_object,
    strict=False,
)
