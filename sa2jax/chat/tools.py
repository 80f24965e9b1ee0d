"""Tools in text: the schemas the model is shown, and the calls it writes.

A call is written `<tool_call>function`, the tool's name and its arguments as JSON, each on a line
of its own, then `</tool_call>`. Models write others too. What has one meaning is a call:

* arguments that are nearly JSON, see `lenient_json`, or lie in a Markdown code fence;
* `{"name": …, "arguments": {…}}`, the form of Qwen's own template, alone between the marks;
* several calls between one pair of marks.

Anything else between the marks is reported as malformed, in words for the model, and never run:
unescaped quotes inside a text, words behind the arguments, a call without its end. Text before and
behind the marks is text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sa2jax.chat.lenient_json import decode_lenient
from sa2jax.errors import FileError, PromptError, reason_of
from sa2jax.files.json_files import parse_json

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
MAX_CALLS = 64  # of one reply that are read
_NAME = r"[^\s<>{}\[\]]+"
_HEAD = re.compile(rf"\s*function[ \t]*\r?\n[ \t]*({_NAME})[ \t]*(?=\s|</tool_call>|\Z)\s*")
_OBJECT = re.compile(r"\s*(?:```(?:json)?\s*)?\{", re.IGNORECASE)
_FENCE, _FENCE_END = re.compile(r"\s*```(?:json)?\s*", re.IGNORECASE), re.compile(r"\s*```\s*")
_SPACE = re.compile(r"\s*")
_KEYS = {"type", "id", "name", "arguments"}  # of a call that is one object


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
        parsed = parse_json(tools) if isinstance(tools, str) else list(tools)
        text = tools if isinstance(tools, str) else json.dumps(parsed, ensure_ascii=False)
    except (FileError, TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"tools must be a list of JSON schemas ({reason_of(error)})") from None
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
    """Start, end and content of every call; a further call of one pair of marks has no width."""
    found: list[tuple[int, int, ToolCall | MalformedToolCall]] = []
    start = text.find(CALL_START)
    while start >= 0:
        if len(found) >= MAX_CALLS:  # a loop; each call that has no end is looked for to the last
            reason = f"more than {MAX_CALLS} calls in one reply"
            return [*found, (start, len(text), MalformedToolCall(text[start:], reason))]
        try:
            calls, end = _parse(text, start + len(CALL_START))
        except ValueError as error:  # nothing between these marks is run
            end = _end_of_malformed(text, start)
            calls = [MalformedToolCall(text[start:end], str(error))]
        found += [(end if n else start, end, call) for n, call in enumerate(calls)]
        start = text.find(CALL_START, end)
    return found


def _end_of_malformed(text: str, start: int) -> int:
    """Where a call that cannot be read ends: at its close, else before the next call."""
    body = start + len(CALL_START)
    close, following = text.find(CALL_END, body), text.find(CALL_START, body)
    stop = len(text) if following < 0 else following
    return close + len(CALL_END) if 0 <= close < stop else stop


def _parse(text: str, at: int) -> tuple[Sequence[ToolCall | MalformedToolCall], int]:
    """The calls between a pair of marks, the first of which ends at `at`, and where both end.

    Raises:
        ValueError: saying what is wrong, in words for the model.
    """
    calls = []
    while not (calls and text.startswith(CALL_END, at)):
        if calls and not (text.startswith("{", at) or _HEAD.match(text, at)):
            raise ValueError(f"expected {CALL_END} after the arguments")
        call, at = _parse_one(text, at)
        calls.append(call)
    return calls, at + len(CALL_END)


def _parse_one(text: str, at: int) -> tuple[ToolCall, int]:
    """A call, and where that begins which follows it."""
    head = _HEAD.match(text, at)
    if head is None:
        return _parse_named(text, at)
    name, at = head[1], head.end()
    if text.startswith(CALL_END, at):
        return ToolCall(name, {}), at
    if at == len(text):
        raise ValueError("the call is cut off before its arguments")
    arguments, at = _decode(text, at)
    return ToolCall(name, _checked_arguments(arguments)), at


def _parse_named(text: str, at: int) -> tuple[ToolCall, int]:
    """A call as one object of name and arguments, and where that begins which follows it."""
    expected = "expected 'function', then the tool's name, each on its own line"
    if not _OBJECT.match(text, at):
        raise ValueError(expected)
    call, at = _decode(text, at)
    name = call.get("name")
    if not isinstance(name, str) or not re.fullmatch(_NAME, name) or set(call) - _KEYS:
        raise ValueError(expected)
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # as OpenAI's histories have it
        arguments, end = _decode(written := arguments, 0)
        if end != len(written):
            raise ValueError("expected nothing after the arguments")
    return ToolCall(name, _checked_arguments(arguments)), at


def _decode(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at `at`, and where that begins which follows it; a code fence is left out."""
    fence = _FENCE.match(text, at)
    start = fence or _SPACE.match(text, at)
    try:
        value, at = decode_lenient(text, start.end() if start else at)
    except RecursionError:
        raise ValueError("the arguments are not valid JSON (nested too deep)") from None
    except ValueError as error:
        raise ValueError(
            f"the arguments are not valid JSON ({error}); write one object, and a quote inside a "
            'text as \\"'
        ) from None
    behind = _FENCE_END if fence else _SPACE
    if (found := behind.match(text, at)) is None:
        raise ValueError("a code fence without its end")
    return value, found.end()


def _checked_arguments(arguments: Any) -> dict[str, Any]:
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments must be a JSON object, got {type(arguments).__name__}")
    return arguments
