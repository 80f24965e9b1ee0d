"""The application: `create_app(model, settings)`."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from sa2jax.pipeline import StepAudio2
from sa2jax.serve import operations
from sa2jax.serve.bodies import invalid
from sa2jax.serve.errors import ApiError
from sa2jax.serve.middleware import Entrance
from sa2jax.serve.openai import chat_completions, speech, transcriptions, voices
from sa2jax.serve.page import routes as page
from sa2jax.serve.realtime.routes import Realtime
from sa2jax.serve.settings import Settings
from sa2jax.serve.state import Readiness, ServerState
from sa2jax.serve.warm_up import warm_up

log = logging.getLogger(__name__)


def create_app(
    model: StepAudio2,
    settings: Settings | None = None,
    *,
    warm: bool = True,
    realtime: Realtime | None = None,
) -> FastAPI:
    """A server's application.

    Its `state.server` is the `ServerState` that all routes share.

    Args:
        model: the model that answers.
        settings: bounds and defaults.
        warm: make all programs before `/readyz` says ready, in the background.
        realtime: the realtime sessions, by default with bounds of their own.

    Raises:
        CheckpointError: if the folder of voices cannot be made.
        VoiceError: for an alias of no voice.
    """
    state = ServerState(model, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(_get_ready(state, warm))
        try:
            yield
        finally:
            state.admission.close()
            await asyncio.wait({warming})  # its step is finished: a program cannot be broken off
            state.bridge.close()

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="sa2jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = state
    app.add_middleware(Entrance, keys=state.keys, settings=state.settings, metrics=state.metrics)
    if state.settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-queue-ms", "retry-after"],
        )
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    sessions = realtime or Realtime()
    for room in (operations, chat_completions, speech, transcriptions, voices, sessions, page):
        app.include_router(room.router)
    return app


async def _get_ready(state: ServerState, warm: bool) -> None:
    try:
        if warm:
            await state.bridge.call(warm_up, state)
    except Exception as error:
        log.exception("the server could not get ready")
        state.readiness = Readiness(doing="nothing", error=str(error))
        return
    state.set_ready()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses: no such path, another method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path:.200}"
    messages = {404: f"no such path: {where}", 405: f"method not allowed: {where}"}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(message, error.status_code, headers=error.headers).response()


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return invalid(error.errors()).response()
