"""The sessions of a store: which ones are there, and which one was used last, so that a notebook goes on with it.

The store's hidden file `.last-session.json` names the one that a notebook opened last. Where it is missing or names one
that is gone, the newest session.json tells.
"""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.drive import sessions_root
from fastsd_helpers.errors import FastSDError, SessionNotFound
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.forms import desk
from fastsd_helpers.forms.widgets.known import OTHER
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.runtime import in_notebook, logger, where
from fastsd_helpers.sessions import is_old_session
from fastsd_helpers.sessions.folders import children
from fastsd_helpers.sessions.record import RECORD, TWINS

__all__ = [
    "FIRST_NAME",
    "FIRST_READING_NAME",
    "READINGS",
    "Found",
    "ago",
    "choose_name",
    "find_sessions",
    "last_time",
    "last_used",
    "local_root",
    "reading_choices",
    "remember",
    "say_twin",
    "session_choices",
]

FIRST_NAME, FIRST_READING_NAME = "my-subject", "my-handwriting"
SESSIONS, READINGS = Path("Fast-Dreambooth", "Sessions"), Path("Fast-TrOCR", "Sessions")
_LAST = ".last-session.json"
_IMPORT = ".import-"
# What a reading session consists of; any of them tells it from a folder of somebody's own.
_READING = ("session.json", "lines.jsonl", "corrections.json", "lines", "uploads")


@dataclass(frozen=True)
class Found:
    """A session of a store, without having opened it."""

    name: str
    used: float  # seconds since 1970; 0 when nothing tells
    note: str = ""  # what is special about it, in words
    whole: bool = True  # False: not one to go on with by itself


def local_root(part: Path) -> Path:
    """The store on this machine itself, below the current folder."""
    return Path.cwd() / part


def session_choices(_session: Any = None) -> list[tuple[str, str]]:
    """The DreamBooth sessions of the usual store: the one used last first, a new one last."""
    return _choices(SESSIONS, sessions_root(), FIRST_NAME)


def reading_choices(_session: Any = None) -> list[tuple[str, str]]:
    """The reading sessions of the usual store: the one used last first, a new one last."""
    # Beside the other workflow's sessions: My Drive where it is mounted, else the current folder.
    return _choices(READINGS, sessions_root().parents[1] / READINGS, FIRST_READING_NAME)


def _choices(part: Path, root: Path, first: str) -> list[tuple[str, str]]:
    new = ("a new session: type its name", OTHER)
    found = find_sessions(root)
    for item in found:
        desk.note_offered(item.name, root)
    notes = {item.name: item.note or (f"last used {ago(item.used)}" if item.used else "") for item in found}
    entries = [(" · ".join(filter(None, [name, note])), name) for name, note in notes.items()]
    if where() == "colab" and in_notebook() and root == local_root(part):
        # Google Drive is mounted by the next cell, which then takes the last one there.
        waiting = (f"the one used last on your Google Drive (where there is none: a new one, {first})", "")
        return [waiting, *((f"{words} · on this machine", value) for words, value in entries), new]
    if not any(item.whole for item in found):
        name = first if first not in [item.name for item in found] else f"{first}-2"
        entries.insert(0, (f"{name} · new", name))
    return [*entries, new]


def find_sessions(root: Path) -> list[Found]:
    """List the sessions in a folder without opening them: the one to go on with first, then by their last use.

    Raises:
        DriveError: the folder cannot be read.
    """
    with file_errors(root, "read"):
        entries = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    found = [_look(path) for path in entries if not path.name.startswith(".")]
    names = {item.name for item in found}
    for path in entries:
        name = path.name.removeprefix(_IMPORT)
        if path.name.startswith(_IMPORT) and name not in names:
            found.append(Found(name, 0.0, "its import was not finished", whole=False))
    name, when = _read_last(root)
    found = [Found(item.name, max(item.used, when), item.note, item.whole) if item.name == name else item
             for item in found]  # fmt: skip
    found.sort(key=lambda item: (item.name != name or not item.whole, not item.whole, -item.used, item.name))
    return found


def _look(folder: Path) -> Found:
    with contextlib.suppress(OSError, FastSDError):
        record = folder / RECORD
        if record.is_file():
            if not record.stat().st_size:
                return Found(folder.name, 0.0, f"{RECORD} is empty: repaired when opened", whole=False)
            return Found(folder.name, record.stat().st_mtime)
        if (folder / TWINS).is_dir():
            return Found(folder.name, 0.0, f"{RECORD} is missing: repaired when opened", whole=False)
        if is_old_session(folder):
            return Found(folder.name, 0.0, "of the old notebook: imported when opened", whole=False)
        if folder.parent.parts[-2:] == READINGS.parts and any((folder / name).exists() for name in _READING):
            return Found(folder.name, folder.stat().st_mtime)
    return Found(folder.name, 0.0, f"{RECORD} is missing: copied in part?", whole=False)


def last_used(root: Path) -> Found | None:
    """The session of a store that a notebook goes on with by itself; None where there is none.

    Raises:
        DriveError: the store cannot be read.
    """
    found = find_sessions(root)
    return found[0] if found and found[0].whole else None


def choose_name(wanted: str, root: Path, *, first: str, imports: bool = False) -> str:
    """The session to open: the one that was named; without a name the one used last, and `first` where there is none.

    Raises:
        SessionNotFound: it was in the list of sessions, and it is not in this store; or its import was cut.
        DriveError: the store cannot be read.
    """
    name = wanted.strip()
    if not name:
        last = last_used(root)
        return last.name if last is not None else first
    folder = root / "_".join(name.split())
    if folder.is_dir() or (root / name).is_dir() or imports:
        return name
    if (root / f"{_IMPORT}{folder.name}").is_dir():
        raise SessionNotFound(
            f"The import of {name} was interrupted, and nothing of it can be used.",
            "Enter its source in 'import from', and run this cell again: the import starts again.",
        )
    seen = desk.was_offered(name)
    if seen is not None and seen != root:
        raise SessionNotFound(
            f"The session {name} is in {seen}, and this form asks for one in {root}.",
            "Change 'google drive' or 'shared drive' in cell 2a, or type another name for a new session.",
        )
    if seen is not None:
        raise SessionNotFound(
            f"The session {name} was in {root} when cell 2a was shown, and it is not there now.",
            "Check whether the same Drive is connected, and whether the session was renamed or deleted; then run cell "
            "2a again. No new session was made.",
        )
    return name


def last_time(name: str, root: Path) -> str:
    """When a session was used last, as the end of a sentence; "" when nothing tells."""
    used = [item.used for item in find_sessions(root) if item.name in (name, "_".join(name.split()))]
    return f", last used {ago(used[0])}" if used and used[0] else ""


def say_twin(name: str, root: Path, part: Path) -> None:
    """Say when the other store (this machine, or My Drive where it is mounted) has a session of the same name."""
    with contextlib.suppress(FastSDError, OSError):
        stores = {local_root(part), sessions_root().parents[1] / part} - {root}
        for other in sorted(stores):
            if (other / name).is_dir():
                logger.warning("There is another session %s, in %s: it is not changed.", name, other)


def remember(folder: Path) -> None:
    """Note in a store that this session was used last; a store that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        note = {"name": folder.name, "id": read_object(folder / RECORD).get("id"), "time": time.time()}
        try:
            write_atomic(folder.parent / _LAST, json.dumps(note).encode())
        except FastSDError as err:
            logger.debug("The last used session could not be recorded: %s", err.problem)


def _read_last(root: Path) -> tuple[str, float]:
    """Name and time of the session that a notebook opened last; a renamed one is found by its identity."""
    try:
        note = read_object(root / _LAST)
        name, when, identity = str(note["name"]), float(note["time"]), note.get("id")
    except (ValueError, KeyError, TypeError):
        return "", 0.0
    if identity and not (root / name).is_dir():
        for folder in children(root):
            if read_object(folder / RECORD).get("id") == identity:
                return folder.name, when
    return name, when


def ago(when: float) -> str:
    """A time as people say it: "20 minutes ago"."""
    seconds = max(time.time() - when, 0)
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count:
            return f"{count} {unit}{'s' if count != 1 else ''} ago"
    return "just now"
