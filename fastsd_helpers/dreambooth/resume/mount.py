"""Shelf: the generations as they lie in the checkpoints folder; putting one there, and removing old ones.

Files only ever appear under names that did not exist before, and a generation's manifest is written after all of its
files were read back. Old generations go only after a newer one was found whole. On Google Drive what nothing names any
more is emptied before it is removed, so that the trash holds nothing of it; emptied files cannot be brought back, so
what another run's manifest names, or one that cannot be read might, is only removed.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth.resume.generation import (
    MANIFEST,
    FileEntry,
    Generation,
    NotWhole,
    describe,
    list_generations,
    read_generation,
    require_name,
    summary_row,
    verify_files,
)
from fastsd_helpers.dreambooth.resume.room import Room
from fastsd_helpers.drive import copy_verified, has_arrived, remove_emptied
from fastsd_helpers.errors import CheckpointError, VerificationFailed
from fastsd_helpers.files import file_errors, sync_folder, write_atomic
from fastsd_helpers.runtime import fault_point, logger

__all__ = ["Shelf"]


class Shelf:
    """The checkpoints folder of a session, and what this run knows about it.

    Args:
        folder: possibly on a mount that delivers late, out of order, or not at all.
        keep_last: how many whole generations `prune` leaves.
        timeline: only generations of this one count as kept.
        settle_s: `prune` leaves at least one generation that has been whole for so long.
        room: of a Drive with a trash; given, what goes is emptied first.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, timeline: str, settle_s: float, room: Room | None = None
    ) -> None:
        self.folder, self._room = folder, room
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

    def is_whole(self, name: str) -> bool:
        """Whether a generation is whole in the folder itself, hashes included."""
        try:
            verify_files(read_generation(self.folder, name))
        except NotWhole as err:
            logger.debug("Checkpoint %s %s.", name, err)
            return False
        return True

    def held_bytes(self) -> int:
        """What this timeline's generations take, by their manifests; those that are kept for good not counted."""
        found: dict[str, int] = {}
        for name in list_generations(self.folder):
            generation = self._manifest_of(name)
            if isinstance(generation, Generation) and generation.timeline == self._timeline and not generation.keep:
                found |= {entry.path: entry.bytes for entry in generation.files}
        return sum(found.values())

    def rows(self, *, but: set[str], verify: bool) -> list[dict[str, Any]]:
        """One line for each generation there but for those named; see CheckpointStore.generations."""
        rows = []
        shared: set[str] = set()
        for name in list_generations(self.folder):
            if name in but:
                continue
            try:
                generation = read_generation(self.folder, name)
                verify_files(generation, hashes=verify)
            except NotWhole as err:
                if name not in shared:  # else a pruned one, of which only the files that newer ones carry are left
                    rows.append(summary_row(name, (), False, state=str(err)))
                continue
            shared |= {entry.path.partition("/")[0] for entry in generation.files}
            rows.append(summary_row(name, generation.files, generation.keep, state="whole"))
        return rows

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
            DiskFull: try again.
            DriveReadOnly: try again.
            DriveError: try again.
            VerificationFailed: try again.
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
                    f"{entry.path} is missing from {self.folder}, and there is no copy on this machine.",
                    "The next checkpoint is saved in full.",
                )
            path = f"{name}/{entry.role}.safetensors"
            if os.path.lexists(self.folder / path):  # damaged: a name is never used twice
                path = f"{name}/{entry.role}-{secrets.token_hex(4)}.safetensors"
            room, target = self._room, self.folder / path
            with room.writing(entry.bytes, target) if room is not None else contextlib.nullcontext():
                copy_verified(local, target, sha256=entry.sha256)
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
        doomed: list[str] = []
        manifests: dict[str, Generation | NotWhole | None] = {}
        for name in names:
            read = manifests[name] = kept.get(name) or self._manifest_of(name)
            saved_for_good = isinstance(read, Generation) and read.keep
            if name not in kept and not saved_for_good and require_name(name)[0] < newest and name not in busy:
                doomed.append(name)
        needed = self._places_of(wanted)
        for name, read in manifests.items():
            if name not in doomed and isinstance(read, Generation):
                needed |= {entry.path for entry in read.files}
        needed |= self._led_to(needed)
        # What cannot be read may name anything: as long as one of those is there, only what is surely nobody's goes.
        unread = any(isinstance(manifest, NotWhole) for manifest in manifests.values())
        spared = {entry.path for name in doomed for entry in self._named_elsewhere(manifests[name])}
        for name in doomed:
            manifest = manifests[name]
            if manifest is None and unread and self._room is not None:
                continue  # the next time, when the others are gone
            mine = manifest is None or (isinstance(manifest, Generation) and manifest.timeline == self._timeline)
            self._remove(name, needed, spared=spared if mine else None)

    def _manifest_of(self, name: str) -> Generation | NotWhole | None:
        """A generation as its manifest says, why that cannot be read, or None when there is no manifest."""
        try:
            return read_generation(self.folder, name)
        except NotWhole as err:
            with contextlib.suppress(OSError):
                os.lstat(self.folder / name / MANIFEST)
                return err
            return err if isinstance(err.__cause__, OSError) else None

    def _named_elsewhere(self, manifest: Generation | NotWhole | None) -> tuple[FileEntry, ...]:
        return manifest.files if isinstance(manifest, Generation) and manifest.timeline != self._timeline else ()

    def _led_to(self, needed: set[str]) -> set[str]:
        """Files that somebody has put a link to in place of a needed one."""
        targets = {os.path.realpath(self.folder / path) for path in needed if os.path.islink(self.folder / path)}
        if not targets:
            return set()
        home = os.path.realpath(self.folder)
        return {os.path.relpath(target, home).replace(os.sep, "/") for target in targets}

    def discard(self, name: str, *, wanted: set[str]) -> None:
        """Remove what was copied of a generation that will not be finished; it has no manifest."""
        if (self.folder / name).is_dir() and not (self.folder / name / MANIFEST).exists():
            self._remove(name, self._places_of(wanted), spared=set())

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
                settled = settled or (now - self._whole_since[name] >= self._settle_s and self._has_arrived(generation))
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

    def _has_arrived(self, generation: Generation) -> bool:
        """Whether the mount says of none of its files that it is still waiting to be uploaded."""
        paths = [self.folder / generation.name / MANIFEST, *(self.folder / entry.path for entry in generation.files)]
        return not any(has_arrived(path) is False for path in paths)

    def _remove(self, name: str, needed: set[str], *, spared: set[str] | None) -> None:
        """Remove what nobody needs of a generation; on Drive it is emptied first, but for what is spared.

        Args:
            spared: paths that are only removed; None for all.
        """
        folder = self.folder / name
        linked = folder.is_symlink() or self.folder.is_symlink()  # then it may be somebody else's too
        room = None if linked or spared is None else self._room
        with file_errors(folder, "remove"):
            # The manifest first: a deletion that is cut must not leave what looks whole.
            for file in sorted(os.listdir(folder), key=lambda file: file != MANIFEST):
                path = f"{name}/{file}"
                if path in needed:
                    continue
                if file == MANIFEST or room is None or path in (spared or ()):
                    (folder / file).unlink(missing_ok=True)
                    if room is not None and file == MANIFEST:
                        sync_folder(folder)
                else:
                    room.emptied(remove_emptied(folder / file))
                fault_point("prune.removed")
            if not os.listdir(folder):
                folder.rmdir()
        with self._lock:
            self._whole_since.pop(name, None)
            for paths in self._places.values():
                paths -= {path for path in paths if path.startswith(f"{name}/") and path not in needed}
