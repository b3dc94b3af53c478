"""One of a user's files, on a disk or in a zip: read within bounds, and refused where it was made to do harm."""

import contextlib
import re
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import file_errors
from fastsd_helpers.images.files import is_picture_head

__all__ = ["MAX_FILE_BYTES", "Member", "Source", "check_member", "is_picture", "open_zip", "read_source", "unpacked"]

MAX_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Member:
    """A file in a zip."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo


Source = Path | Member


def read_source(source: Source) -> bytes:
    """The bytes of a file.

    Raises:
        DatasetError: it cannot be read; the problem is the reason to skip it for.
        DriveError: the folder itself has gone, as after a lost connection to Drive.
    """
    if isinstance(source, Member):
        try:
            return source.archive.read(source.info)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, struct.error) as err:
            raise DatasetError(f"cannot be unpacked: {_one_line(err)}") from err
        except Exception as err:  # zlib.error and lzma.LZMAError, whose modules may be missing from a Python
            raise DatasetError(f"is damaged inside the zip: {_one_line(err)}") from err
    try:
        size = source.stat().st_size
        if not source.is_file():  # a pipe or a device would be waited for, for ever
            raise DatasetError("is not an ordinary file")
        if size > MAX_FILE_BYTES:
            raise DatasetError(f"has {size / 2**20:.0f} MiB; the limit is {MAX_FILE_BYTES // 2**20} MiB")
        return source.read_bytes()
    except (FileNotFoundError, PermissionError, IsADirectoryError) as err:
        raise DatasetError(f"cannot be read: {err.strerror}") from err
    except OSError as err:
        with file_errors(source, "read"):
            raise err


@contextlib.contextmanager
def open_zip(file: Path | IO[bytes], path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip for the block.

    Raises:
        DatasetError: it is damaged, or none.
        DriveError: it cannot be read.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as err:
        raise DatasetError(
            f"{path.name} is damaged or not a zip file: {_one_line(err)}.",
            "Make the zip again, or give the folder of photos.",
        ) from err
    except OSError as err:
        with file_errors(path, "read"):
            raise err
    with archive:
        yield archive


def unpacked(source: Member) -> IO[bytes]:
    """A zip inside a zip, where it can be read from any place.

    Raises:
        DatasetError: it cannot be unpacked.
    """
    try:
        file = tempfile.SpooledTemporaryFile(max_size=64 * 2**20)  # noqa: SIM115, closed by the caller's stack
        with source.archive.open(source.info) as packed:
            while piece := packed.read(2**20):
                file.write(piece)
        file.seek(0)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error) as err:
        raise DatasetError(f"cannot be unpacked: {_one_line(err)}") from err
    return file


def check_member(member: zipfile.ZipInfo, name: str, path: Path) -> None:
    """Refuse the whole zip for one unsafe name: such a file was made to attack whoever unpacks it.

    Raises:
        DatasetError: the name or the kind is unsafe.
    """
    mode = member.external_attr >> 16
    problem = None
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        problem = "an absolute path"
    elif ".." in name.split("/"):
        problem = "a path that points outside the zip"
    elif "\0" in name:
        problem = "a zero byte in a name"
    elif mode and (stat.S_ISLNK(mode) or (stat.S_IFMT(mode) and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode))):
        problem = "a link or device"
    if problem:
        shown = name[:80].encode("unicode_escape").decode()
        raise DatasetError(f"{path.name} holds {problem}: {shown}.", "Make a new zip that holds only photos.")


def is_picture(source: Source) -> bool:
    """Whether a file of an unknown ending begins as images do."""
    try:
        if isinstance(source, Path) and not source.is_file():
            return False
        with source.open("rb") if isinstance(source, Path) else source.archive.open(source.info) as file:
            return is_picture_head(file.read(64))
    except Exception:  # whatever a damaged zip raises: then it is none
        return False


def _one_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:160]
