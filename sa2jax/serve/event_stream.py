"""Responses that go on: server-sent events and sound, ended as soon as the client has gone."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client has closed the connection."""


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event with a JSON value."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class OpenResponse(Response):
    """A response whose body comes from a generator, which is closed when the client goes.

    Unlike Starlette's, it notices that also while nothing is sent.

    Args:
        body: the parts of the body.
        media_type: its type.
        headers: further headers.
    """

    def __init__(
        self,
        body: AsyncGenerator[bytes],
        media_type: str = "text/event-stream",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(media_type=media_type, headers=dict(headers or {}))
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # a proxy that collects it would delay the sound
        self._parts = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        start = {"status": self.status_code, "headers": self.raw_headers}
        sending = asyncio.create_task(self._send(send, start))
        with suppress(ClientGone, OSError):
            await _unless_gone(receive, sending)

    async def _send(self, send: Send, start: dict[str, Any]) -> None:
        async with aclosing(self._parts) as parts:
            await send({"type": "http.response.start", **start})
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


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
