"""A realtime session as a state machine, without sockets, threads and a model.

Events of a client and pieces of answers go in; events of the server and actions come out.

    session.open()
    session.receive(event)          # of the client; also `piece`, `ended`, `failed`, `transcribed`
    session.outbox.take()           # an event for the client
    session.take_actions()          # what is to be done: start, cancel, transcribe
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from sa2jax.audio.recording import Recording
from sa2jax.audio.turns import IdleTimeout, SpeechStarted, SpeechStopped, TurnDetector
from sa2jax.errors import Sa2jaxError
from sa2jax.pipeline.reply import ReplyPiece
from sa2jax.serve.realtime import client_events as client
from sa2jax.serve.realtime.actions import Action, Transcribe
from sa2jax.serve.realtime.checks import EventError, Fields
from sa2jax.serve.realtime.client_events import ClientEvent
from sa2jax.serve.realtime.input_buffer import MIN_COMMIT_MS, InputBuffer
from sa2jax.serve.realtime.items import Conversation, Item, Part, new_id, read_item
from sa2jax.serve.realtime.outbox import Outbox
from sa2jax.serve.realtime.responder import Outcome
from sa2jax.serve.realtime.responses import Responses, Wish
from sa2jax.serve.realtime.server_events import error_event, event, item_event
from sa2jax.serve.realtime.session_config import CheckVoice, SessionConfig

MAX_INPUT = 256  # items that a response sees instead of the conversation


class Session:
    """A session.

    Args:
        config: its settings at the beginning.
        model: what the server calls its model.
        check_voice: see `SessionConfig.updated`.
        max_seconds: longest turn of the user.
        max_heard: seconds of the user's sound that the conversation keeps.
        make_detector: makes the detector of turns.
        clock: the time, in seconds.

    Attributes:
        id: its name.
        outbox: events for the client.
        conversation: what was said.
    """

    def __init__(
        self,
        config: SessionConfig,
        *,
        model: str,
        check_voice: CheckVoice,
        max_seconds: float = 600.0,
        max_heard: float = 1800.0,
        make_detector: Callable[[], TurnDetector] = TurnDetector,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.id, self.config, self.model = new_id("sess"), config, model
        self.outbox, self.conversation = Outbox(), Conversation(max_heard=max_heard)
        self._check_voice = check_voice
        self._input = InputBuffer(max_seconds=max_seconds, make_detector=make_detector)
        self._input.configure(config.input_format, config.turn_detection)
        self._turn_id: str | None = None  # item that the turn under way will be
        self._actions: list[Action] = []
        self._responses = Responses(self.conversation, self.outbox, self._act, clock)

    def open(self) -> None:
        """Tell the client that it has begun."""
        self._emit("session.created", session=self._json())

    def _act(self, action: Action) -> None:
        self._actions.append(action)

    def take_actions(self) -> list[Action]:
        """What is to be done since the last call."""
        actions, self._actions = self._actions, []
        return actions

    # --- events of the client -----------------------------------------------------------------

    def receive(self, received: ClientEvent) -> None:
        """Handle an event of the client; one that is refused is answered with an error."""
        try:
            self._handle(received)
        except EventError as error:
            error.event_id = received.event_id
            self.refuse(error)
        except Sa2jaxError as error:
            refused = EventError(str(error))
            refused.event_id = received.event_id
            self.refuse(refused)

    def refuse(self, error: EventError) -> None:
        """Tell the client that an event of it was refused."""
        self.outbox.put(error_event(error))

    def _handle(self, received: ClientEvent) -> None:
        match received:
            case client.AppendAudio():
                self._append(received.audio)
            case client.CommitAudio():
                self._commit()
            case client.ClearAudio():
                self._input.clear()
                self._turn_id = None
                self._emit("input_audio_buffer.cleared")
            case client.ClearOutput():
                pass
            case client.SessionUpdate():
                self._update(received.session)
            case client.CreateItem():
                self._create_item(received)
            case client.TruncateItem():
                self._truncate(received)
            case client.DeleteItem():
                self.conversation.remove(received.item_id)
                self._emit("conversation.item.deleted", item_id=received.item_id)
            case client.RetrieveItem():
                code = "item_retrieve_invalid_item_id"
                item = self.conversation.get(received.item_id, code)
                shown = item.json_with_audio(
                    self.config.input_format if item.role == "user" else self.config.output_format
                )
                self._emit("conversation.item.retrieved", item=shown)
            case client.CreateResponse():
                self._create_response(received.response)
            case client.CancelResponse():
                self._responses.cancel(received.response_id)

    def _update(self, value: Any) -> None:
        if isinstance(value, Mapping) and value.get("model") not in (None, self.model):
            raise EventError(
                f"session.model: expected {self.model}, got {value['model']!r:.80}: a session "
                "keeps its model",
                "model_not_found",
                param="session.model",
            )
        config = self.config.updated(value, self._check_voice)
        if (
            config.input_format != self.config.input_format
            and self._input.held_ms
            and (self._input.speaking or self.config.turn_detection is None)
        ):
            raise EventError(
                "session.audio.input.format: commit or clear the sound of the other format first",
                param="session.audio.input.format",
            )
        self.config = config
        self._input.configure(config.input_format, config.turn_detection)
        self._emit("session.updated", session=self._json())

    def _create_item(self, received: client.CreateItem) -> None:
        item = read_item(received.item, self.config.input_format)
        if item.type == "function_call_output" and item.call_id not in self.conversation.calls():
            raise EventError(
                f"item.call_id: there is no call {item.call_id!r:.100}",
                "invalid_call_id",
                param="item.call_id",
            )
        previous = self.conversation.add(item, received.previous_item_id)
        self._tell_of(item, previous)

    def _truncate(self, received: client.TruncateItem) -> None:
        code = "item_truncate_invalid_item_id"
        item = self.conversation.get(received.item_id, code)
        spoken = [part for part in item.parts if part.type == "output_audio"]
        if item.response_id is None or received.content_index or not spoken:
            raise EventError(
                "only the sound of an answer can be truncated, which has content_index 0",
                code,
                param="item_id" if not spoken else "content_index",
            )
        self._cut(item, min(received.audio_end_ms / 1000, item.sent))

    def _cut(self, item: Item, heard: float) -> None:
        """Keep of a spoken answer what was heard; a later word of the client may take it back."""
        item.heard = heard
        if (said := self.conversation.utterance(item)) is not None:
            item.parts[0].transcript = said.until(heard).text
        self._emit(
            "conversation.item.truncated",
            item_id=item.id,
            content_index=0,
            audio_end_ms=round(1000 * heard),
        )

    # --- the user's sound ---------------------------------------------------------------------

    def _append(self, data: bytes) -> None:
        detection = self.config.turn_detection
        if detection is None and self._input.is_full:
            raise EventError(
                f"the input audio buffer holds {self._input.held_ms / 1000:.0f} s: commit or "
                "clear it",
                "input_audio_buffer_full",
                param="audio",
            )
        for found in self._input.append(data, responding=self._responses.is_speaking):
            match found:
                case SpeechStarted():
                    self._speech_started(self._input.session_ms(found.audio_start_ms))
                case SpeechStopped():
                    self._speech_stopped(self._input.session_ms(found.audio_end_ms))
                case IdleTimeout():
                    self._idle(found)
        if self._input.speaking and self._input.is_full:
            self._speech_stopped(None)

    def _speech_started(self, start_ms: int) -> None:
        self._input.begin_turn(start_ms)
        self._turn_id = new_id("item")
        if self.config.turn_detection and self.config.turn_detection.interrupt_response:
            # First of all: nothing more of the answer may be sent.
            interrupted = self._responses.interrupt()
        else:
            interrupted = None
        self._emit(
            "input_audio_buffer.speech_started", audio_start_ms=start_ms, item_id=self._turn_id
        )
        if interrupted is not None:
            self._cut(*interrupted)

    def _speech_stopped(self, end_ms: int | None) -> None:
        item_id = self._turn_id or new_id("item")
        self._emit(
            "input_audio_buffer.speech_stopped",
            audio_end_ms=self._input.written_ms if end_ms is None else end_ms,
            item_id=item_id,
        )
        self._take_turn(self._input.take(end_ms), item_id)
        if self.config.turn_detection and self.config.turn_detection.create_response:
            self._answer_turn()

    def _answer_turn(self) -> None:
        """Answer the user's turn; one that is spoken to the end is not answered twice."""
        try:
            self._respond(Wish(self.config))
        except EventError as error:
            self.refuse(error)

    def _idle(self, found: IdleTimeout) -> None:
        """Nobody has spoken for long: the model hears the silence and goes on."""
        item_id = new_id("item")
        start, end = (
            self._input.session_ms(ms) for ms in (found.audio_start_ms, found.audio_end_ms)
        )
        self._emit(
            "input_audio_buffer.timeout_triggered",
            audio_start_ms=start,
            audio_end_ms=end,
            item_id=item_id,
        )
        self._input.begin_turn(start)
        self._take_turn(self._input.take(end), item_id)
        self._answer_turn()

    def _commit(self) -> None:
        if self._input.held_ms < MIN_COMMIT_MS:
            raise EventError(
                "the input audio buffer is too short to commit: expected at least "
                f"{MIN_COMMIT_MS} ms of audio, it has {self._input.held_ms:.2f} ms",
                "input_audio_buffer_commit_empty",
            )
        self._take_turn(self._input.take(), self._turn_id or new_id("item"))

    def _take_turn(self, samples: Float32[np.ndarray, " N"], item_id: str) -> None:
        """Make the user's sound an item of the conversation."""
        self._turn_id = None
        recording = Recording(samples)
        part = Part("input_audio", recording=recording)
        item = Item(item_id, "message", role="user", parts=[part])
        previous = self.conversation.add(item)
        self._emit("input_audio_buffer.committed", item_id=item.id, previous_item_id=previous)
        self._tell_of(item, previous)
        if self.config.transcription is not None:
            self._actions.append(Transcribe(item.id, recording, self.config.transcription))

    def _tell_of(self, item: Item, previous: str | None) -> None:
        self.outbox.put(item_event("conversation.item.added", item, previous))
        self.outbox.put(item_event("conversation.item.done", item, previous))

    # --- transcripts of the user's turns --------------------------------------------------------

    def transcribed(self, item_id: str, text: str, seconds: float) -> None:
        """A turn of the user was transcribed.

        Args:
            item_id: the turn.
            text: what was said, "" for nothing.
            seconds: of its sound.
        """
        if item_id in self.conversation:
            self.conversation.get(item_id, "").parts[0].transcript = text
        kind = "conversation.item.input_audio_transcription"
        place = {"item_id": item_id, "content_index": 0}
        if text:
            self._emit(f"{kind}.delta", **place, delta=text)
        usage = {"type": "duration", "seconds": seconds}
        self._emit(f"{kind}.completed", **place, transcript=text, usage=usage)

    def transcription_failed(self, item_id: str, error: EventError) -> None:
        """A turn of the user could not be transcribed."""
        self._emit(
            "conversation.item.input_audio_transcription.failed",
            item_id=item_id,
            content_index=0,
            error={
                "type": error.type,
                "code": error.code,
                "message": str(error),
                "param": error.param,
            },
        )

    # --- responses ----------------------------------------------------------------------------

    def _create_response(self, value: Any) -> None:
        fields = Fields(value, "response")
        outside = fields.choice("conversation", ("auto", "none"), "auto") == "none"
        metadata = _read_metadata(fields)
        given = fields.take("input", None)
        config = self.config.for_response(fields, self._check_voice)
        own = None if given is None else self._read_input(given)
        self._respond(Wish(config, own, metadata, outside))

    def _read_input(self, given: Any) -> Conversation:
        """The items that a response is to see instead of the conversation."""
        if not isinstance(given, list) or len(given) > MAX_INPUT:
            raise EventError(
                f"response.input: expected a list of at most {MAX_INPUT} items",
                "invalid_type",
                param="response.input",
            )
        made = Conversation()
        for n, entry in enumerate(given):
            path = f"response.input[{n}]"
            if isinstance(entry, Mapping) and entry.get("type") == "item_reference":
                name = Fields(entry, path).text("id")
                made.refer(self.conversation.get(name, "item_not_found"), self.conversation)
            else:
                made.add(read_item(entry, self.config.input_format, path))
        return made

    def _respond(self, wish: Wish) -> None:
        self._responses.create(wish)
        self._input.stop_waiting()

    def piece(self, response_id: str, piece: ReplyPiece) -> None:
        """A response has a next piece."""
        self._responses.piece(response_id, piece)

    def lead(self, response_id: str) -> float:
        """Seconds by which the sound of a response that was sent is ahead of the time."""
        return self._responses.lead_of(response_id)

    def ended(self, response_id: str, outcome: Outcome) -> None:
        """A response has ended, by itself or because it was cancelled."""
        self._responses.ended(response_id, outcome)
        self._wait_for_speech()

    def failed(self, response_id: str, error: EventError) -> None:
        """A response has failed."""
        self._responses.failed(response_id, error)
        self._wait_for_speech()

    def _wait_for_speech(self) -> None:
        if self._responses.is_idle and not self._input.speaking:
            self._input.wait_for_speech(1000 * self._responses.lead)

    def close(self) -> None:
        """The client has gone: end what is under way."""
        self._responses.close()
        self.outbox.close()

    def _emit(self, type: str, **fields: Any) -> None:
        self.outbox.put(event(type, **fields))

    def _json(self) -> dict[str, Any]:
        return self.config.json(self.id, self.model)


def _read_metadata(fields: Fields) -> dict[str, str] | None:
    """At most 16 short texts by name."""
    value = fields.take("metadata", None)
    if value is None:
        return None
    given = dict(value) if isinstance(value, Mapping) else {}
    short = all(
        len(key) <= 64 and isinstance(text, str) and len(text) <= 512 for key, text in given.items()
    )
    if not isinstance(value, Mapping) or len(given) > 16 or not short:
        raise EventError(
            "response.metadata: expected at most 16 texts of 512 characters by names of 64",
            param="response.metadata",
        )
    return given
