"""Pages whose whole text is known, as lines of ground truth: lines are found and read, the text is aligned to them."""

import shutil
import tempfile
import unicodedata
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr.alignment.texts import align_text
from fastsd_helpers.trocr.ground_truth.labels import read_texts
from fastsd_helpers.trocr.ground_truth.rows import LeftOut, Row
from fastsd_helpers.trocr.pages.inputs import Item, gather, open_picture
from fastsd_helpers.trocr.pages.page_reader import cut_lines, open_detector
from fastsd_helpers.trocr.pages.reading_order import Order

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["rows_of_aligned_pages"]


class _Cuts:
    """A temporary folder with images of lines, which goes when the last of them does."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fastsd-aligned-"))
        self.count = 0
        weakref.finalize(self, shutil.rmtree, self.folder, True)

    def add(self, picture: "Image.Image") -> "_Cut":
        """Keep one."""
        self.count += 1
        picture.save(self.folder / f"{self.count}.png", compress_level=1)
        return _Cut(self, self.count)


class _Cut:
    """The image of a line, for whatever takes an array: it is opened when it is asked for."""

    def __init__(self, cuts: _Cuts, number: int) -> None:
        self._cuts, self._number = cuts, number

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "np.ndarray":
        import numpy as np

        return np.asarray(open_picture(self._cuts.folder / f"{self._number}.png"), dtype=dtype)


def rows_of_aligned_pages(reader: Any, source: Any, text: Path, *, order: Order = "auto") -> Iterator[Row | LeftOut]:
    """The lines of pages, in reading order, with their parts of the pages' texts; what is unsure as a sentence each.

    Args:
        reader: a Reader; what it makes of the lines says which text is whose.
        source: images of pages, folders of them, PDFs; see `inputs.gather`.
        text: a file with the text of the one page, or of several with a form feed between two; or a folder with a
            file for each: `NAME.txt` of `NAME.jpg`, `NAME-0002.txt` of the second page of `NAME.pdf`.
        order: of a page's lines, see `cut_lines`.

    Raises:
        DatasetError: there is no such file, or it is for another number of pages.
    """
    if not text.exists():
        raise DatasetError(f"There is no file or folder {text}.", "Check the path; names are case-sensitive.")
    detector = open_detector()
    cuts = _Cuts()
    for item, known in _with_texts(gather(source), text):
        if item.picture is None:
            yield LeftOut(item.problem or item.name, "a damaged file")
        elif isinstance(known, LeftOut):
            yield known
        else:
            page, crops = cut_lines(reader, item.picture, name=item.name, detector=detector, order=order)
            found = align_text([unicodedata.normalize("NFC", line.text) for line in page.lines], known)
            reasons = {one.reason for one in found}
            if found and all(one.text is None for one in found) and len(reasons) == 1:
                lines = f"{len(found)} line{'s' if len(found) > 1 else ''}"
                yield LeftOut(f"{item.name}: {found[0].why}; {lines} left out.", found[0].reason, lines=len(found))
                continue
            if not found:
                yield LeftOut(f"{item.name}: no line is found on it.", "no line")
            for number, (one, crop) in enumerate(zip(found, crops, strict=True), 1):
                name = f"{item.name} line {number}"
                if one.text is None:
                    yield LeftOut(f"{name} is left out: {one.why}.", one.reason)
                else:
                    yield Row(name, cuts.add(crop), one.text, item.name, page=item.name)


def _with_texts(items: Iterator[Item], text: Path) -> Iterator[tuple[Item, str | LeftOut]]:
    """Each page with its text."""
    if text.is_dir():
        for item in items:
            path = _text_of(item, text)
            yield item, _read(path) if path else LeftOut(f"{item.name}: {text} has no text for it.", "no text")
        return
    known = _read(text)
    if isinstance(known, LeftOut):
        raise DatasetError(str(known), "Save it as UTF-8.")
    texts = known.removesuffix("\f").split("\f")
    number = 0
    for number, item in enumerate(items, 1):
        if number > len(texts):
            raise DatasetError(
                f"{text.name} has the text of {_pages(len(texts))}, and there are more.",
                "Give a folder with a NAME.txt for each, or put a form feed between the texts of two pages.",
            )
        yield item, texts[number - 1]
    if number < len(texts):
        raise DatasetError(f"{text.name} has the text of {_pages(len(texts))}, and there are {number}.",
                           "Give all pages, or a folder with a NAME.txt for each.")  # fmt: skip


def _pages(count: int) -> str:
    return f"{count} page{'s' if count != 1 else ''}"


def _read(path: Path) -> str | LeftOut:
    found = read_texts([path])[path]
    return found if isinstance(found, LeftOut) else unicodedata.normalize("NFC", found)


def _text_of(item: Item, folder: Path) -> Path | None:
    """The file with a page's text: of its name in full or without its folders; of later pages with their number."""
    whole, _comma, page = item.name.partition(", page ")
    number = int(page) if page.isdecimal() else item.number
    path = PurePosixPath(whole)
    for base in dict.fromkeys([path.with_suffix("").as_posix(), path.as_posix(), path.stem, path.name]):
        names = [f"{base}-{number:04d}", f"{base}-{number}", *([base] if number == 1 else [])]
        for name in names:
            for ending in (".txt", ".gt.txt"):
                if (folder / f"{name}{ending}").is_file():
                    return folder / f"{name}{ending}"
    return None
