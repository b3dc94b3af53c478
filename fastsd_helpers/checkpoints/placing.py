"""Put new files and folders in place whole or not at all, and look at a destination before any work is done."""

import contextlib
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastsd_helpers.drive import drive_errors, free_bytes
from fastsd_helpers.errors import CheckpointError, DiskFull
from fastsd_helpers.runtime import fault_point

__all__ = ["check_room", "new_file", "new_folder", "refuse_existing", "refuse_sources"]

_log = logging.getLogger("fastsd_helpers")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a hidden temporary file beside `path`; at the end of the block it is on the disk and gets its name.

    Yields:
        The file, open for writing and reading without a buffer, and where it is.

    Raises:
        DiskFull, DriveReadOnly, DriveError: the folder does not take the file; nothing is left behind.
    """
    # Opened by name, not by tempfile: the mode then follows the user's umask, so a web UI that runs as another user
    # can read the file.
    with _placed(path) as temporary, temporary.open("xb+", buffering=0) as file:
        yield file, temporary
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a hidden temporary folder beside `path`; at the end of the block it gets the name, in place of the old one.

    Raises:
        DiskFull, DriveReadOnly, DriveError: as `new_file`.
    """
    with _placed(path) as temporary:
        temporary.mkdir()
        yield temporary


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A name beside `path` for what the block makes; at its end that is put in place, and when it fails removed."""
    with drive_errors(path.parent, "write to"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
    temporary = _temporary(path)
    try:
        with drive_errors(path, "write"):
            yield temporary
            fault_point("export.rename")
            if temporary.is_dir() and path.exists():
                _exchange(temporary, path)
            else:
                temporary.replace(path)
            _sync_folder(path.parent)
    except BaseException:
        _remove(temporary)
        raise


def _exchange(new: Path, path: Path) -> None:
    # A file replaces a file in one step; a folder does not.
    old = _temporary(path)
    path.replace(old)
    try:
        new.replace(path)
    except BaseException:
        old.replace(path)
        raise
    _remove(old)


def check_room(folder: Path, needed: int) -> None:
    """Raise DiskFull when a folder that exists has fewer bytes free than will be written to it."""
    free = free_bytes(folder)
    if free < needed:
        raise DiskFull(
            f"The file needs {needed / 1e6:,.1f} MB; {folder} has {free / 1e6:,.1f} MB free.",
            "Free some space (on Google Drive, empty the trash too), or choose fp16, which is half as large as fp32.",
        )


def refuse_existing(dst: Path, *, overwrite: bool) -> None:
    """Refuse a destination that is there, unless it may be replaced.

    Raises:
        CheckpointError: it exists; or it is a folder that holds something else than a model.
    """
    if dst.is_dir() and overwrite and any(dst.iterdir()) and not _is_model(dst):
        raise CheckpointError(
            f"{dst} holds something else than a model, and is not replaced.", "Choose another name for the new folder."
        )
    if (dst.exists() or dst.is_symlink()) and not overwrite:
        raise CheckpointError(f"{dst} exists already.", "Choose another name, or replace it with --overwrite.")


def refuse_sources(dst: Path, files: tuple[Path, ...]) -> None:
    """Refuse a destination that is one of the files a model is read from, or a folder that holds one."""
    for file in files:
        if dst.exists() and dst.samefile(file):
            raise CheckpointError(f"{dst} is one of the files the model is read from.", "Choose another name.")
        if dst.resolve() in file.resolve().parents and dst.is_dir():
            raise CheckpointError(f"{dst} holds the model that is read.", "Choose another name for the new one.")


def _is_model(folder: Path) -> bool:
    alone = (folder / "config.json").is_file() or (folder / "pytorch_lora_weights.safetensors").is_file()
    return (folder / "model_index.json").is_file() or (alone and any(folder.glob("*.safetensors")))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(2)}.part")


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as err:
        _log.debug("The unfinished %s could not be removed: %s.", path, err)


def _remove_leftovers(path: Path) -> None:
    # A run that was killed leaves what it had written, gigabytes of it; a living one's is kept.
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        owner = leftover.name.removeprefix(f".{path.name}.").split(".")[0]
        if owner.isdigit() and not _is_running(int(owner)):
            _remove(leftover)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # there, os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    # Without it a power cut may undo the rename; some mounts do not offer it.
    if os.name == "posix":
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
