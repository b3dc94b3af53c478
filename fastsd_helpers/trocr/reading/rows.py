"""The rows of a reading session: what was read, by which model, and which of it need not be read again."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.files import remembered_sha256
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.pages.inputs import Item
from fastsd_helpers.trocr.pages.line_pieces import bounds_of
from fastsd_helpers.trocr.pages.page_reader import cut_lines, looks_like_page, open_detector

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "SavedLine",
    "as_jsonl",
    "carry_over",
    "chunks",
    "fingerprint",
    "fingerprint_by_place",
    "is_page",
    "key_of",
    "known_rows",
    "make_row",
    "not_among",
    "read_items",
    "runs_of",
    "unread_row",
]

_TOGETHER = 64  # single lines opened together
_SAME_PLACE = 0.7  # of the area of two lines that both have
_READ_BY = (".safetensors", ".bin", ".json")  # files of a model


@dataclass(frozen=True)
class SavedLine:
    """A line of the session: its image, what was read, and what a person says is right (None: nobody looked yet)."""

    key: str
    picture: Path
    source: str
    read: Line
    right: str | None = None
    page: str = ""  # of a line that was found on one: what stands for that page

    @property
    def text(self) -> str:
        """The best that is known: the correction, else what was read."""
        return self.read.text if self.right is None else self.right


def is_page(item: Item, pages: str) -> bool:
    """Whether an item is read as a page; with `pages` auto, what it looks like decides."""
    return pages == "pages" or (pages == "auto" and item.picture is not None and looks_like_page(item.picture))


def runs_of(items: Iterable[Item], pages: str) -> Iterator[tuple[bool, Iterator[Item]]]:
    """Divide items into runs of pages and of lines, in order, without opening more of them than needed."""
    return groupby(items, key=partial(is_page, pages=pages))


def read_items(reader: Any, items: Iterable[Item], pages: str, *, order: Any = "auto") -> Iterator[list[Line]]:
    """Read items one group after another: the lines of a page, or of some images of single lines.

    Args:
        pages: auto (each image is looked at), pages or lines.
        order: of a page's lines, see `cut_lines`.
    """
    detector: Any = None
    for is_page, found in runs_of(items, pages):
        if not is_page:
            for chunk in chunks(found, max(_TOGETHER, 8 * reader.batch_size)):
                yield reader.read(chunk)
            continue
        for item in found:
            if item.picture is None:
                logger.warning("%s", item.problem)
                yield [Line("", 0.0, name=item.name, problem=item.problem)]
                continue
            detector = detector or open_detector()
            page, _crops = cut_lines(
                reader, item.picture, name=item.name, detector=detector, order=order, or_line=pages == "auto"
            )
            yield list(page.lines) or [Line("", 0.0, name=item.name, problem=f"{item.name} has no lines.")]


def chunks(items: Iterator[Item], count: int) -> Iterator[list[Item]]:
    """Divide items into lists of `count`, the last one shorter."""
    while chunk := list(islice(items, count)):
        yield chunk


def key_of(picture: "Image.Image") -> str:
    """A line or page is known by the pixels of its picture."""
    picture = picture.convert("RGB")
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:20]


def make_row(line: Line, source: str, *, key: str = "", page: str = "", by: str = "") -> dict[str, Any]:
    """A row: what was read, from where, and by which model."""
    return {"key": key, "page": page, "by": by, "source": source, **line.as_row()}


def unread_row(item: Item, by: str) -> dict[str, Any]:
    """The row of an image that cannot be opened."""
    return make_row(Line("", 0.0, name=item.name, problem=item.problem), item.name, by=by)


def fingerprint(reader: Any, pages: str, order: str = "auto") -> str:
    """What a reading depends on besides the image: the weights, by what they hold, and every setting.

    A model that was downloaded again on a new machine is the same one.
    """
    files = [(path.name, remembered_sha256(path)) for path in _files_of(reader)]
    # An order that was asked for, and nothing where none was: readings of versions that had none are still found.
    more = [order] if order != "auto" else []
    return hashlib.sha256(repr([files, _settings_of(reader, pages), *more]).encode()).hexdigest()[:16]


def fingerprint_by_place(reader: Any, pages: str) -> str:
    """The same as versions before wrote it: by where the weights lie, their sizes and times."""
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _files_of(reader)]
    told = [str(reader.checkpoint.folder), weights, _settings_of(reader, pages)]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _files_of(reader: Any) -> list[Path]:
    return [path for path in sorted(reader.checkpoint.folder.rglob("*")) if path.suffix in _READ_BY]


def _settings_of(reader: Any, pages: str) -> list[Any]:
    settings = reader.settings
    # Only where it was given: readings of versions that did not know it are still this reader's.
    allowed = [settings.allowed_characters] if settings.allowed_characters else []
    language = [f"language {reader.language.digest}"] if reader.language is not None else []
    others = [f"n-best {settings.n_best}"] if settings.n_best > 1 else []
    known = [reader.checkpoint.precision, settings.beams, str(reader.limits), settings.loop_guard, pages]
    return [*known, *allowed, *language, *others]


def known_rows(
    known: Iterable[list[dict[str, Any]]], by: str, by_place: str
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """What this very model has read: rows of single lines by their key, and those of pages by the page's."""
    lines: dict[str, dict[str, Any]] = {}
    pages: dict[str, list[dict[str, Any]]] = {}
    for rows in known:
        same = [row | {"by": by} for row in rows if row.get("by") in (by, by_place)]
        lines |= {row["key"]: row for row in same if row["key"] and not row["page"]}
        pages |= {page: [row for row in same if row["page"] == page] for page in {row["page"] for row in same}}
    return lines, pages


def not_among(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose line, or page, the others do not have from the same model."""
    known = {(row["by"], row["page"] or row["key"]) for row in others}
    return [row for row in rows if (row["by"], row["page"] or row["key"]) not in known]


def carry_over(right: dict[str, Any], rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Let corrections follow lines whose images were cut otherwise before, as by an earlier version: in `right`.

    Returns:
        Whether there was any.
    """
    of_page: dict[str, list[dict[str, Any]]] = {}
    for other in others:
        if other["page"] and other.get("box") and other["key"] in right:
            of_page.setdefault(other["page"], []).append(other)
    moved = [
        (row["key"], other["key"])
        for row in rows
        for other in (of_page.get(row["page"], ()) if row.get("box") else ())
        if row["key"] != other["key"] and _overlap(row["box"], other["box"]) > _SAME_PLACE
    ]
    for key, other_key in moved:
        right.setdefault(key, right[other_key])
    for other_key in {other_key for _key, other_key in moved} - {row["key"] for row in rows}:
        del right[other_key]  # else it would be learned twice
    return bool(moved)


def _overlap(one: list[list[float]], other: list[list[float]]) -> float:
    """The share of two outlines' bounds that both have."""
    (a, b, c, d), (e, f, g, h) = bounds_of([(x, y) for x, y in one]), bounds_of([(x, y) for x, y in other])
    both = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    return both / max(1e-9, (c - a) * (d - b) + (g - e) * (h - f) - both)


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    """Rows as the content of a file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
