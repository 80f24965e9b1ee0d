"""Pipecat's realtime service for OpenAI, unmodified; its events are strict."""

import asyncio
import json

import pytest
from helpers.realtime import LOUD, SILENT, Reply, Talk, tone

from sa2jax.chat.tools import ToolCall
from sa2jax.pipeline.reply import ReplyPiece

events = pytest.importorskip(
    "pipecat.services.openai.realtime.events", reason="needs pipecat-ai[openai]"
)
from pipecat.frames.frames import (
    EndFrame,
    InputAudioRawFrame,
    LLMContextFrame,
    ProposedUserStartedSpeakingFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from pipecat.workers.runner import WorkerRunner

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


def test_it_can_read_all_events():
    """A talk with speech, an interruption, a call of a tool, an error, and what follows each."""
    talk = Talk()
    seen = [*talk.first]
    vad = {"audio": {"input": {"turn_detection": {"type": "server_vad"}, "transcription": {}}}}
    seen += talk.send("session.update", session=vad)
    seen += [*talk.speak(LOUD), *talk.speak(SILENT)]
    talk.session.transcribed(talk.transcribe[-1].item_id, "hello", 1.0)
    seen += talk.give(ReplyPiece(text="one two"), ReplyPiece(audio=tone(2.0)))
    talk.now += 1
    seen += talk.speak(LOUD)
    seen += talk.end_cancelled(["one", "two"])
    seen += talk.speak(SILENT)
    seen += talk.answer(Reply(["wait"], [ToolCall("weather", {})], "tool_calls"))
    for item in [item.id for item in talk.session.conversation]:
        seen += talk.send("conversation.item.retrieve", item_id=item)
    seen += talk.send("response.cancel")
    semantic = {"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}}
    seen += talk.send("session.update", session=semantic)
    for event in seen:
        read = events.parse_server_event(json.dumps(event))
        assert read.type == event["type"]
    assert len({event["type"] for event in seen}) > 20


class Collector(FrameProcessor):
    """Keeps the frames that come by."""

    def __init__(self):
        super().__init__()
        self.frames, self.changed = [], asyncio.Event()

    async def process_frame(self, frame, direction) -> None:
        await super().process_frame(frame, direction)
        self.frames.append(frame)
        self.changed.set()
        await self.push_frame(frame, direction)

    async def wait_for(self, kind: type, count: int = 1) -> list:
        while len(found := [f for f in self.frames if isinstance(f, kind)]) < count:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 15)
        return found


def test_speech_in_and_out(server):
    async def talk() -> None:
        properties = events.SessionProperties(
            instructions="Be kind.",
            audio=events.AudioConfiguration(
                input=events.AudioInput(
                    turn_detection=events.TurnDetection(silence_duration_ms=300),
                    transcription=events.InputAudioTranscription(),
                ),
                output=events.AudioOutput(voice="anna"),
            ),
        )
        service = OpenAIRealtimeLLMService(
            api_key="any",
            base_url=f"ws://127.0.0.1:{server.port}/v1/realtime",
            settings=OpenAIRealtimeLLMService.Settings(
                model="small", session_properties=properties
            ),
        )
        before, after = Collector(), Collector()
        worker = PipelineWorker(
            Pipeline([before, service, after]),
            params=PipelineParams(audio_in_sample_rate=24_000, audio_out_sample_rate=24_000),
            cancel_on_idle_timeout=False,
        )
        runner = asyncio.create_task(WorkerRunner(handle_sigint=False).run(worker))
        context = LLMContext([{"role": "user", "content": "Hello"}])
        try:
            await worker.queue_frames([LLMContextFrame(context)])
            await after.wait_for(TTSAudioRawFrame)
            for sound in (LOUD, SILENT):
                for start in range(0, len(sound), 9600):
                    frame = InputAudioRawFrame(sound[start : start + 9600], 24_000, 1)
                    await worker.queue_frames([frame])
            await after.wait_for(ProposedUserStartedSpeakingFrame)
            await before.wait_for(TranscriptionFrame)
            await after.wait_for(TTSTextFrame, 2)
        finally:
            await worker.queue_frames([EndFrame()])  # it takes no cancelling
            await runner
        spoken = [frame.text for frame in after.frames if isinstance(frame, TTSTextFrame)]
        assert spoken == ["yes", "yes"]

    asyncio.run(asyncio.wait_for(talk(), 60))
    first, second = server.script.requests
    assert first.config.instructions == "Be kind."
    assert first.turns[0].parts == ("Hello",)
    assert len(second.turns) == 3
