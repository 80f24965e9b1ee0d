"""The pickle inside a `.pt` file, run as a description of data.

A pickle is a program for a small stack machine. The machine here knows the instructions that
describe plain data and tensors and has none that could import or call anything; a program that
names anything else is refused with that name. It makes no more than it has instructions: nothing is
hashed, compared or printed that could contain itself over and over.
"""

import io
import math
import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from sa2jax.errors import FileError
from sa2jax.files.limits import MAX_AXES, MAX_INT, MAX_REPEATED, PICKLE, Limits, require_depth

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


def run_pickle(
    program: memoryview | bytes,
    read_storage: Callable[[str], memoryview | bytes],
    where: str,
    limits: Limits = PICKLE,
) -> Any:
    """The object that a pickle of torch.save describes.

    Args:
        program: the pickle.
        read_storage: gives the numbers of a storage by its key.
        where: what to call the file in an error.
        limits: how long it may be, how many instructions it may have, how deep what it makes is.

    Returns:
        Tensors as read-only arrays, strides and shared storages kept; dictionaries, lists, tuples,
        numbers and texts as they are. Containers form a tree.

    Raises:
        FileError: if it asks for anything but tensors and plain data, or is damaged.
    """
    if len(program) > limits.bytes:
        raise FileError(where, f"expected a description of at most {limits.bytes >> 20} MiB")
    try:
        value = _Machine(read_storage, limits.nodes).run(program)
        _check_tree(value)
        require_depth(value, limits, where)
    except FileError:
        raise
    except _Refused as error:
        raise FileError(where, str(error)) from None
    except Exception as error:  # a program of unknown origin may fail in any way
        raise FileError(
            where, f"data.pkl is damaged ({type(error).__name__}: {error}): download it again"
        ) from None
    return value


class _Refused(Exception):
    """The file asks for something that is not data."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle would import; here only a name."""

    name: str


class _Mark:
    """A place on the stack."""


class _Machine:
    """The pickle machine, without the instructions that import or call."""

    def __init__(self, read_storage: Callable[[str], memoryview | bytes], room: int):
        self._read_storage = read_storage
        self._room = room  # for instructions, and for what they copy
        self._storages: dict[str, np.ndarray] = {}
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: memoryview | bytes) -> Any:
        """Run the program; gives the object that it describes."""
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
            name = opcode.name
            self._spend(1)
            if name == "STOP":
                return self._stack.pop()
            if name in _PUSH:
                if isinstance(argument, int) and abs(argument) > MAX_INT:
                    raise _Refused("refused: its pickle holds a number of more than 64 bits")
                self._stack.append(argument)
            elif name in _MAKE:
                self._stack.append(_MAKE[name]())
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name not in _SKIP:
                raise _Refused(f"refused: its pickle uses {name}, which plain tensors do not need")
        raise ValueError("no end")

    def _spend(self, count: int) -> None:
        self._room -= count
        if self._room < 0:
            raise _Refused("refused: its pickle does more than any description of tensors")

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
                f"refused: it asks for {name[:80]!r}, which is not tensor data and could run code. "
                "Use the file as the model's authors published it"
            )
        self._stack.append(_Global(name))

    def _reduce(self) -> None:
        function, arguments = self._take(2)
        if not isinstance(function, _Global) or function.name not in _CALLS:
            raise _Refused(f"refused: its pickle calls {_describe(function)}")
        if not isinstance(arguments, tuple):
            raise TypeError("a call without arguments")
        self._spend(sum(len(a) for a in arguments if isinstance(a, tuple | list)))
        self._stack.append(_CALLS[function.name](*arguments))

    def _build(self) -> None:
        """Attributes of a dictionary (torch keeps module versions there) mean nothing here."""
        (state,) = self._take(1)
        if not isinstance(self._stack[-1], dict) or not isinstance(state, dict):
            raise _Refused(f"refused: its pickle sets the state of {_describe(self._stack[-1])}")

    def _set_items(self, items: Sequence[Any]) -> None:
        if not isinstance(self._stack[-1], dict):
            raise TypeError("items of no dictionary")
        self._stack[-1].update(_keyed(zip(items[::2], items[1::2], strict=True)))

    def _append(self, items: Sequence[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise TypeError("entries of no list")
        self._stack[-1].extend(items)

    def _storage(self) -> None:
        """`("storage", type, key, device, elements)` to a flat array."""
        (reference,) = self._take(1)
        if not isinstance(reference, tuple) or len(reference) != 5:
            raise _Refused("refused: its pickle refers to something that is no storage")
        word, kind, key, _, elements = reference
        if not (
            (isinstance(word, str) and word == "storage")
            and isinstance(kind, _Global)
            and isinstance(key, str)
            and type(elements) is int
        ):
            raise _Refused("refused: its pickle refers to something that is no storage")
        if key not in self._storages:
            dtype = STORAGES[kind.name.removeprefix("torch.")]
            data = self._read_storage(key)
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
    if not isinstance(storage, np.ndarray) or not _is_sizes(shape) or not _is_sizes(strides):
        raise TypeError("a tensor without storage, shape or strides")
    if type(offset) is not int or len(shape) != len(strides):
        raise TypeError("a tensor whose strides are not those of its shape")
    if min([offset, *shape, *strides]) < 0:
        raise ValueError("a tensor with a negative size")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    size = math.prod(shape)
    if size == 0:
        return np.broadcast_to(np.zeros((), storage.dtype), tuple(shape))
    if last >= storage.size:
        raise ValueError("a tensor that is larger than its storage")
    if size > storage.size and size * storage.itemsize > MAX_REPEATED:
        raise ValueError("a tensor that repeats its storage: save it with .contiguous()")
    steps = tuple(step * storage.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(shape), steps, writeable=False)


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) <= MAX_AXES
        and all(type(n) is int for n in value)
    )


def _keyed(pairs: Any) -> dict[str | int, Any]:
    """A dictionary, if its keys are plain: the hash of anything else may take for ever."""
    found = {}
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise TypeError(f"{_describe(key)} as a key")
        found[key] = value
    return found


def _ordered_dict(pairs: Sequence[Any] = ()) -> dict[str | int, Any]:
    return _keyed(pairs)


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data


def _describe(value: Any) -> str:
    """What an object is, in a few words: its own text may be endless."""
    return value.name if isinstance(value, _Global) else f"a {type(value).__name__}"


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
_MAKE: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: _Mark,
}
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
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
        if isinstance(item, dict | list | tuple) and item != ():
            if id(item) in seen and isinstance(item, tuple) and _is_flat(item):
                continue  # such as the betas that all groups of an optimizer share
            if id(item) in seen:
                raise _Refused("refused: a container in it appears twice")
            seen.add(id(item))
            todo.extend(item.values() if isinstance(item, dict) else item)
        elif isinstance(item, _Global) or item is _Mark:
            raise _Refused("refused: a name stands where a tensor was expected")


def _is_flat(item: tuple[Any, ...]) -> bool:
    return len(item) <= MAX_AXES and not any(isinstance(x, dict | list | tuple) for x in item)
