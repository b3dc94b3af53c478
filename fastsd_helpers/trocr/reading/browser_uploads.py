"""What was uploaded to a reading session: an image, a PDF, or a zip of them with folders in it."""

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from fastsd_helpers.names.zips import read_names
from fastsd_helpers.trocr.pages.inputs import PICTURE_SUFFIXES

__all__ = ["Uploaded", "unpack_upload"]

_MOST_FILES = 5000
_MOST_BYTES = 4 * 2**30  # of all that a zip unpacks to
_WANTED = (*PICTURE_SUFFIXES, ".pdf")


@dataclass(frozen=True)
class Uploaded:
    """What became of an upload: (name it came with, name it is kept under) of what is new and of what was there."""

    kept: tuple[tuple[str, str], ...]
    there: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]

    def lines(self) -> list[str]:
        """What is worth saying, a sentence each; nothing of files that are kept under their own names."""
        renamed = [f"{given} is kept as {name}." for given, name in self.kept if given != name]
        return [*renamed, *self.left_out]


def unpack_upload(name: str, data: bytes, left_out: list[str]) -> Iterator[tuple[str, bytes]]:
    """Give the files of an upload: itself, or what a zip holds, one by one.

    The folders of a zip become part of a file's name, so that scan_1.png of two folders stay two images, and lines
    of one folder stay together.

    Args:
        name: as the browser sent it; it may be hostile.
        data: as the browser sent it; it may be hostile.
        left_out: gets a sentence for everything that is not given, or whose name was guessed.
    """
    if PurePosixPath(name.replace("\\", "/")).suffix.lower() != ".zip":
        yield name, data
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as opened:
            yield from _members(name, opened, left_out)
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError) as err:
        left_out.append(f"{name} is damaged or not a zip file: {err}. Make it again, or upload the images themselves.")


def _members(name: str, opened: zipfile.ZipFile, left_out: list[str]) -> Iterator[tuple[str, bytes]]:
    members = [member for member in opened.infolist() if not member.is_dir()]
    named = read_names(members)
    if said := named.line(name):
        left_out.append(said)
    if len(members) > _MOST_FILES or sum(member.file_size for member in members) > _MOST_BYTES:
        left_out.append(f"{name} holds more than {_MOST_FILES} files or 4 GB. Upload it in parts.")
        return
    found = 0
    for member, shown in zip(members, named.names, strict=True):
        parts = [part for part in shown.split("/") if part not in ("", ".", "..")]
        if not parts or parts[0] == "__MACOSX" or parts[-1].startswith(".") or parts[-1] == "Thumbs.db":
            continue
        suffix = PurePosixPath(parts[-1]).suffix.lower()
        if suffix == ".zip":
            left_out.append(f"{shown} in {name} is a zip in a zip: unpack it, and upload that.")
        elif suffix not in _WANTED:
            left_out.append(f"{shown} in {name} is neither an image nor a PDF.")
        elif member.flag_bits & 1:
            left_out.append(f"{shown} in {name} is locked with a password: unpack it, and upload the images.")
        else:
            try:
                content = opened.read(member)
            except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, RuntimeError) as err:
                left_out.append(f"{shown} in {name} is damaged: {err}.")
                continue
            found += 1
            yield "_".join(parts), content
    if not found:
        left_out.append(f"{name} holds no image and no PDF.")
