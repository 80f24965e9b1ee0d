"""OpenAI's client talks with a model that really hears and speaks."""

import base64
import time
from collections.abc import Iterator

import numpy as np
import pytest
from helpers.realtime import base64_of, pcm, until
from helpers.servers import run_app

from sa2jax.audio import load_audio, resample
from sa2jax.chat.tool_schema import Tool
from sa2jax.chat.toolbox import get_date_time
from sa2jax.serve.app import create_app
from sa2jax.serve.settings import Settings

openai = pytest.importorskip("openai", reason="needs the package openai[realtime]")

MANUAL = {"type": "realtime", "temperature": 0, "audio": {"input": {"turn_detection": None}}}
SILENCE = bytes(2 * 24_000)


@pytest.fixture(scope="module")
def url(nano) -> Iterator[str]:
    app = create_app(nano, Settings(model_id="nano", rows=2), warm=False)
    with run_app(app) as port:
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def connection(url):
    client = openai.OpenAI(base_url=url, api_key="any")
    with client.realtime.connect(model="nano") as made:
        yield made


@pytest.fixture(scope="module")
def spoken(question) -> bytes:
    """A spoken question, as a client sends it."""
    return pcm(resample(load_audio(question), 16_000, 24_000))


def sound_of(events) -> np.ndarray:
    data = [base64.b64decode(e.delta) for e in events if e.type == "response.output_audio.delta"]
    return np.frombuffer(b"".join(data), "<i2").astype(np.float32) / 32768


def ask(connection, text: str) -> None:
    content = [{"type": "input_text", "text": text}]
    connection.conversation.item.create(
        item={"type": "message", "role": "user", "content": content}
    )
    connection.response.create()


def test_a_spoken_question_is_heard_and_answered(connection, nano, spoken):
    connection.session.update(
        session={
            "type": "realtime",
            "temperature": 0,
            "audio": {"input": {"transcription": {}}, "output": {"voice": "anna"}},
        }
    )
    until(connection, "session.updated")
    for start in range(0, len(spoken), 9600):  # 0.2 s each
        connection.input_audio_buffer.append(audio=base64_of(spoken[start : start + 9600]))
    connection.input_audio_buffer.append(audio=base64_of(SILENCE))
    events = until(connection, "response.done")
    kinds = [event.type for event in events]
    assert kinds[:2] == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
    ]
    done = events[-1].response
    assert done.status == "completed"
    said = done.output[0].content[0].transcript
    assert "seven" in said
    assert "seven" in nano.transcribe((sound_of(events), 24_000))
    assert done.usage.input_token_details.audio_tokens > 10
    assert done.usage.output_token_details.audio_tokens > 10
    if "conversation.item.input_audio_transcription.completed" not in kinds:
        events = until(connection, "conversation.item.input_audio_transcription.completed")
    heard = next(e for e in events if e.type.endswith("transcription.completed")).transcript
    assert "three" in heard
    # What was said before is known, and need not be read again.
    ask(connection, "what is three plus four")
    again = until(connection, "response.done")[-1].response
    assert again.usage.input_token_details.cached_tokens > 20
    assert again.usage.input_token_details.cached_tokens_details.audio_tokens > 10


def test_the_history_keeps_what_was_heard(connection):
    connection.session.update(session=MANUAL)
    until(connection, "session.updated")
    ask(connection, "what is three plus four")
    delta = until(connection, "response.output_audio.delta")[-1]
    started = time.monotonic()
    connection.response.cancel()
    events = until(connection, "response.done")
    assert time.monotonic() - started < 5
    done = events[-1].response
    connection.conversation.item.truncate(item_id=delta.item_id, content_index=0, audio_end_ms=200)
    assert until(connection, "conversation.item.truncated")[-1].audio_end_ms == 200
    connection.conversation.item.retrieve(item_id=delta.item_id)
    part = until(connection, "conversation.item.retrieved")[-1].item.content[0]
    assert len(base64.b64decode(part.audio)) == 2 * 4800
    if done.status == "cancelled":
        assert done.output[0].content[0].transcript.startswith(part.transcript)
    ask(connection, "what is three plus four")
    done = until(connection, "response.done")[-1].response
    assert done.status == "completed"
    assert "seven" in done.output[0].content[0].transcript


def test_tools(connection):
    function = Tool.of(get_date_time).schema["function"]
    connection.session.update(
        session=MANUAL
        | {"output_modalities": ["text"], "tools": [{"type": "function", **function}]}
    )
    until(connection, "session.updated")
    ask(connection, "what time is it")
    done = until(connection, "response.done")[-1].response
    call = done.output[-1]
    assert (call.type, call.name, call.arguments) == ("function_call", "get_date_time", "{}")
    answer = "2024-05-06 15:30:00 Monday UTC+00:00"
    connection.conversation.item.create(
        item={"type": "function_call_output", "call_id": call.call_id, "output": answer}
    )
    connection.response.create()
    done = until(connection, "response.done")[-1].response
    assert "three thirty" in done.output[0].content[0].text


def test_outside_the_conversation(connection):
    connection.session.update(session=MANUAL)
    until(connection, "session.updated")
    content = [{"type": "input_text", "text": "what is three plus four"}]
    connection.response.create(
        response={
            "conversation": "none",
            "output_modalities": ["text"],
            "input": [{"type": "message", "role": "user", "content": content}],
        }
    )
    done = until(connection, "response.done")[-1].response
    assert "seven" in done.output[0].content[0].text
    assert done.conversation_id is None


def test_a_greeting(connection):
    """Nobody has asked: whatever it says, the conversation goes on."""
    connection.session.update(session=MANUAL | {"max_output_tokens": 30})
    until(connection, "session.updated")
    connection.response.create()
    assert until(connection, "response.done")[-1].response.status in ("completed", "incomplete")
    ask(connection, "what is three plus four")
    assert until(connection, "response.done")[-1].response.output


def test_the_oldest_turns_go(nano):
    """With room for few tokens the conversation goes on, but not if it is to keep all."""
    app = create_app(nano, Settings(model_id="nano", rows=1, max_len=160), warm=False)
    with run_app(app) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any")
        with client.realtime.connect(model="nano") as made:
            made.session.update(session=MANUAL | {"output_modalities": ["text"]})
            until(made, "session.updated")
            for _ in range(8):
                ask(made, "what is three plus four")
                done = until(made, "response.done")[-1].response
                assert done.status == "completed"
                assert done.usage.input_tokens <= 120  # a quarter is for the answer
            made.session.update(session=MANUAL | {"truncation": "disabled"})
            until(made, "session.updated")
            ask(made, "what is three plus four")
            done = until(made, "response.done")[-1].response
            assert done.status == "failed"
            assert done.status_details.error.code == "context_length_exceeded"
