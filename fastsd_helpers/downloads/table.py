"""Tables of this package as they stand: models.toml, which the registry and downloads share, and the others."""

import functools
import importlib.resources
import tomllib
from typing import Any

__all__ = ["base_keys", "models_table", "read_table"]


@functools.cache
def read_table(name: str) -> dict[str, Any]:
    """Read a table by its path inside the package, such as `webuis.toml`. Treat the result as read-only."""
    return tomllib.loads(importlib.resources.files("fastsd_helpers").joinpath(name).read_text(encoding="utf-8"))


def models_table() -> dict[str, dict[str, Any]]:
    """Read models.toml: registry key -> its row, in the order of the file. Treat the result as read-only.

    Returns:
        Each key's row, as in the file.
    """
    return read_table("models.toml")


def base_keys() -> list[str]:
    """The keys of the models that training and drawing start from."""
    return [key for key, row in models_table().items() if row.get("kind", "base") == "base"]
