"""A tool that the model may call: its schema, given or made from a Python function."""

import inspect
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from sa2jax.chat.tools import ToolCall, parse_tool_calls
from sa2jax.errors import PromptError

MAX_SHOWN = 200  # characters of a wrong argument in an error
TIMEOUT = 30.0  # seconds
_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    NoneType: "null",
}
_SECTION = re.compile(
    r"(Args|Arguments|Parameters|Attributes|Examples?|Notes?|Raises|Returns|Yields):\s*"
)
_ENTRY = re.compile(r"(\s+)(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


@dataclass(frozen=True)
class Tool:
    """A tool that the model may call.

    Attributes:
        schema: as shown to the model: {"type": "function", "function": {"name", "description",
            "parameters"}}, or the inner part alone; it is kept as it is.
        run: what is called with the arguments by name, in a thread of its own. It returns a str,
            something for JSON, a `ToolAnswer` or a `Voice`. None: the caller answers.
        timeout: seconds that an answer is waited for.

    Raises:
        PromptError: for a schema, a function or a timeout that cannot be used.
    """

    schema: Mapping[str, Any]
    run: Callable[..., Any] | None = None
    timeout: float = TIMEOUT

    def __post_init__(self):
        name = _inner(self.schema).get("name")
        # A name is good if a call by it can be read back.
        if not isinstance(name, str) or parse_tool_calls(ToolCall(name, {}).to_text()) != [
            ToolCall(name, {})
        ]:
            raise PromptError(
                "expected a tool's schema with a name of one word, without <>{}[], got "
                f"{name!r:.80}"
            )
        if not isinstance(_inner(self.schema).get("parameters", {}), Mapping):
            raise PromptError(f"the tool {name}: its parameters must be a JSON schema (an object)")
        required = self._required
        listed = isinstance(required, list | tuple) and all(isinstance(k, str) for k in required)
        if not listed or not isinstance(self._properties, Mapping):
            raise PromptError(
                f"the tool {name}: expected its properties as an object, required as names"
            )
        if self.run is not None and not callable(self.run):
            raise PromptError(
                f"the tool {name}: expected a function, got {type(self.run).__name__}"
            )
        number = isinstance(self.timeout, int | float)
        if not number or not 0 < self.timeout <= threading.TIMEOUT_MAX:
            raise PromptError(
                f"the tool {name}: expected a timeout of more than 0 s, got {self.timeout!r}"
            )

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout: float = TIMEOUT,
    ) -> Self:
        """A tool from a function: its schema comes from signature and docstring.

        Parameters are str (also without annotation), int, float, bool, list, dict, list[x],
        Literal, X | None, or Annotated[x, "description"]; other descriptions come from the
        docstring's "Args:". A parameter with a default may be left out.

        Args:
            function: what to run.
            name: by default the function's.
            description: by default the docstring up to its first section.
            timeout: seconds that an answer is waited for.

        Raises:
            PromptError: for a parameter that no schema describes, or a name that is none.
        """
        plain = function.func if isinstance(function, partial) else function
        name = getattr(plain, "__name__", "") if name is None else name
        summary, notes = _documented(plain)
        properties, required = {}, []
        for key, parameter in _parameters(function, name).items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise PromptError(
                    f"the tool {name}: a schema cannot describe {parameter}; name each parameter"
                )
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise PromptError(f"the tool {name}: {key} cannot be given by name; remove the '/'")
            try:
                described = _schema_of(parameter.annotation)
            except TypeError:
                raise PromptError(
                    f"the tool {name}: expected {key} to be str, int, float, bool, list, dict, "
                    f"list[x], Literal or X | None, got {parameter.annotation!r}"
                ) from None
            note = described.pop("description", notes.get(key))
            properties[key] = described | ({"description": note} if note else {})
            if parameter.default is parameter.empty:
                required.append(key)
        declared: dict[str, Any] = {"name": name}
        if summary := summary if description is None else description:
            declared["description"] = summary
        if properties:
            declared["parameters"] = {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": False,
            }
        return cls({"type": "function", "function": declared}, function, timeout)

    @property
    def name(self) -> str:
        """What the model calls it."""
        return _inner(self.schema)["name"]

    @property
    def _properties(self) -> Mapping[str, Any]:
        return _inner(self.schema).get("parameters", {}).get("properties", {})

    @property
    def _required(self) -> list[str]:
        return _inner(self.schema).get("parameters", {}).get("required", [])

    @property
    def _closed(self) -> bool:
        return _inner(self.schema).get("parameters", {}).get("additionalProperties") is False

    def without_nulls(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments without each null for what may be left out and is never null."""

        def means_nothing(key: str) -> bool:
            wanted = self._properties.get(key)
            types = wanted.get("type") if isinstance(wanted, Mapping) else None
            return key not in self._required and types not in (None, "null") and "null" not in types

        return {k: v for k, v in arguments.items() if v is not None or not means_nothing(k)}

    def problems(self, arguments: Mapping[str, Any]) -> list[str]:
        """What is wrong with arguments, in words for the model; types are checked at the top."""
        problems = [f"it lacks {key!r}" for key in self._required if key not in arguments]
        for key, value in arguments.items():
            if key not in self._properties and self._closed:
                problems.append(f"it takes no {key!r}")
            elif isinstance(wanted := self._properties.get(key), Mapping):
                problems += _mismatch(key, value, wanted)
        if problems or self.run is None:
            return problems
        try:
            inspect.signature(self.run).bind(**arguments)
        except TypeError as error:  # which says what is missing or unexpected
            return [str(error)]
        except ValueError:  # a function in C that does not tell
            pass
        return []


def _inner(schema: Any) -> Mapping[str, Any]:
    """The part of a schema that holds the name."""
    if not isinstance(schema, Mapping):
        raise PromptError(f"expected a tool's schema as an object, got {type(schema).__name__}")
    inner = schema.get("function")
    return inner if isinstance(inner, Mapping) else schema


def _parameters(function: Callable[..., Any], name: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function, eval_str=True).parameters
    except Exception as error:  # evaluating an annotation may raise anything
        reason = describe_error(error)
        raise PromptError(
            f"the tool {name}: its signature cannot be read ({reason}); give its schema"
        ) from None


def _schema_of(annotation: Any) -> dict[str, Any]:
    """The JSON schema of a parameter.

    Raises:
        TypeError: for an annotation that has none.
    """
    if annotation is inspect.Parameter.empty:
        return {"type": "string"}
    if isinstance(annotation, type) and annotation in _TYPES and annotation is not NoneType:
        return {"type": _TYPES[annotation]}
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        notes = [note for note in inner[1:] if isinstance(note, str)]
        return _schema_of(inner[0]) | ({"description": notes[0]} if notes else {})
    if origin is list:
        return {"type": "array"} | ({"items": _schema_of(inner[0])} if inner else {})
    if origin is dict:
        return {"type": "object"}
    if origin is Literal:
        types = list(dict.fromkeys(_TYPES[type(value)] for value in inner if type(value) in _TYPES))
        if all(type(value) in _TYPES for value in inner):
            return {"type": types[0] if len(types) == 1 else types, "enum": list(inner)}
    if origin in (Union, UnionType) and NoneType in inner and len(inner) == 2:
        described = _schema_of(next(kind for kind in inner if kind is not NoneType))
        types = described["type"] if isinstance(described["type"], list) else [described["type"]]
        described["type"] = list(dict.fromkeys([*types, "null"]))
        if "enum" in described and None not in described["enum"]:
            described["enum"].append(None)
        return described
    raise TypeError


def _documented(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """A google-style docstring's description, and those of its "Args:"."""
    summary: list[str] = []
    notes: dict[str, str] = {}
    section, depth, key = "", "", ""
    for line in (inspect.getdoc(function) or "").splitlines():
        if match := _SECTION.fullmatch(line):
            section = match[1]
        elif not section:
            summary.append(line)
        elif section in ("Args", "Arguments", "Parameters"):
            entry = _ENTRY.match(line)
            if entry and (not key or entry[1] == depth):
                depth, key, notes[entry[2]] = entry.groups()
            elif key:
                notes[key] += f" {line}"
    return _one_line("\n".join(summary)), {key: _one_line(note) for key, note in notes.items()}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _mismatch(key: str, value: Any, wanted: Mapping[str, Any]) -> list[str]:
    """Mismatches of an argument and its schema."""
    types = wanted.get("type")
    types = [types] if isinstance(types, str) else types
    if isinstance(types, list) and all(kind in _TYPES.values() for kind in types):
        fitting = {_TYPES.get(type(value)), "number" if type(value) is int else None}
        if not fitting.intersection(types):
            return [f"{key!r} must be of type {' or '.join(types)}, got {_shown(value)}"]
    if isinstance(choices := wanted.get("enum"), list) and value not in choices:
        return [f"{key!r} must be one of {_shown(choices)}, got {_shown(value)}"]
    return []


def _shown(value: Any) -> str:
    """The start of a value as JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):
        return type(value).__name__
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def describe_error(error: BaseException) -> str:
    """The type of an error, and its text if there is one."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
