"""A Python to install into: this one, or an environment of its own made by uv."""

import base64
import contextlib
import importlib
import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DependencyMissing, InstallError
from fastsd_helpers.files import sha256_of
from fastsd_helpers.processes import environment_for
from fastsd_helpers.runtime import in_notebook

__all__ = [
    "CONSTRAINTS",
    "Environment",
    "find_uv",
    "how_to_unset",
    "make_environment",
    "missing_constraints",
    "own_environ",
    "read_environment",
]


CONSTRAINTS = ("UV_CONSTRAINT", "UV_BUILD_CONSTRAINT", "UV_OVERRIDE", "PIP_CONSTRAINT")


@dataclass(frozen=True)
class Environment:
    """One Python and what is installed in it, as far as it was asked."""

    python: Path
    version: str  # "3.13.15"
    prefix: Path
    site: Path  # where pure packages go
    platform: str  # "linux x86_64"
    managed: bool  # the system's package manager forbids pip here (PEP 668)
    installed: dict[str, str]  # canonical name -> version
    is_this: bool

    @property
    def minor(self) -> str:
        """Its version as sets are named: "3.13"."""
        return ".".join(self.version.split(".")[:2])


def _describe(names: list[str]) -> dict[str, Any]:
    # Also run inside another Python, as source text: it imports what it needs itself.
    import importlib.metadata
    import os
    import platform
    import sys
    import sysconfig

    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    managed = os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))
    return {
        "version": platform.python_version(),
        "prefix": sys.prefix,
        "site": sysconfig.get_path("purelib"),
        "platform": sys.platform + " " + platform.machine(),
        "managed": managed and sys.prefix == sys.base_prefix,
        "installed": installed,
    }


def read_environment(python: Path | str | None = None, names: Iterable[str] = ()) -> Environment:
    """Describe a Python: its version, where it installs to, and which of `names` it has.

    Args:
        python: its interpreter, or the folder of an environment; this very Python when None.
        names: canonical package names to look up.

    Returns:
        The version, the folder, and each package with its version.

    Raises:
        InstallError: there is no working Python.
    """
    asked = sorted(set(names))
    # Not resolved: an environment's interpreter is a link to the Python it was made from.
    if python is None or _interpreter(Path(python)).absolute() == Path(sys.executable).absolute():
        importlib.invalidate_caches()  # something may have been installed since they were filled
        return Environment(**_with_paths(_describe(asked)), python=Path(sys.executable), is_this=True)
    interpreter = _interpreter(Path(python))
    code = f"from __future__ import annotations\n{inspect.getsource(_describe)}\nimport json, sys\n"
    code += "print(json.dumps(_describe(json.load(sys.stdin))))"
    command = [str(interpreter), "-I", "-c", code]
    environ = environment_for("proof")
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=300, check=True, env=environ
        )
        said = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as err:
        detail = (getattr(err, "stderr", None) or str(err)).strip().splitlines()[-1:]
        raise InstallError(
            f"The Python {interpreter} does not work{': ' + detail[0] if detail else ''}.",
            "Delete that environment and make it again.",
        ) from err
    return Environment(**_with_paths(said), python=interpreter, is_this=False)


def _with_paths(said: dict[str, Any]) -> dict[str, Any]:
    return {**said, "prefix": Path(said["prefix"]), "site": Path(said["site"])}


def _interpreter(path: Path) -> Path:
    path = path.expanduser()
    return path / ("Scripts/python.exe" if os.name == "nt" else "bin/python") if path.is_dir() else path


def own_environ() -> dict[str, str]:
    """What uv and pip get to install into an environment of our own.

    Without what the platform set for its own Python (Colab's UV_CONSTRAINT and others), and without tokens.
    """
    return environment_for("install")


def missing_constraints() -> Iterator[tuple[str, str, str]]:
    """Settings of uv and pip that name a file which is not there: (its path, the problem, what to do)."""
    for name in CONSTRAINTS:
        for path in os.environ.get(name, "").split():
            if "://" not in path and not Path(path).is_file():
                problem = f"{name} names {path}, which is not there: nothing can be installed."
                yield path, problem, how_to_unset(name)


def how_to_unset(name: str) -> str:
    """What to run to do without a variable of the environment, here."""
    return f"Run: import os; os.environ.pop('{name}')" if in_notebook() else f"Run: unset {name}"


def find_uv() -> Path | None:
    """The uv program: the one on the path, or that of the installed uv package; None when there is none.

    Raises:
        DependencyMissing: it is that of a package, and not as the package brought it.
    """
    found = shutil.which("uv")
    path = Path(found) if found else Path(sys.executable).with_name("uv")
    if not path.is_file():
        with contextlib.suppress(ImportError, FileNotFoundError):
            import uv

            path = Path(uv.find_uv_bin())
    if not path.is_file():
        return None
    if not _is_as_recorded(path):
        raise DependencyMissing(
            f"The uv program {path} is not the one from its package, so it is not run.",
            "Run: pip install --force-reinstall uv",
        )
    return path


def _is_as_recorded(program: Path) -> bool:
    """Whether a program of the package uv has the hash that pip noted when it compared the package with the lock.

    One that no package here has brought is the user's own.
    """
    try:
        files = importlib.metadata.files("uv") or []
    except importlib.metadata.PackageNotFoundError:
        return True
    for file in files:
        if file.name == program.name and Path(file.locate()).resolve() == program.resolve():
            recorded = file.hash
            if recorded is None or recorded.mode != "sha256":
                return True
            digest = base64.urlsafe_b64encode(bytes.fromhex(sha256_of(program)))
            return digest.rstrip(b"=").decode() == recorded.value
    return True


def make_environment(folder: Path, *, python: str = "3.11") -> Path:
    """Make an environment of our own with uv and return its interpreter; one that is there already is kept.

    uv looks for a Python of that version on the machine and downloads one when there is none.

    Args:
        folder: where it is made; on a local disk, since Drive is far too slow for thousands of small files.
        python: the minor version, such as "3.11", or the path of an interpreter of it.

    Returns:
        The interpreter of the environment.

    Raises:
        DependencyMissing: uv is not installed.
        InstallError: it could not be made; the hint says what to do.
    """
    folder = Path(folder).expanduser().absolute()
    minor = read_environment(python).minor if os.sep in python else python
    interpreter = _interpreter(folder) if folder.is_dir() else folder / "bin" / "python"
    if interpreter.exists():
        found = read_environment(interpreter)
        if found.minor == minor:
            return interpreter
        raise InstallError(
            f"{folder} is an environment of Python {found.minor}, and Python {minor} is required.",
            "Delete that folder, or choose another one.",
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise InstallError(
            f"{folder} is not empty, so no environment is made in it.", "Delete that folder, or choose another one."
        )
    uv = find_uv()
    if uv is None:
        raise DependencyMissing("uv is not installed, and it makes the environment.", "Run: pip install uv")
    command = [str(uv), "venv", "--quiet", "--no-project", "--python", python, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=own_environ())
        reason = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["uv printed nothing"])[-1]
    except (OSError, subprocess.TimeoutExpired) as err:
        reason = str(err)
    if reason:
        raise InstallError(
            f"The environment {folder} could not be made with Python {python}: {reason}",
            f"uv needs a Python {minor} here, or the network to download one: `uv python install {minor}`.",
        )
    return interpreter
