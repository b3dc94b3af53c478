"""Small JSON files of ours, which one process leaves for another one or for the next visit."""

import json
from pathlib import Path
from typing import Any

__all__ = ["read_object"]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or none that can be read: nothing was noted then."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
