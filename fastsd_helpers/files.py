"""Files and folders that are whole or not there: errors in words, room, hashes, and new ones put in place at once.

It knows disks and mounts of every kind; what is special about Google Drive is in `drive`. Every failure of the
operating system becomes one of three errors here: DiskFull, DriveReadOnly, or DriveError with what to do about it.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastsd_helpers.errors import DiskFull, DriveError, DriveReadOnly
from fastsd_helpers.processes import LocalProcess, boot_id
from fastsd_helpers.runtime import fault_point, logger
from fastsd_helpers.wording import size_in_words

__all__ = [
    "bytes_in",
    "check_room",
    "check_writable",
    "file_errors",
    "forget_cached",
    "free_bytes",
    "new_file",
    "new_folder",
    "new_link",
    "outage",
    "placed",
    "remembered_sha256",
    "remove_leftovers",
    "scratch_root",
    "sha256_of",
    "sync_folder",
    "unfinished_name",
    "write_all",
    "write_atomic",
    "write_new",
]

_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY_ERRNOS = {errno.EROFS, errno.EACCES, errno.EPERM}
_LOST_ERRNOS = {errno.ENOTCONN, errno.ESTALE, errno.ECONNABORTED, errno.ETIMEDOUT}
_REMOUNT = (
    "The connection to Drive is lost: run the cell that connects Drive again; if that fails, "
    "choose Runtime > Restart session first. What was saved before is still there."
)
_LEFTOVER = re.compile(r"(?:.+\.)?(?P<pid>\d+)(-(?P<start>\d+)-(?P<boot>[0-9a-f]*))?\.[0-9a-f]+\.part")
_FOREIGN_S = 3600.0  # so long nobody wrote to it: what another machine left unfinished is nobody's


def scratch_root() -> Path:
    """The folder on this machine's own disk for what belongs to this machine and user alone; nothing is created.

    FASTSD_SCRATCH moves it.
    """
    user = getattr(os, "getuid", lambda: 0)()
    return Path(os.environ.get("FASTSD_SCRATCH") or Path(tempfile.gettempdir()) / f"fastsd-scratch-{user}")


# ------------------------------------------------------------------------------------------------ errors


@contextlib.contextmanager
def file_errors(path: Path | str, action: str = "use") -> Iterator[None]:
    """Turn an OSError of the `with` block into DiskFull, DriveReadOnly or DriveError.

    Args:
        path: what was worked on, named in the message.
        action: the verb of the message: "Could not {action} {path}".
    """
    try:
        yield
    except OSError as err:
        raise _explain(err, path, action) from err


def outage(err: OSError) -> DriveError | None:
    """What to say of an error that a lost Drive, a full or a read-only disk makes anywhere; None for every other."""
    if err.errno not in {*_FULL_ERRNOS, errno.EROFS, errno.ENOTCONN, errno.ESTALE}:
        return None
    return _explain(err, err.filename or "a file", "use")


def _explain(err: OSError, path: Path | str, action: str) -> DriveError:
    reason = os.strerror(err.errno) if err.errno else str(err)
    if err.errno in _FULL_ERRNOS:
        return DiskFull(
            f"Could not {action} {path}: the disk or Drive is full ({reason}).",
            "Free some space (deleted files count until Drive's trash is emptied), or choose another folder with "
            "--root.",
        )
    if err.errno in _READ_ONLY_ERRNOS:
        return DriveReadOnly(
            f"Could not {action} {path}: it cannot be written to ({reason}).",
            "Ask for edit access to this folder, or choose another folder with --root.",
        )
    if err.errno in _LOST_ERRNOS:
        return DriveError(f"Could not {action} {path}: {reason}.", _REMOUNT)
    return DriveError(
        f"Could not {action} {path}: {reason}.",
        "Check whether the folder opens in the file browser; try again, or choose another folder with --root.",
    )


# -------------------------------------------------------------------------------------------------- room


def check_writable(folder: Path | str) -> None:
    """Create `folder` if needed and prove it can be written to: a probe file is written, read back and removed.

    Permission bits say nothing here (root ignores them, Drive shows them wrongly), so it is really tried.

    Raises:
        DriveReadOnly: it cannot be written to.
        DiskFull: it has no room.
        DriveError: it cannot be used.
    """
    folder = Path(folder)
    with file_errors(folder, "write to"):
        if not folder.is_dir() and (file := next((one for one in (folder, *folder.parents) if one.is_file()), None)):
            raise DriveError(f"{file} is a file, and results need a folder.", "Name another folder, or move that file.")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".fastsd-probe-{secrets.token_hex(4)}"
        payload = secrets.token_bytes(16)
        try:
            write_new(probe, payload)
            returned = probe.read_bytes()
        finally:
            probe.unlink(missing_ok=True)
    if returned != payload:
        raise DriveError(f"{folder} returned different bytes than were written.", "Choose another folder with --root.")


def bytes_in(folder: Path) -> int:
    """What the files below a folder take; what links lead to counts where it lies."""
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # a running training prunes its checkpoints meanwhile
                total += os.lstat(os.path.join(parent, file)).st_size
    return total


def free_bytes(folder: Path | str) -> int:
    """Read how many bytes can still be written where `folder` is, or will be once it is created."""
    there = Path(folder).absolute()
    with file_errors(folder, "read"):
        there = next((parent for parent in (there, *there.parents) if parent.exists()), there)
        return shutil.disk_usage(there).free


def check_room(folder: Path | str, needed: int, what: str = "the file", *, spare: int = 0, hint: str = "") -> None:
    """Look before anything is written whether there is room for it.

    Args:
        folder: where it goes; it need not exist yet.
        needed: bytes.
        what: names it at the end of the sentence.
        spare: further bytes that must be free, for what cannot be foreseen.
        hint: what to do; left alone, what always helps.

    Raises:
        DiskFull: there is not.
    """
    free = free_bytes(folder)
    if needed + spare > free:
        raise DiskFull(
            f"{folder} has {size_in_words(free)} left, and {size_in_words(needed + spare)} are needed for {what}.",
            hint or "Free some space (on Google Drive, empty the trash too), or choose a folder on a larger disk.",
        )


# ------------------------------------------------------------------------------------------------ hashes


def sha256_of(path: Path | str) -> str:
    """Hash a file in pieces, whatever its size; lower-case hex."""
    with file_errors(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_remembered: dict[tuple[str, int, int], str] = {}  # (path, bytes, mtime in ns) -> sha256, for this process only


def remembered_sha256(path: Path) -> str:
    """As `sha256_of`, but read once per process as long as the file's size and time stay the same."""
    path = path.resolve()  # the Hub's cache shows each file through a link
    state = path.stat()
    key = (str(path), state.st_size, state.st_mtime_ns)
    if key not in _remembered:
        _remembered[key] = sha256_of(path)
    return _remembered[key]


# ----------------------------------------------------------------------------------------------- writing


def write_atomic(path: Path | str, data: bytes, *, point: str | None = None) -> None:
    """Write a whole file or none of it: a temporary file beside it, fsync, rename, fsync of the folder.

    Args:
        path: the file, replaced if it exists; its folder must exist.
        data: all of its bytes.
        point: name of the fault points `{point}.write` (before the rename) and `{point}.after_rename`.

    Raises:
        DiskFull: nothing was changed.
        DriveReadOnly: nothing was changed.
        DriveError: nothing was changed.
    """
    with placed(Path(path), point=f"{point}.write" if point else None) as temporary:
        write_new(temporary, data)
    if point:
        fault_point(f"{point}.after_rename")


def write_new(path: Path | str, data: bytes, *, mode: int = 0o666) -> None:
    """Write and fsync a file that must not exist yet; `mode` is its mode before the umask.

    Raises:
        FileExistsError: it does; other OSErrors come as they are too.
    """
    with open(path, "xb", buffering=0, opener=lambda name, flags: os.open(name, flags, mode)) as file:
        write_all(file.fileno(), data)
        os.fsync(file.fileno())


def write_all(out: int, data: bytes) -> None:
    """Write every byte to a descriptor; the system may take fewer at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(out, rest) :]


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a hidden temporary file beside `path`; at the end of the block it is on the disk and gets its name.

    Missing folders are made, and what runs that were killed left of the same file is removed.

    Yields:
        The file, open for writing and reading without a buffer, and where it is.

    Raises:
        DiskFull: the folder does not take the file; nothing is left behind.
        DriveReadOnly: the folder does not take the file; nothing is left behind.
        DriveError: the folder does not take the file; nothing is left behind.
    """
    _make_ready(path)
    # Opened by name, not by tempfile: the mode then follows the user's umask, so a web UI that runs as another user
    # can read the file.
    with placed(path, point="export.rename") as temporary, temporary.open("xb+", buffering=0) as file:
        yield file, temporary
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a hidden temporary folder beside `path`; at the end of the block it gets the name, in place of the old one.

    Raises:
        DiskFull: as `new_file`.
        DriveReadOnly: as `new_file`.
        DriveError: as `new_file`.
    """
    _make_ready(path)
    with placed(path, point="export.rename") as temporary:
        temporary.mkdir()
        yield temporary


def new_link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`, in place of what has that name: at once or not at all."""
    with placed(path) as temporary:
        temporary.symlink_to(target)


@contextlib.contextmanager
def placed(path: Path, *, point: str | None = None) -> Iterator[Path]:
    """A name beside `path` for what the block makes: at its end that is put in place, and when it fails removed.

    Args:
        path: a file is replaced in one step; a folder that holds something in two, of which the first is undone when
            the second fails.
        point: name of a fault point before the rename.

    Raises:
        DiskFull: for an OSError of the block too; what was there before still is.
        DriveReadOnly: for an OSError of the block too; what was there before still is.
        DriveError: for an OSError of the block too; what was there before still is.
    """
    temporary = unfinished_name(path)
    try:
        with file_errors(path, "write"):
            yield temporary
            if point:
                fault_point(point)
            if path.is_dir() and not path.is_symlink() and temporary.is_dir():
                _exchange(temporary, path)
            else:
                os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        _remove(temporary)
        raise


def _exchange(new: Path, path: Path) -> None:
    # A file replaces a file in one step; a folder does not.
    old = unfinished_name(path)
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    _remove(old)


def unfinished_name(path: Path) -> Path:
    """A hidden name beside `path` for what is not whole yet; it says which process makes it."""
    me = LocalProcess.me()
    owner = f"{me.pid}-{me.start or 0}-{boot_id()[:8]}"
    return path.with_name(f"{_prefix(path)}{owner}.{secrets.token_hex(4)}.part")


def _prefix(path: Path) -> str:
    # File systems take 255 bytes; the owner and the number need 60 at most.
    return "." + path.name.encode()[:190].decode(errors="ignore") + "."


def _make_ready(path: Path) -> None:
    """Make the folder, and remove what a killed run left there, gigabytes of it; a living one's is kept."""
    with file_errors(path.parent, "write to"):
        path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, _prefix(path))


def remove_leftovers(folder: Path, prefix: str = ".") -> None:
    """Remove what killed runs left in a folder, unfinished and hidden; what a living process makes is kept.

    Args:
        prefix: of what is left of one file; without it, of all files.
    """
    with file_errors(folder, "write to"):
        for leftover in folder.glob(f"{glob.escape(prefix)}*.part"):
            owner = _LEFTOVER.fullmatch(leftover.name.removeprefix(prefix))
            # Where any name will do, only what says as much as names of ours do.
            if owner and (prefix != "." or owner["boot"]) and _is_nobodys(leftover, owner):
                _remove(leftover)


def _is_nobodys(leftover: Path, owner: re.Match[str]) -> bool:
    if owner["boot"] is None:  # version 0.1 wrote the number alone
        return not LocalProcess.of(int(owner["pid"])).is_alive()
    if owner["boot"] == boot_id()[:8]:
        return not LocalProcess(int(owner["pid"]), owner["start"]).is_alive()
    # Another machine's, on a drive that both see: it cannot be asked, but what it works on has a fresh time.
    newest = max((file.lstat().st_mtime for file in (leftover, *leftover.rglob("*"))), default=0.0)
    return time.time() - newest > _FOREIGN_S


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as err:
        logger.debug("The unfinished %s could not be removed: %s.", path, err)


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable, where the system can."""
    # Windows cannot open folders; FUSE mounts may refuse to sync one, which is no failure of the write: the file's own
    # fsync has succeeded.
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as err:
        logger.debug("The folder %s could not be synced: %s.", folder, err)


def forget_cached(descriptor: int) -> None:
    """Let the system forget what it holds of a file in memory, so that reading it asks the disk."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
