"""A reading session: one folder with the lines of your images, what was read in them, and what you corrected.

A line is known by the pixels of its image, so corrections stay with it when the same images are read again, by
another model too. What was corrected is a dataset to learn from.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsd_helpers import demo
from fastsd_helpers.errors import DatasetError, FastSDError, Interrupted, SessionDamaged
from fastsd_helpers.files import check_writable, file_errors, write_atomic
from fastsd_helpers.options import check, option
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions.names import check_name, clean_name
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.pages.inputs import Item, gather, gather_share
from fastsd_helpers.trocr.pages.page_reader import cut_lines, open_detector
from fastsd_helpers.trocr.reading.browser_uploads import Uploaded, unpack_upload
from fastsd_helpers.trocr.reading.dataset import LabelledLine, LineSet, group_of, read_lines
from fastsd_helpers.trocr.reading.folder import rows_to_bytes
from fastsd_helpers.trocr.reading.rows import (
    SavedLine,
    as_jsonl,
    carry_over,
    chunks,
    fingerprint,
    fingerprint_by_place,
    key_of,
    known_rows,
    make_row,
    not_among,
    runs_of,
    unread_row,
)
from fastsd_helpers.trocr.reading.settings import DEMO_READER, OWN_READER, ReadConfig, choose_reader

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SAMPLES_FOLDER", "ReadPicturesConfig", "ReadingSession", "SavedLine", "choose_reader"]

SAMPLES_FOLDER = Path(demo.__file__).parent / "reader_samples"
_BLOCK = 5  # neighbouring lines of a single page that are held out together
_VERSION = 1
_LINES, _JOURNAL = "lines.jsonl", "reading.jsonl"
_SHARE = "reading-{}.jsonl"  # of each of several processes
_CHUNK = 256  # lines read and written down together


@dataclass(frozen=True)
class _Pictures:
    images: str = option("", help="image, folder, PDF or link; empty: what was uploaded, else the built-in samples")
    reader: str = option(
        "auto",
        help=(
            f"recognition model: key, folder or Hub id; auto: {OWN_READER}, and for the built-in samples {DEMO_READER}"
        ),
        known="readers",
    )
    pages: Literal["auto", "lines", "pages"] = option(
        "auto", help="what the images are: single lines, or whole pages, whose lines are found first (segmentation)"
    )
    order: Literal["auto", "columns", "rows", "rtl"] = option("auto", help="reading order of a page; rows: a ledger")
    processes: int | None = option(
        None,
        help="processes, one on each GPU, that divide many images; default: auto, which is one on every GPU",
        low=1,
        high=64,
        advanced=True,
    )


@dataclass(frozen=True)
class ReadPicturesConfig(ReadConfig, _Pictures):
    """Which images to read, and how."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, ["reader (--reader) is empty"] if not str(self.reader).strip() else [])


class _Known:
    """How images are read, and what was read so before.

    Attributes:
        look, order: what the images are, and the order of a page's lines.
        by, names: what the reading depends on as versions now write it, and as any has.
        lines, pages: the rows of single lines, and of pages, by their keys.
    """

    def __init__(self, reader: Any, look: str, order: Any, rows: tuple[list[dict[str, Any]], ...]) -> None:
        self.look, self.order = look, order
        self.by = fingerprint(reader, look, order)
        by_place = fingerprint_by_place(reader, look) if order == "auto" else self.by  # those versions knew no order
        self.names = (self.by, by_place)
        self.lines, self.pages = known_rows(rows, self.by, by_place)


class ReadingSession:
    """One folder: uploads/, lines/ (one PNG a line), lines.jsonl, corrections.json, text.txt, session.json.

    Args:
        folder: made when absent.

    Raises:
        SessionError: a name that cannot be a folder's.
        DriveError: it cannot be written.
        SessionDamaged: its files hold no JSON.
    """

    def __init__(self, folder: Path) -> None:
        check_name(folder.name)
        self.folder = Path(folder)
        self.uploads, self.pictures = self.folder / "uploads", self.folder / "lines"
        check_writable(self.pictures)
        self.record: dict[str, Any] = {"version": _VERSION} | self._load("session.json", {})
        self.look_again()

    def look_again(self) -> None:
        """Load the lines and corrections anew, after another process has read into the folder."""
        self._right: dict[str, dict[str, str]] = self._load("corrections.json", {})
        self._rows: list[dict[str, Any]] = self._load_rows(_LINES)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def reader(self) -> str:
        """The model it works with: the one it taught last, else the one that read last, else the usual one."""
        path = self.folder / str((self.record.get("taught") or {}).get("path", ""))
        return str(path) if (path / "config.json").is_file() else self.untaught_reader

    @property
    def untaught_reader(self) -> str:
        """The model that read last, else the usual one: what a first teaching begins with."""
        return str(self.record.get("reader") or choose_reader("auto", own_pictures=True)[0])

    def save(self, **changes: Any) -> None:
        """Write values into session.json."""
        self.record |= changes
        write_atomic(self.folder / "session.json", json.dumps(self.record, indent=1, ensure_ascii=False).encode())

    def save_if_possible(self, **changes: Any) -> None:
        """`save`, and only a warning where the folder cannot be written: filling in a form must go on."""
        try:
            self.save(**changes)
        except FastSDError as err:
            logger.warning("%s", err.problem)

    def _load(self, name: str, otherwise: Any) -> Any:
        text = self._text_of(name)
        try:
            found = json.loads(text) if text is not None else otherwise
        except ValueError as err:
            hint = "Restore it from Drive's versions, or rename it."
            raise SessionDamaged(f"{self.folder / name} is damaged: {err}.", hint) from err
        if not isinstance(found, type(otherwise)):
            problem = f"{self.folder / name} is damaged: no {type(otherwise).__name__}."
            raise SessionDamaged(problem, "Restore it, or rename it.")
        return found

    def _load_rows(self, name: str) -> list[dict[str, Any]]:
        try:
            return [json.loads(row) for row in (self._text_of(name) or "").split("\n") if row]
        except ValueError as err:
            hint = "Rename it, and read the images again."
            raise SessionDamaged(f"{self.folder / name} is damaged: {err}.", hint) from err

    def _text_of(self, name: str) -> str | None:
        path = self.folder / name
        with file_errors(path, "read"):
            return path.read_text(encoding="utf-8") if path.is_file() else None

    # ------------------------------------------------------------------------------------------------- uploads

    def save_upload(self, name: str, data: bytes) -> Path:
        """Keep an uploaded file under a safe name; the same file is kept once, another of the same name beside it."""
        base = Path(name.replace("\\", "/")).name
        stem, suffix = clean_name(Path(base).stem), Path(base).suffix.lower()
        with file_errors(self.uploads, "create"):
            self.uploads.mkdir(exist_ok=True)
        path, number = self.uploads / f"{stem}{suffix}", 1
        while path.exists() and path.read_bytes() != data:
            number += 1
            path = self.uploads / f"{stem}-{number}{suffix}"
        if not path.exists():
            write_atomic(path, data)
        return path

    def save_uploads(self, name: str, data: bytes) -> "Uploaded":
        """Keep an uploaded file, or the images and PDFs of a zip; names in a zip are read as their writer meant them.

        A file that is there already, under whatever name, is not kept twice: its lines would come twice too.
        """
        kept: list[tuple[str, str]] = []
        there: list[tuple[str, str]] = []
        left_out: list[str] = []
        for member, content in unpack_upload(name, data, left_out):
            before = {path.name for path in self.list_uploads()}
            twin = self._twin_of(content)
            path = twin or self.save_upload(member, content)
            (there if path.name in before else kept).append((member, path.name))
        return Uploaded(tuple(kept), tuple(there), tuple(left_out))

    def _twin_of(self, data: bytes) -> Path | None:
        size = len(data)
        same = (path for path in self.list_uploads() if path.stat().st_size == size)
        return next((path for path in same if path.read_bytes() == data), None)

    def list_uploads(self) -> list[Path]:
        """The uploaded files, by name."""
        with file_errors(self.uploads, "read"):
            return sorted(path for path in self.uploads.iterdir() if path.is_file()) if self.uploads.is_dir() else []

    # ------------------------------------------------------------------------------------------------- reading

    def read(
        self,
        reader: Any,
        images: Any,
        *,
        pages: str = "auto",
        order: Any = "auto",
        progress: Callable[[int], None] | None = None,
        between: Callable[[int], None] | None = None,
    ) -> list[SavedLine]:
        """Read images of lines or pages into the session; what was read before is replaced, corrections stay.

        Args:
            reader: a Reader.
            images: see `pictures.gather`; folders with their subfolders.
            pages: auto (by their shape), lines or pages.
            order: of a page's lines, see `cut_lines`.
            progress: called with the number of lines done, after each; it may raise Interrupted to stop there.
            between: called after every batch of lines, whose results may still be on their way.

        Returns:
            The lines in reading order; one with `read.problem` could not be read.

        What was read before with the very same model and settings is not read again, also when the run before was cut
        short: after every page, or 256 lines, what is known is written to reading.jsonl.

        Raises:
            DatasetError: nothing there.
            DependencyMissing: a page, and rapidocr is not installed.
        """
        known = _Known(reader, pages, order, (self._rows, journal := self._load_journals()))
        rows = self._read_rows(reader, gather(images), known, _JOURNAL, journal, progress, between)
        if carry_over(self._right, rows, [*self._rows, *journal]):
            self._write_corrections()
        # Of another reading that was cut short, and may go on; and of other images, which may be wanted again.
        self._take_rows(rows, [*journal, *(row for row in self._rows if row.get("by") in known.names)])
        for path in self.folder.glob(_SHARE.format("*")):
            path.unlink(missing_ok=True)
        return self.lines()

    def read_share(
        self,
        reader: Any,
        images: Any,
        shard: tuple[int, int],
        *,
        pages: str = "auto",
        order: Any = "auto",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Read what one of several processes reads of the images, for a `read` after them that finds it known.

        Args:
            reader: a Reader.
            images: as of `read`.
            shard: (number from 0, how many).
            pages: as of `read`.
            order: as of `read`.
            progress: called with the number of lines done, after each.
        """
        known = _Known(reader, pages, order, (self._rows, self._load_journals()))
        own = _SHARE.format(shard[0])
        self._read_rows(reader, gather_share(images, *shard), known, own, self._load_rows(own), progress, None)

    def _load_journals(self) -> list[dict[str, Any]]:
        names = [_JOURNAL, *sorted(path.name for path in self.folder.glob(_SHARE.format("*")))]
        return [row for name in names for row in self._load_rows(name)]

    def _read_rows(
        self,
        reader: Any,
        items: Iterator[Item],
        known: "_Known",
        name: str,
        journal: list[dict[str, Any]],
        progress: Callable[[int], None] | None,
        between: Callable[[int], None] | None,
    ) -> list[dict[str, Any]]:
        """The rows of these images; after every page, or 256 lines, what is known is in the journal of that name."""
        rows: list[dict[str, Any]] = []
        detector: Any = None
        for is_page, run in runs_of(items, known.look):
            for chunk in chunks(run, 1 if is_page else _CHUNK):
                if not is_page:
                    try:
                        for row in self._line_rows(reader, chunk, known.lines, known.by, between):
                            rows.append(row)
                            if progress:
                                progress(len(rows))
                    except (KeyboardInterrupt, Interrupted):
                        # Stopped in the middle of a chunk: what was read of it is not read again.
                        write_atomic(self.folder / name, as_jsonl([*rows, *not_among(journal, rows)]))
                        raise
                elif chunk[0].picture is None:
                    logger.warning("%s", chunk[0].problem)
                    rows.append(unread_row(chunk[0], known.by))
                else:
                    page = key_of(chunk[0].picture)
                    if page not in known.pages:  # the page "" is that of single lines, and no page's key
                        detector = detector or open_detector()
                        how = {"detector": detector, "order": known.order, "or_line": known.look == "auto"}
                        read = self._page_rows(reader, chunk[0].name, chunk[0].picture, page, known.by, **how)
                        known.pages[page] = read
                    rows += known.pages[page]
                write_atomic(self.folder / name, as_jsonl([*rows, *not_among(journal, rows)]))
                if progress:
                    progress(len(rows))
        return rows

    def _take_rows(self, rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
        """These rows are what was read; the others are kept in the journal."""
        write_atomic(self.folder / _LINES, as_jsonl(rows))
        if left := not_among(others, rows):
            write_atomic(self.folder / _JOURNAL, as_jsonl(left))
        else:
            (self.folder / _JOURNAL).unlink(missing_ok=True)
        self._rows = rows
        self._write_text()

    def _line_rows(
        self,
        reader: Any,
        items: list[Item],
        known: dict[str, dict[str, Any]],
        by: str,
        between: Callable[[int], None] | None,
    ) -> Iterator[dict[str, Any]]:
        keys = [self._keep(item.picture) if item.picture is not None else "" for item in items]
        new = [item for item, key in zip(items, keys, strict=True) if key not in known]
        # Few at a time on a CPU, so that a stop costs seconds and loses nothing that was read.
        few = reader.batch_size * (2 if reader.checkpoint.device == "cpu" else 8)
        read = (line for group in chunks(iter(new), few) for line in reader.read(group, progress=between))
        for item, key in zip(items, keys, strict=True):
            if key in known:
                yield known[key] | {"name": item.name, "source": group_of(item.name)}
            else:
                yield make_row(next(read), group_of(item.name), key=key, by=by)

    def _page_rows(self, reader: Any, name: str, picture: Any, key: str, by: str, **how: Any) -> list[dict[str, Any]]:
        page, crops = cut_lines(reader, picture, name=name, **how)
        if not page.lines:
            nothing = Line("", 0.0, name=name, problem=f"{name}: no line was found.")
            return [make_row(nothing, name, page=key, by=by)]
        return [
            make_row(line, name, key=self._keep(crop), page=key, by=by)
            for line, crop in zip(page.lines, crops, strict=True)
        ]

    def _keep(self, picture: "Image.Image") -> str:
        key = key_of(picture)
        path = self.pictures / f"{key}.png"
        if not path.is_file():
            data = io.BytesIO()
            picture.save(data, "PNG")
            write_atomic(path, data.getvalue())
        return key

    def read_samples(self, reader: Any, **watched: Any) -> list[SavedLine]:
        """Read the built-in sample lines; their text is known, so it is put where corrections are.

        Args:
            reader: a Reader.
            watched: `progress` and `between`, as of `read`.

        Raises:
            DatasetError: this installation has no samples.
        """
        if not SAMPLES_FOLDER.is_dir():
            raise DatasetError("This installation has no sample lines.", "Name images of your own in `images`.")
        known = read_lines(SAMPLES_FOLDER)
        lines = self.read(reader, [str(line.picture) for line in known.lines], pages="lines", **watched)
        self._right = self._load("corrections.json", {})
        for line, truth in zip(lines, known.lines, strict=True):
            if line.right is None and line.key:
                self._right[line.key] = {"text": truth.text, "source": f"writer {truth.group}", "sample": "yes"}
        self._write_corrections()
        return self.lines()

    # --------------------------------------------------------------------------------------------- what is known

    def lines(self) -> list[SavedLine]:
        """The lines that were read last, in reading order; none before the first reading."""
        return [
            SavedLine(
                row["key"],
                self.pictures / f"{row['key']}.png",
                row["source"],
                Line.from_row(row),
                self._right.get(row["key"], {}).get("text"),
                row["page"],
            )
            for row in self._rows
        ]

    def correct(self, key: str, text: str | None) -> None:
        """Say what a line really says; None takes a correction back. Written at once.

        Raises:
            DatasetError: the session has no such line, or the text is empty.
        """
        row = next((row for row in self._rows if key and row["key"] == key), None)
        if row is None:
            raise DatasetError(f"The session {self.name} has no line {key!r}.", "Read the images first.")
        self._right = self._load("corrections.json", {})  # another notebook may have the session open too
        if text is None:
            self._right.pop(key, None)
        elif not text.strip():
            raise DatasetError("A line without text cannot be trained on.", "Type what it says, or undo the change.")
        else:
            kept = {"source": row["source"]} | self._right.get(key, {})
            self._right[key] = kept | {"text": " ".join(text.split())}
        self._write_corrections()

    def _write_corrections(self) -> None:
        content = json.dumps(self._right, indent=0, ensure_ascii=False, sort_keys=True)
        write_atomic(self.folder / "corrections.json", content.encode())
        self._write_text()

    def _write_text(self) -> None:
        rows = [{**line.read.as_row(), "text": line.text} for line in self.lines()]
        # An image that could not be read is not a line of the text; the table has it, with the reason.
        read = [row for row in rows if not row.get("problem")]
        write_atomic(self.folder / "text.txt", rows_to_bytes(read, "txt"))
        write_atomic(self.folder / "text.csv", rows_to_bytes(rows, "csv"))

    @property
    def has_corrections(self) -> bool:
        """Whether there is anything to learn from: a line that somebody said is right."""
        order = {row["key"] for row in self._rows}
        return any(key in order or "sample" not in entry for key, entry in self._right.items())

    def corrected(self) -> LineSet:
        """The corrected lines as a dataset, grouped by page or writer.

        From a single page, neighbouring lines are a group: held out together, they are at least not beside lines that
        were learned. The built-in samples count only while they are what was read last. Raises DatasetError when
        nothing is corrected yet.
        """
        order = {row["key"]: place for place, row in enumerate(self._rows)}
        right = {key: entry for key, entry in self._right.items() if key in order or "sample" not in entry}
        if not right:
            raise DatasetError("No line has been corrected yet.", "Correct some in the table above, or name a dataset.")
        sources = {entry["source"] for entry in right.values()}
        found = LineSet([], source=str(self.folder))
        for key in sorted(right, key=lambda key: (order.get(key, len(order)), key)):
            entry, place = right[key], order.get(key, len(order))
            # Images of single lines have a source each, and so do pages.
            group = entry["source"] if len(sources) > 1 else f"{entry['source']}, part {place // _BLOCK + 1}"
            found.lines.append(LabelledLine(f"{key}.png", self.pictures / f"{key}.png", entry["text"], group))
        return found
