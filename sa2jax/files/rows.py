r"""Rows of data as people have them: a JSON value on each line, or the items of one JSON array.

Only `\n` ends a line. What else Unicode calls the end of one (U+2028, U+0085, a form feed) may
stand inside a JSON text, as it is.
"""

import codecs
import hashlib
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from sa2jax.errors import FileError
from sa2jax.files.limits import JSON, ROWS
from sa2jax.files.raw import open_file, read_bytes, read_jsonl_lines

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SPACE = b" \t\r\n"
# A text, closed or not, or what separates and nests values; matches in linear time.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[][{},]', re.DOTALL)
_EDGE = 4096  # bytes at both ends of a file that tell what it is
_BLOCK = 1 << 24
_SHORT, _MAX_SHORT = 8, 100_000  # bytes of a line that can be no record, and how many may be


@dataclass(frozen=True, eq=False)
class RowTable:
    """Where the rows of a file are, found once; blank lines are left out.

    Attributes:
        starts: first byte of each row.
        sizes: bytes of each.
        numbers: its line, from 1; or of an item of an array, from 0.
        is_array: whether the rows are items of one array.
        digest: SHA-256 of the file's bytes.
    """

    starts: Int64[np.ndarray, "N"]
    sizes: Int64[np.ndarray, "N"]
    numbers: Int64[np.ndarray, "N"]
    is_array: bool
    digest: bytes

    def place(self, index: int) -> str:
        """What follows a file's name to say which row is meant, such as ":12" or "[11]"."""
        return _place(int(self.numbers[index]), self.is_array)


def find_rows(path: str | os.PathLike[str]) -> RowTable:
    """Look through a file once.

    Raises:
        MissingFileError: if there is none.
        FileError: if it cannot be read, is UTF-16, or an array that is too large or cut off.
    """
    data = _array_bytes(path)
    places = None if data is None else _items(data, path)
    try:
        if data is None or places is None:
            return _line_table(path)
    except OSError as error:
        raise FileError(str(path), f"cannot be read ({error.strerror})") from None
    starts, stops = np.frombuffer(places, np.int64).reshape(-1, 2).T
    digest = hashlib.sha256(data).digest()
    return RowTable(starts, stops - starts, np.arange(len(starts)), True, digest)


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes]]:
    """Place, see `RowTable.place`, and bytes of each row of a file, in order.

    Raises:
        MissingFileError: if there is no file.
        FileError: as `find_rows`, or if a row is longer than a JSON file may be.
    """
    data = _array_bytes(path)
    places = None if data is None else _items(data, path)
    if data is None or places is None:
        for number, line in read_jsonl_lines(path):
            yield _place(number, False), line
        return
    for number, (start, stop) in enumerate(zip(places[::2], places[1::2], strict=True)):
        yield _place(number, True), data[start:stop]


def _place(number: int, is_array: bool) -> str:
    return f"[{number}]" if is_array else f":{number}"


# --- arrays -------------------------------------------------------------------------------------


def _array_bytes(path: str | os.PathLike[str]) -> bytes | None:
    """The bytes of a file that seems to be one array, None for any other."""
    with open_file(path) as file:
        try:
            start = file.read(_EDGE)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _EDGE))
            end = file.read(_EDGE)
        except OSError as error:
            raise FileError(str(path), f"cannot be read ({error.strerror})") from None
    if start.startswith(_UTF_16):
        raise FileError(
            str(path), "UTF-16, expected UTF-8: `iconv -f UTF-16 -t UTF-8` writes it so"
        )
    if not start.removeprefix(codecs.BOM_UTF8).lstrip(_SPACE).startswith(b"["):
        return None
    if not end.rstrip(_SPACE).endswith(b"]"):
        if Path(path).suffix == ".json":
            raise FileError(str(path), "a JSON array without its end: it is cut off")
        return None
    try:
        return read_bytes(path, ROWS)
    except FileError as error:
        how = f"`jq -c '.[]' {Path(path).name}` writes the items of an array as lines"
        raise FileError(str(path), f"a JSON array: {error.reason}; {how}") from None


def _items(data: bytes, path: str | os.PathLike[str]) -> array | None:
    """First byte and end of each item of an array; None if more follows its end, or it has none.

    Items are told apart and not read: one that is no JSON is its reader's matter.
    """
    depth, begin, places = 0, 0, array("q")
    for token in _TOKEN.finditer(data, data.index(b"[")):
        byte = data[token.start()]
        if byte in b"[{":
            depth += 1
            if depth == 1:
                begin = token.end()
        elif byte in b"]}":
            depth -= 1
        if depth == 0 or (depth == 1 and byte == ord(",")):
            item = data[begin : token.start()]
            start = begin + len(item) - len(item.lstrip(_SPACE))
            places.extend((start, max(start, begin + len(item.rstrip(_SPACE)))))
            if len(places) > 2 * ROWS.nodes:
                raise FileError(str(path), f"an array of more than {ROWS.nodes} items")
            begin = token.end()
        if depth == 0:
            break
    else:
        return None
    if data[begin:].strip(_SPACE):
        return None
    return array("q") if len(places) == 2 and places[0] == places[1] else places


# --- lines --------------------------------------------------------------------------------------


def _line_table(path: str | os.PathLike[str]) -> RowTable:
    """First byte and number of each line that is not blank, read in blocks."""
    digest, done, start, line = hashlib.sha256(), 0, 0, 1
    found: list[np.ndarray] = []
    short = 0
    with open_file(path) as handle:
        while True:
            block = handle.read(_BLOCK)
            digest.update(block)
            bytes_ = np.frombuffer(block, np.uint8)
            stops = done + np.flatnonzero(bytes_ == ord("\n"))
            done += len(block)
            if not block:  # the last line ends with the file
                stops = np.array([done])
            starts = np.concatenate([[start], stops[:-1] + 1])[: len(stops)]
            sizes = stops - starts
            lone = np.flatnonzero((sizes == 1) & (starts >= done - len(block)))
            sizes[lone[bytes_[starts[lone] - done] == ord("\r")]] = 0
            kept = np.flatnonzero(sizes)
            short += int(np.count_nonzero(sizes[kept] < _SHORT))
            if short > _MAX_SHORT:
                raise FileError(
                    str(path), f"more than {_MAX_SHORT} lines that are too short for a record"
                )
            found.append(np.stack([starts, stops, line + np.arange(len(stops))])[:, kept])
            if len(stops):
                start, line = int(stops[-1]) + 1, line + len(stops)
            if not block:
                break
        starts, stops, numbers = np.concatenate(found, axis=1).astype(np.int64)
        blank = []
        for index in np.flatnonzero(stops - starts < _SHORT).tolist():
            handle.seek(int(starts[index]))
            text = handle.read(int(stops[index] - starts[index]))
            if not text.removeprefix(codecs.BOM_UTF8).strip():
                blank.append(index)
    starts, stops, numbers = (np.delete(each, blank) for each in (starts, stops, numbers))
    sizes = np.minimum(stops - starts, JSON.bytes + 1)
    return RowTable(starts, sizes, numbers, False, digest.digest())
