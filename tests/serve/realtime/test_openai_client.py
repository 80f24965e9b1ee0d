"""OpenAI's own realtime client, unmodified."""

import asyncio
import base64

import pytest
from helpers.realtime import LOUD, SILENT, Reply, base64_of, until

from sa2jax.chat.tools import ToolCall

openai = pytest.importorskip("openai", reason="needs the package openai[realtime]")

MANUAL = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def connected(server, **options):
    client = openai.OpenAI(base_url=server.url, api_key="any")
    return client.realtime.connect(model="small", **options)


def test_a_spoken_turn(server):
    with connected(server) as connection:
        until(connection, "session.created")
        connection.session.update(session={"type": "realtime", "instructions": "Sing."})
        (updated,) = until(connection, "session.updated")
        assert updated.session.instructions == "Sing."
        for sound in (LOUD, SILENT):
            connection.input_audio_buffer.append(audio=base64_of(sound))
        events = until(connection, "response.done")
        assert events[-1].response.status == "completed"
        assert events[-1].response.usage.input_token_details.cached_tokens == 2
        sound = [
            base64.b64decode(e.delta) for e in events if e.type == "response.output_audio.delta"
        ]
        assert len(b"".join(sound)) == 48_000


def test_cancel_and_truncate(server):
    server.script.replies.append(Reply(["one", "two"], holds=True))
    with connected(server) as connection:
        connection.session.update(session=MANUAL)
        until(connection, "session.updated")
        connection.response.create()
        for _ in range(4):  # two words, each in two pieces
            delta = until(connection, "response.output_audio.delta")[-1]
        connection.response.cancel()
        done = until(connection, "response.done")[-1].response
        assert done.status_details.reason == "client_cancelled"
        assert done.output[0].content[0].transcript == "one two"
        connection.conversation.item.truncate(
            item_id=delta.item_id, content_index=0, audio_end_ms=99_000
        )
        assert until(connection, "conversation.item.truncated")[-1].audio_end_ms == 2000
        connection.conversation.item.truncate(
            item_id=delta.item_id, content_index=0, audio_end_ms=1400
        )
        until(connection, "conversation.item.truncated")
        connection.conversation.item.retrieve(item_id=delta.item_id)
        item = until(connection, "conversation.item.retrieved")[-1].item
        assert item.content[0].transcript == "one"
        connection.conversation.item.delete(item_id=delta.item_id)
        until(connection, "conversation.item.deleted")


def test_tools(server):
    server.script.replies += [
        Reply([], [ToolCall("weather", {"city": "Rome"})], "tool_calls"),
        Reply(["sun"]),
    ]
    with connected(server) as connection:
        connection.session.update(session=MANUAL | {"tools": [WEATHER]})
        until(connection, "session.updated")
        connection.conversation.item.create(
            item={
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "The weather in Rome?"}],
            }
        )
        connection.response.create()
        made = until(connection, "response.function_call_arguments.done")[-1]
        assert (made.name, made.arguments) == ("weather", '{"city": "Rome"}')
        call = until(connection, "response.done")[-1].response.output[0]
        connection.conversation.item.create(
            item={"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
        )
        connection.response.create()
        assert until(connection, "response.done")[-1].response.status == "completed"


def test_an_error_leaves_the_connection_open(server):
    with connected(server) as connection:
        connection.recv()
        connection.input_audio_buffer.commit()
        error = connection.recv()
        assert error.type == "error"
        assert error.error.code == "input_audio_buffer_commit_empty"
        connection.response.create()
        assert until(connection, "response.done")[-1].response.status == "completed"


@pytest.mark.both_pairs
def test_the_asynchronous_client(server):
    async def talk() -> list:
        async with (
            openai.AsyncOpenAI(base_url=server.url, api_key="any") as client,
            client.realtime.connect(model="small") as connection,
        ):
            await connection.response.create(response={"output_modalities": ["text"]})
            found = []
            async for event in connection:
                found.append(event)
                if event.type == "response.done":
                    return found
        raise AssertionError

    events = asyncio.run(asyncio.wait_for(talk(), 30))
    assert events[-1].response.output[0].content[0].text == "yes"
    assert events[-1].response.output_modalities == ["text"]


def test_a_client_secret(server):
    client = openai.OpenAI(base_url=server.url, api_key="any")
    secret = client.realtime.client_secrets.create(
        session={"type": "realtime", "instructions": "Sing."},
        expires_after={"anchor": "created_at", "seconds": 60},
    )
    browser = openai.OpenAI(base_url=server.url, api_key=secret.value)
    with browser.realtime.connect(model="small") as connection:
        assert connection.recv().session.instructions == "Sing."
