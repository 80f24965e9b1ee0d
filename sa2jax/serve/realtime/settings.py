"""Bounds of realtime sessions."""

from dataclasses import dataclass

from sa2jax.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RealtimeSettings:
    """What a realtime session may take.

    Attributes:
        max_sessions: sessions that are open at the same time.
        max_message_bytes: size of an event of the client. The web server has a limit of its own,
            uvicorn's `ws_max_size`, which has to be as high.
        max_lead: seconds of sound by which what is sent may be ahead of what is heard: a client
            holds so much at most, and so much is wasted at most when it is interrupted.
        queued_events: events that wait for a client who reads slowly; then its answer pauses.
        max_queued_events: events that wait for it in all; then its own events are not read.
        secret_seconds: how long a client secret is valid where its maker does not say.
        max_secrets: how many of them are valid at the same time.
    """

    max_sessions: int = 256
    max_message_bytes: int = 24 * MIB
    max_lead: float = 8.0
    queued_events: int = 32
    max_queued_events: int = 512
    secret_seconds: int = 600
    max_secrets: int = 10_000

    def __post_init__(self):
        if self.max_lead <= 0:
            raise ConfigError(f"max_lead={self.max_lead}: expected more than 0 s")
        if not 1 <= self.queued_events <= self.max_queued_events:
            raise ConfigError(
                f"queued_events={self.queued_events}: expected 1 to {self.max_queued_events}"
            )
