"""Deleting sessions and single checkpoints, so that Google Drive's trash holds nothing of their weights."""

import contextlib
import json
import secrets
import shutil
from pathlib import Path

from fastsd_helpers.drive import deletion_note, keeps_trash, remove_emptied, sessions_root
from fastsd_helpers.errors import SessionError
from fastsd_helpers.files import bytes_in, file_errors
from fastsd_helpers.sessions.folders import children
from fastsd_helpers.sessions.lock import SessionLock
from fastsd_helpers.sessions.record import read_record
from fastsd_helpers.sessions.session import Session, folder_of

__all__ = ["delete_checkpoint", "delete_session", "room_note"]

_DELETED = ".deleted-"


def delete_session(name: str, *, root: Path | str | None = None) -> int:
    """Delete a session with everything in it, and return how many bytes it had.

    On Google Drive its checkpoints are emptied first, so that the trash holds nothing of them; photos, captions,
    samples and finished files lie whole in the trash until that is emptied.

    A session that is only a shortcut to somebody else's folder loses the shortcut, not the folder.

    Args:
        name: of the session.
        root: the sessions root; left alone, the usual place (`drive.sessions_root`).

    Returns:
        Bytes it had.

    Raises:
        SessionNotFound: there is none of that name.
        SessionBusy: a run is using it.
        DriveError: it could not be removed.
    """
    sessions = sessions_root(root)
    folder = folder_of(name, sessions)
    with file_errors(folder, "delete"):
        if folder.is_symlink():
            folder.unlink()
            return 0
        size = bytes_in(folder)
        identity = None
        with contextlib.suppress(SessionError):
            identity = read_record(folder).record.get("id")
        with SessionLock(folder, identity=identity):
            # Renamed first, so that a deletion that is cut leaves no half session; leftovers go with the next one.
            gone = sessions / f"{_DELETED}{folder.name[:60]}-{secrets.token_hex(4)}"
            folder.rename(gone)
        for left_over in sessions.glob(f"{_DELETED}*"):
            _empty_checkpoints(left_over)
            shutil.rmtree(left_over)
    return size


def room_note(root: Path, *, checkpoint: str | None) -> str:
    """When a deletion among the sessions of a folder makes room: a checkpoint, or a whole session; see `drive`.

    Args:
        root: the sessions root.
        checkpoint: the name of the checkpoint; None: a whole session.
    """
    rest = "" if checkpoint else "its photos, images and finished files"
    return deletion_note(root, emptied="Checkpoints", deleted=rest)


def _empty_checkpoints(folder: Path) -> None:
    """On Google Drive, empty and remove a deleted session's weights; what it only links to is somebody else's."""
    checkpoints = folder / "checkpoints"
    if not keeps_trash(folder) or checkpoints.is_symlink():
        return
    for generation in children(checkpoints):
        for path in generation.glob("*.safetensors") if not generation.is_symlink() else ():
            remove_emptied(path)


def delete_checkpoint(session: Session, name: str) -> int:
    """Delete one checkpoint and return the bytes freed; files that other checkpoints share with it stay.

    On Google Drive its files are emptied first, so that the trash holds nothing of them.

    Args:
        session: an open session.
        name: the checkpoint's folder, as `fastsd dreambooth show` names it.

    Returns:
        Bytes that were freed.

    Raises:
        SessionError: there is none of that name.
        SessionBusy: a run is using the session.
        DriveError: it could not be removed.
    """
    there = [path.name for path in children(session.checkpoints)]
    if name not in there:
        raise SessionError(
            f"Session {session.name!r} has no checkpoint {name!r}.",
            f"Choose one of: {', '.join(there) or 'none there'}.",
        )
    folder = session.checkpoints / name
    freed = 0
    with session.lock(), file_errors(folder, "delete"):
        shared = _files_shared_with_others(session.checkpoints, name)
        files = sorted(folder.iterdir(), key=lambda path: path.name != "manifest.json")
        for path in files:  # the manifest first: without it nothing takes the rest for a whole checkpoint
            if f"{name}/{path.name}" not in shared:
                freed += path.lstat().st_size
                if keeps_trash(folder) and path.suffix == ".safetensors" and not folder.is_symlink():
                    remove_emptied(path)
                else:
                    path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
        kept = [item for item in session.record.get("checkpoints", []) if item.get("name") != name]
        session.save(checkpoints=kept)
    return freed


def _files_shared_with_others(checkpoints: Path, name: str) -> set[str]:
    shared: set[str] = set()
    for folder in children(checkpoints):
        manifest = folder / "manifest.json"
        if folder.name == name or not manifest.is_file():
            continue
        try:
            shared.update(entry["path"] for entry in json.loads(manifest.read_bytes())["files"])
        except (ValueError, KeyError, TypeError) as err:
            raise SessionError(
                f"Checkpoint {name!r} may share files with {folder.name!r}, whose manifest is damaged.",
                f"Delete the checkpoint {folder.name!r} first, or delete the whole session.",
            ) from err
    return shared
