"""Bring in sessions made elsewhere: by the old fast-DreamBooth notebook, or by this library in somebody else's folder.

The old notebook's folder holds `{name}.ckpt`, `{name}_step_N.ckpt`, `instance_images/` and `captions/`, or both as
zips, and no record of how it was trained. Its prompt is the image's file name, followed by the words of the .txt of
the same name. What is imported is copied; the folder it comes from is only read. A session that already lies among
ours is taken as it is, and nothing in it is moved, changed or deleted; `prepare` puts its prompts together.
"""

import os
import re
import shutil
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastsd_helpers.captions.photo_names import name_photos
from fastsd_helpers.captions.prompts import decode_caption, read_caption, write_caption
from fastsd_helpers.drive import copy_verified, sessions_root
from fastsd_helpers.errors import DatasetError, SessionError, SessionExists
from fastsd_helpers.files import check_room, file_errors, sha256_of, write_atomic
from fastsd_helpers.images.files import PICTURE_SUFFIXES
from fastsd_helpers.names.code_pages import guess_page
from fastsd_helpers.names.zips import read_names
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions.names import check_name
from fastsd_helpers.sessions.record import RECORD, TWINS, new_record, read_record
from fastsd_helpers.sessions.session import FOLDERS, Session
from fastsd_helpers.wording import list_some

__all__ = ["ImportResult", "import_session", "is_old_session", "whole_prompt"]

_MOST_MEMBERS = 5_000
_MOST_BYTES = 256 * 2**20  # of one image
_STEP = re.compile(r"_step_(\d+)$")
# Belongs to the session it was written for, not to its copy.
_NOT_COPIED = {"schema", "sequence", "name", "id", "created"}
# What a person gave, beside what was made here.
_GIVEN = ("uploads", "originals")


@dataclass(frozen=True)
class ImportResult:
    """What was brought in; `lines()` says it in words."""

    session: Session
    pictures: int
    captions: int
    checkpoint: Path | None  # the old notebook's trained model, in the session
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report, one sentence a line."""
        captions = f" and {self.captions} captions" if self.captions else ""
        return [f"Imported {self.session.name}: {self.pictures} images{captions}.", *self.notes]


def is_old_session(folder: Path) -> bool:
    """Whether a folder looks like one of the old notebook's sessions that was not imported yet.

    Args:
        folder: one below the sessions root.

    Raises:
        DriveError: it cannot be read.
    """
    with file_errors(folder, "read"):
        names = set(os.listdir(folder)) if folder.is_dir() else set()
    # Ours, whole or damaged: the old notebook made none of these.
    if names & {RECORD, TWINS, "checkpoints", "exports", "samples", "held_out_images"}:
        return False
    if names & {"instance_images.zip", "captions.zip"} or any(name.endswith(".ckpt") for name in names):
        return True
    with file_errors(folder, "read"):
        return next(_pictures_in(folder / "instance_images"), None) is not None


def import_session(name: str, *, source: Path | str | None = None, root: Path | str | None = None) -> ImportResult:
    """Make a session of this library out of one made elsewhere; train it after `prepare`, which needs no `--images`.

    Args:
        name: the session's name here.
        source: the folder it comes from; None when it already lies among ours under that name.
        root: folder that holds our sessions.

    Returns:
        The session, and what was imported or left out.

    Raises:
        SessionError: the folder is not a session, or the name is invalid.
        SessionExists: one of that name is here.
        DatasetError: an unsafe or damaged zip.
        DiskFull: it cannot be read or written.
        DriveError: it cannot be read or written.
    """
    home = sessions_root(root)
    folder = home / (check_name(name) if source is not None else _name_there(name, home))
    origin = Path(source).expanduser().absolute() if source is not None else folder
    if source is not None and os.path.lexists(folder):
        raise SessionExists(
            f"There is already a session named {folder.name!r} in {folder.parent}.",
            "Choose another name for the import.",
        )
    with file_errors(origin, "read"):
        ours = (origin / RECORD).is_file() or (origin / TWINS).is_dir()
    if ours and source is not None:
        result = _copy_own(origin, folder)
    elif is_old_session(origin):
        result = _import_old(origin, folder)
    else:
        what = "was imported already" if ours else "is not a session"
        hint = "A session is a folder with instance_images, instance_images.zip or a .ckpt file in it."
        raise SessionError(f"{origin} {what}.", f"Open it under its name {name!r}." if ours else hint)
    for line in result.lines():
        logger.info("%s", line)
    return result


def _name_there(name: str, home: Path) -> str:
    """The name of a folder among ours, odd ones of the old notebook too; nothing that would lead out of there."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise SessionError(
            f"{name[:80]!r} is not the name of a folder in {home}.",
            "Give the folder's own name; a session that lies elsewhere is imported with --from.",
        )
    return name


# ------------------------------------------------------------------------------------- the old notebook's


def _import_old(origin: Path, folder: Path) -> ImportResult:
    in_place = origin == folder
    pictures = list(_pictures_in(origin / "instance_images"))
    zipped = origin / "instance_images.zip"
    weights, others = _trained_in(origin)
    _check_room(
        folder, [*pictures, *([zipped] if zipped.is_file() else []), *([weights] if weights and not in_place else [])]
    )
    target = folder if in_place else folder.with_name(f".import-{folder.name}")
    notes: list[str] = []
    with file_errors(target, "write to"):
        if not in_place:
            shutil.rmtree(target, ignore_errors=True)  # of an import that was cut
        for sub_folder in FOLDERS:
            (target / sub_folder).mkdir(parents=True, exist_ok=True)
        if pictures and not in_place:
            for path in pictures:
                write_atomic(target / "instance_images" / path.name, path.read_bytes())
        elif not pictures and zipped.is_file():
            for member, data in _members(zipped, PICTURE_SUFFIXES, notes):
                write_atomic(target / "instance_images" / member, data)
        captions = _bring_captions(origin, target, notes, in_place=in_place)
        kept = _bring_weights(weights, target, in_place=in_place)
    count = len(list(_pictures_in(target / "instance_images")))
    if not count:
        notes.append("It has no images: give them to `prepare` with --images.")
    if captions:
        notes.append("Each caption became the whole prompt: the words of the file name, then those of the .txt.")
    if kept is not None:
        final = folder / kept.relative_to(target)
        notes.append(
            f"Its trained model is {final.name}. The old notebook saved no training state, so a new run starts "
            f"from a base model; to start from this one: fastsd convert '{final}' FOLDER, then base_model FOLDER."
        )
    if others:
        notes.append(f"Not imported: {', '.join(path.name for path in others)}.")
    if (origin / "concept_images").is_dir() or (origin / "concept_images.zip").is_file():
        notes.append(
            "Its concept images are not imported: to train with them as class images, name their folder in "
            "class_folder (--class-folder)."
        )
    about: dict[str, Any] = {"from": str(origin), "by": "fast-DreamBooth", "notes": notes}
    if in_place:
        about["captions"] = "after the name"
    if kept is not None:
        about |= {
            "checkpoint": kept.relative_to(target).as_posix(),
            "sha256": sha256_of(kept),
            "bytes": kept.stat().st_size,
        }
    session = Session(target, {**new_record(folder.name)})
    session.save(imported=about)
    if not in_place:
        with file_errors(folder, "write to"):
            os.rename(target, folder)
        session = Session.open(folder.name, root=folder.parent)
    return ImportResult(session, count, captions, folder / kept.relative_to(target) if kept else None, tuple(notes))


def _pictures_in(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file() and not path.name.startswith("."):
                yield path


def _trained_in(origin: Path) -> tuple[Path | None, list[Path]]:
    """The model that the old notebook would go on from, and its other ones: the finished one, else the latest step."""
    found = [path for path in origin.glob("*.ckpt") if path.is_file()]

    def rank(path: Path) -> tuple[bool, int]:
        step = _STEP.search(path.stem)
        return step is None, int(step[1]) if step else 0

    found.sort(key=lambda path: (path.stem == origin.name, *rank(path), path.name))
    return (found[-1], found[:-1]) if found else (None, [])


def _check_room(folder: Path, files: list[Path]) -> None:
    needed = sum(path.stat().st_size for path in files)
    check_room(
        folder.parent, needed, "the import", spare=needed // 20, hint="Free some space there, or choose another --root."
    )


def _bring_weights(weights: Path | None, target: Path, *, in_place: bool) -> Path | None:
    if weights is None or in_place:
        return weights
    copy = target / "exports" / weights.name
    copy_verified(weights, copy, sha256=sha256_of(weights), point=None)
    return copy


def _bring_captions(origin: Path, target: Path, notes: list[str], *, in_place: bool) -> int:
    """Write captions/NAME.txt for every image that has a caption; returns how many.

    In a copy it is the exact prompt. In place the captions are a user's own files: nothing that is there is written to.
    """
    found: dict[str, str] = {}
    zipped = origin / "captions.zip"
    if zipped.is_file():
        members = list(_members(zipped, {".txt"}, notes))
        guess = guess_page(data for _member, data in members)
        notes += [guess.line(f"Captions in {zipped.name} are")] if guess else []
        for member, data in members:
            if caption := decode_caption(data, page=guess.code_page if guess else None):
                found[PurePosixPath(member).stem] = caption
    from_zip = set(found)
    # The old notebook left some captions beside the images; those in captions/ are newer.
    for folder in ("instance_images", "captions"):
        for path in sorted((origin / folder).glob("*.txt")):
            if caption := read_caption(path):
                found[path.stem] = caption
                from_zip.discard(path.stem)
    pictures = list(_pictures_in(target / "instance_images"))
    named = name_photos([path.name for path in pictures])
    words = {path.stem: photo.words for path, photo in zip(pictures, named, strict=True)}
    used = {stem: caption for stem, caption in found.items() if stem in words}
    for stem, caption in used.items():
        path = target / "captions" / f"{stem}.txt"
        if not in_place:
            write_caption(path, whole_prompt(words[stem], caption))
        elif stem in from_zip and not path.exists():
            write_caption(path, caption)
    if lost := sorted(set(found) - set(used)):
        shown = list_some(f"{stem}.txt" for stem in lost)
        notes.append(f"Captions that match no image, so not used: {shown}.")
    return len(used)


def whole_prompt(words: str, caption: str) -> str:
    """The prompt of an image in the old notebook: the words of its name, then its caption; nothing is said twice.

    Args:
        words: of the image's file name.
        caption: the text beside it.
    """
    if not words or caption.casefold().startswith(words.casefold()):
        return caption
    return f"{words} {caption}"


def _members(path: Path, suffixes: "set[str] | frozenset[str]", notes: list[str]) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of a zip's files of these kinds, without their folders; nothing leaves the memory here.

    Names that several folders have are numbered.

    Raises:
        DatasetError: it is damaged, or made to attack whoever unpacks it.
    """
    hint = "Unpack it by hand into the folder next to it, and import again."
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > _MOST_MEMBERS:
                raise DatasetError(f"{path.name} holds {len(members):,} files.", hint)
            named = read_names(members)
            for member, name in zip(members, named.names, strict=True):
                mode = member.external_attr >> 16
                if name.startswith("/") or ".." in name.split("/") or "\0" in name or (mode and stat.S_ISLNK(mode)):
                    raise DatasetError(f"{path.name} holds an unsafe name: {name[:80]!r}.", hint)
            notes += filter(None, [named.line(path.name)])
            times: Counter[str] = Counter()
            for member, whole in zip(members, named.names, strict=True):
                name = PurePosixPath(whole).name
                if PurePosixPath(name).suffix.lower() not in suffixes or name.startswith(".") or "__MACOSX" in whole:
                    continue
                if member.file_size > _MOST_BYTES:
                    raise DatasetError(f"{name} in {path.name} has {member.file_size / 2**20:.0f} MiB.", hint)
                times[name.casefold()] += 1
                again = times[name.casefold()]
                stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
                yield name if again == 1 else f"{stem} ({again}){suffix}", archive.read(member)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as err:
        raise DatasetError(f"{path.name} is damaged: {str(err).splitlines()[0] if str(err) else err}.", hint) from err


# --------------------------------------------------------------------------------------------------- ours


def _copy_own(origin: Path, folder: Path) -> ImportResult:
    """Copy a session of this library, as from a folder that another account shares, so that it can go on here."""
    theirs = read_record(origin).record  # not `open`, which would mend what is not ours
    files = [path for name in (*FOLDERS, *_GIVEN) for path in sorted((origin / name).rglob("*")) if path.is_file()]
    files = [path for path in files if not path.name.startswith(".")]
    files += [path for path in [origin / "crop-boxes.json"] if path.is_file()]
    _check_room(folder, files)
    target = folder.with_name(f".import-{folder.name}")
    with file_errors(target, "write to"):
        shutil.rmtree(target, ignore_errors=True)
        for path in files:
            copy = target / path.relative_to(origin)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_verified(path, copy, sha256=sha256_of(path), point=None)
    session = Session(target, {**new_record(folder.name)})
    known = {key: value for key, value in theirs.items() if key not in _NOT_COPIED}
    # How captions that a person wrote become prompts goes along with them.
    how = {key: value for key, value in (known.get("imported") or {}).items() if key == "captions"}
    session.save(**known | {"imported": {"from": str(origin), "by": "fastsd_helpers", "notes": [], **how}})
    with file_errors(folder, "write to"):
        os.rename(target, folder)
    session = Session.open(folder.name, root=folder.parent)
    pictures = len(list(_pictures_in(session.instance_images)))
    captions = len(list(session.captions.glob("*.txt")))
    size = sum(path.stat().st_size for path in files)
    notes = [f"{len(files)} files ({size / 2**20:.0f} MiB) were copied and compared; the original was only read."]
    return ImportResult(session, pictures, captions, None, tuple(notes))
