"""Tools that a conversation can run: from a Python function to the text that the model reads.

def get_weather(city: str, unit: Literal["C", "F"] = "C") -> str: ...

box = Toolbox([get_weather, "get_date_time"])
results = box.run(parse_tool_calls(reply))
results_text(results)

Whatever a call or a tool does wrong becomes a text for the model, never an exception.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sa2jax.chat.tool_schema import TIMEOUT, Tool, describe_error
from sa2jax.chat.tools import MalformedToolCall, ToolCall, render_tools
from sa2jax.errors import PromptError
from sa2jax.files.json_files import parse_json

MAX_RESULT = 20_000  # characters of one result
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


# --- results -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolAnswer:
    """What a tool may return to change the voice too.

    Attributes:
        text: what the model reads: a str, or something for JSON.
        voice: a `Voice`, its name, or its file as a `Path` or an `AudioSource`: a text opens no
            file.
    """

    text: Any
    voice: Any = None


@dataclass(frozen=True)
class ToolResult:
    """Result of a call.

    Attributes:
        call: the call.
        text: what the model reads.
        ok: whether the tool answered.
        voice: the voice that the tool asks for, see `ToolAnswer`.
        seconds: how long the tool ran.
    """

    call: ToolCall | MalformedToolCall
    text: str
    ok: bool
    voice: Any = None
    seconds: float = 0.0


def results_text(results: Sequence[ToolResult]) -> str:
    """What the `input` turn holds: the text of one result, or lines `name: text` of several."""
    if len(results) == 1:
        return results[0].text
    named = ((getattr(result.call, "name", "tool_call"), result.text) for result in results)
    return "\n".join(f"{name}: {text}" for name, text in named)


def get_date_time() -> str:
    """Get the current local date, time, weekday and UTC offset."""
    now = datetime.now().astimezone()
    text = now.isoformat(" ", "seconds")
    return f"{text[:19]} {_DAYS[now.weekday()]} UTC{text[19:]}"


BUILT_INS: Mapping[str, Callable[..., Any]] = {"get_date_time": get_date_time}


# --- running -----------------------------------------------------------------------------------


class Toolbox:
    """The tools of a conversation.

    Args:
        tools: the JSON text of a list of schemas, which is shown word for word; or a list of
            schemas, functions (see `Tool.of`), `Tool`s and names of `BUILT_INS`, mixed.
        functions: what schemas run, by name. A schema without is the caller's to answer, unless
            its name is a built-in's.
        timeout: seconds that the answer of a tool without a timeout of its own is waited for.

    Attributes:
        text: the content of the `tool_json_schemas` turn; "" for no tools.

    Raises:
        PromptError: for tools that cannot be used, two of one name, or a function of none.
    """

    def __init__(
        self,
        tools: str | Sequence[str | Mapping[str, Any] | Callable[..., Any] | Tool] = (),
        functions: Mapping[str, Callable[..., Any]] | None = None,
        *,
        timeout: float = TIMEOUT,
    ):
        functions = functions or {}
        text = render_tools(tools) if isinstance(tools, str) else None
        listed = tools if text is None else parse_json(text)
        if not isinstance(listed, Sequence):
            raise PromptError(f"tools must be a list, got {type(listed).__name__}")
        self._tools: dict[str, Tool] = {}
        for item in listed:
            tool = _as_tool(item, functions, timeout)
            if tool.name in self._tools:
                raise PromptError(f"two tools have the name {tool.name!r}: rename one")
            self._tools[tool.name] = tool
        if strange := [name for name in functions if name not in self._tools]:
            known = f"expected one of {', '.join(self.names)}" if self else "there are none"
            raise PromptError(f"no schema lists the tool {strange[0]!r}: {known}")
        if text is None:
            text = render_tools([tool.schema for tool in self._tools.values()]) if self else ""
        if not _is_unicode(text):
            raise PromptError("the tools' schemas hold lone surrogates: expected proper Unicode")
        self.text: str = text

    def __len__(self) -> int:
        return len(self._tools)

    @property
    def names(self) -> tuple[str, ...]:
        """The tools' names, in the order shown."""
        return tuple(self._tools)

    def with_schemas(self, text: str) -> "Toolbox":
        """The tools of these schemas, run by what runs the tools of the same names here.

        Args:
            text: JSON text of a list of schemas, such as that of an earlier conversation.

        Raises:
            PromptError: if it is none.
        """
        box = Toolbox(text)
        for name, tool in box._tools.items():
            known = self._tools.get(name)
            if known is not None and known.run is not None:
                box._tools[name] = replace(tool, run=known.run, timeout=known.timeout)
        return box

    def can_run(self, call: ToolCall | MalformedToolCall) -> bool:
        """Whether `run` answers a call: all but those of tools that are the caller's to answer.

        Calls that cannot be read and calls of tools that do not exist are answered with an error.
        """
        if isinstance(call, MalformedToolCall) or call.name not in self._tools:
            return True
        return self._tools[call.name].run is not None

    def run(self, calls: Iterable[ToolCall | MalformedToolCall]) -> list[ToolResult]:
        """Run calls at the same time, each in a thread of its own.

        A tool that does not answer in time is left behind: its thread cannot be stopped.

        Args:
            calls: from `parse_tool_calls`.

        Returns:
            One result per call, in order; a failure is one whose text says what went wrong.

        Raises:
            PromptError: before anything runs, for a call that `can_run` denies.
        """
        calls = list(calls)
        for call in calls:
            if isinstance(call, ToolCall) and not self.can_run(call):
                raise PromptError(
                    f"the tool {call.name!r} has no function: answer it yourself, or pass "
                    "functions={name: function}"
                )
        started = [self._start(call) for call in calls]
        return [entry if isinstance(entry, ToolResult) else entry.result() for entry in started]

    def _start(self, call: ToolCall | MalformedToolCall) -> "ToolResult | _Running":
        if isinstance(call, MalformedToolCall):
            return _failure(call, f"this call cannot be read: {call.reason}")
        if (tool := self._tools.get(call.name)) is None:
            return _failure(
                call,
                f"there is no tool {call.name!r}, there are: {', '.join(self.names) or 'none'}",
            )
        arguments = tool.without_nulls(call.arguments)
        if problems := tool.problems(arguments):
            return _failure(call, f"this call of {call.name} is wrong: {'; '.join(problems)}")
        return _Running(tool, call, arguments)


class _Running:
    """A call whose tool runs in a thread."""

    def __init__(self, tool: Tool, call: ToolCall, arguments: Mapping[str, Any]):
        self._tool, self._call, self._arguments = tool, call, arguments
        self._made: ToolResult | None = None
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._work, name=f"tool {tool.name}", daemon=True)
        self._thread.start()

    def result(self) -> ToolResult:
        """What the tool answers, waiting for as long as it may take."""
        self._thread.join(max(0.0, self._start + self._tool.timeout - time.monotonic()))
        return self._made or _failure(
            self._call,
            f"the tool {self._tool.name} did not answer within {self._tool.timeout:g} s",
            self._seconds,
        )

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _work(self) -> None:
        assert self._tool.run is not None
        name = self._tool.name
        try:
            value = self._tool.run(**self._arguments)
        except BaseException as error:  # SystemExit of a tool too must not end a conversation
            failure = f"the tool {name} failed: {describe_error(error)}"
            self._made = _failure(self._call, failure, self._seconds)
            return
        try:
            text, voice = read_answer(value)
            self._made = ToolResult(self._call, _cut(text), True, voice, self._seconds)
        except (TypeError, ValueError, RecursionError):
            failure = f"the tool {name} gave nothing that can be read ({type(value).__name__})"
            self._made = _failure(self._call, failure, self._seconds)


def _as_tool(item: Any, functions: Mapping[str, Callable[..., Any]], timeout: float) -> Tool:
    """One item of a toolbox."""
    if isinstance(item, str):
        if item not in BUILT_INS:
            raise PromptError(
                f"no built-in tool {item!r}: expected {', '.join(BUILT_INS)}, or a schema or "
                "function"
            )
        item = Tool.of(BUILT_INS[item]).schema
    if isinstance(item, Tool):
        tool = item
    elif isinstance(item, Mapping):
        tool = Tool(item, timeout=timeout)
        if tool.name not in functions:
            return replace(tool, run=BUILT_INS.get(tool.name))
    elif callable(item):
        tool = Tool.of(item, timeout=timeout)
    else:
        raise PromptError(
            "tools must be schemas, functions, Tools or names of built-ins, got "
            f"{type(item).__name__}"
        )
    if tool.name not in functions:
        return tool
    if tool.run is not None:
        raise PromptError(f"the tool {tool.name!r} has two functions: give one")
    return replace(tool, run=functions[tool.name])


def read_answer(value: Any) -> tuple[str, Any]:
    """Text and voice of what a tool returned.

    Raises:
        TypeError: if it is nothing of the kind.
        ValueError: if it is, but holds NaN, lone surrogates or itself.
        RecursionError: if it is nested too deep.
    """
    if _is_voice(value):
        return _text(json.dumps({"voice": value.name}, ensure_ascii=False)), value
    if not isinstance(value, ToolAnswer):
        return _text(value), None
    names_one = isinstance(value.voice, str | os.PathLike | None)
    if not (names_one or _is_voice(value.voice) or _is_source(value.voice)):
        raise TypeError
    return _text(value.text), value.voice


def _text(value: Any) -> str:
    if not isinstance(value, str | dict | list | int | float):
        raise TypeError
    text = (
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    )
    if not _is_unicode(text):
        raise ValueError
    return text


def _is_voice(value: Any) -> bool:
    return _is_kind(value, "sa2jax.speech.voices", "Voice")


def _is_source(value: Any) -> bool:
    return _is_kind(value, "sa2jax.audio.reader", "AudioSource")


def _is_kind(value: Any, module: str, name: str) -> bool:
    """Whether this is of a class, without importing jax: who has one has imported it."""
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def _is_unicode(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


def _failure(call: ToolCall | MalformedToolCall, text: str, seconds: float = 0.0) -> ToolResult:
    text = f"error: {text}".encode(errors="replace").decode()
    return ToolResult(call, _cut(text), False, seconds=seconds)


def _cut(text: str) -> str:
    if len(text) <= MAX_RESULT:
        return text
    return f"{text[:MAX_RESULT]}\n[cut: the first {MAX_RESULT} of {len(text)} characters]"
