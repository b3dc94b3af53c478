"""Packages whose import check has not passed yet: noted next to the packages, so that the next run checks again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.errors import DriveError
from fastsd_helpers.files import write_atomic
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.runtime import logger

__all__ = ["Unproved", "read_unproved", "write_unproved"]

_NAME = "fastsd-unproved.json"


@dataclass(frozen=True)
class Unproved:
    """One package that an installation was about."""

    version: str
    whole: bool  # False: the installation was cut short, so files of it may be missing


def read_unproved(site: Path) -> dict[str, Unproved]:
    """The notes of the packages folder `site`, by canonical name; none where there are none that can be read."""
    try:
        said = read_object(site / _NAME).items()
        return {name: Unproved(str(row["version"]), bool(row["whole"])) for name, row in said}
    except (TypeError, KeyError):
        return {}


def write_unproved(site: Path, notes: Mapping[str, Unproved]) -> None:
    """Replace the notes of `site`; where that fails the installation itself is none the worse."""
    path = site / _NAME
    try:
        if not notes:
            path.unlink(missing_ok=True)
            return
        table = {name: {"version": row.version, "whole": row.whole} for name, row in sorted(notes.items())}
        write_atomic(path, (json.dumps(table, indent=1) + "\n").encode())
    except (DriveError, OSError) as err:
        logger.debug("The notes in %s cannot be written: %s.", site, err)
