"""API keys: who may use the server."""

import hashlib
import hmac
from collections.abc import Iterable

from sa2jax.serve.errors import ApiError

# What tells whether the server lives; the page's own files hold no secret and ask for the key.
OPERATIONS = frozenset({"/health", "/healthz", "/readyz", "/metrics", "/version"})
PAGE = "/page/"


class Keys:
    """The keys of a server, kept as hashes and compared in constant time.

    Args:
        keys: the keys; none opens the server to all.
        public_operations: whether `OPERATIONS` need none.
    """

    def __init__(self, keys: Iterable[str] = (), *, public_operations: bool = True):
        self._digests = tuple(_digest(key) for key in keys)
        self._public_operations = public_operations

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, key: str | None) -> bool:
        """Whether a key is one of them. Every key is compared, each in constant time."""
        if not self._digests:
            return True
        given, found = _digest(key or ""), False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found and key is not None

    def is_public(self, path: str) -> bool:
        """Whether a path needs no key."""
        if path == "/" or path.startswith(PAGE):
            return True
        return self._public_operations and path in OPERATIONS

    def require(self, authorization: str | None, path: str = "") -> None:
        """Refuse a request without one of the keys.

        Args:
            authorization: the header of that name, `Bearer KEY`.
            path: what is asked for.

        Raises:
            ApiError: 401.
        """
        if not self or self.is_public(path) or self.accepts(bearer(authorization)):
            return
        raise ApiError(
            "expected a valid API key as `Authorization: Bearer KEY`",
            401,
            headers={"www-authenticate": "Bearer"},
        )


def bearer(authorization: str | None) -> str | None:
    """The key in an `Authorization` header, None for none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
