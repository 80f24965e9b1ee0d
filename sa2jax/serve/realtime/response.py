"""A response under way: pieces of an answer to events, in the order that clients rely on."""

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from sa2jax.audio.io import pcm_16
from sa2jax.audio.rates import SPEECH_SAMPLE_RATE
from sa2jax.chat.tools import ToolCall
from sa2jax.pipeline.reply import ReplyPiece
from sa2jax.serve.realtime.audio_formats import from_speech_rate
from sa2jax.serve.realtime.checks import EventError
from sa2jax.serve.realtime.items import Conversation, Item, Part, new_id
from sa2jax.serve.realtime.outbox import Outbox
from sa2jax.serve.realtime.responder import CancelReason, Outcome, Usage
from sa2jax.serve.realtime.server_events import event, item_event, usage_json
from sa2jax.serve.realtime.session_config import SessionConfig

_DELTA = SPEECH_SAMPLE_RATE // 2  # samples of a delta: so much is taken back or sent as one


class Response:
    """A response: its items, and the events that tell of them.

    Args:
        config: its settings.
        conversation: what its items become part of; None for none.
        outbox: where its events go.
        clock: the time, in seconds.
        metadata: of the client, handed back.

    Attributes:
        id: its name.
        items: what it has made so far.
        sent: seconds of its sound that have gone to the outbox and were not withdrawn.
        cancelled: why it is being cancelled, None if it is not.
        done: whether `response.done` was sent.
    """

    def __init__(
        self,
        config: SessionConfig,
        conversation: Conversation | None,
        outbox: Outbox,
        clock: Callable[[], float],
        metadata: Mapping[str, str] | None = None,
    ):
        self.id, self.config, self.conversation = new_id("resp"), config, conversation
        self.items: list[Item] = []
        self.sent, self.cancelled, self.done = 0.0, None, False
        self.cancelled: CancelReason | None
        self._outbox, self._clock, self._metadata = outbox, clock, metadata
        self._resampler = from_speech_rate(config.output_format)
        self._message: Item | None = None
        self._first_sent: float | None = None
        self._outside = Conversation()  # of an answer outside the conversation: its items' order

    # --- what happens -------------------------------------------------------------------------

    def begin(self) -> None:
        """Tell that it has begun."""
        self._emit("response.created", response=self._json("in_progress"))

    def piece(self, piece: ReplyPiece) -> None:
        """Tell of the next piece of the answer."""
        if self.cancelled or self.done:
            return
        if piece.text or len(piece.audio):
            self._open_message()
        if piece.text:
            self._text(piece.text)
        for start in range(0, len(piece.audio), _DELTA):
            self._audio(piece.audio[start : start + _DELTA])

    def cancel(self, reason: CancelReason) -> None:
        """Mark it as cancelled: no piece is told of any more, what was not sent is taken back."""
        self.cancelled = reason
        self._withdraw()

    def finish(self, outcome: Outcome) -> None:
        """Tell that it is over."""
        if self.done:
            return
        status, details = self._status(outcome)
        said = outcome.utterance
        self._close_message(outcome, complete=status == "completed")
        if not self.cancelled:
            for call in outcome.calls:
                self._call(call)
        if said is not None and self.items and self.conversation is not None:
            self.conversation.keep_utterance(self.id, said, self.items)
        self._end(status, details, outcome.usage)

    def fail(self, error: EventError) -> None:
        """Tell that it has failed."""
        if self.done:
            return
        self._close_message(Outcome(utterance=None, finish_reason="error"), complete=False)
        details = {
            "type": "failed",
            "error": {"type": error.type, "code": error.code, "message": str(error)},
        }
        self._end("failed", details, Usage())

    # --- what was heard -----------------------------------------------------------------------

    @property
    def message(self) -> Item | None:
        """Its spoken or written answer, if it has begun."""
        return self._message

    @property
    def lead(self) -> float:
        """Seconds of sound that were sent and cannot have been played yet."""
        if self._first_sent is None:
            return 0.0
        return self.sent - (self._clock() - self._first_sent)

    @property
    def played(self) -> float:
        """Seconds of its sound that can have been played by now, at most."""
        return max(min(self.sent, self.sent - self.lead), 0.0)

    # --- events -------------------------------------------------------------------------------

    def _emit(self, type: str, **fields: Any) -> None:
        self._outbox.put(event(type, **fields))

    def _place(self, **more: Any) -> dict[str, Any]:
        """Where in the response an event of the message belongs."""
        assert self._message is not None
        index = self.items.index(self._message)
        return {
            "response_id": self.id,
            "item_id": self._message.id,
            "output_index": index,
            "content_index": 0,
            **more,
        }

    def _open_message(self) -> None:
        if self._message is not None:
            return
        spoken = self.config.modality == "audio"
        part = Part("output_audio", transcript="") if spoken else Part("output_text")
        message = Item(new_id("item"), "message", "in_progress", "assistant")
        self._add(message)
        self._message = message
        message.parts.append(part)
        self._emit("response.content_part.added", **self._place(part=self._part_json()))

    def _add(self, item: Item) -> None:
        item.response_id = self.id
        previous = self._home.add(item)  # which may be refused
        self.items.append(item)
        self._emit(
            "response.output_item.added",
            response_id=self.id,
            output_index=len(self.items) - 1,
            item=item.json(),
        )
        if self.conversation is not None:
            self._outbox.put(item_event("conversation.item.added", item, previous))

    @property
    def _home(self) -> Conversation:
        return self._outside if self.conversation is None else self.conversation

    def _text(self, text: str) -> None:
        assert self._message is not None
        part = self._message.parts[0]
        if part.type == "output_audio":
            part.transcript, kind = (part.transcript or "") + text, "output_audio_transcript"
        else:
            part.text, kind = part.text + text, "output_text"
        delta = event(f"response.{kind}.delta", **self._place(delta=text))
        self._outbox.put(delta, response_id=self.id)

    def _audio(self, samples: Float32[np.ndarray, " N"]) -> None:
        assert self._message is not None
        self._message.parts[0].speech += pcm_16(samples).astype("<i2").tobytes()
        if self._first_sent is None:
            self._first_sent = self._clock()
        seconds = len(samples) / SPEECH_SAMPLE_RATE
        self.sent += seconds
        self._message.sent = self.sent
        self._send_audio(self._resampler.push(samples), seconds)

    def _send_audio(self, samples: Float32[np.ndarray, " N"], seconds: float) -> None:
        if len(samples):
            sound = base64.b64encode(self.config.output_format.encode(samples)).decode()
            delta = event("response.output_audio.delta", **self._place(delta=sound))
            self._outbox.put(delta, response_id=self.id, seconds=seconds)

    def _withdraw(self) -> None:
        self.sent -= self._outbox.withdraw(self.id)
        if self._message is not None:
            part = self._message.parts[0]
            self._message.sent = self.sent
            part.speech = part.speech[: 2 * round(self.sent * SPEECH_SAMPLE_RATE)]

    def _close_message(self, outcome: Outcome, *, complete: bool) -> None:
        item = self._message
        if item is None or item.status != "in_progress":
            return
        part = item.parts[0]
        item.status = "completed" if complete else "incomplete"
        spoken = part.type == "output_audio"
        if self.cancelled:
            said = outcome.utterance
            if said is not None and item.heard is not None:
                said = said.until(item.heard)
            text = said.text if said is not None else ""
            part.transcript, part.text = (text, "") if spoken else (None, text)
        elif spoken and complete:
            self._send_audio(self._resampler.flush(), 0.0)
        if spoken:
            self._emit("response.output_audio.done", **self._place())
            transcript = part.transcript or ""
            self._emit(
                "response.output_audio_transcript.done", **self._place(transcript=transcript)
            )
        else:
            self._emit("response.output_text.done", **self._place(text=part.text))
        self._emit("response.content_part.done", **self._place(part=self._part_json()))
        self._item_done(item)

    def _part_json(self) -> dict[str, Any]:
        """The message's part in these events, where its type has another name than in items."""
        assert self._message is not None
        part = self._message.parts[0]
        if part.type == "output_audio":
            return {"type": "audio", "transcript": part.transcript or ""}
        return {"type": "text", "text": part.text}

    def _call(self, call: ToolCall) -> None:
        item = Item(
            new_id("item"),
            "function_call",
            "in_progress",
            name=call.name,
            call_id=new_id("call"),
        )
        self._add(item)
        item.arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        place = {
            "response_id": self.id,
            "item_id": item.id,
            "output_index": len(self.items) - 1,
            "call_id": item.call_id,
        }
        self._emit("response.function_call_arguments.delta", **place, delta=item.arguments)
        self._emit(
            "response.function_call_arguments.done",
            **place,
            name=item.name,
            arguments=item.arguments,
        )
        item.status = "completed"
        self._item_done(item)

    def _item_done(self, item: Item) -> None:
        self._emit(
            "response.output_item.done",
            response_id=self.id,
            output_index=self.items.index(item),
            item=item.json(),
        )
        if self.conversation is not None and item.id in self.conversation:
            previous = self.conversation.before(item.id)
            self._outbox.put(item_event("conversation.item.done", item, previous))

    def _status(self, outcome: Outcome) -> tuple[str, dict[str, Any]]:
        if self.cancelled:
            return "cancelled", {"type": "cancelled", "reason": self.cancelled}
        if outcome.finish_reason == "length":
            return "incomplete", {"type": "incomplete", "reason": "max_output_tokens"}
        if outcome.finish_reason in ("repetition", "error"):
            return "incomplete", {"type": "incomplete"}
        return "completed", {"type": "completed"}

    def _end(self, status: str, details: dict[str, Any], usage: Usage) -> None:
        self.done = True
        made = self._json(status)
        made |= {"status_details": details, "usage": usage_json(usage)}
        self._emit("response.done", response=made)

    def _json(self, status: str) -> dict[str, Any]:
        config, conversation = self.config, self.conversation
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": None,
            "output": [item.json() for item in self.items],
            "conversation_id": None if conversation is None else conversation.id,
            "output_modalities": [config.modality],
            "max_output_tokens": config.max_output_tokens or "inf",
            "audio": {"output": {"format": config.output_format.json, "voice": config.voice}},
            "usage": None,
            "metadata": None if self._metadata is None else dict(self._metadata),
        }
