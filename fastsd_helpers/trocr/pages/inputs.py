"""Whatever people give a model, as RGB images one by one: files, folders, PDFs, links, PIL images, arrays.

An image that cannot be used is reported with its name and the reason; the ones after it are read all the same.
"""

import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import DatasetError, FastSDError
from fastsd_helpers.images import files
from fastsd_helpers.trocr.pages.pdf import draw_pages

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PICTURE_SUFFIXES", "Item", "gather", "open_picture", "to_rgb"]

logger = logging.getLogger("fastsd_helpers")

PICTURE_SUFFIXES = (".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_OPENED_SUFFIXES = tuple(suffix for suffix in PICTURE_SUFFIXES if suffix != ".jp2")  # that one is named, not opened
_SMALLEST_SIDE_PX = 4  # below that there is no writing, only a speck of a line detector
_LEAST_CONTRAST = 8  # of 255, between the darkest and the brightest pixel
_LINK = re.compile(r"https?://")
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Item:
    """One image to read, or the reason why there is none."""

    name: str
    picture: "Image.Image | None" = None
    problem: str | None = None


def gather(sources: Any, *, recursive: bool = False) -> Iterator[Item]:
    """Open the images of `sources` one by one, in the order given; folders in the order of their names.

    Args:
        sources: one or an iterable of: a path of an image, PDF or folder; an https link; a PIL image; an array
            (uint8, uint16 or float in 0..1, [h, w], [h, w, 1|3|4]); an Item.
        recursive: look into the folders of a folder too.

    Raises:
        DatasetError: a path that does not exist, or a folder with no image in it.
    """
    sources = _as_list(sources)
    if isinstance(sources, (list, tuple)):  # a slip in the last name is told before the first image is read
        for source in sources:
            _check_there(source)
    for place, source in enumerate(sources):
        yield from _open_source(source, f"image {place + 1}", recursive)


def _as_list(sources: Any) -> Iterable[Any]:
    if isinstance(sources, (str, Path, Item)) or hasattr(sources, "convert") or hasattr(sources, "__array__"):
        return [sources]
    return sources


def _check_there(source: Any) -> None:
    if isinstance(source, (str, Path)) and not _LINK.match(str(source)):
        path = Path(source).expanduser()
        if not path.exists():
            raise DatasetError(f"There is no file or folder {path}.", "Check the path; names are case-sensitive.")


def _open_source(source: Any, name: str, recursive: bool) -> Iterator[Item]:
    if isinstance(source, Item):
        yield source
    elif isinstance(source, (str, Path)):
        text = str(source)
        if _LINK.match(text):
            yield from _open_link(text)
            return
        _check_there(source)
        path = Path(text).expanduser()
        if path.is_dir():
            yield from _open_folder(path, recursive)
        else:
            yield from _open_file(path, path.name)
    else:
        try:
            yield Item(name, _checked(to_rgb(source), name.capitalize()))
        except (FastSDError, ValueError, TypeError) as err:
            yield Item(name, problem=getattr(err, "problem", str(err)))


def _open_folder(folder: Path, recursive: bool) -> Iterator[Item]:
    paths = sorted(folder.rglob("*") if recursive else folder.iterdir())
    wanted = [
        path
        for path in paths
        if path.suffix.lower() in (*PICTURE_SUFFIXES, ".pdf") and not path.name.startswith(".") and path.is_file()
    ]
    if not wanted:
        raise DatasetError(
            f"There is no image in {folder}.",
            f"Put files there that end in {', '.join(_OPENED_SUFFIXES)} or .pdf, or name another folder.",
        )
    for path in wanted:
        yield from _open_file(path, path.relative_to(folder).as_posix())


def _open_link(link: str) -> Iterator[Item]:
    from fastsd_helpers import downloads

    name = _UNSAFE.sub("_", link.partition("?")[0].rsplit("/", 1)[-1]).lstrip(".") or "download"
    with tempfile.TemporaryDirectory(prefix="fastsd-") as folder:
        try:
            path = downloads.fetch(link, Path(folder), name=name, models_only=False)
        except FastSDError as err:
            yield Item(name, problem=err.problem)
            return
        yield from _open_file(Path(path), name)


def _open_file(path: Path, name: str) -> Iterator[Item]:
    if path.suffix.lower() == ".pdf":
        yield from _open_pdf(path, name)
        return
    try:
        yield Item(name, open_picture(path))
    except FastSDError as err:
        yield Item(name, problem=err.problem)


def open_picture(path: Path) -> "Image.Image":
    """Open one image file as upright RGB on white; of an animation, the first frame.

    Raises:
        DatasetError: it is empty, damaged, no image, or too small or large to hold a line.
    """
    try:
        if path.stat().st_size == 0:
            raise DatasetError(f"{path.name} is empty (0 bytes).", "Copy it again.")
        with files.open_picture(path) as picture:
            files.load_picture(picture)
            return _checked(to_rgb(files.upright(picture) or picture), path.name)
    except files.PictureProblem as err:
        hint = "Open it in an image viewer; save it again as PNG or JPEG."
        if err.why == "kind":
            raise DatasetError(f"{path.name} is not an image this machine can read: it {err.problem}.", hint) from err
        if err.why == "size":
            problem, hint = f"{path.name} is too large to open safely: it {err.problem}.", "Cut it into pages or lines."
            raise DatasetError(problem, hint) from err
        raise DatasetError(f"{path.name} is damaged: {err.detail}.", hint) from err
    except (OSError, ValueError) as err:  # the file goes away, or its values cannot become RGB
        raise DatasetError(f"{path.name} is damaged: {err}.", "Copy it again.") from err


def _checked(picture: "Image.Image", name: str = "The image") -> "Image.Image":
    if min(picture.size) < _SMALLEST_SIDE_PX:
        raise DatasetError(
            f"{name} is {picture.width} x {picture.height} px: too small for a line of text.",
            "Give the image of a whole line, 32 px high or more.",
        )
    extremes: Any = picture.convert("L").getextrema()  # of its one band
    low, high = extremes
    if high - low < _LEAST_CONTRAST:
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
        top = 255.0 if values.size and values.max() <= 255 else 65535.0
        source = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    if source.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in source.info:
        source = source.convert("RGBA")
        paper = Image.new("RGBA", source.size, "white")
        return Image.alpha_composite(paper, source).convert("RGB")
    return source if source.mode == "RGB" else source.convert("RGB")


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


def _open_pdf(path: Path, name: str) -> Iterator[Item]:
    for label, drawn in draw_pages(path, name):
        if isinstance(drawn, str):
            yield Item(label, problem=drawn)
            continue
        try:
            yield Item(label, _checked(drawn, label))
        except DatasetError as err:
            yield Item(label, problem=err.problem)
