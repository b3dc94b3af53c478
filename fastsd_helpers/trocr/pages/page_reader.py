"""Whole pages: find the lines, cut each as it lies, put them in the order a person would read them, read them.

Lines are found by the detector that ships inside the package rapidocr (PP-OCR's, no download); turning the page
upright, joining, cutting and the order are ours.
"""

import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import DatasetError, needs_package
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.pages.inputs import Item
from fastsd_helpers.trocr.pages.line_images import (
    baseline_of,
    clip_line,
    clip_outline,
    cut_outline,
    outline_of,
    paper_of,
)
from fastsd_helpers.trocr.pages.line_pieces import (
    Box,
    LinePlace,
    Point,
    Quad,
    bounds_of,
    height_of,
    is_long,
    join_quads,
    slope_of,
)
from fastsd_helpers.trocr.pages.reading_order import Order, choose_order, regions_of

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Page",
    "cut_lines",
    "find_lines",
    "looks_like_page",
    "open_detector",
    "read_page",
    "turn_back",
]

_FAINT, _SURE = 0.3, 0.5  # of the detector's score: the least for a long piece, and for any
_SPECK = 0.8  # of the usual height: what is smaller from corner to corner is no writing
_THIN_PX = 4
_PAGE_LEAST_PX = 200
_PAGE_WIDEST = 2.5  # width to height; lines are wider, pages and columns are not
_SAMPLE = 8  # lines reviewed to tell which way up a page is
_AS_IS = 0.05  # of confidence, in favour of the page as it is: most are upright
_CLEAR, _VOTE = 0.8, 0.2  # difference of the votes that decides alone; their weight beside the model's confidence
_SLOPE_FROM = 6.0  # degrees, from which lines are found better on a page that was set level
_LITTLE_PX = 500  # an image lower than that in which nothing is found is taken for a line
_BASELINE = 0.78  # of a line's height, until its ink is seen
_APART = 0.3  # of the lower line's height that lines one above the other have in common at most


@dataclass(frozen=True)
class Page:
    """A page as read: its lines in order, how far its writing is turned (degrees, anticlockwise), or why not."""

    name: str
    lines: tuple[Line, ...]
    turned: float
    size: tuple[int, int]
    problem: str | None = None

    @property
    def text(self) -> str:
        """All lines, one below the other."""
        return "\n".join(line.text for line in self.lines)


def looks_like_page(picture: "Image.Image") -> bool:
    """Whether an image may be a page: by its shape, or because ink lies in rows one below the other.

    What `cut_lines` finds there decides; an image for which this is False is a line for certain.
    """
    if picture.height >= _PAGE_LEAST_PX and picture.width < _PAGE_WIDEST * picture.height:
        return True
    return _has_rows(picture)


def _has_rows(picture: "Image.Image") -> bool:
    """Whether there are two bands of ink of like height with paper between them, both over much of the width."""
    import numpy as np
    from PIL import Image

    if picture.height < 48:
        return False
    small = picture.convert("L").resize((256, min(picture.height, 400)), Image.Resampling.BOX)
    values = np.asarray(small, np.float32)
    away = np.abs(values - np.median(values))
    ink = away > max(12.0, 0.4 * float(np.percentile(away, 99)))
    rows = ink.sum(1)
    strong = rows > 0.15 * max(1, int(np.percentile(rows, 95)))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], strong.astype(np.int8), [0]])))
    bands = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    largest = max((b - a for a, b in bands), default=0)
    like = [(a, b) for a, b in bands if b - a >= max(4, 0.4 * largest)]
    return sum(ink[a:b].any(0).sum() > 0.2 * ink.shape[1] for a, b in like) > 1


def read_page(
    reader: Any, picture: "Image.Image", *, name: str = "page", detector: Any = None, order: Order = "auto"
) -> Page:
    """Read one page; places of its lines are in the pixels of the image given.

    Args:
        reader: an open `Reader`.
        picture: the whole page, in RGB.
        name: of the page, for messages and results.
        detector: finds the lines; PP-OCR's is loaded for this page when None.
        order: columns; rows, for tables and ledgers; rtl: right to left; auto: what the boxes look like.

    Returns:
        Its lines in reading order, each with text, confidence and the four corners of its box in pixels (x to the
        right, y down), and the angle by which the page was turned.

    Raises:
        DependencyMissing: rapidocr, which finds the lines, is not installed.
    """
    return cut_lines(reader, picture, name=name, detector=detector, order=order)[0]


def cut_lines(
    reader: Any,
    picture: "Image.Image",
    *,
    name: str = "page",
    detector: Any = None,
    order: Order = "auto",
    or_line: bool = False,
) -> "tuple[Page, list[Image.Image]]":
    """Read one page, and give the image of each of its lines too, cut out of the page and set level.

    Args:
        reader: a Reader.
        picture: RGB.
        order: columns, rows (tables and ledgers), rtl, or auto: what the page looks like.
        or_line: it may be a single line; then it is read as one, uncut.
    """
    detector = detector or open_detector()
    found = find_lines(picture, detector)
    if or_line and _is_line(found, picture):
        (line,) = reader.read([Item(name, picture)])
        return Page(name, (line,), 0.0, picture.size), [picture]
    upright, quarter, quads = _stand_up(reader, picture, detector, found)
    slope = slope_of(quads)
    sheet = _Sheet(picture, upright.size, quarter)
    if abs(slope) >= _SLOPE_FROM:
        from PIL import Image

        level = upright.rotate(slope, resample=Image.Resampling.BICUBIC, expand=True, fillcolor=paper_of(upright))
        quads, sheet = find_lines(level, detector), _Sheet(picture, upright.size, quarter, level.size, slope)
    placed = _read_places(reader, sheet, join_quads(quads), name)
    lines: list[Line] = []
    crops = []
    for (line, place, cut), region in _in_order(placed, slope_of(quads), order):
        label = f"{name}, line {len(lines) + 1}"
        box = tuple((round(x, 1), round(y, 1)) for x, y in sheet.back(place.corners))
        lines.append(replace(line, name=label, box=box, polygon=cut.outline, baseline=cut.baseline, region=region))
        crops.append(cut.picture)
    return Page(name, tuple(lines), round(quarter + slope, 2), picture.size), crops


@dataclass(frozen=True)
class _Cut:
    """A line as it was cut out of the image given: in whole pixels of that, as files have them."""

    outline: tuple[tuple[int, int], ...]
    baseline: tuple[tuple[int, int], ...]
    picture: "Image.Image"


@dataclass(frozen=True)
class _Sheet:
    """A page's image as it was given, and how it was turned to find its lines: by quarters, then until level."""

    picture: "Image.Image"
    upright: tuple[int, int]  # its size, turned by quarters
    quarter: float = 0.0
    level: tuple[int, int] = (0, 0)
    slope: float = 0.0

    def back(self, points: Any) -> tuple[Point, ...]:
        """Points of the turned page on the image as it was given."""
        level = [turn_back(point, self.level, self.upright, self.slope) for point in points]
        return tuple(turn_back(point, self.upright, self.picture.size, self.quarter) for point in level)

    def cut(self, place: LinePlace) -> _Cut | None:
        """Cut a line out of the image as it was given, once resampled at most; None where nothing of it lies there."""
        size = self.picture.size
        outline = clip_outline(self.back(outline_of(place)), size)
        try:
            # Where its letters stand does not change which way it runs, except by what whole pixels round off.
            usual = clip_line(self.back(_baseline(place, _BASELINE)), size)
            picture = cut_outline(self.picture, outline, usual)
            # The image has a margin around the place.
            pad = (picture.height - place.height) / 2
            part = (baseline_of(picture) * picture.height - pad) / max(1.0, place.height)
            found = clip_line(self.back(_baseline(place, part)), size)
            return _Cut(outline, found, cut_outline(self.picture, outline, found))
        except DatasetError:
            return None


def _is_line(quads: list[Quad], picture: "Image.Image") -> bool:
    """Whether nothing lies above anything else, and the one line is not turned."""
    places = join_quads(quads)
    # Letters larger than the detector knows leave it with specks.
    if sum(place.width * place.height for place in places) < 0.01 * picture.width * picture.height:
        return picture.height < _LITTLE_PX
    if any(place.turned for place in places):
        return False
    boxes = [place.box for place in places]
    if any(_are_apart(one, other) for one in boxes for other in boxes):
        return False
    wide = max(box[2] for box in boxes) - min(box[0] for box in boxes)
    high = max(box[3] for box in boxes) - min(box[1] for box in boxes)
    # A line or two words on a large sheet are cut out: the sheet, made small, would leave nothing to read.
    return wide > picture.width / 2 or high > picture.height / 3


def _are_apart(one: Box, other: Box) -> bool:
    common = min(one[3], other[3]) - max(one[1], other[1])
    return common < _APART * min(one[3] - one[1], other[3] - other[1])


_Placed = tuple[Line, LinePlace, _Cut]


def _read_places(reader: Any, sheet: _Sheet, places: list[LinePlace], name: str) -> list[_Placed]:
    """Read lines where they lie; of those that run up or down the page, the way that the reader is surer of."""
    tries = [way for place in places for way in ([place, place.reversed()] if place.turned else [place])]
    cuts = [(place, cut) for place in tries if (cut := sheet.cut(place)) is not None]
    read = reader.read([Item(name, cut.picture) for _place, cut in cuts]) if cuts else []
    best: dict[frozenset[Any], _Placed] = {}
    for line, (place, cut) in zip(read, cuts, strict=True):
        key = frozenset(place.corners)  # both ways round
        if key not in best or line.confidence > best[key][0].confidence:
            best[key] = line, place, cut
    return list(best.values())


def _in_order(placed: list[_Placed], slope: float, order: Order) -> Iterator[tuple[_Placed, tuple[str, int]]]:
    """The lines in reading order, each with its region: (text or margin, number from 1)."""
    turn = math.radians(-slope)
    cos, sin = math.cos(turn), math.sin(turn)
    boxes: list[Box] = []
    for _line, place, _cut in placed:
        left, top, right, bottom = bounds_of([(x * cos + y * sin, y * cos - x * sin) for x, y in place.corners])
        boxes.append((left, top, right, bottom + 1e-6 * len(boxes)))  # so that no two are the same
    owners = dict(zip(boxes, placed, strict=True))
    plain = [box for box in boxes if not owners[box][1].turned]
    if order == "auto":
        order = choose_order(plain, [owners[box][0].text for box in plain])
    regions = regions_of(plain, order)
    # What runs up or down beside the text is a note in the margin.
    beside = sorted((box for box in boxes if owners[box][1].turned), key=lambda box: (box[0], box[1]))
    regions += [("margin", [box]) for box in beside]
    for number, (kind, group) in enumerate(regions, 1):
        for box in group:
            yield owners[box], (kind, number)


def _baseline(place: LinePlace, part: float) -> list[tuple[float, float]]:
    a, b, c, d = place.corners
    return [(one[0] + part * (two[0] - one[0]), one[1] + part * (two[1] - one[1])) for one, two in ((a, d), (b, c))]


def open_detector() -> Any:
    """Load the line detector; once for many pages. It has `OMP_NUM_THREADS` threads, or as many as there are cores.

    Raises:
        DependencyMissing: rapidocr or onnxruntime is not installed.
    """
    with needs_package("Finding the lines of a page", "Run: fastsd install trocr, or give images of single lines."):
        import onnxruntime  # noqa: F401  rapidocr looks for it at the first page only, and fails with an error of its own
        from rapidocr import RapidOCR
    threads = os.environ.get("OMP_NUM_THREADS", "")  # onnxruntime does not heed it by itself
    known = threads.isdigit() and int(threads) > 0
    counts = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": int(threads) for kind in ("intra", "inter") if known}
    return RapidOCR(params={"Global.log_level": "critical", "Det.box_thresh": _FAINT, **counts})


def find_lines(picture: "Image.Image", detector: Any = None) -> list[Quad]:
    """Find pieces of lines: four corners each, in pixels, clockwise from the top left one of the writing."""
    import numpy as np

    detector = detector or open_detector()
    found = detector(np.asarray(picture)[:, :, ::-1], use_det=True, use_cls=False, use_rec=False)
    quads = [_quad(box) for box in (found.boxes if found.boxes is not None else [])]
    scores = found.scores if getattr(found, "scores", None) is not None else [1.0] * len(quads)
    # In dense writing the network is unsure of whole lines; what it is unsure of and short is a stain.
    kept = [quad for quad, sure in zip(quads, scores, strict=True) if sure >= _SURE or is_long(quad)]
    usual = statistics.median([height_of(quad) for quad in kept]) if kept else 0.0
    return [
        quad
        for quad in kept
        if math.dist(quad[0], quad[2]) > _SPECK * usual
        and min(math.dist(quad[0], quad[1]), height_of(quad)) >= _THIN_PX
    ]


def _quad(box: Any) -> Quad:
    a, b, c, d = ((float(x), float(y)) for x, y in box)
    return a, b, c, d


def _stand_up(
    reader: Any, picture: "Image.Image", detector: Any, quads: list[Quad]
) -> tuple["Image.Image", float, list[Quad]]:
    """Turn the page by quarters until its writing is upright, and find its lines: tall boxes mean sideways.

    Which of two ways is up: the detector's package has a network for that, made for print; where its votes are divided,
    how sure the model is of its lines counts too.
    """
    if not quads:
        return picture, 0.0, quads
    # Marks of a letter or two say nothing; long pieces do.
    wide = [right - left for left, _top, right, _bottom in map(bounds_of, quads)]
    high = [bottom - top for _left, top, _right, bottom in map(bounds_of, quads)]
    tall = sum(h * h for w, h in zip(wide, high, strict=True) if h > 1.5 * w)
    sideways = tall > sum(w * w for w, h in zip(wide, high, strict=True) if w > 1.5 * h)
    first_angle = 90.0 if sideways else 0.0
    one = picture.rotate(first_angle, expand=True) if sideways else picture
    quads = find_lines(one, detector) if sideways else quads
    pages, samples = [one, one.rotate(180)], []
    # The same lines upside down: finding them is most of what a page costs.
    for page, found in zip(pages, (quads, _upside_down(quads, one.size)), strict=True):
        longest = sorted(join_quads(found), key=lambda place: -place.width)[:_SAMPLE]
        cuts = (_Sheet(page, page.size).cut(place) for place in longest if not place.turned)
        samples.append([cut.picture for cut in cuts if cut is not None])
    first, other = (_upright_votes(crops, detector) for crops in samples)
    if abs(first - other) < _CLEAR:
        read = [reader.read([Item("sample", crop) for crop in crops]) for crops in samples]
        sure = [sum(line.confidence for line in lines) / max(1, len(lines)) for lines in read]
        first, other = sure[0] + _VOTE * first + _AS_IS, sure[1] + _VOTE * other
    if first >= other:
        return one, first_angle, quads
    return pages[1], first_angle + 180, find_lines(pages[1], detector)


def _upside_down(quads: list[Quad], size: tuple[int, int]) -> list[Quad]:
    """The same places on the page turned by 180 degrees."""
    width, height = size

    def turned(point: Point) -> Point:
        return width - point[0], height - point[1]

    return [(turned(c), turned(d), turned(a), turned(b)) for a, b, c, d in quads]


def _upright_votes(crops: "list[Image.Image]", detector: Any) -> float:
    """What a network for the direction of text makes of lines: 1 all upright, -1 all upside down."""
    import numpy as np

    votes = 0.0
    for crop in crops:
        found = detector(np.asarray(crop.convert("RGB"))[:, :, ::-1], use_det=False, use_cls=True, use_rec=False)
        ((label, score),) = found.cls_res
        votes += float(score) if label == "0" else -float(score)
    return votes / max(1, len(crops))


def turn_back(
    point: tuple[float, float], size: tuple[int, int], before: tuple[int, int], angle: float
) -> tuple[float, float]:
    """Where a point of a turned image (PIL's rotate, expand) was in the image before."""
    if not angle:
        return point
    x, y = point[0] - size[0] / 2, point[1] - size[1] / 2
    turn = math.radians(angle)
    return (
        x * math.cos(turn) - y * math.sin(turn) + before[0] / 2,
        x * math.sin(turn) + y * math.cos(turn) + before[1] / 2,
    )
