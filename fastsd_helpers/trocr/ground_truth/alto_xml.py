"""Read ALTO 2 to 4 as pages with their lines marked.

Source: the Library of Congress' alto.xsd 2.0 to 4.4; what programs write beside it: points with blanks for commas, a
baseline that is one number, Strings with no SP between them, pages without a size, units other than pixels.
"""

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
    rectangle,
)

__all__ = ["read_alto"]

_LAST = 10**9


def read_alto(root: Element) -> list[MarkedPage]:
    """The pages of an alto element; all of them are of the image that the description names, or of their own."""
    image = (root.findtext("Description/sourceImageInformation/fileName") or "").strip()
    unit = (root.findtext("Description/MeasurementUnit") or "pixel").strip().lower()
    places = _places(root)
    return [_read_page(page, image, unit == "pixel", places) for page in root.iter("Page")]


def _places(root: Element) -> dict[str, int]:
    """Id of a block or line -> place, from the ReadingOrder of ALTO 4.3 and newer."""
    order = root.find("ReadingOrder")
    references = order.iter("ElementRef") if order is not None else ()
    places: dict[str, int] = {}
    for reference in references:
        places.setdefault(reference.get("REF", ""), len(places))
    return places


def _read_page(page: Element, image: str, in_pixels: bool, places: dict[str, int]) -> MarkedPage:
    size = (_number(page.get("WIDTH")) or 0.0, _number(page.get("HEIGHT")) or 0.0)
    number = page.get("PHYSICAL_IMG_NR", "")
    lines = in_order(_lines_in(page, "", (), places))
    return MarkedPage(image, size, lines, in_pixels, int(number[:6]) if number.isascii() and number.isdecimal() else 1)


def _lines_in(element: Element, region: str, key: tuple[int, ...], places: dict[str, int]) -> Iterator[Placed]:
    for number, child in enumerate(element):
        name = child.get("ID", "")
        # What the order does not name comes after what it names, as it stands in the file.
        place = (*key, places.get(name, _LAST), number)
        if child.tag == "TextLine":
            yield place, _read_line(child, region)
        elif child.tag in ("PrintSpace", "ComposedBlock", "TextBlock") or child.tag.endswith("Margin"):
            # The order names blocks, whichever part of the page they lie in.
            below = place if child.tag in ("ComposedBlock", "TextBlock") else (*key,)
            yield from _lines_in(child, name if child.tag == "TextBlock" else region, below, places)


def _read_line(line: Element, region: str) -> MarkedLine:
    outline = parse_points(polygon.get("POINTS", "") if (polygon := line.find("Shape/Polygon")) is not None else "")
    if len(outline) < 3:
        outline = _box(line)
    if len(outline) < 3:
        corners = tuple(point for word in line.findall("String") for point in _box(word))
        if corners:
            left, top, right, bottom = bounds_of(corners)
            outline = rectangle(left, top, right - left, bottom - top)
    return MarkedLine(line.get("ID", ""), _text_of(line), outline, _baseline(line, outline), region)


def _box(element: Element) -> tuple[Point, ...]:
    left, top, width, height = (_number(element.get(name)) for name in ("HPOS", "VPOS", "WIDTH", "HEIGHT"))
    if left is None or top is None or not width or not height:
        return ()
    return rectangle(left, top, width, height)


def _baseline(line: Element, outline: tuple[Point, ...]) -> tuple[Point, ...]:
    text = line.get("BASELINE", "")
    points = parse_points(text)
    if not points and outline and (level := _number(text)) is not None:
        left, _top, right, _bottom = bounds_of(outline)
        return (left, level), (right, level)
    return points


def _text_of(line: Element) -> str:
    """The Strings with a blank where an SP stands; where there is no SP at all, between all of them."""
    pieces = [child for child in line if child.tag in ("String", "SP", "HYP")]
    spaced = any(piece.tag == "SP" for piece in pieces)
    text = ""
    for piece in pieces:
        if piece.tag == "SP":
            text += " "
        else:
            gap = " " if text and not spaced and piece.tag == "String" else ""
            text += gap + piece.get("CONTENT", "-" if piece.tag == "HYP" else "")
    return text


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
