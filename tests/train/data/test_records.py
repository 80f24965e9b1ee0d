"""Lines of jsonl: what is understood, and what is said of the rest."""

import json

import pytest

from sa2jax.errors import DataError
from sa2jax.train.data.records import (
    Record,
    RecordError,
    Turn,
    parse_record,
    parse_tool_call,
    resolve_path,
)

USER = {"role": "user", "content": "<audio>What did it say?"}
REPLY = {"role": "assistant", "content": "Good morning."}


def line(*messages, **others) -> str:
    return json.dumps({"messages": messages or [USER, REPLY], "audios": ["a.wav"]} | others)


def test_ms_swift():
    system = {"role": "system", "content": "请仔细聆听。"}
    text = line(system, USER, REPLY | {"loss": False}, rejected_response="No.", solution={"x": 1})
    record = parse_record(text, "talks.jsonl:12", "/data")
    assert record == Record(
        turns=(
            Turn("system", "请仔细聆听。"),
            Turn("user", "<audio>What did it say?"),
            Turn("assistant", "Good morning.", loss=False),
        ),
        audios=("/data/a.wav",),
        rejected="No.",
        solution={"x": 1},
        where="talks.jsonl:12",
    )
    assert parse_record(text.encode(), "talks.jsonl:12", "/data") == record
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_without_audio():
    record = parse_record(
        line({"role": "user", "content": "Hi"}, REPLY, audios=None, id=3), "w", "."
    )
    assert record.audios == ()
    assert record.tools is record.rejected is record.solution is None


@pytest.mark.parametrize(
    ("speech", "expected"),
    [
        ("reply.wav", "/data/reply.wav"),
        ("/else/reply.wav", "/else/reply.wav"),
        ("gs://bucket/reply.wav", "gs://bucket/reply.wav"),
        ([3, 6560, 0], (3, 6560, 0)),
        (None, None),
    ],
)
def test_speech(speech, expected):
    record = parse_record(line(USER, REPLY | {"speech": speech}), "w", "/data")
    assert record.turns[1].speech == expected
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("a.wav", "/data", "/data/a.wav"),
        ("../a.wav", "/data/x", "/data/a.wav"),
        ("a/b.wav", "gs://bucket/x/", "gs://bucket/x/a/b.wav"),
        ("/a.wav", "gs://bucket", "/a.wav"),
        ("https://host/a.wav", "/data", "https://host/a.wav"),
    ],
)
def test_locate(path, root, expected):
    assert resolve_path(path, root) == expected


@pytest.mark.parametrize(
    "audios", [["a.wav"], "a.wav", [{"path": "a.wav"}], ["file:///data/a.wav"]]
)
def test_forms_of_audios(audios):
    assert parse_record(line(audios=audios), "w", "/data").audios == ("/data/a.wav",)


TOOLS = [{"type": "function", "function": {"name": "search"}}]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [(TOOLS, TOOLS), (json.dumps(TOOLS), json.dumps(TOOLS)), ([], None), ("[]", None)],
)
def test_tools(tools, expected):
    assert parse_record(line(tools=tools), "w", ".").tools == expected


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "search", "arguments": {"query": "sea"}}',
        '{"name": "search", "arguments": "{\\"query\\": \\"sea\\"}"}',
    ],
)
def test_tool_call(content):
    call = parse_tool_call(content)
    assert (call.name, call.arguments) == ("search", {"query": "sea"})
    parse_record(line(USER, {"role": "tool_call", "content": content}), "w", ".")
    assert parse_tool_call('{"name": "time"}').arguments == {}


def with_reply(**changes):
    return line(USER, REPLY | changes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("NaN", "NaN is not JSON"),
        (b'{"messages": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "not valid JSON"),
        (line(USER | {"content": "\ud800<audio>"}), "not UTF-8"),
        ("[]", "expected a JSON object on each line, got []"),
        (
            "{}",
            "expected a list of messages under 'messages', or 'query' and 'response', got nothing",
        ),
        (line(messages=[]), "expected a list of messages under 'messages', got []"),
        (line(messages=["hi"]), "message 1: expected an object, got 'hi'"),
        (line({"role": "robot", "content": ""}), "message 1: unknown role 'robot', known: system"),
        (line({"role": ["user"], "content": ""}), "message 1: unknown role"),
        (with_reply(content=None), "message 2 (assistant): expected text, got nothing"),
        (with_reply(content=["a"]), "message 2 (assistant): expected text, got ['a']"),
        (with_reply(loss=0.5), "message 2: expected true or false as loss, got 0.5"),
        (with_reply(speech=[]), "speech without codes"),
        (with_reply(speech=""), "'' is no name of a file"),
        (with_reply(speech=[1, -1]), "a recording or a list of codes as speech, got [1, -1]"),
        (with_reply(speech=[True]), "a recording or a list of codes as speech, got [True]"),
        (with_reply(speech={"path": "a"}), "a recording or a list of codes as speech"),
        (with_reply(speech="a.wav", content="<audio>", audios=["a", "b"]), "cannot hold <audio>"),
        (line(USER | {"speech": "a.wav"}), "only an assistant's may have speech, not a user's"),
        (line(audios=[]), "1 <audio> in the messages, but 0 under 'audios'"),
        (line(audios=["a.wav", "b.wav"]), "1 <audio> in the messages, but 2 under 'audios'"),
        (line(audios=[{"bytes": "UklGRg=="}]), "audio as bytes under 'audios' is not supported"),
        (line(audios=[{"url": "a.wav"}]), "expected files under 'audios', got {'url'"),
        (line(audios=[3]), "expected files under 'audios', got 3"),
        (line(audios=["a\0.wav"]), "is no name of a file"),
        (line(audios=3), "expected a list of files under 'audios', got 3"),
        (line(images=["a.png"]), "'images' is not supported: expected text and audio only"),
        (line(rejected_messages=[REPLY]), "'rejected_messages' is supported where"),
        (line(rejected_response=["a"]), "expected text under 'rejected_response', got ['a']"),
        (line(tools={"name": "x"}), "expected a list under 'tools'"),
        (line(tools="search"), "tools: "),
        (line(tools=["search"]), "tools: tools must be a list of JSON schemas"),
        (line({"role": "tool_call", "content": "search"}), "a tool_call that is no JSON"),
        (line({"role": "tool_call", "content": "{}"}), "a tool_call with the name of a tool"),
        (line({"role": "tool_call", "content": '{"name": "a b"}'}), "with the name of a tool"),
        (line({"role": "tool_call", "content": '{"name": "a", "arguments": [1]}'}), "by name"),
    ],
)
def test_refused(text, reason):
    with pytest.raises(RecordError) as caught:
        parse_record(text, "talks.jsonl:1", ".")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DataError)


@pytest.mark.parametrize("key", ["images", "videos"])
def test_empty_lists_of_other_media(key):
    parse_record(line(**{key: []}), "w", ".")
