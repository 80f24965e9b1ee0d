"""A realtime session over a WebSocket: one task reads, one writes, one runs each response."""

import asyncio
import json
import logging
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from sa2jax.serve.errors import as_api_error
from sa2jax.serve.realtime.actions import CancelResponse, StartResponse, Transcribe
from sa2jax.serve.realtime.checks import EventError
from sa2jax.serve.realtime.client_events import AppendAudio, ClientEvent, parse_event
from sa2jax.serve.realtime.responder import Responder, RunningResponse
from sa2jax.serve.realtime.session import Session
from sa2jax.serve.realtime.settings import RealtimeSettings

log = logging.getLogger(__name__)

_SLICE = 48_000  # bytes of sound that are heard at once: a second, then others have their turn


class Connection:
    """A session and its client.

    Args:
        websocket: accepted.
        session: not begun yet.
        responder: what answers in it.
        settings: bounds.
    """

    def __init__(
        self,
        websocket: WebSocket,
        session: Session,
        responder: Responder,
        settings: RealtimeSettings,
    ):
        self._websocket, self._session = websocket, session
        self._responder, self._settings = responder, settings
        self._running: dict[str, tuple[RunningResponse, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """Serve the client until it goes."""
        self._session.open()
        reader, writer = self._spawn(self._read()), self._spawn(self._write())
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._end(reader, writer)

    # --- tasks ----------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Events of the client, one after another."""
        outbox = self._session.outbox
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            try:
                event = parse_event(
                    message.get("bytes") or b"" if text is None else text,
                    max_bytes=self._settings.max_message_bytes,
                )
            except EventError as error:
                self._session.refuse(error)
            else:
                await self._receive(event)
            await outbox.wait_until_shorter(self._settings.max_queued_events)

    async def _receive(self, event: ClientEvent) -> None:
        if not isinstance(event, AppendAudio) or len(event.audio) <= _SLICE:
            self._session.receive(event)
            self._act()
            return
        for start in range(0, len(event.audio), _SLICE):
            part = event.audio[start : start + _SLICE]
            self._session.receive(AppendAudio(event_id=event.event_id, audio=part))
            self._act()
            await asyncio.sleep(0)

    async def _write(self) -> None:
        """Events to the client, as fast as it takes them."""
        while True:
            event = await self._session.outbox.next()
            text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
            try:
                await self._websocket.send_text(text)
            except (WebSocketDisconnect, RuntimeError, OSError):
                return  # the client has gone

    async def _respond(self, response_id: str, running: RunningResponse) -> None:
        """The pieces of a response, no faster than the client can hold and read them."""
        session, outbox = self._session, self._session.outbox
        try:
            async for piece in running:
                while (ahead := session.lead(response_id) - self._settings.max_lead) > 0:
                    await asyncio.sleep(min(ahead, 0.25))
                session.piece(response_id, piece)
                await outbox.wait_until_shorter(self._settings.queued_events)
            outcome = await running.outcome()
        except Exception as error:
            self._forget(response_id)
            session.failed(response_id, as_event_error(error))
            with suppress(Exception):  # one that has failed has ended already
                await running.cancel(0.0)
        else:
            self._forget(response_id)
            session.ended(response_id, outcome)
        self._act()

    async def _cancel(self, action: CancelResponse) -> None:
        """End a response and tell what was said of it."""
        session, known = self._session, self._running.get(action.response_id)
        if known is None:  # it has ended by itself
            return
        running, task = known
        self._forget(action.response_id)
        task.cancel()
        try:
            with suppress(asyncio.CancelledError):
                await task
            session.ended(action.response_id, await running.cancel(action.sent))
        except Exception as error:
            session.failed(action.response_id, as_event_error(error))
        self._act()

    async def _transcribe(self, action: Transcribe) -> None:
        recording = action.recording
        try:
            text = await self._responder.transcribe(recording, action.transcription)
        except Exception as error:
            self._session.transcription_failed(action.item_id, as_event_error(error))
        else:
            self._session.transcribed(action.item_id, text, recording.seconds)

    # --- actions --------------------------------------------------------------------------------

    def _act(self) -> None:
        """Do what the session asks for."""
        for action in self._session.take_actions():
            match action:
                case StartResponse():
                    running = self._responder.start(action.request)
                    task = self._spawn(self._respond(action.request.id, running))
                    self._running[action.request.id] = running, task
                case CancelResponse():
                    self._spawn(self._cancel(action))
                case Transcribe():
                    self._spawn(self._transcribe(action))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _forget(self, response_id: str) -> None:
        self._running.pop(response_id, None)

    async def _end(self, *tasks: asyncio.Task[None]) -> None:
        """The client has gone: nothing of its session goes on."""
        self._session.close()
        self._session.take_actions()
        running, self._running = list(self._running.values()), {}
        ended = [*self._tasks, *tasks]
        for task in ended:
            task.cancel()
        results = await asyncio.gather(*ended, return_exceptions=True)
        for error in results:
            if isinstance(error, Exception):
                log.error("a realtime session failed", exc_info=error)
        for response, _ in running:
            try:
                await response.cancel(0.0)
            except Exception:
                log.exception("a response of a session that is over could not be ended")


def as_event_error(error: Exception) -> EventError:
    """Any exception as an error that a client may read; one that is our fault is logged."""
    if isinstance(error, EventError):
        return error
    known = as_api_error(error)
    return EventError(known.message, known.code, param=known.param, type=known.type)
