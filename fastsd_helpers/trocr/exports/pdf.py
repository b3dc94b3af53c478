"""Searchable PDF: the scan as it is, and what was read as invisible text in the place where it is written."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DatasetError, FastSDError, needs_package
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.exports.record import PageRecord, RecordLine

__all__ = ["searchable_pdf"]

_INVISIBLE = 3  # text rendering mode
_EM = 0.5  # width of a glyph, in heights
_ORIENTATION = 0x0112  # the tag of EXIF and TIFF
_USUAL_DPI = 200  # for images that say none; only the size of the sheet depends on it
_HINT = "Run: fastsd install trocr, or choose other formats."


def searchable_pdf(source: Path, records: Sequence[PageRecord]) -> bytes:
    """Make a searchable PDF of an image or PDF file and its pages as they were read.

    The images of the file stay as they are, byte for byte, wherever PDF has their format; a picture of a format that
    PDF lacks (WebP, HEIC, transparent PNG) is put in as it was read, without loss.

    Raises:
        DependencyMissing: pikepdf or img2pdf is not installed.
        DatasetError: the file cannot be opened as a PDF or put into one.
    """
    with needs_package("Writing a searchable PDF", _HINT):
        import pikepdf
    try:
        with pikepdf.open(_as_pdf(source, records)) as document:
            font = _Font()
            written = []
            for record in records:
                if record.number <= len(document.pages):
                    page = document.pages[record.number - 1]
                    if content := _content(record, _to_sheet(page, record.size), font):
                        written.append((page, content))
            if any(page.resources.get("/Font") for page, _content in written):
                logger.warning("%s has text already, which stays: a search finds it and what was read.", source.name)
            if written:
                made = font.make(document)
                for page, content in written:
                    _put_under(document, page, made, content)
            if source.suffix.lower() != ".pdf" and "/ID" in document.trailer:
                del document.trailer["/ID"]  # img2pdf makes one of the clock
            out = io.BytesIO()
            document.save(out, deterministic_id=not document.is_encrypted)
            return out.getvalue()
    except pikepdf.PasswordError as err:
        raise DatasetError(f"{source.name} is protected by a password.", "Save it without one.") from err
    except pikepdf.PdfError as err:
        raise DatasetError(
            f"{source.name} cannot become a searchable PDF: {err}.", "Save its pages as images."
        ) from err


def _as_pdf(source: Path, records: Sequence[PageRecord]) -> Any:
    if source.suffix.lower() == ".pdf":
        return source
    with needs_package("Writing a searchable PDF", _HINT):
        import img2pdf

    dpi = next((record.dpi for record in records if record.dpi), None) or _USUAL_DPI
    how = {"nodate": True, "rotation": img2pdf.Rotation.ifvalid}
    how["layout_fun"] = img2pdf.get_fixed_dpi_layout_fun((dpi, dpi))
    data = source.read_bytes()
    if _is_plain(data) and not _is_turned(source, records):
        try:
            return io.BytesIO(img2pdf.convert(data, **how))
        except Exception:  # it names a class of its own for each thing that PDF lacks, and takes many from Pillow
            pass
    size = {record.number: record.size for record in records}
    last = max(size, default=0)
    # Frames that could not be read are pages too, or those after them would get each other's text.
    drawn = [_redrawn(source, number, size.get(number, size[last])) for number in range(1, last + 1)]
    return io.BytesIO(img2pdf.convert(drawn, **how))


def _is_plain(data: bytes) -> bool:
    """Whether a picture may go into a PDF as it is: of an animation only the first frame is a page."""
    return data[:3] == b"\xff\xd8\xff" or (data[:4] in (b"\x89PNG", b"II*\0", b"MM\0*") and b"acTL" not in data[:4096])


def _is_turned(source: Path, records: Sequence[PageRecord]) -> bool:
    """Whether a frame is shown otherwise than it lies in the file, in a way that is not carried over into a PDF."""
    from fastsd_helpers.images import files

    with files.open_picture(source) as picture:
        carried = (1, 3, 6, 8) if picture.format in ("JPEG", "MPO") else (1,)
        for record in records:
            if record.number > 1:
                picture.seek(record.number - 1)
            if picture.getexif().get(_ORIENTATION, 1) not in carried:
                return True
    return False


def _redrawn(source: Path, number: int, size: tuple[int, int]) -> bytes:
    from fastsd_helpers.images.files import png_bytes
    from fastsd_helpers.trocr.pages.inputs import open_frame

    try:
        return png_bytes(open_frame(source, number))
    except FastSDError:  # blank paper cannot be read, and is a page all the same
        from PIL import Image

        width, height = size
        return png_bytes(Image.new("RGB", (max(1, width), max(1, height)), "white"))


def _to_sheet(page: Any, size: tuple[int, int]) -> tuple[float, float, float, float, float, float]:
    """The matrix from pixels of the page as it is shown to its own space, which /Rotate turns."""
    left, bottom, right, top = _shown_box(page)
    turn = int(page.get("/Rotate", 0)) % 360
    width, height = max(1, size[0]), max(1, size[1])
    wide, high = right - left, top - bottom
    if turn == 90:
        return 0, high / width, wide / height, 0, left, bottom
    if turn == 180:
        return -wide / width, 0, 0, high / height, right, bottom
    if turn == 270:
        return 0, -high / width, -wide / height, 0, right, top
    return wide / width, 0, 0, -high / height, left, top


def _shown_box(page: Any) -> tuple[float, float, float, float]:
    """What of a page is shown: its crop box, as far as the page goes; left, bottom, right, top."""
    crop, media = ([float(value) for value in box] for box in (page.cropbox, page.mediabox))
    # Corners may come in any order.
    (left, bottom, right, top), (low, under, high, over) = (
        (min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in (crop, media)
    )
    shown = max(left, low), max(bottom, under), min(right, high), min(top, over)
    return shown if shown[0] < shown[2] and shown[1] < shown[3] else (low, under, high, over)


def _content(record: PageRecord, sheet: tuple[float, ...], font: "_Font") -> bytes:
    """The drawing instructions for the text of a page; empty where there is none."""
    shown = [text for line in record.lines if line.words for text in _line(line, sheet, font)]
    return "\n".join(["q", "BT", f"{_INVISIBLE} Tr", *shown, "ET", "Q", ""]).encode() if shown else b""


def _line(line: RecordLine, sheet: tuple[float, ...], font: "_Font") -> list[str]:
    def moved(x: float, y: float) -> tuple[float, float]:
        a, b, c, d, e, f = sheet
        return a * x + c * y + e, b * x + d * y + f

    (x0, y0), (x1, y1) = line.baseline[0], line.baseline[-1]
    length = math.hypot(x1 - x0, y1 - y0) or 1.0
    along = (x1 - x0) / length, (y1 - y0) / length
    # Height across the line: how far its outline reaches to both sides of the baseline.
    across = [along[0] * (y - y0) - along[1] * (x - x0) for x, y in line.polygon]
    height = max(1.0, 0.8 * (max(across) - min(across)))
    shown = []
    for place, word in enumerate(line.words):
        left, top, right, bottom = word.box
        spots = [(x - x0) * along[0] + (y - y0) * along[1] for x in (left, right) for y in (top, bottom)]
        if abs(along[0]) > 0.9 or abs(along[1]) > 0.9:
            first, last = min(spots), max(spots)
        else:  # the box of a word that lies aslant is larger than the word
            middle, half = sum(spots) / 4, (max(spots) - min(spots)) / 2 - height / 2
            first, last = middle - max(1.0, half), middle + max(1.0, half)
        start = moved(x0 + along[0] * first, y0 + along[1] * first)
        end = moved(x0 + along[0] * last, y0 + along[1] * last)
        above = moved(x0 + along[0] * first + along[1] * height, y0 + along[1] * first - along[0] * height)
        size = max(0.1, math.dist(start, above))
        wide = max(0.1, math.dist(start, end))
        cos, sin = (end[0] - start[0]) / wide, (end[1] - start[1]) / wide
        stretch = 100 * wide / (size * _EM * max(1, len(word.text)))
        text = word.text + (" " if place < len(line.words) - 1 else "")
        shown.append(f"/{_Font.NAME} {size:.2f} Tf {stretch:.2f} Tz")
        shown.append(
            f"{cos:.5f} {sin:.5f} {-sin:.5f} {cos:.5f} {start[0]:.2f} {start[1]:.2f} Tm <{font.codes(text)}> Tj"
        )
    return shown


def _put_under(document: Any, page: Any, font: Any, content: bytes) -> None:
    import pikepdf

    # Pages may share one dictionary of resources: this page gets its own.
    resources: Any = pikepdf.Dictionary(page.resources)
    shared: Any = resources.get("/Font") or {}
    fonts = pikepdf.Dictionary(shared)
    fonts[f"/{_Font.NAME}"] = font
    resources["/Font"] = fonts
    page.obj["/Resources"] = resources
    page.contents_add(document.make_stream(content), prepend=True)


class _Font:
    """A Type0 font with an empty glyph for every character that occurs, and the table that says which it is."""

    NAME = "FastsdText"

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def codes(self, text: str) -> str:
        """The text as hexadecimal codes of this font."""
        return "".join(f"{self._codes.setdefault(letter, len(self._codes) + 1):04X}" for letter in text)

    def make(self, document: Any) -> Any:
        """The font as an object of a document."""
        from pikepdf import Array, Dictionary, Name, String

        from fastsd_helpers.trocr.exports.glyphless import glyphless_font

        name = Name("/FastsdGlyphless")
        program = document.make_stream(glyphless_font())
        program["/Length1"] = len(glyphless_font())
        descriptor = Dictionary(
            Type=Name.FontDescriptor, FontName=name, Flags=4, FontBBox=Array([0, 0, 500, 1000]), ItalicAngle=0,
            Ascent=1000, Descent=0, CapHeight=1000, StemV=80, FontFile2=program,
        )  # fmt: skip
        system = Dictionary(Registry=String("Adobe"), Ordering=String("Identity"), Supplement=0)
        every = document.make_stream(b"\0\1" * (len(self._codes) + 1))
        inner = Dictionary(
            Type=Name.Font, Subtype=Name.CIDFontType2, BaseFont=name, CIDSystemInfo=system, DW=int(1000 * _EM),
            FontDescriptor=document.make_indirect(descriptor), CIDToGIDMap=every,
        )  # fmt: skip
        return document.make_indirect(
            Dictionary(
                Type=Name.Font,
                Subtype=Name.Type0,
                BaseFont=name,
                Encoding=Name("/Identity-H"),
                DescendantFonts=Array([document.make_indirect(inner)]),
                ToUnicode=document.make_stream(self._map().encode()),
            )
        )

    def _map(self) -> str:
        rows = [f"<{code:04X}> <{letter.encode('utf-16-be').hex().upper()}>" for letter, code in self._codes.items()]
        blocks = []
        for first in range(0, len(rows), 100):  # more are not allowed in one block
            block = rows[first : first + 100]
            blocks += [f"{len(block)} beginbfchar", *block, "endbfchar"]
        return "\n".join(
            [
                "/CIDInit /ProcSet findresource begin 12 dict begin begincmap",
                "/CIDSystemInfo << /Registry (Adobe) /Ordering (UCS) /Supplement 0 >> def",
                "/CMapName /Adobe-Identity-UCS def /CMapType 2 def",
                "1 begincodespacerange <0000> <FFFF> endcodespacerange",
                *blocks,
                "endcmap CMapName currentdict /CMap defineresource pop end end",
                "",
            ]
        )
