"""models.toml as it stands: what the registry describes and what downloads fetch, read from one place."""

import functools
import importlib.resources
import tomllib
from typing import Any

__all__ = ["models_table"]


@functools.cache
def models_table() -> dict[str, dict[str, Any]]:
    """Read models.toml: registry key -> its row, in the order of the file. Treat the result as read-only."""
    text = importlib.resources.files("fastsd_helpers").joinpath("models.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
