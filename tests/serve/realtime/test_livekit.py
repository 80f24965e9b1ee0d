"""LiveKit's realtime client for OpenAI, unmodified: it needs no LiveKit server."""

import asyncio

import numpy as np
import pytest
from helpers.realtime import Reply, tone

from sa2jax.chat.tools import ToolCall

openai = pytest.importorskip("livekit.plugins.openai", reason="needs livekit-plugins-openai")
from livekit import rtc
from livekit.agents import llm
from openai.types.beta.realtime.session import TurnDetection

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


class Talk:
    """A session of LiveKit's client, and what it reports."""

    def __init__(self, server, **options):
        self.model = openai.realtime.RealtimeModel(
            model="small", voice="anna", base_url=server.url, api_key="any", **options
        )

    async def __aenter__(self) -> "Talk":
        self.session = self.model.session()
        self.replies: asyncio.Queue[llm.GenerationCreatedEvent] = asyncio.Queue()
        self.errors, self.heard, self.started = [], [], asyncio.Event()
        self.session.on("generation_created", self.replies.put_nowait)
        self.session.on("error", self.errors.append)
        self.session.on("input_audio_transcription_completed", self.heard.append)
        self.session.on("input_speech_started", lambda _: self.started.set())
        return self

    async def __aexit__(self, *error) -> None:
        await self.session.aclose()
        await self.model.aclose()
        if error[0] is None:
            assert not self.errors

    def speak(self, seconds: float, *, loud: bool = True) -> None:
        sound = np.round(tone(seconds) * 32767 * loud).astype(np.int16)
        frame = rtc.AudioFrame(sound.tobytes(), 24_000, 1, len(sound))
        self.session.push_audio(frame)

    async def reply(self) -> tuple[str, float]:
        """Words and seconds of the next reply."""
        return await collected(await asyncio.wait_for(self.replies.get(), 10))


async def collected(made: llm.GenerationCreatedEvent) -> tuple[str, float]:
    text, seconds = "", 0.0
    async for message in made.message_stream:
        async for part in message.text_stream:
            text += part
        async for frame in message.audio_stream:
            seconds += frame.duration
    return text, seconds


def run(talk) -> None:
    asyncio.run(asyncio.wait_for(talk, 60))


def test_speech_in_and_out(server):
    async def talk() -> None:
        turns = TurnDetection(type="server_vad", silence_duration_ms=300)
        async with Talk(server, turn_detection=turns) as client:
            client.speak(1.0)
            client.speak(1.0, loud=False)
            assert await client.reply() == ("yes", pytest.approx(1.0))
            assert [e.transcript for e in client.heard if e.is_final] == ["hello"]

    run(talk())
    (request,) = server.script.requests
    assert request.config.turn_detection.silence_duration_ms == 300
    assert request.config.voice == "anna"


def test_a_greeting_and_instructions(server):
    async def talk() -> None:
        async with Talk(server) as client:
            await client.session.update_instructions("Be kind.")
            made = await client.session.generate_reply(instructions="Greet.")
            assert await collected(made) == ("yes", pytest.approx(1.0))

    run(talk())
    assert server.script.requests[-1].config.instructions == "Be kind.\nGreet."


def test_interrupted(server):
    server.script.replies.append(Reply(["one", "two", "three"], holds=True))

    async def talk() -> None:
        turns = TurnDetection(type="server_vad", silence_duration_ms=300)
        async with Talk(server, turn_detection=turns) as client:
            made = await client.session.generate_reply()
            reply = asyncio.create_task(collected(made))
            await asyncio.sleep(0.3)
            client.speak(1.0)
            await asyncio.wait_for(client.started.wait(), 10)
            (message_id,) = (
                item.id for item in client.session.chat_ctx.items if item.role == "assistant"
            )
            client.session.truncate(message_id=message_id, modalities=["audio"], audio_end_ms=1500)
            await client.replies.get()  # that of the answer that is interrupted
            text, _ = await asyncio.wait_for(reply, 10)
            assert text.startswith("one two")
            client.speak(1.0, loud=False)
            assert await client.reply() == ("yes", pytest.approx(1.0))

    run(talk())
    said, _ = server.script.requests[-1].turns
    assert said.utterance.words == ("one",)


def test_cancel_without_a_response(server):
    async def talk() -> None:
        async with Talk(server) as client:
            client.session.send_event({"type": "response.cancel"})
            made = await client.session.generate_reply()
            await collected(made)

    run(talk())


def test_tools(server):
    server.script.replies += [
        Reply(["wait"], [ToolCall("weather", {"city": "Rome"})], "tool_calls"),
        Reply(["sun"]),
    ]

    @llm.function_tool
    async def weather(city: str) -> str:
        """The weather in a city."""
        return "sun"

    async def talk() -> None:
        async with Talk(server) as client:
            await client.session.update_tools([weather])
            made = await client.session.generate_reply()
            await collected(made)
            (call,) = [call async for call in made.function_stream]
            assert (call.name, call.arguments) == ("weather", '{"city": "Rome"}')
            context = client.session.chat_ctx.copy()
            output = llm.FunctionCallOutput(
                call_id=call.call_id, name="weather", output="sun", is_error=False
            )
            context.items.append(output)
            await client.session.update_chat_ctx(context)
            assert (await collected(await client.session.generate_reply()))[0] == "sun"

    run(talk())
    said, answer = server.script.requests[-1].turns
    assert said.utterance.calls == 1
    assert (answer.name, answer.output) == ("weather", "sun")


def test_a_history(server):
    async def talk() -> None:
        async with Talk(server) as client:
            context = llm.ChatContext.empty()
            context.add_message(role="user", content="What is one and one?")
            context.add_message(role="assistant", content="Two.")
            context.add_message(role="user", content="And three?")
            await client.session.update_chat_ctx(context)
            await collected(await client.session.generate_reply())

    run(talk())
    asked, answered, newest = server.script.requests[-1].turns
    assert (asked.parts, answered.text, newest.parts) == (
        ("What is one and one?",),
        "Two.",
        ("And three?",),
    )
