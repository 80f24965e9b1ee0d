"""`POST /v1/chat/completions`: written and spoken answers, whole and streamed."""

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from sa2jax.serve.bodies import read_json_body, validated
from sa2jax.serve.conversation import codes_text
from sa2jax.serve.encoders import encode
from sa2jax.serve.event_stream import ClientGone, while_connected
from sa2jax.serve.openai.chat_plan import ChatPlan
from sa2jax.serve.openai.chat_request import ChatRequest
from sa2jax.serve.openai.chat_stream import streamed_answer
from sa2jax.serve.openai.choices import Choice
from sa2jax.serve.state import state_of

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    body = validated(ChatRequest, await read_json_body(request))
    state.require_model(body.model)
    body.require_supported(state.settings)
    state.admission.require_room(body.n or 1)
    plan = await state.bridge.call(ChatPlan, state, body)
    answer = streamed_answer(plan) if body.stream else whole_answer(plan)
    try:
        return await while_connected(request, answer)
    except ClientGone:
        return Response(status_code=499)


async def whole_answer(plan: ChatPlan) -> Response:
    """All answers at once."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(choice.whole()) for choice in plan.choices]
    except* Exception as errors:
        raise _first(errors) from None
    choices = []
    for choice, task in zip(plan.choices, tasks, strict=True):
        message = await _message(plan, choice, task.result())
        choices.append(
            {
                "index": choice.index,
                "message": message,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.ended.finish_reason,
                "logprobs": None,
            }
        )
    value = plan.envelope("chat.completion", choices) | {"usage": plan.usage}
    return JSONResponse(value, headers=plan.headers())


async def _message(plan: ChatPlan, choice: Choice, sound: np.ndarray) -> dict[str, Any]:
    reply, state = choice.ended, plan.state
    message: dict[str, Any] = {"role": "assistant", "content": choice.text or None, "refusal": None}
    if reply.thinking:
        message["reasoning_content"] = reply.thinking
    if plan.audio_format is not None:
        data = await state.bridge.call(encode, plan.audio_format, state.sample_rate, sound)
        key = state.replies.new_id()
        message["content"] = None
        message["audio"] = {
            "id": key,
            "data": base64.b64encode(data).decode(),
            "expires_at": choice.keep(key),
            "transcript": choice.text,
        }
    if plan.tts_content:
        message["tts_content"] = {"tts_text": choice.text, "tts_audio": codes_text(reply)}
    if calls := plan.calls(choice):
        message["tool_calls"] = [
            {name: part for name, part in call.items() if name != "index"} for call in calls
        ]
    return message


def _first(errors: BaseExceptionGroup) -> BaseException:
    """The first error of a group."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
