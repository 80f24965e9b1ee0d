"""`POST /v1/audio/speech`: a text read aloud, as bytes or as events."""

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from sa2jax.chat.template import TASKS, Text
from sa2jax.inference.requests import GenerationConfig
from sa2jax.pipeline.task_runner import task_options
from sa2jax.serve.bodies import read_json_body, validated
from sa2jax.serve.conversation import Conversation
from sa2jax.serve.encoders import MEDIA_TYPES, encode, open_encoder, require_format
from sa2jax.serve.errors import ApiError
from sa2jax.serve.event_stream import (
    ClientGone,
    OpenResponse,
    event,
    typed_error,
    while_connected,
    with_error_event,
)
from sa2jax.serve.openai.chat_request import SEEDS, Body, VoiceName, voice_name
from sa2jax.serve.openai.choices import Choice
from sa2jax.serve.state import ServerState, state_of

router = APIRouter()
TASK = TASKS["tts"]


class SpeechRequest(Body):
    """What to read, and how."""

    input: str
    model: str | None = None
    voice: VoiceName | None = None
    instructions: str | None = Field(None, max_length=4096)
    response_format: str | None = None
    speed: float | None = None
    stream_format: Literal["audio", "sse"] | None = None
    seed: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    max_new_tokens: int | None = Field(None, ge=1)

    def require_supported(self, most: int) -> None:
        """Refuse what cannot be done.

        Args:
            most: characters that are read.

        Raises:
            ApiError: 400, naming the field.
        """
        if not self.input.strip():
            raise ApiError("input: expected text", param="input")
        if len(self.input) > most:
            got = f"input: expected at most {most} characters, got {len(self.input)}"
            raise ApiError(f"{got}; send it in parts", param="input")
        require_format(self.response_format or "mp3", "response_format")
        if self.speed not in (None, 1.0):
            raise ApiError(
                "speed: expected 1; ask for another pace in `instructions`, if the model was "
                "trained to follow them",
                param="speed",
                code="unsupported_parameter",
            )

    @property
    def options(self) -> GenerationConfig:
        """Sampling and limits; the same text is read alike unless a seed says otherwise."""
        options = task_options(TASK)
        sampling = options.sampling
        if self.temperature is not None:
            sampling = replace(sampling, temperature=self.temperature)
        return replace(
            options,
            sampling=sampling,
            max_new_tokens=self.max_new_tokens or options.max_new_tokens,
            seed=(self.seed or 0) % SEEDS,
        )


@router.post("/v1/audio/speech")
async def speech(request: Request) -> Response:
    """Read a text aloud."""
    state = state_of(request)
    body = validated(SpeechRequest, await read_json_body(request))
    state.require_model(body.model)
    body.require_supported(state.settings.max_input_chars)
    state.admission.require_room()
    choice = await state.bridge.call(_choice, state, body)
    try:
        return await while_connected(request, _answer(state, body, choice))
    except ClientGone:
        return Response(status_code=499)


def _choice(state: ServerState, body: SpeechRequest) -> Choice:
    system = TASK.system if body.instructions is None else f"{TASK.system}{body.instructions}\n"
    conversation = Conversation(
        model=state.model,
        system=system,
        rounds=[],
        question=[Text(body.input)],
        options=body.options,
        max_len=state.max_len,
        voice=state.voices.find(voice_name(body.voice)),
        first=state.settings.first_codes,
        chunk=state.settings.chunk_codes,
    )
    return Choice(state, conversation)


async def _answer(state: ServerState, body: SpeechRequest, choice: Choice) -> Response:
    """A response that has begun: what is wrong with the request was answered by a status."""
    form = body.response_format or "mp3"
    if body.stream_format is None and form == "wav":  # whole, so that its header tells the length
        data = await state.bridge.call(encode, form, state.sample_rate, await choice.whole())
        return Response(data, media_type=MEDIA_TYPES[form], headers=_headers(choice, state))
    parts, kind = _parts(state, form, choice), MEDIA_TYPES[form]
    if body.stream_format == "sse":
        parts, kind = with_error_event(_events(choice, parts), typed_error), "text/event-stream"
    return await OpenResponse.begin(parts, kind, lambda: _headers(choice, state))


def _headers(choice: Choice, state: ServerState) -> dict[str, str]:
    waited = f"{1000 * choice.waited:.1f}"
    return {"x-queue-ms": waited, "x-sample-rate": str(state.sample_rate)}


async def _parts(state: ServerState, form: str, choice: Choice) -> AsyncGenerator[bytes]:
    """The bytes of the sound, as they are complete; at least one part, perhaps empty."""
    encoder = open_encoder(form, state.sample_rate)
    sent = False
    async with aclosing(choice.pieces()) as pieces:
        async for piece in pieces:
            if len(piece.audio) and (data := encoder.push(np.asarray(piece.audio))):
                sent = True
                yield data
    last = encoder.finish()
    if last or not sent:
        yield last


async def _events(choice: Choice, parts: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(parts):
        async for part in parts:
            audio = base64.b64encode(part).decode()
            yield event({"type": "speech.audio.delta", "audio": audio})
    yield event({"type": "speech.audio.done", "usage": _usage(choice)})


def _usage(choice: Choice) -> dict[str, Any]:
    counts = choice.counts
    return {
        "input_tokens": counts.prompt,
        "output_tokens": counts.generated,
        "total_tokens": counts.prompt + counts.generated,
    }
