"""What a set asks for and a Python lacks: the difference that has to be installed, and nothing more."""

import fnmatch
import re
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
    kept: int  # packages of the set that are there already and stay
    left: tuple[str, ...] = ()  # of those: newer than asked for, as "pyngrok 9.1.0 (fastsd asks for <8.2)"
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
    return any(fnmatch.fnmatchcase(canonical(name), canonical(pattern)) for pattern in patterns)


def requirements_module() -> ModuleType:
    """`packaging.requirements`: on its own, or the copy that pip carries."""
    try:
        from packaging import requirements
    except ImportError:
        try:
            from pip._vendor.packaging import requirements as carried
        except ImportError as err:
            raise DependencyMissing(
                "Neither packaging nor pip is installed, so version ranges cannot be compared.",
                "Run: python -m ensurepip",
            ) from err
        return carried
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

    In an environment of its own every row has to be there at exactly its version. In any other Python nothing that is
    there changes its version: only what is absent is installed, with those of its own needs that are absent. An upper
    bound says what was tried, so what is newer stays too (`Plan.left`), and the import check tells whether it works.

    Args:
        lock_set: what is wanted.
        environment: described with the names of `names_to_ask(lock_set)`.
        skip: names or patterns (`nvidia-*`) that somebody else installs.

    Returns:
        What to install or replace, and what stays.

    Raises:
        InstallError: the platform lacks something that only it can bring, or a package is there at a version that
            cannot work; all of them are named.
    """
    skip = tuple(skip)
    left: dict[str, str] = {}
    every: Iterable[tuple[LockedRow, str | None, str]]
    if lock_set.own_environment:
        every = _exact(lock_set, environment.installed)
    else:
        every = _missing(lock_set, environment.installed, skip, left)
    found = [(row, before, reason) for row, before, reason in every if not matches(row.name, skip)]
    return Plan(
        lock_set=lock_set,
        environment=environment,
        changes=tuple(Change(row.name, before, row.version, row.bytes, reason) for row, before, reason in found),
        rows=tuple(row for row, _before, _reason in found),
        kept=len(lock_set.rows) - len(found),
        left=tuple(left.values()),
    )


def has_all(lock_set: LockSet, environment: Environment, *, skip: Iterable[str] = ()) -> bool:
    """Whether a platform's Python has everything a workflow asks for by name, at no version that is too old."""
    wanted = [requirements_module().Requirement(text) for text in lock_set.wanted]
    skip = tuple(skip)
    return not lock_set.own_environment and all(
        matches(item.name, skip) or _what_is(item, environment.installed) in ("fits", "newer") for item in wanted
    )


def _bring_by_hand(names: Iterable[str]) -> str:
    """How what only the platform can bring is brought, for exactly what lacks."""
    of_torch = [name for name in names if re.match(r"torch|nvidia-|triton", name)]
    others = " ".join(sorted(name for name in names if name not in of_torch))
    steps = ["install PyTorch as its guide says (pytorch.org, Get started)"] if of_torch else []
    steps += [f"run: pip install {others}"] if others else []
    return ", and ".join(steps).replace("install", "Install", 1) if of_torch else steps[0].capitalize()


def _exact(lock_set: LockSet, installed: dict[str, str]) -> Iterator[tuple[LockedRow, str | None, str]]:
    for row in lock_set.rows:
        before = installed.get(row.name)
        # A local build such as 2.8.0+cpu is that version.
        if before is None or before.partition("+")[0] != row.version:
            yield row, before, "missing" if before is None else f"{before} is here"


def _missing(
    lock_set: LockSet, installed: dict[str, str], skip: tuple[str, ...], left: dict[str, str]
) -> list[tuple[LockedRow, str | None, str]]:
    """Rows to install; what stays though it is newer than asked for is put into `left`."""
    requirement_of = requirements_module().Requirement
    picked: dict[str, tuple[LockedRow, str | None, str]] = {}
    lacking: dict[str, str] = {}
    too_old: dict[str, tuple[str, str]] = {}
    waiting = [(requirement_of(text), "fastsd") for text in lock_set.wanted]
    while waiting:
        requirement, asked_by = waiting.pop(0)
        name = canonical(requirement.name)
        found = _what_is(requirement, installed)
        if name in picked or found == "fits":
            continue
        here, version = _build_of(name, installed)
        if found == "newer":
            left.setdefault(here, f"{here} {version} ({asked_by} asks for {requirement.specifier})")
        elif is_protected(name):
            if not matches(name, skip):
                lacking[name] = f"{name} {version}" if version else name
        elif found == "too old":
            if not matches(name, skip):
                wish = f"{here}{requirement.specifier}"
                too_old.setdefault(here, (f"{here} {version} ({asked_by} needs {requirement.specifier})", wish))
        else:
            row = lock_set.row(name)
            if row is None:
                raise InstallError(
                    f"wheels.lock ({lock_set.name}, Python {lock_set.python}) has no row for {name}, which {asked_by} "
                    "needs.",
                    "Create the lock again with `make lock`.",
                )
            picked[name] = (row, None, f"{asked_by} needs {requirement.name}{requirement.specifier}")
            waiting += [(requirement_of(need), name) for need in row.needs]
    if lacking:
        raise InstallError(
            f"This Python lacks packages that only its platform can provide: {', '.join(sorted(lacking.values()))} "
            "(absent or too old).",
            f"{_bring_by_hand(lacking)}; fastsd never installs or replaces what belongs to the platform. Then run this "
            "again.",
        )
    if too_old:
        wishes = " ".join(f"'{wish}'" for _said, wish in sorted(too_old.values()))
        raise InstallError(
            f"Too old here for '{lock_set.name}': {', '.join(sorted(said for said, _wish in too_old.values()))}. "
            "Nothing was installed, because installed versions are never changed.",
            f"Run: pip install --upgrade {wishes} (then restart), or use an environment of its own "
            "(python3 -m venv .venv).",
        )
    return list(picked.values())


def _build_of(name: str, installed: dict[str, str]) -> tuple[str, str | None]:
    """Under which name a library is here, and its version; its own name and None when it is not."""
    builds = next((group for group in _SAME_LIBRARY if name in group), (name,))
    here = sorted((build for build in builds if build in installed), key=lambda build: build != name)
    return (here[0], installed[here[0]]) if here else (name, None)


def _what_is(requirement: Any, installed: dict[str, str]) -> str:
    """What is here of a library: "fits", "newer" (only above an upper bound), "too old" (or excluded), or "absent"."""
    name = canonical(requirement.name)
    builds = next((group for group in _SAME_LIBRARY if name in group), (name,))
    versions = [installed[build] for build in builds if build in installed]
    if any(requirement.specifier.contains(version, prereleases=True) for version in versions):
        return "fits"
    if any(_is_newer(requirement.specifier, version) for version in versions):
        return "newer"
    return "too old" if versions else "absent"


def _is_newer(specifiers: Any, version: str) -> bool:
    """Whether a version breaks upper bounds alone: `<`, `<=`, and what lies above `==1.2`, `==1.2.*` or `~=1.2`."""
    for item in specifiers:
        if item.contains(version, prereleases=True):
            continue
        if item.operator in (">", ">=", "!=", "==="):
            return False
        if item.operator in ("==", "~=") and not _is_above(type(specifiers), item.version, version):
            return False
    return True


def _is_above(specifiers_of: Any, bound: str, version: str) -> bool:
    return specifiers_of(f">{bound.removesuffix('.*')}").contains(version.partition("+")[0], prereleases=True)
