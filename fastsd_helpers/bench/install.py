"""How long installing a workflow takes: ours versus plain pip, into fresh environments, from a warm cache.

Both get the same packages at the same versions. A fresh environment lacks the platform's packages, so what is measured
is the part that a Colab image lacks; which one, `packages` says. Beside the clock's seconds stand the processor's,
which depend less on what else the machine is doing.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers import wheels
from fastsd_helpers.bench import Report
from fastsd_helpers.errors import DependencyMissing
from fastsd_helpers.options import check, option

__all__ = ["Settings", "measure"]

_LINES_MB_S = (25, 100)


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    workflow: str = option("dreambooth", help="set of wheels.lock to install")
    packages: str = option(
        "bitsandbytes,pillow-heif", help="packages of that set to install, separated by commas; empty: all of them"
    )
    rounds: int = option(3, help="number of measurements; the median counts", low=1, high=20)

    def __post_init__(self) -> None:
        check(self)


def measure(settings: Settings) -> Report:
    """Install into fresh environments with pip and with ours, in turns; writes to a temporary folder only."""
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    lock_set = wheels.read_lock().find(settings.workflow, minor)
    names = [name.strip() for name in settings.packages.split(",") if name.strip()]
    rows = [row for row in lock_set.rows if not names or row.name in names]
    uv = wheels.find_uv()
    if uv is None:
        raise DependencyMissing("uv is not installed.", "Run: pip install uv")
    times: dict[str, list[tuple[float, float]]] = {"pip": [], "fastsd": []}
    with tempfile.TemporaryDirectory(prefix="fastsd-bench-") as folder:
        work = Path(folder)
        listed = work / "requirements.txt"
        listed.write_text("".join(f"{row.line}\n" for row in rows), encoding="utf-8")
        for index in range(settings.rounds + 1):  # the first round fills both caches and is not counted
            for tool in times:
                python = wheels.make_environment(work / f"{tool}-{index}", python=minor)
                seconds = _with_pip(python, listed) if tool == "pip" else _with_uv(uv, python, listed)
                if index:
                    times[tool].append(seconds)
                shutil.rmtree(work / f"{tool}-{index}")
        started = time.monotonic()
        wheels.install(settings.workflow, dry_run=True)
        again = time.monotonic() - started
    size = sum(row.bytes for row in rows)
    pip, ours = (statistics.median(wall for wall, _cpu in times[tool]) for tool in ("pip", "fastsd"))
    pip_cpu, our_cpu = (statistics.median(cpu for _wall, cpu in times[tool]) for tool in ("pip", "fastsd"))
    first_time = {f"{speed} MB/s": (size / 1e6 / speed + ours) / 60 for speed in _LINES_MB_S}
    data = {
        "packages": [f"{row.name}=={row.version}" for row in rows],
        "bytes": size,
        "pip_s": pip,
        "fastsd_s": ours,
        "ratio": pip / ours,
        "pip_processor_s": pip_cpu,
        "fastsd_processor_s": our_cpu,
        "processor_ratio": pip_cpu / our_cpu,
        "second_run_s": again,
        "first_time_minutes": first_time,
        "rounds": settings.rounds,
    }
    lines = [
        f"{len(rows)} packages, {size / 1e6:.0f} MB, from a warm cache, median of {settings.rounds}:",
        f"  pip install     {pip:6.1f} s   {pip_cpu:5.1f} s CPU time",
        f"  fastsd install  {ours:6.1f} s   {our_cpu:5.1f} s CPU time   {pip / ours:.1f} times as fast "
        f"({pip_cpu / our_cpu:.1f} CPU time)",
        f"  with nothing missing it takes {again:.2f} s",
        *(f"  first time at {speed}: {60 * minutes:.1f} s" for speed, minutes in first_time.items()),
    ]
    return Report(data, lines)


def _with_pip(python: Path, listed: Path) -> tuple[float, float]:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-input", "--no-deps"]
    return _timed([*command, "--disable-pip-version-check", "--require-hashes", "-r", str(listed)])


def _with_uv(uv: Path, python: Path, listed: Path) -> tuple[float, float]:
    # The command that `wheels.install` runs, without its comparison and proof, which pip has no counterpart of.
    command = [str(uv), "pip", "install", "--quiet", "--no-config", "--python", str(python), "--no-deps"]
    return _timed([*command, "--require-hashes", "-r", str(listed)])


def _timed(command: list[str]) -> tuple[float, float]:
    """Run a command; its seconds by the clock and of the processor."""
    started, used = time.monotonic(), os.times()
    subprocess.run(command, check=True, env=wheels.own_environ(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    now = os.times()
    cpu = now.children_user - used.children_user + now.children_system - used.children_system
    return time.monotonic() - started, cpu
