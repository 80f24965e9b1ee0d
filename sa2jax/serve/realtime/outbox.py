"""Events on their way to the client, in order; what was not sent of an answer can be taken back."""

import asyncio
from collections import deque
from typing import Any, NamedTuple


class _Entry(NamedTuple):
    event: dict[str, Any]
    response_id: str | None
    seconds: float


class Outbox:
    """A queue of server events; made and used in one event loop, or in none.

    Attributes:
        closed: whether nobody takes them any more.
    """

    def __init__(self):
        self._entries: deque[_Entry] = deque()
        self._changed = asyncio.Event()
        self.closed = False

    def __len__(self) -> int:
        return len(self._entries)

    def put(
        self, event: dict[str, Any], *, response_id: str | None = None, seconds: float = 0.0
    ) -> None:
        """Add an event.

        Args:
            event: it.
            response_id: the response that it is a delta of: `withdraw` takes it back.
            seconds: of sound in it.
        """
        if not self.closed:
            self._entries.append(_Entry(event, response_id, seconds))
            self._changed.set()

    def withdraw(self, response_id: str) -> float:
        """Take back the deltas of a response that were not sent.

        Returns:
            Seconds of sound in them.
        """
        unsent = sum(entry.seconds for entry in self._entries if entry.response_id == response_id)
        kept = [entry for entry in self._entries if entry.response_id != response_id]
        self._entries = deque(kept)
        self._changed.set()
        return unsent

    def take(self) -> dict[str, Any] | None:
        """The next event, None if there is none."""
        if not self._entries:
            return None
        event = self._entries.popleft().event
        self._changed.set()
        return event

    async def next(self) -> dict[str, Any]:
        """The next event, once there is one."""
        while (event := self.take()) is None:
            self._changed.clear()
            await self._changed.wait()
        return event

    async def wait_until_shorter(self, than: int) -> None:
        """Wait until fewer events than this are queued: whoever makes more pauses so."""
        while len(self._entries) >= than and not self.closed:
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        """Drop all events, and all that come."""
        self.closed = True
        self._entries.clear()
        self._changed.set()
