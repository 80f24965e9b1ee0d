"""Routes of the Realtime API: the WebSocket `/v1/realtime`, and client secrets."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, WebSocket

from sa2jax.audio.turns import TurnDetector
from sa2jax.serve.auth import bearer
from sa2jax.serve.bodies import read_json_body
from sa2jax.serve.errors import ApiError, as_api_error
from sa2jax.serve.realtime.checks import EventError, Fields
from sa2jax.serve.realtime.client_secrets import ClientSecrets
from sa2jax.serve.realtime.connection import Connection
from sa2jax.serve.realtime.model_responder import ModelResponder
from sa2jax.serve.realtime.responder import Responder
from sa2jax.serve.realtime.session import Session
from sa2jax.serve.realtime.session_config import SessionConfig
from sa2jax.serve.realtime.settings import RealtimeSettings
from sa2jax.serve.state import ServerState, state_of

SUBPROTOCOL = "realtime"
KEY_SUBPROTOCOL = "openai-insecure-api-key."
HEARD_TOKEN_RATE = 12.5  # positions that a second of a recording takes, in Hz
_SECRET_SECONDS = 10, 7200


class Realtime:
    """The realtime sessions of a server.

    Args:
        settings: bounds.
        make_responder: makes what answers in a session; by default the model.
        make_detector: makes the detector of turns of one.

    Attributes:
        sessions: those that are open.
        router: its routes.
    """

    def __init__(
        self,
        settings: RealtimeSettings | None = None,
        *,
        make_responder: Callable[[ServerState], Responder] | None = None,
        make_detector: Callable[[], TurnDetector] = TurnDetector,
    ):
        self.settings = settings or RealtimeSettings()
        self.secrets = ClientSecrets(self.settings.max_secrets)
        self._transcribing = asyncio.Semaphore(1)
        self._make_responder = make_responder or self._model_responder
        self._make_detector = make_detector
        self.sessions: set[Session] = set()
        self.router = APIRouter()
        self.router.add_api_websocket_route("/v1/realtime", self.connect)
        self.router.add_api_route("/v1/realtime/client_secrets", self.make_secret, methods=["POST"])

    def _model_responder(self, state: ServerState) -> Responder:
        return ModelResponder(state, self._transcribing)

    async def connect(self, websocket: WebSocket) -> None:
        """A session, for as long as the client stays."""
        state = state_of(websocket)
        try:
            config = self._enter(websocket, state)
        except ApiError as error:
            await websocket.send_denial_response(error.response())
            return
        offered = websocket.scope.get("subprotocols", ())
        # A browser that offers it gives up unless it is confirmed.
        await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
        responder = self._make_responder(state)
        session = Session(
            config,
            model=state.settings.model_id,
            check_voice=responder.check_voice,
            max_seconds=state.settings.max_seconds,
            max_heard=state.max_len / HEARD_TOKEN_RATE,
            make_detector=self._make_detector,
        )
        self.sessions.add(session)
        gauge = state.metrics.sessions.labels(state.settings.model_id)
        gauge.inc()
        try:
            await Connection(websocket, session, responder, self.settings).run()
        finally:
            self.sessions.discard(session)
            gauge.dec()

    def _enter(self, websocket: WebSocket, state: ServerState) -> SessionConfig:
        """The settings that a session begins with.

        Raises:
            ApiError: if the client may not enter, asks for another model, or there is no room.
        """
        key, headers = key_of(websocket), websocket.headers
        state.origins.require(headers.get("origin"), headers.get("host"))
        config = self.secrets.find(key)
        if config is None:
            config = default_config(state)
            if not state.keys.accepts(key):
                raise ApiError(
                    "expected a valid API key or client secret, as `Authorization: Bearer KEY` or "
                    f"as the subprotocol `{KEY_SUBPROTOCOL}KEY`",
                    401,
                    headers={"www-authenticate": "Bearer"},
                )
        state.require_model(websocket.query_params.get("model"))
        if state.admission.closed:
            raise ApiError("the server is shutting down", 503)
        if len(self.sessions) >= self.settings.max_sessions:
            raise ApiError(
                f"the server has {len(self.sessions)} realtime sessions, and no room for another",
                503,
                headers={"retry-after": "10"},
            )
        return config

    async def make_secret(self, request: Request) -> dict[str, Any]:
        """A short-lived key for a browser, with the settings of its sessions."""
        state = state_of(request)
        try:
            fields = Fields(await read_json_body(request))
            config, seconds = default_config(state), self.settings.secret_seconds
            if (expiry := fields.inner("expires_after", None)) is not None:
                expiry.choice("anchor", ("created_at",), "created_at")
                least, most = _SECRET_SECONDS
                seconds = expiry.number("seconds", seconds, least=least, most=most, whole=True)
                expiry.refuse_others()
            if (session := fields.take("session", None)) is not None:
                state.require_model(session.get("model") if isinstance(session, dict) else None)
                check_voice = self._make_responder(state).check_voice
                config = config.updated(session, check_voice)
            fields.refuse_others()
            secret = self.secrets.make(config, seconds)
        except EventError as error:
            status = 400 if error.type == "invalid_request_error" else 503
            raise ApiError(str(error), status, param=error.param, code=error.code) from None
        except ApiError as error:
            raise as_api_error(error) from None
        return {
            "value": secret.value,
            "expires_at": secret.expires_at,
            "session": config.json("", state.settings.model_id),
        }


def key_of(websocket: WebSocket) -> str | None:
    """The key that a client gives: in a header, or, from a browser, as a subprotocol."""
    for offered in websocket.scope.get("subprotocols", ()):
        if offered.startswith(KEY_SUBPROTOCOL):
            return offered.removeprefix(KEY_SUBPROTOCOL)
    return bearer(websocket.headers.get("authorization"))


def default_config(state: ServerState) -> SessionConfig:
    """The settings of a session whose client says nothing."""
    instructions = state.settings.default_system
    return SessionConfig(
        instructions=instructions or "",
        modality="audio" if state.voices.can_speak else "text",
        think=state.settings.think,
    )
