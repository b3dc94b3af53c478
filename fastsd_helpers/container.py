"""The memory that the system allows this process: the limit of its container, and whether it ended programs for it."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["count_memory_kills", "find_memory_left", "find_memory_limit"]

_ROOT = Path("/")
_UNLIMITED = 2**60  # version 1 writes the largest number of pages when there is no limit


def find_memory_limit(root: Path = _ROOT) -> int | None:
    """The smallest memory limit, in bytes, of the control groups this process is in; None when there is none.

    Args:
        root: below which /proc and /sys lie.

    Source: kernel documentation, cgroup-v1/memory.rst and cgroup-v2.rst.
    """
    limits = []
    for folder in _memory_groups(root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                limits.append(int(text))
    return min(limits, default=None)


def find_memory_left(root: Path = _ROOT) -> int | None:
    """How many bytes a program could still take, within every limit; None where the system does not tell.

    Args:
        root: of the file system, for tests.
    """
    left = [
        int(kib) * 1024
        for kib in re.findall(r"^MemAvailable: +(\d+) kB$", _read(root / "proc" / "meminfo"), re.MULTILINE)
    ]
    for folder in _memory_groups(root):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            numbers = [_read(folder / name).strip() for name in (limit, used)]
            if all(number.isdigit() for number in numbers) and int(numbers[0]) < _UNLIMITED:
                # What it keeps of files that were read counts as used, and is given up when a program needs it.
                kept = re.findall(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                left.append(int(numbers[0]) - int(numbers[1]) + max(map(int, kept), default=0))
    return max(0, min(left)) if left else None


def count_memory_kills(root: Path = _ROOT) -> int | None:
    """How many programs the system has killed for lack of memory since it started; None where it does not count.

    The counts of the container, which version 1 has since Linux 4.13, and of the whole machine are added up: what
    matters is whether the number has grown.

    Args:
        root: of the file system, for tests.
    """
    counts = []
    for folder in _memory_groups(root):
        for name in ("memory.events", "memory.oom_control"):
            counts += re.findall(r"^oom_kill (\d+)$", _read(folder / name), re.MULTILINE)
    counts += re.findall(r"^oom_kill (\d+)$", _read(root / "proc" / "vmstat"), re.MULTILINE)
    return sum(map(int, counts)) if counts else None


def _memory_groups(root: Path) -> Iterator[Path]:
    """The folders of the control groups that count this process's memory, from the innermost to the outermost.

    In a container the path may be that of the host, of which only the end, or nothing, is seen here.
    """
    for line in (_read(root / "proc" / "self" / "cgroup") or "0::/\n0:memory:/").splitlines():
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        if kinds and "memory" not in kinds.split(","):
            continue
        mount = root / "sys" / "fs" / "cgroup" / ("memory" if kinds else "")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for count in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:count])
            if folder.is_dir():
                yield folder


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="ascii")
    return ""
