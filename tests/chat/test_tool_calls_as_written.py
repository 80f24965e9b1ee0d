"""Calls as models really write them: what has one meaning is run, the rest is reported."""

import pytest

from sa2jax.chat.lenient_json import decode_lenient
from sa2jax.chat.toolbox import Toolbox
from sa2jax.chat.tools import MalformedToolCall, ToolCall, parse_tool_calls, remove_tool_calls

NOTE = "<tool_call>function\nnote\n"
END = "</tool_call>"


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"text": "a\nb"}', {"text": "a\nb"}),
        ('{"text": "a\tb\r\n"}', {"text": "a\tb\r\n"}),
        ('{"text": "日本 \\ud83d\\ude00 ü"}', {"text": "日本 😀 ü"}),
        ('{"text": "a",}', {"text": "a"}),
        ('{"a": [1, 2, ], "b": {"c": 1 ,\n},\n}', {"a": [1, 2], "b": {"c": 1}}),
        ('{"a": "x,}", }', {"a": "x,}"}),
        ("{'text': 'a'}", {"text": "a"}),
        (
            "{'a': 'it\\'s', 'b': 'a \"quote\"', 'c': 'x\\\\', 'd': 'a\nb'}",
            {"a": "it's", "b": 'a "quote"', "c": "x\\", "d": "a\nb"},
        ),
        ("""{'a': "it's", "b": 'x'}""", {"a": "it's", "b": "x"}),
        (
            "{'a': True, 'b': [False, None], 'c': 'True'}",
            {"a": True, "b": [False, None], "c": "True"},
        ),
        (
            '{"text": "{\\"a\\": [1, {\\"b\\": \\"</tool_call>\\"}]}"}',
            {"text": '{"a": [1, {"b": "</tool_call>"}]}'},
        ),
        ("{'text': '</tool_call>',}", {"text": "</tool_call>"}),
        ('```json\n{"text": "a"}\n```', {"text": "a"}),
        ('```\n{"text": "a",}```\n', {"text": "a"}),
        ("{}", {}),
    ],
)
def test_arguments_of_one_meaning_are_read(written, arguments):
    text = f"before{NOTE}{written}{END}behind"
    assert parse_tool_calls(text) == [ToolCall("note", arguments)]
    assert remove_tool_calls(text) == "beforebehind"


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ('{"text": "say "hi" to him"}', 'a quote inside a text as \\"'),
        ("{'text': 'it's'}", "not valid JSON"),
        ('{text: "a"}', "not valid JSON"),
        ('{"a": 1 "b": 2}', "not valid JSON"),
        ('{"a": 1,, "b": 2}', "not valid JSON"),
        ('{"a": 1]', "not valid JSON"),
        ('{"a": }', "not valid JSON"),
        ('{"a": 1, // one\n "b": 2}', "not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ("{'a': {'b': 1, 'b': 1}}", "not valid JSON"),
        ('{"a": Infinity}', "Infinity is not JSON"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("{'a': " + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
        ("'a'", "not valid JSON"),
        ('"a"', "must be a JSON object, got str"),
        ('{"text": "a"} and so on', "expected </tool_call>"),
        ('{"text": "a"}, {"text": "b"}', "expected </tool_call>"),
        ('```json\n{"text": "a"}', "code fence without its end"),
    ],
)
def test_arguments_of_several_meanings_are_reported(written, reason):
    text = f"before{NOTE}{written}{END}behind"
    (call,) = parse_tool_calls(text)
    assert isinstance(call, MalformedToolCall)
    assert reason in call.reason
    assert len(call.reason) < 500
    assert remove_tool_calls(text) == "beforebehind"


def test_calls_as_one_object():
    """The form of Qwen's own template, which the decoder was made from."""
    for written in (
        '\n{"name": "note", "arguments": {"text": "a"}}\n',
        '{"name": "note", "arguments": "{\\"text\\": \\"a\\"}"}',
        '{"type": "function", "id": "1", "name": "note", "arguments": {"text": "a"}}',
        "```json\n{'name': 'note', 'arguments': {'text': 'a'},}\n```",
    ):
        assert parse_tool_calls(f"<tool_call>{written}{END}") == [ToolCall("note", {"text": "a"})]
    assert parse_tool_calls(f'<tool_call>{{"name": "now"}}{END}') == [ToolCall("now", {})]


@pytest.mark.parametrize(
    "written",
    [
        '{"text": "a"}',
        '{"name": "two words", "arguments": {}}',
        '{"name": 1, "arguments": {}}',
        '{"name": "note", "text": "a"}',
        '{"name": "note", "arguments": [1]}',
        '{"name": "note", "arguments": "{} x"}',
        '[{"name": "note", "arguments": {}}]',
        "{oops",
    ],
)
def test_other_objects_are_no_calls(written):
    (call,) = parse_tool_calls(f"<tool_call>{written}{END}")
    assert isinstance(call, MalformedToolCall)


def test_several_calls():
    a, b = ToolCall("note", {"text": "a"}), ToolCall("note", {"text": "b"})
    for text in (
        f'{NOTE}{{"text": "a"}}{END}\n{NOTE}{{"text": "b"}}{END}',
        f'{NOTE}{{"text": "a"}}\nfunction\nnote\n{{"text": "b",}}\n{END}\n',
        '<tool_call>{"name": "note", "arguments": {"text": "a"}}\n'
        f'{{"name": "note", "arguments": {{"text": "b"}}}}{END}\n',
    ):
        assert parse_tool_calls(text) == [a, b]
        assert remove_tool_calls(text) == "\n"


def test_nothing_between_marks_is_run_if_part_of_it_cannot_be_read():
    text = f'{NOTE}{{"text": "a"}}\nfunction\nnote\n{{oops{END} x {NOTE}{{"text": "c"}}{END}'
    bad, good = parse_tool_calls(text)
    assert isinstance(bad, MalformedToolCall)
    assert good == ToolCall("note", {"text": "c"})
    assert remove_tool_calls(text) == " x "


@pytest.mark.parametrize("written", ["", "function\nnote\n{", NOTE + "{}" + END])
def test_a_loop_of_calls_is_cut(written):
    """Thousands of calls take no time that grows with their square."""
    text = f"before<tool_call>{written}" * 3000
    calls = parse_tool_calls(text)
    assert 64 < len(calls) < 140
    assert "more than 64 calls in one reply" in calls[-1].reason
    assert remove_tool_calls(text).startswith("before")


def test_null_for_an_argument_that_may_be_left_out():
    def note(text: str, n: int = 1, tag: str | None = "none") -> str:
        return f"{text} {n} {tag}"

    def run(arguments: str) -> str:
        return Toolbox([note]).run(parse_tool_calls(f"{NOTE}{arguments}{END}"))[0].text

    assert run('{"text": "a", "n": null}') == "a 1 none"
    assert run('{"text": "a", "tag": null}') == "a 1 None"
    assert "'text' must be of type string, got null" in run('{"text": null}')


def test_where_a_value_ends():
    assert decode_lenient("x {'a': '}'} y", 2) == ({"a": "}"}, 12)
    with pytest.raises(ValueError, match="char 3"):
        decode_lenient("x {'a' y", 2)
