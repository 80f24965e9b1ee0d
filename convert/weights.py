"""safetensors folders, read lazily and written in blocks; knows no model.

safetensors 0.8 cannot hand bfloat16 to numpy and reads tensors whole. The format is a JSON header
and then raw numbers, so it is read here through a memory map whose pages are given back after use,
and written as it streams by.
"""

import json
import math
import mmap
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from sa2jax import checkpoint
from sa2jax.errors import CheckpointError, FileError, reason_of
from sa2jax.files.json_files import read_json
from sa2jax.files.raw import is_file, open_file
from sa2jax.files.safetensors_files import read_safetensors_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 64 << 20
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
BUFFERS = {"I64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_)}  # of counters, places and masks


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in this dtype."""
        return self.size * self.dtype.itemsize


def is_buffer(name: str, dtype: np.dtype) -> bool:
    """Whether a tensor is no weight: a counter, or rotary frequencies, which the config tells."""
    return dtype in BUFFERS.values() or name.endswith("rotary_emb.inv_freq")


class Weights(Protocol):
    """A checkpoint as named tensors that are read one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of each, by name."""
        ...

    def get(self, name: str) -> np.ndarray:
        """The tensor, read-only; perhaps a view of a file."""
        ...

    def drop(self, name: str) -> None:
        """Give back the memory that reading this tensor took."""
        ...


class Arrays:
    """Arrays by name, in memory or mapped.

    Args:
        arrays: the arrays.
        where: what to call them in an error.

    Raises:
        CheckpointError: if something else is among them.
    """

    def __init__(self, arrays: Mapping[str, Any], where: str):
        odd = [str(name) for name, value in arrays.items() if not isinstance(value, np.ndarray)]
        if odd:
            raise CheckpointError(
                f"{where}: expected tensors only, got other things under {', '.join(odd[:8])}"
            )
        self._arrays = dict(arrays)
        self.tensors = {n: TensorInfo(a.shape, a.dtype) for n, a in self._arrays.items()}

    def get(self, name: str) -> np.ndarray:
        """The array itself."""
        return self._arrays[name]

    def drop(self, name: str) -> None:
        """All arrays are kept."""


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, `model.safetensors` or shards with an index.

    Only headers are read until `get`; everything is checked at once, so that a conversion does not
    fail half way.

    Attributes:
        tensors: shape and dtype by name, in the order of the files.
        left_out: names of tensors that are no weights, see `is_buffer`.

    Raises:
        CheckpointError: for missing, truncated or damaged files and an index that does not agree
            with them; all faults together.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._spans: dict[str, tuple[Path, int]] = {}  # file and first byte
        self._maps: dict[Path, mmap.mmap] = {}
        problems = []
        for file, listed in _shards(self.folder).items():
            path = self.folder / file
            try:
                header = _read_header(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            names = [name for name, _, _ in header]
            if listed is not None:
                problems += [
                    f"{file} lacks {n}, which the index lists" for n in listed - set(names)
                ]
                problems += [
                    f"{file} holds {n}, unknown to the index" for n in names if n not in listed
                ]
            for name, info, start in header:
                if name in self.tensors:
                    problems.append(f"{name} is in both {self._spans[name][0].name} and {file}")
                self.tensors[name], self._spans[name] = info, (path, start)
        if problems:
            more = f"; and {len(problems) - 8} more faults" if len(problems) > 8 else ""
            raise CheckpointError(f"{self.folder}: {'; '.join(problems[:8])}{more}")
        self.left_out = tuple(n for n, info in self.tensors.items() if is_buffer(n, info.dtype))
        for name in self.left_out:
            del self.tensors[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()

    def get(self, name: str) -> np.ndarray:
        """A read-only view of the file; valid for as long as it is referenced."""
        (path, start), info = self._spans[name], self.tensors[name]
        flat = np.frombuffer(self._map(path), info.dtype, info.size, start)
        return flat.reshape(info.shape)

    def drop(self, name: str) -> None:
        """Let go of the file pages under this tensor; a later access reads them again."""
        if not hasattr(mmap.mmap, "madvise"):  # Windows lets go of them by itself
            return
        (path, start), info = self._spans[name], self.tensors[name]
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map(path).madvise(mmap.MADV_DONTNEED, first, start + info.nbytes - first)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with open_file(path) as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    source: Weights,
    shard_bytes: int,
    progress: checkpoint.Progress,
) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index, one block at a time.

    Args:
        folder: where; must exist.
        tensors: what to write, in this order; another dtype than the source's is cast to.
        source: where the numbers come from.
        shard_bytes: a file grows no larger than this unless one tensor alone is.
        progress: called with (bytes_done, bytes_total).
    """
    shards: list[list[str]] = []
    room = 0
    for name, info in tensors.items():
        if not shards or info.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= info.nbytes
    done, total = 0, sum(info.nbytes for info in tensors.values())
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(_make_header({name: tensors[name] for name in names}))
            for name in names:
                array, dtype = source.get(name), tensors[name].dtype
                flat = array.reshape(1) if array.ndim == 0 else array
                for index in blocks(flat, row_major=True):
                    data = np.ascontiguousarray(flat[index], dtype).reshape(-1)
                    out.write(data.view(np.uint8).data)
                    done += data.nbytes
                    progress(done, total)
                del array, flat, data  # before the next tensor is read
                source.drop(name)
            out.flush()
            os.fsync(out.fileno())
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def blocks(
    array: np.ndarray, step_of: tuple[int, ...] | None = None, *, row_major: bool = False
) -> Iterator[tuple[slice, ...]]:
    """Indices that cut an array into parts of about `BLOCK_BYTES`.

    Args:
        array: what to cut; the cut runs along the axis that lies outermost in memory.
        step_of: cut at multiples of these sizes (the chunks of the file to be written).
        row_major: cut along the first axis, whatever the memory order.
    """
    if array.nbytes <= BLOCK_BYTES:
        yield (slice(None),) * array.ndim
        return
    axis = 0 if row_major else int(np.argmax(np.abs(array.strides)))
    size = array.shape[axis]
    step = max(1, BLOCK_BYTES * size // array.nbytes)
    if step_of is not None:
        step = max(1, step // step_of[axis]) * step_of[axis]
    for start in range(0, size, step):
        cut = slice(start, min(start + step, size))
        yield tuple(cut if i == axis else slice(None) for i in range(array.ndim))


def parse_dtype(dtype: str | None) -> np.dtype | None:
    """A dtype by name.

    Raises:
        CheckpointError: if it is not one that weights are stored in.
    """
    known = {d.name: d for d in DTYPES.values()}
    if dtype is not None and dtype not in known:
        raise CheckpointError(f"dtype {dtype!r}: expected one of {', '.join(known)}")
    return None if dtype is None else known[dtype]


def parse_size(size: int | str) -> int:
    """Bytes from a number or such as `"5GB"`.

    >>> parse_size("1.5MB")
    1500000

    Raises:
        CheckpointError: if it is not a positive size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?B?)\s*", str(size).upper())
    if not match or match[2] not in units or float(match[1]) <= 0:
        raise CheckpointError(
            f"size {size!r}: expected such as '5GB', '500MB' or a number of bytes"
        )
    return int(float(match[1]) * units[match[2]])


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


@contextmanager
def progress_bar(title: str) -> Iterator[checkpoint.Progress]:
    """A bar on stderr for as long as the block runs; gives the function that moves it."""
    columns = "[progress.description]{task.description}", BarColumn(), DownloadColumn()
    with ProgressBar(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """File names, with the tensor names that an index lists for each."""
    if not folder.is_dir():
        raise CheckpointError(f"no folder at {folder}: expected a Hugging Face checkpoint folder")
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    if not (folder / INDEX).exists():
        loose = sorted(p.name for p in folder.glob("*.safetensors"))
        old = any(p.suffix in (".bin", ".pt", ".pth") for p in folder.iterdir())
        hint = (
            f"found {len(loose)} shards but not {INDEX}: download that too"
            if loose
            else (
                "found pickled weights: save them as safetensors first"
                if old
                else "download it again"
            )
        )
        raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}; {hint}")
    try:
        weight_map = read_json(folder / INDEX, dict)["weight_map"]
        shards: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"shard name {file!r}")
            names = shards.setdefault(file, set())
            assert names is not None
            names.add(name)
    except (FileError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / INDEX} is damaged ({reason_of(error)}): download it again"
        ) from None
    missing = [file for file in sorted(shards) if not is_file(folder / file)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:8])}; "
            "download them"
        )
    return dict(sorted(shards.items()))


def _read_header(path: Path) -> list[tuple[str, TensorInfo, int]]:
    """Name, description and first byte of each tensor in a file, in file order."""
    try:
        spans = read_safetensors_header(path).spans
    except FileError as error:
        raise CheckpointError(f"{path.name}: {error.reason}; download it again") from None
    dtypes = DTYPES | BUFFERS
    if odd := next((name for name, span in spans.items() if span.tag not in dtypes), None):
        raise CheckpointError(
            f"{odd} has dtype {spans[odd].tag}: expected {', '.join(DTYPES)} (is it quantized?)"
        )
    return [(name, TensorInfo(span.shape, span.dtype), span.start) for name, span in spans.items()]


def _make_header(tensors: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in tensors.items():
        span = [position, position + info.nbytes]
        header[name] = {"dtype": TAGS[info.dtype], "shape": info.shape, "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
