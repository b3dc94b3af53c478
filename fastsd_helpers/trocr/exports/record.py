"""One page as it was read, with everything that a file format may ask for: size, regions, lines, words, places.

All places are pixels of the image as it was given and seen upright, from its top left corner.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from fastsd_helpers.trocr.model.line import Line

__all__ = ["PageRecord", "RecordLine", "Region", "Word", "place_words", "record_of", "settled"]

Point = tuple[float, float]
# What XML 1.0 cannot hold; a model may write it all the same.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NARROW, _WIDE = frozenset("iIjlt.,;:'!|()[]/"), frozenset("mwMW@%—")


@dataclass(frozen=True)
class Word:
    """A word of a line: its text, box (left, top, right, bottom), confidence (0..1), and whether the box is a guess."""

    text: str
    box: tuple[int, int, int, int]
    confidence: float
    estimated: bool = True


@dataclass(frozen=True)
class RecordLine:
    """A line: its text, how sure the reader was (0..1), its outline and the line its letters stand on."""

    text: str
    confidence: float
    polygon: tuple[tuple[int, int], ...]
    baseline: tuple[tuple[int, int], ...]
    words: tuple[Word, ...] = ()
    notes: tuple[str, ...] = ()
    alternatives: tuple[dict[str, Any], ...] = ()  # other texts with their log-probabilities, where asked for

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the outline."""
        return _bounds(self.polygon)


@dataclass(frozen=True)
class Region:
    """Lines that belong together, in reading order: `kind` is text or margin."""

    kind: str
    lines: tuple[RecordLine, ...]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of all its lines."""
        return _bounds([point for line in self.lines for point in line.polygon])


@dataclass(frozen=True)
class PageRecord:
    """A page that was read, or the reason why it could not be."""

    name: str
    file: str  # the name of the image's, or PDF's, own file
    size: tuple[int, int]  # width, height
    number: int = 1  # of this page in its file, from 1
    dpi: float | None = None
    turned: float = 0.0
    regions: tuple[Region, ...] = field(default=())
    problem: str | None = None
    changed: float = 0.0  # when the file was last changed, in seconds since 1970
    reader: str = ""

    @property
    def lines(self) -> list[RecordLine]:
        """All lines, in reading order."""
        return [line for region in self.regions for line in region.lines]

    def as_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PageRecord":
        """The record that `as_json` wrote."""
        regions = tuple(
            Region(region["kind"], tuple(_line_from(line) for line in region["lines"])) for region in values["regions"]
        )
        width, height = values["size"]
        return cls(**values | {"regions": regions, "size": (int(width), int(height))})


def _line_from(values: dict[str, Any]) -> RecordLine:
    words = tuple(
        Word(word["text"], _four(word["box"]), word["confidence"], word["estimated"]) for word in values["words"]
    )
    places = {name: tuple((int(x), int(y)) for x, y in values[name]) for name in ("polygon", "baseline")}
    return RecordLine(
        values["text"], values["confidence"], places["polygon"], places["baseline"], words, tuple(values["notes"]),
        tuple(values.get("alternatives", ())),
    )  # fmt: skip


def _four(box: Any) -> tuple[int, int, int, int]:
    left, top, right, bottom = (int(value) for value in box)
    return left, top, right, bottom


def record_of(page: Any, *, file: str, number: int = 1, dpi: float | None = None, **about: Any) -> PageRecord:
    """The record of a page as `read_page` gives it.

    Args:
        page: its `lines` have an outline and a baseline each; those that could not be read are left out.
        file: name of the image's or PDF's file.
        number: of the page in it.
        dpi: dots per inch, if known.
        about: other fields of the record.
    """
    width, height = page.size
    regions = []
    for (kind, _number), lines in groupby(page.lines, key=lambda line: line.region):
        made = tuple(_record_line(line, width, height) for line in lines if line.problem is None)
        if made:
            regions.append(Region(kind, made))
    return PageRecord(page.name, file, (width, height), number, dpi, page.turned, tuple(regions), page.problem, **about)


def _record_line(line: Line, width: int, height: int) -> RecordLine:
    corners = line.box or ((0, 0), (width, 0), (width, height), (0, height))
    baseline = line.baseline or (corners[3], corners[2])
    text = " ".join(_NO_XML.sub("", line.text).split())
    clean = dataclasses.replace(line, text=text, box=tuple(corners))
    words = tuple(
        Word(word, _bounds(_within(outline, width, height)), sure, estimated)
        for word, outline, sure, estimated in place_words(clean)
    )
    return RecordLine(
        text,
        round(line.confidence, 4),
        _within(line.polygon or corners, width, height),
        _within(baseline, width, height),
        words,
        line.notes,
        tuple({"text": other.text, "log_prob": round(other.log_prob, 6)} for other in line.alternatives),
    )


def _within(points: Any, width: int, height: int) -> tuple[tuple[int, int], ...]:
    """Whole pixels of the page: writing at its edge has corners outside."""
    return tuple((min(max(round(x), 0), width), min(max(round(y), 0), height)) for x, y in points)


def _bounds(points: Any) -> tuple[int, int, int, int]:
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    return min(xs), min(ys), max(xs), max(ys)


def place_words(line: Line) -> Iterator[tuple[str, list[Point], float, bool]]:
    """Divide a line with a box among its words: (text, four corners, confidence, whether the place is a guess).

    Where the reader's cross-attention is known (`line.centres`), words end halfway between it and the next word's;
    else each has the part of the line that its characters usually take.
    """
    words = line.text.split()
    if not words or line.box is None:
        return
    cuts = _cuts_seen(line, words)
    estimated = cuts is None
    parts = cuts if cuts is not None else _cuts_by_width(words)
    top_left, top_right, bottom_right, bottom_left = line.box
    # A line that is read from right to left has its first word at the right.
    if _is_rtl(line.text):
        parts = [(1 - right, 1 - left) for left, right in parts] if estimated else parts
    sure = _confidences(line, words)
    for word, (left, right), confidence in zip(words, parts, sure, strict=True):
        outline = [_between(top_left, top_right, left), _between(top_left, top_right, right),
                   _between(bottom_left, bottom_right, right), _between(bottom_left, bottom_right, left)]  # fmt: skip
        yield word, outline, confidence, estimated


def _is_rtl(text: str) -> bool:
    import unicodedata

    kinds = [unicodedata.bidirectional(letter) for letter in text]
    return sum(kind in ("R", "AL") for kind in kinds) > sum(kind == "L" for kind in kinds)


def _between(one: Point, other: Point, part: float) -> Point:
    return one[0] + part * (other[0] - one[0]), one[1] + part * (other[1] - one[1])


def _cuts_by_width(words: list[str]) -> list[tuple[float, float]]:
    widths = [sum(0.5 if c in _NARROW else 1.5 if c in _WIDE else 1.0 for c in word) for word in words]
    whole = sum(widths) + 0.6 * (len(words) - 1)
    parts, at = [], 0.0
    for width in widths:
        parts.append((at / whole, (at + width) / whole))
        at += width + 0.6
    return parts


def _tokens_of(line: Line, words: list[str]) -> list[list[int]] | None:
    """For each word the places of its tokens; None where the tokens' pieces do not spell the text."""
    owners = [place for place, word in enumerate(words) for _ in word]
    spelled: list[list[int]] = [[] for _ in words]
    letters, at = "".join(words), 0
    for index, token in enumerate(line.tokens):
        piece = "".join(token.text.split())
        if letters[at : at + len(piece)] != piece:
            return None
        for owner in dict.fromkeys(owners[at : at + len(piece)]):
            spelled[owner].append(index)
        at += len(piece)
    return spelled if at == len(letters) and all(spelled) else None


def _confidences(line: Line, words: list[str]) -> list[float]:
    spelled = _tokens_of(line, words)
    if spelled is None:
        return [round(line.confidence, 4)] * len(words)
    logs = [math.log(max(token.confidence, 1e-6)) for token in line.tokens]
    return [round(math.exp(sum(logs[at] for at in places) / len(places)), 4) for places in spelled]


def _cuts_seen(line: Line, words: list[str]) -> list[tuple[float, float]] | None:
    """The words' parts of the line by where the reader looked; None where that says nothing, or goes back and forth."""
    spelled = _tokens_of(line, words) if line.centres else None
    if spelled is None or not line.centres:
        return None
    middles = [sum(line.centres[at] for at in places) / len(places) for places in spelled]
    guessed = _cuts_by_width(words)
    if any(later <= earlier for earlier, later in pairwise(middles)):
        return None
    # Attention says where a word is, its characters how wide it may be: the cut lies between the two as widths ask.
    cuts = [0.0]
    for place in range(len(words) - 1):
        one, other = (right - left for left, right in guessed[place : place + 2])
        cuts.append(middles[place] + (middles[place + 1] - middles[place]) * one / max(one + other, 1e-6))
    cuts.append(1.0)
    gap = 0.25 * min(guessed[place + 1][0] - guessed[place][1] for place in range(len(words) - 1)) if words[1:] else 0.0
    return [(cuts[at] + (gap if at else 0), cuts[at + 1] - (gap if at + 1 < len(words) else 0))
            for at in range(len(words))]  # fmt: skip


def settled(record: PageRecord, least_confidence: float) -> tuple[PageRecord, int]:
    """The record with the text of less sure lines emptied, and how many those are; for txt and PDF."""
    unsure = sum(bool(line.text) and line.confidence < least_confidence for line in record.lines)
    if not unsure:
        return record, 0
    regions = tuple(
        Region(
            region.kind,
            tuple(
                line if line.confidence >= least_confidence else dataclasses.replace(line, text="", words=())
                for line in region.lines
            ),
        )
        for region in record.regions
    )
    return dataclasses.replace(record, regions=regions), unsure
