"""Scratch: the generations' files on this machine's own disk, until the mount has them."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from fastsd_helpers.dreambooth.resume.generation import (
    MANIFEST,
    FileEntry,
    Generation,
    Snapshot,
    parse_name,
    save_tensors,
)
from fastsd_helpers.files import check_room, file_errors, sha256_of
from fastsd_helpers.runtime import fault_point, logger

__all__ = ["Scratch"]


class Scratch:
    """A session's folder on this machine.

    Args:
        folder: for this session alone; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, Path] = {}  # sha256 -> where it lies

    def write(self, name: str, snapshot: Snapshot) -> list[FileEntry]:
        """Write a snapshot's files, fsync and hash them.

        Raises:
            DiskFull: this machine's disk could not take them.
            DriveError: this machine's disk could not take them.
        """
        target = self.folder / name
        roles = snapshot.tensors.items()
        needed = sum(tensor.numel() * tensor.element_size() for _, role in roles for tensor in role.values())
        check_room(self.folder, needed, "a checkpoint", hint="Free some space on this machine's own disk.")
        with file_errors(target, "create"):
            target.mkdir()
        written = []
        for role, tensors in roles:
            path = target / f"{role}.safetensors"
            save_tensors(tensors, path)
            size, sha256 = path.stat().st_size, sha256_of(path)
            fault_point("checkpoint.hash")
            written.append(FileEntry(role, f"{name}/{path.name}", size, sha256, carried=False))
        return written

    def hold(self, files: list[FileEntry]) -> None:
        """Note files of a generation that is complete here."""
        with self._lock:
            self._files.update({entry.sha256: self.folder / entry.path for entry in files})

    def adopt(self, generation: Generation) -> set[str]:
        """Hold what an earlier process left here of a generation, and nothing else; returns the sha256 of it."""
        paths = {entry.sha256: generation.find(entry) for entry in generation.files}
        with self._lock:
            self._files = {sha256: path for sha256, path in paths.items() if path.is_relative_to(self.folder)}
            return set(self._files)

    def find(self, entry: FileEntry) -> Path | None:
        """The local copy of a file, or None."""
        with self._lock:
            path = self._files.get(entry.sha256)
        return path if path is not None and path.is_file() else None

    def discard(self, name: str) -> None:
        """Remove what was written of a generation that is given up."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def clear(self, *, everything: bool = False) -> None:
        """Remove what earlier processes left here, but for what is held; with `everything` that too."""
        with self._lock:
            needed = set() if everything else {path.parent for path in self._files.values()}
        for left_over in self.folder.iterdir():
            if left_over not in needed and (parse_name(left_over.name) or left_over.name == "loaded"):
                shutil.rmtree(left_over, ignore_errors=True)

    def free(self, *, wanted: set[str], is_there: Callable[[str], bool]) -> None:
        """Remove what is on the mount or wanted no more; the rest may have to be copied again.

        Args:
            wanted: sha256 of files that are still needed.
            is_there: whether the mount has a file, by its sha256.
        """
        with self._lock:
            freed = {sha256: path for sha256, path in self._files.items() if sha256 not in wanted or is_there(sha256)}
            for sha256 in freed:
                del self._files[sha256]
            needed = {path.parent for path in self._files.values()}
        for path in freed.values():
            try:
                if path.parent not in needed:
                    (path.parent / MANIFEST).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                if not os.listdir(path.parent):
                    path.parent.rmdir()
            except FileNotFoundError:
                continue
            except OSError as err:
                logger.warning("The local copy %s could not be removed: %s.", path, err)
