"""Prepare training data: records and recordings to shards.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.

    about = prepare_dataset(["talks.jsonl"], "ready", PrepareConfig(model="mini"))

Recordings become log-mel frames, spoken answers audio codes, in the order of the records. What
cannot be used is written to rejects.jsonl. The same input gives the same bytes.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from sa2jax import audio
from sa2jax.atomic_io import keep_sources, new_folder
from sa2jax.errors import AudioError, DataError
from sa2jax.train.data.model_folder import FeatureSpec, ModelFolder
from sa2jax.train.data.readers import Sound, TfioReader, TfRecord
from sa2jax.train.data.records import Record, RecordError, parse_record
from sa2jax.train.data.row_index import RowIndex
from sa2jax.train.data.samples import (
    DATASET_JSON,
    Reject,
    Sample,
    display_names,
    given_codes,
    jsonl_files,
    load_features,
)
from sa2jax.train.data.shards import (
    REJECTS,
    DatasetStatistics,
    RejectWriter,
    ShardWriter,
    length_plotter,
    shard_limits,
)

LENGTHS = "lengths.png"
TFRECORD = ".tfrecord"
_BATCH_RECORDINGS = 64  # recordings whose codes are found together
_MAX_PENDING_BYTES = 256 << 20  # bytes of samples that may wait for them
_RECORDS_PER_WORKER = 64  # records for which another process is worth its start


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How a data set is prepared.

    Attributes:
        model: folder of the model to train: its mel bands, its tokenizer (for counting) and its
            speech tokenizer, which makes codes of spoken answers.
        reader: who reads recordings, see `readers`.
        tfio_python: the interpreter of tensorflow-io's environment.
        shard_size: largest shard such as "1GB", or a plain number of samples.
        workers: processes that read and compute features; by default one for each core.
        max_rejects: records that may be unusable.
        channel: which channel of recordings is heard, see `audio.AudioSource`.
    """

    model: str | Path | None = None
    reader: Literal["soundfile", "tfio"] = "soundfile"
    tfio_python: str | Path | None = None
    shard_size: str = "1GB"
    workers: int | None = None
    max_rejects: int = 100
    channel: audio.Channel | None = None

    def __post_init__(self):
        if (self.workers is not None and self.workers < 1) or self.max_rejects < 0:
            raise DataError(
                f"expected workers >= 1 and max_rejects >= 0, got {self.workers} and "
                f"{self.max_rejects}"
            )
        if self.reader not in ("soundfile", "tfio"):
            raise DataError(f"unknown reader {self.reader!r}: expected soundfile or tfio")
        shard_limits(self.shard_size)


def prepare_dataset(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    config: PrepareConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Make a folder of shards, whole or not at all; `samples.ShardSource` reads it.

    It may start processes: a script that calls it needs `if __name__ == "__main__":`.

    Args:
        sources: .jsonl files, folders of them, .tfrecord files (these with the reader tfio).
        out: the folder.
        config: how.
        overwrite: replace a prepared folder that is there already.
        progress: called with (records_done, records_total), the total 0 while unknown.

    Returns:
        What dataset.json says.

    Raises:
        DataError: if a source cannot be read, too many records are unusable, or none is usable.
        CheckpointError: if `out` cannot be written, or the model's folder is damaged.
    """
    config = PrepareConfig() if config is None else config
    out = Path(os.path.abspath(out))
    if overwrite and out.is_dir() and any(out.iterdir()) and not (out / DATASET_JSON).is_file():
        raise DataError(f"{out} is no prepared folder, it is not replaced: choose another one")
    keep_sources(out, [*sources, config.model], inside=True)
    plot = length_plotter()
    model = ModelFolder.open(config.model)
    plan = replace(model.plan, channel=config.channel)
    with ExitStack() as stack:
        reader = None
        if config.reader == "tfio":
            reader = stack.enter_context(TfioReader(config.tfio_python))
        files = _Sources.open(sources, reader)
        folder = stack.enter_context(new_folder(out, overwrite=overwrite))
        rejects = stack.enter_context(RejectWriter(folder / REJECTS, out, config.max_rejects))
        writer = stack.enter_context(
            ShardWriter(folder, n_mels=model.plan.n_mels, shard_size=config.shard_size)
        )
        heard = stack.enter_context(
            closing(_load_samples(files.jobs(plan, reader), files.processes(config.workers)))
        )
        tally = DatasetStatistics(model.reader)
        for done, result in enumerate(_with_codes(heard, model), 1):
            if isinstance(result, Reject):
                rejects.add(result)
            else:
                try:
                    tally.add(result)
                    writer.add(result)
                except RecordError as error:
                    rejects.add(Reject(result.record.where, str(error)))
            progress(done, files.total)
        if not writer.samples:
            raise DataError(f"none of {len(rejects)} records can be used; {rejects.last}")
        writer.speech_tokenizer = model.analysis_hash
        writer.summary = tally.summary() | {"rejected": len(rejects)}
        plot(tally, folder / LENGTHS)
    return writer.info()


# --- from files to what is heard ----------------------------------------------------------------

_Fetched = Mapping[tuple[str, int], Sound | AudioError]


@dataclass(frozen=True, eq=False)
class _RecordJob:
    """One record to hear: a line, or a record with the sound that a reader fetched for it."""

    where: str
    root: str
    plan: FeatureSpec
    line: bytes = b""
    record: Record | None = None
    fetched: _Fetched | None = None


@dataclass(frozen=True, eq=False)
class _PendingSample:
    """A sample that still lacks the codes of these recordings (16 kHz), by turn."""

    sample: Sample
    targets: Mapping[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Sources:
    """What is to be read: rows of a file, or a TFRecord file's name, each in its turn."""

    parts: tuple[RowIndex | str, ...]

    @classmethod
    def open(cls, sources: Sequence[str | os.PathLike[str]], reader: TfioReader | None) -> Self:
        names = [os.fspath(source) for source in sources]
        files: list[Path | str] = []
        for name in names:
            if name.endswith(TFRECORD):
                if reader is None:
                    raise DataError(f"{name} is read by tensorflow-io only: give --reader tfio")
                files.append(name if "://" in name else os.path.abspath(name))
            elif "://" in name:
                raise DataError(f"{name}: a .jsonl file must be here, copy it; its audios need not")
            else:
                files += jsonl_files(Path(os.path.abspath(name)))
        if not files:
            raise DataError("no sources: expected .jsonl files or folders of them")
        if twice := [str(file) for file in files if files.count(file) > 1]:
            raise DataError(f"{twice[0]} is given twice")
        paths = [file for file in files if isinstance(file, Path)]
        called = dict(zip(paths, display_names(paths), strict=True))
        return cls(
            tuple(RowIndex.scan([f], [called[f]]) if isinstance(f, Path) else f for f in files)
        )

    @property
    def total(self) -> int:
        """Records in all, 0 if that is not known."""
        counts = [0 if isinstance(part, str) else len(part) for part in self.parts]
        return sum(counts) if all(counts) else 0

    def processes(self, wanted: int | None) -> int:
        """How many processes are worth their start."""
        most = wanted or os.cpu_count() or 1
        return min(most, -(-self.total // _RECORDS_PER_WORKER)) if self.total else most

    def jobs(self, plan: FeatureSpec, reader: TfioReader | None) -> Iterator[_RecordJob | Reject]:
        """All records, in order."""
        for part in self.parts:
            if isinstance(part, str):
                assert reader is not None
                yield from _from_tfrecord(part, plan, reader)
                continue
            for index in range(len(part)):
                line, where, root = part.read_row(index)
                if reader is None:
                    yield _RecordJob(where, str(root), plan, line)
                else:
                    yield _fetch(line, where, str(root), plan, reader)


def _fetch(
    line: bytes,
    where: str,
    root: str,
    plan: FeatureSpec,
    reader: TfioReader,
    audios: Sequence[Sound | AudioError] | None = None,
) -> _RecordJob | Reject:
    """Ask the reader for all that a record sounds like; its own audios may be there already."""
    try:
        record = parse_record(line, where, root)
        if audios is not None and len(audios) != len(record.audios):
            raise RecordError(
                f"{len(audios)} recordings in the TFRecord, but {len(record.audios)} under 'audios'"
            )
    except RecordError as error:
        return Reject(where, str(error))

    def read(path: str) -> Sound | AudioError:
        try:
            return reader.read(path)
        except AudioError as error:
            return error

    found = map(read, record.audios) if audios is None else audios
    fetched = {("audio", n): sound for n, sound in enumerate(found)}
    for n, turn in enumerate(record.turns):
        if isinstance(turn.speech, str) and plan.speaks:
            fetched["speech", n] = read(turn.speech)
    return _RecordJob(where, root, plan, record=record, fetched=fetched)


def _from_tfrecord(
    path: str, plan: FeatureSpec, reader: TfioReader
) -> Iterator[_RecordJob | Reject]:
    root, name = os.path.split(path)
    for number, item in enumerate(reader.records(path), 1):
        where = f"{name}:{number}"
        if isinstance(item, TfRecord):
            yield _fetch(item.line, where, root, plan, reader, item.clips)
        else:
            yield Reject(where, str(item))


def _load_sample(job: _RecordJob | Reject) -> _PendingSample | Reject:
    """Read and compute all that needs no network."""
    if isinstance(job, Reject):
        return job

    channel = job.plan.channel

    def sound(kind: str, index: int, path: str) -> audio.AudioSource:
        if job.fetched is None:
            return audio.AudioSource(path, channel)
        found = job.fetched[kind, index]
        if isinstance(found, AudioError):
            raise found
        return audio.AudioSource(found, channel)

    try:
        record = job.record or parse_record(job.line, job.where, job.root)
        codes = given_codes(record, job.plan.num_codes)
        recorded = {n: t.speech for n, t in enumerate(record.turns) if isinstance(t.speech, str)}
        if recorded and not job.plan.speaks:
            raise RecordError(
                "speech is a recording: give --model a folder with a speech tokenizer (token2wav/)"
            )
        mels = tuple(
            load_features(sound("audio", n, path), job.plan.n_mels)
            for n, path in enumerate(record.audios)
        )
        targets = {n: audio.load_audio(sound("speech", n, path)) for n, path in recorded.items()}
        short = [len(clip) for clip in targets.values() if len(clip) < 2 * audio.HOP]
        if short:
            raise AudioError(f"speech of {short[0]} samples is too short")
    except (RecordError, AudioError) as error:
        return Reject(job.where, str(error))
    return _PendingSample(Sample(_with_relative_paths(record, job.root), mels, codes), targets)


def _with_relative_paths(record: Record, root: str) -> Record:
    """The record with names as seen from its file: a data set may be anywhere."""

    def name(path: str) -> str:
        inside = os.path.isabs(path) and path.startswith(os.path.join(root, ""))
        return os.path.relpath(path, root) if inside else path

    turns = (
        replace(turn, speech=name(turn.speech)) if isinstance(turn.speech, str) else turn
        for turn in record.turns
    )
    return replace(record, turns=tuple(turns), audios=tuple(map(name, record.audios)))


def _load_samples(
    jobs: Iterator[_RecordJob | Reject], processes: int
) -> Generator[_PendingSample | Reject, None, None]:
    """Hear all of them, in order, a few ahead."""
    if processes <= 1:
        yield from map(_load_sample, jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork of jax's threads may hang
    with (
        _one_thread_each(),
        ProcessPoolExecutor(processes, context, initializer=_init_worker) as pool,
    ):
        waiting: deque[Any] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(_load_sample, job))
                if len(waiting) > 4 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError("a worker was killed, for memory perhaps: try --workers 1") from None
        finally:
            for job in waiting:
                job.cancel()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that start here compute in one thread each: there are as many as cores."""
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: value or "1" for name, value in before.items()})
    try:
        yield
    finally:
        for name in (name for name, value in before.items() if value is None):
            del os.environ[name]


def _init_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process
    os.environ["JAX_PLATFORMS"] = "cpu"


def _with_codes(
    found: Iterator[_PendingSample | Reject], model: ModelFolder
) -> Iterator[Sample | Reject]:
    """Add the codes that are missing, of many recordings at a time; the order is kept."""
    waiting: list[_PendingSample | Reject] = []
    clips = held = 0
    for item in found:
        waiting.append(item)
        if isinstance(item, _PendingSample):
            clips += len(item.targets)
            held += sum(clip.nbytes for clip in item.targets.values())
            held += sum(mel.nbytes for clip in item.sample.mels for mel in clip)
        if not clips or clips >= _BATCH_RECORDINGS or held >= _MAX_PENDING_BYTES:
            yield from _add_codes(waiting, model)
            waiting, clips, held = [], 0, 0
    yield from _add_codes(waiting, model)


def _add_codes(
    items: list[_PendingSample | Reject], model: ModelFolder
) -> Iterator[Sample | Reject]:
    clips = [c for item in items if isinstance(item, _PendingSample) for c in item.targets.values()]
    made = iter(model.codes_of(clips) if clips else [])
    for item in items:
        if isinstance(item, Reject):
            yield item
            continue
        sample = item.sample
        codes = dict(sample.codes) | {n: next(made) for n in item.targets}
        largest = max((int(found.max()) for found in codes.values()), default=0)
        if largest >= model.plan.num_codes:
            yield Reject(
                sample.record.where,
                f"the speech tokenizer found code {largest}, the model has {model.plan.num_codes}",
            )
        else:
            yield replace(sample, codes=dict(sorted(codes.items())))
