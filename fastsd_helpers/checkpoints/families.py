"""Which name table belongs to which model family: one table file per family, found by its key."""

from collections.abc import Callable

from fastsd_helpers.checkpoints.layout import Family
from fastsd_helpers.checkpoints.names_sd15 import sd15
from fastsd_helpers.errors import CheckpointError

__all__ = ["find_family"]

_TABLES: dict[str, Callable[[], Family]] = {"sd15": sd15}


def find_family(key: str) -> Family:
    """Look up a family's name table; raises CheckpointError for a family that has none."""
    if key not in _TABLES:
        raise CheckpointError(
            f"There is no checkpoint layout for the model family {key!r}.",
            f"Families that can be written: {', '.join(sorted(_TABLES))}.",
        )
    return _TABLES[key]()
