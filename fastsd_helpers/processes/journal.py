"""The news of a run: a small local file that the run appends rows to and anybody on the same machine may read.

It lies on this machine's own disk, not on Drive, because it is written twice a second. A row that was cut by a kill is
passed over; a new run begins a new file, whose first row says which process writes it.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd_helpers.processes.identity import LocalProcess
from fastsd_helpers.runtime import logger

__all__ = ["JournalTail", "JournalWriter"]


class JournalWriter:
    """Appends rows to a journal; a disk that is full costs the watchers their news, never the run.

    Args:
        path: the file. It is opened at the first row, so that a run that is refused before it has said anything does
            not wipe out the news of the one that holds its place.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row.

        Args:
            row: as JSON has it.
        """
        try:
            if self._file is None:
                self._file = self._open()
            os.write(self._file, json.dumps(row).encode() + b"\n")
        except OSError as err:
            logger.debug("Progress could not be recorded in %s: %s.", self._path, err)

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        own = LocalProcess.me()
        os.write(file, json.dumps({"pid": own.pid, "start": own.start, "began": time.time()}).encode() + b"\n")
        os.replace(temporary, self._path)  # a new file, so that a reader notices a new run
        return file


class JournalTail:
    """Reads a journal, each time only what is new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The rows that came since the last call, and whether they are those of a new file; none where none is there.

        The first row of a file is {"pid", "start", "began"}.
        """
        anew = False
        try:
            with open(self._path, "rb") as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) != self._identity:
                    self._identity, self._offset, anew = (found.st_dev, found.st_ino), 0, True
                file.seek(self._offset)
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return [], False
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        rows = []
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError as err:
                logger.debug("A line of %s could not be read: %s.", self._path, err)
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows, anew
