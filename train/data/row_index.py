"""Rows of several files as one sequence, each read when it is asked for.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from sa2jax.errors import DataError, FileError
from sa2jax.files.raw import open_file
from sa2jax.files.rows import RowTable, find_rows


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Where each row of some files starts, found once.

    Attributes:
        files: the files: lines of jsonl, or one JSON array each.
        names: what messages call them.
        tables: the rows of each.
        first: number of the first row of each file, and of all rows at the end.
        fingerprint: SHA-256 of the files' bytes.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    tables: tuple[RowTable, ...]
    first: tuple[int, ...]
    fingerprint: str

    @classmethod
    def scan(cls, files: Sequence[Path], names: Sequence[str]) -> Self:
        """Look through the files once.

        Raises:
            DataError: if one cannot be read.
        """
        tables, first, digest = [], [0], hashlib.sha256()
        for path in files:
            try:
                table = find_rows(path)
            except FileError as error:
                raise DataError(f"{path} cannot be read: {error.reason}") from None
            tables.append(table)
            first.append(first[-1] + len(table.starts))
            digest.update(table.digest)
        return cls(tuple(files), tuple(names), tuple(tables), tuple(first), digest.hexdigest())

    def __len__(self) -> int:
        return self.first[-1]

    def read_row(self, index: int) -> tuple[bytes, str, Path]:
        """A row, where it stands ("talks.jsonl:12", "talks.json[11]"), and its file's folder."""
        index = checked_index(index, len(self))
        file = int(np.searchsorted(self.first, index, side="right")) - 1
        path, table, row = self.files[file], self.tables[file], index - self.first[file]
        try:
            with open_file(path) as handle:
                handle.seek(int(table.starts[row]))
                data = handle.read(int(table.sizes[row]))
        except FileError as error:
            raise DataError(f"{path} cannot be read any more: {error.reason}") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read any more: {error.strerror}") from None
        return data, f"{self.names[file]}{table.place(row)}", path.parent


def checked_index(index: int, size: int) -> int:
    """An index from 0, of one that may count from the end.

    Raises:
        IndexError: if there is no such item.
    """
    index = int(index)
    if not -size <= index < size:
        raise IndexError(f"index {index} of {size} samples")
    return index % size
