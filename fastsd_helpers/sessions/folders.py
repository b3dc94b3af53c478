"""What lies in a folder of sessions: folders by name, and the models that a session has finished."""

import os
from pathlib import Path

__all__ = ["children", "models_in"]


def children(folder: Path) -> list[Path]:
    """The folders in a folder by name, hidden ones not; none where it is not there."""
    if not folder.is_dir():
        return []
    # What kind an entry is comes with the listing: on Drive, asking for each one takes a moment.
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return [folder / name for name in names if not name.startswith(".")]


def models_in(exports: Path) -> list[Path]:
    """The finished models in a session's folder of exports, by name; none where it is not there."""
    return sorted(path for path in exports.glob("*.safetensors") if not path.name.startswith("."))
