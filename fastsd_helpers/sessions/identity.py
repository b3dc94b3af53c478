"""Who a session is: an id that no other folder has, whatever was copied, renamed, moved or restored.

A copy of a folder (`cp -r`, Drive's "Make a copy", a backup) has the id of the original in it. What belongs to one
session alone, its scratch and live folders and its lock, is named after the id, so two folders must never have the same
one. Two marks tell which folder is the copy; neither inodes nor clocks do, which a mounted Drive invents:

- `name` in session.json is the folder's name for which the id was made. Where the folder has another name, it was
  renamed, or it is a copy: a copy when another folder beside it still has the id.
- `ID.home` in this machine's scratch root is the folder that last used the id here. Where it names another folder that
  still is there with the id, this one is a copy that lies elsewhere; else it was moved.

A copy gets an id of its own when it is opened, and keeps everything in it. A folder that was renamed or moved keeps its
id, and so finds what it left on this machine.
"""

import contextlib
import json
import os
import unicodedata
import uuid
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.files import scratch_root, write_atomic
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions.folders import children
from fastsd_helpers.sessions.record import RECORD, read_record, write_record

__all__ = ["claim_scratch", "needs_settling", "settle_identity"]


def needs_settling(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the folder has another name than its id was made for, or another folder uses the id on this machine."""
    return _is_renamed(folder, record) or _twin_elsewhere(folder, record["id"]) is not None


def settle_identity(folder: Path, record: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Give a copied session an id of its own, and note a new name; session.json is written where that is possible.

    Args:
        folder: the session's folder; whoever calls keeps other processes of this machine out.
        record: what was read from it.

    Returns:
        the record to go on with, and a sentence for the user, empty where nothing was changed.
    """
    renamed = _is_renamed(folder, record)
    original = (_twin_beside(folder, record["id"]) if renamed else None) or _twin_elsewhere(folder, record["id"])
    if not renamed and original is None:
        return record, ""
    changes: dict[str, Any] = {"name": folder.resolve().name, "sequence": record["sequence"] + 1}
    sentence = ""
    if original is not None:
        changes["id"] = uuid.uuid4().hex
        shown = repr(original.name) if original.parent == folder.parent else original
        sentence = f"{folder.name!r} is a copy of {shown}: from now on it is a separate session."
    settled = record | changes
    try:
        write_record(folder, settled)
    except FastSDError as err:  # it can still be looked at, and shares nothing
        logger.debug("The identity of %s was not written: %s", folder, err)
    return settled, sentence


def claim_scratch(folder: Path, identity: str) -> None:
    """Note that this folder uses the id on this machine now; a disk that is full costs the mark alone."""
    mark = scratch_root() / f"{identity}.home"
    wanted = json.dumps({"folder": str(folder.absolute())}).encode()
    with contextlib.suppress(OSError, FastSDError):
        if not mark.is_file() or mark.read_bytes() != wanted:
            mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(mark, wanted)


def _is_renamed(folder: Path, record: dict[str, Any]) -> bool:
    # A shortcut to a folder may have any name.
    return _plain(str(record.get("name", ""))) not in (_plain(folder.name), _plain(folder.resolve().name))


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS and Drive hand the same letter back in one part or in two


def _twin_beside(folder: Path, identity: str) -> Path | None:
    """Another session of the same root with this id."""
    try:
        beside = children(folder.resolve().parent)
    except OSError:
        return None
    return next((path for path in beside if _is_other(path, folder) and _has_id(path, identity)), None)


def _twin_elsewhere(folder: Path, identity: str) -> Path | None:
    """The folder that last used this id on this machine, when it is another one and still there."""
    try:
        path = Path(read_object(scratch_root() / f"{identity}.home")["folder"])
    except (KeyError, TypeError):
        return None
    return path if _is_other(path, folder) and _has_id(path, identity) else None


def _is_other(path: Path, folder: Path) -> bool:
    try:
        return not os.path.samefile(path, folder)
    except OSError:
        return False


def _has_id(path: Path, identity: str) -> bool:
    if not (path / RECORD).is_file():
        return False
    with contextlib.suppress(FastSDError):
        return read_record(path).record.get("id") == identity
    return False
