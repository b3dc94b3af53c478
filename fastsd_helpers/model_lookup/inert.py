"""The one gate that the files of every model pass before they are loaded, placed or converted."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from fastsd_helpers.errors import ModelError

__all__ = ["require_inert"]


def require_inert(paths: Iterable[Path]) -> None:
    """Look at the files and folders of a model: each is a plain file, or a link that ends at one.

    A link that leads nowhere or round in a circle would fail in the middle of the work; a pipe or a device would be
    waited for without end.

    Raises:
        ModelError: one is something else; the sentence names it.
    """
    seen: set[Path] = set()
    for path in paths:
        _look(path, (), seen)


def _look(path: Path, above: tuple[Path, ...], seen: set[Path]) -> None:
    """Look at one path; `above` are the real folders that lead to it, `seen` those that were looked at."""
    if path.is_dir():
        real = path.resolve()
        if real in above:
            raise ModelError(f"{path} is a link to a folder that holds it.", "Remove it: it is a circle.")
        if real not in seen:  # each once, by however many links it is reached
            seen.add(real)
            for inner in sorted(path.iterdir()):
                _look(inner, (*above, real), seen)
        return
    try:
        kind = os.stat(path).st_mode
    except OSError as err:
        what = "is a link that leads nowhere" if path.is_symlink() else "cannot be read"
        raise ModelError(
            f"{path} {what} ({os.strerror(err.errno or 0)}).", "Copy or download the model again, whole."
        ) from err
    if not stat.S_ISREG(kind):
        raise ModelError(f"{path} is no file but a pipe, socket or device.", "Use a model from a source you trust.")
