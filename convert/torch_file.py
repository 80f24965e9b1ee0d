"""`.pt` files of torch.save, read and written without torch, as data that can run no code.

A `.pt` file is a zip archive: `data.pkl` describes tensors, `data/N` holds their numbers. See
`files.torch_pickle` for what a description may ask for.
"""

import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sa2jax import atomic_io
from sa2jax.convert.weights import TensorInfo
from sa2jax.errors import CheckpointError, FileError, MissingFileError
from sa2jax.files.archives import Archive
from sa2jax.files.raw import open_file
from sa2jax.files.torch_pickle import STORAGES, run_pickle

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64  # of numbers within the file, as torch has it
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: magic, length of its name, of its extra


def read(path: str | Path) -> dict[str, Any]:
    """The dictionary that torch.save wrote to a `.pt` file.

    Args:
        path: a zip archive, the format of torch ≥ 1.6.

    Returns:
        Tensors by name as read-only views of the memory-mapped file, strides and shared storages
        kept; nested dictionaries, numbers and strings as they are.

    Raises:
        CheckpointError: for a missing, truncated or damaged file, the legacy format, or a pickle
            that asks for anything but tensors and plain data; the message names it.
    """
    path = Path(path)
    try:
        archive, root = _open(path)
        value = run_pickle(
            archive.view(f"{root}data.pkl"),
            lambda key: archive.view(f"{root}data/{key}"),
            str(path),
        )
    except FileError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors (a state_dict), got {type(value).__name__}"
        )
    if odd := [key for key in value if not isinstance(key, str)]:
        raise CheckpointError(
            f"{path}: expected tensors by name (a state_dict), got {odd[0]!r} as a name"
        )
    return value


def write(
    path: str | Path,
    tensors: Mapping[str, np.ndarray] | Mapping[str, TensorInfo],
    get: Callable[[str], Any] | None = None,
) -> None:
    """Write tensors as a `.pt` file that `torch.load(path, weights_only=True)` reads.

    Args:
        path: the file to make; it appears only when it is complete.
        tensors: arrays by name, in any of the dtypes of `STORAGES`; or what they will be.
        get: reads one of them when its turn has come, to be cast to that dtype.

    Raises:
        CheckpointError: if an array has another dtype, or the file cannot be written.
    """
    path = Path(path)
    foreign = {n: str(a.dtype) for n, a in tensors.items() if a.dtype not in _STORAGE_OF}
    if foreign:
        raise CheckpointError(f"{path}: torch has no storage for {foreign}")
    with (
        atomic_io.disk_errors(path),
        atomic_io.new_file(path) as part,
        part.open("wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):

        def add(name, data):
            return _add(archive, f"{path.stem}/{name}", data)

        add("data.pkl", _program(tensors))
        add("byteorder", b"little")
        for key, (name, info) in enumerate(tensors.items()):
            array = get(name) if get else info
            flat = np.ascontiguousarray(array, info.dtype).reshape(-1)
            add(f"data/{key}", flat.view(np.uint8).data)
        add("version", b"3\n")


def _open(path: Path) -> tuple[Archive, str]:
    """The archive, mapped, and the folder in it that all entries are in.

    Raises:
        FileError: if it is no archive of torch.save.
    """
    where = str(path)
    try:
        file = open_file(path)
    except MissingFileError:
        raise FileError(where, "no such file: expected a .pt file of torch.save") from None
    with file:
        start = file.read(8)
        if start == b"version ":
            raise FileError(where, "a git-lfs pointer, not the weights: run `git lfs pull`")
        if start.startswith(b"\x80"):
            raise FileError(
                where,
                "torch's legacy format, a bare pickle: torch.load it and torch.save it again "
                "with torch >= 1.6",
            )
        if not start.startswith(b"PK"):
            raise FileError(where, "no .pt file of torch.save: download it again")
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            archive = Archive(file, data, where)
        except FileError as error:
            raise FileError(
                where, f"is truncated or damaged ({error.reason}): download it again"
            ) from None
    programs = [name for name in archive.names if name.endswith("data.pkl")]
    roots = [p.removesuffix("data.pkl") for p in programs if p.count("/") <= 1]
    if len(roots) != 1:
        raise FileError(where, "expected a .pt file of torch.save, got another zip archive")
    order = f"{roots[0]}byteorder"
    if order in archive.names and bytes(archive.view(order)[:16]) != b"little":
        raise FileError(where, "was saved on a big-endian machine: torch.save it again on this one")
    return archive, roots[0]


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Add an entry whose numbers start at a multiple of the alignment."""
    info = zipfile.ZipInfo(name)  # dated 1980: the same tensors make the same file
    offset = archive.start_dir + _LOCAL_HEADER.size + len(name.encode()) + 4
    large = len(data) >= zipfile.ZIP64_LIMIT
    padding = -(offset + (20 if large else 0)) % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(data)


def _program(tensors: Mapping[str, Any]) -> bytes:
    """The pickle of a dictionary of contiguous tensors, storage i for tensor i."""
    parts = [b"\x80\x02}("]  # protocol 2, an empty dictionary, a mark
    for key, (name, array) in enumerate(tensors.items()):
        strides = [math.prod(array.shape[i + 1 :]) for i in range(len(array.shape))]
        parts += [
            _text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _text("storage"),
            f"ctorch\n{_STORAGE_OF[array.dtype]}\n".encode(),
            _text(str(key)),
            _text("cpu"),
            _integer(array.size),
            b"tQ",  # the storage's tuple, resolved
            _integer(0),
            b"(" + b"".join(map(_integer, array.shape)) + b"t",
            b"(" + b"".join(map(_integer, strides)) + b"t",
            b"\x89ccollections\nOrderedDict\n)R",  # needs no gradient, has no hooks
            b"tR",
        ]
    return b"".join([*parts, b"u."])


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + value.to_bytes(4, "little")
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)
