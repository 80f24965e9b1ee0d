"""Repetition guard: ends a reply that repeats the same few ids for too long."""

from collections.abc import Iterable

import numpy as np

PERIOD = 50  # ids of the longest loop that is noticed: ten words of speech


class RepetitionGuard:
    """Detects a reply that only repeats itself.

    Args:
        limit: repeated ids in a row, of a loop of at most `PERIOD` ids, that are too many; 0 for
            no limit.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._newest = np.full(PERIOD, -1)  # first
        self._runs = np.zeros(PERIOD, int)  # ids in a row equal to the one 1, 2, … before

    def push(self, ids: Iterable[int]) -> int | None:
        """How many of these ids come before the reply is to be ended; None to go on."""
        if not self._limit:
            return None
        for count, i in enumerate(ids, 1):
            self._runs = np.where(self._newest == i, self._runs + 1, 0)
            self._newest = np.concatenate([[i], self._newest[:-1]])
            if self._runs.max() >= self._limit:
                return count
        return None
