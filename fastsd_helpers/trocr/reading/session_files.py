"""What a reading session read and a person corrected, as files of any format, in one zip: nothing is read again."""

import dataclasses
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import new_file
from fastsd_helpers.trocr.exports.formats import PER_PAGE, WHOLE, require_formats, whole_file
from fastsd_helpers.trocr.exports.record import PageRecord, record_of
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.pages.inputs import Item, list_files, open_file
from fastsd_helpers.trocr.pages.page_reader import Page
from fastsd_helpers.trocr.reading.rows import SavedLine, key_of
from fastsd_helpers.trocr.reading.session import ReadingSession
from fastsd_helpers.trocr.reading.transcription import ToRead, name_inputs

__all__ = ["ZipOfFiles", "write_zip"]

_ZIP = "transcription.zip"


@dataclass
class ZipOfFiles:
    """A zip that was written: where, the names in it, and what is not in it, a sentence each."""

    path: Path
    names: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def write_zip(session: ReadingSession, images: str, formats: Sequence[str]) -> ZipOfFiles:
    """Write transcription.zip into the session's folder: its pages as they were read, with the corrections.

    Args:
        session: the reading session.
        images: the image, PDF or folder that was read.
        formats: of FORMATS; named as `transcribe` names its files.

    Raises:
        DatasetError: the images are not here, or none of them was read.
        DependencyMissing: a package for a format.
    """
    require_formats(formats)
    known: dict[str, list[SavedLine]] = {}
    for line in session.lines():
        known.setdefault(line.page or line.key, []).append(line)
    made = ZipOfFiles(session.folder / _ZIP)
    with new_file(made.path) as (file, _temporary), zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for item in _inputs(images):
            records = list(_records(item, known, made.problems, str(session.record.get("reader") or "")))
            for name, data in _files(item, records, formats, made.problems):
                opened.writestr(name, data)
                made.names.append(name)
        if not made.names:
            raise DatasetError(f"Nothing in {images} was read in this session.", "Read the images first.")
    return made


def _inputs(images: str) -> list[ToRead]:
    path = Path(images).expanduser()
    if not images or not path.exists():
        raise DatasetError(f"{images or 'What was read'} is not on this machine.", "Upload the images, and read them.")
    return name_inputs([(path / name, name) for name in list_files(path)] if path.is_dir() else [(path, path.name)])


def _records(item: ToRead, known: dict[str, list[SavedLine]], problems: list[str], by: str) -> Iterator[PageRecord]:
    changed = float(int(item.path.stat().st_mtime))
    for opened in open_file(item.path, item.name):
        lines = known.get(key_of(opened.picture)) if opened.picture is not None else None
        if lines is None or opened.picture is None:
            problems.append(opened.problem or f"{opened.name} was not read in this session.")
            continue
        page = Page(opened.name, tuple(_line(line, opened) for line in lines), 0.0, opened.picture.size)
        reader = Path(by).name
        yield record_of(page, file=item.path.name, number=opened.number, dpi=opened.dpi, reader=reader, changed=changed)


def _line(line: SavedLine, item: Item) -> Line:
    """The line as it was read, or as a person says it is; that is certain."""
    if line.right is None:
        return line.read
    return dataclasses.replace(line.read, text=line.right, confidence=1.0, tokens=(), centres=None, problem=None)


def _files(
    item: ToRead, records: list[PageRecord], formats: Sequence[str], problems: list[str]
) -> Iterator[tuple[str, bytes]]:
    for format in formats if records else ():
        try:
            if format in WHOLE:
                yield f"{item.stem}{WHOLE[format]}", whole_file(format, item.path, records)
                continue
            ending, writer = PER_PAGE[format]
            several = len(records) > 1 or records[0].number > 1
            for record in records:
                number = f"-{record.number:04d}" if several else ""
                yield f"{item.stem}{number}{ending}", writer(record)
        except DatasetError as err:
            problems.append(err.problem)
