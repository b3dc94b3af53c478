"""A page with its lines marked, as PAGE and ALTO describe it: image, size, outlines, baselines, texts, in order."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter

__all__ = ["MarkedLine", "MarkedPage", "Placed", "bounds_of", "in_order", "parse_points", "rectangle"]

Point = tuple[float, float]
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FARTHEST = 1_000_000  # pixels; numbers beyond are slips


@dataclass(frozen=True)
class MarkedLine:
    """One line: its id, text, outline (3 points or more) and baseline in the units of the page; or what it lacks."""

    id: str
    text: str
    outline: tuple[Point, ...]
    baseline: tuple[Point, ...] = ()
    region: str = ""


# The place of a line in the reading order: that of its region, then its own.
Placed = tuple[tuple[int, ...], MarkedLine]


@dataclass(frozen=True)
class MarkedPage:
    """One page: the image it names, its size in the units of its points (0 where it does not say), lines in order.

    `number` is the page's in a TIFF or PDF, from 1; of others it says nothing.
    """

    image: str
    size: tuple[float, float]
    lines: tuple[MarkedLine, ...]
    in_pixels: bool = True
    number: int = 1


def in_order(found: Iterable[Placed]) -> tuple[MarkedLine, ...]:
    """The lines by their places; of one place as they stand in the file."""
    return tuple(line for _place, line in sorted(found, key=itemgetter(0)))


def parse_points(text: str) -> tuple[Point, ...]:
    """Points as PAGE and ALTO write them: `x,y x,y`, `x y x y` or `x,y,x,y`; numbers no page can have are left out."""
    numbers = [float(number) for number in _NUMBER.findall(text or "")]
    pairs = zip(numbers[::2], numbers[1::2], strict=False)
    return tuple((x, y) for x, y in pairs if all(math.isfinite(v) and abs(v) <= _FARTHEST for v in (x, y)))


def rectangle(left: float, top: float, width: float, height: float) -> tuple[Point, ...]:
    """The corners of an upright rectangle, from the top left one clockwise."""
    right, bottom = left + width, top + height
    return (left, top), (right, top), (right, bottom), (left, bottom)


def bounds_of(points: tuple[Point, ...]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of points."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)
