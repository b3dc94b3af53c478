"""Set the disk to work on what was written, instead of leaving all of it to the sync at the end."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache

__all__ = ["WRITE", "find_call", "start_writeback"]

WRITE = 2  # SYNC_FILE_RANGE_WRITE


def start_writeback(descriptor: int, start: int, count: int) -> None:
    """Ask the system to begin to write bytes of a file that still lie in memory; they stay readable from there.

    On systems other than Linux, and on disks that do not offer it, nothing happens: a sync writes them all the same.
    Source: sync_file_range(2). POSIX_FADV_DONTNEED starts the writing too, but takes the pages out of memory
    afterwards, with which the whole conversion took up to three times as long.

    Args:
        start: of the part, in bytes.
        count: of the part, in bytes.
    """
    if (call := find_call()) is not None:
        call(descriptor, start, count, WRITE)


@cache
def find_call() -> Callable[[int, int, int, int], int] | None:
    """The system call: (descriptor, start, count, flags) -> 0 for success; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):  # a C library without it
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call
