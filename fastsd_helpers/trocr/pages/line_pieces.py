"""Pieces of lines as a detector finds them, joined to lines where they lie side by side, whatever their slope.

A piece is a quadrilateral: its corners clockwise from where its writing begins, top left, in pixels.
"""

import math
from dataclasses import dataclass

__all__ = [
    "Box",
    "LinePlace",
    "Point",
    "Quad",
    "bounds_of",
    "height_of",
    "is_long",
    "join_pieces",
    "join_quads",
    "slope_of",
]

Point = tuple[float, float]
Quad = tuple[Point, Point, Point, Point]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_BESIDE = 0.6  # of the lower piece's height that both must have in common
_NEAR = 0.9  # of that height: the widest gap between words of one line
_OVER = 0.5  # of that height: how far words of one line may reach into each other
_INSIDE = 0.8  # of a piece's area: more of it within another piece, and it is a part of that
_AWRY = math.radians(20)  # pieces whose directions differ more are no words of one line
_TALL = 2.0  # height to width; writing of several letters that runs up or down the page
_LONG = 2.0  # width to height from which a piece says which way its line runs


@dataclass(frozen=True)
class LinePlace:
    """Where a line lies: its pieces along it, the rectangle around them in its direction, and whether that is turned.

    `turned` lines run up or down the page; their rectangle begins where the writing does if it runs upwards.
    """

    pieces: tuple[Quad, ...]
    corners: Quad
    turned: bool = False

    @property
    def box(self) -> Box:
        """Left, top, right, bottom."""
        return bounds_of(self.corners)

    @property
    def height(self) -> float:
        """Across the line."""
        return math.dist(self.corners[0], self.corners[3])

    @property
    def width(self) -> float:
        """Along the line."""
        return math.dist(self.corners[0], self.corners[1])

    def reversed(self) -> "LinePlace":
        """The same place, written the other way."""
        pieces = tuple((c, d, a, b) for a, b, c, d in reversed(self.pieces))
        a, b, c, d = self.corners
        return LinePlace(pieces, (c, d, a, b), self.turned)


def bounds_of(corners: "Quad | list[Point] | tuple[Point, ...]") -> Box:
    """Left, top, right, bottom of points."""
    xs, ys = [point[0] for point in corners], [point[1] for point in corners]
    return min(xs), min(ys), max(xs), max(ys)


def slope_of(quads: list[Quad]) -> float:
    """How many degrees to turn the page (anticlockwise) so that its long lines are level; the median decides."""
    slopes = [math.degrees(_angle(quad)) for quad in quads if is_long(quad)]
    return sorted(slopes)[len(slopes) // 2] if slopes else 0.0


def join_pieces(boxes: list[Box]) -> list[Box]:
    """Join boxes that are words of one line: side by side, at one height, nearly touching."""
    quads: list[Quad] = [((l, t), (r, t), (r, b), (l, b)) for l, t, r, b in boxes]  # noqa: E741
    return sorted(bounds_of([corner for quad in group for corner in quad]) for group in _groups(quads))


def join_quads(quads: list[Quad]) -> list[LinePlace]:
    """The lines of a page from the pieces that were found; tall pieces are lines that run up or down."""
    level = [quad for quad in quads if height_of(quad) < _TALL * _width(quad)]
    # A tall piece read upwards begins at its lower left corner.
    tall = [(quad[3], quad[0], quad[1], quad[2]) for quad in quads if height_of(quad) >= _TALL * _width(quad)]
    return [_place(group, False) for group in _groups(level)] + [_place(group, True) for group in _groups(tall)]


def _width(quad: Quad) -> float:
    return (math.dist(quad[0], quad[1]) + math.dist(quad[3], quad[2])) / 2


def height_of(quad: Quad) -> float:
    """Across the writing, the two ends' mean."""
    return (math.dist(quad[0], quad[3]) + math.dist(quad[1], quad[2])) / 2


def is_long(quad: Quad) -> bool:
    """Whether a piece is so long that it is several letters, and says which way its line runs."""
    return _width(quad) > 3 * height_of(quad)


def _angle(quad: Quad) -> float:
    """Direction of the writing, clockwise from level, in radians: the two edges' mean."""
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = quad
    return math.atan2(by - ay + cy - dy, bx - ax + cx - dx)


def _along(points: "Quad | list[Point] | tuple[Point, ...]", angle: float) -> tuple[list[float], list[float]]:
    """Places along and across a direction."""
    cos, sin = math.cos(angle), math.sin(angle)
    return [x * cos + y * sin for x, y in points], [y * cos - x * sin for x, y in points]


def _groups(quads: list[Quad]) -> list[list[Quad]]:
    groups = [[quad] for quad in sorted(quads)]
    at = 0
    while at < len(groups):
        other = next((late for late in range(at + 1, len(groups)) if _one_line(groups[at], groups[late])), None)
        if other is None:
            at += 1
            continue
        groups[at] += groups.pop(other)
        at = 0
    return groups


def _one_line(one: list[Quad], other: list[Quad]) -> bool:
    return any(_go_together(first, second) for first in one for second in other) and not _lie_over(one, other)


def _go_together(one: Quad, other: Quad) -> bool:
    long, short = (one, other) if _width(one) >= _width(other) else (other, one)
    angle = _angle(long)
    if _width(short) > _LONG * height_of(short):
        difference = abs(_angle(short) - angle)
        if min(difference, 2 * math.pi - difference) > _AWRY:
            return False
    low, common, gap = _compare([long], [short], angle)
    if _is_inside([long], [short], angle):
        return True
    return common > _BESIDE * low and -_OVER * low <= gap < _NEAR * low


def _compare(one: list[Quad], other: list[Quad], angle: float) -> tuple[float, float, float]:
    """The lower one's height, how much of it they share, and the gap between them along the line (negative: shared)."""
    (u, v), (s, t) = (_along([corner for quad in quads for corner in quad], angle) for quads in (one, other))
    low = min(height_of(quad) for quad in (*one, *other))
    common = min(max(v), max(t)) - max(min(v), min(t))
    return low, common, max(min(u), min(s)) - min(max(u), max(s))


def _is_inside(one: list[Quad], other: list[Quad], angle: float) -> bool:
    (u, v), (s, t) = (_along([corner for quad in quads for corner in quad], angle) for quads in (one, other))
    across = min(max(v), max(t)) - max(min(v), min(t))
    along = min(max(u), max(s)) - max(min(u), min(s))
    area = (max(s) - min(s)) * (max(t) - min(t))
    return across > 0 and along > 0 and across * along > _INSIDE * area


def _lie_over(one: list[Quad], other: list[Quad]) -> bool:
    """Whether pieces that were joined on both sides would lie one above the other."""
    if len(one) == len(other) == 1:
        return False
    for first in one:
        for second in other:
            angle = _angle(first if _width(first) >= _width(second) else second)
            low, common, gap = _compare([first], [second], angle)
            if gap < -_OVER * low and common < _INSIDE * low and not _is_inside([first], [second], angle):
                return True
    return False


def _place(group: list[Quad], turned: bool) -> LinePlace:
    """The line of pieces: its direction is theirs, the longer counting more."""
    cos = sum(_width(quad) * math.cos(_angle(quad)) for quad in group)
    sin = sum(_width(quad) * math.sin(_angle(quad)) for quad in group)
    if len(group) > 1:  # short pieces say little of the direction; their middles say more
        first, last = _ends(group, math.atan2(sin, cos))
        if math.dist(first, last) > _LONG * max(height_of(quad) for quad in group):
            length = sum(_width(quad) for quad in group)
            cos += length * (last[0] - first[0]) / math.dist(first, last)
            sin += length * (last[1] - first[1]) / math.dist(first, last)
    angle = math.atan2(sin, cos)
    pieces = tuple(sorted(group, key=lambda quad: sum(_along(quad, angle)[0])))
    us, vs = _along([corner for quad in group for corner in quad], angle)
    cos, sin = math.cos(angle), math.sin(angle)
    corners = tuple(
        (u * cos - v * sin, u * sin + v * cos)
        for u, v in ((min(us), min(vs)), (max(us), min(vs)), (max(us), max(vs)), (min(us), max(vs)))
    )
    return LinePlace(pieces, (corners[0], corners[1], corners[2], corners[3]), turned)


def _ends(group: list[Quad], angle: float) -> tuple[Point, Point]:
    middles = [(sum(x for x, _y in quad) / 4, sum(y for _x, y in quad) / 4) for quad in group]
    ordered = sorted(middles, key=lambda point: point[0] * math.cos(angle) + point[1] * math.sin(angle))
    return ordered[0], ordered[-1]
