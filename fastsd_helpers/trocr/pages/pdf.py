"""Pages of PDF files as images, drawn by a child process: a hostile file takes its memory and time, never ours."""

import contextlib
import importlib.util
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsd_helpers.errors import needs_package
from fastsd_helpers.images import files
from fastsd_helpers.processes import Child, environment_for
from fastsd_helpers.trocr.pages import pdf_child

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PdfPage", "draw_pages"]

_DPI = 300  # of pages that are no scan of one picture, whose own pixels are taken
_MOST_PIXELS = 48_000_000  # A4 at 600 dpi, A3 at 500; a larger page gets fewer dots per inch
_MOST_PAGES = 2_000
_MOST_FAILURES = 3  # pages that end the child; after that the rest of the file is left out
_MEMORY_BYTES = 2 * 2**30
_PAGE_S = 60  # of processor time
_SILENT_S = 300.0  # on the clock: it waits for a disk, or hangs
_MODES = {"BGR": ("RGB", "BGR", 3), "BGRX": ("RGB", "BGRX", 4), "BGRA": ("RGBA", "BGRA", 4), "L": ("L", "L", 1)}


class _Ended(Exception):
    """The child ended before its answer, or says nothing; the text is the reason."""


class PdfPage(NamedTuple):
    """A page of a PDF: its name, an RGB image or a sentence on why there is none, its number from 1, dots per inch."""

    name: str
    drawn: "Image.Image | str"
    number: int = 1
    dpi: float | None = None


def draw_pages(path: Path, name: str, *, first: int = 1) -> Iterator[PdfPage]:
    """Draw a PDF's pages one by one, from number `first` on.

    A scanned page has as many pixels as its picture; any other 300 dots per inch. Large ones have fewer.

    Raises:
        DependencyMissing: pypdfium2 is not installed.
    """
    folder = _package_folder(name)
    first, failures = first - 1, 0
    while True:
        with contextlib.closing(_Drawer(path, first, folder)) as drawer:
            try:
                opened = drawer.answer()
            except _Ended as err:
                yield PdfPage(name, f"{name} cannot be opened: {err}.")
                return
            if "problem" in opened:
                yield PdfPage(name, f"{name} cannot be opened: {_why_closed(path, str(opened['problem']))}.")
                return
            pages = int(opened.get("pages", 0))
            if not pages:
                yield PdfPage(name, f"{name} has no pages.")
            try:
                while first < min(pages, _MOST_PAGES):
                    label = f"{name}, page {first + 1}"
                    picture, dpi = drawer.picture(label)
                    first += 1
                    yield PdfPage(label, picture, first, dpi)
            except _Ended as err:
                first, failures = first + 1, failures + 1
                yield PdfPage(label, f"{label} cannot be drawn: {err}.", first)
                if failures == _MOST_FAILURES and first < pages:
                    why = f"{name} is left out from page {first + 1} on: {failures} of its pages cannot be drawn."
                    yield PdfPage(name, why, first + 1)
                    return
        if first >= min(pages, _MOST_PAGES):
            if pages > _MOST_PAGES:
                why = f"{name} has {pages:,} pages: those after {_MOST_PAGES:,} are not read; split it."
                yield PdfPage(name, why, first + 1)
            return


def _why_closed(path: Path, said: str) -> str:
    """Why a file with the name of a PDF does not open, from what PDFium says and what the file is."""
    if "password" in said.lower():
        return "it is protected by a password"
    try:
        with files.open_picture(path):
            return "it is an image, no PDF: give its name the ending of its kind, such as .jpg"
    except files.PictureProblem as err:
        if err.why == "kind" and "PDF" not in err.problem:
            return f"it {err.problem}".replace("not an image", "no PDF").replace("the image itself", "the file itself")
    except OSError as err:
        return f"it cannot be read ({err})"
    # PDFium opens a file without pages, and then says that it failed with success.
    return "it has no pages" if "Success" in said else f"it is damaged ({said})"


def _package_folder(name: str) -> Path:
    with needs_package(f"Reading the PDF {name}", "Run: fastsd install trocr, or save its pages as images."):
        found = importlib.util.find_spec("pypdfium2")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("No module named 'pypdfium2'", name="pypdfium2")
    return Path(found.origin).parents[1]


class _Drawer:
    """A child that draws one file's pages, from page `first` on."""

    def __init__(self, path: Path, first: int, folder: Path) -> None:
        limits = (_MEMORY_BYTES, first, _MOST_PAGES, _DPI, _MOST_PIXELS, _PAGE_S)
        words = [sys.executable, "-I", pdf_child.__file__, str(folder), str(path.resolve()), *map(str, limits)]
        # No token of this process is there for the taking; what the library prints is kept nowhere.
        self._child = Child(words, log=Path(os.devnull), env=environment_for("filter"), pipe=True)
        self._rest = b""

    def answer(self) -> dict[str, Any]:
        """The next line it says.

        Raises:
            _Ended: there is none.
        """
        while b"\n" not in self._rest:
            self._rest += self._read(2**16)
            if len(self._rest) > 2**20:
                raise _Ended("it is damaged")
        line, self._rest = self._rest.split(b"\n", 1)
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as err:  # a document may have taken the child over
            raise _Ended("it is damaged") from err

    def picture(self, label: str) -> "tuple[Image.Image | str, float | None]":
        """The next page as RGB, or a sentence on why it has no image; and its dots per inch.

        Raises:
            _Ended: the child did.
        """
        from PIL import Image

        said = self.answer()
        if "problem" in said:
            return f"{label} cannot be drawn: {said['problem']}.", None
        if "inches" in said:
            width, height = said["inches"]
            told = f"{label} measures {width:,} x {height:,} inches: too large to draw. Save it at its true size."
            return told, None
        try:
            dpi = float(said["dpi"])
            (width, height), stride, (mode, raw, depth) = said["size"], said["stride"], _MODES[said["mode"]]
            fits = 0 < width <= 2 * _MOST_PIXELS // height and width * depth <= stride <= width * depth + 64
        except (KeyError, TypeError, ValueError, ArithmeticError) as err:
            raise _Ended("it is damaged") from err
        if not fits or height < 1:
            raise _Ended("it is damaged")
        pixels: Any = bytearray(self._rest[: stride * height])  # Pillow reads it, though its types name bytes alone
        self._rest = self._rest[len(pixels) :]
        while len(pixels) < stride * height:
            pixels += self._read(min(2**20, stride * height - len(pixels)))
        picture = Image.frombuffer(mode, (width, height), pixels, "raw", raw, stride, 1)
        return picture if mode == "RGB" else picture.convert("RGB"), dpi

    def _read(self, most: int) -> bytes:
        pipe = self._child.output.fileno()
        ends = time.monotonic() + _SILENT_S
        while not select.select([pipe], [], [], max(0.0, ends - time.monotonic()))[0]:
            if time.monotonic() >= ends:
                raise _Ended(f"it says nothing for {_SILENT_S:.0f} s")
        data = os.read(pipe, most)
        if not data:
            raise _Ended(self._why_ended())
        return data

    def _why_ended(self) -> str:
        # The guard of the child passes a signal on as an exit code of 256 minus its number.
        code = self._child.wait(10) or 0
        if code in (-signal.SIGXCPU, 256 - signal.SIGXCPU, 128 + signal.SIGXCPU):
            return f"it takes longer than {_PAGE_S} s"
        if code < 0 or code > 128:
            return f"it is damaged, or needs more than {_MEMORY_BYTES / 2**30:.0f} GB of memory"
        return f"it is damaged (exit code {code})"

    def close(self) -> None:
        """End the child."""
        self._child.close(grace_s=0)
