"""A realtime session with a script in the model's place, and a client that notes what it gets."""

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from sa2jax.audio.turns import TurnDetector
from sa2jax.chat.tools import ToolCall
from sa2jax.errors import Sa2jaxError, VoiceError
from sa2jax.pipeline.reply import NO_SOUND, FinishReason, ReplyPiece
from sa2jax.serve.realtime.actions import CancelResponse, StartResponse, Transcribe
from sa2jax.serve.realtime.checks import EventError
from sa2jax.serve.realtime.client_events import parse_event
from sa2jax.serve.realtime.responder import Outcome, ResponseRequest, Usage
from sa2jax.serve.realtime.session import Session
from sa2jax.serve.realtime.session_config import SessionConfig

RATE = 24_000
MIB = 1 << 20


# Kinds of events that come together.
USER_ITEM = ["conversation.item.added", "conversation.item.done"]
CLOSED = [
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]


# --- what is said --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """An utterance of one word a second."""

    words: tuple[str, ...]
    calls: int = 0
    seconds: float | None = None

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def until(self, seconds: float) -> "Words":
        return Words(self.words[: int(seconds)], 0, seconds)

    def without_calls(self) -> "Words":
        return replace(self, calls=0)


@dataclass
class Reply:
    """What the script answers: words of a second each, then calls of tools.

    Attributes:
        pace: seconds between two pieces.
        error: raised in place of the piece after the last.
        holds: whether it goes on without end after its words, until it is cancelled.
    """

    words: Sequence[str] = ()
    calls: Sequence[ToolCall] = ()
    finish_reason: FinishReason = "stop"
    pace: float = 0.0
    error: Exception | None = None
    holds: bool = False


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 300 * time)).astype(np.float32)


def pcm(samples: np.ndarray) -> bytes:
    return np.round(samples * 32767).astype("<i2").tobytes()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


LOUD, SILENT = pcm(tone(1.0)), bytes(2 * RATE)  # a second each


def pieces_of(reply: Reply) -> list[ReplyPiece]:
    made = []
    for n, word in enumerate(reply.words):
        made.append(ReplyPiece(text=f" {word}" if n else word))
        made.append(ReplyPiece(audio=tone(1.0)))
    return made


def outcome_of(reply: Reply, spoken: bool = True) -> Outcome:
    said = Words(tuple(reply.words), len(reply.calls), float(len(reply.words)) if spoken else None)
    usage = Usage(input_text=5, input_audio=7, cached_text=2, output_text=3, output_audio=25)
    return Outcome(
        utterance=said, finish_reason=reply.finish_reason, calls=reply.calls, usage=usage
    )


class Loudness(TurnDetector):
    """A detector to which all that is loud is speech."""

    def __init__(self, settings=None):
        super().__init__(settings)
        self._left = NO_SOUND

    def push(self, samples, *, responding=False):
        self._left = np.concatenate([self._left, samples])
        frames, self._left = np.split(self._left, [len(self._left) // 512 * 512])
        loud = np.abs(frames.reshape(-1, 512)).mean(axis=1) > 0.05
        return self.push_probabilities(loud.astype(float), responding=responding)


def check_voice(name: str) -> str:
    if name not in ("default", "anna"):
        raise VoiceError(f"no voice {name!r}: expected one of default, anna")
    return name


# --- a session without sockets -------------------------------------------------------------------


@cache
def openai_types():
    """What validates events as OpenAI's own package describes them, None if it is not there."""
    try:
        from openai.types.realtime import RealtimeServerEvent
        from pydantic import TypeAdapter
    except ImportError:
        return None
    return TypeAdapter(RealtimeServerEvent)


def as_openai_reads(event: dict[str, Any]) -> dict[str, Any]:
    """The event, if OpenAI's own types accept it."""
    if (adapter := openai_types()) is not None:
        adapter.validate_python(event)
    return event


class Talk:
    """A session and its client in one: what is sent is handled at once.

    Attributes:
        now: its clock.
        requests: responses that were asked for.
        cancelled: responses that were to be ended, and how much of them was sent.
        transcribe: turns that were to be transcribed.
    """

    def __init__(self, config: SessionConfig | None = None, **options: Any):
        self.now = 100.0
        self.session = Session(
            config or SessionConfig(instructions="Be brief.", turn_detection=None),
            model="small",
            check_voice=check_voice,
            make_detector=Loudness,
            clock=lambda: self.now,
            **options,
        )
        self.session.open()
        self.requests: list[ResponseRequest] = []
        self.cancelled: list[CancelResponse] = []
        self.transcribe: list[Transcribe] = []
        self.first = self.events()

    def events(self) -> list[dict[str, Any]]:
        """What the client gets since the last call."""
        for action in self.session.take_actions():
            match action:
                case StartResponse():
                    self.requests.append(action.request)
                case CancelResponse():
                    self.cancelled.append(action)
                case Transcribe():
                    self.transcribe.append(action)
        found = []
        while (event := self.session.outbox.take()) is not None:
            found.append(as_openai_reads(event))
        return found

    def post(self, type: str, **fields: Any) -> None:
        """Send an event and leave what comes of it where it is."""
        text = json.dumps({"type": type, **fields})
        try:
            self.session.receive(parse_event(text, max_bytes=24 * MIB))
        except EventError as error:
            self.session.refuse(error)

    def send(self, type: str, **fields: Any) -> list[dict[str, Any]]:
        self.post(type, **fields)
        return self.events()

    def speak(self, data: bytes = LOUD) -> list[dict[str, Any]]:
        return self.send("input_audio_buffer.append", audio=base64_of(data))

    def ask(self, text: str = "Hi", **fields: Any) -> list[dict[str, Any]]:
        item = {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": text}],
        }
        return self.send("conversation.item.create", item=item, **fields)

    def answer(self, reply: Reply) -> list[dict[str, Any]]:
        """The newest response that was asked for runs to its end."""
        request = self.requests[-1]
        for piece in pieces_of(reply):
            self.session.piece(request.id, piece)
        spoken = request.config.modality == "audio"
        self.session.ended(request.id, outcome_of(reply, spoken))
        return self.events()

    def give(self, *pieces: ReplyPiece) -> list[dict[str, Any]]:
        for piece in pieces:
            self.session.piece(self.requests[-1].id, piece)
        return self.events()

    def end_cancelled(self, words: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The response that was cancelled last has ended, of which so many words were sent."""
        reply = Reply(words, finish_reason="cancelled")
        self.session.ended(self.cancelled[-1].response_id, outcome_of(reply))
        return self.events()


def said_by(talk: Talk) -> Talk:
    """A talk in which two words were said in answer to a text."""
    talk.ask()
    talk.send("response.create")
    talk.answer(Reply(["one", "two"]))
    return talk


def types(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def only(events: Sequence[dict[str, Any]], type: str) -> dict[str, Any]:
    """The one event of a type."""
    (found,) = (event for event in events if event["type"] == type)
    return found


# --- behind a server -----------------------------------------------------------------------------


@dataclass
class ScriptedResponder:
    """Answers what it is told; one for all sessions of a server.

    Attributes:
        replies: the next answers; when there are none it says "yes".
        heard: words of the next recordings that are transcribed.
        requests: what it was asked.
        cancelled: seconds that were sent of answers that were ended early.
        running: answers that have begun and not ended.
    """

    replies: list[Reply] = field(default_factory=list)
    heard: list[str | Sa2jaxError] = field(default_factory=list)
    requests: list[ResponseRequest] = field(default_factory=list)
    cancelled: list[float] = field(default_factory=list)
    running: int = 0

    def check_voice(self, name: str) -> str:
        return check_voice(name)

    def start(self, request: ResponseRequest) -> "ScriptedResponse":
        self.requests.append(request)
        reply = self.replies.pop(0) if self.replies else Reply(["yes"])
        return ScriptedResponse(self, reply, spoken=request.config.modality == "audio")

    async def transcribe(self, recording, transcription) -> str:
        heard = self.heard.pop(0) if self.heard else "hello"
        if isinstance(heard, Exception):
            raise heard
        return heard


class ScriptedResponse:
    """An answer of the script, under way."""

    def __init__(self, script: ScriptedResponder, reply: Reply, *, spoken: bool):
        self._script, self._reply, self._spoken = script, reply, spoken
        self._left = pieces_of(reply)
        self._over = False
        script.running += 1

    def __aiter__(self):
        return self

    async def __anext__(self) -> ReplyPiece:
        await asyncio.sleep(self._reply.pace)
        if self._left:
            piece = self._left.pop(0)
            return piece if self._spoken or piece.text else ReplyPiece()
        if self._reply.holds:
            await asyncio.Event().wait()
        if self._reply.error is not None:
            self._end()
            raise self._reply.error
        raise StopAsyncIteration

    async def outcome(self) -> Outcome:
        self._end()
        return outcome_of(self._reply, self._spoken)

    async def cancel(self, sent: float) -> Outcome:
        self._script.cancelled.append(sent)
        self._end()
        words = self._reply.words[: int(sent)]
        return outcome_of(Reply(words, finish_reason="cancelled"), self._spoken)

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._script.running -= 1


def until(connection, kind: str) -> list:
    """Events of OpenAI's client up to the next of a type; an error is a failure."""
    found = [connection.recv()]
    while found[-1].type != kind:
        assert found[-1].type != "error", found[-1]
        found.append(connection.recv())
    return found
