"""The order in which a person would read what stands on a page: columns, the rows of a table, or from the right."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from fastsd_helpers.trocr.pages.line_pieces import Box

__all__ = ["Order", "choose_order", "order_boxes", "regions_of"]

Order = Literal["auto", "columns", "rows", "rtl"]

_FEW_ROWS = 3  # below, columns of equal heights say nothing
_LEVEL = 0.4  # of a line's height: cells of one row differ less
_ALIGNED = 0.8  # of the cells that must have one beside them in a table
_FULL = 0.8  # of a column's width: lines of running text fill more
_NARROW = 0.4  # of the widest column: a column at the edge that is narrower may be notes in the margin


def choose_order(boxes: Sequence[Box], texts: Sequence[str]) -> Order:
    """What `auto` means for a page: from the right where its letters are; rows where it is a table; else columns."""
    letters = [kind for text in texts for kind in map(_direction, text) if kind]
    if letters and letters.count("R") > len(letters) / 2:
        return "rtl"
    return "rows" if _is_table(list(boxes), dict(zip(boxes, texts, strict=True))) else "columns"


def _direction(letter: str) -> str:
    import unicodedata

    return {"L": "L", "R": "R", "AL": "R"}.get(unicodedata.bidirectional(letter), "")


def _is_table(boxes: list[Box], texts: dict[Box, str]) -> bool:
    """Whether the cells of all columns share their heights, and are no lines of running text."""
    if len(boxes) < 2 * _FEW_ROWS:
        return False
    least = _usual_height(boxes)
    columns = [column for column in _groups(boxes, 0, 0.0) if len(column) > 1]
    if len(columns) < 2 or min(map(len, columns)) < _FEW_ROWS:
        return False
    cells = [cell for column in columns for cell in column]
    beside = [
        all(any(abs(_middle(cell) - _middle(one)) < _LEVEL * least for one in other) for other in columns)
        for cell in max(columns, key=len)
    ]
    alone = [cell for cell in cells if not any(_same_row(cell, one, least) for one in cells if one is not cell)]
    if sum(beside) < _ALIGNED * len(beside) or len(alone) > (1 - _ALIGNED) * len(cells):
        return False
    if len(columns) == 2:  # two columns of verse look so too; sums, dates and numbers do not
        return any(_is_numbers([texts[cell] for cell in column]) for column in columns)
    lefts = [min(cell[0] for cell in column) for column in columns]
    pitch = [right - left for left, right in pairwise(lefts)]
    fill = [
        statistics.median(cell[2] - cell[0] for cell in column) / wide
        for column, wide in zip(columns, pitch, strict=False)
    ]
    return statistics.median(fill) < _FULL


def _same_row(one: Box, other: Box, least: float) -> bool:
    return abs(_middle(one) - _middle(other)) < _LEVEL * least


def _middle(box: Box) -> float:
    return (box[1] + box[3]) / 2


def _usual_height(boxes: Sequence[Box]) -> float:
    return statistics.median_high(box[3] - box[1] for box in boxes)


def _is_numbers(texts: list[str]) -> bool:
    marks = [letter for text in texts for letter in text if not letter.isspace()]
    return bool(marks) and sum(not letter.isalpha() for letter in marks) > 0.6 * len(marks)


def regions_of(boxes: list[Box], order: Order = "columns") -> list[tuple[str, list[Box]]]:
    """Divide a page into (text or margin, boxes in reading order); notes in a margin come after the text.

    Args:
        boxes: left, top, right, bottom of its lines.
        order: not auto, which needs what the lines say.
    """
    if order == "rows":
        return [("text", _rows(boxes))] if boxes else []
    margins = _margins(boxes)
    ordered = order_boxes([box for box in boxes if box not in margins], rtl=order == "rtl")
    found = [("text", ordered)] if ordered else []
    sides = sorted({side for side in margins.values()}, reverse=order == "rtl")
    for side in sides:
        found.append(("margin", sorted((box for box in margins if margins[box] == side), key=_middle)))
    return found


def _margins(boxes: list[Box]) -> dict[Box, int]:
    """Boxes of narrow columns beside the text at the page's edges: 0 left, 1 right."""
    if len(boxes) < 2 * _FEW_ROWS:
        return {}
    least = _usual_height(boxes)
    columns = _groups(boxes, 0, least)
    if len(columns) < 2:
        return {}
    widths = [max(box[2] for box in column) - min(box[0] for box in column) for column in columns]
    widest = widths.index(max(widths))
    found: dict[Box, int] = {}
    for side, place in ((0, 0), (1, len(columns) - 1)):
        column = columns[place]
        few = len(column) * 2 <= len(columns[widest])
        if place != widest and widths[place] < _NARROW * widths[widest] and few:
            found |= dict.fromkeys(column, side)
    return found


def _rows(boxes: list[Box], *, rtl: bool = False) -> list[Box]:
    """Row by row, each from its beginning; a row's height is that of its lines, which may wander."""
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=_middle):
        near = [row for row in rows[-2:] if _in_row(box, row)]
        if near:
            near[-1].append(box)
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row, key=lambda one: one[0], reverse=rtl)]


def _in_row(box: Box, row: list[Box]) -> bool:
    nearest = min(row, key=lambda one: max(one[0], box[0]) - min(one[2], box[2]))
    low = min(nearest[3] - nearest[1], box[3] - box[1])
    over = min(nearest[2], box[2]) - max(nearest[0], box[0])
    return abs(_middle(nearest) - _middle(box)) < 0.6 * low and over < 0.5 * low


def order_boxes(boxes: list[Box], *, rtl: bool = False) -> list[Box]:
    """Put boxes (left, top, right, bottom) in reading order: columns from left to right, each from top to bottom.

    A box across several columns (a heading) is read where it stands: what is above it before, what is below after.
    With `rtl` columns begin at the right.
    Source: the recursive X-Y cut (Nagy and Seth, 1984), with bands joined again while they share a gap.
    """
    if len(boxes) <= 1:
        return list(boxes)
    least = _usual_height(boxes)
    bands: list[list[Box]] = []
    for group in _groups(boxes, 1, 0.0):
        # Rows of two columns look like bands of their own; while the columns go on they belong together.
        if bands and _go_on(bands[-1], group, least):
            bands[-1] += group
        else:
            bands.append(list(group))
    ordered = []
    for band in bands:
        columns = _groups(band, 0, least)
        if len(columns) == 1:
            ordered += _rows(band, rtl=rtl)
        else:
            for column in reversed(columns) if rtl else columns:
                ordered += order_boxes(column, rtl=rtl)
    return ordered


def _go_on(one: list[Box], other: list[Box], least: float) -> bool:
    """Whether the columns of a band go on in the next one below."""
    together, most = len(_groups([*one, *other], 0, least)), max(len(_groups(band, 0, least)) for band in (one, other))
    if together == 1 or not _shares_gap(one, other, least):
        return False
    # A short heading beside the lines below it would be a column of its own: only lines that are near may be one.
    return together == most or min(box[1] for box in other) - max(box[3] for box in one) <= least / 2


def _shares_gap(one: list[Box], other: list[Box], least: float) -> bool:
    """Whether the upper of two bands has columns, or is a part of a column of both together."""
    together = _groups([*one, *other], 0, least)
    spans = [(min(box[0] for box in group), max(box[2] for box in group)) for group in together]
    return all(any(left <= box[0] and box[2] <= right for left, right in spans) for box in (*one, *other))


def _groups(boxes: list[Box], axis: int, least: float) -> list[list[Box]]:
    """Split boxes where no box lies, for more than `least` pixels, along x (axis 0) or y (axis 1)."""
    groups: list[list[Box]] = []
    end = -math.inf
    for box in sorted(boxes, key=lambda box: box[axis]):
        if not groups or box[axis] - end > least:
            groups.append([])
        groups[-1].append(box)
        end = max(end, box[axis + 2])
    return groups
