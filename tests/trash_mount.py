"""A Google Drive mount with a quota, a trash that counts, and a free space that is reported late.

It suffices because what a run can tell of a real one is the free space and which files have arrived, and what a later
machine can tell is what was delivered: a file is counted with the size of its newest delivered revision, in the trash
too, so one that was emptied in time counts nothing there, and one whose emptying was overtaken by its deletion counts
in full.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from fakes import WriteBackMount, _listing

__all__ = ["Drive", "TrashMount", "live_on"]

_REPORT_S = 0.05


@dataclass(frozen=True)
class Drive:
    """How a Drive behaves.

    Attributes:
        quota: bytes that it takes, trash included.
        lag_s: how late its free space is reported; `inf` reports what was free at the mounting for ever.
        overtaken: share of emptied files whose deletion arrives first.
    """

    quota: int
    lag_s: float = 0.0
    overtaken: float = 0.0


class TrashMount(WriteBackMount):
    """See WriteBackMount; `notes` is a folder for what a run's process tells the mount and the mount tells it.

    Attributes:
        most: bytes that were ever counted at the same time.
        trash: bytes that the trash holds. emptied_by_hand: those that it held before.
        refused: files that had no room.
    """

    def __init__(
        self,
        view: Path,
        cloud: Path,
        seed: int,
        *,
        drive: Drive,
        notes: Path,
        trash: int = 0,
        modes: tuple[str, ...] = WriteBackMount.MODES,
    ) -> None:
        super().__init__(view, cloud, seed, modes=modes)
        notes.mkdir(parents=True, exist_ok=True)
        self.drive, self.notes, self.trash, self.most, self.emptied_by_hand = drive, notes, trash, 0, 0
        self.refused: set[str] = set()
        self._reports: list[tuple[float, int]] = []
        self._busy = threading.RLock()  # a delivery is counted wholly or not at all
        self._reporter: threading.Thread | None = None
        self._publish()

    @property
    def used(self) -> int:
        """Bytes that count now."""
        return self.trash + sum(size for _mtime, _inode, size in _listing(self.cloud).values())

    def start(self, every_s: float = 0.02) -> "TrashMount":
        """Deliver in a thread, and report in another: a report is not late because an upload is slow."""

        def report() -> None:
            while not self._stop.wait(_REPORT_S):
                self._publish()

        super().start(every_s)
        self._reporter = threading.Thread(target=report, daemon=True)
        self._reporter.start()
        return self

    def stop(self) -> None:
        """Stop delivering and reporting."""
        super().stop()
        if self._reporter is not None:
            self._reporter.join()

    def step(self) -> None:
        """Deliver some of what is waiting, and report what is free."""
        super().step()
        self._publish()

    def settle(self) -> None:
        """Deliver everything that has room."""
        while (waiting := self._waiting()) and not set(waiting) <= self.refused:
            for path in waiting:
                self._deliver(path)
        self._publish()

    def empty_trash(self) -> None:
        """What the owner of the Drive can do at any time."""
        self.emptied_by_hand, self.trash = self.emptied_by_hand + self.trash, 0
        self._publish()

    def _publish(self) -> None:
        with self._busy:
            self._publish_now()

    def _publish_now(self) -> None:
        now, used = time.monotonic(), self.used
        self.most = max(self.most, used)
        self._reports.append((now, max(0, self.drive.quota - used)))
        due = [free for at, free in self._reports if at <= now - self.drive.lag_s] or [self._reports[0][1]]
        self._tell("free", str(due[-1]))
        arrived = {path: stamp for path, stamp in _listing(self.view).items() if self._delivered.get(path) == stamp}
        self._tell("arrived", json.dumps(sorted(arrived)))

    def _tell(self, name: str, text: str) -> None:
        arriving = self.notes / f"{name}.arriving"
        arriving.write_text(text)
        arriving.replace(self.notes / name)

    def _deliver(self, path: str) -> None:
        with self._busy:
            self._deliver_now(path)

    def _deliver_now(self, path: str) -> None:
        source, target = self.view / path, self.cloud / path
        if path not in self._delivered and source.exists():
            stamps = _listing(self.view)
            gone = [other for other in self._delivered if other not in stamps and self._moved_to(other) == path]
            for other in gone:  # a new name of what is there already is no second file, to Drive
                self._deliver(other)
        there = target.stat().st_size if target.exists() else 0
        try:
            coming = source.stat().st_size
        except FileNotFoundError:
            moved = self._moved_to(path)
            if moved is not None:
                (self.cloud / moved).parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    if not (self.cloud / moved).exists():
                        target.replace(self.cloud / moved)
                        self._delivered[moved] = self._delivered[path]
            elif path not in self._emptied() or self._random.random() < self.drive.overtaken:
                self.trash += there
            super()._deliver(path)
            self.most = max(self.most, self.used)
            return
        if self.used - there + coming > self.drive.quota:
            self.refused.add(path)
            return
        self.refused.discard(path)
        super()._deliver(path)
        self.most = max(self.most, self.used)

    def _moved_to(self, path: str) -> str | None:
        """The new name of a file that was renamed: no deletion, to Drive."""
        stamp = self._delivered.get(path)
        unfinished = path.endswith(".part")  # it may have grown since a part of it was delivered
        for other, found in _listing(self.view).items():
            same_file = stamp is not None and unfinished and found[1] == stamp[1] and _folder(other) == _folder(path)
            if found == stamp or same_file:
                return other
        return None

    def _emptied(self) -> set[str]:
        with contextlib.suppress(FileNotFoundError):
            return set((self.notes / "emptied").read_text().splitlines())
        return set()


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def live_on(view: Path, notes: Path, quota: int) -> None:
    """Let this process see a view as Google Drive: what it empties is told, what is free and has arrived comes back."""
    from fastsd_helpers import drive
    from fastsd_helpers.dreambooth.resume import store

    root = os.path.realpath(view)
    truncate, usage, identity = os.ftruncate, shutil.disk_usage, os.getxattr

    def tell(handle: int, length: int) -> None:
        truncate(handle, length)
        path = os.readlink(f"/proc/self/fd/{handle}")
        if length == 0 and path.startswith(root):
            with open(notes / "emptied", "a", encoding="utf-8") as file:
                file.write(os.path.relpath(path, root) + "\n")

    def read(path: object) -> object:
        if os.path.realpath(path).startswith(root):
            return shutil._ntuple_diskusage(quota, 0, int((notes / "free").read_text()))
        return usage(path)

    def identify(path: object, name: str) -> bytes:
        if not os.path.realpath(path).startswith(root):
            return identity(path, name)
        arrived = json.loads((notes / "arrived").read_text())
        return b"1AbC" if os.path.relpath(os.path.realpath(path), root) in arrived else b"local-1"

    def on_drive(folder: object) -> bool:
        return os.path.realpath(folder).startswith(root)

    os.ftruncate, shutil.disk_usage, os.getxattr = tell, read, identify
    drive.mount_kind = lambda folder: "drive" if on_drive(folder) else ""
    store._LOOK_S = 0.1
