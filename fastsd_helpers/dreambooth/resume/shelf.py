"""Shelf: the generations as they lie in the checkpoints folder; putting one there, and removing old ones.

Files only ever appear under names that did not exist before, and a generation's manifest is written after all of its
files were read back. Old generations go only after a newer one was found whole.
"""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from fastsd_helpers.dreambooth.resume.generation import (
    MANIFEST,
    FileEntry,
    Generation,
    NotWhole,
    describe,
    list_generations,
    parse_name,
    read_generation,
    verify_files,
)
from fastsd_helpers.drive import copy_verified
from fastsd_helpers.errors import CheckpointError, VerificationFailed
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.runtime import fault_point

__all__ = ["Shelf"]

logger = logging.getLogger("fastsd_helpers")


class Shelf:
    """The checkpoints folder of a session, and what this run knows about it.

    Args:
        folder: possibly on a mount that delivers late, out of order, or not at all.
        keep_last: how many whole generations `prune` leaves.
        timeline: only generations of this one count as kept.
        settle_s: `prune` leaves at least one generation that has been whole for so long.
    """

    def __init__(self, folder: Path, *, keep_last: int, timeline: str, settle_s: float) -> None:
        self.folder = folder
        self.keep_last, self._timeline, self._settle_s = keep_last, timeline, settle_s
        self._lock = threading.Lock()
        self._places: dict[str, set[str]] = {}  # sha256 -> paths in the folder that hold it
        self._whole_since: dict[str, float] = {}  # name -> monotonic seconds
        self._broken: set[str] = set()

    def remember(self, generation: Generation) -> None:
        """Note a generation that was verified after it had been read from the mount."""
        self.remember_files(generation.files)
        with self._lock:
            self._whole_since[generation.name] = float("-inf")

    def remember_files(self, files: Iterable[FileEntry]) -> None:
        """Note files that were verified in the folder."""
        with self._lock:
            for entry in files:
                self._places.setdefault(entry.sha256, set()).add(entry.path)

    def find(self, entry: FileEntry) -> str | None:
        """Where a file with this content lies in the folder, or None; only its size is looked at."""
        with self._lock:
            paths = sorted(self._places.get(entry.sha256, ()))
        return next((path for path in paths if self._size_of(path) == entry.bytes), None)

    def was_put(self, sha256: str) -> bool:
        """Say whether a file with this content was verified in the folder, during this run or at its start."""
        with self._lock:
            return bool(self._places.get(sha256))

    def _size_of(self, path: str) -> int | None:
        try:
            return os.stat(self.folder / path).st_size
        except OSError as err:
            logger.debug("%s is not there: %s.", path, err)
            return None

    # ----------------------------------------------------------------------------------------------- put

    def put(
        self,
        name: str,
        files: tuple[FileEntry, ...],
        *,
        local: Callable[[FileEntry], Path | None],
        manifest: Callable[[tuple[FileEntry, ...]], bytes],
    ) -> tuple[FileEntry, ...]:
        """Copy what is missing of a generation, then write its manifest.

        Args:
            name: the generation.
            files: what it consists of; a file that is there already, here or in an earlier generation, is not copied.
            local: finds the local copy of a file.
            manifest: makes the manifest's bytes from the files with their final places.

        Returns:
            The files with their places.

        Raises:
            DiskFull, DriveReadOnly, DriveError, VerificationFailed: try again.
            CheckpointError: a file is neither in the folder nor local.
        """
        target = self.folder / name
        with file_errors(target, "create"):
            target.mkdir(parents=True, exist_ok=True)
        placed = tuple(self._place(name, entry, local(entry)) for entry in files)
        fault_point("copy.before_manifest")
        write_atomic(target / MANIFEST, manifest(placed))
        fault_point("copy.after_manifest")
        try:
            verify_files(read_generation(self.folder, name), hashes=False)  # each hash was read back when it was copied
        except NotWhole as err:
            raise VerificationFailed(f"Checkpoint {describe(name)} {err}, although it was written.", "") from err
        with self._lock:
            self._whole_since[name] = time.monotonic()
            self._broken.discard(name)
        return placed

    def _place(self, name: str, entry: FileEntry, local: Path | None) -> FileEntry:
        path = self.find(entry)
        if path is None:
            if local is None:
                raise CheckpointError(
                    f"{entry.path} has gone from {self.folder}, and there is no copy on this machine.",
                    "The next checkpoint is saved in full.",
                )
            path = f"{name}/{entry.role}.safetensors"
            if os.path.lexists(self.folder / path):  # damaged: a name is never used twice
                path = f"{name}/{entry.role}-{secrets.token_hex(4)}.safetensors"
            copy_verified(local, self.folder / path, sha256=entry.sha256)
            with self._lock:
                self._places.setdefault(entry.sha256, set()).add(path)
        return replace(entry, path=path, carried=not path.startswith(f"{name}/"))

    # --------------------------------------------------------------------------------------------- prune

    def prune(self, *, busy: set[str], wanted: set[str]) -> None:
        """Remove generations older than the newest whole ones, except files that kept ones carry.

        Args:
            busy: names that are still being copied or tried again.
            wanted: sha256 of files that coming generations may carry.

        Raises:
            DriveError: something could not be removed; the next time will do.
        """
        fault_point("prune")
        names = list_generations(self.folder)
        kept = {generation.name: generation for generation in self._choose_kept(names)}
        if not kept:
            return
        newest = max(generation.seq for generation in kept.values())
        needed = self._places_of(wanted)
        doomed = []
        for name in names:
            generation = kept.get(name) or self._saved_for_good(name)
            if generation is not None:
                needed |= {entry.path for entry in generation.files}
            elif parse_name(name)[0] < newest and name not in busy:
                doomed.append(name)
        for name in doomed:
            self._remove(name, needed)

    def discard(self, name: str, *, wanted: set[str]) -> None:
        """Remove what was copied of a generation that will not be finished; it has no manifest."""
        if (self.folder / name).is_dir() and not (self.folder / name / MANIFEST).exists():
            self._remove(name, self._places_of(wanted))

    def _places_of(self, wanted: set[str]) -> set[str]:
        with self._lock:
            return {path for sha256 in wanted for path in self._places.get(sha256, ())}

    def _choose_kept(self, names: list[str]) -> list[Generation]:
        kept: list[Generation] = []
        now = time.monotonic()
        settled = False
        for name in names:
            if len(kept) >= self.keep_last and settled:
                break
            generation = self._whole(name)
            if generation is not None:
                kept.append(generation)
                settled = settled or now - self._whole_since[name] >= self._settle_s
        return kept

    def _whole(self, name: str) -> Generation | None:
        if name in self._broken:
            return None
        try:
            generation = read_generation(self.folder, name)
            if generation.timeline != self._timeline:
                return None
            verify_files(generation, hashes=name not in self._whole_since)
        except NotWhole as err:
            logger.debug("Checkpoint %s %s.", name, err)
            self._broken.add(name)
            return None
        with self._lock:
            # One of an earlier run was delivered long ago: it could not be seen here otherwise.
            self._whole_since.setdefault(name, float("-inf"))
        return generation

    def _saved_for_good(self, name: str) -> Generation | None:
        with contextlib.suppress(NotWhole):
            generation = read_generation(self.folder, name)
            return generation if generation.keep else None
        return None

    def _remove(self, name: str, needed: set[str]) -> None:
        folder = self.folder / name
        with file_errors(folder, "remove"):
            # The manifest first: a deletion that is cut must not leave what looks whole.
            for file in sorted(os.listdir(folder), key=lambda file: file != MANIFEST):
                if f"{name}/{file}" not in needed:
                    (folder / file).unlink(missing_ok=True)
            if not os.listdir(folder):
                folder.rmdir()
        with self._lock:
            self._whole_since.pop(name, None)
            for paths in self._places.values():
                paths -= {path for path in paths if path.startswith(f"{name}/") and path not in needed}
