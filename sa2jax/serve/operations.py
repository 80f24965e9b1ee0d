"""Routes that tell of the server: /health, /readyz, /metrics, /version, /v1/models."""

import time
from importlib.metadata import version as version_of
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

import sa2jax
from sa2jax.serve.errors import ApiError
from sa2jax.serve.state import state_of

router = APIRouter()
_STARTED = int(time.time())


@router.get("/health")
@router.get("/healthz")
async def health() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "ok"}


@router.get("/readyz")
async def ready(request: Request) -> JSONResponse:
    """Whether requests should be sent here: all programs are made, and it is not shutting down."""
    state = state_of(request)
    now = state.readiness
    if state.admission.closed:
        return JSONResponse({"status": "shutting down"}, 503)
    if now.error is not None:
        return JSONResponse({"status": "failed", "error": now.error}, 503)
    if not now.ready:
        return JSONResponse({"status": "warming up", "doing": now.doing}, 503)
    return JSONResponse({"status": "ready"})


@router.get("/version")
async def version() -> dict[str, str]:
    """Versions of the library and of jax."""
    return {"version": sa2jax.__version__, "jax": version_of("jax")}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(state_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The model, as OpenAI lists models."""
    return {"object": "list", "data": [_card(request)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """The model, if it has this name."""
    if name != state_of(request).settings.model_id:
        raise ApiError(f"no model {name!r:.80}", 404, param="model", code="model_not_found")
    return _card(request)


def _card(request: Request) -> dict[str, Any]:
    state = state_of(request)
    return {
        "id": state.settings.model_id,
        "object": "model",
        "created": _STARTED,
        "owned_by": "sa2jax",
        "max_model_len": state.max_len,
    }
