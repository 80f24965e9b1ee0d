"""Client secrets: short-lived keys for browsers, which a session's settings come with."""

import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sa2jax.serve.realtime.checks import EventError
from sa2jax.serve.realtime.session_config import SessionConfig

PREFIX = "ek_"


@dataclass(frozen=True)
class ClientSecret:
    """A secret that was made.

    Attributes:
        value: what the client sends as its key; it is not kept.
        expires_at: until when it opens sessions, in seconds of Unix time.
    """

    value: str
    expires_at: int


class ClientSecrets:
    """The secrets of a server.

    Only hashes are kept, made with a key that no one else has, so how long a look-up takes tells
    nothing of them.

    Args:
        most: how many may be valid at the same time.
        clock: Unix time.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.time):
        self._most, self._clock, self._key = most, clock, secrets.token_bytes(32)
        self._kept: OrderedDict[bytes, tuple[int, SessionConfig]] = OrderedDict()

    def make(self, config: SessionConfig, seconds: int) -> ClientSecret:
        """Make a secret.

        Args:
            config: the settings that its sessions begin with.
            seconds: how long it is valid.

        Raises:
            EventError: if there are too many.
        """
        now = self._clock()
        self._kept = OrderedDict((k, kept) for k, kept in self._kept.items() if kept[0] > now)
        if len(self._kept) >= self._most:
            raise EventError(
                f"{self._most} client secrets are valid: wait until some expire",
                "too_many_client_secrets",
                type="server_error",
            )
        secret = ClientSecret(PREFIX + secrets.token_urlsafe(32), int(now + seconds))
        self._kept[self._digest(secret.value)] = secret.expires_at, config
        return secret

    def find(self, value: str | None) -> SessionConfig | None:
        """The settings that come with a secret, None if it is none or has expired."""
        if value is None or not value.startswith(PREFIX):
            return None
        kept = self._kept.get(self._digest(value))
        if kept is None or kept[0] <= self._clock():
            return None
        return kept[1]

    def _digest(self, value: str) -> bytes:
        return hmac.digest(self._key, value.encode(errors="surrogateescape"), "sha256")
