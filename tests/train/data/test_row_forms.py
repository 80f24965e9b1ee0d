"""Forms in which people have conversations: those of one meaning are taken, the rest explained."""

import json
from pathlib import Path

import pytest

from sa2jax.errors import DataError
from sa2jax.train.data.records import Record, RecordError, Turn, parse_record
from sa2jax.train.data.samples import JsonlSource, Reject, open_source

USER, HI = {"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "hi"}
TALK = {"messages": [USER, HI], "audios": ["a.wav"]}
HEARD = (Turn("user", "<audio>"), Turn("assistant", "hi"))
ASKED = (Turn("user", "<audio>what"), Turn("assistant", "hi"))
WRITTEN = (Turn("user", "what"), Turn("assistant", "hi"))
QUERY = {"query": "<audio>what", "response": "hi", "audios": ["a.wav"]}


def parse(row) -> Record:
    return parse_record(json.dumps(row, ensure_ascii=False), "w", "/d")


def talk(*messages, **others):
    return {"messages": list(messages), **others}


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (QUERY, ASKED),
        (
            QUERY | {"history": [["a", "b"]], "system": "S"},
            (Turn("system", "S"), Turn("user", "a"), Turn("assistant", "b"), *ASKED),
        ),
        (QUERY | {"history": [], "system": ""}, ASKED),
        ({"instruction": "<audio>what", "input": "", "output": "hi", "audio": "a.wav"}, ASKED),
        (
            {"instruction": "<audio>", "input": "x", "output": "hi", "audios": ["a.wav"]},
            (Turn("user", "<audio>\nx"), Turn("assistant", "hi")),
        ),
        (
            {
                "conversations": [
                    {"from": "user", "value": "<audio>a.wav</audio>what"},
                    {"from": "assistant", "value": "hi"},
                ]
            },
            ASKED,
        ),
        (
            {
                "conversation": [
                    {"from": "human", "value": "<audio>what"},
                    {"from": "gpt", "value": "hi"},
                ],
                "audios": "a.wav",
            },
            (Turn("human", "<audio>what"), Turn("assistant", "hi")),
        ),
        (
            {"conversations": [{"human": "<audio>what", "assistant": "hi"}], "audios": ["a.wav"]},
            (Turn("human", "<audio>what"), Turn("assistant", "hi")),
        ),
        (talk({"role": "user", "content": "what"}, HI, audios=["a.wav"]), ASKED),
        (
            talk(
                {
                    "role": "user",
                    "content": [
                        {"type": "audio", "audio": "a.wav"},
                        {"type": "text", "text": "what"},
                    ],
                },
                HI,
            ),
            ASKED,
        ),
        (
            talk(
                {
                    "role": "user",
                    "content": [
                        {"type": "audio_url", "audio_url": {"url": "a.wav"}},
                        {"type": "text", "text": "what"},
                    ],
                },
                HI,
            ),
            ASKED,
        ),
        (
            talk(
                {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "what"}]},
                HI,
                audios=["a.wav"],
            ),
            ASKED,
        ),
        (talk(USER, HI, audio="a.wav"), HEARD),
        (talk(USER, HI, audio={"path": "a.wav"}, audios=[]), HEARD),
        (talk(USER, HI, audio=["a.wav"], audios=["a.wav"]), HEARD),
        (TALK | {"label": True}, HEARD),
        (TALK | {"label": 3, "channel": "x", "metadata": {"audio_path": "z"}}, HEARD),
        (TALK | {"system": "S"}, (Turn("system", "S"), *HEARD)),
        (
            talk({"role": "system", "content": "S"}, USER, HI, audios=["a.wav"], system="S"),
            (Turn("system", "S"), *HEARD),
        ),
        (
            talk(USER, HI | {"loss": 0}, audios=["a.wav"]),
            (HEARD[0], Turn("assistant", "hi", loss=False)),
        ),
    ],
)
def test_forms_of_one_meaning(row, turns):
    record = parse(row)
    assert record.turns == turns
    assert record.audios == ("/d/a.wav",)


@pytest.mark.parametrize("audios", [{}, {"audios": []}, {"audios": None}])
def test_written_conversations(audios):
    record = parse(talk({"role": "user", "content": "what"}, HI, **audios))
    assert (record.turns, record.audios) == (WRITTEN, ())


def test_clips_in_texts_keep_their_order():
    both = [{"type": "audio", "audio": "b.wav"}, {"type": "text", "text": "<audio>c.wav</audio>"}]
    first = {"role": "user", "content": "<audio>a.wav</audio>"}
    record = parse(talk(first, HI, {"role": "user", "content": both}, HI))
    assert record.audios == ("/d/a.wav", "/d/b.wav", "/d/c.wav")
    assert [turn.content for turn in record.turns[::2]] == ["<audio>", "<audio><audio>"]


def test_rejected_messages_that_differ_in_the_last_answer():
    assert parse(TALK | {"rejected_messages": [USER, HI | {"content": "no"}]}).rejected == "no"
    assert parse(TALK | {"rejected_messages": None, "rejected_response": "no"}).rejected == "no"
    both = {"rejected_messages": [USER, HI | {"content": "no"}], "rejected_response": "no"}
    assert parse(TALK | both).rejected == "no"


def test_calls_of_tools_as_other_histories_have_them():
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"a": "ü"}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call, call]}
    answer = {"role": "tool", "content": "x", "tool_call_id": "1"}
    record = parse(talk({"role": "user", "content": "what"}, asked, answer, HI))
    assert [turn.role for turn in record.turns] == [
        "user",
        "tool_call",
        "tool_call",
        "tool",
        "assistant",
    ]
    assert json.loads(record.turns[1].content)["arguments"] == '{"a": "ü"}'
    sharegpt = [
        {"from": "human", "value": "what"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {}}'},
        {"from": "observation", "value": "x"},
        {"from": "gpt", "value": "hi"},
    ]
    roles = [turn.role for turn in parse({"conversations": sharegpt}).turns]
    assert roles == ["human", "tool_call", "tool_response", "assistant"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "a", "completion": "b"},
            "or 'query' and 'response', got 'prompt', 'completion'",
        ),
        ({"query": "a"}, "'query' and 'response', got 'query'"),
        ({"conversations": {}}, "a list of messages under 'conversations', got {}"),
        (TALK | {"conversations": [USER]}, "'messages' and 'conversations': give one"),
        (QUERY | {"history": "[['a', 'b']]"}, "expected pairs of texts under 'history'"),
        (QUERY | {"history": [["a"]]}, "expected pairs of texts under 'history'"),
        (QUERY | {"response": ["a", "b"]}, "message 2 (assistant): expected text"),
        ({"instruction": 1, "output": "a"}, "expected texts under 'instruction' and 'input'"),
        (TALK | {"label": False}, "label: false marks a bad answer"),
        (TALK | {"audio": "b.wav"}, "'audio' and 'audios' differ"),
        (TALK | {"rejected_messages": [HI]}, "where the last answer alone differs"),
        (TALK | {"rejected_messages": [USER | {"content": "<audio>b"}, HI]}, "last answer alone"),
        (TALK | {"rejected_messages": "no"}, "rejected_messages: expected a list of messages"),
        (TALK | {"rejected_messages": [USER, HI], "rejected_response": "x"}, "differ: give one"),
        (talk({"role": "system", "content": "A"}, HI, system="B"), "different system prompts"),
        (
            talk(
                {"role": "user", "content": "a"},
                HI,
                {"role": "user", "content": "b"},
                HI,
                audios=["a.wav"],
            ),
            "0 <audio> in the messages, but 1 under 'audios'",
        ),
        (talk({"role": "user", "content": "<audio>a.wav</audio><audio>"}, HI), "all in one way"),
        (
            talk({"role": "user", "content": "<audio>a.wav</audio>"}, HI, audios=["b.wav"]),
            "give them once",
        ),
        (
            talk({"role": "user", "content": [{"type": "image", "image": "a"}]}, HI),
            "expected parts of type text or audio, got {'type': 'image'",
        ),
        (
            talk(
                {
                    "role": "user",
                    "content": [{"type": "input_audio", "input_audio": {"data": "UklG"}}],
                },
                HI,
            ),
            "message 1: expected an audio's file",
        ),
        (
            talk(
                {
                    "role": "user",
                    "content": [{"type": "audio", "audio": "data:audio/wav;base64,U"}],
                },
                HI,
            ),
            "message 1: expected an audio's file",
        ),
        (talk(HI | {"tool_calls": [{"function": {}}]}), "expected calls with a name"),
        (talk(HI | {"tool_calls": {"name": "a"}}), "expected a list of calls"),
        (talk({"human": "a"}), "unknown role None"),
        (talk({"from": 3, "value": "a"}), "unknown role 3"),
    ],
)
def test_the_rest_is_explained(row, reason):
    with pytest.raises(RecordError) as caught:
        parse(row)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_an_array_is_rows(tmp_path):
    array = json.dumps([TALK, TALK], indent=1)
    for name, text in (("b.jsonl", array), ("c.jsonl", f"\ufeff\n {array}\n"), ("d.json", array)):
        assert len(open_source(write(tmp_path / name, text))) == 2


def test_files_of_which_no_line_is_a_record(tmp_path):
    lines = json.dumps(TALK) + "\n" + json.dumps(TALK) + "\n"
    with pytest.raises(DataError, match="UTF-16, expected UTF-8: `iconv"):
        open_source(write(tmp_path / "a.jsonl", lines, "utf-16"))


def test_a_broken_first_line_is_one_reject(tmp_path):
    source = JsonlSource([write(tmp_path / "a.jsonl", "[\n" + json.dumps(TALK) + "\n")])
    assert len(source) == 2
    assert isinstance(source[0], Reject)


def test_bytes_of_another_encoding_are_one_reject(tmp_path):
    row = json.dumps(talk(USER, HI | {"content": "你好"}), ensure_ascii=False)
    source = JsonlSource([write(tmp_path / "a.jsonl", row, "gbk")])
    assert isinstance(source[0], Reject)
    assert "UTF-8" in source[0].reason
