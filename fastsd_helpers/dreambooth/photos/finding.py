"""Find a user's photos and their captions: in a folder, a zip or one file; each is read when it is asked for.

Nothing is unpacked to disk: a zip's members are read into memory one by one, after all of their names were checked.
What this library made itself is passed over.
"""

import contextlib
import functools
import os
import re
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from fastsd_helpers.captions.prompts import decode_caption, read_caption
from fastsd_helpers.dreambooth.photos.caption_tables import TABLE_SUFFIXES, read_caption_table
from fastsd_helpers.dreambooth.photos.other_files import is_other_kind, why_no_photo
from fastsd_helpers.dreambooth.photos.own_output import (
    MADE_HERE,
    is_made_here,
    is_own_sheet,
    is_session,
    sessions_among,
)
from fastsd_helpers.dreambooth.photos.sources import (
    MAX_FILE_BYTES,
    Member,
    Source,
    check_member,
    is_picture,
    open_zip,
    read_source,
    unpacked,
)
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import file_errors
from fastsd_helpers.images.files import PICTURE_SUFFIXES
from fastsd_helpers.names.code_pages import PageGuess, guess_page
from fastsd_helpers.names.zips import read_names
from fastsd_helpers.runtime import logger
from fastsd_helpers.wording import list_some, natural_order

__all__ = ["Photos", "open_photos"]

_MAX_FILES = 2_000
_MAX_MEMBERS = 20_000
_JUDGED_BYTES = 64 * 1024
_MAX_TOTAL_BYTES = 8 * 2**30

_ARCHIVE_SUFFIXES = frozenset({".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz"})
# Files that programs leave beside photos and that nobody means.
_IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx", "icon\r"})
_CAPTION_SUFFIXES = (".txt", ".caption")
_QUIET_SUFFIXES = frozenset(
    {*TABLE_SUFFIXES, ".md", ".ini", ".xmp", ".aae", ".part", ".lock", ".npz", ".toml", ".yaml"}
)


@dataclass
class Photos:
    """The photos of one folder or zip, by name in natural order; the files are only read when asked for.

    Attributes:
        names: of the files that look like images, with "/" between folders.
        skipped: name and reason of the files that do not.
        notes: sentences on what was passed over or guessed.
    """

    names: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _files: dict[str, Source] = field(default_factory=dict)
    _captions: dict[str, Source] = field(default_factory=dict)
    _table: dict[str, str] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        """Read the bytes of one photo.

        Raises:
            DatasetError: this file cannot be read; the problem is the reason to skip it for.
            DriveError: the folder itself has gone, as after a lost connection to Drive.
        """
        return read_source(self._files[name])

    def caption(self, name: str) -> str | None:
        """The words of the .txt (or .caption) beside a photo, else of a table; None when there are none.

        Raises:
            DatasetError: the .txt is not a caption.
        """
        source = self._captions.get(name)
        if source is None:
            return self._table.get(name)
        page = self._page.code_page if self._page else None
        words = (
            read_caption(source, page=page)
            if isinstance(source, Path)
            else decode_caption(read_source(source), page=page)
        )
        return words or self._table.get(name)

    def page_line(self) -> str | None:
        """Which code page the captions are read in, as a sentence; None when all of them are UTF-8. Reads them all."""
        return self._page.line("Captions are") if self._page else None

    @functools.cached_property
    def _page(self) -> PageGuess | None:
        """The code page of the captions that are not UTF-8; one writer's, so all of them are looked at together."""
        texts = []
        for source in dict.fromkeys(self._captions.values()):
            with contextlib.suppress(DatasetError):  # the one that cannot be read says so itself
                texts.append(read_source(source)[:_JUDGED_BYTES])
        return guess_page(texts)

    def has_caption(self, name: str) -> bool:
        """Whether something is there that may be a photo's caption; nothing is read."""
        return name in self._captions or name in self._table


def _key(name: str) -> str:
    """A name without its ending, as captions are looked for: some systems change case or take accents apart."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix(""))).casefold()


# ------------------------------------------------------------------------------------------------ sources


@contextlib.contextmanager
def open_photos(path: Path, *, leave_out: Path | None = None) -> Iterator[Photos]:
    """List the photos of a folder (with its sub-folders), of a zip, or a single image.

    Zips are read where they are all there is: in a folder without images, and in a zip without images. Sessions
    and what was drawn here are passed over, wherever they lie.

    Args:
        path: folder, zip or image.
        leave_out: a folder inside `path` that is not looked into.

    Raises:
        DatasetError: nothing is there, the archive is damaged, unsafe or of another kind, or there are too many files.
    """
    with file_errors(path, "read"):
        is_folder, is_file = path.is_dir(), path.is_file()
    with contextlib.ExitStack() as opened:
        if is_folder:
            yield _list_folder(path, leave_out, opened)
        elif not is_file:
            raise _not_there(path)
        elif path.suffix.lower() in _ARCHIVE_SUFFIXES:
            raise DatasetError(
                f"{path.name} is an archive of an unsupported kind.", "Give a .zip or the unpacked folder."
            )
        elif path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
            yield _list_zip(opened.enter_context(open_zip(path, path)), path, opened)
        else:
            yield _only_file(path)


def _not_there(path: Path) -> DatasetError:
    text = str(path)
    if re.match(r"(?:https?:/|drive\.google\.com|www\.)", text):
        link = re.sub(r"^(https?:)/(?!/)", r"\1//", text)
        hint = "Download it and give the folder or the zip; in a notebook you can also upload it."
        if "drive.google.com" in text or "docs.google.com" in text:
            hint = (
                "In Colab: open the link, choose Organise > Add shortcut > My Drive, connect Drive, and give the "
                "folder's path (/content/drive/MyDrive/...). Elsewhere: download it, and give the folder or the zip."
            )
        return DatasetError(f"Photos cannot be read from a link: {link}.", hint)
    return DatasetError(f"There is no folder or zip {path}.", "Check the path; in Colab, copy it from the file list.")


def _only_file(path: Path) -> Photos:
    files: dict[str, Source] = {path.name: path}
    for suffix in _CAPTION_SUFFIXES:
        beside = path.with_suffix(suffix)
        if beside.is_file():
            files[beside.name] = beside
    photos = _sort_out(files)
    if not photos.names and not photos.skipped:  # somebody named this very file
        photos.skipped.append((path.name, why_no_photo(path.name)))
    return photos


def _list_folder(folder: Path, leave_out: Path | None, opened: contextlib.ExitStack) -> Photos:
    files: dict[str, Source] = {}
    left_out = leave_out.resolve() if leave_out else None
    sessions = []

    def stop(err: OSError) -> None:
        raise err

    with file_errors(folder, "read"):
        for parent, folders, names in os.walk(folder, onerror=stop):
            here = Path(parent)
            folders[:] = sorted(d for d in folders if not _is_ignored(d) and (here / d).resolve() != left_out)
            if here == folder and is_session(folder):
                folders[:] = [d for d in folders if d not in MADE_HERE]
            found = [d for d in folders if is_session(here / d)]
            sessions += [(here / d).relative_to(folder).as_posix() for d in found]
            folders[:] = [d for d in folders if d not in found]
            for name in names:
                file = here / name
                if _is_ignored(name):
                    continue
                if file.is_symlink() and is_made_here(file) and not is_made_here(folder):
                    logger.debug("%s points to files that were made here.", file)
                    continue
                files[file.relative_to(folder).as_posix()] = file
            _check_count(sum(_looks_like_picture(name) for name in files), folder)
    photos = _sort_out(files, only=_zips_in(files))
    _read_inner(photos, files, folder, opened)
    if sessions:
        shown = list_some(sorted(sessions))
        photos.notes.append(f"Skipped, because they are sessions with prepared images: {shown}.")
    return photos


def _list_zip(
    archive: zipfile.ZipFile, path: Path, opened: contextlib.ExitStack, *, inner: bool = False, spent: int = 0
) -> Photos:
    members = archive.infolist()
    if len(members) > _MAX_MEMBERS:
        raise DatasetError(f"{path.name} holds {len(members):,} files.", "Give a zip with the photos of one subject.")
    total = spent + sum(member.file_size for member in members)
    if total > _MAX_TOTAL_BYTES:
        raise DatasetError(
            f"{path.name} would unpack to {total / 2**30:.1f} GiB; the limit is {_MAX_TOTAL_BYTES // 2**30} GiB.",
            "Give a zip with the photos of one subject.",
        )
    named = read_names(members)
    own = sessions_among(named.names)
    files: dict[str, Source] = {}
    skipped: list[tuple[str, str]] = []
    for member, name in zip(members, named.names, strict=True):
        check_member(member, name, path)
        if member.is_dir() or name.endswith("/") or any(_is_ignored(part) for part in name.split("/")):
            continue
        if _is_made_here(name, own):
            continue
        is_zip = name.lower().endswith(".zip")
        if member.flag_bits & 1:
            skipped.append((name, "is encrypted; unpack the zip with its password first"))
        elif member.file_size > MAX_FILE_BYTES and not is_zip:
            skipped.append((name, f"has {member.file_size / 2**20:.0f} MiB; the limit is {MAX_FILE_BYTES // 2**20}"))
        else:
            files[name] = Member(archive, member)
    _check_count(sum(_looks_like_picture(name) for name in files), path)
    photos = _sort_out(files, only=set() if inner else _zips_in(files))
    photos.skipped[:0] = skipped
    if not inner:
        _read_inner(photos, files, path, opened, spent=total)
    if (line := named.line(path.name)) is not None and photos.names:
        photos.notes.append(line)
    if own:
        photos.notes.append(f"{path.name} holds a session: prepared images are not read from it.")
    return photos


def _is_made_here(name: str, sessions: set[str]) -> bool:
    for session in sessions:
        inside = name.removeprefix(f"{session}/") if session else name
        if (inside != name or not session) and inside.split("/")[0] in MADE_HERE:
            return True
    return False


def _zips_in(files: dict[str, Source]) -> set[str]:
    """The zips to read: all of them where there is no image beside them."""
    if any(_looks_like_picture(name) for name in files):
        return set()
    return {name for name in files if name.lower().endswith(".zip")}


def _read_inner(
    photos: Photos, files: dict[str, Source], path: Path, opened: contextlib.ExitStack, *, spent: int = 0
) -> None:
    """Add the photos of the zips that are all there is."""
    for name in sorted(_zips_in(files), key=natural_order):
        source = files[name]
        inner_path = Path(name)
        try:
            file: Path | IO[bytes] = source if isinstance(source, Path) else opened.enter_context(unpacked(source))
            archive = opened.enter_context(open_zip(file, inner_path))
            inner = _list_zip(archive, inner_path, opened, inner=True, spent=spent)
        except DatasetError as err:
            photos.skipped.append((name, err.problem.removeprefix(f"{inner_path.name} ").rstrip(".")))
            continue
        # One zip: its own folders say what they say. Several: they must not fall over each other.
        prefix = f"{name.removesuffix('.zip')}/" if len(_zips_in(files)) > 1 else ""
        photos.names += [prefix + each for each in inner.names]
        photos.skipped += [(prefix + each, reason) for each, reason in inner.skipped]
        photos.notes += inner.notes
        photos._files |= {prefix + each: source for each, source in inner._files.items()}
        photos._captions |= {prefix + each: source for each, source in inner._captions.items()}
        photos._table |= {prefix + each: words for each, words in inner._table.items()}
    _check_count(len(photos.names), path)


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _IGNORED_NAMES


def _looks_like_picture(name: str) -> bool:
    # A name without ending may be an image; its content decides.
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in PICTURE_SUFFIXES or not re.fullmatch(r"\.[a-z0-9]{1,8}", suffix)


def _check_count(count: int, path: Path) -> None:
    if count > _MAX_FILES:
        raise DatasetError(
            f"{path} holds more than {_MAX_FILES:,} images.",
            "Give the folder or zip of one subject; 5 to 30 photos are enough.",
        )


def _sort_out(files: dict[str, Source], *, only: set[str] | None = None) -> Photos:
    """Tell photos, captions and the rest apart; `only`: the zips that are read as well."""
    photos = Photos([])
    captions: list[str] = []
    for name in sorted(files, key=natural_order):
        suffix = PurePosixPath(name).suffix.lower()
        if is_own_sheet(name):
            photos.notes.append(f"{name} has the name of a generated sheet, and was skipped.")
        elif suffix in _CAPTION_SUFFIXES:
            captions.append(name)
        elif _looks_like_picture(name):
            photos.names.append(name)
        elif suffix == ".zip":
            if name not in (only or set()):
                photos.skipped.append((name, "is a zip among other files: unpack it, or give it by itself"))
        elif suffix not in _QUIET_SUFFIXES:
            if not is_other_kind(name) and is_picture(files[name]):
                photos.names.append(name)
            else:
                photos.skipped.append((name, why_no_photo(name)))
    photos._files = {name: files[name] for name in photos.names}
    _match_captions(photos, files, captions)
    _match_tables(photos, files)
    return photos


def _match_captions(photos: Photos, files: dict[str, Source], captions: list[str]) -> None:
    by_key: dict[str, list[str]] = {}
    for name in photos.names:
        by_key.setdefault(_key(name), []).append(name)
        by_key.setdefault(_key(f"{name}.txt"), []).append(name)  # "dog.png.txt"
    alone = []
    # Kohya's ending first, so that a .txt of the same name wins.
    for caption in sorted(captions, key=lambda name: name.lower().endswith(".txt")):
        matched = by_key.get(_key(caption), [])
        for name in matched:
            photos._captions[name] = files[caption]
        if not matched:
            alone.append(caption)
    if alone and photos.names:
        photos.notes.append(
            f"{_counted(len(alone), 'caption file')} that match no photo, so not used: {list_some(alone)}. "
            "A photo's caption has its name, with .txt at the end."
        )


def _match_tables(photos: Photos, files: dict[str, Source]) -> None:
    by_name = {unicodedata.normalize("NFC", name).casefold(): name for name in photos.names}
    by_last: dict[str, list[str]] = {}
    for name in photos.names:
        by_last.setdefault(PurePosixPath(name).name.casefold(), []).append(name)
        by_last.setdefault(PurePosixPath(name).stem.casefold(), []).append(name)
    for table in sorted(files, key=natural_order):
        if PurePosixPath(table).suffix.lower() not in TABLE_SUFFIXES or not photos.names:
            continue
        try:
            data = read_source(files[table])
            rows = read_caption_table(table, data)
        except DatasetError as err:
            photos.notes.append(f"{table} was not read: it {err.problem}.")
            continue
        used = 0
        for file, words in rows.items():
            last = by_last.get(PurePosixPath(file).name.casefold(), [])
            meant = by_name.get(file.casefold()) or (last[0] if len(set(last)) == 1 else None)
            if meant is not None:
                photos._table[meant] = words
                used += 1
        if rows and not used:
            photos.notes.append(
                f"{table} has {_counted(len(rows), 'caption')}, but none of the files it names is here "
                f"({list_some(list(rows))}), so it is not used."
            )
        elif rows:
            photos.notes.append(f"{_counted(used, 'caption')} from {table}.")
            photos.notes += [guess.line(f"{table} is")] if (guess := guess_page([data])) else []


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
