"""Responses that go on: server-sent events and sound, ended as soon as the client has gone."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, Self, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sa2jax.serve.errors import ApiError, as_api_error

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client has closed the connection."""


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event with a JSON value."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class OpenResponse(Response):
    """A response whose body comes from a generator, which is closed when the client goes.

    Unlike Starlette's, it notices that also while nothing is sent, and gives up who reads nothing
    for `Settings.reader_timeout` seconds. Made by `begin`.
    """

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes],
        media_type: str,
        headers: Mapping[str, str],
    ):
        super().__init__(media_type=media_type, headers=dict(headers))
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # a proxy that collects it would delay the sound
        self._first, self._rest = first, rest

    @classmethod
    async def begin(
        cls,
        parts: AsyncGenerator[bytes],
        media_type: str = "text/event-stream",
        headers: Callable[[], Mapping[str, str]] = dict,
    ) -> Self:
        """Wait for the first part: what is wrong with the request is told by a status until then.

        Args:
            parts: the parts of the body, at least one.
            media_type: its type.
            headers: gives further headers, when the first part is there.

        Raises:
            ApiError: what the generator raises before its first part.
        """
        try:
            return cls(await anext(parts), parts, media_type, headers())
        except BaseException:
            await parts.aclose()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        patience = scope["app"].state.server.settings.reader_timeout

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(patience):
                await send(message)

        try:
            with suppress(ClientGone, OSError):  # a timeout is an OSError
                await _unless_gone(receive, asyncio.create_task(self._send(send_in_time)))
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for part in self._rest:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def with_error_event(
    parts: AsyncGenerator[bytes], error_event: Callable[[ApiError], bytes]
) -> AsyncGenerator[bytes]:
    """Parts of a stream; an error after the first of them is an event, one before is raised.

    Args:
        parts: the parts.
        error_event: makes an event of an error.
    """
    begun = False
    try:
        async with aclosing(parts):
            async for part in parts:
                yield part
                begun = True
    except Exception as error:
        if not begun:
            raise
        yield error_event(as_api_error(error))


def typed_error(error: ApiError) -> bytes:
    """An error among events that have a type."""
    return event({"type": "error", **error.body})


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What some work gives; it is cancelled if the client goes before.

    Args:
        request: whose body has been read.
        work: the work.

    Raises:
        ClientGone: if it has gone.
    """
    return await _unless_gone(request.receive, asyncio.create_task(work))


async def _unless_gone(receive: Receive, work: "asyncio.Task[T]") -> T:
    watching = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        for task in (work, watching):
            if not task.done():
                task.cancel()
                await asyncio.wait({task})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
