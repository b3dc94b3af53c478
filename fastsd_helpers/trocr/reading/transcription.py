"""Transcribe images, TIFFs and PDFs into a folder of files, in any formats, page by page; it goes on where it was cut.

What was read is noted page by page in a hidden folder beside the files, before they are written from it: a run that
was killed at any moment reads no page twice, and ends with the same files as one that was not.
"""

import filecmp
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastsd_helpers import __version__
from fastsd_helpers.errors import DatasetError, SettingsError
from fastsd_helpers.runtime import fault_point, logger
from fastsd_helpers.trocr.exports.formats import PER_PAGE, WHOLE, require_formats, whole_file
from fastsd_helpers.trocr.exports.record import PageRecord, record_of, settled
from fastsd_helpers.trocr.pages.inputs import Item, list_files, open_file, shown_name
from fastsd_helpers.trocr.pages.page_reader import Page, cut_lines, open_detector
from fastsd_helpers.trocr.reading.results import LocalResults, Results
from fastsd_helpers.trocr.reading.rows import fingerprint, is_page

__all__ = [
    "ENOUGH",
    "ToRead",
    "TranscribeConfig",
    "Transcribed",
    "add_results",
    "begin_run",
    "count_shares",
    "join_pages",
    "name_inputs",
    "read_inputs",
    "transcribe",
]

_RUN = ".fastsd-run"  # in the folder of the results
_SETTINGS = f"{_RUN}/settings.json"
ENOUGH = 16  # files for a process: it takes some ten seconds until it reads
_LONGEST = 255 - len("-0001.alto.xml")  # bytes of a name that an ending comes behind
_TOGETHER = 64  # single lines read together
_MOST_PIXELS = 50_000_000  # that are held of them


@dataclass(frozen=True)
class TranscribeConfig:
    """How pages are looked at and what is written: see the flags of `fastsd trocr read`."""

    formats: tuple[str, ...] = ("txt",)
    pages: str = "auto"  # auto, pages or lines
    order: Any = "auto"  # auto, columns, rows or rtl
    least_confidence: float = 0.0


@dataclass
class Transcribed:
    """What a run did: inputs, pages and lines; pages read now and before; problems by name; lines too unsure for txt
    and PDF; and the files."""

    folder: Any  # a path, or the address of a place that is no folder here
    inputs: int = 0
    pages: int = 0
    lines: int = 0
    read_now: int = 0
    read_before: int = 0
    unsure: int = 0
    problems: list[str] = field(default_factory=list)
    files: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class ToRead:
    """One file to read, and how its results are called."""

    path: Path
    name: str  # as the user knows it
    stem: str  # of the results, from their folder


# An input's next item and whether it is a page; without an item, the end of the input.
_Step = tuple[ToRead, Item | None, bool]


def transcribe(
    reader: Any,
    sources: list[str],
    out: Path,
    config: TranscribeConfig | None = None,
    *,
    shard: tuple[int, int] = (0, 1),
    joined: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Transcribed:
    """Read images, PDFs and folders of them, and write each into `out` in every format; call it again to go on.

    Args:
        reader: a Reader.
        sources: paths of images, PDFs or folders.
        out: `<name>.txt`, `.json`, `.csv`, `.pdf`; `<name>.alto.xml`, `.page.xml`, `.hocr`, with `-0001` and so on
            behind the name where an input has several pages. Folders keep their folders.
        shard: (number from 0, how many): every so manieth input, for several processes.
        joined: `join_pages` follows once all of the shards are read: where there are fewer inputs than processes they
            divide the pages of each, and write no files of results.
        progress: called with the number of pages done.

    Raises:
        DatasetError: there is nothing to read.
        SettingsError: `out` holds the results of another reader or other settings.
        DependencyMissing: a package for a format, or for finding lines, is not installed.
    """
    config = config or TranscribeConfig()
    require_formats(config.formats)
    inputs = _list_inputs(sources, out)
    results = LocalResults(out)
    begin_run(results, reader, config)
    number, count = shard
    if joined and len(inputs) < count:
        return read_inputs(reader, inputs, results, config, progress, pages=shard)
    return read_inputs(reader, inputs[number::count], results, config, progress)


def read_inputs(
    reader: Any,
    inputs: list[ToRead],
    results: Results,
    config: TranscribeConfig,
    progress: Callable[[int], None] | None = None,
    *,
    detector: Callable[[], Any] = open_detector,
    pages: tuple[int, int] = (0, 1),
) -> Transcribed:
    """Read files and write their results, as `transcribe` does; `begin_run` has been called for them.

    Args:
        detector: opens the line detector, at the first page.
        pages: (number from 0, how many): every so manieth page of the inputs, which are noted and not written.
    """
    done = Transcribed(results.at(""))
    before, reader.watches = reader.watches, True
    try:
        _Work(reader, results, config, done, progress, detector, pages).run(inputs)
    finally:
        reader.watches = before
    return done


def add_results(results: Sequence[Transcribed]) -> Transcribed:
    """What several processes did together, each with its own shard."""
    total = Transcribed(results[0].folder)
    for result in results:
        for item in fields(Transcribed):
            if item.name != "folder":
                setattr(total, item.name, getattr(total, item.name) + getattr(result, item.name))
    return total


def join_pages(sources: list[str], out: Path, config: TranscribeConfig, shares: Sequence[Transcribed]) -> Transcribed:
    """What processes did together; where they divided the pages, the files of results are written now.

    Args:
        sources: as of `transcribe`.
        out: as of `transcribe`.
        config: as of `transcribe`.
        shares: what each of them did, `joined`.
    """
    done, inputs = add_results(shares), _list_inputs(sources, out)
    if len(inputs) < len(shares):
        work = _Work(None, LocalResults(out), config, done, None, open_detector, (0, 1))
        for item in inputs:
            work.finish(item)
    return done


def count_shares(sources: list[str], out: Path) -> int:
    """How many processes get enough of these files to be worth their start; a file of pages counts as two.

    Raises:
        DatasetError: there is nothing to read.
    """
    inputs = _list_inputs(sources, out)
    several = sum(_may_have_pages(item.path) for item in inputs)
    return max(1, (len(inputs) - several) // ENOUGH + 2 * several)


def _list_inputs(sources: list[str], out: Path) -> list[ToRead]:
    found: list[tuple[Path, str]] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found += [(path / name, name) for name in list_files(path, leave_out=out)]
        elif path.is_file():
            found.append((path, path.name))
        else:
            raise DatasetError(
                f"There is no file or folder {path}.",
                "Check the path; a link needs a file as --out, an address such as s3:// --engine ray.",
            )
    return name_inputs(list(dict.fromkeys(found)))


def name_inputs(found: list[tuple[Path, str]]) -> list[ToRead]:
    """Names for the results: without the ending, unless two would be one, on disks that see no capitals too."""
    found = [(path, shown_name(name)) for path, name in found]
    seen = [str(Path(name).with_suffix("")).casefold() for _path, name in found]
    several = {stem for stem, (path, _name) in zip(seen, found, strict=True) if _may_have_pages(path)}
    made, taken = [], set[str]()
    for stem, (path, name) in zip(seen, found, strict=True):
        base, dash, digits = stem.rpartition("-")
        like_a_page = bool(dash) and digits.isdecimal() and base in several
        wanted = name if seen.count(stem) > 1 or like_a_page else str(Path(name).with_suffix(""))
        wanted = _shortened(wanted)
        final, number = wanted, 1
        while final.casefold() in taken:  # the same name from two folders
            number += 1
            final = f"{wanted}-{number}"
        taken.add(final.casefold())
        made.append(ToRead(path, name, final))
    return made


def _shortened(stem: str) -> str:
    """A name of results that file systems take with an ending behind it; nearly always as it is."""
    folder, slash, last = stem.rpartition("/")
    if len(last.encode()) <= _LONGEST:
        return stem
    return folder + slash + last.encode()[: _LONGEST - len("-1234567")].decode(errors="ignore")


def _may_have_pages(path: Path) -> bool:
    return path.suffix.lower() in (".pdf", ".tif", ".tiff")


def begin_run(results: Results, reader: Any, config: TranscribeConfig) -> None:
    """Note what the text depends on; formats may be added, and other inputs, by a later run.

    Raises:
        SettingsError: these are the results of another model or other settings.
    """
    by = fingerprint(reader, config.pages)
    wanted = {"version": 1, "reader": reader.checkpoint.folder.name, "read_by": by, "order": config.order}
    found = results.read(_SETTINGS)
    if found is None:
        results.put(_SETTINGS, json.dumps(wanted, indent=1).encode())
        return
    known = json.loads(found)
    if known != wanted:
        raise SettingsError(
            f"{results.at('')} holds what {known.get('reader')} read, another recognition model or one with other "
            "settings.",
            "Name another folder with --out.",
        )


class _Work:
    """One run: items are read in groups, noted, and written; an input is finished when all its pages are."""

    def __init__(
        self,
        reader: Any,
        results: Results,
        config: TranscribeConfig,
        done: Transcribed,
        progress: Callable[[int], None] | None,
        detector: Callable[[], Any],
        pages: tuple[int, int],
    ) -> None:
        self._reader, self._results, self._config, self._done, self._progress = reader, results, config, done, progress
        self._open_detector, self._detector, self._pages = detector, None, pages

    def run(self, inputs: list[ToRead]) -> None:
        """Read all inputs; lines of several are read together, so one may be finished after the next began."""
        waiting: list[_Step] = []
        pixels = 0
        rank, count = self._pages
        for place, item in enumerate(inputs):
            for opened in self._open(item):
                if (place + opened.number - 1) % count != rank:  # another process reads it
                    continue
                size = opened.picture.width * opened.picture.height if opened.picture is not None else 0
                page = opened.picture is not None and is_page(opened, self._config.pages)
                if page or len(waiting) >= 2 * _TOGETHER or pixels + size > _MOST_PIXELS:
                    self._read(waiting)
                    waiting, pixels = [], 0
                waiting.append((item, opened, page))
                pixels += size
                if page:
                    self._read(waiting)
                    waiting, pixels = [], 0
            waiting.append((item, None, False))
            if all(one is None for _owner, one, _page in waiting):
                self._read(waiting)
                waiting = []
        self._read(waiting)

    def _open(self, item: ToRead) -> Iterator[Item]:
        """The pages of an input that were not read yet."""
        if self._owner(rows := self._rows(item), item):
            return
        notes = _notes_of(rows, item)
        known = [note["record"] for note in notes if "record" in note]
        if all(record["problem"] for record in known):  # it may be whole by now
            known = []
        elif any("end" in note for note in notes):
            return
        # One of several processes may have been cut in the middle, while others read on.
        there = {record["number"] for record in known}
        first = next(number for number in itertools.count(1) if number not in there)
        yield from (one for one in open_file(item.path, item.name, first=first) if one.number not in there)

    def _read(self, waiting: list[_Step]) -> None:
        records = iter(self._records_of([(item, opened, page) for item, opened, page in waiting if opened is not None]))
        for item, opened, _page in waiting:
            if opened is None:
                if self._pages[1] == 1:
                    self.finish(item)
                continue
            record = next(records)
            self._note(item, {"record": record.as_json()})
            fault_point("trocr.page")
            self._done.read_now += 1
            if self._progress:
                self._progress(self._done.read_now)

    def _records_of(self, new: list[tuple[ToRead, Item, bool]]) -> list[PageRecord]:
        pages: list[Page] = []
        lines = [opened for _item, opened, page in new if not page]
        read = iter(self._reader.read(lines)) if lines else iter(())
        for _item, opened, page in new:
            if page and opened.picture is not None:
                self._detector = self._detector or self._open_detector()
                found, _crops = cut_lines(
                    self._reader,
                    opened.picture,
                    name=opened.name,
                    detector=self._detector,
                    order=self._config.order,
                    or_line=self._config.pages == "auto",
                )
                pages.append(found)
            else:
                line = next(read)
                size = opened.picture.size if opened.picture is not None else (1, 1)
                kept = () if line.problem else (line,)
                pages.append(Page(opened.name, kept, 0.0, size, line.problem))
        model = self._reader.checkpoint.folder.name
        return [
            record_of(page, file=shown_name(item.path.name), number=opened.number, dpi=opened.dpi, reader=model,
                      changed=float(int(item.path.stat().st_mtime)))
            for page, (item, opened, _is_page) in zip(pages, new, strict=True)
        ]  # fmt: skip

    # ---------------------------------------------------------------------------------------------------- notes

    def _notes_name(self, item: ToRead) -> str:
        return f"{_RUN}/{hashlib.sha256(item.stem.encode()).hexdigest()[:24]}.jsonl"

    def _rows(self, item: ToRead) -> list[dict[str, Any]]:
        """All that is noted under the name of an input's results."""
        rows = (self._results.read(self._notes_name(item)) or b"").split(b"\n")
        # A kill may leave the last note unfinished: it is written anew, behind a line end.
        found = []
        for row in rows:
            try:
                found.append(json.loads(row))
            except ValueError:
                continue
        return [note for note in found if isinstance(note, dict)]

    def _owner(self, rows: list[dict[str, Any]], item: ToRead) -> str | None:
        """The other file that the results of this name are of, where that one is still there; else None."""
        sources = {str(note["source"]) for note in rows if "source" in note} - {str(item.path.absolute())}
        return next((source for source in sorted(sources) if _is_another(Path(source), item.path)), None)

    def _note(self, item: ToRead, note: dict[str, Any]) -> None:
        about = {"stamp": _stamp(item.path), "source": str(item.path.absolute())}
        # A path may have bytes that are no UTF-8; they come back as they were.
        row = json.dumps({**about, **note}, ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._results.append(self._notes_name(item), row)

    # ---------------------------------------------------------------------------------------------------- files

    def finish(self, item: ToRead) -> None:
        """Write the files of an input whose pages are all read; those that are there already stay."""
        self._done.inputs += 1
        rows = self._rows(item)
        if other := self._owner(rows, item):
            problem = f"{item.name} is not read: {self._results.at(item.stem)} is what was read of {shown_name(other)}."
            self._done.problems.append(problem)
            logger.warning("%s Name another folder with --out.", problem)
            return
        notes = _notes_of(rows, item)
        latest = {note["record"]["number"]: note["record"] for note in notes if "record" in note}
        records = [PageRecord.from_json(latest[number]) for number in sorted(latest)]
        if not any("end" in note for note in notes):
            self._note(item, {"end": len(records)})
        self._done.pages += len(records)
        self._done.lines += sum(len(record.lines) for record in records)
        self._done.problems += [record.problem for record in records if record.problem]
        self._done.unsure += sum(settled(record, self._config.least_confidence)[1] for record in records)
        self._done.read_before = max(0, self._done.pages - self._done.read_now)
        written = {key for note in notes for key in note.get("written", ())}
        kept = []
        for format in self._config.formats if any(not record.problem for record in records) else ():
            least = self._config.least_confidence if format in ("txt", "pdf") else 0
            key = f"{format} {least} {__version__} {len(records)}"
            try:
                self._write(item, format, records, there=key in written)
                kept += [key] if key not in written else []
            except DatasetError as err:
                self._done.problems.append(err.problem)
                logger.warning("%s", err.problem)
        if kept:
            self._note(item, {"written": kept})

    def _write(self, item: ToRead, format: str, records: list[PageRecord], *, there: bool) -> None:
        """Write one format; `there`: the same was written before, and stays where it still is."""
        read = [record for record in records if not record.problem]
        if format in WHOLE:
            name = f"{item.stem}{WHOLE[format]}"
            if not (there and self._results.has(name)):
                self._results.put(name, whole_file(format, item.path, read, self._config.least_confidence))
            self._done.files.append(self._results.at(name))
            return
        ending, writer = PER_PAGE[format]
        for record in read:
            number = f"-{record.number:04d}" if len(records) > 1 else ""
            name = f"{item.stem}{number}{ending}"
            if not (there and self._results.has(name)):
                self._results.put(name, writer(record))
            self._done.files.append(self._results.at(name))


def _notes_of(rows: list[dict[str, Any]], item: ToRead) -> list[dict[str, Any]]:
    """The notes of the file as it is now."""
    stamp = _stamp(item.path)
    return [note for note in rows if note.get("stamp") == stamp]


def _is_another(source: Path, path: Path) -> bool:
    """Whether a file is there that is not this one, nor a copy of it."""
    try:
        return source.is_file() and not (source.name == path.name and filecmp.cmp(source, path, shallow=False))
    except OSError:
        return False


def _stamp(path: Path) -> list[int]:
    """What tells a file from another that took its name."""
    try:
        found = path.stat()
    except OSError:
        return [0, 0]
    return [found.st_size, int(found.st_mtime)]
