"""The edges of the world that tests replace: a mount that delivers late, disks that are full or read-only, Colab."""

import contextlib
import errno
import os
import random
import shutil
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FakeColab", "WriteBackMount", "broken_reads", "full_disk", "read_only", "small_disk"]


class WriteBackMount:
    """A Drive mount as a run and its successor see it: `view` is what the run writes, `cloud` what was delivered.

    It suffices because a lost machine takes with it exactly what separates the two: files that were never delivered,
    delivered in part, or in an older version, and deletions that did not happen; and the run cannot tell, since its
    own view is always perfect.

    Args:
        view: an ordinary folder; the run writes here.
        cloud: what a later mount will show.
        seed: decides what is delivered when, and what a crash leaves of the rest.
        modes: any of `late` (only some of what is waiting is delivered each time), `out_of_order`, and for the
            crash `missing`, `truncated`, `empty`, `flipped`.
    """

    MODES = ("late", "out_of_order", "missing", "truncated", "empty")

    def __init__(self, view: Path, cloud: Path, seed: int, *, modes: tuple[str, ...] = MODES) -> None:
        self.view, self.cloud, self.modes = view, cloud, modes
        view.mkdir(parents=True, exist_ok=True)
        cloud.mkdir(parents=True, exist_ok=True)
        self._random = random.Random(seed)
        self._delivered = _listing(view) if any(cloud.iterdir()) else {}  # a fresh view has nothing to deliver
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # A step at a time, or in the background while a run goes on in another process.

    def step(self) -> None:
        """Deliver some of what is waiting."""
        waiting = self._waiting()
        if "out_of_order" in self.modes:
            self._random.shuffle(waiting)
        count = self._random.randint(0, len(waiting)) if "late" in self.modes else len(waiting)
        for path in waiting[:count]:
            self._deliver(path)

    def settle(self) -> None:
        """Deliver everything."""
        while waiting := self._waiting():
            for path in waiting:
                self._deliver(path)

    def start(self, every_s: float = 0.02) -> "WriteBackMount":
        """Deliver in a thread until `crash` or `stop`."""

        def work() -> None:
            while not self._stop.wait(every_s * self._random.uniform(0.2, 2)):
                self.step()

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop delivering, leaving nothing half done."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def crash(self) -> dict[str, str]:
        """Lose the machine: what was not delivered yet becomes, file by file, what the seed says.

        Returns:
            What became of each file that had not been delivered.
        """
        self.stop()
        fates = {}
        for path in self._waiting():
            source, target = self.view / path, self.cloud / path
            fate = self._random.choice(
                ["whole", *(mode for mode in self.modes if mode in ("missing", "truncated", "empty", "flipped"))]
            )
            fates[path] = fate
            if fate == "missing":
                continue  # or the older version, or a deleted file, stays
            if fate == "whole" or not source.exists():
                self._deliver(path)
                continue
            data = bytearray(source.read_bytes())
            if fate == "truncated":
                data = data[: self._random.randrange(len(data))] if data else data
            elif fate == "empty":
                data = bytearray()
            elif data:
                data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return fates

    def fresh_view(self, path: Path) -> Path:
        """Mount what was delivered in another place, for the next process; empty folders are not delivered."""
        for file in _listing(self.cloud):
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.cloud / file, path / file)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _waiting(self) -> list[str]:
        """Paths whose delivery is due, oldest change first: new, changed and deleted ones."""
        there = _listing(self.view)
        new = [path for path, stamp in there.items() if self._delivered.get(path) != stamp]
        gone = [path for path in self._delivered if path not in there]
        return sorted(new, key=lambda path: there[path]) + gone

    def _deliver(self, path: str) -> None:
        source, target = self.view / path, self.cloud / path
        try:
            stamp = _stamp(source)
            data = source.read_bytes()
        except FileNotFoundError:  # deleted, or renamed a moment ago
            target.unlink(missing_ok=True)
            self._delivered.pop(path, None)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        arriving = target.with_name(f"{target.name}.arriving")
        arriving.write_bytes(data)
        arriving.replace(target)
        self._delivered[path] = stamp


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_ino, found.st_size


def _listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for parent, _, files in os.walk(folder):
        for file in files:
            path = Path(parent, file)
            with contextlib.suppress(FileNotFoundError):
                found[path.relative_to(folder).as_posix()] = _stamp(path)
    return found


# -------------------------------------------------------------------------------------------- bad disks


@contextlib.contextmanager
def full_disk(folder: Path, *, after_bytes: int = 0, code: int = errno.ENOSPC) -> Iterator[None]:
    """Let `os.write` fail below `folder` once so many bytes were written there; reading and deleting still work.

    It suffices because every byte the package writes to a session goes through `os.write`; the real thing is tried
    with `small_disk` where the machine allows mounting. `code=errno.EIO` makes it a broken mount.
    """
    write, left = os.write, after_bytes

    def limited(handle: int, data: bytes) -> int:
        nonlocal left
        if not _is_below(_path_of(handle), folder):
            return write(handle, data)
        if left <= 0:
            raise OSError(code, os.strerror(code))
        written = write(handle, bytes(data)[:left])
        left -= written
        return written

    os.write = limited
    try:
        yield
    finally:
        os.write = write


@contextlib.contextmanager
def broken_reads(path: Path, *, after_bytes: int = 0, code: int = errno.EIO) -> Iterator[None]:
    """Let reading a model file's tensors fail once so many bytes of it were read; its header can still be read.

    It suffices because tensors are read with `os.preadv` and with nothing else, which the tests that use it notice:
    without a failure they would fail.
    """
    read, left = os.preadv, after_bytes

    def limited(handle: int, buffers: object, place: int, *flags: int) -> int:
        nonlocal left
        if _path_of(handle) != path.absolute():
            return read(handle, buffers, place, *flags)
        if left <= 0:
            raise OSError(code, os.strerror(code))
        count = read(handle, buffers, place, *flags)
        left -= count
        return count

    os.preadv = limited
    try:
        yield
    finally:
        os.preadv = read


@contextlib.contextmanager
def read_only(folder: Path, *, code: int = errno.EROFS) -> Iterator[None]:
    """Let everything that changes something below `folder` fail, as on a read-only mount.

    chmod would not do: root, whom containers and Colab run as, may write anyway.
    """
    originals = {name: getattr(os, name) for name in ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "link")}

    def refuse(name: str) -> object:
        def call(path: object, *args: object, **kwargs: object) -> object:
            changes = name != "open" or (args and args[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if changes and isinstance(path, str | os.PathLike) and _is_below(Path(path), folder):
                raise OSError(code, os.strerror(code), str(path))
            return originals[name](path, *args, **kwargs)

        return call

    for name in originals:
        setattr(os, name, refuse(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def _path_of(handle: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{handle}"))


def _is_below(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "1m", *, options: str = "") -> Iterator[Path]:
    """A real file system of that size (tmpfs) at `folder`; skips the test where mounting is not allowed."""
    import subprocess

    import pytest

    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        for _ in range(50):
            if subprocess.run(["umount", str(folder)], capture_output=True, timeout=20, check=False).returncode == 0:
                break
            time.sleep(0.1)


# ------------------------------------------------------------------------------------------------ Colab


class FakeColab:
    """`google.colab` with the `drive.mount` that Colab has: the mount point appears, or its own kind of error.

    It suffices because the package calls nothing else of it for sessions; the kernel-side dialogue is Google's.

    Attributes:
        mounts: every mount point asked for.
        error: raised by the next `mount`.
        shared: names of the Shared drives the account sees.
    """

    def __init__(self, shared: tuple[str, ...] = ()) -> None:
        self.mounts: list[str] = []
        self.error: Exception | None = None
        self.shared = shared

    def install(self, monkeypatch: object, mount_points: tuple[Path, ...]) -> "FakeColab":
        """Be `google.colab` in this process, with mount points that a test may create."""
        google, colab, drive = (types.ModuleType(name) for name in ("google", "google.colab", "google.colab.drive"))
        google.colab, colab.drive = colab, drive
        drive.mount = self._mount
        for module in (google, colab, drive):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr("fastsd_helpers.drive.MOUNT_POINTS", mount_points)
        return self

    def _mount(self, mount_point: str, force_remount: bool = False, timeout_ms: int = 120_000) -> None:
        self.mounts.append(mount_point)
        if self.error is not None:
            raise self.error
        (Path(mount_point) / "MyDrive").mkdir(parents=True, exist_ok=True)
        for name in self.shared:
            (Path(mount_point) / "Shareddrives" / name).mkdir(parents=True, exist_ok=True)
