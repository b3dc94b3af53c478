"""Lines cut out of pages along their outlines: set level, and what lies outside of the outline filled with paper.

A page is opened once, when the first of its lines is asked for; its lines wait in a temporary folder from then on.
"""

import contextlib
import math
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr.ground_truth.marked_page import Point, bounds_of
from fastsd_helpers.trocr.pages.inputs import open_picture, to_rgb

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["LineCrop", "PageCrops", "cut_outline"]

_LEVEL_FROM = 0.5  # degrees; below, turning costs more sharpness than it gains
_LEAST_PX = 4


class PageCrops:
    """The image of a page and the lines in it, as (outline, baseline) in its pixels; `crop(n)` is the n-th."""

    def __init__(self, path: Path, *, upright: bool = True) -> None:
        self.path, self.upright = path, upright
        self.lines: list[tuple[tuple[Point, ...], tuple[Point, ...]]] = []
        self._cut: Path | None = None

    def add(self, outline: tuple[Point, ...], baseline: tuple[Point, ...] = ()) -> "LineCrop":
        """Note one more line, and return it as an image that is cut when it is asked for."""
        self.lines.append((outline, baseline))
        return LineCrop(self, len(self.lines) - 1)

    def crop(self, number: int) -> "Image.Image":
        """Cut one line.

        Raises:
            DatasetError: the page's image cannot be opened, or the line does not lie in it.
        """
        if self._cut is not None and (self._cut / f"{number}.png").is_file():
            with contextlib.suppress(DatasetError):  # someone emptied the temporary folder
                return open_picture(self._cut / f"{number}.png")
        page = self._open()
        if self._cut is None:
            with contextlib.suppress(OSError):  # no room for it: each line is cut when it is asked for
                self._cut_all(page)
        return cut_outline(page, *self.lines[number])

    def _open(self) -> "Image.Image":
        if self.upright:
            return open_picture(self.path)
        from fastsd_helpers.images import files

        with files.open_picture(self.path) as picture:
            return to_rgb(files.load_picture(picture))

    def _cut_all(self, page: "Image.Image") -> None:
        folder = Path(tempfile.mkdtemp(prefix="fastsd-lines-"))
        weakref.finalize(self, shutil.rmtree, folder, True)
        for number, (outline, baseline) in enumerate(self.lines):
            with contextlib.suppress(DatasetError):
                cut_outline(page, outline, baseline).save(folder / f"{number}.png", compress_level=1)
        self._cut = folder


class LineCrop:
    """One line of a page, for whatever takes an array: its pixels are made when they are asked for."""

    def __init__(self, page: PageCrops, number: int) -> None:
        self.page, self.number = page, number

    def picture(self) -> "Image.Image":
        """The line as an RGB image."""
        return self.page.crop(self.number)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "np.ndarray":
        import numpy as np

        return np.asarray(self.picture(), dtype=dtype)


def cut_outline(page: "Image.Image", outline: tuple[Point, ...], baseline: tuple[Point, ...] = ()) -> "Image.Image":
    """Cut one line: level along its baseline (else its own length), paper where the outline does not reach.

    Args:
        page: RGB.
        outline: three points or more, in pixels; what lies outside of the page is left off. An upright rectangle is
            cut as it is, pixel by pixel.
        baseline: from the beginning of the line to its end, if known.

    Raises:
        DatasetError: less than 4 px of it lie in the page.
    """
    from PIL import Image, ImageDraw

    left, top, right, bottom = bounds_of(outline)
    box = (
        max(0, math.floor(left + 0.5)),
        max(0, math.floor(top + 0.5)),
        min(page.width, math.floor(right + 0.5)),
        min(page.height, math.floor(bottom + 0.5)),
    )
    if box[2] - box[0] < _LEAST_PX or box[3] - box[1] < _LEAST_PX:
        raise DatasetError("The line lies outside of the image, or is less than 4 px high.", "Correct its outline.")
    part = page.crop(box)
    if _is_upright_rectangle(outline):
        return part
    shifted = [(x - box[0], y - box[1]) for x, y in outline]
    mask = Image.new("L", part.size)
    ImageDraw.Draw(mask).polygon(shifted, fill=255, outline=255)
    paper = _paper(part, mask)
    filled = Image.composite(part, Image.new("RGB", part.size, paper), mask)
    angle = _direction(shifted, [(x - box[0], y - box[1]) for x, y in baseline])
    if abs(angle) < _LEVEL_FROM:
        return filled
    level = filled.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=paper)
    inside = mask.rotate(angle, Image.Resampling.NEAREST, expand=True).getbbox()
    return level.crop(inside) if inside else level


def _is_upright_rectangle(outline: tuple[Point, ...]) -> bool:
    corners = list(dict.fromkeys(outline))
    xs, ys = {x for x, _y in corners}, {y for _x, y in corners}
    return len(corners) == 4 and len(xs) == 2 and len(ys) == 2


def _paper(part: "Image.Image", mask: "Image.Image") -> tuple[int, int, int]:
    """The colour of the paper: the median of what lies within the outline, where there is more paper than ink."""
    import numpy as np

    inside = np.asarray(part)[np.asarray(mask) > 0]
    red, green, blue = (int(value) for value in np.median(inside, axis=0)) if len(inside) else (255, 255, 255)
    return red, green, blue


def _direction(outline: list[Point], baseline: list[Point]) -> float:
    """How far to turn the line (degrees, anticlockwise) so that it runs level from left to right."""
    if len(baseline) > 1 and math.dist(baseline[0], baseline[-1]) > 0:
        (x0, y0), (x1, y1) = baseline[0], baseline[-1]
        angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
        # A line of a script that is written to the left is drawn from its right end by some programs.
        return angle - math.copysign(180, angle) if abs(angle) > 135 else angle
    return _long_axis(outline)


def _long_axis(outline: list[Point]) -> float:
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
    angle = math.degrees(0.5 * math.atan2(2 * xy, xx - yy))
    return angle if abs(angle) <= 45 and xx > 2 * yy else 0.0
