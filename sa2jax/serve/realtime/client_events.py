"""Events of a client: one class each, read strictly from JSON."""

from dataclasses import dataclass
from typing import Any

from sa2jax.errors import FileError
from sa2jax.files.json_files import parse_json
from sa2jax.files.limits import Limits
from sa2jax.serve.realtime.checks import EventError, Fields, kind_of

MAX_APPEND = 15 << 20  # characters of base64
MAX_EVENT_ID = 512
_DAY_MS = 86_400_000


@dataclass(frozen=True, kw_only=True)
class ClientEvent:
    """An event of a client.

    Attributes:
        event_id: what the client calls it: an error names it.
    """

    event_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class SessionUpdate(ClientEvent):
    """`session.update`: other settings; see `SessionConfig.updated`."""

    session: Any


@dataclass(frozen=True, kw_only=True)
class AppendAudio(ClientEvent):
    """`input_audio_buffer.append`: more of the user's sound, in the session's input format."""

    audio: bytes


@dataclass(frozen=True, kw_only=True)
class CommitAudio(ClientEvent):
    """`input_audio_buffer.commit`: the user's turn is over."""


@dataclass(frozen=True, kw_only=True)
class ClearAudio(ClientEvent):
    """`input_audio_buffer.clear`: forget the sound so far."""


@dataclass(frozen=True, kw_only=True)
class ClearOutput(ClientEvent):
    """`output_audio_buffer.clear`: of WebRTC; a WebSocket's client has its own buffer."""


@dataclass(frozen=True, kw_only=True)
class CreateItem(ClientEvent):
    """`conversation.item.create`: an item after another one, at the end by default."""

    item: Any
    previous_item_id: str | None


@dataclass(frozen=True, kw_only=True)
class TruncateItem(ClientEvent):
    """`conversation.item.truncate`: so much of a spoken answer was heard."""

    item_id: str
    content_index: int
    audio_end_ms: int


@dataclass(frozen=True, kw_only=True)
class DeleteItem(ClientEvent):
    """`conversation.item.delete`."""

    item_id: str


@dataclass(frozen=True, kw_only=True)
class RetrieveItem(ClientEvent):
    """`conversation.item.retrieve`: an item with its sound."""

    item_id: str


@dataclass(frozen=True, kw_only=True)
class CreateResponse(ClientEvent):
    """`response.create`: answer now, with these settings."""

    response: Any


@dataclass(frozen=True, kw_only=True)
class CancelResponse(ClientEvent):
    """`response.cancel`: end a response, by default that of the conversation."""

    response_id: str | None


def parse_event(text: str | bytes, *, max_bytes: int) -> ClientEvent:
    """The event in a message.

    Args:
        text: JSON.
        max_bytes: size that it may have.

    Raises:
        EventError: if it is none, with the `event_id` of the client as far as that can be read.
    """
    limits = Limits(bytes=max_bytes, nodes=200_000, depth=32)
    if len(text) > max_bytes:
        raise EventError(
            f"expected a message of at most {max_bytes} bytes, got {len(text)}; send sound in "
            "smaller pieces",
            "message_too_large",
        )
    try:
        value = parse_json(text, where="the event", limits=limits)
    except FileError as error:
        raise EventError(str(error), "invalid_json") from None
    fields = Fields(value)
    event_id = None
    try:
        event_id = fields.text("event_id", None, most=MAX_EVENT_ID)
        return _parse(fields, event_id)
    except EventError as error:
        error.event_id = event_id
        raise


def _parse(fields: Fields, event_id: str | None) -> ClientEvent:
    kind = fields.text("type", most=200)
    event: ClientEvent
    match kind:
        case "session.update":
            event = SessionUpdate(event_id=event_id, session=fields.take("session"))
        case "input_audio_buffer.append":
            event = AppendAudio(event_id=event_id, audio=fields.base64("audio", most=MAX_APPEND))
        case "input_audio_buffer.commit":
            event = CommitAudio(event_id=event_id)
        case "input_audio_buffer.clear":
            event = ClearAudio(event_id=event_id)
        case "output_audio_buffer.clear":
            event = ClearOutput(event_id=event_id)
        case "conversation.item.create":
            event = CreateItem(
                event_id=event_id,
                item=fields.take("item"),
                previous_item_id=fields.text("previous_item_id", None, most=MAX_EVENT_ID),
            )
        case "conversation.item.truncate":
            event = TruncateItem(
                event_id=event_id,
                item_id=fields.text("item_id"),
                content_index=fields.number(
                    "content_index", 0, least=0, most=1_000_000, whole=True
                ),
                audio_end_ms=fields.number("audio_end_ms", least=0, most=_DAY_MS, whole=True),
            )
        case "conversation.item.delete":
            event = DeleteItem(event_id=event_id, item_id=fields.text("item_id"))
        case "conversation.item.retrieve":
            event = RetrieveItem(event_id=event_id, item_id=fields.text("item_id"))
        case "response.create":
            given = fields.take("response", None)
            if given is not None and not isinstance(given, dict):
                raise EventError(
                    f"response: expected an object, got {kind_of(given)}",
                    "invalid_type",
                    param="response",
                )
            event = CreateResponse(event_id=event_id, response=given or {})
        case "response.cancel":
            event = CancelResponse(event_id=event_id, response_id=fields.text("response_id", None))
        case _:
            raise EventError(f"unknown event {kind!r:.200}", "unknown_event", param="type")
    fields.refuse_others()
    return event
