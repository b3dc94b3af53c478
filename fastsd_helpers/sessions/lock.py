"""The lock of a session: one run at a time, and a dead run's lock is replaced.

The file `.lock` names its holder by machine (boot id and process namespace), process and the process's start, and a
small thread counts a heartbeat up every 20 seconds.

- Same machine: the holder is alive if that process with that start time still exists; no clock is asked.
- Another machine: its heartbeat is old when both the time it wrote and the file's own time are 2 minutes old. Where the
  two contradict each other, or lie in the future, a clock has jumped: then the counter is watched on this machine's
  monotonic clock, and only a counter that stands still counts as dead.
- A lock that is cut short or changed on its way to Drive (it holds a sum over itself) says nothing: it is watched too.

On Drive no machine can exclude another for certain. So a run also looks at every heartbeat whether the lock is still
its own; when it is not, `lost` becomes true and the trainer saves and stops. Checkpoints have names of their own, so
even then nothing is overwritten.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DriveError, SessionBusy
from fastsd_helpers.files import file_errors, write_atomic, write_new
from fastsd_helpers.processes import LocalProcess, LockHeld, file_lock, machine_id
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions.identity import claim_scratch

__all__ = ["LOCK", "SessionLock", "describe_holder", "guarded", "local_holder"]

LOCK = ".lock"
_GUARD = ".lock.guard"
_BEAT_S = 20.0
_STALE_S = 120.0
_GUARD_S = 5.0
_WATCH_S = 45.0  # more than two heartbeats
_NO_LINKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL}


class SessionLock:
    """Holds a session for one run: `with session.lock() as lock: ... lock.lost`.

    Attributes:
        lost: another run took the lock over; save what there is and stop.
    """

    def __init__(
        self,
        folder: Path,
        *,
        take_over: bool = False,
        beat_s: float = _BEAT_S,
        stale_s: float = _STALE_S,
        watch_s: float = _WATCH_S,
        identity: str | None = None,
    ) -> None:
        self.folder = folder
        self._identity = identity
        self.lost = False
        self._take_over = take_over
        self._beat_s, self._stale_s, self._watch_s = beat_s, stale_s, watch_s
        self._path = folder / LOCK
        self._mine: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "SessionLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            SessionBusy: a live run holds it.
            DriveError: the folder cannot be written to.
        """
        me = LocalProcess.me()
        mine = {
            "token": secrets.token_hex(8),
            "machine": machine_id(),
            "pid": me.pid,
            "start": me.start,
            "host": socket.gethostname(),
            "heartbeat": 0,
            "time": time.time(),
            "replaces": None,
        }
        if self._identity is not None:
            mine["session"] = self._identity
        while True:
            with file_errors(self._path, "lock"), guarded(self.folder):
                data = _read_bytes(self._path)
                if data is None and self._create(mine):
                    break
            if data is None:
                continue  # another process was quicker
            holder = _parse(data)
            if not self._take_over and self._is_alive(data, holder):
                raise self._busy(holder)
            with file_errors(self._path, "lock"), guarded(self.folder):
                # Judged outside the guard: go on only if it is still the very lock that was judged.
                if _read_bytes(self._path) == data or self._take_over:
                    self._path.unlink(missing_ok=True)
                    mine["replaces"] = holder.get("token")
                    if self._create(mine):
                        break
        with file_errors(self._path, "lock"):
            found = _parse(_read_bytes(self._path) or b"")
        if found.get("token") != mine["token"]:  # possible only where the guard does not work
            raise self._busy(found)
        if self._identity is not None:
            claim_scratch(self.folder, self._identity)
        self._mine, self.lost = mine, False
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="session-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back; a lock that another run has taken over is left alone."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._mine is None or not self.folder.is_dir():  # the session was deleted with its lock
            return
        try:
            with guarded(self.folder):
                if _parse(_read_bytes(self._path) or b"").get("token") == self._mine["token"]:
                    self._path.unlink(missing_ok=True)
        except OSError as err:  # the run is over; its lock goes stale by itself
            logger.warning("The lock of session %s could not be removed: %s.", self.folder.name, err)
        self._mine = None

    def _create(self, mine: dict[str, Any]) -> bool:
        """Create the lock file with its content, or say that it exists."""
        data = _to_bytes(mine)
        temporary = self.folder / f"{LOCK}.{mine['token']}.part"
        try:
            write_new(temporary, data)
            os.link(temporary, self._path)  # fails when the lock exists, and appears with its content whole
            return True
        except FileExistsError:
            return False
        except OSError as err:
            if err.errno not in _NO_LINKS:
                raise
        finally:
            temporary.unlink(missing_ok=True)
        try:  # Drive has no hard links
            write_new(self._path, data)
        except FileExistsError:
            return False
        return True

    def _is_alive(self, data: bytes, holder: dict[str, Any]) -> bool:
        if _is_copied(holder, self._identity):
            return False
        if holder.get("machine") == machine_id():
            return LocalProcess(holder.get("pid", 0), holder.get("start")).is_alive()
        now = time.time()
        written = holder.get("time")
        try:
            changed = os.stat(self._path).st_mtime
        except FileNotFoundError:
            return False
        age = now - written if isinstance(written, int | float) else None
        if age is not None and 0 <= age < self._stale_s:
            return True
        if age is not None and age >= self._stale_s and now - changed >= self._stale_s:
            return False
        logger.info("Checking for %.0f s whether the other run of this session is alive.", self._watch_s)
        end = time.monotonic() + self._watch_s
        while time.monotonic() < end:
            time.sleep(min(1.0, self._watch_s / 10))
            with file_errors(self._path, "read"):
                if _read_bytes(self._path) != data:
                    return _read_bytes(self._path) is not None
        return False

    def _busy(self, holder: dict[str, Any]) -> SessionBusy:
        return SessionBusy(
            f"Session {self.folder.name!r} is in use by {describe_holder(holder)}.",
            "Wait until it has ended or stop it; if you are sure that it no longer runs, add --take-over.",
        )

    def _beat(self) -> None:
        warned = False
        while not self._stop.wait(self._beat_s):
            try:
                with guarded(self.folder):
                    self._beat_once()
            except (OSError, DriveError) as err:
                if not warned:
                    logger.warning("The lock of session %s could not be renewed: %s", self.folder.name, err)
                warned = True
            if self.lost:
                logger.warning(
                    "Another run took over session %r; this one saves and stops.",
                    self.folder.name,
                )
                return

    def _beat_once(self) -> None:
        mine = self._mine
        if mine is None:
            return
        data = _read_bytes(self._path)
        found = _parse(data or b"")
        # An unreadable or missing lock is written anew; so is that of the run this one replaced, whose last
        # heartbeat may arrive late.
        if found.get("token") not in (mine["token"], mine["replaces"], None):
            self.lost = True
            return
        mine["heartbeat"] += 1
        mine["time"] = time.time()
        write_atomic(self._path, _to_bytes(mine))


def _is_copied(holder: dict[str, Any], identity: str | None) -> bool:
    """Whether a lock came with the folder when another session was copied; an earlier version's do not tell."""
    return identity is not None and holder.get("session") not in (None, identity)


def local_holder(folder: Path, identity: str | None = None) -> LocalProcess | None:
    """Find the process of this machine that holds a session's lock and is still running; None when there is none.

    Args:
        folder: the session's.
        identity: its id, so that a lock that was copied with the folder does not count.

    Returns:
        Its process, or None.

    Raises:
        DriveError: the session's folder cannot be read.
    """
    with file_errors(folder / LOCK, "read"):
        holder = _parse(_read_bytes(folder / LOCK) or b"")
    if _is_copied(holder, identity):
        return None
    process = LocalProcess(holder.get("pid", 0), holder.get("start"))
    return process if holder.get("machine") == machine_id() and process.is_alive() else None


def describe_holder(holder: dict[str, Any]) -> str:
    """Describe who holds a lock, for a message."""
    if not holder:
        return "another run (its lock cannot be read)"
    where = "this machine" if holder.get("machine") == machine_id() else f"machine {holder.get('host', '?')}"
    return f"process {holder.get('pid', '?')} on {where}"


def _to_bytes(holder: dict[str, Any]) -> bytes:
    return json.dumps({**holder, "sum": _sum_of(holder)}).encode()


def _parse(data: bytes) -> dict[str, Any]:
    """The holder; empty when the lock cannot be read, or when a byte of it changed."""
    try:
        holder = json.loads(data)
    except ValueError:
        return {}
    if not isinstance(holder, dict):
        return {}
    wanted = holder.pop("sum", None)  # a lock of an earlier version has none
    return holder if wanted in (None, _sum_of(holder)) else {}


def _sum_of(holder: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(holder, sort_keys=True).encode())


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine out for the moment of reading and replacing a file of the session.

    Only a courtesy: where the mount cannot lock files, or a stopped process does not let go, it goes on after 5 s.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(LockHeld):
            held.enter_context(file_lock(folder / _GUARD, wait_s=_GUARD_S))
        yield
