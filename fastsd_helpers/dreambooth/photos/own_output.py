"""What this library made itself: sessions and the images in them, contact sheets, before-and-after sheets.

None of it is ever taken for a user's photos, by whatever way it is reached: a parent folder, a link, a zip, a copy.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from fastsd_helpers.sessions.record import RECORD, TWINS
from fastsd_helpers.sessions.session import FOLDERS

__all__ = ["MADE_HERE", "is_made_here", "is_own_sheet", "is_session", "session_around", "sessions_among"]

# In a session these hold what was made here; what else lies there a person gave.
MADE_HERE = frozenset(FOLDERS)
_SHEETS = re.compile(r"(?:contact-sheet|before-after(?:-[\w-]+)?|loss(?:-more\d+)?)(?: \(\d+\))?\.png", re.IGNORECASE)


def is_session(folder: Path) -> bool:
    """Whether a folder is a session of this library; a damaged one too, and not just any with a session.json."""
    if (folder / TWINS).is_dir():
        return True
    try:
        with (folder / RECORD).open("rb") as file:
            return b'"schema"' in file.read(4096)
    except OSError:
        return False


def session_around(path: Path) -> Path | None:
    """The session that a file or folder belongs to, links followed; None outside of any."""
    resolved = path.resolve()
    return next((folder for folder in (resolved, *resolved.parents) if is_session(folder)), None)


def is_made_here(path: Path) -> bool:
    """Whether a file or folder lies where a session keeps what is made here, links followed."""
    around = session_around(path)
    inside = path.resolve().relative_to(around).parts if around is not None else ()
    return bool(inside) and inside[0] in MADE_HERE


def sessions_among(names: Iterable[str]) -> set[str]:
    """The folders in a zip that are sessions, of its members' names; "" when the zip as a whole is one."""
    places = {PurePosixPath(name) for name in names}
    folders = {parent for path in places for parent in path.parents}
    found = {path.parent for path in places if path.name == RECORD and path.parent / "instance_images" in folders}
    return {"" if str(folder) == "." else str(folder) for folder in found}


def is_own_sheet(name: str) -> bool:
    """Whether a file has the name of one of the sheets that are drawn here."""
    return _SHEETS.fullmatch(PurePosixPath(name).name) is not None
