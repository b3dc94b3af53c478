"""Whole pages: find the lines, put them in the order a person would read them, read them.

Lines are found by the detector that ships inside the package rapidocr (PP-OCR's, no download); turning the page
upright, taking off its slope, the order and the cutting are ours.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import needs_package
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.pages.inputs import Item, gather

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Page",
    "cut_lines",
    "find_lines",
    "join_pieces",
    "looks_like_page",
    "open_detector",
    "order_boxes",
    "read_page",
    "read_pages",
    "turn_back",
]

logger = logging.getLogger("fastsd_helpers")

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
_PAGE_LEAST_PX = 200
_PAGE_WIDEST = 2.5  # width to height; lines are wider, pages and columns are not
_SAMPLE = 8  # lines reviewed to tell which way up a page is
_AS_IS = 0.05  # of confidence, in favour of the page as it is: most are upright
_CLEAR, _VOTE = 0.8, 0.2  # difference of the votes that decides alone; their weight beside the model's confidence
_SLOPE_FROM = 0.3  # degrees; below, turning the image costs more sharpness than it gains


@dataclass(frozen=True)
class Page:
    """A page as read: its lines in order, how far it was turned (degrees, anticlockwise), or why it could not be."""

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
    """Whether an image is a page rather than a line: not much wider than high, and high enough for several lines."""
    return picture.height >= _PAGE_LEAST_PX and picture.width < _PAGE_WIDEST * picture.height


def read_pages(reader: Any, sources: Any) -> Iterator[Page]:
    """Read pages one by one: images, folders, PDFs, links; see `pictures.gather`.

    Raises:
        DependencyMissing: rapidocr is not installed.
    """
    detector = open_detector()
    for item in gather(sources):
        if item.picture is None:
            logger.warning("%s", item.problem)
            yield Page(item.name, (), 0.0, (0, 0), item.problem)
        else:
            yield read_page(reader, item.picture, name=item.name, detector=detector)


def read_page(reader: Any, picture: "Image.Image", *, name: str = "page", detector: Any = None) -> Page:
    """Read one page; every line's `box` has its corners in the pixels of the image given."""
    return cut_lines(reader, picture, name=name, detector=detector)[0]


def cut_lines(
    reader: Any, picture: "Image.Image", *, name: str = "page", detector: Any = None
) -> "tuple[Page, list[Image.Image]]":
    """Read one page, and give the image of each of its lines too, cut out of the page as it was straightened."""
    from PIL import Image

    detector = detector or open_detector()
    upright, quarter = _stand_up(reader, picture, detector)
    corners = find_lines(upright, detector)
    slope = _slope(corners)
    level = upright
    if abs(slope) >= _SLOPE_FROM:
        level = upright.rotate(slope, resample=Image.Resampling.BILINEAR, expand=True, fillcolor="white")
        corners = find_lines(level, detector)
    boxes = join_pieces([_bounds(box) for box in corners])
    ordered = order_boxes(boxes)
    crops = [Item(f"{name}, line {place + 1}", _cut(level, box)) for place, box in enumerate(ordered)]
    read = reader.read(crops) if crops else []
    lines = []
    for line, box in zip(read, ordered, strict=True):
        left, top, right, bottom = box
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
        points = [turn_back(point, level.size, upright.size, slope if level is not upright else 0) for point in points]
        points = [turn_back(point, upright.size, picture.size, quarter) for point in points]
        lines.append(replace(line, box=tuple((round(x, 1), round(y, 1)) for x, y in points)))
    turned = quarter + (slope if level is not upright else 0)
    page = Page(name, tuple(lines), round(turned, 2), picture.size)
    return page, [crop.picture for crop in crops if crop.picture is not None]


def open_detector() -> Any:
    """Load the line detector; once for many pages.

    Raises:
        DependencyMissing: rapidocr or onnxruntime is not installed.
    """
    with needs_package("Finding the lines of a page", "Run: fastsd install trocr, or give images of single lines."):
        import onnxruntime  # noqa: F401  rapidocr looks for it at the first page only, and fails with an error of its own
        from rapidocr import RapidOCR
    return RapidOCR(params={"Global.log_level": "critical"})


def find_lines(picture: "Image.Image", detector: Any = None) -> list[list[tuple[float, float]]]:
    """Find pieces of lines: four corners each, in pixels, clockwise from the top left one of the writing."""
    import numpy as np

    detector = detector or open_detector()
    found = detector(np.asarray(picture)[:, :, ::-1], use_det=True, use_cls=False, use_rec=False)
    boxes = found.boxes if found.boxes is not None else []
    return [[(float(x), float(y)) for x, y in box] for box in boxes]


def _bounds(corners: list[tuple[float, float]]) -> Box:
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _slope(corners: list[list[tuple[float, float]]]) -> float:
    """How many degrees to turn the page (anticlockwise) so that its long lines are level; the median decides."""
    slopes = []
    for top_left, top_right, bottom_right, bottom_left in corners:
        width, height = math.dist(top_left, top_right), math.dist(top_left, bottom_left)
        if width > 3 * height:
            top = math.atan2(top_right[1] - top_left[1], top_right[0] - top_left[0])
            bottom = math.atan2(bottom_right[1] - bottom_left[1], bottom_right[0] - bottom_left[0])
            slopes.append(math.degrees((top + bottom) / 2))
    return sorted(slopes)[len(slopes) // 2] if slopes else 0.0


def _stand_up(reader: Any, picture: "Image.Image", detector: Any) -> tuple["Image.Image", float]:
    """Turn the page by quarters until its writing is upright: tall boxes mean sideways.

    Which of two ways is up: the detector's package has a network for that, made for print; where its votes are divided,
    how sure the model is of its lines counts too.
    """
    corners = find_lines(picture, detector)
    if not corners:
        return picture, 0.0
    bounds = [_bounds(box) for box in corners]
    sideways = sum(b - t > 1.5 * (r - l) for l, t, r, b in bounds) > len(bounds) / 2  # noqa: E741
    choices = (90.0, 270.0) if sideways else (0.0, 180.0)
    samples = []
    for angle in choices:
        turned = picture.rotate(angle, expand=True) if angle else picture
        boxes = join_pieces([_bounds(box) for box in (find_lines(turned, detector) if angle else corners)])
        widest = sorted(boxes, key=lambda box: box[0] - box[2])[:_SAMPLE]
        samples.append([_cut(turned, box) for box in widest])
    first, other = (_upright_votes(crops, detector) for crops in samples)
    if abs(first - other) < _CLEAR:
        read = [reader.read([Item("sample", crop) for crop in crops]) for crops in samples]
        sure = [sum(line.confidence for line in lines) / max(1, len(lines)) for lines in read]
        first, other = sure[0] + _VOTE * first + _AS_IS, sure[1] + _VOTE * other
    best = choices[0] if first >= other else choices[1]
    return (picture.rotate(best, expand=True) if best else picture), best


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


def _cut(picture: "Image.Image", box: Box) -> "Image.Image":
    """The image of one line with a little paper around it: detectors clip tall loops."""
    left, top, right, bottom = box
    pad = 0.12 * (bottom - top)
    return picture.crop(
        (
            max(0, int(left - pad)),
            max(0, int(top - pad)),
            min(picture.width, math.ceil(right + pad)),
            min(picture.height, math.ceil(bottom + pad)),
        )
    )


def join_pieces(boxes: list[Box]) -> list[Box]:
    """Join boxes that are words of one line: side by side, at one height, nearly touching."""
    boxes = sorted(boxes)
    changed = True
    while changed:
        changed = False
        for place, one in enumerate(boxes):
            for other in boxes[place + 1 :]:
                height = min(one[3] - one[1], other[3] - other[1])
                common = min(one[3], other[3]) - max(one[1], other[1])
                gap = max(one[0], other[0]) - min(one[2], other[2])
                if common > 0.6 * height and gap < 0.9 * height:
                    boxes.remove(one)
                    boxes.remove(other)
                    boxes.append((min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]),
                                  max(one[3], other[3])))  # fmt: skip
                    boxes.sort()
                    changed = True
                    break
            if changed:
                break
    return boxes


def order_boxes(boxes: list[Box]) -> list[Box]:
    """Put boxes (left, top, right, bottom) in reading order: columns from left to right, each from top to bottom.

    A box across several columns (a heading) is read where it stands: what is above it before, what is below after.
    Source: the recursive X-Y cut (Nagy and Seth, 1984), with bands joined again while they share a gap.
    """
    if len(boxes) <= 1:
        return list(boxes)
    heights = sorted(bottom - top for _left, top, _right, bottom in boxes)
    least = heights[len(heights) // 2]
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
            ordered += sorted(band, key=lambda box: (box[1] + box[3], box[0]))
        else:
            for column in columns:
                ordered += order_boxes(column)
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
