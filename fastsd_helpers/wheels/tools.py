"""uv and pip, as they install a plan's rows: their words, their environment, and what their failures mean."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fastsd_helpers.errors import DependencyMissing, InstallError
from fastsd_helpers.processes import environment_for
from fastsd_helpers.runtime import logger
from fastsd_helpers.wheels.cache import WheelCache
from fastsd_helpers.wheels.difference import Plan
from fastsd_helpers.wheels.environment import Environment, find_uv
from fastsd_helpers.wheels.failures import explain
from fastsd_helpers.wheels.lockfile import LockedRow
from fastsd_helpers.wheels.progress import run_told

__all__ = ["pip_command", "run_from_cache", "run_plan"]


def run_from_cache(plan: Plan, cache: WheelCache, offline: bool, timeout_s: float) -> str:
    """Install from the archive of wheels, offline; what it lacks is downloaded first, and afterwards kept in it."""
    with tempfile.TemporaryDirectory(prefix="fastsd-wheels-") as work:
        folder = Path(work)
        lacking = cache.unpack(plan.rows, folder)
        if lacking and not _has_pip() and shutil.which("pip") is None:
            logger.warning("pip is not installed, so the wheels cannot be kept in %s.", cache.path)
            return run_plan(plan, folder, offline, timeout_s)
        if lacking:
            _download(plan, lacking, folder, offline, timeout_s)
        else:
            logger.info("Every wheel is in %s: nothing is downloaded.", cache.path)
        tool = run_plan(plan, folder, True, timeout_s)
        if lacking:
            cache.keep(folder)
    return tool


def _download(plan: Plan, rows: Iterable[LockedRow], folder: Path, offline: bool, timeout_s: float) -> None:
    """Fetch the rows' files, compared with the lock, with pip: uv keeps no wheels that could be copied."""
    environment = plan.environment
    with tempfile.TemporaryDirectory(prefix="fastsd-install-") as work:
        listed, build = _write_lines(plan, rows, None, Path(work))
        command = [*pip_command(environment), "download", "--no-input", "--disable-pip-version-check", "--no-color"]
        command += ["--no-deps", "--require-hashes", "--dest", str(folder), "-r", str(listed)]
        command += ["--no-index"] if offline else []
        environ = environment_for("install", this_python=environment.is_this)
        environ |= {"PIP_CONSTRAINT": str(build), "PIP_BUILD_CONSTRAINT": str(build)}
        _call("pip", command, Path(work), environ, plan, None, timeout_s)


def _write_lines(plan: Plan, rows: Iterable[LockedRow], folder: Path | None, work: Path) -> tuple[Path, Path]:
    """Two requirement files: the rows, and the build tools of those that have no wheel."""
    listed, build = work / "requirements.txt", work / "build.txt"
    listed.write_text("".join(f"{_line(row, folder)}\n" for row in rows), encoding="utf-8")
    # Without hashes, because pip and uv would then want one of everything a build asks for.
    build.write_text(re.sub(r" --hash=\S+", "", plan.lock_set.build) + "\n", encoding="utf-8")
    return listed, build


def run_plan(plan: Plan, wheel_folder: Path | None, offline: bool, timeout_s: float) -> str:
    """Let uv, or pip, install the plan's rows; returns the tool's name."""
    environment = plan.environment
    folder = Path(wheel_folder).expanduser().absolute() if wheel_folder else None
    if folder is not None and not folder.is_dir():
        raise InstallError(f"There is no folder of wheels {folder}.", "Check its path.")
    with tempfile.TemporaryDirectory(prefix="fastsd-install-") as work:
        rows, build = _write_lines(plan, plan.rows, folder, Path(work))
        uv = find_uv()
        environ = environment_for("install", this_python=environment.is_this)
        if uv is not None:
            tool = "uv"
            command = [str(uv), "pip", "install", "--no-config", "--python", str(environment.python)]
            command += ["--no-deps", "--require-hashes", "--build-constraints", str(build), "-r", str(rows)]
            command += ["--offline", "--no-index"] if offline else []
            command += [word for name in plan.in_part for word in ("--reinstall-package", name)]
        else:
            tool = "pip"
            command = [*pip_command(environment), "install", "--no-input", "--disable-pip-version-check", "--no-deps"]
            command += ["--require-hashes", "--no-color", "-r", str(rows)]
            command += ["--no-index"] if offline else []
            command += ["--force-reinstall"] if plan.in_part else []
            environ |= {"PIP_CONSTRAINT": str(build), "PIP_BUILD_CONSTRAINT": str(build)}
        command += ["--find-links", str(folder)] if folder else []
        _call(tool, command, Path(work), environ, plan, wheel_folder, timeout_s)
    return tool


def _call(
    tool: str,
    command: list[str],
    work: Path,
    environ: dict[str, str],
    plan: Plan,
    wheel_folder: Path | None,
    timeout_s: float,
) -> None:
    """Run uv or pip; a failure is told with the package it is about."""
    try:
        # In a folder of its own: uv would read a project's settings from the current one.
        done = run_told(command, cwd=work, env=environ, timeout_s=timeout_s)
    except OSError as err:
        raise DependencyMissing(
            f"{command[0]} cannot be started: {err.strerror}.", "Install it again: pip install --force-reinstall uv"
        ) from err
    except subprocess.TimeoutExpired as err:
        raise InstallError(
            f"{tool} did not finish within {timeout_s / 60:.0f} minutes.",
            "Check the network and run this again: what was downloaded is kept.",
        ) from err
    if done.returncode != 0:
        raise explain(tool, done.stdout, plan, wheel_folder, offline="--no-index" in command)


def _line(row: LockedRow, folder: Path | None) -> str:
    """A row as uv reads it; a commit archive that lies in the folder is taken from there."""
    if row.url and folder and (folder / row.files[0].name).is_file():
        return row.line.replace(row.url, (folder / row.files[0].name).as_uri())
    return row.line


def pip_command(environment: Environment) -> list[str]:
    """The command that runs pip for an environment: ours, or that of another Python.

    Raises:
        DependencyMissing: there is no pip.
    """
    if _has_pip():
        own = [sys.executable, "-m", "pip"]
        return own if environment.is_this else [*own, "--python", str(environment.python)]
    found = shutil.which("pip")  # that of another Python, as in an environment that uv made
    if found is None:
        raise DependencyMissing("Neither uv nor pip is installed, so nothing can be installed.", "Run: pip install uv")
    return [found, "--python", str(environment.python)]


def _has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None
