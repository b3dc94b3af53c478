"""How much memory this machine has, and how much of it is free: of its container, where that has less."""

import os
import re
from pathlib import Path

__all__ = ["free_memory_bytes", "total_memory_bytes"]

# The container's limit, what it has taken, and how much of that are files that are given back when memory is needed.
# Source: kernel docs, cgroup v2 and v1.
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def total_memory_bytes() -> int:
    """Read how much memory programs here can have: a container's limit is what ends them, not the host's memory.

    0 where the platform does not say.
    """
    if not hasattr(os, "sysconf"):
        return 0
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder, limit, _used, _cached in _CGROUPS:
        text = _read_text(f"{folder}/{limit}").strip()
        if text.isdigit():
            return min(installed, int(text))
    return installed


def free_memory_bytes() -> int:
    """Read how much memory a program can still take; 0 where the platform does not say.

    Source: proc(5), MemAvailable.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read_text("/proc/meminfo"), re.MULTILINE)
    free = int(found[1]) * 1024 if found else 0
    for folder, limit, used, cached in _CGROUPS:
        most, taken = _read_text(f"{folder}/{limit}").strip(), _read_text(f"{folder}/{used}").strip()
        if most.isdigit() and taken.isdigit():
            found = re.search(rf"^{cached} (\d+)$", _read_text(f"{folder}/memory.stat"), re.MULTILINE)
            free = min(free, max(0, int(most) - int(taken) + (int(found[1]) if found else 0)))
    return free


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
