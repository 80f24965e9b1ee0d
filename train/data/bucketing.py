"""Bucketing: batches of samples of similar length, in an order that depends on a seed alone.

Data of single networks: prepared folders of clips, in batches of like length. The language model
has another system, samples in shards that are packed into rows: `data.samples`, `language.data`.

What a sample is, and how a batch is made of some, says a subclass; see `flow_data` and
`speech_data`. The order is planned an epoch at a time, so a place in it is two numbers.
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NotRequired, Self, TypedDict, TypeVar, Unpack

import numpy as np
from jaxtyping import Int

from sa2jax.errors import DataError

BatchT = TypeVar("BatchT")


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """How samples become batches.

    Attributes:
        rows: rows of a batch, of all hosts.
        buckets: lengths that batches are padded to, in rising order; each compiles a step.
        oversample: how often an epoch has the samples of each bucket; none for once each.
        shuffle: another order every epoch.
        epochs: how often; None for without end.
    """

    rows: int = 8
    buckets: tuple[int, ...] = ()
    oversample: tuple[int, ...] = ()
    shuffle: bool = True
    epochs: int | None = None

    def __post_init__(self):
        if self.rows < 1 or (self.epochs is not None and self.epochs < 1):
            raise DataError(
                f"expected rows and epochs of at least 1, got {self.rows} and {self.epochs}"
            )
        if not self.buckets or min(self.buckets) < 1 or list(self.buckets) != sorted(self.buckets):
            raise DataError(f"expected buckets in rising order, got {self.buckets}")
        if self.oversample and (
            len(self.oversample) != len(self.buckets) or min(self.oversample) < 1
        ):
            raise DataError(
                f"often={list(self.oversample)}: expected a number of at least 1 for each of the "
                f"{len(self.buckets)} buckets"
            )


class Order(TypedDict):
    """Which batches are given out, and when: keywords of all that is a `BucketData`.

    Attributes:
        seed: of the order.
        host: which of the hosts this is, by default the first; each gets other rows of the same
            batches.
        hosts: how many there are, by default 1.
    """

    seed: int
    host: NotRequired[int]
    hosts: NotRequired[int]


class BucketData(ABC, Generic[BatchT]):
    """Batches in an order that depends on the seed alone; an iterator with a state to go back to.

    A batch holds samples of like length. At an epoch's end each bucket gives what is left, with
    empty rows beside it: everything is seen once an epoch.

    Args:
        config: how samples become batches.
        folder: where they lie, for what is said.
        lengths: of each sample, in the unit of the buckets.
        identity: hash of the samples.
        **order: seed and hosts, see `Order`.

    Attributes:
        fingerprint: of the samples, buckets and rows.
        tokens: units yielded.
        data_wait_seconds: seconds spent reading.

    Raises:
        DataError: if a sample is longer than every bucket, or the hosts do not divide the rows.
    """

    unit: ClassVar[str] = "samples"
    units_per_second: ClassVar[float] = 1.0

    def __init__(
        self,
        config: BucketConfig,
        folder: Path,
        lengths: Int[np.ndarray, "N"],
        identity: str,
        **order: Unpack[Order],
    ):
        seed, host, hosts = order["seed"], order.get("host", 0), order.get("hosts", 1)
        if not 0 <= host < hosts or config.rows % hosts:
            raise DataError(
                f"host {host} of {hosts} for rows={config.rows}: expected a host below their "
                "number, and rows as a multiple of it"
            )
        self.config, self.folder = config, folder
        self._lengths, self._seed, self._host, self._hosts = lengths, seed, host, hosts
        if int(lengths.max()) > config.buckets[-1]:
            raise DataError(
                f"{folder} holds pieces of {lengths.max()} {self.unit}: expected a bucket that "
                f"large, got {config.buckets}"
            )
        told = [identity, config.rows, list(config.buckets), config.shuffle, seed]
        told += [list(config.oversample)] if config.oversample else []
        self.fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        self.tokens, self.data_wait_seconds = 0, 0.0
        self._epoch, self._next = 0, 0
        self._plan = self._plan_epoch(0)

    @abstractmethod
    def _batch(self, room: int, chosen: Sequence[int]) -> tuple[BatchT, int]:
        """Some samples (−1 for an empty row) padded to `room`, and how many units they hold."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> BatchT:
        while self._next >= len(self._plan):
            self._epoch, self._next = self._epoch + 1, 0
            self._plan = self._plan_epoch(self._epoch)
        if self.config.epochs is not None and self._epoch >= self.config.epochs:
            raise StopIteration
        started = time.perf_counter()
        room, chosen = self._plan[self._next]
        self._next += 1
        batch, count = self._batch(room, chosen[self._host :: self._hosts])
        self.tokens += count
        self.data_wait_seconds += time.perf_counter() - started
        return batch

    @property
    def audio_seconds(self) -> float:
        """Seconds of audio yielded."""
        return self.tokens / self.units_per_second

    def empty_batch(self) -> BatchT:
        """A batch of which nothing can be learnt, for a host that has no more while others do."""
        return self._batch(self.config.buckets[0], [-1] * (self.config.rows // self._hosts))[0]

    def close(self) -> None:
        """Nothing is open between batches."""

    def state(self) -> dict[str, Any]:
        """Where the next batch stands, for JSON."""
        return {"fingerprint": self.fingerprint, "epoch": self._epoch, "batch": self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back (or on) to where `state` was taken.

        Raises:
            DataError: if it was taken of other data.
        """
        if state.get("fingerprint") != self.fingerprint:
            raise DataError("the data, its rows, its buckets or its seed have changed: start anew")
        self._epoch, self._next = state["epoch"], state["batch"]
        self._plan = self._plan_epoch(self._epoch)

    def _plan_epoch(self, epoch: int) -> list[tuple[int, list[int]]]:
        """Each batch's padded length and samples, −1 for an empty row."""
        order = np.arange(len(self._lengths))
        rooms = np.searchsorted(self.config.buckets, self._lengths)  # the first that is as long
        if self.config.oversample:
            order = np.repeat(order, np.asarray(self.config.oversample)[rooms])
        if self.config.shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        waiting: dict[int, list[int]] = {room: [] for room in self.config.buckets}
        plan = []
        for index in order:
            room = self.config.buckets[rooms[index]]
            waiting[room].append(int(index))
            if len(waiting[room]) == self.config.rows:
                plan.append((room, waiting.pop(room)))
                waiting[room] = []
        for room, rest in sorted(waiting.items()):
            if rest:
                plan.append((room, rest + [-1] * (self.config.rows - len(rest))))
        return plan
