"""The JSON header of a safetensors file, read entry by entry: memory holds one entry, never a tree of all of them.

Parsing the whole text at once takes about ten times its size. Headers of many megabytes exist: trainers write every tag
of a data set into one string.
"""

import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

__all__ = ["HEADER_LIMIT", "Text", "open_header", "read_entries", "unique_names"]

HEADER_LIMIT = 100_000_000  # the reference implementation's own
_MOST_ENTRY = 10_000  # one tensor's format, shape and place
_IN_MEMORY = 8_000_000  # longer ones are mapped: what is mapped is the system's to give back
_PIECE = 1 << 20
_BLANK = re.compile(rb"[ \t\n\r]*+")
_STRING = re.compile(rb'"([^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+)"', re.DOTALL)
_OBJECT = re.compile(rb"\{[^{}]*+\}")
# Before such a sign no escape, no pair of escapes and no character of several bytes can be unfinished.
_SAFE_CUT = re.compile(rb"[ ,:;(){}\[\]_.+=-]")


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: readers differ in which of two entries of one name they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _value in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)[:60]!r} occurs twice")
    return found


@dataclass(frozen=True)
class Text:
    """A string of the metadata that has not been read yet; `bytes` is its length as it is written."""

    header: Any
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """How long it is in the file."""
        return self.end - self.start

    def read(self) -> str:
        """The string itself; raises ValueError where it is none."""
        pieces, start = [], self.start
        while self.end - start > _PIECE:
            cut = _SAFE_CUT.search(self.header, start + _PIECE, self.end)
            if cut is None:
                break
            pieces.append(_decode(bytes(self.header[start : cut.start()])))
            start = cut.start()
        pieces.append(_decode(bytes(self.header[start : self.end])))
        return "".join(pieces)


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8") if b"\\" not in raw else json.loads(b'"' + raw + b'"')


def open_header(file: BinaryIO, length: int) -> Any:
    """The text of a header whose length was read: bytes, or a view of the file; shorter where the file ends in it."""
    if length <= _IN_MEMORY:
        raw = b""
        while len(raw) < length and (more := file.read(length - len(raw))):
            raw += more
        return raw
    try:
        return memoryview(mmap.mmap(file.fileno(), 8 + length, access=mmap.ACCESS_READ))[8:]
    except ValueError:  # the file was cut off in the meantime
        return b""


def read_entries(header: Any) -> Iterator[tuple[str, str, Any]]:
    """Read a header: ("tensor", name, what it says of it) and ("metadata", key, its Text), in the file's order.

    Raises:
        ValueError: it is not such a header, or a name stands in it twice. RecursionError.
    """
    cursor = _Cursor(header)
    for name in cursor.names():
        if name == "__metadata__":
            if not cursor.took(b"null"):
                for key in cursor.names():
                    yield "metadata", key, cursor.text()
        else:
            yield "tensor", name, cursor.entry(name)
    cursor.end()


class _Cursor:
    """A place in a header's text."""

    def __init__(self, header: Any) -> None:
        self._header, self._at = header, 0

    def names(self) -> Iterator[str]:
        """The names in the object that begins here; the caller reads what belongs to each before it asks on."""
        seen: set[str] = set()
        self._take(b"{")
        if self.took(b"}"):
            return
        while True:
            name = self.text().read()
            if name in seen:
                raise ValueError(f"{name[:60]!r} occurs twice")
            seen.add(name)
            self._take(b":")
            yield name
            if self.took(b"}"):
                return
            self._take(b",")

    def text(self) -> Text:
        """The string that begins here."""
        self._skip()
        found = _STRING.match(self._header, self._at)
        if found is None:
            raise ValueError("no string where one should be")
        self._at = found.end()
        return Text(self._header, found.start(1), found.end(1))

    def entry(self, name: str) -> dict[str, Any]:
        """What is said of one tensor."""
        self._skip()
        found = _OBJECT.match(self._header, self._at)
        if found is None or found.end() - found.start() > _MOST_ENTRY:
            raise ValueError(f"{name[:60]!r} is not an entry of a tensor")
        self._at = found.end()
        return json.loads(bytes(found.group()), object_pairs_hook=unique_names)

    def took(self, mark: bytes) -> bool:
        """Whether the mark stands here; then the place is behind it."""
        self._skip()
        found = bytes(self._header[self._at : self._at + len(mark)]) == mark
        self._at += len(mark) if found else 0
        return found

    def end(self) -> None:
        """Nothing more stands here."""
        self._skip()
        if self._at != len(self._header):
            raise ValueError("there is data after the header")

    def _take(self, mark: bytes) -> None:
        if not self.took(mark):
            raise ValueError(f"no {mark.decode()} where one should be")

    def _skip(self) -> None:
        blank = _BLANK.match(self._header, self._at)
        self._at = blank.end() if blank else self._at
