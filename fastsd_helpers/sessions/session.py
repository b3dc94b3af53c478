"""Session: the folder of one subject, its record, and what can be done to sessions as a whole."""

import contextlib
import copy
import difflib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.drive import sessions_root
from fastsd_helpers.errors import (
    DriveError,
    FastSDError,
    SessionError,
    SessionExists,
    SessionNotFound,
    SessionUnfinished,
)
from fastsd_helpers.files import bytes_in, check_writable, file_errors
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions.folders import children, models_in
from fastsd_helpers.sessions.identity import needs_settling, settle_identity
from fastsd_helpers.sessions.lock import SessionLock, guarded
from fastsd_helpers.sessions.names import check_name
from fastsd_helpers.sessions.record import RECORD, TWINS, new_record, read_record, write_record

__all__ = ["FOLDERS", "Session", "SessionSummary", "find_session", "folder_of", "list_sessions"]

FOLDERS = (
    "instance_images",
    "captions",
    "held_out_images",
    "class_images",
    "checkpoints",
    "samples",
    "logs",
    "exports",
)


class Session:
    """One subject: its images, settings, checkpoints and results, in one folder.

    Attributes:
        name: the folder's name.
        folder: the session's folder.
        record: the parsed session.json; change it with `save`.
        notices: sentences on what had to be repaired when it was opened.
    """

    def __init__(self, folder: Path, record: dict[str, Any], notices: list[str] | None = None) -> None:
        self.name = folder.name
        self.folder = folder
        self.instance_images = folder / "instance_images"  # the prepared images of the subject
        self.captions = folder / "captions"  # one .txt per image
        self.held_out_images = folder / "held_out_images"  # prepared images that are never trained on
        self.class_images = folder / "class_images"  # images of the subject's class (prior preservation)
        self.checkpoints = folder / "checkpoints"  # the training states
        self.samples = folder / "samples"  # the images drawn while training
        self.logs = folder / "logs"  # logs, plots and TensorBoard events
        self.exports = folder / "exports"  # the finished models
        self.record = record
        self.notices = notices or []
        self._saved = copy.deepcopy(record)
        self._saving = threading.RLock()

    def __repr__(self) -> str:
        return f"Session({self.name!r}, {str(self.folder)!r})"

    @classmethod
    def create(cls, name: str, *, root: Path | str | None = None) -> "Session":
        """Create a session's folders and session.json under the sessions root.

        Args:
            name: letters and digits of any script, `-`, `_`, `.`; blanks become `_`.
            root: the sessions root; left alone, the usual place (`drive.sessions_root`).

        Returns:
            The open session.

        Raises:
            SessionError: the name cannot be a folder's name.
            SessionExists: there is one of that name.
            DriveError: the folder cannot be written to.
        """
        folder = sessions_root(root) / check_name(name)
        with file_errors(folder, "create"):
            # Folders alone are what a creation leaves that was cut before its session.json: nothing to lose there.
            if os.path.lexists(folder) and (not folder.is_dir() or any(files for *_, files in os.walk(folder))):
                raise SessionExists(
                    f"There is already a session named {folder.name!r} in {folder.parent}.",
                    "Open it to resume it, or choose another name.",
                )
            for sub_folder in FOLDERS:
                (folder / sub_folder).mkdir(parents=True, exist_ok=True)
        session = cls(folder, new_record(folder.name))
        session.save()
        return session

    @classmethod
    def open(cls, name: str, *, root: Path | str | None = None) -> "Session":
        """Open an existing session; a damaged session.json is repaired, said in `notices` and in the log.

        A copy of another session's folder becomes a session of its own, which is said too.

        Args:
            name: of a session that is there.
            root: the sessions root; left alone, the usual place (`drive.sessions_root`).

        Returns:
            The open session.

        Raises:
            SessionNotFound: there is none of that name.
            SessionError: a newer version of this library wrote it.
            DriveError: the folder cannot be read.
        """
        folder = folder_of(name, sessions_root(root))
        result = read_record(folder)
        session = cls(folder, result.record, list(result.notices))
        if not result.damaged:
            session.settle_identity()
        for notice in result.notices:
            logger.warning("%s", notice)
        with contextlib.suppress(OSError):  # a folder that can only be read can still be looked at
            for sub_folder in FOLDERS:  # a mount does not deliver empty folders
                (folder / sub_folder).mkdir(exist_ok=True)
        if result.damaged:
            problem = session.save_if_possible()
            if problem:
                session.notices.append(problem)
        return session

    def settle_identity(self) -> None:
        """Make a copy of another session's folder a session of its own, and note a folder's new name."""
        # Looked at without the guard first: nearly always there is nothing to do, and a mount is slow.
        if not needs_settling(self.folder, self.record):
            return
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # a folder that can only be read has no guard
                held.enter_context(guarded(self.folder))
            result = read_record(self.folder)  # another process may have been quicker
            if result.damaged:
                return
            record, notice = settle_identity(self.folder, result.record)
        self.record.clear()
        self.record.update(record)
        self._saved = copy.deepcopy(record)
        if notice:
            self.notices.append(notice)
            logger.info("%s", notice)

    def save(self, **changes: Any) -> None:
        """Set top-level keys of the record and write session.json so that a crash leaves the old or the new one.

        Keys that another process has saved meanwhile are kept, unless they are changed here as well.

        Args:
            **changes: keys and values, as JSON has them.

        Raises:
            DiskFull: the file is as it was; the record in memory has the changes.
            DriveReadOnly: the file is as it was; the record in memory has the changes.
            DriveError: the file is as it was; the record in memory has the changes.
            SessionError: the name or schema would change, or a value cannot be stored as JSON.
        """
        with self._saving:
            fixed = [key for key in ("schema", "sequence", "name", "id") if key in changes]
            if fixed:
                raise SessionError(f"{', '.join(fixed)} of a session cannot be changed.", "Save other keys.")
            self.record.update(copy.deepcopy(changes))
            with file_errors(self.folder, "write to"), guarded(self.folder):
                merged = self._merge_with_disk()
                write_record(self.folder, merged)
            self.record.clear()
            self.record.update(merged)
            self._saved = copy.deepcopy(merged)

    def save_if_possible(self, **changes: Any) -> str | None:
        """Save, but hand a full disk or a lost Drive back as a sentence, so that a training can go on.

        Args:
            **changes: keys and values, as JSON has them.

        Returns:
            The sentence; None when it was saved.
        """
        try:
            self.save(**changes)
        except DriveError as err:
            logger.warning("session.json was not written: %s", err)
            return f"session.json was not written: {err.problem}"
        return None

    def _merge_with_disk(self) -> dict[str, Any]:
        sequence = self.record["sequence"]
        merged = dict(self.record)
        if (self.folder / RECORD).exists() or (self.folder / TWINS).is_dir():
            disk = read_record(self.folder)
            if not disk.damaged and disk.record["sequence"] > sequence:
                sequence = disk.record["sequence"]
                changed = {key for key in merged if merged[key] != self._saved.get(key)}
                merged = disk.record | {key: merged[key] for key in changed}
        merged["sequence"] = sequence + 1
        return merged

    def require_here(self) -> None:
        """Check that its folder is still where it was opened.

        Without it, nothing would be found of what is kept, and its folder would be made anew where a drive belongs.

        Raises:
            SessionNotFound: the drive was unmounted, or the folder was renamed, moved or deleted.
        """
        if not self.folder.is_dir():
            raise SessionNotFound(
                f"The session {self.name} is no longer in {self.folder.parent}.",
                "If its drive was disconnected, or it was renamed, open it again: in the notebook, cell 2a lists the "
                "sessions that are there, and cell 2b mounts the drive.",
            )

    def require_writable(self) -> None:
        """Check that its folder is still there, and that it can be written to, by writing.

        Raises:
            SessionNotFound: as `require_here`.
            DriveError: as `check_writable`.
            DiskFull: as `check_writable`.
        """
        self.require_here()
        check_writable(self.folder)

    def lock(self, *, take_over: bool = False) -> SessionLock:
        """Hold this session for one run: `with session.lock() as lock`; see SessionLock for `lock.lost`.

        Args:
            take_over: replace the lock, although another machine's run seems to hold it.

        Returns:
            The lock, to be entered by `with`; it beats in a thread of its own until the block ends.

        Raises:
            SessionNotFound: its folder is no longer there.
            SessionBusy: on entering: a live run holds it and `take_over` is off.
        """
        self.require_here()
        self.settle_identity()
        return SessionLock(self.folder, take_over=take_over, identity=self.record["id"])

    def finished_model(self) -> Path:
        """The newest of its finished models.

        Raises:
            SessionUnfinished: it has none yet.
        """
        made = models_in(self.exports)
        if not made:
            raise SessionUnfinished(
                f"The session {self.name} has no finished model yet.",
                f"Train it to the end, or export its latest checkpoint: fastsd dreambooth export {self.name}",
            )
        return max(made, key=lambda path: path.stat().st_mtime).absolute()


def find_session(ref: str | Path, *, root: Path | str | None = None) -> Session | None:
    """Open the session that a text names: its folder, wherever it lies, or its name under the sessions root.

    Args:
        ref: a session's name or folder.
        root: the sessions root; left alone, the usual place (`drive.sessions_root`).

    Returns:
        None when the text names no session.

    Raises:
        SessionError: a newer version of this library wrote it.
        DriveError: the folder cannot be read.
    """
    text = str(ref).strip()
    path = os.path.expanduser(text)
    if text and os.path.isfile(os.path.join(path, RECORD)):
        folder = Path(path).absolute()
        return Session.open(folder.name, root=folder.parent)
    if not text or os.sep in text or os.path.exists(path):
        return None
    with contextlib.suppress(SessionNotFound):
        return Session.open(text, root=root)
    return None


@dataclass(frozen=True)
class SessionSummary:
    """One line of the list of sessions."""

    name: str
    folder: Path
    bytes: int  # of everything in the folder
    images: int
    stage: str | None
    step: int
    steps: int
    checkpoints: int
    exports: int
    created: str
    problem: str | None = None  # why it cannot be opened, or what would be repaired


def list_sessions(root: Path | str | None = None) -> list[SessionSummary]:
    """List the sessions under the sessions root by name; a damaged one is listed with its problem.

    Args:
        root: the sessions root; left alone, the usual place (`drive.sessions_root`).

    Returns:
        A summary of each: name, folder, bytes, images, step, and its problem if it has one.

    Raises:
        DriveError: the root itself cannot be read; a root that does not exist yet has no sessions.
    """
    folder = sessions_root(root)
    with file_errors(folder, "read"):
        folders = children(folder)
    return [_summarise(one) for one in folders]


def _summarise(folder: Path) -> SessionSummary:
    record: dict[str, Any] = new_record(folder.name)
    problem = None
    size = images = checkpoints = exports = 0
    try:
        result = read_record(folder)
        record, problem = result.record, " ".join(result.notices) or None
        with file_errors(folder, "read"):
            size = bytes_in(folder)
            images = _count(folder / "instance_images")
            checkpoints = sum((path / "manifest.json").is_file() for path in children(folder / "checkpoints"))
            exports = _count(folder / "exports")
    except FastSDError as err:
        problem = err.problem
    progress = record.get("progress") or {}
    return SessionSummary(
        name=folder.name,
        folder=folder,
        bytes=size,
        images=images,
        stage=progress.get("stage"),
        step=progress.get("step") or 0,
        steps=progress.get("steps") or 0,
        checkpoints=checkpoints,
        exports=exports,
        created=str(record.get("created", "")),
        problem=problem,
    )


def folder_of(name: str, root: Path) -> Path:
    """The folder of a session under the sessions root; raises SessionNotFound with names like it."""
    with file_errors(root, "read"):
        there = [found.name for found in children(root)]
    # Looked up in the listing, never joined: a name such as `../x` cannot leave the root, while folders of the old
    # notebook open under names that would be refused for a new session.
    for candidate in (name, name.strip().replace(" ", "_")):
        if candidate in there:
            return root / candidate
    with contextlib.suppress(SessionError):
        if check_name(name) in there:
            return root / check_name(name)
    near = difflib.get_close_matches(name, there, n=5, cutoff=0.3) or there[:10]
    hint = (
        f"Choose one of: {', '.join(near)}."
        if near
        else "There is none here yet; create it: fastsd dreambooth new NAME"
    )
    raise SessionNotFound(f"No session named {name[:80]!r} in {root}.", hint)


def _count(folder: Path) -> int:
    entries = os.scandir(folder) if folder.is_dir() else ()
    return sum(entry.is_file() and not entry.name.startswith(".") for entry in entries)
