"""The data of a training: from files to batches, in an order that can be gone back to exactly.

    data = make_data(DataConfig(sources={"talks": 1.0}, rows=8), tokenizer, cfg, seed=0)
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import grain
import numpy as np

from sa2jax.audio.rates import MEL_RATE
from sa2jax.chat.template import PROMPT_STYLES, PromptStyle
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.config import StepAudio2Config
from sa2jax.errors import DataError
from sa2jax.train.data.examples import KINDS, Example, make_example
from sa2jax.train.data.records import RecordError
from sa2jax.train.data.samples import Reject, Sample, names_of, open_source
from sa2jax.train.language.packing import Pack, PackedRow, RowShape
from sa2jax.train.language.step import Batch

READ = {"num_threads": 4, "prefetch_buffer_size": 16}  # samples that a process reads ahead
AHEAD, MOST_AHEAD = 2, 16  # rows that are ready before they are asked for, of each process


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from, and in which form.

    Attributes:
        sources: files and folders, see `samples.open_source`, and the weight of each: how many
            samples are drawn from it in relation to the others (to about 1 %).
        length: tokens of a row.
        rows: rows of an update, of all hosts.
        parts: how many parts an update's rows are split into, one after another; 0 for no split.
        mel_rows: rows of sound of each row; a second of sound takes 12.5 tokens. 0 for text only.
        mel_frames: frames (100 Hz) of each, a multiple of 8.
        clips: clips (of at most 25 s) that each can hold.
        prompt_style: `chat`, or `base` for base models, see `examples.make_example`.
        weights: of the tokens of each kind in the loss.
        shuffle: draw samples in another order every epoch, rather than in that of the files.
        epochs: how often; None for without end. Of a mixture, an epoch ends when the first of its
            sources has been seen once; in the next, all go on where they were.
        workers: processes that prepare rows; 0 for threads of this one.
        max_rejects: samples that may be unusable.
        pack: False for one example a row.
    """

    sources: Mapping[str, float]
    length: int = 4096
    rows: int = 1
    parts: int = 0
    mel_rows: int = 1
    mel_frames: int = 3000
    clips: int = 8
    prompt_style: PromptStyle = "chat"
    weights: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    shuffle: bool = True
    epochs: int | None = None
    workers: int = 0
    max_rejects: int = 100
    pack: bool = True

    def __post_init__(self):
        if not self.sources or not all(0 < w < float("inf") for w in self.sources.values()):
            raise DataError(
                f"expected one or more sources, each with a weight above 0, got {self.sources}"
            )
        for name, least in {"length": 2, "rows": 1, "parts": 0, "mel_rows": 0, "workers": 0,
                            "max_rejects": 0, "clips": 1}.items():  # fmt: skip
            if getattr(self, name) < least:
                raise DataError(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.epochs is not None and self.epochs < 1:
            raise DataError(f"epochs={self.epochs}: expected at least 1, or None for without end")
        if self.parts and self.rows % self.parts:
            raise DataError(f"rows={self.rows}: expected a multiple of parts={self.parts}")
        if self.prompt_style not in PROMPT_STYLES:
            expected = ", ".join(PROMPT_STYLES)
            raise DataError(f"prompt_style={self.prompt_style!r}: expected one of {expected}")
        if set(self.weights) - set(KINDS) or not all(w >= 0 for w in self.weights.values()):
            raise DataError(
                f"weights={dict(self.weights)}: expected numbers from 0 for {', '.join(KINDS)}"
            )
        self.shape(1)

    def shape(self, mels: int, pad: int = 0) -> RowShape:
        """The size of a row for a model with so many mel bands."""
        return RowShape(
            length=self.length, mel_rows=self.mel_rows, mel_frames=self.mel_frames,
            clips=self.clips, mels=mels, pad=pad,
        )  # fmt: skip


def make_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    cfg: StepAudio2Config,
    *,
    seed: int,
    host: int = 0,
    hosts: int = 1,
    rejects: str | os.PathLike[str] | None = None,
) -> "Data":
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
    if config.parts and config.rows // hosts % config.parts:
        raise DataError(
            f"rows={config.rows} on {hosts} hosts: expected a multiple of {hosts} × "
            f"parts={config.parts}"
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
    maker = _Maker(tokenizer, cfg, config.prompt_style, dict(config.weights))
    labels = names_of([Path(path).absolute() for path in sources]) if len(sources) > 1 else [""]
    makers = [replace(maker, label=label) for label in labels]
    rows = _rows(config, list(sources.values()), makers, shape, seed, host, hosts)
    # Where rows come from and in which order; not the names of paths, which may move.
    facts: dict[str, Any] = asdict(config) | {"sources": [
        [weight, sources[path].fingerprint] for path, weight in config.sources.items()
    ]}  # fmt: skip
    del facts["max_rejects"]
    facts |= {"shape": asdict(shape), "seed": seed, "hosts": hosts}
    facts["tokenizer"] = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    total = sum(config.sources.values())
    longest = max(len(sources[path]) * total / w for path, w in config.sources.items())
    place = None if rejects is None else Path(rejects)
    if place is not None and hosts > 1:
        place = place.with_name(f"{place.stem}-{host}{place.suffix}")
    return Data(
        rows, config, shape, fingerprint, host=host, hosts=hosts, rejects=place,
        patience=int(longest) + 1,
    )  # fmt: skip


# --- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maker:
    """Makes examples; sent to worker processes.

    Attributes:
        tokenizer: the checkpoint's.
        cfg: the model's sizes.
        prompt_style: of the prompts.
        weights: of the tokens of each kind.
        label: what the source is called where there are several: each may have a "train.jsonl".
    """

    tokenizer: Tokenizer
    cfg: StepAudio2Config
    prompt_style: PromptStyle
    weights: Mapping[str, float]
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
                weights=self.weights,
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


def _rows(
    config: DataConfig, sources: Sequence[Any], makers: Sequence[_Maker], shape: RowShape,
    seed: int, host: int, hosts: int,
) -> grain.IterDataset:  # fmt: skip
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
    rows = Pack(mixed.to_iter_dataset(grain.ReadOptions(**READ)), shape, pack=config.pack)
    if not config.workers:
        ahead = min(max(AHEAD, 2 * config.rows // hosts), MOST_AHEAD)
        return grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=ahead)
    _mark_flags()
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=AHEAD)
    return rows.mp_prefetch(options, worker_init_fn=_begin_worker)


def _mark_flags() -> None:
    """Grain's processes read absl's flags, which nobody parses in a program without absl."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _begin_worker(index: int, count: int) -> None:
    """A worker prepares data only: it must not take an accelerator."""
    import jax

    jax.config.update("jax_platforms", "cpu")


# --- batches ------------------------------------------------------------------------------------


_HEARD = ("mels", "starts", "frames")  # of each mel row


def collate(
    rows: Sequence[PackedRow], shape: RowShape, *, parts: int = 0, host: int = 0
) -> dict[str, Any]:
    """Rows as the fields of a `Batch`.

    Args:
        rows: of this host, R of them.
        shape: the size of each.
        parts: how many parts they are split into; 0 for no split.
        host: this host. Slots count the clips of all hosts, those of host 0 first, since a step
            sees the batches of all hosts as one.

    Returns:
        ids, targets, weights, segments, positions and slots [R, T]; mels [R·W, M, L]; starts and
        frames [R·W, S]; streams, a mask [R, T] for each of `KINDS`. With parts, a leading axis of
        them, and R / parts in place of R.
    """
    each = len(rows) // max(1, parts)

    def joined(name: str, per_row: int = 1) -> np.ndarray:
        stack = np.stack([row[name] for row in rows])
        lead = (parts, each * per_row) if parts else (each * per_row,)
        return stack.reshape(*lead, *stack.shape[1 + (name in _HEARD) :])

    names = ("ids", "targets", "weights", "segments", "positions")
    fields: dict[str, Any] = {name: joined(name) for name in names}
    kinds, inside = joined("kinds"), fields["segments"] > 0
    fields["streams"] = {name: inside & (kinds == n) for n, name in enumerate(KINDS)}
    if shape.mel_rows:
        slots = joined("slots")
        first = shape.features * (host * each + np.arange(each, dtype=np.int32))[:, None]
        fields["slots"] = np.where(slots >= 0, slots + first, -1).astype(np.int32)
        fields |= {name: joined(name, shape.mel_rows) for name in _HEARD}
    return fields


class Data(Iterator[Batch]):
    """Batches, one after another; made by `make_data`.

    Attributes:
        fingerprint: of the sources' contents and of all that the order of batches depends on;
            the same on all hosts.
        waited: seconds spent in `__next__`.
        seconds_heard: seconds of sound in the batches so far.
        tokens: positions in the batches so far, padding left out.
        batches: batches so far.
        rejected: why samples could not be used, by where they stand.
    """

    def __init__(
        self, rows: grain.IterDataset, config: DataConfig, shape: RowShape, fingerprint: str, *,
        host: int = 0, hosts: int = 1, rejects: Path | None = None, patience: int = 1,
    ):  # fmt: skip
        self._dataset, self._config, self._shape = rows, config, shape
        self._host, self._size = host, config.rows // hosts
        self._file, self._patience = rejects, patience
        self._rows = iter(rows)
        self._in_vain, self._listed = 0, False
        self.fingerprint = fingerprint
        self.waited = self.seconds_heard = 0.0
        self.tokens = self.batches = 0
        self.rejected: dict[str, str] = {}

    def __next__(self) -> Batch:
        """The next batch; its last rows are empty if the data ends there.

        Raises:
            DataError: if more than `max_rejects` samples could not be used, or none could.
        """
        begun = time.perf_counter()
        try:
            return self._next()
        finally:
            self.waited += time.perf_counter() - begun

    def _next(self) -> Batch:
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
        self.seconds_heard += sum(int(row["frames"].sum()) for row in rows) / MEL_RATE
        return self._batch(rows)

    def empty(self) -> Batch:
        """A batch without anything, for a host whose data ends before that of others."""
        return self._batch([])

    def _batch(self, rows: Sequence[PackedRow]) -> Batch:
        whole = [*rows, *[self._shape.empty()] * (self._size - len(rows))]
        return Batch(**collate(whole, self._shape, parts=self._config.parts, host=self._host))

    def state(self) -> dict[str, Any]:
        """Where this is, as plain JSON data."""
        return copy.deepcopy({
            "fingerprint": self.fingerprint,
            "host": self._host,
            "rows": self._rows.get_state(),
            "in_vain": self._in_vain,
            "batches": self.batches,
            "tokens": self.tokens,
            "seconds_heard": self.seconds_heard,
            "rejected": self.rejected,
        })  # fmt: skip

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
        self._in_vain, self.batches = state["in_vain"], state["batches"]
        self.tokens, self.seconds_heard = state["tokens"], state["seconds_heard"]
        self.rejected, self._listed = state["rejected"], False

    def close(self) -> None:
        """Stop the threads and processes that prepare rows."""
        self._rows.close()

    def _take_rejects(self, rejects: Sequence[Reject], *, used: bool) -> None:
        self._in_vain = 0 if used else self._in_vain + len(rejects)
        fresh = {r.where: r.reason for r in rejects if r.where not in self.rejected}
        self.rejected |= fresh
        self._list(fresh)
        if len(self.rejected) > self._config.max_rejects:
            raise DataError(
                f"{len(self.rejected)} samples cannot be used, more than "
                f"max_rejects={self._config.max_rejects}{self._last()}"
            )
        if self._in_vain >= self._patience:  # no end of data would ever stop this
            raise DataError(f"no sample can be used{self._last()}")

    def _last(self) -> str:
        where, reason = list(self.rejected.items())[-1]
        listed = "" if self._file is None else f"; all are listed in {self._file}"
        return f"; the last is {where}: {reason}{listed}"

    def _list(self, fresh: Mapping[str, str]) -> None:
        """Add to the file of rejects; the first time it is written anew."""
        if self._file is None or not fresh:
            return
        found, mode = (fresh, "a") if self._listed else (self.rejected, "w")
        lines = [{"where": where, "reason": reason} for where, reason in found.items()]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open(mode, encoding="utf-8") as handle:
                handle.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        except OSError as error:
            raise DataError(f"{self._file} cannot be written: {error.strerror}") from None
        self._listed = True
