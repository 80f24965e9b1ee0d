import json

import pytest

from sa2jax.chat.tools import (
    MalformedToolCall,
    ToolCall,
    parse_tool_calls,
    remove_tool_calls,
    render_tools,
)
from sa2jax.errors import PromptError

SEARCH = {"type": "function", "function": {"name": "search", "description": "搜索工具"}}


def test_schemas_are_plain_json_with_chinese_kept():
    text = '[{"type": "function", "function": {"name": "search", "description": "搜索工具"}}]'
    assert render_tools([SEARCH]) == text
    assert render_tools((SEARCH,)) == text


def test_schemas_given_as_json_are_kept_word_for_word():
    text = '[ {"type":"function"} ]'
    assert render_tools(text) == text


@pytest.mark.parametrize(
    "tools", [[], "[]", "{}", "[1]", "not json", ["x"], [{"a": object()}], 3, "null"]
)
def test_bad_schemas(tools):
    with pytest.raises(PromptError, match="tools"):
        render_tools(tools)


def test_one_call():
    text = '<tool_call>function\nsearch\n{"query": "上证指数"}</tool_call>'
    call = ToolCall("search", {"query": "上证指数"})
    assert parse_tool_calls(text) == [call]
    assert call.to_text() == text


def test_several_calls_among_text():
    a, b = ToolCall("a", {"x": [1, {"y": None}]}), ToolCall("get_weather", {"location": "Paris"})
    text = f"wait… {a.to_text()}\nand {b.to_text()}<|EOT|>"
    assert parse_tool_calls(text) == [a, b]
    assert remove_tool_calls(text) == "wait… \nand <|EOT|>"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>function\nget_date_time\n{}</tool_call>",
        "<tool_call>function\nget_date_time\n</tool_call>",
        "<tool_call>function\nget_date_time</tool_call>",
        "<tool_call>\nfunction\r\n get_date_time \n\n {}\n</tool_call>",
    ],
)
def test_no_arguments_and_loose_spacing(text):
    assert parse_tool_calls(text) == [ToolCall("get_date_time", {})]


def test_closing_tag_inside_a_string():
    call = ToolCall("search", {"query": "what is </tool_call> and <tool_call>?"})
    assert parse_tool_calls(call.to_text() * 2) == [call, call]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>", "expected 'function'"),
        ("<tool_call></tool_call>", "expected 'function'"),
        ("<tool_call>function search {}</tool_call>", "expected 'function'"),
        ("<tool_call>retrieval\nsearch\n{}</tool_call>", "expected 'function'"),
        ("<tool_call>function\n\n{}</tool_call>", "expected 'function'"),
        ('<tool_call>function\n{"a":1}</tool_call>', "expected 'function'"),
        ("<tool_call>function\nsearch\n", "cut off"),
        ("<tool_call>function\nsea", "cut off"),
        ('<tool_call>function\nsearch\n{"query": "a', "not valid JSON"),
        ('<tool_call>function\nsearch\n{"query": NaN}</tool_call>', "NaN is not JSON"),
        ("<tool_call>function\nsearch\n[1]</tool_call>", "must be a JSON object"),
        ('<tool_call>function\nsearch\n{"a": 1} tail</tool_call>', "expected </tool_call>"),
        ('<tool_call>function\nsearch\n{"a": 1}', "expected </tool_call>"),
        ("<tool_call>function\nsearch\n" + "[" * 200_000, "not valid JSON"),
    ],
)
def test_malformed_calls_are_reported(text, reason):
    (call,) = parse_tool_calls("before" + text)
    assert isinstance(call, MalformedToolCall)
    assert call.text == text
    assert reason in call.reason
    assert remove_tool_calls("before" + text) == "before"


def test_a_malformed_call_does_not_swallow_the_next():
    good = ToolCall("search", {"query": "x"})
    text = "<tool_call>function\nsearch\n{oops " + good.to_text() + "end"
    bad, call = parse_tool_calls(text)
    assert isinstance(bad, MalformedToolCall)
    assert bad.text == "<tool_call>function\nsearch\n{oops "
    assert call == good
    assert remove_tool_calls(text) == "end"


def test_no_calls():
    assert parse_tool_calls("plain </tool_call> text") == []
    assert remove_tool_calls("plain </tool_call> text") == "plain </tool_call> text"


def test_arguments_match_json():
    arguments = {"a": 1.5, "b": [True, None], "c": {"d": '引号" 换行\n'}}
    (call,) = parse_tool_calls(ToolCall("f", arguments).to_text())
    assert isinstance(call, ToolCall)
    assert call.arguments == json.loads(json.dumps(arguments))
