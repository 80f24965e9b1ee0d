"""Recordings for fine-tuning the detokenizer: heard once, kept, and given out in padded batches.

    prepare_flow(["speech/", "more.jsonl"], "ready", "step-audio-2-mini")
    data = FlowData(FlowDataConfig(folder="ready", rows=8), seed=0)
    for batch in data:
        state, report = step(state, place_flow_batch(batch, mesh))

A recording becomes its audio codes, its mel frames (24 kHz, 50 Hz, two a code) and a speaker
vector, all as `Voice.from_wav` hears them. A line of a .jsonl file is `{"audio": "a.wav"}`, with
`"voice": "b.wav"` if the speaker shall be heard elsewhere; paths are relative to the file.

    OUT/samples.array_record   each record one piece of a recording, safetensors
    OUT/lengths.npy            codes of each
    OUT/dataset.json           how many there are, what heard them, their SHA-256
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load, save

from sa2jax import audio
from sa2jax.errors import AudioError, DataError, Sa2jaxError
from sa2jax.folders import new_folder
from sa2jax.inference.speech_folder import SpeechFolder
from sa2jax.inference.voices import MAX_SECONDS, MEL_RATE, MIN_SECONDS, SILENCE, VoiceAnalyzer
from sa2jax.train.flow import FlowBatch
from sa2jax.train.samples import ABOUT, Reject
from sa2jax.train.shards import CODE_RATE, REJECTS, RejectWriter

FORMAT = "flow 1"
SAMPLES, LENGTHS = "samples.array_record", "lengths.npy"
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus")
FRAMES = 2  # mel frames of a code
_AT_ONCE = 32  # pieces whose codes are found together


@dataclass(frozen=True, eq=False)
class FlowSample:
    """A piece of a recording, of at most 30 s.

    Attributes:
        codes: codes (25 Hz).
        mel: log-mel frames (50 Hz), two for each code.
        speaker: speaker vector, of any length.
        where: file and second.
    """

    codes: Int[np.ndarray, "P"]
    mel: Float[np.ndarray, "Q M"]
    speaker: Float[np.ndarray, "C"]
    where: str


# --- hearing ----------------------------------------------------------------------------------


def prepare_flow(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    model: str | Path,
    *,
    max_rejects: int = 100,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Hear recordings with a checkpoint's own networks and keep what was heard.

    Longer recordings are cut every 30 s. What cannot be used is listed in rejects.jsonl.

    Args:
        sources: recordings, folders of them, and .jsonl files.
        out: folder to make, whole or not at all.
        model: folder with the detokenizer to be tuned: codes mean nothing to another.
        max_rejects: recordings that may be unusable.
        overwrite: replace a prepared folder that is there already.
        progress: told about recordings done and recordings in all.

    Returns:
        What dataset.json says.

    Raises:
        DataError: if a source cannot be read, too much is unusable, or nothing is usable.
        CheckpointError: if the model has no detokenizer, or `out` cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    out, speech = Path(os.path.abspath(out)), SpeechFolder(model)
    if overwrite and out.is_dir() and any(out.iterdir()) and not (out / ABOUT).is_file():
        raise DataError(f"{out} is no prepared folder, it is not replaced: choose another one")
    paths = [Path(os.path.abspath(source)) for source in sources]
    if twice := [str(path) for path in paths if paths.count(path) > 1]:
        raise DataError(f"{twice[0]} is given twice")
    items = [item for path in paths for item in _items(path)]
    digest, lengths = hashlib.sha256(), []
    with (
        new_folder(out, overwrite=overwrite) as folder,
        RejectWriter(folder / REJECTS, out, max_rejects) as rejects,
    ):
        writer = ArrayRecordWriter(str(folder / SAMPLES), "group_size:1,zstd:1")
        try:
            for found in _heard(items, speech.analyzer, progress):
                if isinstance(found, Reject):
                    rejects.add(found)
                    continue
                blob = pack(found)
                writer.write(blob)
                digest.update(len(blob).to_bytes(8, "little") + blob)
                lengths.append(len(found.codes))
        finally:
            writer.close()
        if not lengths:
            raise DataError(f"none of {len(items)} recordings can be used; {rejects.last}")
        np.save(folder / LENGTHS, np.array(lengths, np.int32))
        about = {
            "format": FORMAT,
            "samples": len(lengths),
            "seconds": sum(lengths) / CODE_RATE,
            "speech_tokenizer": speech.analysis,
            "fingerprint": digest.hexdigest(),
            "bytes": (folder / SAMPLES).stat().st_size,
            "rejected": len(rejects),
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return about


@dataclass(frozen=True)
class _Item:
    """A recording to hear, and that of its speaker; or why there is none."""

    where: str
    path: str = ""
    voice: str = ""
    problem: str = ""


def _items(source: Path) -> list[_Item]:
    if source.is_dir():
        paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in SOUNDS and p.is_file())
        if not paths:
            raise DataError(f"no recordings in {source}: expected {', '.join(SOUNDS)} files")
        return [_Item(str(path.relative_to(source)), str(path), str(path)) for path in paths]
    if source.suffix.lower() in SOUNDS:
        return [_Item(source.name, str(source), str(source))]
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{source} cannot be read ({error}): expected recordings ({', '.join(SOUNDS)}), a "
            "folder of them, or a .jsonl file"
        ) from None
    items = []
    for number, line in enumerate(lines, 1):
        where = f"{source.name}:{number}"
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            path, voice = raw["audio"], raw.get("voice") or raw["audio"]
            items.append(_Item(where, *(os.path.join(source.parent, p) for p in (path, voice))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f'expected {{"audio": "a.wav"}}, perhaps with "voice", got {error!r}'
            items.append(_Item(where, problem=reason))
    if not items:
        raise DataError(f"{source} has no lines")
    return items


def _heard(
    items: Sequence[_Item], analyzer: VoiceAnalyzer, progress: Callable[[int, int], None]
) -> Iterator[FlowSample | Reject]:
    """Samples in the order of their recordings; codes are found for many pieces together.

    A `Reject` may come before the samples of recordings ahead of it.
    """
    identify = lru_cache(64)(lambda path: analyzer.speaker_of(_low(path)[: _samples(16_000)]))
    waiting: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []

    def finish() -> Iterator[FlowSample]:
        codes = analyzer.codes_of([low for _, low, _, _ in waiting])
        for (where, _, high, speaker), found in zip(waiting, codes, strict=True):
            mel = audio.mel_24k(high).T  # [Q, M]
            count = min(len(found), len(mel) // FRAMES)
            yield FlowSample(found[:count], mel[: FRAMES * count], speaker, where)
        waiting.clear()

    for done, item in enumerate(items, 1):
        try:
            if item.problem:
                raise DataError(item.problem)
            speaker = identify(item.voice)
            for where, low, high in _pieces(item):
                waiting.append((where, low, high, speaker))
                if len(waiting) == _AT_ONCE:
                    yield from finish()
        except Sa2jaxError as error:
            yield Reject(item.where, str(error))
        if done == len(items):
            yield from finish()
        progress(done, len(items))


def _pieces(item: _Item) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, samples at 16 kHz and at 24 kHz of each piece of a recording."""
    low, high = _low(item.path), audio.load(item.path, MEL_RATE, mono="mean")
    step, high_step = _samples(audio.SAMPLE_RATE), _samples(MEL_RATE)
    least, kept = int(MIN_SECONDS * audio.SAMPLE_RATE), 0
    for number, start in enumerate(range(0, len(low), step)):
        piece, other = low[start : start + step], high[number * high_step :][:high_step]
        if len(piece) >= least and np.abs(piece).max() >= SILENCE:
            kept += 1
            yield f"{item.where}@{number * MAX_SECONDS:g}s", piece, other
    if not kept:
        raise AudioError(
            f"expected at least {MIN_SECONDS:g} s of sound, got {len(low) / audio.SAMPLE_RATE:.2f} "
            "s or silence"
        )


def _low(path: str) -> np.ndarray:
    return audio.load(path, audio.SAMPLE_RATE, mono="first")


def _samples(rate: int) -> int:
    return int(MAX_SECONDS * rate)


def pack(sample: FlowSample) -> bytes:
    """A sample as one safetensors blob."""
    arrays = {"codes": sample.codes, "mel": sample.mel, "speaker": sample.speaker}
    kinds = {"codes": np.int32, "mel": np.float32, "speaker": np.float32}
    whole = {name: np.ascontiguousarray(a, kinds[name]) for name, a in arrays.items()}
    return save(whole | {"where": np.frombuffer(sample.where.encode(), np.uint8)})


def unpack(blob: bytes) -> FlowSample:
    """What `pack` packed."""
    arrays = load(blob)
    where = arrays.pop("where").tobytes().decode()
    return FlowSample(**arrays, where=where)


# --- batches ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FlowDataConfig:
    """What the flow is taught with.

    Attributes:
        folder: made by `prepare_flow`.
        rows: rows of a batch, of all hosts.
        buckets: lengths in codes (25 Hz) that batches are padded to; each compiles a step.
        shuffle: another order every epoch.
        epochs: how often; None for without end.
    """

    folder: str | Path
    rows: int = 8
    buckets: tuple[int, ...] = (125, 250, 375, 500, 750)
    shuffle: bool = True
    epochs: int | None = None

    def __post_init__(self):
        if self.rows < 1 or (self.epochs is not None and self.epochs < 1):
            raise DataError(
                f"expected rows and epochs of at least 1, got {self.rows} and {self.epochs}"
            )
        if not self.buckets or min(self.buckets) < 1 or list(self.buckets) != sorted(self.buckets):
            raise DataError(f"expected buckets in rising order, got {self.buckets}")


class FlowData:
    """Batches in an order that depends on the seed alone; an iterator with a state to go back to.

    A batch holds pieces of like length. At an epoch's end each bucket gives what is left, with
    empty rows beside it: everything is seen once an epoch.

    Args:
        config: what.
        seed: of the order.
        host: which of the hosts this is; each gets other rows of the same batches.
        hosts: how many there are.
        analysis: hash of the speech tokenizer in use (`SpeechFolder.analysis`), to be sure that
            the codes are its own.

    Attributes:
        fingerprint: of the samples, buckets and rows.
        tokens: codes given out.
        waited: seconds spent reading.

    Raises:
        DataError: if the folder is not a prepared one, or does not fit.
    """

    def __init__(
        self,
        config: FlowDataConfig,
        *,
        seed: int,
        host: int = 0,
        hosts: int = 1,
        analysis: str | None = None,
    ):
        if not 0 <= host < hosts or config.rows % hosts:
            raise DataError(
                f"host {host} of {hosts} for rows={config.rows}: expected a host below their "
                "number, and rows as a multiple of it"
            )
        self.config, self._seed, self._host, self._hosts = config, seed, host, hosts
        self.folder = Path(config.folder)
        self.about, self._lengths = read_flow_about(self.folder)
        if analysis is not None and analysis != self.about["speech_tokenizer"]:
            raise DataError(
                f"{self.folder} was heard by another checkpoint's networks, its codes mean "
                "something else here: prepare it again with this model"
            )
        if int(self._lengths.max()) > config.buckets[-1]:
            raise DataError(
                f"{self.folder} holds pieces of {self._lengths.max()} codes: expected a bucket "
                f"that large, got {config.buckets}"
            )
        told = [self.about["fingerprint"], config.rows, list(config.buckets), config.shuffle, seed]
        self.fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        self.tokens, self.waited = 0, 0.0
        self._epoch, self._next = 0, 0
        self._plan = self._plan_of(0)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FlowBatch:
        while self._next >= len(self._plan):
            self._epoch, self._next = self._epoch + 1, 0
            self._plan = self._plan_of(self._epoch)
        if self.config.epochs is not None and self._epoch >= self.config.epochs:
            raise StopIteration
        started = time.perf_counter()
        room, chosen = self._plan[self._next]
        self._next += 1
        batch = self._batch(room, chosen[self._host :: self._hosts])
        self.tokens += int(batch.lengths.sum())
        self.waited += time.perf_counter() - started
        return batch

    @property
    def seconds_heard(self) -> float:
        """Seconds of sound given out."""
        return self.tokens / CODE_RATE

    def empty(self) -> FlowBatch:
        """A batch of which nothing can be learnt, for a host that has no more while others do."""
        return self._batch(self.config.buckets[0], [-1] * (self.config.rows // self._hosts))

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
        self._plan = self._plan_of(self._epoch)

    def _plan_of(self, epoch: int) -> list[tuple[int, list[int]]]:
        """Each batch's padded length and samples, −1 for an empty row."""
        order = np.arange(len(self._lengths))
        if self.config.shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        waiting: dict[int, list[int]] = {room: [] for room in self.config.buckets}
        plan = []
        for index in order:
            room = next(n for n in self.config.buckets if n >= self._lengths[index])
            waiting[room].append(int(index))
            if len(waiting[room]) == self.config.rows:
                plan.append((room, waiting.pop(room)))
                waiting[room] = []
        for room, rest in sorted(waiting.items()):
            if rest:
                plan.append((room, rest + [-1] * (self.config.rows - len(rest))))
        return plan

    def _batch(self, room: int, chosen: Sequence[int]) -> FlowBatch:
        samples = [self._sample(index) if index >= 0 else None for index in chosen]
        like = self._sample(0)
        codes = np.zeros((len(samples), room), np.int32)
        mels = np.zeros((len(samples), FRAMES * room, like.mel.shape[1]), np.float32)
        speaker = np.zeros((len(samples), len(like.speaker)), np.float32)
        lengths = np.zeros(len(samples), np.int32)
        for row, sample in enumerate(samples):
            if sample is not None:
                lengths[row] = len(sample.codes)
                codes[row, : len(sample.codes)] = sample.codes
                mels[row, : len(sample.mel)] = sample.mel
                speaker[row] = sample.speaker
        return FlowBatch(codes=codes, mels=mels, lengths=lengths, speaker=speaker)

    def _sample(self, index: int) -> FlowSample:
        try:
            return unpack(self._records[index])
        except (ValueError, RuntimeError, OSError, IndexError, KeyError, TypeError) as error:
            raise DataError(f"{self.folder} is damaged ({error}): prepare it again") from None

    @cached_property
    def _records(self) -> Any:
        from grain.sources import ArrayRecordDataSource

        return ArrayRecordDataSource([f"{self.folder / SAMPLES}[0:{len(self._lengths)}]"])


def read_flow_about(folder: Path) -> tuple[dict[str, Any], Int[np.ndarray, "N"]]:
    """What a prepared folder says of itself, and the lengths of its samples in codes.

    Raises:
        DataError: if it is none, or is damaged.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise ValueError(f"format {about.get('format')!r}, expected {FORMAT!r}")
        lengths = np.load(folder / LENGTHS)
        if len(lengths) != about["samples"] or not len(lengths):
            raise ValueError("its samples do not add up")
        if (folder / SAMPLES).stat().st_size != about["bytes"]:
            raise ValueError(f"{SAMPLES} is cut off")
        about["speech_tokenizer"], about["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise DataError(
            f"{folder} is no folder of recordings for the flow ({error}): make it with "
            "`sa2jax data prepare-flow`"
        ) from None
    return about, lengths
