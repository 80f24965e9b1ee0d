"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from sa2jax.errors import CheckpointError, Sa2jaxError, VoiceError, shorten

log = logging.getLogger(__name__)

_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    500: "internal_error",
    503: "server_overloaded",
}


class ApiError(Exception):
    """A request that is refused, or has failed.

    Args:
        message: what was expected, what came and the fix.
        status: HTTP status.
        param: the field of the request that it is about.
        code: a word for programs; by default that of the status.
        headers: headers of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param = shorten(message), status, param
        self.code = code or _CODES.get(status, "invalid_request")
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's word for whose fault it is."""
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: BaseException, *, param: str | None = None) -> ApiError:
    """Any exception as an error that a client may read; one that is our fault is logged.

    Args:
        error: the exception.
        param: the field of the request that it is about, if known.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, VoiceError):
        return ApiError(str(error), param=param or "voice", code="invalid_voice")
    if isinstance(error, Sa2jaxError) and not isinstance(error, CheckpointError):
        return ApiError(str(error), param=param)
    log.error("a request failed", exc_info=error)
    return ApiError("the server failed to answer this request; its log says why", 500)
