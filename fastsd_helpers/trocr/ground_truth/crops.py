"""Lines cut out of pages along their outlines: set level, and what lies outside of the outline filled with paper.

A page is opened once, when the first of its lines is asked for; its lines wait in a temporary folder from then on.
"""

import contextlib
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr.ground_truth.marked_page import Point
from fastsd_helpers.trocr.pages.inputs import open_page, open_picture, to_rgb
from fastsd_helpers.trocr.pages.line_images import cut_outline

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["LineCrop", "PageCrops"]


class PageCrops:
    """The image of a page and the lines in it, as (outline, baseline) in its pixels; `crop(n)` is the n-th."""

    def __init__(self, path: Path, *, upright: bool = True, number: int = 1) -> None:
        self.path, self.upright, self.number = path, upright, number
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
            return open_page(self.path, self.number)
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
