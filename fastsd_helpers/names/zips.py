"""The names in a zip as their writer meant them: by the flag, as UTF-8, else in the likeliest code page.

A zip says of each name only whether it is UTF-8. macOS writes UTF-8 without saying so, and Windows the code page of its
country. Which one it was is judged over all names of the zip together (see `code_pages`), and said with an example, so
that a wrong guess is seen.

Source: PKWARE's APPNOTE 6.3.9, 4.4.4 (bit 11), 4.6.9 (the Unicode path field).
"""

import unicodedata
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from fastsd_helpers.names.code_pages import CODE_PAGES, likeliest_page

__all__ = ["ZipNames", "read_names"]

_UTF8_FLAG = 0x800
_UNICODE_PATH = 0x7075


@dataclass(frozen=True)
class ZipNames:
    """The names of a zip's members."""

    names: tuple[str, ...]  # one a member, in their order; "/" between folders, composed letters (NFC)
    code_page: str | None = None  # what was guessed; None when the zip or the bytes themselves say it
    example: str | None = None  # one of the names that were read by it

    def line(self, zip_name: str) -> str | None:
        """What was guessed, as a sentence; None when nothing had to be."""
        if self.code_page is None:
            return None
        return (
            f"The names in {zip_name} are read as {CODE_PAGES[self.code_page]} ({self.code_page}), for example "
            f"{self.example!r}; if that is wrong, unpack the zip and give the folder."
        )


def read_names(members: Sequence[zipfile.ZipInfo]) -> ZipNames:
    """Read the names of all members of one zip; a guess is made for those together that do not say what they are."""
    known = {place: name for place, member in enumerate(members) if (name := _said(member)) is not None}
    raw = {place: member.orig_filename.encode("cp437") for place, member in enumerate(members) if place not in known}
    foreign = [data for data in raw.values() if not data.isascii()]
    page = likeliest_page([data.rpartition(b"/")[2] or data for data in foreign])
    decoded = {place: data.decode(page or "utf-8") for place, data in raw.items()}
    names = tuple(
        unicodedata.normalize("NFC", (known | decoded)[place]).replace("\\", "/") for place in range(len(members))
    )
    if page is None:
        return ZipNames(names)
    shown = next(place for place, data in raw.items() if not data.isascii())
    return ZipNames(names, page, names[shown].rpartition("/")[2] or names[shown])


def _said(member: zipfile.ZipInfo) -> str | None:
    """The name where the zip says in which letters it is written."""
    if member.flag_bits & _UTF8_FLAG:
        return member.orig_filename
    try:
        plain = member.orig_filename.encode("cp437")
    except UnicodeEncodeError:  # made in memory, not read from a file
        return member.orig_filename
    extra = member.extra
    while len(extra) >= 4:
        kind, size = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and field[:1] == b"\1" and int.from_bytes(field[1:5], "little") == zlib.crc32(plain):
            try:
                return field[5:].decode()
            except UnicodeDecodeError:
                return None
    return None
