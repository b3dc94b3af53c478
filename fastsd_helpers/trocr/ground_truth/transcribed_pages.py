"""Lines from transcribed pages: PAGE and ALTO files, folders of them, and exports as a zip."""

import functools
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fastsd_helpers.errors import DatasetError, FastSDError
from fastsd_helpers.names.zips import read_names
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.ground_truth.alto_xml import read_alto
from fastsd_helpers.trocr.ground_truth.crops import PageCrops
from fastsd_helpers.trocr.ground_truth.labels import label_text
from fastsd_helpers.trocr.ground_truth.marked_page import MarkedPage, Point, bounds_of
from fastsd_helpers.trocr.ground_truth.page_xml import read_page_xml
from fastsd_helpers.trocr.ground_truth.pictures import PictureFinder, plain_name
from fastsd_helpers.trocr.ground_truth.rows import LeftOut, Row
from fastsd_helpers.trocr.ground_truth.xml_file import parse_xml, root_name
from fastsd_helpers.trocr.pages.inputs import PICTURE_SUFFIXES, open_page
from fastsd_helpers.wording import natural_order

__all__ = ["UnpackedZip", "find_transcriptions", "refuse_other_kinds", "rows_of_transcriptions", "unpacked"]

_ROOTS = {"PcGts": read_page_xml, "alto": read_alto, "ALTO": read_alto}
# What people bring that is not read: by the ending, or by the first element of an XML file; and the way on.
_CONVERT = "Export or convert it to PAGE or ALTO."
_OTHER_ENDINGS = {
    **dict.fromkeys((".hocr", ".html", ".htm", ".xhtml"), ("hOCR or a web page", _CONVERT)),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), ("a spreadsheet", "Save it as CSV.")),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf"), ("a text document", "Save it as plain text, a file a line.")),
}
_OTHER_ROOTS = {
    "TEI": ("TEI", _CONVERT),
    "document": ("ABBYY's XML", _CONVERT),
    "html": ("hOCR or a web page", _CONVERT),
    "form": ("IAM's XML", "Put IAM's lines.txt there, which has the same texts."),
}
_MOST_FILES, _MOST_BYTES = 20_000, 40_000_000_000
_WANTED = (*PICTURE_SUFFIXES, ".pdf", ".xml", ".txt", ".csv", ".tsv", ".jsonl", ".parquet", *_OTHER_ENDINGS)
_SAME_SHAPE = 0.02  # how far the sides' ratios of an image and its transcription may differ, of the ratio
_LEAST_INSIDE = 0.5  # share of a line's box that must lie in the image


class UnpackedZip:
    """A zip's images and transcriptions in a temporary folder, which goes when this object does."""

    def __init__(self, path: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fastsd-zip-"))
        weakref.finalize(self, shutil.rmtree, self.folder, True)
        self.problems: list[LeftOut] = []
        try:
            with zipfile.ZipFile(path) as opened:
                self._unpack(path.name, opened)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as err:
            raise DatasetError(
                f"{path.name} is damaged, no zip file, or larger than the room for temporary files: {err}.",
                "Download it again, or unpack it and give the folder.",
            ) from err

    def _unpack(self, name: str, opened: zipfile.ZipFile) -> None:
        members = [member for member in opened.infolist() if not member.is_dir()]
        named = read_names(members)
        if said := named.line(name):
            logger.warning("%s", said)
        if len(members) > _MOST_FILES or sum(member.file_size for member in members) > _MOST_BYTES:
            raise DatasetError(f"{name} holds more than {_MOST_FILES} files or 40 GB.", "Unpack it; give the folder.")
        for member, shown in zip(members, named.names, strict=True):
            parts = [part for part in shown.split("/") if part not in ("", ".", "..")]
            if not parts or parts[0] == "__MACOSX" or not parts[-1].lower().endswith(_WANTED):
                continue
            if ":" in parts[0]:
                parts = parts[1:] or parts
            target = self.folder.joinpath(*parts)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
            except (RuntimeError, zipfile.BadZipFile, NotImplementedError, EOFError) as err:
                why = "is locked with a password" if member.flag_bits & 1 else f"is damaged ({err})"
                self.problems.append(LeftOut(f"{shown} in {name} {why}.", "a damaged file"))
                target.unlink(missing_ok=True)


def unpacked(path: Path) -> UnpackedZip:
    """A zip's contents, unpacked once and kept until this process ends."""
    state = path.stat()
    return _unpacked(path.absolute(), state.st_mtime_ns, state.st_size)


@functools.cache
def _unpacked(path: Path, _changed: int, _size: int) -> UnpackedZip:
    return UnpackedZip(path)


def find_transcriptions(folder: Path) -> list[Path]:
    """The PAGE and ALTO files below a folder, in natural order.

    Where both lie there for one image, as Transkribus exports them, PAGE counts: ALTO has less.
    """
    found: dict[Path, str] = {}
    for path in sorted(folder.rglob("*"), key=lambda path: natural_order(path.relative_to(folder).as_posix())):
        if path.suffix.lower() == ".xml" and not path.name.startswith("."):
            root = root_name(path)
            if root in _ROOTS:
                found[path] = root
    of_page = {_mark(path, folder) for path, root in found.items() if root == "PcGts"}
    both = [path for path, root in found.items() if root != "PcGts" and _mark(path, folder) in of_page]
    if both:
        logger.info("%d ALTO files are not used: there is PAGE for the same images, which has more.", len(both))
    return [path for path in found if path not in both]


def refuse_other_kinds(path: Path) -> None:
    """Name a file, or the first file below a folder, that may have been meant as ground truth and is not read.

    Raises:
        DatasetError: there is one: what it is, and the way on.
    """
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.name.startswith("."):
            continue
        root = root_name(file) if file.suffix.lower() == ".xml" else ""
        if kind := _OTHER_ENDINGS.get(file.suffix.lower()) or _OTHER_ROOTS.get(root):
            raise DatasetError(f"{file.name} is {kind[0]}, which is not read as ground truth.", kind[1])


def _mark(path: Path, folder: Path) -> tuple[str, ...]:
    """What a page's files have in common, wherever an export puts them: the name without ending, other folders."""
    parts = path.relative_to(folder).parts
    kept = [part for part in parts[:-1] if part.lower() not in ("page", "alto", "pagexml", "altoxml", "xml")]
    stem = plain_name(parts[-1])
    for ending in (".xml", ".alto", ".page"):
        stem = stem.removesuffix(ending)
    return (*kept, stem)


def rows_of_transcriptions(paths: list[Path], folder: Path) -> Iterator[Row | LeftOut]:
    """The lines of PAGE and ALTO files, page by page, in reading order; what cannot be used as a sentence each.

    Args:
        paths: files; their images lie beside them, a folder up, or in a folder `images`.
        folder: what the names of pages are relative to.
    """
    finders: dict[Path, PictureFinder] = {}
    for path in paths:
        place = path.parent
        if place not in finders:
            up = place.parent
            finders[place] = PictureFinder(place, [up, up / "images", up / "image", up / "img"])
        name = path.relative_to(folder).with_suffix("").as_posix() if path.is_relative_to(folder) else path.stem
        try:
            root = parse_xml(path)
            if root.tag not in _ROOTS:
                refuse_other_kinds(path)
                raise DatasetError(f"{path.name} is neither PAGE nor ALTO; it begins with <{root.tag}>.", "")
            pages = _ROOTS[root.tag](root)
        except FastSDError as err:
            yield LeftOut(err.problem, "an unreadable transcription")
            continue
        if not pages:
            yield LeftOut(f"{path.name} has no page in it.", "an unreadable transcription")
        for number, page in enumerate(pages, 1):
            of_page = f"{name} page {number}" if len(pages) > 1 else name
            yield from _rows_of_page(path, of_page, page, finders[place])


def _rows_of_page(path: Path, name: str, page: MarkedPage, finder: PictureFinder) -> Iterator[Row | LeftOut]:
    texts = [line for line in page.lines if line.text.strip()]
    empty = len(page.lines) - len(texts)
    if empty:
        yield LeftOut(f"{name}: {_counted(empty)} without text.", "no text", lines=empty)
    if not texts:
        return
    picture = finder.find_last(page.image) if page.image else None
    picture = picture or finder.find_last(_stem(path))
    if picture is None:
        wanted = page.image or f"{_stem(path)}.jpg"
        yield LeftOut(f"{name}: there is no image {wanted} beside it; {_counted(len(texts))} left out.",
                      "no image", lines=len(texts))  # fmt: skip
        return
    try:
        scale, upright, size = _fit(picture, page)
    except FastSDError as err:
        yield LeftOut(f"{name}: {err.problem} {_counted(len(texts))} left out.", "another image", lines=len(texts))
        return
    crops = PageCrops(picture, upright=upright, number=page.number)
    seen: set[Any] = set()
    for number, line in enumerate(page.lines, 1):
        if not line.text.strip():
            continue
        shown = f"{name} line {number}"
        called = f"{shown} ({line.id})" if line.id else shown
        if len(line.outline) < 3:
            yield LeftOut(f"{called} has no outline.", "no outline")
        elif (line.outline, line.text) in seen:
            yield LeftOut(f"{called} comes a second time.", "twice")
        else:
            seen.add((line.outline, line.text))
            outline = tuple((x * scale[0], y * scale[1]) for x, y in line.outline)
            baseline = tuple((x * scale[0], y * scale[1]) for x, y in line.baseline)
            if _share_inside(outline, size) < _LEAST_INSIDE:
                yield LeftOut(f"{called} lies outside of {picture.name}.", "outside of the image")
            else:
                label = label_text(line.text, called)
                crop = crops.add(outline, baseline)
                yield label if isinstance(label, LeftOut) else Row(shown, crop, label, name, page=name)


def _counted(lines: int) -> str:
    return f"{lines} line{'s' if lines != 1 else ''}"


def _stem(path: Path) -> str:
    """The image's name as the transcription's own: `0001.alto.xml` is of `0001`."""
    return PurePosixPath(path.name).stem.removesuffix(".alto").removesuffix(".page")


def _fit(picture: Path, page: MarkedPage) -> tuple[tuple[float, float], bool, tuple[int, int]]:
    """How the page's units become pixels: (scale across and down, whether the image is taken upright, its size).

    Raises:
        DatasetError: the image cannot be opened or has another shape than the transcription says.
    """
    from fastsd_helpers.images import files

    try:
        if picture.suffix.lower() == ".pdf" or page.number > 1:
            raw, orientation = open_page(picture, page.number).size, 1
        else:
            with files.open_picture(picture) as opened:
                raw, orientation = opened.size, opened.getexif().get(0x0112, 1)
    except (files.PictureProblem, OSError) as err:
        raise DatasetError(f"{picture.name} cannot be opened: {err}.", "Copy it again.") from err
    sideways = (raw[1], raw[0]) if orientation >= 5 else raw
    width, height = page.size
    if width <= 0 or height <= 0:
        if not page.in_pixels:
            raise DatasetError("It is not in pixels and does not give the page's size.", "Export it in pixels.")
        return (1.0, 1.0), True, sideways
    # Some programs mark lines on the image as it is stored, others as it is shown.
    for upright, size in ((True, sideways), (False, raw)):
        if abs(size[0] * height / (size[1] * width) - 1) <= _SAME_SHAPE:
            return (size[0] / width, size[1] / height), upright, size
    raise DatasetError(
        f"{picture.name} is {raw[0]} x {raw[1]} px, and its transcription is of one of {width:g} x {height:g}.",
        "Put the image there that was transcribed.",
    )


def _share_inside(outline: tuple[Point, ...], size: tuple[int, int]) -> float:
    left, top, right, bottom = bounds_of(outline)
    across = min(right, size[0]) - max(left, 0.0)
    down = min(bottom, size[1]) - max(top, 0.0)
    area = (right - left) * (bottom - top)
    return max(0.0, across) * max(0.0, down) / area if area > 0 else 0.0
