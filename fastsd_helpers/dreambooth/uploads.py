"""Photos that came through the browser: kept in the session as they arrived, so that a disconnect loses none."""

import hashlib
import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastsd_helpers.dreambooth.photos import Photos, open_photos
from fastsd_helpers.dreambooth.picture_names import printable, safe_stem, unique_stem
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.sessions import Session

__all__ = ["UploadReport", "list_uploads", "remove_uploads", "save_uploads", "uploads_folder"]

logger = logging.getLogger("fastsd_helpers")

_KINDS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif", ".hif", ".avif", ".bmp"))
_KINDS |= {".gif", ".tif", ".tiff", ".mpo", ".ppm", ".txt"}


@dataclass(frozen=True)
class UploadReport:
    """What became of the files that were handed over."""

    saved: tuple[str, ...]  # names in the uploads folder
    skipped: tuple[tuple[str, str], ...]  # name, reason

    def lines(self) -> list[str]:
        """The report, one sentence a line."""
        kept = f"{len(self.saved)} file{'s' if len(self.saved) != 1 else ''} added."
        return [kept, *(f"Skipped {name}: {reason}." for name, reason in self.skipped)]


def uploads_folder(session: Session) -> Path:
    """Where a session keeps uploaded photos; it may not exist yet."""
    return session.folder / "uploads"


def list_uploads(session: Session) -> list[Path]:
    """The uploaded photos and captions, by name.

    Raises:
        DriveError: the folder cannot be read.
    """
    folder = uploads_folder(session)
    with file_errors(folder, "read"):
        return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def save_uploads(session: Session, files: Iterable[tuple[str, bytes]]) -> UploadReport:
    """Keep uploaded files in the session: photos, their .txt captions, and the photos of a zip.

    A file that is there already is not kept twice; another one of the same name gets a number.

    Args:
        session: whose folder `uploads` they go to.
        files: (name, content) as the browser sent them; names may be hostile.

    Raises:
        DriveError, DiskFull: the session cannot be written; what was saved before stays.
    """
    folder = uploads_folder(session)
    with file_errors(folder, "create"):
        folder.mkdir(exist_ok=True)
    there = {_digest(path.read_bytes()): path.name for path in list_uploads(session)}
    taken = {path.stem.casefold() for path in list_uploads(session) if path.suffix.lower() != ".txt"}
    saved: list[str] = []
    skipped: list[tuple[str, str]] = []
    for name, data in _unpacked(files, skipped):
        path = PurePosixPath(printable(name).replace("\\", "/"))
        suffix = path.suffix.lower()
        if suffix not in _KINDS:
            skipped.append((path.name, f"is not a picture, a .txt or a .zip ({suffix or 'no ending'})"))
        elif not data:
            skipped.append((path.name, "is empty"))
        elif suffix != ".txt" and (twin := there.get(_digest(data))):
            skipped.append((path.name, f"is here already as {twin}"))
        else:
            # A caption keeps its name: it belongs to the photo of the same one.
            stem = safe_stem(path.stem)
            stem = stem if suffix == ".txt" else unique_stem(stem, taken)
            write_atomic(folder / f"{stem}{suffix}", data)
            there[_digest(data)] = f"{stem}{suffix}"
            saved.append(f"{stem}{suffix}")
    return UploadReport(tuple(saved), tuple(skipped))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unpacked(files: Iterable[tuple[str, bytes]], skipped: list[tuple[str, str]]) -> Iterable[tuple[str, bytes]]:
    for name, data in files:
        if PurePosixPath(name).suffix.lower() != ".zip":
            yield name, data
            continue
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "photos.zip"
            path.write_bytes(data)
            try:
                with open_photos(path) as photos:
                    skipped += photos.skipped
                    for member in photos.names:
                        yield from _member(photos, member, skipped)
            except DatasetError as err:
                skipped.append((printable(name), err.problem.rstrip(".")))


def _member(photos: Photos, member: str, skipped: list[tuple[str, str]]) -> Iterable[tuple[str, bytes]]:
    try:
        yield member, photos.read(member)
        caption = photos.caption(member)
    except DatasetError as err:
        skipped.append((printable(member), err.problem.rstrip(".")))
        return
    if caption:
        yield str(PurePosixPath(member).with_suffix(".txt")), f"{caption}\n".encode()


def remove_uploads(session: Session, names: Iterable[str] | None = None) -> int:
    """Delete uploaded files of a session; pictures that were prepared from them stay. Returns how many.

    Args:
        session: whose folder `uploads` they are in.
        names: files to delete, a photo with the caption of its name; None: all of them.

    Raises:
        DriveError: they cannot be removed.
    """
    files = list_uploads(session)
    if names is not None:
        wanted = set(names)
        stems = {PurePosixPath(name).stem for name in wanted if not name.lower().endswith(".txt")}
        files = [
            path for path in files if path.name in wanted or (path.suffix.lower() == ".txt" and path.stem in stems)
        ]
    for path in files:
        with file_errors(path, "remove"):
            path.unlink(missing_ok=True)
    return len(files)
