"""The image of one line, set level: cut out of the page as it lies, with paper where the page has something else."""

import math
from typing import TYPE_CHECKING, Any

from fastsd_helpers.trocr.pages.line_pieces import LinePlace

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["baseline_of", "cut_line", "paper_of"]

_PAD = 0.12  # of the height: detectors clip tall loops
_LEVEL = math.radians(0.3)  # below, turning costs more sharpness than it gains
_USUAL_BASELINE = 0.78  # of the height, from the top, where the ink does not say
_RGB = tuple[int, int, int]


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


def cut_line(picture: "Image.Image", place: LinePlace, paper: _RGB = (255, 255, 255)) -> "Image.Image":
    """Cut a line out of a page and set it level, with a little of the page around it.

    Args:
        picture: the page, RGB.
        place: of the line on it.
        paper: what lies outside the page, and outside the outline of a line of several pieces.
    """
    from PIL import Image

    (x0, y0), (x1, y1) = place.corners[:2]
    angle = math.atan2(y1 - y0, x1 - x0)
    pad = _PAD * place.height
    if abs(angle) < _LEVEL:
        left, top, right, bottom = place.box
        box = (math.floor(left - pad), math.floor(top - pad), math.ceil(right + pad), math.ceil(bottom + pad))
        inside = (max(0, box[0]), max(0, box[1]), min(picture.width, box[2]), min(picture.height, box[3]))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            return Image.new("RGB", (max(4, box[2] - box[0]), max(4, box[3] - box[1])), paper)
        cut, start = picture.crop(inside), (float(inside[0]), float(inside[1]))
    else:
        cos, sin = math.cos(angle), math.sin(angle)
        start = (x0 - pad * cos + pad * sin, y0 - pad * sin - pad * cos)
        size = (max(4, math.ceil(place.width + 2 * pad)), max(4, math.ceil(place.height + 2 * pad)))
        # A pixel (u, v) of the line is the page's pixel start + u along it + v across it.
        along = (cos, -sin, start[0], sin, cos, start[1])
        cut = picture.transform(size, Image.Transform.AFFINE, along, Image.Resampling.BICUBIC, fillcolor=paper)
    return _only(cut, place, start, angle if abs(angle) >= _LEVEL else 0.0, pad, paper) if _is_bent(place) else cut


def _is_bent(place: LinePlace) -> bool:
    """Whether the rectangle around a line holds much that no piece of it covers."""
    covered = sum(math.dist(a, b) * math.dist(a, d) for a, b, _c, d in place.pieces)
    return len(place.pieces) > 1 and covered < 0.75 * place.width * place.height


def _only(
    cut: "Image.Image", place: LinePlace, start: tuple[float, float], angle: float, pad: float, paper: _RGB
) -> "Image.Image":
    """The line alone: paper wherever its outline, with a little around it, does not reach."""
    from PIL import Image, ImageDraw

    cos, sin = math.cos(angle), math.sin(angle)
    mask = Image.new("L", cut.size, 0)
    pen = ImageDraw.Draw(mask)
    upper, lower = [], []
    for quad in place.pieces:
        a, b, c, d = (
            ((x - start[0]) * cos + (y - start[1]) * sin, (y - start[1]) * cos - (x - start[0]) * sin) for x, y in quad
        )
        upper += [(a[0] - pad, a[1] - pad), (b[0] + pad, b[1] - pad)]
        lower += [(d[0] - pad, d[1] + pad), (c[0] + pad, c[1] + pad)]
    pen.polygon([*upper, *reversed(lower)], fill=255)
    alone = Image.new("RGB", cut.size, paper)
    alone.paste(cut, mask=mask)
    return alone


def baseline_of(cut: Any) -> float:
    """Where letters stand in the image of a line, as a part of its height from the top.

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
    return found if 0.5 <= found <= 0.95 else _USUAL_BASELINE
