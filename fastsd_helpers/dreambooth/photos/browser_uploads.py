"""Photos that came through the browser: kept in the session as they arrived, so that a disconnect loses none.

A photo and its caption have one name; where a name is taken already both get the same number, whichever of them comes
first and whether they come in a zip, in one selection or one after the other.
"""

import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fastsd_helpers.captions.photo_names import name_photos, repeats_in
from fastsd_helpers.captions.prompts import decode_caption
from fastsd_helpers.dreambooth.photos.caption_tables import TABLE_SUFFIXES
from fastsd_helpers.dreambooth.photos.finding import Photos, open_photos
from fastsd_helpers.dreambooth.photos.image_names import printable, safe_stem, unique_stem
from fastsd_helpers.dreambooth.photos.other_files import is_other_kind, why_no_photo
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.images.files import PICTURE_SUFFIXES, is_picture_head
from fastsd_helpers.names.code_pages import guess_page
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions import Session

__all__ = ["UploadReport", "count_uploads", "list_uploads", "remove_uploads", "save_uploads", "uploads_folder"]

_TEXTS = (".txt", ".caption")
_ARRIVED = ".arrived.json"  # name as it was sent, in lower case -> stems of what came under it last
_HERE = "is here already as "
_MOST_TWINS = 3


@dataclass(frozen=True)
class UploadReport:
    """What became of the files that were handed over."""

    saved: tuple[str, ...]  # names in the uploads folder
    skipped: tuple[tuple[str, str], ...]  # name, reason
    notes: tuple[str, ...] = ()

    @property
    def twins(self) -> int:
        """How many were there already."""
        return sum(reason.startswith(_HERE) for _name, reason in self.skipped)

    def lines(self) -> list[str]:
        """The report, one sentence a line."""
        kept = f"{len(self.saved)} file{'s' if len(self.saved) != 1 else ''} added."
        few = self.twins <= _MOST_TWINS
        again = [] if few else [f"{self.twins} files were here already, and are kept only once."]
        skipped = [item for item in self.skipped if few or not item[1].startswith(_HERE)]
        return [kept, *again, *(f"Skipped {name}: {reason}." for name, reason in skipped), *self.notes]


@dataclass(frozen=True)
class _Arrival:
    """One file as it was sent, or one photo of a zip with its caption."""

    name: str
    data: bytes
    stem: str | None = None  # what a zip's folders and names together say
    caption: str | None = None
    from_zip: bool = False


@dataclass
class _Shelf:
    """The uploads folder while files are put into it."""

    folder: Path
    there: dict[str, str] = field(default_factory=dict)  # hash of a photo -> its name here
    taken: set[str] = field(default_factory=set)  # stems of photos, in lower case
    latest: dict[str, list[str]] = field(default_factory=dict)  # as in _ARRIVED
    saved: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    page: str | None = None  # code page of the captions that are not UTF-8


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
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def count_uploads(session: Session) -> tuple[int, int, list[str]]:
    """Count the uploaded photos, and those of them that have a caption; with what is to be said of the other files.

    Raises:
        DatasetError: there are too many of them.
        DriveError: the folder cannot be read.
    """
    if not list_uploads(session):
        return 0, 0, []
    with open_photos(uploads_folder(session)) as photos:
        return len(photos.names), sum(photos.has_caption(name) for name in photos.names), photos.notes


def save_uploads(session: Session, files: Iterable[tuple[str, bytes]]) -> UploadReport:
    """Keep uploaded files in the session: photos, their captions, tables of captions, and the photos of a zip.

    A photo that is there already is not kept twice; another one of the same name gets a number, and so does the
    caption that comes with it or after it.

    Args:
        session: whose folder `uploads` they go to.
        files: (name, content) as the browser sent them; names may be hostile.

    Raises:
        DriveError: the session cannot be written; what was saved before stays.
        DiskFull: the session cannot be written; what was saved before stays.
    """
    shelf = _open_shelf(session)
    loose = []
    for name, data in files:
        if _is_zip(name, data):
            for arrival in _photos_of_zip(name, data, shelf):
                _keep_photo(shelf, arrival)
        else:
            loose.append(_Arrival(name, data))
    captions = [each.data for each in loose if PurePosixPath(each.name).suffix.lower() in _TEXTS]
    if guess := guess_page(captions):  # of all that came together
        shelf.page = guess.code_page
        shelf.notes.append(guess.line("Captions are"))
    here: set[str] = set()  # names that came in this call: the photos of one name share its caption
    for arrival in sorted(loose, key=lambda each: PurePosixPath(each.name).suffix.lower() in _TEXTS):
        _keep(shelf, arrival, here)
    with file_errors(shelf.folder, "write to"):
        write_atomic(shelf.folder / _ARRIVED, json.dumps(shelf.latest, ensure_ascii=False).encode())
    return UploadReport(tuple(shelf.saved), tuple(shelf.skipped), tuple(dict.fromkeys(shelf.notes)))


def _open_shelf(session: Session) -> _Shelf:
    folder = uploads_folder(session)
    with file_errors(folder, "create"):
        folder.mkdir(exist_ok=True)
    shelf = _Shelf(folder)
    for path in list_uploads(session):
        if path.suffix.lower() not in (*_TEXTS, *TABLE_SUFFIXES):
            with file_errors(path, "read"):
                shelf.there[_digest(path.read_bytes())] = path.name
            shelf.taken.add(path.stem.casefold())
            shelf.latest.setdefault(path.stem.casefold(), [path.stem])
    try:
        arrived = json.loads((folder / _ARRIVED).read_bytes())
        for key, stems in arrived.items():
            shelf.latest[str(key)] = [safe_stem(str(stem)) for stem in stems]
    except (OSError, ValueError, AttributeError, TypeError) as err:  # then names are taken as they lie there
        logger.debug("The result of the uploads is unknown: %s.", err)
    return shelf


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_zip(name: str, data: bytes) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    # A zip by another name: a browser or a phone may have changed its ending.
    by_content = suffix in (*PICTURE_SUFFIXES, "") and data[:4] == b"PK\3\4" and zipfile.is_zipfile(io.BytesIO(data))
    return suffix == ".zip" or by_content


def _keep(shelf: _Shelf, arrival: _Arrival, here: set[str]) -> None:
    path = PurePosixPath(printable(arrival.name).replace("\\", "/"))
    suffix = path.suffix.lower()
    if not arrival.data:
        shelf.skipped.append((path.name, "is empty"))
    elif suffix in _TEXTS:
        _keep_caption(shelf, path, arrival.data)
    elif suffix in TABLE_SUFFIXES:
        _keep_table(shelf, path, arrival.data)
    elif suffix in PICTURE_SUFFIXES or (not is_other_kind(path.name) and is_picture_head(arrival.data[:64])):
        key = _key(path)
        before = list(shelf.latest.get(key, [])) if key in here else []
        _keep_photo(shelf, arrival)
        if before:
            shelf.latest[key] = list(dict.fromkeys([*before, *shelf.latest.get(key, [])]))
        here.add(key)
    else:
        shelf.skipped.append((path.name, why_no_photo(path.name)))


def _key(path: PurePosixPath) -> str:
    return safe_stem(path.stem).casefold()


def _keep_photo(shelf: _Shelf, arrival: _Arrival) -> None:
    path = PurePosixPath(printable(arrival.name).replace("\\", "/"))
    if not arrival.data:
        shelf.skipped.append((path.name, "is empty"))
        return
    digest = _digest(arrival.data)
    twin = shelf.there.get(digest)
    if twin is not None:
        shelf.skipped.append((path.name, f"{_HERE}{twin}"))
        stem = PurePosixPath(twin).stem
    else:
        wanted = safe_stem(arrival.stem or path.stem)
        # A caption that waits for a photo of this very name is its own; under a number it is another photo's.
        waiting = {each.stem.casefold() for each in shelf.folder.glob("*.txt")} - shelf.taken
        waiting -= set() if arrival.from_zip else {wanted.casefold()}
        taken = shelf.taken | waiting
        stem = unique_stem(wanted, taken)
        shelf.taken.add(stem.casefold())
        name = f"{stem}{path.suffix.lower()}"
        write_atomic(shelf.folder / name, arrival.data)
        shelf.there[digest] = name
        shelf.saved.append(name)
    if not arrival.from_zip:
        shelf.latest[_key(path)] = [stem]
    elif arrival.caption:
        _write_caption(shelf, stem, arrival.caption)


def _keep_caption(shelf: _Shelf, path: PurePosixPath, data: bytes) -> None:
    try:
        words = decode_caption(data, page=shelf.page)
    except DatasetError as err:
        shelf.skipped.append((path.name, err.problem.rstrip(".")))
        return
    stem = safe_stem(path.stem)
    if PurePosixPath(stem).suffix.lower() in PICTURE_SUFFIXES:  # "dog.png.txt"
        stem = PurePosixPath(stem).stem
    for each in shelf.latest.get(stem.casefold()) or [stem]:
        _write_caption(shelf, each, words or "", name=path.name)


def _write_caption(shelf: _Shelf, stem: str, words: str, *, name: str = "") -> None:
    target = shelf.folder / f"{stem}.txt"
    data = f"{words}\n".encode() if words else b"\n"
    with file_errors(target, "read"):
        before = target.read_bytes() if target.is_file() else None
    if before is not None and before.split() == data.split():
        if name:
            shelf.skipped.append((name, f"{_HERE}{target.name}"))
        return
    if before is not None:  # a newer caption of the same photo; the one before is kept out of sight
        write_atomic(shelf.folder / f".{stem}.{_digest(before)[:8]}.txt", before)
    write_atomic(target, data)
    shelf.saved.append(target.name)


def _keep_table(shelf: _Shelf, path: PurePosixPath, data: bytes) -> None:
    stem, suffix = safe_stem(path.stem), path.suffix.lower()
    taken: set[str] = set()
    while (target := shelf.folder / f"{unique_stem(stem, taken)}{suffix}").is_file():
        if target.read_bytes() == data:
            shelf.skipped.append((path.name, f"{_HERE}{target.name}"))
            return
    write_atomic(target, data)
    shelf.saved.append(target.name)


def _photos_of_zip(name: str, data: bytes, shelf: _Shelf) -> Iterator[_Arrival]:
    with tempfile.TemporaryDirectory() as scratch:
        # Under its own name, which sentences about it say.
        path = Path(scratch) / f"{safe_stem(PurePosixPath(printable(name)).stem)}.zip"
        path.write_bytes(data)
        try:
            with open_photos(path) as photos:
                shelf.skipped += [(printable(member), reason) for member, reason in photos.skipped]
                shelf.notes += [*photos.notes, *filter(None, [photos.page_line()])]
                if repeats_in(photos.names):
                    shelf.notes.append("Repeats in folder names are ignored: every photo counts the same.")
                if not photos.names and not photos.skipped:
                    shelf.skipped.append((printable(name), "holds no images"))
                named = name_photos([printable(member) for member in photos.names])
                for member, said in zip(photos.names, named, strict=True):
                    yield from _member(photos, member, said.stem if said.folder else None, shelf)
        except DatasetError as err:
            shelf.skipped.append((printable(name), err.problem.rstrip(".")))


def _member(photos: Photos, member: str, stem: str | None, shelf: _Shelf) -> Iterator[_Arrival]:
    try:
        data = photos.read(member)
    except DatasetError as err:
        shelf.skipped.append((printable(member), err.problem.rstrip(".")))
        return
    caption = None
    try:
        caption = photos.caption(member)
    except DatasetError as err:
        shelf.skipped.append((f"the caption of {printable(member)}", err.problem.rstrip(".")))
    yield _Arrival(member, data, stem, caption, from_zip=True)


def remove_uploads(session: Session, names: Iterable[str] | None = None) -> int:
    """Delete uploaded files of a session; images that were prepared from them stay. Returns how many.

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
    with file_errors(uploads_folder(session), "remove"):
        (uploads_folder(session) / _ARRIVED).unlink(missing_ok=True)
    return len(files)
