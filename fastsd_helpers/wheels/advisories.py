"""Known holes of the packages in use, and what became of each: the dated list of advisories.toml."""

import datetime
import functools
import importlib.resources
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.errors import InstallError, ModelError
from fastsd_helpers.runtime import install_command, version_of, where
from fastsd_helpers.wheels.difference import is_protected, requirements_module
from fastsd_helpers.wheels.lockfile import canonical
from fastsd_helpers.wording import list_some

__all__ = [
    "Advisories",
    "Advisory",
    "OldPackage",
    "contains",
    "is_older",
    "old_packages",
    "parse_advisories",
    "read_advisories",
    "require_safe_tokenizer",
]

_FIXED = re.compile(r"fixed by (\d[\w.]*)")


@dataclass(frozen=True)
class Advisory:
    """One row: what is wrong with which versions of a package, and what became of it here."""

    package: str
    ids: tuple[str, ...]
    affected: str  # a range, such as ">=10.3,<12.1.1"
    answer: str  # fixed by VERSION, not reachable: WHY, open: WHY
    date: datetime.date  # when it was looked up
    source: str  # run, read or recalled
    older: str = ""  # what protects where a version in the range is installed
    sets: tuple[str, ...] = ()  # the sets of wheels.lock it answers for; empty: all others

    def concerns(self, version: str) -> bool:
        """Whether a version lies in the range."""
        return contains(self.affected, version)

    @property
    def fixed_by(self) -> str | None:
        """The version that is free of it, where that is the answer."""
        found = _FIXED.fullmatch(self.answer)
        return found[1] if found else None

    @property
    def is_open(self) -> bool:
        """Whether nothing here protects an installation with a version in the range."""
        return not self.older and not self.answer.startswith("not reachable")


@dataclass(frozen=True)
class Advisories:
    """The whole list, and the least version of each package that `fastsd install` brings by itself."""

    rows: tuple[Advisory, ...]
    safe_from: dict[str, str]

    def of(self, package: str, version: str) -> list[Advisory]:
        """The rows that concern a version of a package, those for single sets of the lock left out."""
        name = canonical(package)
        return [row for row in self.rows if row.package == name and not row.sets and row.concerns(version)]


@dataclass(frozen=True)
class OldPackage:
    """An installed package older than what it is safe from."""

    name: str
    version: str
    safe_from: str
    rows: tuple[Advisory, ...]

    @property
    def is_open(self) -> bool:
        """Whether a hole of it is closed by nothing here."""
        return any(row.is_open for row in self.rows)

    def sentence(self) -> str:
        """What is known of it, and what closes that here."""
        if not self.rows:
            return f"{self.name} {self.version} is older than {self.safe_from}; no vulnerability of it is known here."
        ids = [row.ids[0] for row in self.rows]
        here = list(dict.fromkeys(row.older for row in self.rows if row.older))  # one may answer for several
        left = [row.ids[0] for row in self.rows if row.is_open]
        said = [f"here {', '.join(here[:2])}{' and so on' if here[2:] else ''}"] if here else []
        said += [f"nothing here fixes {', '.join(left)}"] if left else []
        return f"{self.name} {self.version} has known vulnerabilities ({list_some(ids, 4)}); {'; '.join(said)}."

    def remedy(self) -> str:
        """What to do to be rid of them."""
        if not self.rows:
            return ""
        if is_protected(self.name):
            return f"To fix them, in an environment of your own: {self.name} {self.safe_from} or newer."
        place = " in an environment of your own" if where() in ("colab", "kaggle") else ""
        return f'To fix them{place}: pip install -U "{self.name}>={self.safe_from}"'


def contains(text: str, version: str) -> bool:
    """Whether a version lies in a range such as ">=10.3,<12.1.1"."""
    # A local build such as 2.8.0+cu126 is that version.
    return requirements_module().Requirement(f"x{text}").specifier.contains(version.partition("+")[0], prereleases=True)


def is_older(one: str, other: str) -> bool:
    """Whether a version is older than another."""
    return contains(f"<{other}", one)


@functools.cache
def read_advisories() -> Advisories:
    """The list of this package.

    Raises:
        InstallError: it is damaged.
    """
    text = importlib.resources.files("fastsd_helpers").joinpath("advisories.toml").read_text(encoding="utf-8")
    return parse_advisories(text)


def parse_advisories(text: str) -> Advisories:
    """The list as it is written in advisories.toml; scripts/check_advisories.py says what is wrong with a row.

    Raises:
        InstallError: it is damaged.
    """
    try:
        table = tomllib.loads(text)
        rows = tuple(
            Advisory(**{**row, "ids": tuple(row["ids"]), "sets": tuple(row.get("sets", ()))})
            for row in table["advisory"]
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as err:
        raise InstallError(
            f"The list of advisories cannot be read: {err}.",
            f"Install fastsd_helpers again: {install_command(again=True)}",
        ) from err
    return Advisories(rows, dict(table.get("safe_from", {})))


def old_packages(names: Iterable[str] | None = None) -> Iterator[OldPackage]:
    """The packages of this Python that are older than what they are safe from.

    Args:
        names: left alone, all of the list.
    """
    advisories = read_advisories()
    for name, least in advisories.safe_from.items():
        if names is not None and name not in names:
            continue
        if (version := version_of(name)) is not None and is_older(version, least):
            rows = tuple(row for row in advisories.of(name, version) if row.fixed_by)
            yield OldPackage(name, version, least, rows)


def require_safe_tokenizer(folder: Path) -> None:
    """Refuse the tokenizer of a model that an old sentencepiece would read: such a file can make it run over memory.

    Raises:
        ModelError: there is a sentencepiece model, no tokenizer.json to read in its place, and sentencepiece is old.
    """
    models = sorted(folder.glob("*.model"))
    if not models or (folder / "tokenizer.json").is_file():
        return
    for old in old_packages(["sentencepiece"]):
        raise ModelError(
            f"The tokenizer {models[0].name} in {folder} is read by sentencepiece {old.version}, which a crafted "
            f"file can exploit ({old.rows[0].ids[0]}).",
            f'Run: pip install -U "sentencepiece>={old.safe_from}", then restart the runtime.',
        )
