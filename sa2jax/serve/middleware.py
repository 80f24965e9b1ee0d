"""The entrance of every HTTP request: id, key, size, log, and the last net for errors."""

import json
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sa2jax.serve.auth import Keys
from sa2jax.serve.errors import ApiError, as_api_error
from sa2jax.serve.metrics import Metrics
from sa2jax.serve.origins import Origins
from sa2jax.serve.settings import MIB, Settings

access = logging.getLogger("sa2jax.access")

_ID = re.compile(r"[\w.:-]{1,128}")
_LONGEST_PATH = 200  # characters in the log


class Entrance:
    """ASGI middleware; WebSockets pass, their routes check keys themselves.

    Args:
        app: what it leads to.
        keys: who may enter.
        settings: limits.
        metrics: what counts requests.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, settings: Settings, metrics: Metrics):
        self._app, self._keys = app, keys
        self._settings, self._metrics = settings, metrics
        self._origins = Origins(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, send)
        body = _Body(receive, self._limit(visit.headers))
        try:
            self._origins.require(visit.headers.get("origin"), visit.headers.get("host"))
            self._keys.require(visit.headers.get("authorization"), scope["path"])
            body.require_declared(visit.headers.get("content-length"))
            await self._app(scope, body.receive, visit.send)
        except Exception as error:
            if visit.status is not None:  # the response has begun: it can only be broken off
                raise
            await as_api_error(error).response()(scope, receive, visit.send)
        finally:
            self._record(visit)

    def _limit(self, headers: Headers) -> int:
        files = headers.get("content-type", "").startswith("multipart/")
        return self._settings.max_upload_bytes if files else self._settings.max_json_bytes

    def _record(self, visit: "_Visit") -> None:
        status = str(visit.status or 499)  # 499: the client has gone
        self._metrics.add(self._metrics.requests, 1, visit.route, status)
        access.info("%s", json.dumps(visit.summary(status), ensure_ascii=False))


class _Visit:
    """One request and what became of it."""

    def __init__(self, scope: Scope, send: Send):
        self._scope, self._send = scope, send
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.id = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = self.id
        self._start = time.monotonic()
        self.status: int | None = None
        self._bytes = 0
        self._queued: str | None = None

    @property
    def route(self) -> str:
        """The path as its route has it: a label of few values."""
        return getattr(self._scope.get("route"), "path", "other")

    async def send(self, message: Message) -> None:
        """Pass on what is answered, with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            headers.setdefault("x-content-type-options", "nosniff")
            self._queued = headers.get("x-queue-ms")
        elif message["type"] == "http.response.body":
            self._bytes += len(message.get("body", b""))
        await self._send(message)

    def summary(self, status: str) -> dict[str, object]:
        """The line of the access log."""
        client = self._scope.get("client") or ("-",)
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "request_id": self.id,
            "client": client[0],
            "method": self._scope["method"],
            "path": self._scope["path"][:_LONGEST_PATH],
            "status": int(status),
            "ms": round(1000 * (time.monotonic() - self._start), 1),
            "queue_ms": None if self._queued is None else float(self._queued),
            "bytes": self._bytes,
        }


class _Body:
    """The body of a request, counted while it comes."""

    def __init__(self, receive: Receive, limit: int):
        self._receive, self._limit, self._read = receive, limit, 0

    def require_declared(self, length: str | None) -> None:
        """Refuse a body that says itself that it is too large."""
        if length is not None and length.isdecimal() and int(length) > self._limit:
            raise self._error()

    async def receive(self) -> Message:
        """The next part of it."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            if self._read > self._limit:
                raise self._error()
        return message

    def _error(self) -> ApiError:
        size = f"{self._limit / MIB:g} MiB" if self._limit >= MIB else f"{self._limit} bytes"
        return ApiError(
            f"expected a body of at most {size}, got more: send less, or raise the server's limit",
            413,
        )
