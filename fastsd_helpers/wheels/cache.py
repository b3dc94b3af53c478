"""The wheels of one set in one archive, kept where the user asks (Google Drive): read back by hash, written whole.

One file, because Drive is slow with many small ones. It is a plain zip without compression, and no file of it is used
before its sha256 is that of the lock.
"""

import contextlib
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastsd_helpers.drive import copy_verified
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.files import file_errors, placed, sha256_of
from fastsd_helpers.runtime import logger
from fastsd_helpers.wheels.lockfile import LockedFile, LockedRow, LockSet

__all__ = ["WheelCache"]

_CHUNK_BYTES = 1 << 20
# At the end of the archive. Wheels are zips too: of an archive cut short the last whole wheel could be taken for it.
_MARK = b"fastsd-wheels 1"


class WheelCache:
    """The archive of a set in a folder; it may not exist yet.

    Attributes:
        path: `{folder}/fastsd-wheels-{set}-py{minor}.zip`.
    """

    def __init__(self, folder: Path, lock_set: LockSet) -> None:
        self.path = Path(folder).expanduser() / f"fastsd-wheels-{lock_set.name}-py{lock_set.python}.zip"
        self._lock_set = lock_set

    def unpack(self, rows: Iterable[LockedRow], into: Path) -> list[LockedRow]:
        """Lay the rows' files into a folder; returns the rows that the archive lacks.

        A damaged file is told and counts as lacking; nothing of it is left in the folder.
        """
        lacking = []
        with self._opened() as archive:
            for row in rows:
                if not any(_extract(archive, file, into) for file in row.files):
                    lacking.append(row)
        return lacking

    def pack(self, folder: Path) -> int:
        """Write the archive anew with the set's files in a folder and those it had; returns its size in bytes.

        It is written beside the old one, read back and compared, and then takes its name.

        Raises:
            DiskFull: it could not be written; the old one is as it was.
            DriveReadOnly: it could not be written; the old one is as it was.
            DriveError: it could not be written; the old one is as it was.
            VerificationFailed: it could not be written; the old one is as it was.
        """
        wanted = {file.name: file for row in self._lock_set.rows for file in row.files}
        with self._opened() as archive:
            for name in _names(archive) & set(wanted):
                if not (folder / name).exists():
                    _extract(archive, wanted[name], folder)
        made = folder / self.path.name
        with file_errors(made, "write"), zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = _MARK
            for name in sorted(path.name for path in folder.iterdir() if path.name in wanted):
                # With no date, so that the same wheels make the same archive.
                with open(folder / name, "rb") as wheel, archive.open(zipfile.ZipInfo(name), "w") as out:
                    shutil.copyfileobj(wheel, out, _CHUNK_BYTES)
        with file_errors(self.path.parent, "write to"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with placed(self.path) as unfinished:
            copy_verified(made, unfinished, sha256=sha256_of(made), point=None)
        return self.path.stat().st_size

    def keep(self, folder: Path) -> int:
        """Do `pack`; where that fails, say so: what was installed is none the worse. Returns its size, or 0."""
        try:
            size = self.pack(folder)
        except FastSDError as err:
            logger.warning("The wheels could not be saved: %s %s", err.problem, err.hint)
            return 0
        logger.info("Saved the wheels for the next time in %s (%.1f MB).", self.path, size / 1e6)
        return size

    @contextlib.contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile | None]:
        """The archive; None where there is none, or none that can be read."""
        archive = None
        try:
            archive = zipfile.ZipFile(self.path)
            if archive.comment != _MARK:
                archive.close()
                archive = None
                raise zipfile.BadZipFile("its end is missing")
        except FileNotFoundError:
            logger.debug("There is no %s yet.", self.path)
        except (OSError, zipfile.BadZipFile) as err:
            logger.warning("The archive of wheels %s is damaged (%s): it is created again.", self.path, err)
        try:
            yield archive
        finally:
            if archive is not None:
                archive.close()


def _names(archive: zipfile.ZipFile | None) -> set[str]:
    return set(archive.namelist()) if archive else set()


def _extract(archive: zipfile.ZipFile | None, file: LockedFile, into: Path) -> bool:
    """Write one file of the archive if its bytes are those of the lock. Its name is the lock's, never the archive's."""
    if archive is None or file.name not in _names(archive):
        return False
    target = into / file.name
    with file_errors(target, "write"), open(target, "wb") as out:
        try:
            with archive.open(file.name) as packed:
                shutil.copyfileobj(packed, out, _CHUNK_BYTES)
            reason = "its SHA-256 differs from the lock's"
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as err:
            reason = str(err)
    if sha256_of(target) == file.sha256:
        return True
    target.unlink()
    logger.warning("%s in %s is damaged (%s): it is downloaded again.", file.name, archive.filename, reason)
    return False
