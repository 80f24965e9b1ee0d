"""Checks of what a client sends: fields of an event by name and type, errors in OpenAI's words."""

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any

from sa2jax.errors import Sa2jaxError, shorten

MISSING = object()  # the default of a field that must be there


class EventError(Sa2jaxError):
    """An event that is refused; the session goes on.

    Args:
        message: what was expected, what came and the fix.
        code: OpenAI's word for it, for programs.
        param: the field that it is about, such as `session.audio.output.voice`.
        type: whose fault it is: `invalid_request_error` or `server_error`.

    Attributes:
        event_id: what the client calls the event, if it does.
    """

    def __init__(
        self,
        message: str,
        code: str = "invalid_value",
        *,
        param: str | None = None,
        type: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.code, self.param, self.type = code, param, type
        self.event_id: str | None = None


class Fields:
    """The fields of a JSON object, taken one by one; what is left over is refused.

    Args:
        value: the object.
        path: what to call it in errors, such as `session.audio`; "" for the event itself.

    Raises:
        EventError: if it is no object.
    """

    def __init__(self, value: Any, path: str = ""):
        if not isinstance(value, Mapping):
            raise EventError(
                f"{path or 'the event'}: expected an object, got {kind_of(value)}",
                "invalid_type",
                param=path or None,
            )
        self.path, self._left = path, dict(value)

    def name(self, key: str) -> str:
        """A field's full name."""
        return f"{self.path}.{key}" if self.path else key

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, default: Any = MISSING) -> Any:
        """A field of any type.

        Raises:
            EventError: if it is missing and has no default.
        """
        value = self._left.pop(key, default)
        if value is MISSING:
            raise EventError(
                f"missing {self.name(key)}", "missing_required_parameter", param=self.name(key)
            )
        return value

    def text(self, key: str, default: Any = MISSING, *, most: int | None = None) -> Any:
        """A text, or the default's type: a default of None allows null.

        Raises:
            EventError: if it is something else, or longer than `most` characters.
        """
        value = self._typed(key, default, str, "text")
        if isinstance(value, str) and most is not None and len(value) > most:
            raise EventError(
                f"{self.name(key)}: expected at most {most} characters, got {len(value)}",
                "string_above_max_length",
                param=self.name(key),
            )
        return value

    def flag(self, key: str, default: Any = MISSING) -> Any:
        """True or false."""
        return self._typed(key, default, bool, "true or false")

    def number(
        self, key: str, default: Any = MISSING, *, least: float, most: float, whole: bool = False
    ) -> Any:
        """A number in a range.

        Raises:
            EventError: if it is something else.
        """
        kinds = (int,) if whole else (int, float)
        expected = f"{'a whole number' if whole else 'a number'} from {least:g} to {most:g}"
        value = self._typed(key, default, kinds, expected)
        if value is not None and not least <= value <= most:
            raise EventError(
                f"{self.name(key)}: expected {expected}, got {value:g}", param=self.name(key)
            )
        return value

    def choice(self, key: str, choices: Iterable[str], default: Any = MISSING) -> Any:
        """One of some words.

        Raises:
            EventError: if it is none of them.
        """
        value, known = self.text(key, default), tuple(choices)
        if value is not None and value not in known:
            raise EventError(
                f"{self.name(key)}: expected {' or '.join(known)}, got {value!r:.80}",
                param=self.name(key),
            )
        return value

    def objects(self, key: str, default: Any = MISSING, *, most: int) -> Any:
        """A list of objects, each as `Fields`; the default where it is null or missing."""
        value = self._typed(key, default, list, "a list")
        if not isinstance(value, list):
            return value
        if len(value) > most:
            raise EventError(
                f"{self.name(key)}: expected at most {most} entries, got {len(value)}",
                "array_above_max_length",
                param=self.name(key),
            )
        return [Fields(entry, f"{self.name(key)}[{n}]") for n, entry in enumerate(value)]

    def inner(self, key: str, default: Any = MISSING) -> "Fields | None":
        """An object; None where the default is None and it is null or missing."""
        value = self.take(key, default)
        return None if value is None and default is None else Fields(value, self.name(key))

    def base64(self, key: str, *, most: int) -> bytes:
        """Bytes as base64 text.

        Args:
            key: the field.
            most: characters that it may have.

        Raises:
            EventError: if it is no base64, or too long.
        """
        text = self.text(key, most=most)
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise EventError(
                f"{self.name(key)}: expected audio as base64", param=self.name(key)
            ) from None

    def refuse_others(self, *, allowed: Iterable[str] = ()) -> None:
        """Refuse what was not taken: a misspelt setting must not pass for one that is in force.

        Args:
            allowed: fields that may be there and mean nothing.

        Raises:
            EventError: naming the first of them.
        """
        if unknown := sorted(self._left.keys() - set(allowed)):
            raise EventError(
                f"unknown parameter {self.name(unknown[0])!r:.200}",
                "unknown_parameter",
                param=shorten(self.name(unknown[0]), 200),
            )

    def _typed(self, key: str, default: Any, kinds: type | tuple[type, ...], expected: str) -> Any:
        value = self.take(key, default)
        if value is default or (value is None and default is not MISSING):
            return default
        wrong_bool = isinstance(value, bool) and kinds is not bool
        if wrong_bool or not isinstance(value, kinds):
            raise EventError(
                f"{self.name(key)}: expected {expected}, got {kind_of(value)}",
                "invalid_type",
                param=self.name(key),
            )
        return value


def kind_of(value: Any) -> str:
    """A JSON value's type in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
