"""What an image file says of itself, read by us before Pillow believes it.

Older Pillows trust some of it too far: a table of tags may claim the same megabytes a thousand times, and a JPEG's
decoder writes lines as long as *it* reads them in the header, into a buffer as long as Pillow read them.
"""

import io
import re
from dataclasses import dataclass
from typing import BinaryIO, Literal

__all__ = ["JpegHeader", "check_embedded_tags", "check_gif", "check_tags", "check_tiff", "count_frames", "read_jpeg"]

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_BELOW = (0x8769, 0x8825, 0xA005)  # tags that hold the place of another table: EXIF, GPS, interoperability
_MOST_TAGS = 65_535
_SLACK = 2**20  # honest tables overlap a little, and damaged ones claim a little too much
_MOST_SEGMENTS = 100_000
_MOST_JUNK = 2**16  # between the segments of a JPEG
_MOST_SCANS = 100  # of a progressive JPEG; ten are usual
_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_TABLE = re.compile(rb"II\*\0|MM\0\*")
_MOST_TABLES = 64
_MOST_COMMENT = 2**20
_MOST_PREFIXES = 4  # some programs write "Exif" before "Exif"


@dataclass(frozen=True)
class JpegHeader:
    """The size of a JPEG as its decoder will read it."""

    width: int
    height: int
    layers: int
    progressive: bool


def read_jpeg(file: BinaryIO) -> JpegHeader | None:
    """Read a JPEG's segments up to its pixels, as libjpeg does; None when no size is among them.

    Raises:
        ValueError: it has several sizes, no end, too many scans, or tables of tags that cannot be; the text says which.
    """
    file.seek(2)
    found: JpegHeader | None = None
    exif = b""
    junk = 0
    for _ in range(_MOST_SEGMENTS):
        byte = file.read(1)
        while byte and byte != b"\xff":  # what libjpeg passes over
            junk += 1
            if junk > _MOST_JUNK:
                raise ValueError("its header has no end")
            byte = file.read(1)
        while byte == b"\xff":
            byte = file.read(1)
        if not byte:
            break
        marker = byte[0]
        if marker == 0 or marker == 0x01 or 0xD0 <= marker <= 0xD7:
            continue
        if marker in (0xD8, 0xD9, 0xDA):
            if marker == 0xDA and found is not None:
                _check_scans(file, found)
            break
        length = int.from_bytes(file.read(2), "big")
        data = file.read(max(0, length - 2))
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if found is not None:
                raise ValueError("its header gives two sizes")
            if len(data) >= 6:
                height, width = int.from_bytes(data[1:3], "big"), int.from_bytes(data[3:5], "big")
                found = JpegHeader(width, height, data[5], marker in (0xC2, 0xC6, 0xCA, 0xCE))
        elif marker == 0xE1 and data.startswith(b"Exif\0\0"):
            exif += data if not exif else data[6:]
        elif marker == 0xE2 and data.startswith(b"MPF\0"):
            check_tags(data[4:])
    else:
        raise ValueError("its header has no end")
    check_tags(exif)
    return found


def _check_scans(file: BinaryIO, header: JpegHeader) -> None:
    """Refuse an image that is drawn over and over: each scan is a few bytes, and the work of the whole image."""
    first = file.read(3)  # of the first scan: two bytes of length, and how many layers it holds
    if not header.progressive and len(first) == 3 and first[2] >= header.layers:
        return  # libjpeg reads no other scan
    data = file.read()
    if data.count(_SCAN) < _MOST_SCANS:  # as nearly always, and counted a hundred times faster than below
        return
    scans, place = 1, 0
    while match := _MARKER.search(data, place):
        place = match.end()
        if match[0] == b"\xff\xd9":  # what follows the image, such as a film, is not decoded
            return
        scans += match[0] == _SCAN
        if scans > _MOST_SCANS:
            raise ValueError("it is drawn over and over")
        place += int.from_bytes(data[place : place + 2], "big")


def check_tags(data: bytes) -> None:
    """Check a block of EXIF data, or of another table of tags that begins as a TIFF file does.

    Raises:
        ValueError: its tags claim more than it holds, or it does not end.
    """
    for _ in range(_MOST_PREFIXES):
        data = data.removeprefix(b"Exif\0\0")
    if data.startswith(b"Exif\0\0"):
        raise ValueError("its EXIF data do not end")
    if data[:2] in (b"II", b"MM"):
        _Tables(io.BytesIO(data), len(data), below=True).check()


def check_tiff(file: BinaryIO) -> None:
    """Check the first table of tags of a TIFF file.

    Raises:
        ValueError: its tags claim more than the file holds, or there are too many.
    """
    size = file.seek(0, io.SEEK_END)
    _Tables(file, size, below=False).check()


def count_frames(file: BinaryIO, most: int) -> int:
    """How many frames a TIFF file has, `most` at most; the tags of each are checked.

    Raises:
        ValueError: the tags of one claim more than the file holds, or there are too many.
    """
    size = file.seek(0, io.SEEK_END)
    first = _Tables(file, size, below=False)
    place, seen = first.first, set[int]()
    while place and place not in seen and len(seen) < most:
        seen.add(place)
        place = _Tables(file, size, below=False).look_on(place)
    return max(1, len(seen))


def check_embedded_tags(file: BinaryIO) -> None:
    """Check every table of tags in an AVIF or HEIC file: they are read as soon as such a file is opened.

    Raises:
        ValueError: its tags claim more than the file holds, or there are too many tables.
    """
    file.seek(0)
    data = file.read()
    for count, match in enumerate(_TABLE.finditer(data)):
        if count == _MOST_TABLES:
            raise ValueError("it has too many tables of tags")
        check_tags(data[match.start() :])


def check_gif(file: BinaryIO) -> None:
    """Check the comments up to the second frame of a GIF: Pillow until 13.0 joins them one by one.

    Raises:
        ValueError: there are too many.
    """
    file.seek(10)
    file.seek(13 + _colours(file.read(1)))
    left, frames, junk = _MOST_COMMENT, 0, 0
    while frames < 2 and (kind := file.read(1)) and kind != b";":
        if kind == b"!":
            is_comment = file.read(1) == b"\xfe"
        elif kind == b",":
            frames, is_comment = frames + 1, False
            descriptor = file.read(9)
            file.seek(_colours(descriptor[8:]) + 1, io.SEEK_CUR)
        else:
            junk += 1  # Pillow passes over bytes that begin nothing
            if junk > _MOST_JUNK:
                raise ValueError("its header has no end")
            continue
        while size := file.read(1):
            if size == b"\0":
                break
            file.seek(size[0], io.SEEK_CUR)
            left -= size[0] if is_comment else 0
            if left < 0:
                raise ValueError("its comments do not end")


def _colours(flags: bytes) -> int:
    """Bytes of the table of colours that follows, by a GIF's flags."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


class _Tables:
    """The tables of one block: how much their tags claim, all together."""

    def __init__(self, file: BinaryIO, size: int, *, below: bool) -> None:
        self._file, self._left, self._below = file, size + _SLACK, below
        file.seek(0)
        head = file.read(16)
        self._order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
        self._wide = self._number(head[2:4]) == 43  # BigTIFF
        self.first = self._number(head[8:16] if self._wide else head[4:8])

    def _number(self, data: bytes) -> int:
        return int.from_bytes(data, self._order)

    def check(self) -> None:
        """Look at the first table, and at those below it that Pillow reads too."""
        seen: set[int] = set()
        waiting = [self.first]
        while waiting:
            place = waiting.pop()
            if place not in seen:
                seen.add(place)
                waiting += self._look_at(place)

    def look_on(self, place: int) -> int:
        """Look at the table in this place; where the next frame's is, 0 behind the last."""
        self._look_at(place)
        return self._number(self._file.read(8 if self._wide else 4))

    def _look_at(self, place: int) -> list[int]:
        count_bytes, entry_bytes, value_bytes = (8, 20, 8) if self._wide else (2, 12, 4)
        if place > 2**62:
            return []
        self._file.seek(place)
        count = self._number(self._file.read(count_bytes))
        if count > _MOST_TAGS:
            raise ValueError("it has too many tags")
        entries = self._file.read(count * entry_bytes)
        below = []
        for start in range(0, len(entries) - entry_bytes + 1, entry_bytes):
            entry = entries[start : start + entry_bytes]
            tag, kind = self._number(entry[:2]), self._number(entry[2:4])
            amount, value = self._number(entry[4 : 4 + value_bytes]), entry[4 + value_bytes :]
            claimed = _SIZES.get(kind, 0) * amount
            if claimed > value_bytes:
                self._left -= claimed
                if self._left < 0:
                    raise ValueError("its tags claim more than the file holds")
            if self._below and tag in _BELOW:
                below.append(self._number(value[:4]))
        return below
