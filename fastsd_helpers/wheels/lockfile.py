"""wheels.lock: which package versions each workflow and web UI needs, and the sha256 of every file that may be used."""

import functools
import hashlib
import importlib.resources
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import InstallError
from fastsd_helpers.runtime import install_command

__all__ = ["Lock", "LockSet", "LockedFile", "LockedRow", "canonical", "digest_of", "read_lock"]

_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*)(==(?P<version>[^\s;]+)| @ (?P<url>https://\S+))"
    r"(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)"
)
_REPAIR = f"Install fastsd_helpers again ({install_command(again=True)}), or create the lock again with `make lock`."


def canonical(name: str) -> str:
    """A package's name as indexes compare it: `Pillow_HEIF` is `pillow-heif`."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class LockedFile:
    """One file that may be installed: a wheel, or a source archive when there is no wheel."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LockedRow:
    """One package at one version, with every file that is accepted for it."""

    name: str
    version: str
    files: tuple[LockedFile, ...]
    line: str  # as pip and uv read it, with its hashes
    url: str | None = None  # a commit archive's own address
    needs: tuple[str, ...] = ()  # what it asks for on this Python, such as `numpy>=1.17`

    @property
    def bytes(self) -> int:
        """Size of the file that is downloaded (the largest, when several fit)."""
        return max((file.bytes for file in self.files), default=0)


@dataclass(frozen=True)
class LockSet:
    """Everything one workflow or web UI needs on one Python."""

    name: str  # dreambooth, webui, trocr, trocr-int8, a1111
    python: str  # "3.13"
    own_environment: bool  # True: exactly these versions; False: only what the platform lacks
    platform: str
    wanted: tuple[str, ...]  # the ranges of requirements-colab.txt
    rows: tuple[LockedRow, ...]
    build: str  # requirement lines of the build tools, for the rows that have no wheel
    sha256: str  # over all of its lines

    def row(self, name: str) -> LockedRow | None:
        """The row of a package; None when it is not in this set.

        Args:
            name: of the package, in any spelling that pip takes.
        """
        return next((row for row in self.rows if row.name == canonical(name)), None)


@dataclass(frozen=True)
class Lock:
    """The whole file."""

    made: str  # date
    sets: tuple[LockSet, ...]

    def names(self) -> list[str]:
        """The sets' names, each once, in the order of the file."""
        return list(dict.fromkeys(item.name for item in self.sets))

    def find(self, name: str, python: str) -> LockSet:
        """The set of a name for a Python minor version such as "3.13".

        Args:
            name: such as `trocr`.
            python: its minor version, such as "3.13".

        Raises:
            InstallError: no such set, or none for this Python.
        """
        same = [item for item in self.sets if item.name == name]
        if not same:
            raise InstallError(f"wheels.lock has no set '{name}'.", f"Its sets are {', '.join(self.names())}.")
        for item in same:
            if item.python == python:
                return item
        there = ", ".join(item.python for item in same)
        if same[0].own_environment:
            hint = f"Run `fastsd webui install --ui {name}`, which makes its environment with Python {same[0].python}."
        else:
            hint = f"Use Python {there} (in Colab: Runtime > Change runtime type)"
            too_old = _minor(python) < min(_minor(item.python) for item in same)
            hint += "." if too_old else f", or install without the lock: {install_command(name)}"
        raise InstallError(f"The set '{name}' is locked for Python {there}, and this is Python {python}.", hint)


def _minor(python: str) -> tuple[int, ...]:
    return tuple(int(part) for part in python.split("."))


def digest_of(python: str, wanted: Iterable[str], lines: str, needs: Iterable[str]) -> str:
    """sha256 over everything that decides what a set installs: an altered lock is told before anything is fetched."""
    return hashlib.sha256("\n".join([python, *wanted, lines.strip(), *needs]).encode()).hexdigest()


def read_lock(path: Path | None = None) -> Lock:
    """Read and check wheels.lock.

    Args:
        path: another lock file; left alone, the one of this package.

    Returns:
        The sets, by name and Python.

    Raises:
        InstallError: it is missing, not readable, or a line of it was altered.
    """
    if path is None:
        return _packaged_lock()
    try:
        return _parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        raise InstallError(f"The lock {path} cannot be read: {err}.", _REPAIR) from err


@functools.cache
def _packaged_lock() -> Lock:
    try:
        text = importlib.resources.files("fastsd_helpers").joinpath("wheels.lock").read_text(encoding="utf-8")
    except OSError as err:
        raise InstallError("This installation of fastsd_helpers has no wheels.lock.", _REPAIR) from err
    return _parse(text)


def _parse(text: str) -> Lock:
    try:
        table = tomllib.loads(text)
        if table["schema"] != 1:
            raise InstallError(f"wheels.lock has the format {table['schema']}, newer than this program.", _REPAIR)
        sets = tuple(_set_from(key, row, table) for key, row in table["sets"].items())
        return Lock(made=table["made"], sets=sets)
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as err:
        raise InstallError(f"wheels.lock is damaged ({type(err).__name__}: {err}).", _REPAIR) from err


def _set_from(key: str, row: dict[str, Any], table: dict[str, Any]) -> LockSet:
    lines, wanted = row["requirements"], tuple(row["wanted"])
    # In an environment of its own every row is installed, whoever needs it.
    needs = {} if row["own_environment"] else table["needs"][row["python"]]
    rows = tuple(_row_from(line, table, needs) for line in lines.splitlines() if line)
    found = digest_of(row["python"], wanted, lines, (need for item in rows for need in item.needs))
    if found != row["sha256"]:
        raise InstallError(f"The set '{key}' of wheels.lock was altered after it was made.", _REPAIR)
    own = {name: row[name] for name in ("name", "python", "own_environment", "platform", "sha256")}
    return LockSet(**own, wanted=wanted, rows=rows, build=table["build"]["requirements"])


def _row_from(line: str, table: dict[str, Any], needs: dict[str, list[str]]) -> LockedRow:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"the line {line[:60]!r} is none")
    name = canonical(match["name"])
    hashes = re.findall(r"sha256:([0-9a-f]{64})", match["hashes"])
    files = []
    for sha256 in hashes:
        size, _, file_name = table["files"][sha256].partition(" ")
        files.append(LockedFile(file_name, int(size), sha256))
    version = match["version"] or table["archives"][name]
    return LockedRow(name, version, tuple(files), line, match["url"], tuple(needs.get(f"{name}=={version}", ())))
