"""One lock between the processes of this machine: a file that is held, and let go however the process ends."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastsd_helpers.runtime import logger

__all__ = ["LockHeld", "file_lock"]

_HELD = {errno.EAGAIN, errno.EACCES}
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOLCK, errno.EINVAL}
_LOOK_EVERY_S = 0.02


class LockHeld(Exception):
    """Another process still held the lock after the time allowed."""


@contextlib.contextmanager
def file_lock(
    path: Path, *, wait_s: float | None = None, waiting: Callable[[], None] | None = None, mode: int = 0o666
) -> Iterator[None]:
    """Hold a file's lock for the block; the file is made when it is missing, and stays.

    Only processes of this machine see it. A mount or system without file locks lets everybody in: where that would
    lose something, a file that names its holder is needed besides (`sessions.lock`). Source: flock(2).

    Args:
        path: the file; a link in its place is not followed.
        wait_s: how long to wait for another holder; None for ever, 0 not at all.
        waiting: called once when another process holds it.
        mode: of the file when it is made.

    Raises:
        LockHeld: another process held it all that time.
        OSError: the file cannot be opened or made.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), mode)
    try:
        _take(handle, path, wait_s, waiting)
        yield
    finally:
        os.close(handle)


def _take(handle: int, path: Path, wait_s: float | None, waiting: Callable[[], None] | None) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    deadline = None if wait_s is None else time.monotonic() + wait_s
    told = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as err:
            if err.errno in _UNSUPPORTED:
                logger.debug("%s cannot be locked: %s.", path, err)
                return
            if err.errno not in _HELD:
                raise
        if deadline is not None and time.monotonic() >= deadline:
            raise LockHeld(str(path))
        if waiting is not None and not told:
            told = True
            waiting()
        time.sleep(_LOOK_EVERY_S)
