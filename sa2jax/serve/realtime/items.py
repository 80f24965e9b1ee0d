"""Conversation items: what the client and the model have said, in order."""

import base64
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sa2jax.audio.io import resample
from sa2jax.audio.rates import SAMPLE_RATE, SPEECH_SAMPLE_RATE
from sa2jax.audio.recording import Recording
from sa2jax.serve.realtime.audio_formats import AudioFormat
from sa2jax.serve.realtime.checks import EventError, Fields
from sa2jax.serve.realtime.responder import (
    CallOutputTurn,
    CallTurn,
    SaidTurn,
    SystemTurn,
    Turn,
    UserTurn,
    Utterance,
    WrittenTurn,
)

MAX_TEXT = 200_000  # characters of an item's text
MAX_PARTS = 64  # of an item
MAX_AUDIO = 20 << 20  # characters of base64 in an item
MAX_ID = 64

Role = Literal["user", "assistant", "system"]


def new_id(kind: str) -> str:
    """An identifier, such as `item_…`."""
    return f"{kind}_{secrets.token_hex(12)}"


@dataclass
class Part:
    """A part of a message.

    Attributes:
        type: `input_text`, `input_audio`, `output_text` or `output_audio`.
        text: of the two texts.
        transcript: of the two sounds; None if it is not known.
        recording: of the user's sound.
        speech: of the model's, 24 kHz, as 16 bit.
    """

    type: str
    text: str = ""
    transcript: str | None = None
    recording: Recording | None = None
    speech: bytearray = field(default_factory=bytearray)

    def json(self) -> dict[str, Any]:
        """It as an event has it, without its sound."""
        if self.type in ("input_text", "output_text"):
            return {"type": self.type, "text": self.text}
        return {"type": self.type, "transcript": self.transcript}

    def sound(self, form: AudioFormat) -> bytes:
        """Its sound in a format."""
        if self.recording is not None:
            return form.encode(resample(self.recording.samples, SAMPLE_RATE, form.rate))
        if not self.speech:
            return b""
        speech = np.frombuffer(bytes(self.speech), "<i2").astype(np.float32) / 32768
        return form.encode(resample(speech, SPEECH_SAMPLE_RATE, form.rate))


@dataclass(eq=False)
class Item:
    """An item of a conversation.

    Attributes:
        id: its name, the client's or ours.
        type: `message`, `function_call` or `function_call_output`.
        status: `in_progress`, `completed` or `incomplete`.
        role: of a message.
        parts: of a message.
        name: of a call, the tool's.
        call_id: of a call and its output.
        arguments: of a call, JSON.
        output: of an output.
        response_id: of the response that made it, None for the client's.
        sent: seconds of a spoken answer that have gone to the client.
        heard: those of them that were heard, None for all.
    """

    id: str
    type: Literal["message", "function_call", "function_call_output"]
    status: str = "completed"
    role: Role | None = None
    parts: list[Part] = field(default_factory=list)
    name: str = ""
    call_id: str = ""
    arguments: str = ""
    output: str = ""
    response_id: str | None = None
    sent: float = 0.0
    heard: float | None = None

    def json(self) -> dict[str, Any]:
        """It as an event has it, without its sound."""
        head = {"id": self.id, "object": "realtime.item", "type": self.type, "status": self.status}
        if self.type == "message":
            return {**head, "role": self.role, "content": [part.json() for part in self.parts]}
        if self.type == "function_call":
            own = {"name": self.name, "call_id": self.call_id, "arguments": self.arguments}
            return {**head, **own}
        return {**head, "call_id": self.call_id, "output": self.output}

    def json_with_audio(self, form: AudioFormat) -> dict[str, Any]:
        """It as `conversation.item.retrieved` has it: of a spoken answer what was heard."""
        made = self.json()
        for part, shown in zip(self.parts, made.get("content", ()), strict=False):
            if not part.type.endswith("audio"):
                continue
            sound = part.sound(form)
            if self.heard is not None:
                sound = sound[: round(self.heard * form.rate) * form.width]
            shown["audio"] = base64.b64encode(sound).decode()
        return made


def read_item(value: Any, form: AudioFormat, path: str = "item") -> Item:
    """An item that a client makes.

    Args:
        value: its object.
        form: format of sound in it.
        path: what to call it in errors.

    Raises:
        EventError: if it is none.
    """
    fields = Fields(value, path)
    kind = fields.choice("type", ("message", "function_call", "function_call_output"))
    item_id = fields.text("id", None, most=MAX_ID) or new_id("item")
    item = Item(item_id, kind)
    fields.choice("object", ("realtime.item",), None)
    fields.choice("status", ("in_progress", "completed", "incomplete"), None)
    if kind == "message":
        item.role = fields.choice("role", ("user", "assistant", "system"))
        content = fields.objects("content", most=MAX_PARTS)
        item.parts = [_read_part(part, item.role, form) for part in content]
        if not item.parts:
            raise EventError(f"{path}.content: expected at least one part", param=f"{path}.content")
    elif kind == "function_call":
        item.name = fields.text("name", most=200)
        item.arguments = fields.text("arguments", "{}", most=MAX_TEXT)
        item.call_id = fields.text("call_id", None, most=MAX_ID) or new_id("call")
    else:
        item.call_id = fields.text("call_id", most=MAX_ID)
        item.output = fields.text("output", most=MAX_TEXT)
    # A client that hands a whole item back, such as pipecat's, names the other kinds' fields too.
    fields.refuse_others(
        allowed=("role", "content", "name", "call_id", "arguments", "output", "phase")
    )
    return item


def _read_part(fields: Fields, role: Role, form: AudioFormat) -> Part:
    kind = fields.text("type")
    if kind == "text":  # as histories of the beta have it
        kind = "output_text" if role == "assistant" else "input_text"
    allowed = {
        "user": ("input_text", "input_audio"),
        "assistant": ("output_text", "output_audio"),
        "system": ("input_text",),
    }[role]
    if kind not in allowed:
        raise EventError(
            f"{fields.name('type')}: expected {' or '.join(allowed)} in a {role} message, got "
            f"{kind!r:.80}",
            param=fields.name("type"),
        )
    if kind.endswith("text"):
        part = Part(kind, fields.text("text", most=MAX_TEXT))
        fields.refuse_others(allowed=("transcript", "audio", "image_url", "detail"))
        return part
    part = Part(kind, transcript=fields.text("transcript", None, most=MAX_TEXT))
    if kind == "input_audio":
        samples = form.decode(fields.base64("audio", most=MAX_AUDIO))
        if not len(samples):
            raise EventError(f"{fields.name('audio')}: no sound", param=fields.name("audio"))
        part.recording = Recording(resample(samples, form.rate, SAMPLE_RATE))
    elif part.transcript is None:
        raise EventError(
            f"{fields.name('transcript')}: an answer's sound cannot be given, only its words",
            "missing_required_parameter",
            param=fields.name("transcript"),
        )
    fields.refuse_others(allowed=("audio", "text", "image_url", "detail"))
    return part


class Conversation:
    """Items in order, and what the model said exactly.

    Args:
        max_items: how many it may hold.
        max_heard: seconds of the user's sound that are kept: beyond, the oldest turns are
            forgotten. The model's context should hold no more.
        max_speech: seconds of the model's sound that are kept, so that items can be retrieved with
            it: beyond, the oldest is forgotten; what the model reads is not affected.
    """

    def __init__(
        self,
        *,
        max_items: int = 10_000,
        max_heard: float = 1800.0,
        max_speech: float = 600.0,
    ):
        self.id = new_id("conv")
        self._items: dict[str, Item] = {}
        self._utterances: dict[str, tuple[Utterance, frozenset[str]]] = {}  # by response
        self._max_items, self._max_heard, self._max_speech = max_items, max_heard, max_speech

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items.values())

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._items

    def __len__(self) -> int:
        return len(self._items)

    @property
    def last_id(self) -> str | None:
        """Of the newest item."""
        return next(reversed(self._items), None)

    def get(self, item_id: str, code: str) -> Item:
        """An item by its name.

        Raises:
            EventError: with this code, if there is none.
        """
        if item_id not in self._items:
            raise EventError(f"there is no item {item_id!r:.100}", code, param="item_id")
        return self._items[item_id]

    def add(self, item: Item, after: str | None = None) -> str | None:
        """Insert an item.

        Args:
            item: the item.
            after: the item before it; `root` for none, None for the newest.

        Returns:
            The item before it.

        Raises:
            EventError: if there is no such item, already one of this name, or no room.
        """
        if item.id in self._items:
            raise EventError(
                f"there is already an item {item.id!r:.100}",
                "item_create_duplicate_item_id",
                param="item.id",
            )
        if len(self._items) >= self._max_items:
            raise EventError(
                f"the conversation has {self._max_items} items already: delete some",
                "conversation_full",
            )
        if after is None:
            before = self.last_id
            self._items[item.id] = item
            self._forget_sound()
            return before
        if after != "root" and after not in self._items:
            raise EventError(
                f"there is no item {after!r:.100} to insert after",
                "item_not_found",
                param="previous_item_id",
            )
        order = list(self._items.values())
        place = 0 if after == "root" else list(self._items).index(after) + 1
        order.insert(place, item)
        self._items = {each.id: each for each in order}
        self._forget_sound()
        return None if after == "root" else after

    def remove(self, item_id: str) -> None:
        """Delete an item.

        Raises:
            EventError: if there is none.
        """
        item = self.get(item_id, "item_delete_invalid_item_id")
        del self._items[item_id]
        if all(each.response_id != item.response_id for each in self):
            self._utterances.pop(item.response_id or "", None)

    def before(self, item_id: str) -> str | None:
        """The item before one, None if it is the first or not there."""
        previous = None
        for each in self._items:
            if each == item_id:
                return previous
            previous = each
        return None

    def refer(self, item: Item, other: "Conversation") -> None:
        """Take an item of another conversation, with what the model said exactly in it.

        Raises:
            EventError: if it is here already.
        """
        self.add(item)
        if (known := other._utterances.get(item.response_id or "")) is not None:
            self._utterances[item.response_id or ""] = known

    def keep_utterance(self, response_id: str, said: Utterance, items: Sequence[Item]) -> None:
        """Note what the model said exactly in the items of a response."""
        self._utterances[response_id] = said, frozenset(item.id for item in items)
        self._forget_sound()

    def _forget_sound(self) -> None:
        """Keep the newest sound only."""
        heard = spoken = 0.0
        for item in reversed(self._items.values()):
            for part in item.parts:
                heard += 0.0 if part.recording is None else part.recording.seconds
                spoken += len(part.speech) / 2 / SPEECH_SAMPLE_RATE
                if heard > self._max_heard:
                    part.recording = None
                if spoken > self._max_speech:
                    part.speech = bytearray()

    def utterance(self, item: Item) -> Utterance | None:
        """What the model said exactly in the response of an item."""
        found = self._utterances.get(item.response_id or "")
        return found[0] if found else None

    def calls(self) -> dict[str, str]:
        """Names of the tools by the `call_id` of their calls."""
        return {item.call_id: item.name for item in self if item.type == "function_call"}

    def turns(self) -> list[Turn]:
        """The conversation as the model is to read it."""
        return list(self._turns())

    def _turns(self) -> Iterator[Turn]:
        names, told = self.calls(), set()
        for item in self:
            known = self._utterances.get(item.response_id or "")
            if known is not None:
                if item.response_id not in told:
                    told.add(item.response_id)
                    yield from self._said(item.response_id or "", known)
            elif item.response_id is not None:
                continue  # it failed, or is still under way: nobody knows what was said
            elif item.type == "function_call":
                yield CallTurn(item.name, item.arguments)
            elif item.type == "function_call_output":
                yield CallOutputTurn(names.get(item.call_id, ""), item.output)
            elif item.role == "user":
                parts = tuple(p.recording or p.text for p in item.parts if p.recording or p.text)
                if parts:
                    yield UserTurn(parts)
            else:
                text = "\n".join(p.transcript or p.text for p in item.parts)
                if text.strip():
                    made = SystemTurn if item.role == "system" else WrittenTurn
                    yield made(text)

    def _said(self, response_id: str, known: tuple[Utterance, frozenset[str]]) -> Iterator[Turn]:
        """A response's turns, of those of its items that are still there."""
        said, ids = known
        left = [item for item in self if item.response_id == response_id]
        message = next((item for item in left if item.type == "message"), None)
        calls = [CallTurn(i.name, i.arguments) for i in left if i.type == "function_call"]
        if len(left) == len(ids) and (message is None or message.heard is None):
            yield SaidTurn(said)
            return
        if message is not None:
            whole = message.heard is None
            yield SaidTurn(said.without_calls() if whole else said.until(message.heard or 0))
        yield from calls
