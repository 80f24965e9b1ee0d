"""Zip archives and numpy's arrays of unknown origin, unpacked within limits."""

import io
import math
import struct
import tokenize
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

from sa2jax.errors import FileError
from sa2jax.files.limits import ARRAYS, MAX_AXES, Limits

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of an entry: magic, length of its name, of its extra
_ENCRYPTED = 0x1
# Whatever zipfile and its decompressors do with bytes that are no archive.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    LookupError,
    struct.error,
)


class Archive:
    """The entries of a zip archive.

    Args:
        file: the archive, only read here.
        data: all its bytes, perhaps mapped.
        where: what to call it in an error.
        limits: how many entries it may have, and how large all that is unpacked may be.

    Attributes:
        names: of its entries.

    Raises:
        FileError: if it is no archive, or is damaged.
    """

    def __init__(
        self, file: BinaryIO, data: memoryview | bytes, where: str, limits: Limits = ARRAYS
    ):
        try:
            with zipfile.ZipFile(file) as archive:
                self._entries = {info.filename: info for info in archive.infolist()}
        except _DAMAGED as error:
            raise FileError(where, f"no zip archive, or a damaged one ({error})") from None
        if len(self._entries) > limits.nodes:
            raise FileError(where, f"expected at most {limits.nodes} entries, got more")
        self._data, self._where, self._room = memoryview(data), where, limits.bytes
        self.names = tuple(self._entries)

    def view(self, name: str) -> memoryview:
        """The bytes of an entry that is not compressed, as they lie in the archive.

        Raises:
            FileError: if there is none, it is compressed or encrypted, or lies outside.
        """
        info = self._entry(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise FileError(
                self._where, f"entry {name!r} is compressed: save it again, uncompressed"
            )
        head = info.header_offset
        try:
            magic, name_length, extra_length = _LOCAL_HEADER.unpack(
                self._data[head : head + _LOCAL_HEADER.size]
            )
        except struct.error:
            magic, name_length, extra_length = b"", 0, 0
        start = head + _LOCAL_HEADER.size + name_length + extra_length
        if magic != b"PK\3\4" or start + info.file_size > len(self._data):
            raise FileError(self._where, f"entry {name!r} lies outside the file: it is damaged")
        return self._data[start : start + info.file_size]

    def unpack(self, name: str) -> bytes | memoryview:
        """The bytes of an entry, compressed or not.

        Raises:
            FileError: if there is none, it is encrypted or damaged, or there is no room for it.
        """
        info = self._entry(name)
        if info.file_size > self._room:
            raise FileError(self._where, "more numbers than are read of one archive")
        self._room -= info.file_size
        if info.compress_type == zipfile.ZIP_STORED:
            return self.view(name)
        try:
            with zipfile.ZipFile(io.BytesIO(self._data)) as archive, archive.open(info) as entry:
                data = entry.read(info.file_size + 1)
        except _DAMAGED as error:
            raise FileError(self._where, f"entry {name!r} is damaged ({error})") from None
        if len(data) != info.file_size:
            raise FileError(self._where, f"entry {name!r} is damaged: it has another size")
        return data

    def _entry(self, name: str) -> zipfile.ZipInfo:
        info = self._entries.get(name)
        if info is None:
            raise FileError(self._where, f"entry {name!r} is missing")
        if info.flag_bits & _ENCRYPTED:
            raise FileError(self._where, f"entry {name!r} is encrypted")
        return info


def parse_npz(data: bytes, where: str, limits: Limits = ARRAYS) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, compressed or not; never pickles.

    Raises:
        FileError: if it is none, is damaged, or holds more than the limits allow.
    """
    archive = Archive(io.BytesIO(data), data, where, limits)
    return {
        name.removesuffix(".npy"): parse_npy(archive.unpack(name), f"{where}, {name}")
        for name in archive.names
    }


def parse_npy(data: bytes | memoryview, where: str) -> np.ndarray:
    """The array of numbers in an .npy file, a read-only view of its bytes.

    Raises:
        FileError: if it is none, or holds something else than numbers.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, by_columns, dtype = read(file)
        if dtype.kind not in "biufc" or dtype.itemsize > 16:
            raise ValueError(f"expected numbers, got {dtype}")
        if len(shape) > MAX_AXES or any(n < 0 for n in shape):
            raise ValueError("a shape that no array has")
        size = math.prod(shape)
        if size * dtype.itemsize != len(data) - file.tell():
            raise ValueError(f"{len(data)} bytes do not hold {size} numbers")
    except (
        *(ValueError, KeyError, TypeError, SyntaxError, OverflowError, EOFError),
        *(RecursionError, MemoryError, tokenize.TokenError),
    ) as error:
        raise FileError(where, f"no array of numpy ({error})") from None
    if not size:
        return np.empty(shape, dtype)
    flat = np.frombuffer(data, dtype, size, file.tell())
    return flat.reshape(shape, order="F" if by_columns else "C")
