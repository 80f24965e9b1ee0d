"""Bytes and text of regular files: no pipe that blocks, no device without an end, no surprise."""

import codecs
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from sa2jax.errors import FileError, MissingFileError
from sa2jax.files.limits import JSON, TEXT, Limits

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read its bytes.

    Raises:
        MissingFileError: if there is none.
        FileError: if it cannot be opened, or is a folder, a pipe, a device or a socket.
    """
    try:
        # Without O_NONBLOCK, to open a pipe waits for whoever writes to it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except FileNotFoundError:
        raise MissingFileError(str(path), "No such file or directory") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise FileError(str(path), f"cannot be opened ({_reason(error)})") from None
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise FileError(str(path), f"expected a file, got {_KINDS.get(kind, 'something else')}")
    return os.fdopen(handle, "rb")


def read_bytes(path: str | os.PathLike[str], limits: Limits) -> bytes:
    """All bytes of a file.

    Raises:
        MissingFileError: if there is none.
        FileError: if it is no regular file, cannot be read, or is larger than the limit.
    """
    with open_file(path) as file:
        try:
            data = file.read(limits.bytes + 1)
        except OSError as error:
            raise FileError(str(path), f"cannot be read ({_reason(error)})") from None
    if len(data) > limits.bytes:
        raise FileError(str(path), f"expected at most {limits.bytes >> 10} KiB, got more")
    return data


def read_text(path: str | os.PathLike[str], limits: Limits = TEXT) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        MissingFileError: if there is none.
        FileError: as `read_bytes`, or if it is no UTF-8.
    """
    return decode(read_bytes(path, limits), str(path))


def decode(data: bytes, where: str) -> str:
    """UTF-8 as text, without a byte order mark.

    Raises:
        FileError: if it is none.
    """
    if data.startswith(_WIDE):
        raise FileError(where, "not UTF-8 but UTF-16: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        raise FileError(where, reason) from None


def read_jsonl_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    r"""Number, from 1, and bytes of each line of a jsonl file that is not blank.

    Only `\n` ends a line. What else Unicode calls the end of one (U+2028, U+0085, a form feed) may
    stand inside a JSON text, as it is.

    Raises:
        MissingFileError: if there is no file.
        FileError: if it cannot be read, or a line is longer than a JSON file may be.
    """
    with open_file(path) as file:
        number = 0
        while True:
            try:
                line = file.readline(JSON.bytes + 1)
            except OSError as error:
                raise FileError(str(path), f"cannot be read ({_reason(error)})") from None
            if not line:
                return
            number += 1
            if len(line) > JSON.bytes:
                raise FileError(str(path), f"line {number} is longer than {JSON.bytes >> 20} MiB")
            if line.removeprefix(codecs.BOM_UTF8).strip():
                yield number, line


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file; never raises, whatever the name."""
    return os.path.isfile(path)  # a Path's own method raises for a name that is too long


_BINARY = getattr(os, "O_BINARY", 0)  # of Windows


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
