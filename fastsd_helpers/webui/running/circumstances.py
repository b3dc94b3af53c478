"""What the machine had left when a web UI ended: memory, room on its disks, the connection to Drive."""

import contextlib
import errno
import os
import tempfile
from dataclasses import dataclass

from fastsd_helpers.device import count_memory_kills, find_memory_left, host_memory_bytes
from fastsd_helpers.errors import DriveError
from fastsd_helpers.files import free_bytes
from fastsd_helpers.webui.places import Places

__all__ = ["Circumstances", "find_store_trouble", "look_around"]

_FULL_BYTES = 64 * 2**20  # with less, a program that writes does not get far
_LOST = (errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.EHOSTDOWN, errno.ENOENT, errno.ENODEV)


@dataclass(frozen=True)
class Circumstances:
    """What was there at the end of a process; None: not known."""

    killed_for_memory: bool | None = None  # the system ended programs for lack of memory since it was started
    memory_bytes: int | None = None
    memory_left: int | None = None
    disk_left: int | None = None  # the least of its folder's and that of temporary files
    store_lost: bool = False  # the folder of its models does not answer any more

    @property
    def disk_full(self) -> bool:
        """Whether there was no room left to write."""
        return self.disk_left is not None and self.disk_left < _FULL_BYTES

    def sentence(self) -> str:
        """The figures for people: "Free when it ended: RAM 3.1 of 12.7 GB, disk 20.4 GB."; empty without any."""
        parts = []
        if self.memory_left is not None:
            of = f" of {self.memory_bytes / 1e9:.1f}" if self.memory_bytes else ""
            parts.append(f"RAM {self.memory_left / 1e9:.1f}{of} GB")
        if self.disk_left is not None:
            parts.append(f"disk {self.disk_left / 1e9:.1f} GB")
        return f"Free when it ended: {', '.join(parts)}." if parts else ""


def look_around(places: Places, kills_before: int | None) -> Circumstances:
    """Look at the machine; at once after the end, because its memory is given back then.

    Args:
        kills_before: what `count_memory_kills` said at its start.
    """
    kills = count_memory_kills()
    disks = []
    for folder in (places.root, tempfile.gettempdir()):
        with contextlib.suppress(DriveError):
            disks.append(free_bytes(folder))
    return Circumstances(
        killed_for_memory=None if kills is None or kills_before is None else kills > kills_before,
        memory_bytes=host_memory_bytes() or None,
        memory_left=find_memory_left(),
        disk_left=min(disks, default=None),
        store_lost=_is_lost(places),
    )


def find_store_trouble(title: str, places: Places) -> DriveError | None:
    """What to say of a web UI that runs while the folder of its models is gone; None while that answers."""
    if not _is_lost(places):
        return None
    return DriveError(
        f"{title} is running, but the folder with its models and images does not respond: {places.store}.",
        f"Reconnect it (in the notebook: the cell that connects Drive); {title} need not be started again.",
    )


def _is_lost(places: Places) -> bool:
    # The start made it, so one that is not there any more was unmounted or moved away.
    try:
        os.stat(places.store)
    except OSError as err:
        return err.errno in _LOST
    return False
