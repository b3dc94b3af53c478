"""What a set asks for and a Python lacks: the difference that has to be installed, and nothing more."""

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fastsd_helpers.errors import DependencyMissing, InstallError
from fastsd_helpers.wheels.environment import Environment
from fastsd_helpers.wheels.lockfile import LockedRow, LockSet, canonical

__all__ = ["PROTECTED", "Change", "Plan", "has_all", "is_protected", "make_plan", "matches", "names_to_ask"]

# The platform's own: never installed, replaced or removed in its Python. A notebook's kernel, its widgets and the
# build of torch for its driver belong together.
PROTECTED = (
    "cuda-*",
    "google-colab",
    "ipykernel",
    "ipython",
    "ipywidgets",
    "jax*",
    "numpy",
    "nvidia-*",
    "torch",
    "torchaudio",
    "torchvision",
    "triton",
    "widgetsnbextension",
)
# Builds of one library under several names; any of them will do, and two of them in one Python overwrite each other.
_SAME_LIBRARY = (
    ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"),
    ("onnxruntime", "onnxruntime-gpu"),
)


@dataclass(frozen=True)
class Change:
    """One package that will be, or was, installed."""

    name: str
    before: str | None  # None: it was not there
    after: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What installing a set into a Python changes."""

    lock_set: LockSet
    environment: Environment
    changes: tuple[Change, ...]
    rows: tuple[LockedRow, ...]  # of the changes, in the same order
    kept: int  # packages of the set that are there already and fit
    in_part: tuple[str, ...] = ()  # of the rows: at their version already, by an installation that was cut short

    @property
    def bytes(self) -> int:
        """What has to be downloaded, when nothing of it is cached."""
        return sum(change.bytes for change in self.changes)


def is_protected(name: str) -> bool:
    """Whether a package belongs to the platform."""
    return matches(name, PROTECTED)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a package is meant by one of several names or patterns, such as `nvidia-*`."""
    return any(fnmatch.fnmatchcase(canonical(name), pattern) for pattern in patterns)


def requirements_module() -> ModuleType:
    """`packaging.requirements`: on its own, or the copy that pip carries."""
    try:
        from packaging import requirements
    except ImportError:
        try:
            from pip._vendor.packaging import requirements
        except ImportError as err:
            raise DependencyMissing(
                "Neither packaging nor pip is installed, so version ranges cannot be compared.",
                "Run: python -m ensurepip",
            ) from err
    return requirements


def names_to_ask(lock_set: LockSet) -> set[str]:
    """Every package whose installed version matters for a plan."""
    names = {row.name for row in lock_set.rows}
    if not lock_set.own_environment:
        for text in (*lock_set.wanted, *(need for row in lock_set.rows for need in row.needs)):
            names.add(canonical(requirements_module().Requirement(text).name))
        for builds in _SAME_LIBRARY:
            names |= set(builds) if names & set(builds) else set()
    return names


def make_plan(lock_set: LockSet, environment: Environment, *, skip: Iterable[str] = ()) -> Plan:
    """Compare a set with what a Python has.

    In an environment of its own every row has to be there at exactly its version. In the platform's Python a package
    whose version lies in the asked range stays, whatever the lock holds; only what is absent, or outside the range, is
    installed, with those of its own needs that are absent or outside.

    Args:
        lock_set: what is wanted.
        environment: described with the names of `names_to_ask(lock_set)`.
        skip: names or patterns (`nvidia-*`) that somebody else installs.

    Raises:
        InstallError: the platform lacks something that only it can bring, or has it at a version that cannot work.
    """
    skip = tuple(skip)
    find = _exact if lock_set.own_environment else _missing
    found = [
        (row, before, reason)
        for row, before, reason in find(lock_set, environment.installed)
        if not matches(row.name, skip)
    ]
    return Plan(
        lock_set=lock_set,
        environment=environment,
        changes=tuple(Change(row.name, before, row.version, row.bytes, reason) for row, before, reason in found),
        rows=tuple(row for row, _before, _reason in found),
        kept=len(lock_set.rows) - len(found),
    )


def has_all(lock_set: LockSet, environment: Environment, *, skip: Iterable[str] = ()) -> bool:
    """Whether a platform's Python has everything a workflow asks for by name, at a version in its range."""
    wanted = [requirements_module().Requirement(text) for text in lock_set.wanted]
    skip = tuple(skip)
    return not lock_set.own_environment and all(
        matches(item.name, skip) or _fits(item, environment.installed) for item in wanted
    )


def _exact(lock_set: LockSet, installed: dict[str, str]) -> Iterator[tuple[LockedRow, str | None, str]]:
    for row in lock_set.rows:
        before = installed.get(row.name)
        # A local build such as 2.8.0+cpu is that version.
        if before is None or before.partition("+")[0] != row.version:
            yield row, before, "missing" if before is None else f"{before} is here"


def _missing(lock_set: LockSet, installed: dict[str, str]) -> list[tuple[LockedRow, str | None, str]]:
    requirement_of = requirements_module().Requirement
    picked: dict[str, tuple[LockedRow, str | None, str]] = {}
    lacking: dict[str, str] = {}
    waiting = [(requirement_of(text), "fastsd") for text in lock_set.wanted]
    while waiting:
        requirement, asked_by = waiting.pop(0)
        name = canonical(requirement.name)
        if name in picked or _fits(requirement, installed):
            continue
        before = installed.get(name)
        if is_protected(name):
            lacking[name] = f"{name} {before}" if before else name
            continue
        row = lock_set.row(name)
        if row is None:
            raise InstallError(
                f"wheels.lock ({lock_set.name}, Python {lock_set.python}) has no row for {name}, which {asked_by} "
                "needs.",
                "Make the lock anew with `make lock`.",
            )
        wanted = f"{asked_by} needs {requirement.name}{requirement.specifier}"
        picked[name] = (row, before, wanted if before is None else f"{wanted}, {before} is here")
        waiting += [(requirement_of(need), name) for need in row.needs]
    if lacking:
        raise InstallError(
            f"This Python lacks what only its platform can bring: {', '.join(sorted(lacking.values()))} "
            "(absent or too old).",
            "Install PyTorch first as its guide says (pytorch.org, Get started), and numpy beside it; fastsd never "
            "installs or replaces them. Then run this again.",
        )
    return list(picked.values())


def _fits(requirement: Any, installed: dict[str, str]) -> bool:
    name = canonical(requirement.name)
    builds = next((group for group in _SAME_LIBRARY if name in group), (name,))
    versions = [installed[build] for build in builds if build in installed]
    return any(requirement.specifier.contains(version, prereleases=True) for version in versions)
