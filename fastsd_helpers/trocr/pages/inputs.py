"""Whatever people give a model, as RGB images one by one: files, folders, PDFs, links, PIL images, arrays.

Every frame of a TIFF and every page of a PDF is an item with a name of its own. An image that cannot be used is
reported with its name and the reason; the ones after it are read all the same.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import DatasetError, FastSDError
from fastsd_helpers.images import files
from fastsd_helpers.images.headers import count_frames
from fastsd_helpers.trocr.pages.pdf import draw_pages
from fastsd_helpers.wording import natural_order

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "PICTURE_SUFFIXES",
    "Item",
    "count_files",
    "gather",
    "gather_share",
    "list_files",
    "open_file",
    "open_frame",
    "open_page",
    "open_picture",
    "shown_name",
    "to_rgb",
]

_OPENED_SUFFIXES = tuple(sorted(files.PICTURE_SUFFIXES | {".pbm", ".pgm", ".pnm"}))
# The others are named where they lie, and not opened: a scan that nobody misses would be lost.
PICTURE_SUFFIXES = (*_OPENED_SUFFIXES, ".djvu", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl", ".psd")
_SMALLEST_SIDE_PX = 4  # below that there is no writing, only a speck of a line detector
_LEAST_CONTRAST = 8  # of 255, between the darkest and the brightest pixel
_LINK = re.compile(r"https?://")
_MOST_FRAMES = 2_000  # of a TIFF; a file may claim any number of them
_FAINT = 64  # of 255: ink that stands out less from white paper may be light ink without a paper
_UNSAFE = re.compile(r"[^\w.-]+")
_NO_TEXT = re.compile("[\ud800-\udfff]")  # what Python makes of bytes in a file's name that are no UTF-8


@dataclass(frozen=True)
class Item:
    """One image to read, or the reason why there is none; `number` is that of a frame or page in its file, from 1."""

    name: str
    picture: "Image.Image | None" = None
    problem: str | None = None
    number: int = 1
    dpi: float | None = None


def gather(sources: Any) -> Iterator[Item]:
    """Open the images of `sources` one by one, in the order given; folders with theirs, in natural order.

    Args:
        sources: one or an iterable of: a path of an image, PDF or folder; an https link; a PIL image; an array
            (uint8, uint16 or float in 0..1, [h, w], [h, w, 1|3|4]); an Item.

    Raises:
        DatasetError: a path that does not exist, or a folder with no image in it.
    """
    for open_one in _openers(sources):
        yield from open_one()


def gather_share(sources: Any, number: int, count: int) -> Iterator[Item]:
    """Open what one of several processes reads of `sources`: every so manieth file, or page where there are few files.

    Args:
        sources: as of `gather`.
        number: of the process, from 0.
        count: of the processes.
    """
    openers = list(_openers(sources))
    if len(openers) < count:
        yield from islice(chain.from_iterable(open_one() for open_one in openers), number, None, count)
    else:
        yield from chain.from_iterable(open_one() for open_one in openers[number::count])


def count_files(sources: Any) -> tuple[int, int]:
    """How many images, and how many files that may hold several pages, `gather` opens."""
    names = [str(name) for name in _names(sources)]
    several = sum(name.lower().endswith((".pdf", ".tif", ".tiff")) for name in names)
    return len(names) - several, several


def _openers(sources: Any) -> Iterator[Callable[[], Iterator[Item]]]:
    sources = _as_list(sources)
    if isinstance(sources, (list, tuple)):  # a slip in the last name is told before the first image is read
        for source in sources:
            _check_there(source)
    for place, source in enumerate(sources):
        folder = _folder_of(source)
        if folder is None:
            yield partial(_open_source, source, f"image {place + 1}")
        else:
            yield from (partial(open_file, folder / name, name) for name in list_files(folder))


def _names(sources: Any) -> Iterator[Any]:
    for source in _as_list(sources):
        folder = _folder_of(source)
        yield from [source] if folder is None else list_files(folder)


def _folder_of(source: Any) -> Path | None:
    if isinstance(source, (str, Path)) and not _LINK.match(str(source)):
        path = Path(source).expanduser()
        return path if path.is_dir() else None
    return None


def _as_list(sources: Any) -> Iterable[Any]:
    if isinstance(sources, (str, Path, Item)) or hasattr(sources, "convert") or hasattr(sources, "__array__"):
        return [sources]
    return sources


def _check_there(source: Any) -> None:
    if isinstance(source, (str, Path)) and not _LINK.match(str(source)):
        path = Path(source).expanduser()
        if not path.exists():
            raise DatasetError(f"There is no file or folder {path}.", "Check the path; names are case-sensitive.")


def _open_source(source: Any, name: str) -> Iterator[Item]:
    if isinstance(source, Item):
        yield source
    elif isinstance(source, (str, Path)):
        text = str(source)
        if _LINK.match(text):
            yield from _open_link(text)
            return
        _check_there(source)
        path = Path(text).expanduser()
        yield from open_file(path, path.name)
    else:
        try:
            yield Item(name, _checked(to_rgb(source), name.capitalize()))
        except (FastSDError, ValueError, TypeError) as err:
            yield Item(name, problem=getattr(err, "problem", str(err)))


def list_files(folder: Path, *, leave_out: Path | None = None) -> list[str]:
    """The images and PDFs of a folder and those below it, as paths from it, in natural order; hidden ones are not seen.

    Args:
        leave_out: a folder that is not looked into, such as one for results.

    Raises:
        DatasetError: there are none.
    """
    names = [
        (base / name).relative_to(folder).as_posix()
        for base, found in _folders_below(folder, leave_out.resolve() if leave_out else None)
        for name in found
        if name.lower().endswith((*PICTURE_SUFFIXES, ".pdf")) and not name.startswith(".")
    ]
    if not names:
        raise DatasetError(
            f"There is no image in {folder}.",
            f"Put files there that end in {', '.join(_OPENED_SUFFIXES)} or .pdf, or name another folder.",
        )
    return sorted(names, key=lambda name: ([natural_order(part) for part in name.split("/")], name))


def _folders_below(folder: Path, hidden: Path | None) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it with their files, each once: first where they lie, then where links lead.

    One is left out, `hidden`; but not the folder itself, where results may be written too.
    """
    seen, starts = {hidden} - {folder.resolve()}, [folder]
    for start in starts:
        for root, folders, found in os.walk(start):
            base = Path(root)
            if (place := base.resolve()) in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = [one for one in folders if not one.startswith(".")]
            starts += [base / one for one in folders if (base / one).is_symlink()]  # those are not walked into
            yield base, found


def _open_link(link: str) -> Iterator[Item]:
    from fastsd_helpers import downloads

    name = _UNSAFE.sub("_", link.partition("?")[0].rsplit("/", 1)[-1]).lstrip(".") or "download"
    with tempfile.TemporaryDirectory(prefix="fastsd-") as folder:
        try:
            path = downloads.fetch(link, Path(folder), name=name, models_only=False)
        except FastSDError as err:
            yield Item(name, problem=err.problem)
            return
        yield from open_file(Path(path), name)


def shown_name(name: str) -> str:
    """A file's name as text that can be written: what of it is no UTF-8, as on old disks, becomes U+FFFD."""
    return _NO_TEXT.sub("\ufffd", name)


def open_file(path: Path, name: str, *, first: int = 1) -> Iterator[Item]:
    """Open the pages of one file, from number `first` on: those of a PDF, the frames of a TIFF, or the one image."""
    name = shown_name(name)
    if path.suffix.lower() == ".pdf":
        yield from _open_pdf(path, name, first)
        return
    try:
        count = _count_frames(path)
    except FastSDError as err:
        yield Item(name, problem=err.problem)
        return
    for number in range(first, count + 1):
        label = name if count == 1 else f"{name}, page {number}"
        try:
            picture, dpi = _open_frame(path, number, label)
        except FastSDError as err:
            yield Item(label, problem=err.problem, number=number)
            continue
        if picture is not None:
            yield Item(label, picture, number=number, dpi=dpi)


def open_picture(path: Path) -> "Image.Image":
    """Open one image file as upright RGB on white; of an animation or a TIFF, the first frame.

    Raises:
        DatasetError: it is empty, damaged, no image, or too small or large to hold a line.
    """
    return open_frame(path, 1)


def open_frame(path: Path, number: int) -> "Image.Image":
    """Open one frame of an image file, counted from 1, as `open_picture` does.

    Raises:
        DatasetError: it cannot be used, or is a small copy of another frame.
    """
    picture, _dpi = _open_frame(path, number, path.name)
    if picture is None:
        raise DatasetError(f"Frame {number} of {path.name} is a small copy of another.", "Read the other.")
    return picture


def open_page(path: Path, number: int) -> "Image.Image":
    """Open one page of a PDF, one frame of a TIFF, or an image, whatever the number, if it is all there is.

    Raises:
        DatasetError: it cannot be used, or there is no such page.
    """
    if path.suffix.lower() != ".pdf":
        return open_frame(path, number if number <= _count_frames(path) else 1)
    with contextlib.closing(_open_pdf(path, path.name, number)) as pages:
        item = next(pages, None)
    if item is None or item.picture is None:
        problem = (item.problem if item else None) or f"{path.name} has no page {number}."
        raise DatasetError(problem, "Put the PDF there that was transcribed.")
    return item.picture


def _count_frames(path: Path) -> int:
    try:
        with path.open("rb") as file:
            if file.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return 1
            return count_frames(file, _MOST_FRAMES)
    except (OSError, ValueError) as err:
        raise DatasetError(f"{path.name} is damaged: {err}.", "Copy it again.") from err


def _open_frame(path: Path, number: int, name: str) -> "tuple[Image.Image | None, float | None]":
    """The frame and its dots per inch; None for the small copies that some TIFFs carry."""
    try:
        if path.stat().st_size == 0:
            raise DatasetError(f"{path.name} is empty (0 bytes).", "Copy it again.")
        with files.open_picture(path) as picture:
            if number > 1:
                _seek(picture, number)
                if getattr(picture, "tag_v2", {}).get(254, 0) & 1:  # a reduced copy
                    return None, None
            files.load_picture(picture)
            dots = picture.info.get("dpi", (0, 0))[0] or 0
            dpi = float(dots) if 30 <= dots <= 2400 else None
            return _checked(to_rgb(files.upright(picture) or picture), name), dpi
    except files.PictureProblem as err:
        hint = "Open it in an image viewer; save it again as PNG or JPEG."
        if err.why == "kind":
            raise DatasetError(f"{name} is not an image this machine can read: it {err.problem}.", hint) from err
        if err.why == "size":
            problem, hint = f"{name} is too large to open safely: it {err.problem}.", "Cut it into pages or lines."
            raise DatasetError(problem, hint) from err
        raise DatasetError(f"{name} is damaged: {err.detail}.", hint) from err
    except (OSError, ValueError) as err:  # the file goes away, or its values cannot become RGB
        raise DatasetError(f"{name} is damaged: {err}.", "Copy it again.") from err


def _seek(picture: Any, number: int) -> None:
    try:
        picture.seek(number - 1)
    except Exception as err:  # a damaged frame fails in many ways
        raise files.PictureProblem("is damaged", "damage", " ".join(str(err).split()) or "it ends too early") from err
    if picture.width * picture.height > files.MOST_PIXELS:
        problem = f"is {picture.width} x {picture.height}: more than {files.MOST_PIXELS // 1_000_000} megapixels"
        raise files.PictureProblem(problem, "size")


def _checked(picture: "Image.Image", name: str = "The image") -> "Image.Image":
    if min(picture.size) < _SMALLEST_SIDE_PX:
        raise DatasetError(
            f"{name} is {picture.width} x {picture.height} px: too small for a line of text.",
            "Give the image of a whole line, 32 px high or more.",
        )
    if _contrast(picture) < _LEAST_CONTRAST:
        # A model always writes something; of an empty line it would be an invention.
        raise DatasetError(f"{name} is blank.", "Leave it out, or scan it darker.")
    return picture


def to_rgb(source: Any) -> "Image.Image":
    """A PIL image of any mode, or an array, as RGB: transparency becomes white paper, 16 bits become 8.

    Raises:
        DatasetError: an array of another shape or kind than `gather` takes.
    """
    import numpy as np
    from PIL import Image

    if not isinstance(source, Image.Image):
        source = _from_array(np.asarray(source))
    if source.mode.startswith("I") or source.mode == "F":
        # PIL clips 16-bit images at 255 when it converts them: nearly everything turns white.
        values = np.asarray(source, dtype=np.float64)
        brightest = values.max() if values.size else 0.0
        # Fractions as scientific programs write them; else of 8 bits, or the 10, 12 or 14 of a camera or scanner in 16.
        tops = [1.0] * (source.mode == "F") + [2.0**bits - 1 for bits in (8, 10, 12, 14)]
        top = next((most for most in tops if brightest <= most), 65535.0)
        source = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    if source.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in source.info:
        return _on_paper(source.convert("RGBA"))
    return source if source.mode == "RGB" else source.convert("RGB")


def _on_paper(source: "Image.Image") -> "Image.Image":
    """What is drawn on nothing, on white paper; ink that white paper would hide becomes as dark as it is light."""
    from PIL import Image, ImageChops

    white = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source).convert("RGB")
    if _contrast(white) < _FAINT:
        black = Image.alpha_composite(Image.new("RGBA", source.size, "black"), source).convert("RGB")
        if _contrast(black) > _contrast(white):
            return ImageChops.invert(black)
    return white


def _contrast(picture: "Image.Image") -> int:
    extremes: Any = picture.convert("L").getextrema()
    return int(extremes[1] - extremes[0])


def _from_array(values: Any) -> "Image.Image":
    import numpy as np
    from PIL import Image

    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or values.size == 0:
        raise DatasetError(
            f"An array of shape {list(values.shape)} is not an image.", "Give [height, width] or [height, width, 3]."
        )
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif values.dtype == np.uint16:
        values = (values / 257).astype(np.uint8)
    elif np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise DatasetError(
                f"An array of {values.dtype} must lie in 0..1; this one has {values.min():g}..{values.max():g}.",
                "Scale it, or give whole numbers from 0 to 255.",
            )
        values = (values * 255 + 0.5).astype(np.uint8)
    elif values.dtype != np.uint8:
        if values.min() < 0 or values.max() > 255:
            raise DatasetError(f"An array of {values.dtype} must lie in 0..255.", "Scale it, or use uint8.")
        values = values.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values))


def _open_pdf(path: Path, name: str, first: int) -> Generator[Item]:
    for page in draw_pages(path, name, first=first):
        if isinstance(page.drawn, str):
            yield Item(page.name, problem=page.drawn, number=page.number)
            continue
        try:
            yield Item(page.name, _checked(page.drawn, page.name), number=page.number, dpi=page.dpi)
        except DatasetError as err:
            yield Item(page.name, problem=err.problem, number=page.number)
