"""models.toml as it stands: what the registry describes and what downloads fetch, read from one place."""

import functools
import importlib.resources
import tomllib
from typing import Any

__all__ = ["base_keys", "models_table"]


@functools.cache
def models_table() -> dict[str, dict[str, Any]]:
    """Read models.toml: registry key -> its row, in the order of the file. Treat the result as read-only.

    Returns:
        Each key's row, as in the file.
    """
    text = importlib.resources.files("fastsd_helpers").joinpath("models.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def base_keys() -> list[str]:
    """The keys of the models that training and drawing start from."""
    return [key for key, row in models_table().items() if row.get("kind", "base") == "base"]
