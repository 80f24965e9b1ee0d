"""safetensors of unknown origin: the header checked against the file, the numbers as views of it.

The format is the length of a JSON header, the header, and raw numbers. The package of that name
reads tensors whole, and what it says of a damaged file depends on its version.
"""

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from sa2jax.errors import FileError
from sa2jax.files.json_files import parse_json
from sa2jax.files.limits import JSON, MAX_AXES
from sa2jax.files.raw import open_file

DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor lies in its file.

    Attributes:
        tag: its dtype as safetensors calls it, a key of `DTYPES`.
        shape: its sizes.
        start: its first byte in the file.
    """

    tag: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        return DTYPES[self.tag]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says of itself.

    Attributes:
        spans: its tensors by name, in the order of their numbers.
        metadata: texts by name.
    """

    spans: Mapping[str, TensorSpan]
    metadata: Mapping[str, str]


def read_safetensors_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """The header of a safetensors file.

    Raises:
        MissingFileError: if there is no file.
        FileError: if it is truncated, damaged or something else.
    """
    where = str(path)
    with open_file(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
        if start == b"version ":
            raise FileError(where, "a git-lfs pointer, not the weights: run `git lfs pull`")
        return _parse_header(file.read(_header_length(start, size, where)), size, where)


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Tensors by name and the metadata of a safetensors file.

    Returns:
        The tensors as read-only views of the mapped file, of any dtype in `DTYPES`; the metadata.

    Raises:
        MissingFileError: if there is no file.
        FileError: if it is truncated, damaged or something else.
    """
    header = read_safetensors_header(path)
    with open_file(path) as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _views(data, header), header.metadata


def parse_safetensors(
    data: bytes, where: str = "the tensors"
) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Tensors by name, as read-only views of these bytes, and the metadata.

    Raises:
        FileError: if they are no safetensors.
    """
    length = _header_length(data[:8], len(data), where)
    header = _parse_header(data[8 : 8 + length], len(data), where)
    return _views(data, header), header.metadata


def _views(data: Any, header: SafetensorsHeader) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(data, span.dtype, math.prod(span.shape), span.start).reshape(span.shape)
        if span.nbytes
        else np.empty(span.shape, span.dtype)
        for name, span in header.spans.items()
    }


def _header_length(start: bytes, size: int, where: str) -> int:
    length = int.from_bytes(start, "little")
    if size < 8 or length > size - 8:
        raise FileError(where, f"truncated or no safetensors file ({size} bytes)")
    if length > JSON.bytes:
        raise FileError(where, f"a header of {length} bytes, expected at most {JSON.bytes}")
    return length


def _parse_header(text: bytes, size: int, where: str) -> SafetensorsHeader:
    """The header of a file of so many bytes, whose numbers follow each other without gaps."""
    try:
        raw = parse_json(text, dict, where=where)
        metadata = raw.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise ValueError("metadata that is no text")
        entries = sorted(raw.items(), key=lambda item: item[1]["data_offsets"])
        first = 8 + len(text)
        position, spans = first, {}
        for name, entry in entries:
            spans[name] = span = _span(name, entry, position)
            begin, end = entry["data_offsets"]
            if (begin, end) != (position - first, position - first + span.nbytes):
                raise ValueError(f"offsets of {name!r}")
            position += span.nbytes
    except FileError as error:
        raise FileError(where, f"a damaged header ({error.reason})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(where, f"a damaged header ({error})") from None
    if position != size:
        what = "truncated" if size < position else "too long"
        raise FileError(where, f"{what}: expected {position} bytes, got {size}")
    return SafetensorsHeader(spans, metadata)


def _span(name: str, entry: Mapping[str, Any], start: int) -> TensorSpan:
    tag, shape = entry["dtype"], entry["shape"]
    if tag not in DTYPES:
        raise ValueError(f"dtype {tag!r} of {name!r}, expected one of {', '.join(DTYPES)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_AXES
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise ValueError(f"shape of {name!r}: expected up to {MAX_AXES} whole numbers from 0 on")
    return TensorSpan(tag, tuple(shape), start)
