"""`POST /v1/audio/transcriptions` and `/translations`: recordings as text, with true segments."""

import zlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import Field
from starlette.datastructures import FormData

from sa2jax import audio
from sa2jax.audio import AudioSource
from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.chat.template import TASKS, PromptTask
from sa2jax.pipeline.reply import Reply, Segment
from sa2jax.serve.bodies import form_file, form_values, read_form, validated
from sa2jax.serve.errors import ApiError
from sa2jax.serve.event_stream import (
    ClientGone,
    OpenResponse,
    event,
    typed_error,
    while_connected,
    with_error_event,
)
from sa2jax.serve.openai import subtitles
from sa2jax.serve.openai.chat_request import Body
from sa2jax.serve.openai.segment_stream import SegmentStream
from sa2jax.serve.recordings import open_recording
from sa2jax.serve.state import ServerState, state_of

router = APIRouter()

_UNFILLED = ("known_speaker_names", "known_speaker_references")
_FRAMES = 100  # a second, in which `seek` counts


class TranscriptionRequest(Body):
    """How a recording is to be written down; language, prompt and keywords are not used."""

    model: str | None = None
    language: str | None = Field(None, max_length=40)
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float | None = Field(None, ge=0, le=2)
    stream: bool = False
    chunking_strategy: Literal["auto"] | None = None
    timestamp_granularities: list[Literal["segment"]] = Field(default_factory=list)
    to: Literal["en", "zh"] = "en"

    def task(self, name: str) -> PromptTask:
        """The task, with the temperature that was asked for."""
        task = TASKS[name]
        if self.temperature is None:
            return task
        return replace(task, sampling=replace(task.sampling, temperature=self.temperature))


@router.post("/v1/audio/transcriptions")
async def transcriptions(request: Request) -> Response:
    """Write a recording down."""
    return await _respond(request, "transcribe")


@router.post("/v1/audio/translations")
async def translations(request: Request) -> Response:
    """Translate a recording into English text, or with `to=zh` into Chinese."""
    return await _respond(request, "translate")


async def _respond(request: Request, what: str) -> Response:
    state = state_of(request)
    state.admission.require_room()
    async with AsyncExitStack() as stack:
        form = await stack.enter_async_context(read_form(request))
        body = _read(form)
        state.require_model(body.model)
        task = body.task("asr" if what == "transcribe" else f"s2tt_{body.to}")
        upload = form_file(form, "file")
        source = partial(  # opened with a slot: to decode takes long
            open_recording,
            upload.file,
            upload.filename or "the recording",
            max_seconds=state.settings.max_transcribed_seconds,
            rate=SAMPLE_RATE,
        )
        try:
            if body.stream:
                work = _stream(state, source, task, stack)
                return await while_connected(request, work)
            return await while_connected(request, _whole(state, body, source, task, what))
        except ClientGone:
            return Response(status_code=499)


def _read(form: FormData) -> TranscriptionRequest:
    """The fields of the form.

    Raises:
        ApiError: 400 for what cannot honestly be filled, or not understood.
    """
    lists = ("timestamp_granularities", "include", *_UNFILLED)
    values = form_values(form, lists=lists)
    refused = {
        "timestamp_granularities": "word" in values.get("timestamp_granularities", ()),
        "response_format": values.get("response_format") == "diarized_json",
        "include": bool(values.get("include")),
        **{name: name in values for name in _UNFILLED},
    }
    hints = {
        "timestamp_granularities": "the model gives no times of words: expected segment",
        "response_format": "the model tells no speakers apart: expected another than diarized_json",
        "include": "log probabilities are not kept: leave it out",
    }
    for name, is_asked in refused.items():
        if is_asked:
            hint = hints.get(name, "the model tells no speakers apart: leave it out")
            raise ApiError(f"{name}: {hint}", param=name, code="unsupported_parameter")
    return validated(TranscriptionRequest, values)


# --- whole ------------------------------------------------------------------------------------


async def _whole(
    state: ServerState,
    body: TranscriptionRequest,
    open_source: Callable[[], AudioSource],
    task: PromptTask,
    what: str,
) -> Response:
    def run(check: Callable[[], None]) -> tuple[Reply, float]:
        source = open_source()
        with audio.open_mono(source, max_seconds=source.max_seconds) as (reader, _):
            seconds = reader.seconds
        (reply,) = state.model.run(task, [source], progress=lambda *_: check())
        ends = [segment.end for segment in reply.segments]
        return reply, max(ends, default=0.0) if seconds is None else seconds

    (reply, seconds), waited = await state.work(run)
    headers = {"x-queue-ms": f"{1000 * waited:.1f}"}
    form = body.response_format
    if form in ("text", "srt", "vtt"):
        texts = {"text": lambda _: reply.text + "\n", "srt": subtitles.srt, "vtt": subtitles.vtt}
        kind = "text/vtt" if form == "vtt" else "text/plain"
        return PlainTextResponse(texts[form](reply.segments), media_type=kind, headers=headers)
    value: dict[str, Any] = {"text": reply.text, "usage": {"type": "duration", "seconds": seconds}}
    if reply.notes:
        value["notes"] = list(reply.notes)
    if form == "verbose_json":
        language = body.language or "und"  # what is spoken is not told
        value |= {
            "task": what,
            "language": language if what == "transcribe" else _LANGUAGES[body.to],
            "duration": seconds,
            "segments": [_segment(state, n, s, task) for n, s in enumerate(reply.segments)],
        }
    return JSONResponse(value, headers=headers)


_LANGUAGES: Mapping[str, str] = {"en": "english", "zh": "chinese"}


def _segment(state: ServerState, number: int, segment: Segment, task: PromptTask) -> dict[str, Any]:
    """A segment in Whisper's form; what this model does not tell is null."""
    raw = segment.text.encode()
    return {
        "id": number,
        "seek": round(segment.start * _FRAMES),
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": state.model.tokenizer.encode(segment.text, split_special_tokens=True),
        "temperature": task.sampling.temperature,
        "avg_logprob": None,
        "compression_ratio": len(raw) / len(zlib.compress(raw)) if raw else None,
        "no_speech_prob": None,
    }


# --- streamed ---------------------------------------------------------------------------------


async def _stream(
    state: ServerState,
    open_source: Callable[[], AudioSource],
    task: PromptTask,
    stack: AsyncExitStack,
) -> Response:
    """A stream that has begun; it keeps the upload until it ends."""
    slot = await state.admission.acquire()
    watch = state.metrics.watch(slot.waited)
    answer = state.open(lambda: SegmentStream(state.model, open_source(), task), slot)
    keep = stack.pop_all()

    async def events() -> AsyncGenerator[bytes]:
        reason = "abort"
        try:
            async with keep:
                async for piece in answer:
                    watch.piece(piece.text)
                    yield event({"type": "transcript.text.delta", "delta": piece.text})
                reply = await answer.reply()
                seconds = max((segment.end for segment in reply.segments), default=0.0)
                usage = {"type": "duration", "seconds": seconds}
                done = {"type": "transcript.text.done", "text": reply.text, "usage": usage}
                yield event(done | ({"notes": list(reply.notes)} if reply.notes else {}))
                reason = "stop"
        except Exception:
            reason = "error"
            raise
        finally:
            answer.cancel_soon()
            watch.end(reason)

    headers = {"x-queue-ms": f"{1000 * slot.waited:.1f}"}
    parts = with_error_event(events(), typed_error)
    return await OpenResponse.begin(parts, headers=lambda: headers)
