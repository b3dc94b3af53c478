"""Versions of packages that are known to cause trouble: whom it concerns, and what to do; known_bad.toml as rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastsd_helpers.downloads.table import read_table

__all__ = ["KnownBad", "known_bad"]


@dataclass(frozen=True)
class KnownBad:
    """Versions that are known to cause trouble."""

    package: str
    versions: str  # a range, such as ">=5.13,<5.18"
    level: Literal["note", "warning", "problem"]
    what: str
    todo: str = ""
    only: str | None = None  # a place: colab, kaggle, jupyter, terminal
    beside: Sequence[str] = ()  # another package and its range that must be there too


def known_bad() -> list[KnownBad]:
    """Every row of the table."""
    return [KnownBad(**row) for row in read_table("wheels/known_bad.toml")["known_bad"]]
