"""Admission: how many requests run, how many wait, and in which order."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from sa2jax.serve.errors import ApiError


class Slot:
    """The right to run one request, until it is released.

    Attributes:
        waited: seconds that it was waited for.
    """

    def __init__(self, release: Callable[[float], None], waited: float):
        self._release, self.waited = release, waited
        self._since: float | None = time.monotonic()

    def release(self) -> None:
        """Let the next one run; a second call does nothing."""
        if self._since is not None:
            since, self._since = self._since, None
            self._release(time.monotonic() - since)

    def __enter__(self) -> "Slot":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class Admission:
    """Slots for requests: so many run, so many wait in order of arrival, others are sent away.

    Lives in one event loop.

    Args:
        rows: requests that run at the same time.
        queue: requests that may wait.
        timeout: seconds that one waits at most.
    """

    def __init__(self, rows: int, queue: int, timeout: float):
        self.rows, self.queue, self.timeout = rows, queue, timeout
        self.running = 0
        self.closed = False  # shutting down
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean = 2.0  # seconds that a request takes, a moving average

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def require_room(self, count: int = 1) -> None:
        """Refuse what would neither run nor fit in the queue.

        Raises:
            ApiError: 503 with `Retry-After`.
        """
        if self.closed:
            raise self._full("the server is shutting down")
        free = self.rows - self.running if not self._waiting else 0
        if count > free + self.queue - len(self._waiting):
            raise self._full(
                f"the server is busy: {self.running} requests run and {self.waiting} wait"
            )

    async def acquire(self) -> Slot:
        """Wait for a slot.

        Raises:
            ApiError: 503 with `Retry-After`, if the queue is full or the wait too long.
        """
        self.require_room()
        started = time.monotonic()
        if self.running < self.rows and not self._waiting:
            self.running += 1
            return Slot(self._release, 0.0)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self.timeout):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._hand_on()  # the turn came together with the end of the wait
            else:
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise self._full(f"no turn within {self.timeout:g} s: the server is busy") from None
            raise
        return Slot(self._release, time.monotonic() - started)

    def close(self) -> None:
        """Let nobody in any more; those who wait already still get their turn."""
        self.closed = True

    def _release(self, seconds: float) -> None:
        self._mean += 0.1 * (seconds - self._mean)
        self._hand_on()

    def _hand_on(self) -> None:
        """A slot is free: its turn is that of the one who waits longest."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self.running -= 1

    def _full(self, reason: str) -> ApiError:
        seconds = math.ceil(self._mean * (self.waiting + 1) / self.rows)
        retry = min(max(seconds, 1), 60)
        return ApiError(
            f"{reason}; try again in {retry} s", 503, headers={"retry-after": str(retry)}
        )
