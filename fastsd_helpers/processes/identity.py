"""Who a process is: its number and when it started, on this start of this machine."""

import contextlib
import os
import uuid
from dataclasses import dataclass

__all__ = ["LocalProcess", "boot_id", "machine_id"]


@dataclass(frozen=True)
class LocalProcess:
    """A process of this machine; when it started tells it apart from a later one that was given the same number.

    pid: its number. start: clock ticks since the machine's start as text; None where the system does not tell.
    """

    pid: int
    start: str | None

    @classmethod
    def of(cls, pid: int) -> "LocalProcess":
        """Name a process that is running now.

        Args:
            pid: its number.

        Returns:
            The process, by its number and the time of its start.
        """
        return cls(pid, _start_of(pid))

    @classmethod
    def me(cls) -> "LocalProcess":
        """Name the process that asks.

        Returns:
            This process.
        """
        return cls.of(os.getpid())

    def is_alive(self) -> bool:
        """Whether it is still running; one that has ended but was not waited for (a zombie) is not."""
        if not isinstance(self.pid, int) or self.pid <= 0:  # read from a file; 0 and below would name groups
            return False
        if os.path.isdir("/proc/self"):
            return self.start is not None and _start_of(self.pid) == self.start
        if os.name == "nt":
            return True  # os.kill would end the process there; --take-over is the way
        try:
            os.kill(self.pid, 0)
        except OSError as err:
            return not isinstance(err, ProcessLookupError)  # it may be another user's
        return True

    def was_replaced(self) -> bool:
        """Whether another process runs under its number now."""
        return _start_of(self.pid) not in (None, self.start)


def boot_id() -> str:
    """Name this start of this machine; empty where the system has no such name. Source: random(4).

    Returns:
        The name, or an empty text.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def machine_id() -> str:
    """Name this start of this machine, and the process namespace: a container cannot see another one's processes.

    Returns:
        The name.
    """
    with contextlib.suppress(OSError):
        if boot := boot_id():
            return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return f"{uuid.getnode():012x}"


def _start_of(pid: int) -> str | None:
    """When a process started, in clock ticks since the machine's start, or None where /proc does not tell.

    Source: proc(5), field 22 of /proc/pid/stat; the name in field 2 may hold blanks and brackets.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
