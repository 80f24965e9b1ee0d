"""Requests that a browser sends for a page of somebody else: refused unless that was allowed."""

from urllib.parse import urlsplit

from sa2jax.serve.errors import ApiError
from sa2jax.serve.settings import Settings

_LOCAL = ("localhost", "127.0.0.1", "::1")


class Origins:
    """Which pages' scripts may use the server.

    A page from anywhere can have a browser send requests to this machine. It is told by the header
    `Origin`; and by `Host`, where its name was made to lead here (DNS rebinding).

    Args:
        settings: `allowed_origins`, and `local_only`, for a server without keys that is for this
            machine alone.
    """

    def __init__(self, settings: Settings):
        self._allowed = frozenset(settings.allowed_origins)
        self._local_only = settings.local_only and not settings.api_keys

    def require(self, origin: str | None, host: str | None) -> None:
        """Refuse a request of a foreign page.

        Args:
            origin: the header `Origin`, which browsers send.
            host: the header `Host`.

        Raises:
            ApiError: 403.
        """
        if self._local_only and _name(host) not in _LOCAL:
            raise ApiError(
                "this server is for its own machine: ask it as localhost, or give it a key "
                "(--api-key-file)",
                403,
            )
        if origin is None or origin in self._allowed or "*" in self._allowed:
            return
        if urlsplit(origin).netloc != host:
            raise ApiError(
                f"pages of {origin:.80} may not use this server: --allow-origin lets them", 403
            )


def _name(host: str | None) -> str | None:
    """The name in a `Host` header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname if host else None
    except ValueError:
        return None
