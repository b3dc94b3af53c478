"""The processor that a run would use, its memory, and how much of that the system allows: containers have limits."""

import contextlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = [
    "Device",
    "count_cores",
    "count_memory_kills",
    "describe_cpu",
    "describe_device",
    "find_memory_left",
    "find_memory_limit",
    "give_back_freed_memory",
    "host_memory_bytes",
    "name_arithmetic",
    "peak_memory_bytes",
    "reuse_freed_memory",
]

_ROOT = Path("/")
_UNLIMITED = 2**60  # version 1 writes the largest number of pages when there is no limit


@dataclass(frozen=True)
class Device:
    """The processor that a run would use."""

    kind: Literal["cuda", "mps", "cpu"]
    name: str
    memory_bytes: int  # all of it: of the GPU, or of this machine (its container's limit when that is less)
    has_bf16: bool  # bfloat16 arithmetic in hardware, not emulated
    capability: tuple[int, int] | None = None  # CUDA compute capability
    reason: str = ""  # why this one, in words for the user

    @property
    def memory_gib(self) -> float:
        """All of its memory in GiB."""
        return self.memory_bytes / 2**30


def describe_device(gpu: int | None = None) -> Device:
    """The processor that training and sampling would use: a CUDA GPU, Apple's, else the CPU.

    Works without torch (then it is the CPU, and `reason` says so).

    Args:
        gpu: number of the CUDA GPU, where there are several; left alone, the current one.
    """
    try:
        import torch
    except ImportError:
        return describe_cpu("PyTorch is not installed here")
    if torch.cuda.is_available():
        index = torch.cuda.current_device() if gpu is None else gpu
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        return Device(
            kind="cuda",
            name=properties.name,
            memory_bytes=properties.total_memory,
            # Before Ampere (8.0) torch emulates bfloat16: a T4 (7.5) would be slower with it than with fp32.
            has_bf16=capability >= (8, 0),
            capability=capability,
            reason=f"CUDA GPU {index} of {torch.cuda.device_count()}",
        )
    if torch.backends.mps.is_available():
        has_bf16, why = torch.backends.mps.is_macos_or_newer(14, 0), "Apple GPU, which shares the machine's memory"
        return Device("mps", _cpu_name(), host_memory_bytes(), bool(has_bf16), reason=why)
    reason = "no GPU is attached" if torch.version.cuda else "this PyTorch is built for the CPU alone"
    return describe_cpu(reason)


def describe_cpu(reason: str) -> Device:
    """The processor itself, whatever GPU is there.

    Args:
        reason: why it is the one to use.
    """
    return Device("cpu", _cpu_name(), host_memory_bytes(), _cpu_has_bf16(), reason=reason)


def name_arithmetic(device: Device) -> str:
    """The name of what decides how sums are rounded here: only runs with one name can agree bit for bit. Needs torch.

    Args:
        device: the one that computes.
    """
    import torch

    torch_version = f"torch {torch.__version__}"
    if device.kind != "cpu":
        return f"{device.name}, {torch_version}"
    threads = torch.get_num_threads()
    maker = _cpu_fields().get("vendor_id", platform.machine())
    branch = os.environ.get("MKL_CBWR", "AUTO,STRICT")
    chosen = [] if branch == "AUTO,STRICT" else [f"MKL_CBWR={branch}"]
    words = [f"{maker} {torch.backends.cpu.get_cpu_capability()}", f"{threads} thread{'s' * (threads != 1)}"]
    return ", ".join([*words, torch_version, *chosen])


def _cpu_fields() -> dict[str, str]:
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu_name() -> str:
    return _cpu_fields().get("model name") or platform.processor() or platform.machine()


def _cpu_has_bf16() -> bool:
    fields = _cpu_fields()
    # x86 lists "flags", 64-bit ARM "Features"; elsewhere bfloat16 is taken to be emulated.
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def count_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory_bytes() -> int:
    """The memory of this machine, or of its container when that is less; 0 where the platform does not say."""
    if not hasattr(os, "sysconf"):
        return 0
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A container's limit is what kills a run, not the host's memory.
    return min(installed, find_memory_limit() or installed)


def peak_memory_bytes(kind: Literal["host", "cuda"] = "host") -> int:
    """The most memory this process has held; 0 where the platform does not say.

    Args:
        kind: on the host, or by torch on the GPU.
    """
    if kind == "cuda":
        torch = sys.modules.get("torch")
        return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its maximum is inherited from the parent across exec, VmHWM is this process's own.
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reuse_freed_memory() -> None:
    """Ask glibc to keep large blocks that are freed: a training step frees and wants the same ones again.

    Otherwise each goes back to the kernel and comes back as zeroed pages, which costs up to a third of a step on a CPU.
    It holds for the whole process, from then on; without glibc nothing happens. Source: mallopt(3).
    """
    import ctypes

    mmap_max, top_pad, trim_threshold = -4, -2, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_max, 0)
        mallopt(top_pad, 64 << 20)
        mallopt(trim_threshold, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Give the system what was freed and is kept for later: that of one network is seldom where the next one's goes.

    Without glibc nothing happens. Source: malloc_trim(3).
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ------------------------------------------------------------------------------------ the system's limits


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
