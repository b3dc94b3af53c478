"""What is wrong with a row of advisories.toml, and with a lock that the list knows something of.

    python scripts/check_advisories.py

`make_lock.py` asks `lock_problems` before it writes a lock.
"""

import datetime
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastsd_helpers.wheels import Lock, read_lock  # noqa: E402
from fastsd_helpers.wheels.advisories import Advisories, contains, is_older, read_advisories  # noqa: E402
from fastsd_helpers.wheels.lockfile import canonical  # noqa: E402

_ID = re.compile(r"CVE-\d{4}-\d{4,}|GHSA(-[23456789cfghjmpqrvwx]{4}){3}|PYSEC-\d{4}-\d+")
_FIXED = re.compile(r"fixed by (\d[\w.]*)")
_WHY = re.compile(r"(not reachable|open): \S.{20,}")
_PIN = re.compile(r"^([\w.-]+)==([\w.]+)", re.MULTILINE)
_SOURCES = ("run", "read", "recalled")


def main() -> int:
    """Say everything that is wrong; 1 when anything is."""
    text = (ROOT / "fastsd_helpers" / "advisories.toml").read_text(encoding="utf-8")
    problems = [*list_problems(text), *lock_problems(read_lock(), read_advisories())]
    print("\n".join(problems) or "Every row is whole, and no locked version has a known hole without an answer.")
    return 1 if problems else 0


def list_problems(text: str) -> list[str]:
    """Everything that is wrong with the rows of the list, each named by its place and package."""
    return [
        f"row {place} ({row.get('package', 'no package')}) {problem}"
        for place, row in enumerate(tomllib.loads(text).get("advisory", ()), 1)
        for problem in row_problems(row)
    ]


def row_problems(row: dict[str, Any]) -> Iterator[str]:
    """What a row lacks, or says and cannot be."""
    known = {"package", "ids", "affected", "answer", "date", "source", "older", "sets"}
    if set(row) - known:
        yield f"has the unknown keys {', '.join(sorted(set(row) - known))}"
    name, ids, answer = row.get("package"), row.get("ids"), row.get("answer", "")
    if not isinstance(name, str) or canonical(name) != name or not name:
        yield "has no package, written as indexes compare names"
    if not isinstance(ids, list) or not ids or not all(isinstance(text, str) and _ID.fullmatch(text) for text in ids):
        yield "has no ids, such as CVE-2026-25990 or GHSA-cfh3-3jmp-rvhc"
    if not isinstance(row.get("date"), datetime.date):
        yield "has no date"
    if row.get("source") not in _SOURCES:
        yield f"has no source, one of {', '.join(_SOURCES)}"
    affected = row.get("affected")
    if not isinstance(affected, str) or not re.match(r"[<>=!~]", affected) or not _parses(affected):
        yield f"has no range that can be read ({affected!r})"
        return
    fixed = _FIXED.fullmatch(answer)
    if fixed is None and not _WHY.fullmatch(answer):
        yield "has no answer: fixed by VERSION, not reachable: WHY, open: WHY"
    elif fixed is not None and contains(affected, fixed[1]):
        yield f"is answered with {fixed[1]}, which lies in its range"


def _parses(text: str) -> bool:
    try:
        Requirement(f"x{text}")
    except ValueError:
        return False
    return True


def lock_problems(lock: Lock, advisories: Advisories) -> Iterator[str]:
    """Locked versions with a known hole that no row answers for, and those older than what is safe."""
    for item in lock.sets:
        for row in item.rows:
            yield from _version_problems(item.name, item.python, row.name, row.version, advisories)
            least = advisories.safe_from.get(row.name)
            if not item.own_environment and least and is_older(row.version, least):
                yield f"{item.name} {item.python}: {row.name} {row.version} is older than {least}, safe from"
    # The tools that build the few sources are the same for all sets.
    for name, version in sorted(set(_PIN.findall("\n".join(item.build for item in lock.sets)))):
        yield from _version_problems("build", "tools", canonical(name), version, advisories)


def _version_problems(set_name: str, python: str, name: str, version: str, advisories: Advisories) -> Iterator[str]:
    mine = [row for row in advisories.rows if row.package == name and row.concerns(version)]
    own = {found for row in mine if set_name in row.sets and row.fixed_by is None for found in row.ids}
    for row in mine:
        if row.sets and set_name not in row.sets:
            continue
        if row.fixed_by is not None and not own & {*row.ids}:
            yield f"{set_name} {python}: {name} {version} has {row.ids[0]} ({row.answer})"


if __name__ == "__main__":
    sys.exit(main())
