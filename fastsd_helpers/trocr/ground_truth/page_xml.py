"""Read PAGE XML of any year (2010 to 2019, Transkribus' own 2013 dialect) as a page with its lines marked.

Source: PRImA's pagecontent.xsd of 2010-03-19 to 2019-07-15; what programs write beside it: Transkribus' `custom`
attribute, coordinates as Point elements, text at words alone.
"""

import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element

from fastsd_helpers.trocr.ground_truth.marked_page import (
    MarkedLine,
    MarkedPage,
    Placed,
    Point,
    bounds_of,
    in_order,
    parse_points,
)
from fastsd_helpers.trocr.ground_truth.marked_page import rectangle as rectangle_of

__all__ = ["read_page_xml"]

_ORDER = re.compile(r"readingOrder\s*\{[^}]*?index\s*:\s*(\d+)")
_PAGE_NUMBER = re.compile(r"pageNumber\s*\{[^}]*?value\s*:\s*(\d{1,6})")
_LAST = 10**9


def read_page_xml(root: Element) -> list[MarkedPage]:
    """The pages of a PcGts element: one, in files that keep to the format."""
    return [_read_page(page) for page in root.iter("Page")]


def _read_page(page: Element) -> MarkedPage:
    size = (_number(page.get("imageWidth")), _number(page.get("imageHeight")))
    lines = in_order(_lines_in(page, "", (), _order_of_regions(page)))
    number = _PAGE_NUMBER.search(page.get("custom", ""))
    return MarkedPage(page.get("imageFilename", ""), size, lines, number=int(number[1]) if number else 1)


def _lines_in(element: Element, region: str, key: tuple[int, ...], places: dict[str, int]) -> Iterator[Placed]:
    for number, child in enumerate(element):
        if child.tag == "TextLine":
            yield (*key, _custom_order(child), number), _read_line(child, region)
        elif child.tag.endswith("Region") or child.tag == "TableCell":
            name = child.get("id", "")
            place = places.get(name, _LAST if places else _custom_order(child))
            yield from _lines_in(child, name, (*key, place, number), places)


def _order_of_regions(page: Element) -> dict[str, int]:
    """Region id -> place, from the ReadingOrder element, whose groups may lie in groups."""
    places: dict[str, int] = {}
    order = page.find("ReadingOrder")
    for group in order if order is not None else ():
        for region in _references(group):
            places.setdefault(region, len(places))
    return places


def _references(group: Element) -> Iterator[str]:
    if group.get("regionRef"):
        yield group.get("regionRef", "")
    children = list(group)
    if any(child.get("index") for child in children):
        children.sort(key=lambda child: _number(child.get("index")))
    for child in children:
        yield from _references(child)


def _custom_order(element: Element) -> int:
    """The place in Transkribus' custom attribute; lines without one keep to the order of the file."""
    match = _ORDER.search(element.get("custom", ""))
    return int(match[1][:9]) if match else 0 if element.get("index") is None else int(_number(element.get("index")))


def _read_line(line: Element, region: str) -> MarkedLine:
    outline = _points(line.find("Coords"))
    if len(outline) < 3:
        outline = _around(line.findall("Word"))
    return MarkedLine(line.get("id", ""), _text_of(line), outline, _points(line.find("Baseline")), region)


def _points(element: Element | None) -> tuple[Point, ...]:
    if element is None:
        return ()
    if element.get("points"):
        return parse_points(element.get("points", ""))
    # The format of 2010 has an element for each point.
    return parse_points(" ".join(f"{point.get('x')},{point.get('y')}" for point in element.iter("Point")))


def _around(words: list[Element]) -> tuple[Point, ...]:
    points = tuple(point for word in words for point in _points(word.find("Coords")))
    if not points:
        return ()
    left, top, right, bottom = bounds_of(points)
    return rectangle_of(left, top, right - left, bottom - top)


def _text_of(line: Element) -> str:
    """The line's own text, the first choice of several; else that of its words."""
    own = _equivalent(line)
    if own.strip():
        return own
    words = sorted(enumerate(line.findall("Word")), key=lambda item: (_custom_order(item[1]), item[0]))
    return " ".join(filter(None, (_equivalent(word).strip() for _number, word in words)))


def _equivalent(element: Element) -> str:
    choices = element.findall("TextEquiv")
    # Index 0 is the text itself; others are readings of it.
    choices.sort(key=lambda choice: _number(choice.get("index")))
    for choice in choices:
        for kind in ("Unicode", "PlainText"):
            text = choice.findtext(kind)
            if text and text.strip():
                return text
    return ""


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
