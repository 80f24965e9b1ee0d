"""Input pipeline of the language model: from files to batches, in an order that resumes exactly.

Data of the language model: samples in shards, packed into rows. Single networks have another
system, prepared folders of clips in batches of like length: `data.recordings`.

    data = make_language_data(DataConfig(sources={"talks": 1.0}, rows=8), tokenizer, cfg, seed=0)
    for batch in data:
        state, report = step(state, place_batch(batch, mesh))
        saved = data.state()  # later, in another process: data.restore(saved)

    sources -> shuffle -> mixture -> epochs -> this host's share -> examples -> rows -> batches

Up to the rows it all happens in threads, or with `workers` in processes of their own; a script that
has workers needs `if __name__ == "__main__":`, as with all Python multiprocessing.
"""

import copy
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grain
import numpy as np

from sa2jax.atomic_io import write_text
from sa2jax.audio.rates import MEL_RATE
from sa2jax.chat.template import PromptStyle
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.config import StepAudio2Config
from sa2jax.errors import DataError
from sa2jax.train.data.examples import (
    TOKEN_KINDS,
    Example,
    make_example,
)
from sa2jax.train.data.records import RecordError
from sa2jax.train.data.samples import (
    JsonlSource,
    Reject,
    Sample,
    ShardSource,
    display_names,
    open_source,
)
from sa2jax.train.language.data_config import DataConfig
from sa2jax.train.language.packing import Pack, PackedRow, RowShape
from sa2jax.train.language.step import LanguageBatch

READ_OPTIONS = {"num_threads": 4, "prefetch_buffer_size": 16}  # samples that a process reads ahead
MIN_PREFETCH, MAX_PREFETCH = 2, 16  # rows that are ready before they are asked for, of each process


def make_language_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    cfg: StepAudio2Config,
    *,
    seed: int,
    host: int = 0,
    hosts: int = 1,
    rejects: str | os.PathLike[str] | None = None,
) -> "LanguageData":
    """Batches for a training.

    Args:
        config: what is learnt from.
        tokenizer: the checkpoint's tokenizer.
        cfg: the model's sizes.
        seed: of the order.
        host: which of the hosts this is; each draws other samples.
        hosts: how many there are.
        rejects: a jsonl file to list the samples in that cannot be used; with several hosts each
            has one of its own.

    Raises:
        DataError: if a source cannot be used or the sizes do not fit each other.
    """
    if not 0 <= host < hosts or config.rows % hosts:
        raise DataError(
            f"host {host} of {hosts} for rows={config.rows}: expected a host below their number, "
            "and rows as a multiple of it"
        )
    if config.accumulation_steps and config.rows // hosts % config.accumulation_steps:
        raise DataError(
            f"rows={config.rows} on {hosts} hosts: expected a multiple of {hosts} × "
            f"accumulation_steps={config.accumulation_steps}"
        )
    if seed < 0:
        raise DataError(f"seed={seed}: expected 0 or more")
    if tokenizer.size > cfg.decoder.vocab:
        raise DataError(
            f"the tokenizer has {tokenizer.size} tokens, the model a vocabulary of "
            f"{cfg.decoder.vocab}: take both from the same checkpoint"
        )
    mels = cfg.audio_encoder.mels
    sources = {path: open_source(path, mels) for path in config.sources}
    for path, source in sources.items():
        if source.n_mels != mels:
            raise DataError(
                f"{path} has {source.n_mels} mel bands, the model hears {mels}: run `sa2jax data "
                "prepare` again with --model"
            )
    shape = config.shape(mels, tokenizer.special.end_of_text)
    maker = _ExampleMaker(tokenizer, cfg, config.prompt_style, dict(config.loss_weights))
    labels = (
        display_names([Path(path).absolute() for path in sources]) if len(sources) > 1 else [""]
    )
    makers = [replace(maker, label=label) for label in labels]
    rows = _packed_rows(config, list(sources.values()), makers, shape, seed, host, hosts)
    # Where rows come from and in which order; not the names of paths, which may move.
    facts: dict[str, Any] = asdict(config) | {
        "sources": [[weight, sources[path].fingerprint] for path, weight in config.sources.items()]
    }
    del facts["max_rejects"]
    facts |= {"shape": asdict(shape), "seed": seed, "hosts": hosts}
    facts["tokenizer"] = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    total = sum(config.sources.values())
    longest = max(len(sources[path]) * total / w for path, w in config.sources.items())
    place = None if rejects is None else Path(rejects)
    if place is not None and hosts > 1:
        place = place.with_name(f"{place.stem}-{host}{place.suffix}")
    return LanguageData(
        rows,
        config,
        shape,
        fingerprint,
        host=host,
        hosts=hosts,
        rejects=place,
        max_consecutive_rejects=int(longest) + 1,
        sources=tuple(sources.values()),
    )


# --- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ExampleMaker:
    """Makes examples; sent to worker processes.

    Attributes:
        tokenizer: the checkpoint's.
        cfg: the model's sizes.
        prompt_style: of the prompts.
        loss_weights: of the tokens of each kind.
        label: what the source is called where there are several: each may have a "train.jsonl".
    """

    tokenizer: Tokenizer
    cfg: StepAudio2Config
    prompt_style: PromptStyle
    loss_weights: Mapping[str, float]
    label: str = ""

    def __call__(self, sample: Sample | Reject) -> Example | Reject:
        if isinstance(sample, Reject):
            return replace(sample, where=self._place(sample.where))
        where = self._place(sample.record.where)
        try:
            example = make_example(
                sample,
                self.tokenizer,
                self.cfg,
                prompt_style=self.prompt_style,
                loss_weights=self.loss_weights,
            )
            return replace(example, where=where)
        except RecordError as error:
            return Reject(where, str(error))

    def _place(self, where: str) -> str:
        file, _, line = where.rpartition(":")
        if not self.label:
            return where
        same = Path(self.label).name == file
        return f"{self.label}:{line}" if same else f"{self.label}/{where}"


def _packed_rows(
    config: DataConfig,
    sources: Sequence[Any],
    makers: Sequence[_ExampleMaker],
    shape: RowShape,
    seed: int,
    host: int,
    hosts: int,
) -> grain.IterDataset:
    """The pipeline up to packed rows."""
    drawn = [grain.MapDataset.source(source) for source in sources]
    if config.shuffle:
        # Unrelated seeds: Grain adds the epoch's number to each.
        seeds = np.random.SeedSequence(seed).generate_state(len(drawn)).tolist()
        drawn = [d.shuffle(seed=own) for d, own in zip(drawn, seeds, strict=True)]
    made = [d.map(maker) for d, maker in zip(drawn, makers, strict=True)]
    weights = list(config.sources.values())
    mixed = grain.MapDataset.mix(made, weights) if len(made) > 1 else made[0]
    mixed = mixed.repeat(config.epochs).slice(slice(host, None, hosts))
    rows = Pack(mixed.to_iter_dataset(grain.ReadOptions(**READ_OPTIONS)), shape, pack=config.pack)
    if not config.workers:
        ahead = min(max(MIN_PREFETCH, 2 * config.rows // hosts), MAX_PREFETCH)
        return grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=ahead)
    _mark_flags()
    options = grain.MultiprocessingOptions(
        num_workers=config.workers, per_worker_buffer_size=MIN_PREFETCH
    )
    return rows.mp_prefetch(options, worker_init_fn=_init_worker)


def _mark_flags() -> None:
    """Grain's processes read absl's flags, which nobody parses in a program without absl."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _init_worker(index: int, count: int) -> None:
    """A worker prepares data only: it must not take an accelerator."""
    import jax

    jax.config.update("jax_platforms", "cpu")


# --- batches ------------------------------------------------------------------------------------


_PER_MEL_ROW = ("mels", "starts", "frames")  # of each mel row


def collate(
    rows: Sequence[PackedRow], shape: RowShape, *, accumulation_steps: int = 0, host: int = 0
) -> dict[str, Any]:
    """Rows as the fields of a `LanguageBatch`.

    Args:
        rows: of this host, R of them.
        shape: the size of each.
        accumulation_steps: micro-batches that they are split into; 0 for no split.
        host: this host. Feature indices count the clips of all hosts, those of host 0 first, since
            a step sees the batches of all hosts as one.

    Returns:
        ids, targets, weights, segments, positions and feature_index [R, T]; mels [R·W, M, L];
        starts and frames [R·W, S]; metric_masks, a mask [R, T] for each of `TOKEN_KINDS`. With
        accumulation, a leading axis of micro-batches, and R / accumulation_steps in place of R.
    """
    each = len(rows) // max(1, accumulation_steps)

    def joined(name: str, per_row: int = 1) -> np.ndarray:
        stack = np.stack([row[name] for row in rows])
        lead = (accumulation_steps, each * per_row) if accumulation_steps else (each * per_row,)
        return stack.reshape(*lead, *stack.shape[1 + (name in _PER_MEL_ROW) :])

    names = ("ids", "targets", "weights", "segments", "positions")
    fields: dict[str, Any] = {name: joined(name) for name in names}
    kinds, inside = joined("kinds"), fields["segments"] > 0
    fields["metric_masks"] = {name: inside & (kinds == n) for n, name in enumerate(TOKEN_KINDS)}
    if shape.mel_rows:
        index = joined("feature_index")
        first = shape.features * (host * each + np.arange(each, dtype=np.int32))[:, None]
        fields["feature_index"] = np.where(index >= 0, index + first, -1).astype(np.int32)
        fields |= {name: joined(name, shape.mel_rows) for name in _PER_MEL_ROW}
    return fields


class LanguageData(Iterator[LanguageBatch]):
    """Batches, one after another; made by `make_language_data`.

    Attributes:
        fingerprint: of the sources' contents and of all that the order of batches depends on;
            the same on all hosts.
        data_wait_seconds: seconds spent in `__next__`.
        audio_seconds: seconds of sound in the batches so far.
        tokens: positions in the batches so far, padding left out.
        batches: batches so far.
        rejected: why samples could not be used, by where they stand.
    """

    def __init__(
        self,
        rows: grain.IterDataset,
        config: DataConfig,
        shape: RowShape,
        fingerprint: str,
        *,
        host: int = 0,
        hosts: int = 1,
        rejects: Path | None = None,
        max_consecutive_rejects: int = 1,
        sources: Sequence[JsonlSource | ShardSource] = (),
    ):
        self._sources = sources
        self._dataset, self._config, self._shape = rows, config, shape
        self._host, self._size = host, config.rows // hosts
        self._file, self._max_consecutive_rejects = rejects, max_consecutive_rejects
        self._rows = iter(rows)
        self._consecutive_rejects, self._listed = 0, False
        self.fingerprint = fingerprint
        self.data_wait_seconds = self.audio_seconds = 0.0
        self.tokens = self.batches = 0
        self.rejected: dict[str, str] = {}

    def __next__(self) -> LanguageBatch:
        """The next batch; its last rows are empty if the data ends there.

        Raises:
            DataError: if more than `max_rejects` samples could not be used, or none could.
        """
        begun = time.perf_counter()
        try:
            return self._next()
        finally:
            self.data_wait_seconds += time.perf_counter() - begun

    def _next(self) -> LanguageBatch:
        rows: list[PackedRow] = []
        while len(rows) < self._size:
            row = next(self._rows, None)
            if row is None:
                if not rows and not self.batches and self.rejected:
                    raise DataError(f"no sample can be used{self._last()}")
                if not rows:
                    raise StopIteration
                break
            self._take_rejects(row["rejects"], used=bool(row["segments"][0]))
            if row["segments"][0]:
                rows.append(row)
        self.batches += 1
        self.tokens += sum(int((row["segments"] > 0).sum()) for row in rows)
        self.audio_seconds += sum(int(row["frames"].sum()) for row in rows) / MEL_RATE
        return self._batch(rows)

    def empty_batch(self) -> LanguageBatch:
        """A batch without anything, for a host whose data ends before that of others."""
        return self._batch([])

    def _batch(self, rows: Sequence[PackedRow]) -> LanguageBatch:
        whole = [*rows, *[self._shape.empty()] * (self._size - len(rows))]
        return LanguageBatch(
            **collate(
                whole,
                self._shape,
                accumulation_steps=self._config.accumulation_steps,
                host=self._host,
            )
        )

    def recordings_fingerprint(self) -> str:
        """Of the recordings that are no part of the sources' own contents."""
        parts = "".join(source.recordings_fingerprint() for source in self._sources)
        return hashlib.sha256(parts.encode()).hexdigest()

    def state(self) -> dict[str, Any]:
        """Where this is, as plain JSON data."""
        return copy.deepcopy(
            {
                "fingerprint": self.fingerprint,
                "host": self._host,
                "rows": self._rows.get_state(),
                "consecutive_rejects": self._consecutive_rejects,
                "batches": self.batches,
                "tokens": self.tokens,
                "audio_seconds": self.audio_seconds,
                "rejected": self.rejected,
            }
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch after which the state was taken, bit for bit.

        Raises:
            DataError: for the state of other data, other settings or another host.
        """
        own = {"fingerprint": self.fingerprint, "host": self._host}
        for name, value in own.items():
            if state.get(name) != value:
                raise DataError(
                    f"this state has {name} {state.get(name)!s:.12}, this data {value!s:.12}: "
                    "expected the same sources, settings, seed, hosts and workers as when it was "
                    "saved"
                )
        state = copy.deepcopy(dict(state))
        self._rows.close()
        self._rows = iter(self._dataset)
        self._rows.set_state(state["rows"])
        self._consecutive_rejects, self.batches = state["consecutive_rejects"], state["batches"]
        self.tokens, self.audio_seconds = state["tokens"], state["audio_seconds"]
        self.rejected, self._listed = state["rejected"], False

    def close(self) -> None:
        """Stop the threads and processes that prepare rows."""
        self._rows.close()

    def _take_rejects(self, rejects: Sequence[Reject], *, used: bool) -> None:
        self._consecutive_rejects = 0 if used else self._consecutive_rejects + len(rejects)
        fresh = {r.where: r.reason for r in rejects if r.where not in self.rejected}
        self.rejected |= fresh
        self._list(fresh)
        if len(self.rejected) > self._config.max_rejects:
            raise DataError(
                f"{len(self.rejected)} samples cannot be used, more than "
                f"max_rejects={self._config.max_rejects}{self._last()}"
            )
        if (
            self._consecutive_rejects >= self._max_consecutive_rejects
        ):  # no end of data would ever stop this
            raise DataError(f"no sample can be used{self._last()}")

    def _last(self) -> str:
        where, reason = list(self.rejected.items())[-1]
        listed = "" if self._file is None else f"; all are listed in {self._file}"
        return f"; the last is {where}: {reason}{listed}"

    def _list(self, fresh: Mapping[str, str]) -> None:
        """Add to the file of rejects; the first time it is written anew."""
        if self._file is None or not fresh:
            return
        found = fresh if self._listed else self.rejected
        rows = ({"where": where, "reason": reason} for where, reason in found.items())
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if not self._listed:
                write_text(self._file, "")  # a new file: nothing is written through a link
            with self._file.open("a", encoding="utf-8") as handle:
                handle.write(text)
        except OSError as error:
            raise DataError(f"{self._file} cannot be written: {error.strerror}") from None
        self._listed = True
