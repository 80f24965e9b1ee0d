"""Samples: records together with their audio, from jsonl files or from prepared shards.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.

    source = open_source("talks.jsonl")  # or a folder of them, or one of `sa2jax data prepare`
    sample = source[3]  # a Sample, or a Reject that says what is wrong with it

Both kinds of source give random access for Grain and can be sent to worker processes: no file is
open between two calls (jsonl) or after pickling (shards).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32
from safetensors.numpy import save

from sa2jax import audio
from sa2jax.chat.tokenizer import NUM_CODES
from sa2jax.errors import AudioError, DataError, FileError, reason_of
from sa2jax.files.json_files import parse_json, read_json
from sa2jax.files.raw import is_file, open_file
from sa2jax.files.safetensors_files import parse_safetensors
from sa2jax.files.sizes import MAX_SIZE
from sa2jax.train.data.records import Record, RecordError, parse_record
from sa2jax.train.data.row_index import RowIndex, checked_index

FORMAT = 1
DATASET_JSON = "dataset.json"  # what a prepared folder says of itself
N_MELS = 128  # mel bands of all released models
_PROBED_ROWS = 10_000
_PROBE = 4096  # bytes at the begin, in the middle and at the end of a recording

ClipFeatures = tuple[Float32[np.ndarray, "M F"], ...]
"""One recording: log-mel frames (100 Hz) of each chunk of at most 25 s."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A record with all that it sounds like.

    Attributes:
        record: the conversation.
        mels: a recording for each of its audios, see `ClipFeatures`.
        codes: audio codes (25 Hz) of each spoken turn, by the turn's index.
    """

    record: Record
    mels: tuple[ClipFeatures, ...] = ()
    codes: Mapping[int, Int32[np.ndarray, "A"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """Something that cannot be learnt from.

    Attributes:
        where: file and line.
        reason: why.
    """

    where: str
    reason: str


# --- one sample ---------------------------------------------------------------------------------


def load_features(source: audio.Audio | audio.AudioSource, n_mels: int = N_MELS) -> ClipFeatures:
    """What the model hears of a recording.

    Args:
        source: the recording, of any length.
        n_mels: mel bands.

    Raises:
        AudioError: if it cannot be read, or is too short to be heard (below 17 ms).
    """
    path = source.source if isinstance(source, audio.AudioSource) else source
    if isinstance(path, str) and "://" in path:
        raise AudioError(f"{path} is not here: run `sa2jax data prepare` with --reader tfio")
    samples = audio.load_audio(source)
    if not audio.num_tokens(audio.num_frames(len(samples))):
        raise AudioError(f"a recording of {len(samples)} samples is too short to be heard")
    return tuple(audio.log_mel(chunk, n_mels=n_mels) for chunk in audio.split_chunks(samples))


def given_codes(record: Record, num_codes: int = NUM_CODES) -> dict[int, Int32[np.ndarray, "A"]]:
    """The codes a record brings along, by the turn's index.

    Args:
        record: the record; turns that have a recording are left out.
        num_codes: how many codes there are.

    Raises:
        RecordError: for a code that does not exist.
    """
    found = {}
    for index, turn in enumerate(record.turns):
        if isinstance(turn.speech, tuple):
            if (largest := max(turn.speech)) >= num_codes:
                raise RecordError(
                    f"message {index + 1}: no audio code {largest}, expected 0 to {num_codes - 1}"
                )
            found[index] = np.asarray(turn.speech, np.int32)
    return found


def encode_sample(sample: Sample) -> bytes:
    """A sample as one safetensors blob, the same bytes for the same sample."""
    arrays: dict[str, np.ndarray] = {}
    for clip, chunks in enumerate(sample.mels):
        for chunk, mel in enumerate(chunks):
            arrays[f"mel.{clip}.{chunk}"] = np.ascontiguousarray(mel, np.float32)
    for index, codes in sample.codes.items():
        arrays[f"codes.{index}"] = np.ascontiguousarray(codes, np.int32)
    record = sample.record.to_dict()
    for index, turn in enumerate(record["turns"]):
        if isinstance(turn["speech"], tuple) and index in sample.codes:
            turn["speech"] = []  # they are among the arrays
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return save(arrays, metadata={"record": text})


def decode_sample(blob: bytes) -> Sample:
    """The inverse of `encode_sample`.

    Raises:
        DataError: if this is no packed sample.
    """
    try:
        arrays, metadata = parse_safetensors(blob)
        record = parse_json(metadata["record"], dict)
        mels: dict[int, dict[int, np.ndarray]] = {}
        codes = {}
        for name, array in arrays.items():
            kind, first, *rest = name.split(".")
            if kind == "codes":
                codes[int(first)] = array
            else:
                mels.setdefault(int(first), {})[int(rest[0])] = array
        for index, turn in enumerate(record["turns"]):
            if turn["speech"] == []:
                turn["speech"] = codes[index].tolist()
        clips = [mels[clip] for clip in range(len(mels))]
        heard = tuple(tuple(clip[chunk] for chunk in range(len(clip))) for clip in clips)
        return Sample(Record.from_dict(record), heard, dict(sorted(codes.items())))
    except (FileError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"{type(error).__name__}: {reason_of(error)}"
        raise DataError(f"not a packed sample ({what})") from None


# --- sources ------------------------------------------------------------------------------------


class JsonlSource:
    """Records of jsonl files, or of JSON arrays; their recordings are read when asked for.

    Args:
        files: the files, in the order that they count in.
        n_mels: mel bands.

    Attributes:
        n_mels: mel bands.
        fingerprint: SHA-256 of the files' bytes; for the recordings see `recordings_fingerprint`.

    Raises:
        DataError: if there are no files, no lines, or one cannot be read.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]], n_mels: int = N_MELS):
        paths = [Path(os.path.abspath(file)) for file in files]
        if not paths:
            raise DataError("no files: expected at least one .jsonl file")
        self.rows = RowIndex.scan(paths, display_names(paths))
        if not len(self.rows):
            raise DataError(f"{paths[0]} holds no records: expected one JSON object on each line")
        self.n_mels = n_mels
        self.fingerprint = self.rows.fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample | Reject:
        row, where, root = self.rows.read_row(index)
        try:
            record = parse_record(row, where, root)
            for turn in record.turns:
                if isinstance(turn.speech, str):
                    raise RecordError(
                        f"speech is a recording ({turn.speech}), expected audio codes: run "
                        "`sa2jax data prepare` first"
                    )
            codes = given_codes(record)
            mels = tuple(load_features(path, self.n_mels) for path in record.audios)
        except (RecordError, AudioError) as error:
            return Reject(where, str(error))
        return Sample(record, mels, codes)

    def recordings_fingerprint(self) -> str:
        """SHA-256 of what tells the recordings from others, see `recording_identity`.

        Of many rows 10 000 are looked at, evenly spaced: a run waits for it each time that it
        begins or goes on, 1 s where files are cached.
        """
        digest = hashlib.sha256()
        known: dict[str, bytes] = {}
        count = min(len(self), _PROBED_ROWS)
        for index in (number * len(self) // count for number in range(count)):
            row, where, root = self.rows.read_row(index)
            try:
                record = parse_record(row, where, root)
            except RecordError:
                continue  # the row's own bytes tell
            for path in record.audios:
                if path not in known:
                    known[path] = recording_identity(path)
                digest.update(known[path])
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"JsonlSource({len(self)} records, {self.fingerprint[:12]})"


def recording_identity(path: str) -> bytes:
    """What tells a recording from others: its size and some of its bytes, not its name.

    All bytes of 10 000 hours would be a terabyte. What is cut, recorded or converted anew has
    another size or other bytes in its middle.
    """
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for at in (0, (size - _PROBE) // 2, size - _PROBE):
                file.seek(max(at, 0))
                digest.update(file.read(_PROBE))
    except (FileError, OSError):
        return b"unreadable"  # perhaps a URL; where it is needed, it is a reject
    return digest.digest()


class ShardSource:
    """A folder that `sa2jax data prepare` made.

    Args:
        folder: the folder.

    Attributes:
        info: the contents of its dataset.json.
        n_mels: mel bands of its recordings.
        fingerprint: SHA-256 of all its samples.

    Raises:
        DataError: if it is none, or is not complete.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(os.path.abspath(folder))
        self.info = read_dataset_info(self.folder)
        self.n_mels: int = self.info["n_mels"]
        self.fingerprint: str = self.info["fingerprint"]

    def __len__(self) -> int:
        return self.info["samples"]

    def recordings_fingerprint(self) -> str:
        """Nothing: its samples have their recordings in them."""
        return ""

    def __getitem__(self, index: int) -> Sample | Reject:
        index = checked_index(index, len(self))
        try:
            return decode_sample(self._records[index])
        except (DataError, ValueError, RuntimeError, OSError, IndexError) as error:
            where = f"{self.folder.name}:{index}"
            return Reject(where, f"damaged ({error}); run `sa2jax data prepare` again")

    @cached_property
    def _records(self) -> Any:
        from grain.sources import ArrayRecordDataSource

        # With its range a shard need not be opened to be counted.
        return ArrayRecordDataSource(
            [f"{self.folder / s['file']}[0:{s['samples']}]" for s in self.info["shards"]]
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_records"}

    def __repr__(self) -> str:
        return f"ShardSource({len(self)} samples, {self.fingerprint[:12]})"


def open_source(
    path: str | os.PathLike[str], n_mels: int | None = None
) -> JsonlSource | ShardSource:
    """A source of samples.

    Args:
        path: a .jsonl file, a .json file with an array, a folder of .jsonl files, or a folder made
            by `sa2jax data prepare`.
        n_mels: mel bands, by default 128 or those the folder was prepared with.

    Raises:
        DataError: if it is nothing of these, or was prepared for another number of mel bands.
    """
    path = Path(path)
    if not (path / DATASET_JSON).is_file():
        return JsonlSource(jsonl_files(path), N_MELS if n_mels is None else n_mels)
    source = ShardSource(path)
    if n_mels not in (None, source.n_mels):
        raise DataError(
            f"{path} was prepared with {source.n_mels} mel bands, the model hears {n_mels}: run "
            "`sa2jax data prepare` again with --model"
        )
    return source


def jsonl_files(path: Path) -> list[Path]:
    """A .jsonl file, a .json file with an array, or the .jsonl files of a folder by their names.

    Raises:
        DataError: if there are none.
    """
    if path.is_dir():
        files = sorted(file for file in path.glob("*.jsonl") if not file.name.startswith("."))
        if files:
            return files
        what = f"an unfinished or damaged folder, without {DATASET_JSON}"
        found = what if any(path.glob("*.array_record")) else "neither"
        raise DataError(f"{path}: expected .jsonl files or prepared shards, found {found}")
    if not path.exists():
        raise DataError(f"no such file or folder: {path}; expected .jsonl files or prepared shards")
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(f"{path}: expected a file ending in .jsonl or .json, or a folder")
    return [path]


def display_names(files: Sequence[Path]) -> list[str]:
    """What messages call files: their names, with as many folders as tell them apart."""
    names = [file.name for file in files]
    if len(set(names)) < len(set(files)):
        common = os.path.commonpath([file.parent for file in files])
        names = [os.path.relpath(file, common) for file in files]
    return names


def read_dataset_info(folder: Path) -> dict[str, Any]:
    """What a prepared folder says of itself.

    Raises:
        DataError: if it says nothing, was made by a newer version, or lacks a shard.
    """
    again = "run `sa2jax data prepare` again"
    try:
        about = read_json(folder / DATASET_JSON, dict)
        if about["format"] != FORMAT:
            raise DataError(
                f"{folder} has format {about['format']}, this version of sa2jax reads {FORMAT}: "
                f"{again}"
            )
        shards = {shard["file"]: (shard["samples"], shard["bytes"]) for shard in about["shards"]}
        if sum(n for n, _ in shards.values()) != about["samples"] or not about["samples"]:
            raise ValueError("the shards do not add up")
        if missing := {"n_mels", "fingerprint", "seconds"} - set(about):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        _require_kinds(about)
    except (FileError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / DATASET_JSON} cannot be used ({reason_of(error)}): {again}"
        ) from None
    for name, (_, size) in shards.items():
        path = folder / name
        if not is_file(path) or path.stat().st_size != size:
            raise DataError(f"{path} is missing or cut off: copy it again, or {again}")
    return about


def _require_kinds(about: dict[str, Any]) -> None:
    """Refuse a dataset.json whose values cannot be what they are called."""
    names = [shard["file"] for shard in about["shards"]]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError("a shard whose name is none")
    sizes = [about["samples"], about["n_mels"], *(shard["samples"] for shard in about["shards"])]
    if not all(type(size) is int and size >= 0 for size in sizes) or about["n_mels"] > MAX_SIZE:
        raise ValueError("numbers of samples, or of mel bands, that are none")
