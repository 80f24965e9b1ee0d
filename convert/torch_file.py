"""`.pt` files of torch.save, read and written without torch, as data that can run no code.

A `.pt` file is a zip archive: `data.pkl` describes tensors, `data/N` holds their numbers. A pickle
is a program for a small stack machine. The machine here knows the instructions that describe plain
data and tensors and has none that could import or call anything; a file that names anything else is
refused with that name.
"""

import io
import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sa2jax import atomic_io
from sa2jax.convert.weights import TensorInfo
from sa2jax.errors import CheckpointError

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
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
        archive = _Archive(path)
        program = archive.read("data.pkl")
    except _Refused as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from None
    try:
        value = _Machine(archive).run(program)
        _check_tree(value)
    except _Refused as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a program of unknown origin may fail in any way
        raise CheckpointError(
            f"{path}: data.pkl is damaged ({type(error).__name__}: {error}): download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors (a state_dict), got {type(value).__name__}"
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
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with atomic_io.disk_errors(path):
        try:
            with part.open("wb") as file, zipfile.ZipFile(file, "w") as archive:

                def add(name, data):
                    return _add(archive, f"{path.stem}/{name}", data)

                add("data.pkl", _program(tensors))
                add("byteorder", b"little")
                for key, (name, info) in enumerate(tensors.items()):
                    array = get(name) if get else info
                    flat = np.ascontiguousarray(array, info.dtype).reshape(-1)
                    add(f"data/{key}", flat.view(np.uint8).data)
                add("version", b"3\n")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


class _Refused(Exception):
    """The file asks for something that is not data."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle would import; here only a name."""

    name: str


class _Mark:
    """A place on the stack."""


class _Archive:
    """Entries of a torch zip archive; stored ones are views of the mapped file."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            with zipfile.ZipFile(file) as archive:
                self._entries = {info.filename: info for info in archive.infolist()}
        self._path = path
        programs = [name for name in self._entries if name.endswith("data.pkl")]
        roots = [p.removesuffix("data.pkl") for p in programs if p.count("/") <= 1]
        if len(roots) != 1:
            raise _Refused("expected a .pt file of torch.save, got another zip archive")
        self._root = roots[0]
        if self.has("byteorder") and bytes(self.read("byteorder")) != b"little":
            raise _Refused("was saved on a big-endian machine: torch.save it again on this one")

    def has(self, name: str) -> bool:
        """Whether there is such an entry."""
        return self._root + name in self._entries

    def read(self, name: str) -> memoryview | bytes:
        """The bytes of an entry."""
        info = self._entries.get(self._root + name)
        if info is None:
            raise _Refused(f"entry {name!r} is missing: the file is damaged, download it again")
        if info.compress_type != zipfile.ZIP_STORED:
            with zipfile.ZipFile(self._path) as archive:
                return archive.read(info)
        header = self._bytes[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if magic != b"PK\3\4" or start + info.file_size > len(self._bytes):
            raise _Refused(
                f"entry {name!r} lies outside the file: it is damaged, download it again"
            )
        return self._bytes[start : start + info.file_size]


class _Machine:
    """The pickle machine, without the instructions that import or call."""

    def __init__(self, archive: _Archive):
        self._archive = archive
        self._storages: dict[str, np.ndarray] = {}
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: memoryview | bytes) -> Any:
        """Run the program; gives the object that it describes."""
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _PUSH:
                self._stack.append(argument)
            elif name in _MAKE:
                self._stack.append(_MAKE[name]())
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name not in _SKIP:
                raise _Refused(f"refused: its pickle uses {name}, which plain tensors do not need")
        raise ValueError("no end")

    def _to_mark(self) -> list[Any]:
        """Take everything above the last mark."""
        place = next(i for i in range(len(self._stack) - 1, -1, -1) if self._stack[i] is _Mark)
        items = self._stack[place + 1 :]
        del self._stack[place:]
        return items

    def _take(self, count: int) -> tuple[Any, ...]:
        items = tuple(self._stack[-count:])
        if len(items) != count:
            raise ValueError("stack is empty")
        del self._stack[-count:]
        return items

    def _put(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def _get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _global(self, name: str) -> None:
        module, _, attribute = name.rpartition(".")
        if name not in _CALLS and not (module == "torch" and attribute in STORAGES):
            raise _Refused(
                f"refused: it asks for {name!r}, which is not tensor data and could run code. "
                "Use the file as the model's authors published it"
            )
        self._stack.append(_Global(name))

    def _reduce(self) -> None:
        function, arguments = self._take(2)
        if not isinstance(function, _Global) or function.name not in _CALLS:
            raise _Refused(f"refused: its pickle calls {function!r}")
        self._stack.append(_CALLS[function.name](*arguments))

    def _build(self) -> None:
        """Attributes of a dictionary (torch keeps module versions there) mean nothing here."""
        (state,) = self._take(1)
        if not isinstance(self._stack[-1], dict) or not isinstance(state, dict):
            raise _Refused(
                f"refused: its pickle sets the state of a {type(self._stack[-1]).__name__}"
            )

    def _set_items(self, items: Sequence[Any]) -> None:
        if not isinstance(self._stack[-1], dict):
            raise TypeError("items of no dictionary")
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _append(self, items: Sequence[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise TypeError("entries of no list")
        self._stack[-1].extend(items)

    def _storage(self) -> None:
        """`("storage", type, key, device, elements)` to a flat array."""
        (reference,) = self._take(1)
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise _Refused("refused: its pickle refers to something that is no storage")
        _, kind, key, _, elements = reference
        if key not in self._storages:
            dtype = STORAGES[kind.name.removeprefix("torch.")]
            data = self._archive.read(f"data/{key}")
            if len(data) != elements * dtype.itemsize:
                raise _Refused(
                    f"storage {key} has {len(data)} bytes, expected {elements} x {dtype.itemsize}: "
                    "the file is damaged, download it again"
                )
            self._storages[key] = np.frombuffer(data, dtype)
        self._stack.append(self._storages[key])


def _tensor(
    storage: np.ndarray, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
) -> np.ndarray:
    """A view of a storage; `strides` count elements."""
    if not isinstance(storage, np.ndarray) or len(shape) != len(strides):
        raise TypeError("a tensor without storage or strides")
    if min([offset, *shape, *strides]) < 0:
        raise ValueError("a tensor with a negative size")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) == 0:
        return np.broadcast_to(np.zeros((), storage.dtype), tuple(shape))
    if last >= storage.size:
        raise ValueError("a tensor that is larger than its storage")
    steps = tuple(step * storage.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(shape), steps, writeable=False)


def _ordered_dict(pairs: Sequence[Any] = ()) -> dict[Any, Any]:
    return {key: value for key, value in pairs}


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered_dict,
}
_SKIP = {"PROTO", "FRAME"}
_PUSH = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
}
_MAKE: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: _Mark,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "TUPLE": lambda m, _: m._stack.append(tuple(m._to_mark())),
    "TUPLE1": lambda m, _: m._stack.append(m._take(1)),
    "TUPLE2": lambda m, _: m._stack.append(m._take(2)),
    "TUPLE3": lambda m, _: m._stack.append(m._take(3)),
    "SETITEM": lambda m, _: m._set_items(m._take(2)),
    "SETITEMS": lambda m, _: m._set_items(m._to_mark()),
    "APPEND": lambda m, _: m._append(m._take(1)),
    "APPENDS": lambda m, _: m._append(m._to_mark()),
    "BINPUT": lambda m, place: m._put(place),
    "LONG_BINPUT": lambda m, place: m._put(place),
    "MEMOIZE": lambda m, _: m._put(None),
    "BINGET": lambda m, place: m._get(place),
    "LONG_BINGET": lambda m, place: m._get(place),
    "GLOBAL": lambda m, name: m._global(name.replace(" ", ".")),
    "INST": lambda m, name: m._global(name.replace(" ", ".")),
    "STACK_GLOBAL": lambda m, _: m._global(".".join(m._take(2))),
    "REDUCE": lambda m, _: m._reduce(),
    "BUILD": lambda m, _: m._build(),
    "BINPERSID": lambda m, _: m._storage(),
}


def _check_tree(value: Any) -> None:
    """Containers must form a tree, so that a caller can walk them."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, (dict, list, tuple)) and item != ():
            if id(item) in seen:
                raise _Refused("refused: a container in it appears twice")
            seen.add(id(item))
            todo.extend(item.values() if isinstance(item, dict) else item)
        elif isinstance(item, _Global) or item is _Mark:
            raise _Refused(f"refused: {item!r} stands where a tensor was expected")


def _why_unreadable(path: Path, error: Exception) -> str:
    """Why a file that is no zip archive cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file: expected a .pt file of torch.save"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"version "):
        return "is a git-lfs pointer, not the weights: run `git lfs pull`"
    if start.startswith(b"\x80"):
        return (
            "is in torch's legacy format, a bare pickle: torch.load it and torch.save it again "
            "with torch >= 1.6"
        )
    what = "is truncated or damaged" if start.startswith(b"PK") else "is no .pt file of torch.save"
    return f"{what} ({error}): download it again"


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
