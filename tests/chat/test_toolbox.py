import json
import subprocess
import sys
import time
import types
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from helpers.example_tools import SEARCH, answer, run, schema, search, weather

from sa2jax.audio import AudioSource
from sa2jax.chat import tool_schema, toolbox
from sa2jax.chat.tool_schema import Tool
from sa2jax.chat.toolbox import (
    MAX_RESULT,
    ToolAnswer,
    Toolbox,
    ToolResult,
    get_date_time,
    results_text,
)
from sa2jax.chat.tools import MalformedToolCall, ToolCall, parse_tool_calls, render_tools
from sa2jax.errors import PromptError

# --- a box -------------------------------------------------------------------------------------


def test_json_is_shown_word_for_word():
    text = json.dumps([SEARCH], indent=3) + " \n"
    box = Toolbox(text, {"search": search})
    assert box.text == text
    assert run(box, "search", query="x").text == "found x"


def test_all_kinds_mixed():
    tool = Tool({"name": "mine"}, lambda: 1)
    box = Toolbox([SEARCH, weather, tool, "get_date_time"])
    assert box.names == ("search", "weather", "mine", "get_date_time")
    assert len(box) == 4
    schemas = [SEARCH, Tool.of(weather).schema, tool.schema, Tool.of(get_date_time).schema]
    assert box.text == render_tools(schemas)
    assert "搜索工具" in box.text


def test_no_tools():
    box = Toolbox()
    assert not box
    assert box.text == ""
    assert box.names == ()
    assert box.run([]) == []
    assert run(box, "x").text == "error: there is no tool 'x', there are: none"


@pytest.mark.parametrize(
    ("tools", "functions", "why"),
    [
        ("[]", {}, "leave tools out"),
        ("search", {}, "list of JSON schemas"),
        ('{"name": "f"}', {}, "list of JSON schemas"),
        ('["get_date_time"]', {}, "list of JSON schemas"),
        ("[{}]", {}, "name"),
        (SEARCH, {}, "must be a list, got dict"),
        (search, {}, "must be a list, got function"),
        ([3], {}, "got int"),
        (["clock"], {}, "no built-in tool 'clock': expected get_date_time"),
        ([SEARCH, search], {}, "two tools have the name 'search'"),
        (["get_date_time", get_date_time], {}, "two tools have the name 'get_date_time'"),
        ([SEARCH, weather], {"find": search}, "lists the tool 'find': expected one of search, wea"),
        ([], {"find": search}, "no schema lists the tool 'find': there are none"),
        ([search], {"search": search}, "'search' has two functions"),
        ([Tool(SEARCH, search)], {"search": search}, "'search' has two functions"),
        ([SEARCH], {"search": "x"}, "search: expected a function, got str"),
        ([{"name": "f", "x": object()}], {}, "JSON"),
        ([{"name": "f", "description": "\ud800"}], {}, "lone surrogates"),
    ],
)
def test_a_bad_box(tools, functions, why):
    with pytest.raises(PromptError, match=why):
        Toolbox(tools, functions)


def test_a_bad_timeout_of_a_box():
    with pytest.raises(PromptError, match="timeout"):
        Toolbox([search], timeout=0)


def test_what_a_box_can_run():
    box = Toolbox([SEARCH, weather])
    assert not box.can_run(ToolCall("search", {"query": "x"}))
    assert not box.can_run(ToolCall("search", {}))
    assert box.can_run(ToolCall("weather", {}))
    assert box.can_run(ToolCall("nothing", {}))
    assert box.can_run(MalformedToolCall("<tool_call>", "bad"))
    assert Toolbox([Tool(SEARCH)], {"search": search}).can_run(ToolCall("search", {}))


def test_a_call_that_is_the_callers_to_answer_stops_all():
    ran = []
    box = Toolbox([SEARCH, Tool({"name": "f"}, lambda: ran.append(1))])
    with pytest.raises(PromptError, match="'search' has no function"):
        box.run([ToolCall("f", {}), ToolCall("search", {"query": "x"})])
    assert not ran


def test_the_built_in_clock(monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 3, 1, 8, 5, 9, 77, timezone(timedelta(hours=8)))

    monkeypatch.setattr(toolbox, "datetime", Clock)
    monkeypatch.setenv("TZ", "CST-8")
    time.tzset()
    try:
        want = "2026-03-01 08:05:09 Sunday UTC+08:00"
        assert get_date_time() == want
        for tools in (["get_date_time"], [{"name": "get_date_time"}], '[{"name":"get_date_time"}]'):
            assert run(Toolbox(tools), "get_date_time").text == want
        result = run(Toolbox(["get_date_time"]), "get_date_time", timezone="UTC")
        assert result.text.startswith("error: this call of get_date_time is wrong: ")
        assert "'timezone'" in result.text
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_clock_tells_the_time():
    stamp = datetime.strptime(get_date_time(), "%Y-%m-%d %H:%M:%S %A UTC%z")
    assert abs(datetime.now().astimezone() - stamp) < timedelta(seconds=5)


def test_the_built_in_clock_can_be_replaced():
    mine = {"get_date_time": lambda: "noon"}
    assert run(Toolbox(["get_date_time"], mine), "get_date_time").text == "noon"
    assert run(Toolbox([{"name": "get_date_time"}], mine), "get_date_time").text == "noon"
    tool = Tool({"name": "get_date_time"})  # the caller answers
    assert not Toolbox([tool]).can_run(ToolCall("get_date_time", {}))


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("晴\n", "晴\n"),
        ("", ""),
        ({"天气": ["晴", None]}, '{"天气": ["晴", null]}'),
        ([], "[]"),
        (3, "3"),
        (0.5, "0.5"),
        (False, "false"),
        (ToolAnswer("done"), "done"),
        (ToolAnswer({"a": 1}), '{"a": 1}'),
    ],
)
def test_answers(value, text):
    result = answer(value)
    assert (result.text, result.ok, result.voice) == (text, True, None)
    assert result.call == ToolCall("f", {})


LOOP: list = []
LOOP.append(LOOP)
DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "NoneType"),
        (object(), "object"),
        (b"x", "bytes"),
        ((1, 2), "tuple"),
        ({1, 2}, "set"),
        (float("nan"), "float"),
        (float("inf"), "float"),
        ([float("nan")], "list"),
        ({"a": object()}, "dict"),
        ({(1, 2): 3}, "dict"),
        (LOOP, "list"),
        (DEEP, "list"),
        ("\ud800", "str"),
        ({"a": "\udfff"}, "dict"),
        (ToolAnswer(None), "ToolAnswer"),
        (ToolAnswer("\ud800"), "ToolAnswer"),
        (ToolAnswer("x", voice=3), "ToolAnswer"),
    ],
)
def test_nonsense(value, kind):
    result = answer(value)
    assert result.text == f"error: the tool f gave nothing that can be read ({kind})"
    assert not result.ok
    assert result.voice is None


@pytest.mark.parametrize("voice", ["anna", Path("anna.safetensors")])
def test_a_voice_by_name_or_path(voice):
    result = answer(ToolAnswer("now as Anna", voice))
    assert (result.text, result.voice) == ("now as Anna", voice)


def test_a_voice(monkeypatch):
    class Voice:
        name = "小跃"

    home = types.ModuleType("voices")
    home.Voice = Voice
    monkeypatch.setitem(sys.modules, "sa2jax.speech.voices", home)
    voice = Voice()
    result = answer(voice)
    assert (result.text, result.ok, result.voice) == ('{"voice": "小跃"}', True, voice)
    assert answer(ToolAnswer("changed", voice)).voice is voice
    recording = AudioSource("anna.wav", 1)
    assert answer(ToolAnswer("changed", recording)).voice is recording
    monkeypatch.delitem(sys.modules, "sa2jax.speech.voices")
    assert not answer(voice).ok


def test_long_answers_are_cut():
    assert answer("x" * MAX_RESULT).text == "x" * MAX_RESULT
    result = answer("字" * (MAX_RESULT + 1))
    assert result.ok
    assert result.text == (
        "字" * MAX_RESULT + f"\n[cut: the first {MAX_RESULT} of {MAX_RESULT + 1} characters]"
    )


def test_the_module_needs_no_jax():
    code = "import sys, sa2jax.chat.toolbox; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- wrong calls -------------------------------------------------------------------------------

TYPED = schema(
    "f",
    s={"type": "string"},
    i={"type": "integer"},
    n={"type": "number"},
    b={"type": "boolean"},
    a={"type": "array"},
    o={"type": "object"},
    e={"enum": ["x", 1]},
    m={"type": ["string", "null"]},
    z={"type": "colour"},
    w={},
    t=True,
)


@pytest.mark.parametrize(
    "arguments",
    [
        {"s": ""},
        {"i": 0},
        {"n": 1.5},
        {"n": 1},
        {"b": False},
        {"a": []},
        {"o": {}},
        {"e": 1},
        {"m": None},
        {"m": "x"},
        {"z": 3},
        {"w": None},
        {"t": [1]},
        {"new": 1},
    ],
)
def test_arguments_that_fit(arguments):
    result = run(Toolbox([TYPED], {"f": lambda **given: given}), "f", **arguments)
    assert result.ok
    assert json.loads(result.text) == arguments


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"s": 1}, "'s' must be of type string, got 1"),
        ({"s": None, "i": None, "b": 1}, "'b' must be of type boolean, got 1"),  # left out
        ({"i": "3"}, "'i' must be of type integer, got \"3\""),
        ({"i": 1.5}, "'i' must be of type integer, got 1.5"),
        ({"i": True}, "'i' must be of type integer, got true"),
        ({"n": True}, "'n' must be of type number, got true"),
        ({"b": 1}, "'b' must be of type boolean, got 1"),
        ({"a": {"字": 1}}, "'a' must be of type array, got {\"字\": 1}"),
        ({"o": []}, "'o' must be of type object, got []"),
        ({"e": "y"}, '\'e\' must be one of ["x", 1], got "y"'),
        ({"m": 1}, "'m' must be of type string or null, got 1"),
        ({"i": "x" * 300}, f"'i' must be of type integer, got \"{'x' * 199}…"),
        ({"i": DEEP}, "'i' must be of type integer, got list"),
        ({"s": 1, "b": 1}, "'s' must be of type string, got 1; 'b' must be of type boolean, got 1"),
    ],
)
def test_arguments_of_the_wrong_type(arguments, why):
    result = run(Toolbox([TYPED], {"f": lambda **given: given}), "f", **arguments)
    assert result.text == f"error: this call of f is wrong: {why}"
    assert not result.ok


def test_arguments_missing_or_unknown():
    ran = []
    box = Toolbox([SEARCH], {"search": lambda **given: ran.append(given)})
    text = "error: this call of search is wrong: it lacks 'query'"
    assert run(box, "search").text == text
    assert run(box, "search", q="x").text == text + "; it takes no 'q'"
    assert not ran


def test_arguments_that_the_schema_allows_and_the_function_does_not():
    box = Toolbox([schema("f", a={}, b={})], {"f": lambda a: a})
    assert run(box, "f", a="x").ok
    assert run(box, "f", a="x", b="y").text == (
        "error: this call of f is wrong: got an unexpected keyword argument 'b'"
    )
    assert run(box, "f").text == "error: this call of f is wrong: missing a required argument: 'a'"


def test_a_function_without_a_signature():
    with pytest.raises(ValueError, match="no signature"):
        tool_schema.inspect.signature(dict)
    assert run(Toolbox([schema("f")], {"f": dict}), "f", a=1).text == '{"a": 1}'


def test_surrogates_in_a_wrong_argument_are_replaced():
    result = run(Toolbox([TYPED], {"f": lambda **given: given}), "f", i="\ud800")
    assert result.text == "error: this call of f is wrong: 'i' must be of type integer, got \"?\""


def test_unknown_and_malformed_calls():
    box = Toolbox([search, weather])
    calls = parse_tool_calls(
        "<tool_call>function\nx\n{}</tool_call><tool_call>function\nsearch\n[1]</tool_call>"
        '<tool_call>function\nsearch\n{"query": "上证"}</tool_call>'
    )
    unknown, malformed, good = box.run(calls)
    assert unknown.text == "error: there is no tool 'x', there are: search, weather"
    assert malformed.text == (
        "error: this call cannot be read: the arguments must be a JSON object, got list"
    )
    assert good.text == "found 上证"
    assert [r.ok for r in (unknown, malformed, good)] == [False, False, True]
    assert [r.call for r in (unknown, malformed, good)] == calls


# --- the text of results -----------------------------------------------------------------------


def test_text_of_results():
    def made(call, text):
        return ToolResult(call, text, True)

    one, two = made(ToolCall("a", {}), "1\n2"), made(ToolCall("b", {}), "三")
    bad = made(MalformedToolCall("<tool_call>", "x"), "error: x")
    assert results_text([]) == ""
    assert results_text([one]) == "1\n2"
    assert results_text([bad]) == "error: x"
    assert results_text([two, one, bad, two]) == "b: 三\na: 1\n2\ntool_call: error: x\nb: 三"
