"""Answers of /v1/chat/completions as chunks, while they are made."""

import asyncio
import base64
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi.responses import Response

from sa2jax.pipeline.reply import ReplyPiece
from sa2jax.serve.conversation import codes_text
from sa2jax.serve.encoders import Encoder, open_encoder
from sa2jax.serve.event_stream import DONE, OpenResponse, event, with_error_event
from sa2jax.serve.openai.chat_plan import ChatPlan
from sa2jax.serve.openai.choices import Choice


async def streamed_answer(plan: ChatPlan) -> Response:
    """All answers as they come: a stream that has begun."""
    parts = with_error_event(_parts(plan), lambda error: event(error.body))
    return await OpenResponse.begin(_done(parts), headers=plan.headers)


async def _done(parts: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(parts):
        async for part in parts:
            yield part
    yield DONE


async def _parts(plan: ChatPlan) -> AsyncGenerator[bytes]:
    """The events; those that open the answers come with the first of what they say."""
    opening = [_chunk(plan, c, {"role": "assistant", "content": ""}) for c in plan.choices]
    head = b"".join(map(event, opening))
    chunks = _merged(plan) if len(plan.choices) > 1 else _events(plan, plan.choices[0])
    async with aclosing(chunks):
        async for chunk in chunks:
            yield head + event(chunk)
            head = b""
    asked = plan.body.stream_options
    if asked is not None and asked.include_usage:
        yield event(plan.envelope("chat.completion.chunk", []) | {"usage": plan.usage})


async def _events(plan: ChatPlan, choice: Choice) -> AsyncGenerator[Mapping[str, Any]]:
    """The chunks of one answer."""
    sound = _Sound(plan)
    async with aclosing(choice.pieces()) as pieces:
        async for piece in pieces:
            for delta in sound.deltas(piece):
                yield _chunk(plan, choice, delta)
    for delta in sound.last(choice):
        yield _chunk(plan, choice, delta)
    if calls := plan.calls(choice):
        yield _chunk(plan, choice, {"content": None, "tool_calls": calls})
    yield _chunk(plan, choice, {"content": None}, choice)


async def _merged(plan: ChatPlan) -> AsyncGenerator[Mapping[str, Any]]:
    """The chunks of several answers as they come; the slowest reader pauses them all."""
    queue: asyncio.Queue[Mapping[str, Any] | Exception | None] = asyncio.Queue(
        plan.state.settings.queued_pieces
    )

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(_events(plan, choice)) as events:
                async for chunk in events:
                    await queue.put(chunk)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    async with AsyncExitStack() as stack:
        tasks = [asyncio.create_task(pump(choice)) for choice in plan.choices]
        stack.push_async_callback(_end, tasks)
        left = len(tasks)
        while left:
            chunk = await queue.get()
            if isinstance(chunk, Exception):
                raise chunk
            if chunk is None:
                left -= 1
            else:
                yield chunk


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Sound:
    """The deltas of an answer's pieces."""

    def __init__(self, plan: ChatPlan):
        self._plan = plan
        self._key = plan.state.replies.new_id()
        self._encoder: Encoder | None = None
        if plan.audio_format is not None:
            self._encoder = open_encoder(plan.audio_format, plan.state.sample_rate)
        self._begun = False

    def deltas(self, piece: ReplyPiece) -> list[dict[str, Any]]:
        """What a piece brings."""
        made: list[dict[str, Any]] = []
        if piece.thinking:
            made.append({"content": None, "reasoning_content": piece.thinking})
        if piece.text:
            made.append(self._text(piece.text))
        if self._encoder is not None and len(piece.audio):
            made += self._data(self._encoder.push(piece.audio))
        return made

    def last(self, choice: Choice) -> list[dict[str, Any]]:
        """What comes when the answer has ended."""
        made: list[dict[str, Any]] = []
        if self._plan.tts_content:
            spoken = {"tts_text": "", "tts_audio": codes_text(choice.ended)}
            made.append({"content": None, "tts_content": spoken})
        if self._encoder is not None:
            made += self._data(self._encoder.finish())
            expires = choice.keep(self._key)
            made += self._audio({"expires_at": expires})
        return made

    def _text(self, text: str) -> dict[str, Any]:
        if self._encoder is not None:
            (delta,) = self._audio({"transcript": text})
            if self._plan.tts_content:
                delta["tts_content"] = {"tts_text": text, "tts_audio": ""}
            return delta
        if self._plan.tts_content:
            return {"content": None, "tts_content": {"tts_text": text, "tts_audio": ""}}
        return {"content": text}

    def _data(self, data: bytes) -> list[dict[str, Any]]:
        return self._audio({"data": base64.b64encode(data).decode()}) if data else []

    def _audio(self, audio: dict[str, Any]) -> list[dict[str, Any]]:
        """A delta of sound; the first one brings the id."""
        if not self._begun:
            self._begun, audio = True, {"id": self._key, **audio}
        return [{"audio": audio}]


def _chunk(
    plan: ChatPlan, choice: Choice, delta: Mapping[str, Any], ended: Choice | None = None
) -> dict[str, Any]:
    end = None if ended is None else ended.finish_reason
    value = {"index": choice.index, "delta": dict(delta), "finish_reason": end, "logprobs": None}
    if ended is not None:
        value["stop_reason"] = ended.ended.finish_reason
    return plan.envelope("chat.completion.chunk", [value])
