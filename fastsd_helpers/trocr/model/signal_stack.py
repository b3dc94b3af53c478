"""The memory a thread's signal handlers run in: what a library puts in its place must not outlive the library."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

__all__ = ["signal_stack_kept"]


class _Stack(ctypes.Structure):
    """stack_t of Linux, see sigaltstack(2)."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Leave this thread's alternate signal stack as it was found.

    OpenVINO's CPU plugin gives the thread that loads it one of its own and frees that memory with the plugin, on
    whichever thread that happens. On another one (Python's garbage collection chooses) the first thread keeps the
    address of memory that is gone, and the next Ctrl-C or SIGTERM ends the process with a segmentation fault. A stack
    that is no longer set is not touched when the plugin goes.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    call, before = ctypes.CDLL(None).sigaltstack, _Stack()
    known = call(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            call(ctypes.byref(before), None)
