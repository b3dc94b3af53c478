"""Google Drive (My Drive and Shared drives), and what is special about it: mounting, late delivery, trash, copies.

Only this module and `runtime` know that Colab exists.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from fastsd_helpers.errors import DriveError, VerificationFailed
from fastsd_helpers.files import file_errors, forget_cached, placed, sha256_of, write_all
from fastsd_helpers.runtime import fault_point, where

__all__ = [
    "MOUNT_POINTS",
    "check_health",
    "copy_verified",
    "deletion_note",
    "delivers_late",
    "flush_drive",
    "has_arrived",
    "keeps_trash",
    "mount_drive",
    "mount_kind",
    "remove_emptied",
    "sessions_root",
    "shared_drives",
    "shared_folder",
]

# Colab's own button mounts at the first; the old fast-stable-diffusion notebooks at the second.
MOUNT_POINTS = (Path("/content/drive"), Path("/content/gdrive"))
_SESSIONS = Path("Fast-Dreambooth", "Sessions")
_FOLDER_LINK = re.compile(r"drive\.google\.com/(?:drive/(?:u/\d+/)?folders/|open\?id=)([\w-]{10,})")
_CHUNK_BYTES = 8 * 2**20
_TRASH = "drive.google.com/drive/trash"
# Other mounts of Google Drive, whose trash is the same one. Source: the file systems' own names in /proc/self/mounts.
_DRIVE_KINDS = {"fuse.drive", "fuse.google-drive-ocamlfuse", "fuse.GDriveFS"}


# ------------------------------------------------------------------------------------------------- mount


def mount_drive(*, shared_drive: str | None = None) -> Path:
    """Mount Google Drive in Colab and return the folder of My Drive, or of the Shared drive of that name.

    Does nothing when Drive is mounted already and answers.

    Args:
        shared_drive: its name; None: My Drive.

    Returns:
        The folder, below the mount.

    Raises:
        DriveError: not in Colab, access refused, a dead mount, or no Shared drive of that name.
    """
    if where() != "colab":
        raise DriveError(
            "Google Drive can only be mounted in Google Colab, and this is not Colab.",
            "Leave Drive off: sessions are then kept in the folder Fast-Dreambooth/Sessions; or name one with --root.",
        )
    mount_point = _mounted_at() or _mount(MOUNT_POINTS[0])
    check_health(mount_point)
    if not shared_drive:
        return mount_point / "MyDrive"
    there = shared_drives(mount_point)
    if shared_drive not in there:
        listed = f"This account has: {', '.join(there)}." if there else "This account has no Shared drive."
        raise DriveError(f"No Shared drive named {shared_drive!r}.", f"{listed} Correct the name or leave it empty.")
    return mount_point / "Shareddrives" / shared_drive


def _mounted_at() -> Path | None:
    for mount_point in MOUNT_POINTS:
        with file_errors(mount_point, "read"):
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
            f"Google Drive cannot be mounted in this kind of Colab runtime: {str(err).rstrip('.')}.",
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

    Returns:
        Whether there was a Drive to unmount.

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
            f"Google Drive has not synced everything yet: {str(err).rstrip('.') or type(err).__name__}.",
            "Wait a few minutes and run the cell again; the machine is kept until then.",
        ) from err
    return True


def shared_folder(link: str) -> Path:
    """Find the folder of a Drive link that another account shared, on the mounted Drive of this account.

    Drive shows a shared folder only after a shortcut to it was added to My Drive.

    Args:
        link: the folder's address, as Drive's own page shows it.

    Returns:
        The folder, below the mount.

    Raises:
        DriveError: not in Colab, no link of a folder, or no shortcut to it.
    """
    found = _FOLDER_LINK.search(link)
    if found is None:
        raise DriveError(
            f"{link!r} is not a link to a Drive folder.", "It looks like https://drive.google.com/drive/folders/1AbC..."
        )
    mount_point = mount_drive().parent
    folder = mount_point / ".shortcut-targets-by-id" / found[1]
    with file_errors(folder, "read"):
        inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not inside:
        raise DriveError(
            "The shared folder of this link is not in your Drive yet.",
            "Open the link, choose Organise > Add shortcut > My Drive, wait a minute, and run the cell again.",
        )
    return inside[0]


def shared_drives(mount_point: Path) -> list[str]:
    """List the Shared drives that the mounted account sees.

    Args:
        mount_point: where Drive is mounted, such as /content/drive.

    Returns:
        Their names, sorted; none where there are none.
    """
    with file_errors(mount_point, "read"):
        try:
            return sorted(entry.name for entry in os.scandir(mount_point / "Shareddrives") if entry.is_dir())
        except FileNotFoundError:
            return []


def delivers_late(folder: Path | str) -> bool:
    """Say whether a folder lies on a mount that may deliver what is written later and out of order.

    That is Google Drive, and any other FUSE mount (rclone, gcsfuse and the like).

    Args:
        folder: it need not be there yet.

    Returns:
        True on such a mount.
    """
    kind = mount_kind(folder)
    return kind in {"drive", "fuse"} or (kind.startswith("fuse.") and kind != "fuse.fuse-overlayfs")


def keeps_trash(folder: Path | str) -> bool:
    """Say whether a folder lies on Google Drive, where what is deleted counts until the trash is emptied.

    Args:
        folder: it need not be there yet.

    Returns:
        True on Google Drive.
    """
    kind = mount_kind(folder)
    return kind == "drive" or kind in _DRIVE_KINDS


def deletion_note(folder: Path | str, *, emptied: str = "", deleted: str = "deleted files") -> str:
    """Say when what is deleted in a folder on Google Drive makes room there; "" for a folder elsewhere.

    Args:
        folder: where it lies.
        emptied: what of it is emptied first (see `remove_emptied`), as the beginning of a sentence; "" for nothing.
        deleted: what is only deleted; "" for nothing.

    Returns:
        One sentence, or an empty text.
    """
    if not keeps_trash(folder):
        return ""
    soon = f"{emptied} free their space by themselves; Drive may show it some minutes later." if emptied else ""
    later = f"{deleted[:1].upper()}{deleted[1:]} count on Google Drive until its trash is emptied: {_TRASH}"
    return " ".join(filter(None, [soon, later if deleted else ""]))


def mount_kind(folder: Path | str) -> str:
    """The file system that a folder lies on: "drive" where Colab mounts it, else its name; "" where that is unknown.

    Args:
        folder: it need not be there yet.
    """
    resolved = Path(folder).resolve()
    if any(resolved.is_relative_to(point) for point in MOUNT_POINTS):
        return "drive"
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
            mounts = [line.split()[1:3] for line in file]
    except OSError:  # not Linux
        return ""
    # Later lines are mounted over earlier ones; proc(5) writes blanks in a path as \040.
    points = {Path(point.replace("\\040", " ")): kind for point, kind in mounts}
    return next((points[parent] for parent in (resolved, *resolved.parents) if parent in points), "")


def has_arrived(path: Path) -> bool | None:
    """Say whether Google has a file, as far as the mount tells; None where it does not.

    Colab's mount shows a file's id as an attribute; until the file is uploaded, that is one of its own making.

    Args:
        path: a file on the mount.

    Returns:
        True or False as Google says, or None.
    """
    try:
        identity = os.getxattr(path, "user.drive.id")
    except (OSError, AttributeError):  # another file system; Windows and macOS have no such call
        return None
    return not identity.startswith(b"local")


def remove_emptied(path: Path) -> int:
    """Remove a file so that Drive's trash holds nothing of it, and return the bytes it had.

    It is emptied first: Drive counts the newest revision of a file, in its trash too. A file that has another name, or
    that is only a link to one, is removed as it is. Fault points: `emptied.before` and `emptied.after`.
    Source: voicepaw/so-vits-svc-fork pull request 581, minimaxir/gpt-2-simple issue 155.

    Args:
        path: the file.

    Returns:
        The bytes it had, 0 for a link.

    Raises:
        OSError: it could not be emptied, and is still there; or not be removed.
    """
    found = os.lstat(path)
    emptied = 0
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_size:
        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        try:
            opened = os.fstat(handle)
            if (opened.st_ino, opened.st_nlink) == (found.st_ino, 1):  # else it got another name just now
                fault_point("emptied.before")
                os.ftruncate(handle, 0)
                os.fsync(handle)
                emptied = found.st_size
        finally:
            os.close(handle)
        fault_point("emptied.after")
    path.unlink(missing_ok=True)
    return emptied


def sessions_root(root: Path | str | None = None, *, shared_drive: str | None = None) -> Path:
    """Choose the folder that holds the sessions; nothing is created.

    `root` if given, else Fast-Dreambooth/Sessions on the mounted Drive (on `shared_drive` if named), else that
    folder under the current directory.

    Args:
        root: the folder to take, whatever else there is.
        shared_drive: a Shared drive's name; None: My Drive.

    Returns:
        The folder, which may not be there yet.

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
    """Raise DriveError when a folder that should be there does not answer, as after a lost connection to Drive.

    Args:
        folder: one on Drive, or anywhere else.
    """
    with file_errors(folder, "read"):
        os.listdir(folder)


# ------------------------------------------------------------------------------------------------ copies


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
    with placed(dst, point=f"{point}.before_rename" if point else None) as temporary, _emptied_on_failure(temporary):
        size = os.stat(src).st_size
        with open(src, "rb") as source:
            out = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            try:
                copied = 0
                while chunk := source.read(min(_CHUNK_BYTES, max(1, size // 2))):
                    write_all(out, chunk)
                    before, copied = copied, copied + len(chunk)
                    if before < size / 2 <= copied:
                        fault(f"{point}.half")
                os.fsync(out)
                forget_cached(out)
            finally:
                os.close(out)
        _compare(temporary, dst, size, sha256)


@contextlib.contextmanager
def _emptied_on_failure(temporary: Path) -> Iterator[None]:
    """What was copied in part leaves nothing in Drive's trash."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if temporary.stat().st_size and keeps_trash(temporary):
                os.truncate(temporary, 0)
        raise


def _compare(written: Path, dst: Path, size: int, sha256: str) -> None:
    found_size = os.stat(written).st_size
    found = sha256_of(written) if found_size == size else ""
    if found != sha256:
        what = f"{found_size} of {size} bytes" if found_size != size else f"other bytes (sha256 {found[:12]}...)"
        raise VerificationFailed(
            f"{dst} was read back with {what}.", "It is copied again; if the problem persists, check the disk."
        )
