"""Photos and captions that a person put where prepared images lie: set aside in originals/ before anything else.

    originals/instance_images/dog.jpg      a copy, compared byte by byte with what lay in instance_images/
    originals/instance_images/dog.txt      its caption
    originals/captions/cat.txt             a caption whose photo is not there

Copied, not moved: a mounted Drive delivers late and out of order, and must never know of a photo's removal before it
knows of the copy. There the first ones stay where they are until the copies have been there for a while.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fastsd_helpers.dreambooth.dataset.prepared import PICTURE_FOLDERS, recorded_images
from fastsd_helpers.dreambooth.photos.image_names import unique_stem
from fastsd_helpers.dreambooth.photos.own_output import session_around
from fastsd_helpers.drive import copy_verified, delivers_late
from fastsd_helpers.files import bytes_in, check_room, file_errors, sha256_of, write_atomic
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions import Session

__all__ = ["ORIGINALS", "SetAside", "own_place", "photos_of_user", "set_aside", "set_captions_aside"]

ORIGINALS = "originals"
_SETTLE_S = 120.0
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


@dataclass
class SetAside:
    """What `set_aside` did."""

    copied: list[Path] = field(default_factory=list)
    stay: set[str] = field(default_factory=set)  # "instance_images/dog.jpg": not to be removed yet

    def line(self) -> str | None:
        """A sentence for the user; None when nothing was there."""
        if not self.copied:
            return None
        count = len(self.copied)
        return (
            f"{count} file{'s' if count > 1 else ''} of yours were in the folder of prepared images: "
            f"{'they are' if count > 1 else 'it is'} now safe in {self.copied[0].parent}."
        )


def set_aside(session: Session) -> SetAside:
    """Copy every file in the folders of prepared images that no `prepare` wrote to originals/; removes nothing.

    Raises:
        DiskFull: a copy cannot be written, or is not what it was made from.
        DriveError: a copy cannot be written, or is not what it was made from.
        VerificationFailed: a copy cannot be written, or is not what it was made from.
    """
    found = SetAside()
    groups = _strangers(session)
    files = [path for group in groups.values() for path in group]
    if not files:
        return found
    check_room(session.folder, sum(path.stat().st_size for path in files), "copies of your photos")
    late = delivers_late(session.folder)
    now = time.time()
    for (folder, stem), group in groups.items():
        targets = _targets(session, folder, stem, group)
        for path, target in zip(group, targets, strict=True):
            settled = target.is_file() and now - target.stat().st_mtime > _SETTLE_S
            if not target.is_file():
                _copy(path, target)
                found.copied.append(target)
            if late and not settled:
                found.stay.add(path.relative_to(session.folder).as_posix())
    if (line := found.line()) is not None:
        logger.info("%s", line)
    return found


def _strangers(session: Session) -> "dict[tuple[str, str], list[Path]]":
    """(folder below originals/, stem) -> the files that belong together, a photo with its captions."""
    # What a rebuilt record found in the folders may be anybody's.
    known = {item["file"]: item["sha256"] for item in recorded_images(session) if "source_sha256" in item}
    stems = {PurePosixPath(name).stem for name in known}
    photos: dict[tuple[str, str], list[Path]] = {}
    captions: list[Path] = []
    for name in PICTURE_FOLDERS:
        for path in _files_below(session.folder / name):
            relative = path.relative_to(session.folder).as_posix()
            if name == "captions":
                if path.stem not in stems or path.suffix.lower() != ".txt":
                    captions.append(path)
            elif relative not in known or sha256_of(path) != known[relative]:
                parent = PurePosixPath(relative).parent.as_posix()
                photos.setdefault((parent, path.stem), []).append(path)
    for path in captions:
        place = next((key for key in photos if key[1] == path.stem), ("captions", path.stem))
        beside = [each for each in photos.get(place, []) if each.suffix.lower() == ".txt"]
        for each in beside:  # captions/ is newer
            photos[place].remove(each)
            photos.setdefault(("captions", f"{each.stem} next to its photo"), []).append(each)
        photos.setdefault(place, []).append(path)
    return photos


def _files_below(folder: Path) -> list[Path]:
    found = []
    with file_errors(folder, "read"):
        for parent, folders, names in os.walk(folder):
            folders.sort()
            found += [
                Path(parent, name)
                for name in sorted(names)
                if not name.startswith(".") and name.casefold() not in _SYSTEM_FILES and Path(parent, name).is_file()
            ]
    return found


def _targets(session: Session, folder: str, wanted: str, group: list[Path]) -> list[Path]:
    """Where the files of a group go: under one stem that is free for all of them, or holds the same already."""
    home = session.folder / ORIGINALS / folder
    taken: set[str] = set()
    while True:
        stem = unique_stem(wanted, taken)
        targets = [home / f"{stem}{path.suffix}" for path in group]
        if all(not target.exists() or _same(path, target) for path, target in zip(group, targets, strict=True)):
            return targets


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and sha256_of(one) == sha256_of(other)


def _copy(path: Path, target: Path) -> None:
    sha256 = sha256_of(path)
    with file_errors(target, "write"):
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_verified(path, target, sha256=sha256, point=None)


def set_captions_aside(session: Session, captions: dict[str, str]) -> list[Path]:
    """Keep captions that were written in the session for images that it has no longer: stem -> words."""
    written = []
    home = session.folder / ORIGINALS / "captions"
    for stem, words in captions.items():
        data = f"{words}\n".encode()
        taken: set[str] = set()
        while (target := home / f"{unique_stem(stem, taken)}.txt").exists() and target.read_bytes() != data:
            pass
        with file_errors(target, "write"):
            home.mkdir(parents=True, exist_ok=True)
            write_atomic(target, data)
        written.append(target)
    return written


def photos_of_user(session: Session, folder: str = "instance_images") -> Path | None:
    """Where the session itself keeps a user's photos: what was set aside from `folder`, else uploads; None: nowhere."""
    places = [session.folder / ORIGINALS / folder]
    places += [session.folder / "uploads"] if folder == "instance_images" else []
    return next((place for place in places if place.is_dir() and bytes_in(place)), None)


def own_place(session: Session, path: Path) -> Path:
    """A path as this session means it: in a copied or renamed session, its own uploads/ and originals/."""
    parts = path.parts
    for name in ("uploads", ORIGINALS):
        if name in parts:
            place = len(parts) - 1 - parts[::-1].index(name)
            own = session.folder.joinpath(*parts[place:])
            elsewhere = session_around(path) if path.exists() else None
            if own.exists() and (not path.exists() or elsewhere not in (None, session.folder.resolve())):
                return own
    return path
