"""Headers of sound files that name more or less sound than there is, and what they should say.

A recorder that was killed, a browser or a pipe leaves a size of 0, of 4 GB or of some moment before
the end. libsndfile believes most of them, or refuses the file; here the sizes are put right as the
file is read.

Sources: "Multimedia Programming Interface and Data Specifications 1.0" (RIFF), EBU Tech 3306
(RF64), Apple's Core Audio Format Specification, RFC 9639 (FLAC).
"""

import io
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

_CHUNKS = 1000  # so many are looked at: no file has more
_BLOCK = 1 << 20
# What stands behind the sound in files of whole programs, and may itself be cut.
_KNOWN = (
    b"LIST id3 ID3  fact cue  smpl inst bext iXML axml PEAK JUNK junk PAD  FLLR afsp DISP acid _PMX"
)
_UNKNOWN_SIZE = 0xFFFFFFFF


@dataclass(frozen=True)
class Header:
    """What to change in a header, and what to say of it.

    Attributes:
        patches: bytes to be read at an offset in place of those that are there.
        note: what was wrong, for the user; empty if nothing was.
        frames: how many samples per channel a FLAC header names, which are not to be believed.
    """

    patches: Mapping[int, bytes] = field(default_factory=dict)
    note: str = ""
    frames: int | None = None


def check_header(file: BinaryIO) -> Header:
    """Compare the sizes that a header names with the file's; other formats are left alone.

    Args:
        file: an open file that can seek; where it stands afterwards is not said.
    """
    size = file.seek(0, os.SEEK_END)
    head = _at(file, 0, 26)
    match head[:4]:
        case b"RIFF" | b"RIFX" | b"RF64" | b"BW64" if head[8:12] == b"WAVE":
            return _check_wav(file, size, ">" if head[:4] == b"RIFX" else "<")
        case b".snd" | b"dns." if len(head) >= 12:
            order = ">" if head[:4] == b".snd" else "<"
            start, named = struct.unpack(order + "II", head[4:12])
            fix = {8: struct.pack(order + "I", _UNKNOWN_SIZE)}
            return Header() if named == _UNKNOWN_SIZE else _judge(named, size - start, fix)
        case b"caff":
            return _check_caf(file, size)
        case b"fLaC" if len(head) == 26 and head[4] & 0x7F == 0:
            packed = int.from_bytes(head[18:26], "big")  # rate, channels, bits, 36 bits of length
            frames = packed % 2**36
            return Header({18: (packed - frames).to_bytes(8, "big")}, frames=frames or None)
    return Header()


def _check_wav(file: BinaryIO, size: int, order: str) -> Header:
    at, long = 12, None  # where the length of RF64 is
    for _ in range(_CHUNKS):
        head = _at(file, at, 8)
        if len(head) < 8:
            return Header()
        name, named = head[:4], struct.unpack(order + "I", head[4:])[0]
        if name == b"ds64":
            long = at + 16
        if name == b"data":
            break
        at += 8 + named + named % 2
    else:
        return Header()
    start, where = at + 8, at + 4
    if long is not None and named == _UNKNOWN_SIZE and len(wide := _at(file, long, 8)) == 8:
        named, where = struct.unpack(order + "Q", wide)[0], long
    there = size - start
    if named < there and _is_chunks(file, start + named + named % 2, size, order + "I", named):
        return Header()
    fixed = there if where == long else min(there, _UNKNOWN_SIZE)
    return _judge(
        named, there, {where: struct.pack(order + ("Q" if where == long else "I"), fixed)}
    )


def _check_caf(file: BinaryIO, size: int) -> Header:
    at = 8
    for _ in range(_CHUNKS):
        head = _at(file, at, 12)
        if len(head) < 12:
            return Header()
        named = struct.unpack(">q", head[4:])[0]
        if head[:4] == b"data":
            break
        if named < 0:
            return Header()
        at += 12 + named
    else:
        return Header()
    start = at + 12
    there, fix = size - start, {at + 4: struct.pack(">q", size - start)}
    if named == -1:  # as the format has it for a file that is still being written
        return Header(fix)
    if 0 <= named < there and _is_chunks(file, start + named, size, ">q", named):
        return Header()
    return _judge(named, there, fix)


def _judge(named: int, there: int, patches: Mapping[int, bytes]) -> Header:
    """A header that names so many bytes of sound where there are so many."""
    if named == there or there <= 0:
        return Header()
    what = "less" if named < there else "more"
    note = f"its header names {what} sound than the file holds: read to the end of the file"
    return Header(patches, note)


def _is_chunks(file: BinaryIO, at: int, end: int, length: str, named: int) -> bool:
    """Whether what follows the sound is chunks, or filled up with zeros, and not more sound."""
    head = 4 + struct.calcsize(length)
    for _ in range(_CHUNKS):
        if end - at < head:
            return True
        data = _at(file, at, head)
        if not all(32 <= byte < 127 for byte in data[:4]):
            return named > 0 and _is_zero(file, at, end)
        size = struct.unpack(length, data[4:])[0]
        if size < 0 or at + head + size > end:
            return data[:4] in _KNOWN
        at += head + size + (size % 2 if head == 8 else 0)
    return True


def _is_zero(file: BinaryIO, at: int, end: int) -> bool:
    for start in range(at, end, _BLOCK):
        if any(_at(file, start, min(_BLOCK, end - start))):
            return False
    return True


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def missing_tag(file: BinaryIO) -> bytes:
    """The ID3 tag that an mp3 without one needs in front; nothing for any other file.

    libsndfile (1.2) knows an mp3 in memory by its tag alone. Zeros before the sound count to it.
    """
    start = _at(file, 0, _BLOCK)
    sound = start.lstrip(b"\0")
    if len(sound) < 2 or sound[0] != 0xFF or sound[1] & 0xE0 != 0xE0:
        return b""
    size = 10 + len(start) - len(sound)  # in bytes of seven bits
    return b"ID3\4\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + bytes(10)


class PatchedFile(io.RawIOBase):
    """A file of which some bytes read otherwise, or that begins earlier.

    Args:
        file: the file, which stays open when this one is closed.
        patches: bytes by their offset.
        lead: bytes in front of it, of a file without patches.
    """

    def __init__(self, file: BinaryIO, patches: Mapping[int, bytes], lead: bytes = b""):
        self._file, self._patches, self._position, self._lead = file, patches, 0, lead
        file.seek(0)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, as any file does."""
        lead = len(self._lead)
        if whence == os.SEEK_END:
            self._position = lead + self._file.seek(offset, whence)
        else:
            self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        self._file.seek(max(0, self._position - lead))
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readinto(self, buffer) -> int:
        """Fill a buffer; gives how many bytes were read."""
        view = memoryview(buffer).cast("B")
        data = bytearray(self._lead[self._position :][: len(view)])
        data += self._file.read(len(view) - len(data))
        for offset, patch in self._patches.items():
            for n, byte in enumerate(patch, offset - self._position):
                if 0 <= n < len(data):
                    data[n] = byte
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
