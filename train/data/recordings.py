"""Lists of recordings, and prepared folders of one ArrayRecord file.

Data of single networks: prepared folders of clips, in batches of like length. The language model
has another system, samples in shards that are packed into rows: `data.samples`, `language.data`.

What the networks of the detokenizer learn from is kept alike: see `flow_data` and `speech_data`.

    OUT/samples.array_record   each record one sample, safetensors
    OUT/lengths.npy            how long each is
    OUT/dataset.json           how many there are, what they are for, their SHA-256
    OUT/rejects.jsonl          what could not be used, and why
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import numpy as np
from jaxtyping import Int

from sa2jax.atomic_io import new_folder
from sa2jax.errors import DataError, FileError, reason_of
from sa2jax.files.archives import parse_npy
from sa2jax.files.json_files import parse_json, read_json
from sa2jax.files.limits import ARRAYS
from sa2jax.files.raw import read_bytes
from sa2jax.files.rows import read_rows
from sa2jax.train.data.samples import DATASET_JSON, Reject
from sa2jax.train.data.shards import REJECTS, RejectWriter

SAMPLES, LENGTHS = "samples.array_record", "lengths.npy"
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
SampleT = TypeVar("SampleT")


@dataclass(frozen=True)
class RecordingEntry:
    """A recording of a list, and what the list says of it; or why there is none.

    Attributes:
        where: file and line, for what is said.
        path: the recording.
        values: the other values of its line.
        problem: what is wrong with the line.
    """

    where: str
    path: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    def path_of(self, key: str) -> str:
        """The path that a value of its line names, by default its own.

        Raises:
            DataError: if the value is no text.
        """
        other = self.values.get(key) or None
        if other is None:
            return self.path
        if not isinstance(other, str):
            raise DataError(f'expected "{key}" to be a path, got {other!r}')
        return os.path.join(os.path.dirname(self.values[_LIST]), other)


_LIST = "list"  # the .jsonl file of a line, beside its values


def list_recordings(sources: Sequence[str | os.PathLike[str]]) -> list[RecordingEntry]:
    """Recordings, those of folders, and those of .jsonl files with a line {"audio": …} each.

    A JSON array of such objects is read, too. Paths in a file are relative to it.

    Raises:
        DataError: if a source cannot be read, is given twice, or lists nothing.
    """
    paths = [Path(os.path.abspath(source)) for source in sources]
    if twice := [str(path) for path in paths if paths.count(path) > 1]:
        raise DataError(f"{twice[0]} is given twice")
    return [item for path in paths for item in _recordings_of(path)]


def _recordings_of(source: Path) -> list[RecordingEntry]:
    if source.is_dir():
        paths = sorted(
            p for p in source.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file()
        )
        if not paths:
            raise DataError(
                f"no recordings in {source}: expected {', '.join(AUDIO_SUFFIXES)} files"
            )
        return [RecordingEntry(str(path.relative_to(source)), str(path)) for path in paths]
    if source.suffix.lower() in AUDIO_SUFFIXES:
        return [RecordingEntry(source.name, str(source))]
    try:
        rows = list(read_rows(source))
    except FileError as error:
        raise DataError(
            f"{source} cannot be read ({error.reason}): expected "
            f"recordings ({', '.join(AUDIO_SUFFIXES)}), a folder of them, or a .jsonl file"
        ) from None
    found = [_parse_row(f"{source.name}{place}", row, source) for place, row in rows]
    if not found:
        raise DataError(f"{source} lists no recordings")
    return found


def _parse_row(where: str, row: bytes, source: Path) -> RecordingEntry:
    try:
        facts = parse_json(row, dict)
        path = os.path.join(source.parent, facts["audio"])
        return RecordingEntry(where, path, facts | {_LIST: str(source)})
    except (FileError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {reason_of(error)}"
        reason = f'expected {{"audio": "a.wav"}}, perhaps with more, got {got}'
        return RecordingEntry(where, problem=reason)


class WriteOptions(TypedDict, total=False):
    """Keywords of all that makes a folder of samples, see `write_samples`.

    Attributes:
        max_rejects: how much may be unusable, by default 100.
        overwrite: replace a prepared folder that is there already.
    """

    max_rejects: int
    overwrite: bool


def write_samples(
    out: str | os.PathLike[str],
    found: Iterable[tuple[bytes, int] | Reject],
    describe: Callable[[list[int]], Mapping[str, Any]],
    **options: Unpack[WriteOptions],
) -> dict[str, Any]:
    """Make a folder of samples, whole or not at all.

    Args:
        out: the folder.
        found: blobs with their lengths, and what could not be used.
        describe: what dataset.json shall say beside counts and hashes, from all lengths.
        **options: what may be unusable, and what is replaced, see `WriteOptions`.

    Returns:
        What dataset.json says.

    Raises:
        DataError: if too much is unusable, nothing is usable, or `out` holds something else.
        CheckpointError: if `out` cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    out, overwrite = Path(os.path.abspath(out)), options.get("overwrite", False)
    if overwrite and out.is_dir() and any(out.iterdir()) and not (out / DATASET_JSON).is_file():
        raise DataError(f"{out} is no prepared folder, it is not replaced: choose another one")
    digest, lengths = hashlib.sha256(), []
    with (
        new_folder(out, overwrite=overwrite) as folder,
        RejectWriter(folder / REJECTS, out, options.get("max_rejects", 100)) as rejects,
    ):
        writer = ArrayRecordWriter(str(folder / SAMPLES), "group_size:1,zstd:1")
        try:
            for item in found:
                if isinstance(item, Reject):
                    rejects.add(item)
                    continue
                blob, length = item
                writer.write(blob)
                digest.update(len(blob).to_bytes(8, "little") + blob)
                lengths.append(length)
        finally:
            writer.close()
        if not lengths:
            raise DataError(f"none of {len(rejects)} recordings can be used; {rejects.last}")
        np.save(folder / LENGTHS, np.array(lengths, np.int32))
        about = {
            **describe(lengths),
            "samples": len(lengths),
            "fingerprint": digest.hexdigest(),
            "bytes": (folder / SAMPLES).stat().st_size,
            "rejected": len(rejects),
        }
        (folder / DATASET_JSON).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return about


def read_samples_info(
    folder: Path, form: str, keys: Sequence[str], what: str, command: str
) -> tuple[dict[str, Any], Int[np.ndarray, "N"]]:
    """What a folder of samples says of itself, and their lengths.

    Args:
        folder: made by `write_samples`.
        form: what its `format` has to be.
        keys: what else it has to say.
        what: it is expected to be a folder of these.
        command: that makes it.

    Raises:
        DataError: if it is none, or is damaged.
    """
    try:
        about = read_json(folder / DATASET_JSON, dict)
        if about.get("format") != form:
            raise ValueError(f"format {about.get('format')!r}, expected {form!r}")
        lengths = parse_npy(read_bytes(folder / LENGTHS, ARRAYS), LENGTHS)
        whole = lengths.ndim == 1 and lengths.dtype.kind in "iu" and (lengths >= 0).all()
        if not whole or len(lengths) != about["samples"] or not len(lengths):
            raise ValueError("its samples do not add up")
        if (folder / SAMPLES).stat().st_size != about["bytes"]:
            raise ValueError(f"{SAMPLES} is cut off")
        for key in ("fingerprint", *keys):
            about[key]
    except (FileError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is no folder of {what} ({reason_of(error)}): make it with `{command}`"
        ) from None
    return about, lengths


class SampleFile(Generic[SampleT]):
    """The samples of a folder, its file opened when the first is asked for.

    Args:
        folder: made by `write_samples`.
        count: how many it holds.
        decode: makes a sample of its blob.
    """

    def __init__(self, folder: Path, count: int, decode: Callable[[bytes], SampleT]):
        self.folder, self.count, self.decode = folder, count, decode

    def __getitem__(self, index: int) -> SampleT:
        """One sample.

        Raises:
            DataError: if the file is damaged.
        """
        try:
            return self.decode(self._open[index])
        except (ValueError, RuntimeError, OSError, LookupError, TypeError) as error:
            raise damaged_error(self.folder, error) from None

    @cached_property
    def _open(self) -> Any:
        from grain.sources import ArrayRecordDataSource

        return ArrayRecordDataSource([f"{self.folder / SAMPLES}[0:{self.count}]"])


def damaged_error(folder: Path, error: Exception) -> DataError:
    """What is said of a prepared folder that cannot be read."""
    return DataError(f"{folder} is damaged ({error}): prepare it again")
