"""Google Drive (My Drive and Shared drives) or a local folder: mount, health, free space, verified writes.

Only this module and `runtime` know that Colab exists. Every failure of the operating system becomes one of three
errors here: DiskFull, DriveReadOnly, or DriveError with what to do about it.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastsd_helpers.errors import DiskFull, DriveError, DriveReadOnly, FastSDError, VerificationFailed
from fastsd_helpers.runtime import fault_point, where

__all__ = [
    "TRASH_NOTE",
    "bytes_in",
    "check_health",
    "check_writable",
    "copy_verified",
    "delivers_late",
    "drive_errors",
    "flush_drive",
    "free_bytes",
    "mount_drive",
    "sessions_root",
    "sha256_of",
    "shared_drives",
    "shared_folder",
    "size_in_words",
    "write_atomic",
    "write_new",
]

logger = logging.getLogger("fastsd_helpers")

TRASH_NOTE = "On Google Drive, deleted files count until the trash is emptied too: drive.google.com/drive/trash"

# Colab's own button mounts at the first; the old fast-stable-diffusion notebooks at the second.
_MOUNT_POINTS = (Path("/content/drive"), Path("/content/gdrive"))
_SESSIONS = Path("Fast-Dreambooth", "Sessions")
_FOLDER_LINK = re.compile(r"drive\.google\.com/(?:drive/(?:u/\d+/)?folders/|open\?id=)([\w-]{10,})")
_CHUNK_BYTES = 8 * 2**20

_REMOUNT = (
    "The connection to Drive is lost: run the cell that connects Drive again; if that fails, "
    "choose Runtime > Restart session first. What was saved before is still there."
)
_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY_ERRNOS = {errno.EROFS, errno.EACCES, errno.EPERM}
_LOST_ERRNOS = {errno.ENOTCONN, errno.ESTALE, errno.ECONNABORTED, errno.ETIMEDOUT}


# ------------------------------------------------------------------------------------------------ errors


@contextlib.contextmanager
def drive_errors(path: Path | str, action: str = "use") -> Iterator[None]:
    """Turn an OSError of the `with` block into DiskFull, DriveReadOnly or DriveError.

    Args:
        path: what was worked on, named in the message.
        action: the verb of the message: "Could not {action} {path}".
    """
    try:
        yield
    except OSError as err:
        raise _explain(err, path, action) from err


def _explain(err: OSError, path: Path | str, action: str) -> DriveError:
    reason = os.strerror(err.errno) if err.errno else str(err)
    if err.errno in _FULL_ERRNOS:
        return DiskFull(
            f"Could not {action} {path}: the disk or Drive is full ({reason}).",
            "Make room (deleted files count until Drive's trash is emptied), or choose another folder with --root.",
        )
    if err.errno in _READ_ONLY_ERRNOS:
        return DriveReadOnly(
            f"Could not {action} {path}: it cannot be written to ({reason}).",
            "Ask for the right to edit this folder, or choose another folder with --root.",
        )
    if err.errno in _LOST_ERRNOS:
        return DriveError(f"Could not {action} {path}: {reason}.", _REMOUNT)
    return DriveError(
        f"Could not {action} {path}: {reason}.",
        "Look whether the folder opens in the file browser; try again, or choose another folder with --root.",
    )


# ------------------------------------------------------------------------------------------------- mount


def mount_drive(*, shared_drive: str | None = None) -> Path:
    """Mount Google Drive in Colab and return the folder of My Drive, or of the Shared drive of that name.

    Does nothing when Drive is mounted already and answers.

    Raises:
        DriveError: not in Colab, access refused, a dead mount, or no Shared drive of that name.
    """
    if where() != "colab":
        raise DriveError(
            "Google Drive can only be mounted in Google Colab, and this is somewhere else.",
            "Leave Drive off: sessions are then kept in the folder Fast-Dreambooth/Sessions; or name one with --root.",
        )
    mount_point = _mounted_at() or _mount(_MOUNT_POINTS[0])
    check_health(mount_point)
    if not shared_drive:
        return mount_point / "MyDrive"
    there = shared_drives(mount_point)
    if shared_drive not in there:
        listed = f"This account sees: {', '.join(there)}." if there else "This account sees no Shared drive."
        raise DriveError(f"No Shared drive named {shared_drive!r}.", f"{listed} Correct the name or leave it empty.")
    return mount_point / "Shareddrives" / shared_drive


def _mounted_at() -> Path | None:
    for mount_point in _MOUNT_POINTS:
        with drive_errors(mount_point, "read"):
            try:
                os.stat(mount_point / "MyDrive")
            except (FileNotFoundError, NotADirectoryError):
                continue
            return mount_point
    return None


def _mount(mount_point: Path) -> Path:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        left_over = sorted(os.listdir(mount_point))
        if left_over:
            raise DriveError(
                f"Drive cannot be mounted at {mount_point}: that folder holds {', '.join(left_over[:5])}.",
                f"Move those files elsewhere or delete {mount_point}, then run the cell again.",
            )
    from google.colab import drive as colab_drive

    try:
        colab_drive.mount(str(mount_point))
    except NotImplementedError as err:
        raise DriveError(
            f"Google Drive cannot be mounted in this kind of Colab: {str(err).rstrip('.')}.",
            "Leave Drive off, or mount it in the notebook itself before a command that needs it.",
        ) from err
    except Exception as err:  # Colab's MessageError, ValueError and pexpect's TIMEOUT share no base class
        raise DriveError(
            f"Google Drive was not mounted: {str(err).rstrip('.') or type(err).__name__}.",
            "Run the cell again and allow access with the account that owns this notebook; "
            "if it keeps failing, choose Runtime > Restart session.",
        ) from err
    return mount_point


def flush_drive() -> bool:
    """Wait until everything written has reached Google Drive, and unmount it; False where none is mounted.

    Raises:
        DriveError: it could not be flushed.
    """
    if where() != "colab" or _mounted_at() is None:
        return False
    from google.colab import drive as colab_drive

    try:
        colab_drive.flush_and_unmount()
    except Exception as err:  # Colab's ValueError and pexpect's TIMEOUT share no base class
        raise DriveError(
            f"Google Drive did not take everything yet: {str(err).rstrip('.') or type(err).__name__}.",
            "Wait a few minutes and run the cell again; the machine is kept until then.",
        ) from err
    return True


def shared_folder(link: str) -> Path:
    """Find the folder of a Drive link that another account shared, on the mounted Drive of this account.

    Drive shows a shared folder only after a shortcut to it was added to My Drive.

    Raises:
        DriveError: not in Colab, no link of a folder, or no shortcut to it.
    """
    found = _FOLDER_LINK.search(link)
    if found is None:
        raise DriveError(
            f"{link!r} is no link of a Drive folder.", "It looks like https://drive.google.com/drive/folders/1AbC..."
        )
    mount_point = mount_drive().parent
    folder = mount_point / ".shortcut-targets-by-id" / found[1]
    with drive_errors(folder, "read"):
        inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not inside:
        raise DriveError(
            "The shared folder of this link is not in your Drive yet.",
            "Open the link, choose Organise > Add shortcut > My Drive, wait a minute, and run the cell again.",
        )
    return inside[0]


def shared_drives(mount_point: Path) -> list[str]:
    """List the Shared drives that the mounted account sees."""
    with drive_errors(mount_point, "read"):
        try:
            return sorted(entry.name for entry in os.scandir(mount_point / "Shareddrives") if entry.is_dir())
        except FileNotFoundError:
            return []


def delivers_late(folder: Path | str) -> bool:
    """Say whether a folder lies on a mount that may deliver what is written later and out of order.

    That is Google Drive, and any other FUSE mount (rclone, gcsfuse and the like).
    """
    resolved = Path(folder).resolve()
    if any(resolved.is_relative_to(point) for point in _MOUNT_POINTS):
        return True
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
            mounts = [line.split()[1:3] for line in file]
    except OSError:  # not Linux
        return False
    # Later lines are mounted over earlier ones; proc(5) writes blanks in a path as \040.
    points = {Path(point.replace("\\040", " ")): kind for point, kind in mounts}
    kind = next((points[parent] for parent in (resolved, *resolved.parents) if parent in points), "")
    return kind == "fuse" or (kind.startswith("fuse.") and kind != "fuse.fuse-overlayfs")


def sessions_root(root: Path | str | None = None, *, shared_drive: str | None = None) -> Path:
    """Choose the folder that holds the sessions; nothing is created.

    `root` if given, else Fast-Dreambooth/Sessions on the mounted Drive (on `shared_drive` if named), else that
    folder under the current directory.

    Raises:
        DriveError: the mount is dead, or there is no Shared drive of that name.
    """
    if root:
        return Path(root).expanduser().absolute()
    if where() != "colab":
        return Path.cwd() / _SESSIONS
    if shared_drive:
        return mount_drive(shared_drive=shared_drive) / _SESSIONS
    mount_point = _mounted_at()
    return (mount_point / "MyDrive" if mount_point else Path.cwd()) / _SESSIONS


# ------------------------------------------------------------------------------------------------ health


def check_health(folder: Path | str) -> None:
    """Raise DriveError when a folder that should be there does not answer, as after a lost connection to Drive."""
    with drive_errors(folder, "read"):
        os.listdir(folder)


def check_writable(folder: Path | str) -> None:
    """Create `folder` if needed and prove it can be written to: a probe file is written, read back and removed.

    Permission bits say nothing here (root ignores them, Drive shows them wrongly), so it is really tried.

    Raises:
        DriveReadOnly, DiskFull, DriveError: it cannot.
    """
    folder = Path(folder)
    with drive_errors(folder, "write to"):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".fastsd-probe-{secrets.token_hex(4)}"
        payload = secrets.token_bytes(16)
        try:
            write_new(probe, payload)
            returned = probe.read_bytes()
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(probe)
    if returned != payload:
        raise DriveError(f"{folder} gave back other bytes than were written.", "Choose another folder with --root.")


def bytes_in(folder: Path) -> int:
    """What the files below a folder take; what links lead to counts where it lies."""
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # a running training prunes its checkpoints meanwhile
                total += os.lstat(os.path.join(parent, file)).st_size
    return total


def size_in_words(count: float) -> str:
    """A number of bytes in the unit people expect, in powers of 1000 as disks and Drive count."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def free_bytes(folder: Path | str) -> int:
    """Read how many bytes can still be written where `folder` is, or will be once it is created."""
    there = Path(folder).absolute()
    with drive_errors(folder, "read"):
        while not there.exists() and there != there.parent:
            there = there.parent
        return shutil.disk_usage(there).free


# ------------------------------------------------------------------------------------------------- files


def sha256_of(path: Path | str) -> str:
    """Hash a file in pieces, whatever its size; lower-case hex."""
    with drive_errors(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path | str, data: bytes, *, point: str | None = None) -> None:
    """Write a whole file or none of it: a temporary file beside it, fsync, rename, fsync of the folder.

    Args:
        path: the file, replaced if it exists; its folder must exist.
        data: all of its bytes.
        point: name of the fault points `{point}.write` (before the rename) and `{point}.after_rename`.

    Raises:
        DiskFull, DriveReadOnly, DriveError: nothing was changed.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    with drive_errors(path, "write"), _removed_on_failure(temporary):
        write_new(temporary, data)
        if point:
            fault_point(f"{point}.write")
        os.replace(temporary, path)
    _sync_folder(path.parent)
    if point:
        fault_point(f"{point}.after_rename")


def copy_verified(src: Path | str, dst: Path | str, *, sha256: str, point: str | None = "copy") -> None:
    """Copy a file to a name that does not exist yet; the name appears only when size and hash read back right.

    Args:
        src: the file to copy.
        dst: the new file; its folder must exist.
        sha256: what `src` is known to hash to.
        point: name of the fault points `{point}.begin`, `{point}.half` and `{point}.before_rename`; None for none.

    Raises:
        DriveError: `dst` exists, or reading or writing failed (DiskFull and DriveReadOnly when that is why).
        VerificationFailed: what was read back is not what was meant to be written.
    """
    src, dst = Path(src), Path(dst)
    fault = fault_point if point else lambda name: None
    fault(f"{point}.begin")
    if os.path.lexists(dst):
        raise DriveError(f"{dst} exists already and is never overwritten.", "Remove it, or choose another name.")
    temporary = _temporary_name(dst)
    with drive_errors(dst, "write"), _removed_on_failure(temporary):
        size = os.stat(src).st_size
        with open(src, "rb") as source:
            out = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            try:
                copied = 0
                while chunk := source.read(min(_CHUNK_BYTES, max(1, size // 2))):
                    _write_all(out, chunk)
                    before, copied = copied, copied + len(chunk)
                    if before < size / 2 <= copied:
                        fault(f"{point}.half")
                os.fsync(out)
                _forget_cached(out)
            finally:
                os.close(out)
        _compare(temporary, dst, size, sha256)
        fault(f"{point}.before_rename")
        os.rename(temporary, dst)
    _sync_folder(dst.parent)


def _compare(written: Path, dst: Path, size: int, sha256: str) -> None:
    found_size = os.stat(written).st_size
    found = sha256_of(written) if found_size == size else ""
    if found != sha256:
        what = f"{found_size} of {size} bytes" if found_size != size else f"other bytes (sha256 {found[:12]}...)"
        raise VerificationFailed(f"{dst} read back as {what}.", "It is copied again; if it persists, check the disk.")


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def write_new(path: Path | str, data: bytes) -> None:
    """Write and fsync a file that must not exist yet.

    Raises:
        FileExistsError: it does; other OSErrors come as they are too.
    """
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        _write_all(out, data)
        os.fsync(out)
    finally:
        os.close(out)


def _write_all(out: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(out, rest) :]


def _forget_cached(out: int) -> None:
    # So that reading back asks the device instead of the memory the bytes were just written from.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(out, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _removed_on_failure(temporary: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, FastSDError):
        try:
            os.unlink(temporary)
        except OSError as err:
            if err.errno != errno.ENOENT:
                logger.debug("The unfinished file %s could not be removed: %s.", temporary, err)
        raise


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable. Windows cannot open folders; FUSE mounts may refuse to sync one, which is no
    # failure of the write: the file's own fsync has succeeded.
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as err:
        logger.debug("The folder %s could not be opened to sync it: %s.", folder, err)
        return
    try:
        os.fsync(handle)
    except OSError as err:
        logger.debug("The folder %s could not be synced: %s.", folder, err)
    finally:
        os.close(handle)
