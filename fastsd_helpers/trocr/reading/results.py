"""Where results go: a folder of this machine or a mounted one, or any place fsspec can write to (s3://, gs://, sftp://).

A file is there whole or not at all, under its own name. Notes are lines of JSON behind one another.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from fastsd_helpers.errors import DriveError, FastSDError, needs_package
from fastsd_helpers.files import check_writable, file_errors, remove_leftovers, write_atomic

__all__ = [
    "LocalResults",
    "RemoteResults",
    "Results",
    "is_remote",
    "open_results",
    "parse_place",
    "remote_errors",
    "remote_filesystem",
]


class Results(Protocol):
    """A folder of results: names are paths in it, with /."""

    def at(self, name: str) -> Any:
        """What to call a file of it, or with no name the folder: a path, or an address."""

    def has(self, name: str) -> bool:
        """Whether a file is there."""

    def read(self, name: str) -> bytes | None:
        """A file's content; None where it is not there."""

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file."""

    def append(self, name: str, row: bytes) -> None:
        """Write a line to the end of a file, and have it on the disk."""


def is_remote(place: object) -> bool:
    """Whether a path is an address of fsspec's, such as s3://bucket/scans; links are none, they have no folders."""
    scheme, marks, _rest = str(place).partition("://")
    return bool(marks) and scheme.lower() not in ("http", "https")


def parse_place(text: str) -> "Path | str":
    """A path, or an address as it stands."""
    return text if is_remote(text) else Path(text)


def open_results(place: "Path | str") -> "Results":
    """The results at a path or an address.

    Raises:
        DriveError: it cannot be written to.
        DependencyMissing: fsspec, or what it needs there, is not installed.
    """
    return RemoteResults(str(place)) if is_remote(place) else LocalResults(Path(place))


class LocalResults:
    """Results in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._seen = folder, set[Path]()
        check_writable(folder)

    def at(self, name: str) -> Path:
        """The file's path, or the folder's."""
        return self._folder / name

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return self.at(name).is_file()

    def read(self, name: str) -> bytes | None:
        """A file's content; None where it is not there."""
        path = self.at(name)
        with file_errors(path, "read"):
            return path.read_bytes() if path.is_file() else None

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file."""
        path = self.at(name)
        if path.parent not in self._seen:  # once: a folder may hold a million files
            with file_errors(path.parent, "write to"):
                path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            self._seen.add(path.parent)
        write_atomic(path, data, point="trocr.file")

    def append(self, name: str, row: bytes) -> None:
        """Write a line to the end of a file; one that a kill cut stays a line of its own.

        Several processes of a machine may do so at the same time: it is one write to a file that is open for appending.
        """
        path = self.at(name)
        with file_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(b"\n" + row + b"\n")
                file.flush()
                os.fsync(file.fileno())


class RemoteResults:
    """Results at an address; notes are written anew with every line, as such places have no appending."""

    def __init__(self, address: str) -> None:
        self._system, self._root = remote_filesystem(address)
        self._address = address.rstrip("/")

    def at(self, name: str) -> str:
        """The file's address, or the folder's."""
        return f"{self._address}/{name}" if name else self._address

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        with remote_errors(self.at(name)):
            return bool(self._system.isfile(f"{self._root}/{name}"))

    def read(self, name: str) -> bytes | None:
        """A file's content; None where it is not there."""
        with remote_errors(self.at(name)):
            try:
                return bytes(self._system.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file: it gets its name when all of it is there."""
        path = f"{self._root}/{name}"
        with remote_errors(self.at(name)):
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self._system.transaction, self._system.open(path, "wb") as file:
                file.write(data)

    def append(self, name: str, row: bytes) -> None:
        """Write a line to the end of a file."""
        self.put(name, (self.read(name) or b"") + b"\n" + row + b"\n")


def remote_filesystem(address: str) -> tuple[Any, str]:
    """The file system of an address, and its path there.

    Raises:
        DependencyMissing: fsspec or the package for this kind of address.
        DriveError: it cannot be opened.
    """
    with needs_package(f"{address}", "Install the package, or name a folder."):
        import fsspec.core
    with remote_errors(address), needs_package(f"{address}", "Install the package, or name a folder."):
        system, path = fsspec.core.url_to_fs(address)
    return system, str(path).rstrip("/")


@contextlib.contextmanager
def remote_errors(address: str) -> Iterator[None]:
    """Name an address that cannot be read or written, with the reason.

    Raises:
        DriveError: in the place of whatever the file system raised.
    """
    try:
        yield
    except (FastSDError, ImportError, KeyboardInterrupt):
        raise
    except Exception as err:  # each kind of place has errors of its own
        why = " ".join(str(err).split())[:300] or type(err).__name__
        problem = f"{address} cannot be read or written: {why.rstrip('.')}."
        raise DriveError(problem, "Check the address and your access to it on every machine.") from err
