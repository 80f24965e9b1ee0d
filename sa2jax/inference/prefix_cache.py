"""Prefix cache: what the rows of an engine hold, and which of them a prompt is read into.

A row's positions stay known after its reply: token ids, and clips by their content. The next turn
of a conversation, an undone or cut one, and another conversation that begins with the same system
prompt read only what differs. No bookkeeping of conversations is needed for that.
"""

import hashlib
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from sa2jax.inference.requests import Request
from sa2jax.inference.runner import longest_clip

CLIP_POSITIONS = 4096  # more positions than a clip has
MIN_COPY = 16  # positions that are worth copying from another row

Keys = Int[np.ndarray, "T"]


def _no_keys() -> Keys:
    return np.zeros(0, np.int64)


@dataclass(eq=False)
class Row:
    """A row of an engine.

    Attributes:
        index: its number.
        keys: what stands at each position whose keys and values it holds, see `position_keys`.
        busy: whether a reply uses it.
        keep: whether a conversation may go on from it: it is evicted last.
        owner: that conversation, if it is known; it is not kept alive.
        last_used: when, as a count.
    """

    index: int
    keys: Keys = field(default_factory=_no_keys)
    busy: bool = False
    keep: bool = False
    owner: weakref.ref[object] | None = None
    last_used: int = 0

    @property
    def is_kept(self) -> bool:
        """Whether a conversation may go on from it still."""
        return self.keep and (self.owner is None or self.owner() is not None)


@dataclass(frozen=True)
class Placement:
    """Where a prompt is read.

    Attributes:
        row: the row.
        known: positions of it that the row holds.
        evicts: whether a conversation that may go on loses what it has read.
    """

    row: Row
    known: int
    evicts: bool


class PrefixCache:
    """The rows and what they hold.

    Attributes:
        rows: all of them.
    """

    def __init__(self):
        self.rows: list[Row] = []
        self._clock = 0

    def resize(self, count: int) -> None:
        """Add rows up to this number, or forget all for 0."""
        if not count:
            self.rows = []
        self.rows += [Row(index) for index in range(len(self.rows), count)]

    def place(
        self, keys: Keys, conversation: object | None, part_of: Callable[[int], int]
    ) -> Placement | None:
        """A row for a prompt; None if all are busy.

        The last position is always read: its hidden state chooses the first token.

        Args:
            keys: of the prompt.
            conversation: what it belongs to, if that is known.
            part_of: the part of the devices that holds a row.
        """
        free = [row for row in self.rows if not row.busy]
        if not free:
            return None
        common = {row.index: common_prefix(row.keys, keys[:-1]) for row in self.rows}

        def known(row: Row) -> int:
            return common[row.index]

        target = max(
            (row for row in free if _goes_on(row, conversation, known(row))),
            key=lambda row: (known(row), -row.last_used),
            default=None,
        )
        goes_on = target is not None
        if target is None:
            load = Counter(part_of(row.index) for row in self.rows if row.busy)
            target = min(
                free,
                key=lambda row: (
                    row.is_kept,
                    load[part_of(row.index)],
                    len(row.keys) > 0,
                    row.last_used,
                ),
            )
        return Placement(target, known(target), target.is_kept and not goes_on)

    def better_source(
        self, row: Row, keys: Keys, part_of: Callable[[int], int]
    ) -> tuple[Row, int] | None:
        """A row that knows more of a prompt than the one it was placed in, worth copying from.

        Args:
            row: where it was placed.
            keys: of the prompt.
            part_of: as of `place`: rows are copied within a part.

        Returns:
            The row, and how much it knows.
        """
        alike = [other for other in self.rows if part_of(other.index) == part_of(row.index)]
        known = {other.index: common_prefix(other.keys, keys[:-1]) for other in alike}
        best = max(alike, key=lambda other: known[other.index])
        gain = known[best.index] - known[row.index]
        return (best, known[best.index]) if gain >= MIN_COPY else None

    def take(self, row: Row, keys: Keys, conversation: object | None, *, keep: bool) -> None:
        """A reply begins to use a row that holds these positions."""
        self._clock += 1
        row.busy, row.keep, row.keys, row.last_used = True, keep, keys, self._clock
        row.owner = None if conversation is None else weakref.ref(conversation)

    def forget(self, row: Row) -> None:
        """A row no longer holds what it held."""
        row.keys, row.keep, row.owner = _no_keys(), False, None

    @property
    def is_disposable(self) -> bool:
        """Whether nothing is under way and no conversation may go on."""
        return not any(row.busy or row.is_kept for row in self.rows)


def _goes_on(row: Row, conversation: object | None, known: int) -> bool:
    """Whether a prompt goes on from what a row holds, or from an earlier point of it.

    Without a conversation that tells, it does if most of the row is its beginning.
    """
    if conversation is not None:
        return row.owner is not None and row.owner() is conversation
    return row.owner is None and known > 0 and 2 * known >= len(row.keys)


def position_keys(request: Request, *, parity: bool) -> Keys:
    """What stands at each position: a token's id, or a negative number for a frame of a clip.

    With `parity` a clip is another one once a longer clip is said: officially all are padded to it.
    """
    keys = request.ids.astype(np.int64)
    salt = longest_clip(request).to_bytes(8) if parity else b""
    for mel, start, count in zip(request.mels, request.starts, request.counts, strict=True):
        data = np.ascontiguousarray(mel).tobytes()
        digest = hashlib.blake2b(data, digest_size=6, salt=salt).digest()
        keys[start : start + count] = (
            -1 - np.arange(count) - CLIP_POSITIONS * int.from_bytes(digest)
        )
    return keys


def common_prefix(a: Keys, b: Keys) -> int:
    """Length of the beginning that two rows share."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def joined(keys: Sequence[Keys]) -> Keys:
    """Positions one after the other."""
    return np.concatenate([np.asarray(part, np.int64) for part in keys])
