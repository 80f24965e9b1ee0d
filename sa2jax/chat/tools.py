"""Tools in text: the schemas the model is shown, and the calls it writes.

A call is written `<tool_call>function`, the tool's name and its arguments as JSON, each on a line
of its own, then `</tool_call>`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sa2jax.errors import PromptError

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r"\s*function[ \t]*\r?\n[ \t]*([^\s<>{}\[\]]+)[ \t]*(?=\s|</tool_call>|\Z)\s*")


@dataclass(frozen=True)
class ToolCall:
    """One call the model asks for.

    Attributes:
        name: the tool.
        arguments: its arguments by name.
    """

    name: str
    arguments: Mapping[str, Any]

    def to_text(self) -> str:
        """The call as the model writes it."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return f"{CALL_START}function\n{self.name}\n{arguments}{CALL_END}"


@dataclass(frozen=True)
class MalformedToolCall:
    """Something that starts like a call and is none.

    Attributes:
        text: what the model wrote, from `<tool_call>` on.
        reason: what is wrong with it, in words fit to hand back to the model.
    """

    text: str
    reason: str


def render_tools(tools: str | Sequence[Mapping[str, Any]]) -> str:
    """The content of a `tool_json_schemas` turn.

    Args:
        tools: JSON schemas of the tools, or the JSON text of such a list, which is kept as it is.

    Raises:
        PromptError: if this is no list of JSON objects, or an empty one.
    """
    try:
        parsed = json.loads(tools) if isinstance(tools, str) else list(tools)
        text = tools if isinstance(tools, str) else json.dumps(parsed, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"tools must be a list of JSON schemas ({error})") from None
    if not isinstance(parsed, list) or not all(isinstance(tool, Mapping) for tool in parsed):
        raise PromptError(f"tools must be a list of JSON schemas, got {text[:80]!r}")
    if not parsed:
        raise PromptError("an empty list of tools: leave tools out instead")
    return text


def parse_tool_calls(text: str) -> list[ToolCall | MalformedToolCall]:
    """All calls in a reply, in order; never raises on what a model writes.

    A tool without parameters may be called without arguments. `</tool_call>` inside a JSON string
    does not end a call.
    """
    return [call for _, _, call in _scan(text)]


def remove_tool_calls(text: str) -> str:
    """The reply without its calls, well-formed or not."""
    kept, end = "", 0
    for start, stop, _ in _scan(text):
        kept += text[end:start]
        end = stop
    return kept + text[end:]


def _scan(text: str) -> list[tuple[int, int, ToolCall | MalformedToolCall]]:
    """Start, end and content of every call."""
    calls = []
    start = text.find(CALL_START)
    while start >= 0:
        stop, call = _parse(text, start)
        calls.append((start, stop, call))
        start = text.find(CALL_START, stop)
    return calls


def _parse(text: str, start: int) -> tuple[int, ToolCall | MalformedToolCall]:
    body = start + len(CALL_START)
    # Where a call that cannot be read ends: at its close, else before the next call.
    close, following = text.find(CALL_END, body), text.find(CALL_START, body)
    stop = len(text) if following < 0 else following
    if 0 <= close < stop:
        stop = close + len(CALL_END)

    def malformed(reason: str) -> tuple[int, MalformedToolCall]:
        return stop, MalformedToolCall(text[start:stop], reason)

    head = _HEAD.match(text, body)
    if head is None:
        return malformed("expected 'function', then the tool's name, each on its own line")
    name, arguments, end = head[1], {}, head.end()
    if not text.startswith(CALL_END, end):
        if end == len(text):
            return malformed("the call is cut off before its arguments")
        try:
            arguments, end = _JSON.raw_decode(text, end)
        except (ValueError, RecursionError) as error:
            return malformed(f"the arguments are not valid JSON ({error})")
        if not isinstance(arguments, dict):
            return malformed(f"the arguments must be a JSON object, got {arguments!r}")
        while end < len(text) and text[end].isspace():
            end += 1
        if not text.startswith(CALL_END, end):
            return malformed(f"expected {CALL_END} after the arguments")
    return end + len(CALL_END), ToolCall(name, arguments)


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_reject)
