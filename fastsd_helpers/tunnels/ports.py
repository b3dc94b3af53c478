"""Notes on what of ours listens at a port of this machine, so that a link made by another process has the same login.

A note is for this user alone, and is believed only as long as the very process lives that it was written for.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fastsd_helpers.errors import DriveError
from fastsd_helpers.files import placed, write_new
from fastsd_helpers.processes import LocalProcess, boot_id
from fastsd_helpers.runtime import logger
from fastsd_helpers.tunnels.gate.login import Login

__all__ = ["PortNote", "forget_port", "note_port", "open_private", "read_port"]

_OLD_S = 7 * 86400


@dataclass(frozen=True)
class PortNote:
    """What listens at a port.

    login: what it asks for itself; None for what has no login, or keeps it in the folder of its run.
    run: the folder of a web UI's run.
    """

    process: LocalProcess
    login: Login | None = None
    run: Path | None = None


def note_port(port: int, note: PortNote) -> None:
    """Leave a note in the user's own folder: in that for temporary files any user can put something first."""
    path = _path(port)
    values = {"pid": note.process.pid, "start": note.process.start, "boot": boot_id()}
    values |= {"user": note.login.user, "password": note.login.password} if note.login else {}
    values |= {"run": str(note.run)} if note.run else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_left_over(path.parent)
        with placed(path) as temporary:
            write_new(temporary, json.dumps(values).encode(), mode=0o600)
    except (DriveError, OSError) as err:
        logger.debug("No note of port %d was left, so a tunnel to it has a login of its own: %s.", port, err)


def read_port(port: int) -> PortNote | None:
    """The note on a port; None when nothing of this user's listens there any more."""
    try:
        with open_private(_path(port)) as file:
            values = json.loads(file.read(100_000))
        note = PortNote(
            LocalProcess(int(values["pid"]), values["start"]),
            Login(str(values["user"]), str(values["password"])) if "user" in values else None,
            Path(values["run"]) if "run" in values else None,
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return note if values.get("boot") == boot_id() and note.process.is_alive() else None


def forget_port(port: int) -> None:
    """Take the note away that this process has left."""
    note = read_port(port)
    if note is not None and note.process == LocalProcess.me():
        with contextlib.suppress(OSError):
            _path(port).unlink()


def _remove_left_over(folder: Path) -> None:
    """Take the notes of processes away that were killed; of one of another machine with this home when it is old."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads(path.read_bytes())
            here = values["boot"] == boot_id()
            old = time.time() - path.stat().st_mtime > _OLD_S
            if not LocalProcess(int(values["pid"]), values["start"]).is_alive() if here else old:
                path.unlink()


def open_private(path: Path) -> TextIO:
    """Open a file of text to read it.

    Raises:
        PermissionError: another user could have read or written it, so that what it says is not believed.
    """
    file = open(path, encoding="utf-8")  # noqa: SIM115 - for the caller to close
    facts = os.fstat(file.fileno())
    if os.name == "posix" and (facts.st_uid != os.getuid() or facts.st_mode & 0o077):
        file.close()
        logger.warning("%s is not this user's alone, so the login in it is not used.", path)
        raise PermissionError(f"{path} is not this user's alone")
    return file


def _path(port: int) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fastsd" / "ports" / f"{port}.json"
