"""The image of one line, set level: cut out of the page along its outline, with paper where something else lies.

The lines that a detector finds and those that PAGE or ALTO marks are cut by the same rule: what was read on a page and
written down with its outline and baseline is, read back as ground truth, the same image.
"""

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr.pages.line_pieces import LinePlace, Point, bounds_of

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["baseline_of", "clip_line", "clip_outline", "cut_outline", "outline_of", "paper_of"]

_PAD = 0.12  # of the height: detectors clip tall loops
_LEVEL = math.radians(0.3)  # below, turning costs more sharpness than it gains
_LEAST_PX = 4
_LONG = math.radians(45)  # an outline alone says no more than that of the direction
_BACKWARDS = math.radians(135)  # a baseline that is farther from level was drawn from its other end, or is turned
_ABOVE = 0.55  # of the line's height that lies above its baseline, at least
_USUAL_BASELINE = 0.78  # of the height, from the top, where the ink does not say
_RGB = tuple[int, int, int]
_Points = tuple[Point, ...]


def paper_of(picture: "Image.Image") -> _RGB:
    """The colour of the paper of a page: of most of its pixels, so of light writing's dark ground too."""
    import numpy as np

    small = picture.convert("RGB")
    small.thumbnail((200, 200))
    values = np.asarray(small).reshape(-1, 3)
    grey = values.mean(1)
    counts, edges = np.histogram(grey, bins=16, range=(0, 256))
    most = int(counts.argmax())
    found = np.median(values[(grey >= edges[most]) & (grey < edges[most + 1])], axis=0)
    return int(found[0]), int(found[1]), int(found[2])


# ------------------------------------------------------------------------------------------------- outlines


def outline_of(place: LinePlace) -> _Points:
    """What is cut out for a line that was found: it, and a little of the page around it.

    A line whose pieces lie level with it has a rectangle; one that bends, the outline of its pieces.
    """
    (x0, y0), (x1, y1) = place.corners[:2]
    angle, pad = math.atan2(y1 - y0, x1 - x0), _PAD * place.height
    if _is_bent(place):
        return _turned(_around([_turned(quad, -angle) for quad in place.pieces], pad), angle)
    if abs(_from_quarter(angle)) < _LEVEL:
        left, top, right, bottom = bounds_of(place.corners)
        left, top, right, bottom = (math.floor(left - pad), math.floor(top - pad),
                                    math.ceil(right + pad), math.ceil(bottom + pad))  # fmt: skip
        return (left, top), (right, top), (right, bottom), (left, bottom)
    along, across = (pad * math.cos(angle), pad * math.sin(angle)), (-pad * math.sin(angle), pad * math.cos(angle))
    return tuple(
        (x + u * along[0] + v * across[0], y + u * along[1] + v * across[1])
        for (x, y), (u, v) in zip(place.corners, ((-1, -1), (1, -1), (1, 1), (-1, 1)), strict=True)
    )


def _is_bent(place: LinePlace) -> bool:
    """Whether the rectangle around a line holds much that no piece of it covers."""
    covered = sum(math.dist(a, b) * math.dist(a, d) for a, b, _c, d in place.pieces)
    return len(place.pieces) > 1 and covered < 0.75 * place.width * place.height


def _turned(points: Any, angle: float) -> _Points:
    cos, sin = math.cos(angle), math.sin(angle)
    return tuple((x * cos - y * sin, x * sin + y * cos) for x, y in points)


def _around(quads: list[_Points], pad: float) -> _Points:
    """The outline of pieces along a level line, with a margin: its upper edge, then the lower one back."""
    spans = [(min(a[0], d[0]) - pad, max(b[0], c[0]) + pad, a[1] - pad, b[1] - pad, d[1] + pad, c[1] + pad)
             for a, b, c, d in quads]  # fmt: skip
    ends = sorted({end for span in spans for end in span[:2]})
    upper: list[Point] = []
    lower: list[Point] = []
    for one, other in pairwise(ends):
        here = [span for span in spans if span[0] <= one and other <= span[1]]
        for at in (one, other) if here else ():  # a gap between two words is crossed straight
            parts = [((at - left) / (right - left), *edges) for left, right, *edges in here]
            upper.append((at, min(a + part * (b - a) for part, a, b, _d, _c in parts)))
            lower.append((at, max(d + part * (c - d) for part, _a, _b, d, c in parts)))
    return (*upper, *reversed(lower))


def clip_outline(points: _Points, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """An outline in whole pixels of a page, without what lies outside of it; empty where that is all.

    Source: Sutherland and Hodgman, Reentrant polygon clipping, 1974.
    """
    kept = list(points)
    for axis, edge, sign in ((0, 0, 1), (0, size[0], -1), (1, 0, 1), (1, size[1], -1)):
        found: list[Point] = []
        for one, other in zip([*kept[-1:], *kept], kept, strict=False):
            before, after = sign * (one[axis] - edge), sign * (other[axis] - edge)
            if (before < 0) != (after < 0):
                part = before / (before - after)
                found.append((one[0] + part * (other[0] - one[0]), one[1] + part * (other[1] - one[1])))
            if after >= 0:
                found.append(other)
        kept = found
    whole = list(dict.fromkeys((math.floor(x + 0.5), math.floor(y + 0.5)) for x, y in kept))
    return tuple(whole) if len(whole) > 2 else ()


def clip_line(ends: _Points, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """A baseline in whole pixels of a page: the part of it that lies there; else as near to it as there is page."""
    one, other = ends
    low, high = 0.0, 1.0
    for axis in (0, 1):
        step = other[axis] - one[axis]
        if step:
            enters, leaves = sorted(((0 - one[axis]) / step, (size[axis] - one[axis]) / step))
            low, high = max(low, enters), min(high, leaves)
    if low >= high:
        low, high = 0.0, 1.0
    x, y = one
    first, last = (
        (min(max(math.floor(x + part * (other[0] - x) + 0.5), 0), size[0]),
         min(max(math.floor(y + part * (other[1] - y) + 0.5), 0), size[1]))
        for part in (low, high)
    )  # fmt: skip
    return first, last


# ------------------------------------------------------------------------------------------------- cutting


def cut_outline(page: "Image.Image", outline: _Points, baseline: _Points = ()) -> "Image.Image":
    """Cut one line: level along its baseline (else its own length), paper where the outline does not reach.

    Args:
        page: RGB.
        outline: three points or more, in pixels; what lies outside of the page is left off. A rectangle is cut whole,
            an upright one pixel by pixel.
        baseline: from the beginning of the line to its end, if known.

    Raises:
        DatasetError: less than 4 px of it lie in the page.
    """
    bounds = [math.floor(value + 0.5) for value in bounds_of(outline)]
    box = (max(0, bounds[0]), max(0, bounds[1]), min(page.width, bounds[2]), min(page.height, bounds[3]))
    if box[2] - box[0] < _LEAST_PX or box[3] - box[1] < _LEAST_PX:
        raise DatasetError("The line lies outside of the image, or is less than 4 px high.", "Correct its outline.")
    angle = _direction(outline, baseline)
    if abs(_from_quarter(angle)) < _LEVEL:
        return _cut_upright(page, outline, box, round(angle / (math.pi / 2)) % 4)
    from PIL import Image

    flat = _turned(outline, -angle)
    left, top, right, bottom = bounds_of(flat)
    size = (max(_LEAST_PX, math.ceil(right - left)), max(_LEAST_PX, math.ceil(bottom - top)))
    paper = _paper_within(page.crop(box), [(x - box[0], y - box[1]) for x, y in outline])
    cos, sin = math.cos(angle), math.sin(angle)
    # A pixel (u, v) of the line is the page's pixel start + u along it + v across it.
    along = (cos, -sin, left * cos - top * sin, sin, cos, left * sin + top * cos)
    cut = page.transform(size, Image.Transform.AFFINE, along, Image.Resampling.BICUBIC, fillcolor=paper)
    return _only(cut, [(x - left, y - top) for x, y in flat], paper)


def _cut_upright(page: "Image.Image", outline: _Points, box: tuple[int, int, int, int], quarters: int) -> "Image.Image":
    """The line as it stands in the page, turned by quarters: no pixel of it changes."""
    from PIL import Image

    part, shifted = page.crop(box), [(x - box[0], y - box[1]) for x, y in outline]
    part = _only(part, shifted, None)
    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    turn = turns[quarters]
    return part.transpose(turn) if turn is not None else part


def _only(cut: "Image.Image", outline: list[Point], paper: _RGB | None) -> "Image.Image":
    """The line alone: paper wherever its outline does not reach; a rectangle's reaches everywhere."""
    from PIL import Image

    corners = list(dict.fromkeys(outline))
    ends = [(0, 0), (cut.width, 0), (cut.width, cut.height), (0, cut.height)]
    # A corner in whole pixels lies up to one away from that of the image, or beyond the page's edge.
    if len(corners) == 4 and all(any(_covers(corner, end, cut.size) for corner in corners) for end in ends):
        return cut
    mask = _mask(cut.size, outline)
    alone = Image.new("RGB", cut.size, paper or _paper_within(cut, outline))
    alone.paste(cut, mask=mask)
    return alone


def _covers(corner: Point, end: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a corner lies at an end of an image, or beyond it."""
    return all(
        value < 1.5 if not edge else value > most - 1.5
        for value, edge, most in zip(corner, end, size, strict=True)
    )  # fmt: skip


def _mask(size: tuple[int, int], outline: list[Point]) -> "Image.Image":
    from PIL import Image, ImageDraw

    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon(outline, fill=255, outline=255)
    return mask


def _paper_within(part: "Image.Image", outline: list[Point]) -> _RGB:
    """The colour of the paper: the median of what lies within the outline, where there is more paper than ink."""
    import numpy as np

    inside = np.asarray(part)[np.asarray(_mask(part.size, outline)) > 0]
    red, green, blue = (int(value) for value in np.median(inside, axis=0)) if len(inside) else (255, 255, 255)
    return red, green, blue


# ------------------------------------------------------------------------------------------------- direction


def _from_quarter(angle: float) -> float:
    """How far a direction is from the nearest of right, down, left and up."""
    return angle - round(angle / (math.pi / 2)) * (math.pi / 2)


def _direction(outline: _Points, baseline: _Points) -> float:
    """Where the line runs, in radians clockwise from level."""
    if len(baseline) < 2 or baseline[0] == baseline[-1]:
        return _long_axis(outline)
    (x0, y0), (x1, y1) = baseline[0], baseline[-1]
    angle = math.atan2(y1 - y0, x1 - x0)
    if abs(angle) > _BACKWARDS:
        # Some programs draw the line of a script that is written to the left from its right end. If it stands on its
        # head instead, what is above it on the page is below it in the writing.
        heights = [y for _x, y in _turned(outline, -angle)]
        level = [y for _x, y in _turned(baseline, -angle)]
        above = sum(level) / len(level) - min(heights)
        if above < _ABOVE * (max(heights) - min(heights)):
            return angle - math.copysign(math.pi, angle)
    return angle


def _long_axis(outline: _Points) -> float:
    """The slope of the outline's longest extent, by its second moments along the edges; 0 for steep or round ones."""
    import numpy as np

    points = np.asarray([*outline, outline[0]], dtype=float)
    steps = np.linspace(0, 1, 32)[:, None, None]
    along = (points[:-1] * (1 - steps) + points[1:] * steps).reshape(-1, 2)
    weights = np.tile(np.hypot(*(points[1:] - points[:-1]).T), 32)
    if weights.sum() <= 0:
        return 0.0
    middle = np.average(along, axis=0, weights=weights)
    (xx, xy), (_xy, yy) = np.cov((along - middle).T, aweights=weights)
    angle = 0.5 * math.atan2(2 * xy, xx - yy)
    return angle if abs(angle) <= _LONG and xx > 2 * yy else 0.0


def baseline_of(cut: Any) -> float:
    """Where letters stand in the image of a line, as a part of its height from the top, 0.6 to 0.95.

    Rows between the tops and feet of small letters have the most ink; the baseline is where that ends.
    """
    import numpy as np

    grey = np.asarray(cut.convert("L"), np.float32)
    ink = np.abs(grey - np.median(grey)).mean(1)
    height = len(ink)
    if height < 8 or ink.max() < 2:
        return _USUAL_BASELINE
    wide = max(1, height // 16)
    smooth = np.convolve(ink, np.ones(wide) / wide, "same")
    strong = np.flatnonzero(smooth > 0.55 * smooth.max())
    found = float(strong[-1] + 1) / height
    # A line of capitals with a flourish may seem to stand above its middle; most of it has to be above its baseline.
    return max(found, 0.6) if 0.5 <= found <= 0.95 else _USUAL_BASELINE
