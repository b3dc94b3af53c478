"""A page as hOCR 1.2: HTML that viewers and tools for PDFs take."""

from typing import Any

from fastsd_helpers import __version__
from fastsd_helpers.trocr.exports.record import PageRecord, RecordLine
from fastsd_helpers.trocr.exports.xml import as_bytes, load_lxml

__all__ = ["hocr_html"]

_XHTML = "http://www.w3.org/1999/xhtml"
_CAPABILITIES = "ocr_page ocr_carea ocr_par ocr_line ocrx_word ocrp_wconf"


def hocr_html(record: PageRecord) -> bytes:
    """The page as hOCR; words whose place is a guess have `data-estimated`.

    Source: hOCR, a microformat for OCR workflow and results, 1.2.
    """
    etree = load_lxml()
    root = etree.Element(f"{{{_XHTML}}}html", nsmap={None: _XHTML}, lang="und")

    def add(parent: Any, tag: str, text: str | None = None, **attributes: str) -> Any:
        made = etree.SubElement(parent, f"{{{_XHTML}}}{tag}", {k.rstrip("_"): v for k, v in attributes.items()})
        made.text = text
        return made

    head = add(root, "head")
    add(head, "title", record.name)
    add(head, "meta", charset="utf-8")
    add(head, "meta", name="ocr-system", content=f"fastsd_helpers {__version__}")
    add(head, "meta", name="ocr-capabilities", content=_CAPABILITIES)
    add(head, "meta", name="ocr-number-of-pages", content="1")
    width, height = record.size
    file = record.file.replace("\\", "\\\\").replace('"', '\\"')
    title = f'image "{file}"; bbox 0 0 {width} {height}; ppageno {record.number - 1}'
    if record.dpi:
        title += f"; scan_res {record.dpi:.0f} {record.dpi:.0f}"
    page = add(add(root, "body"), "div", class_="ocr_page", id="page_1", title=title)
    for place, region in enumerate(record.regions, 1):
        box = f"bbox {_numbers(region.box)}"
        area = add(page, "div", class_="ocr_carea", id=f"block_1_{place}", title=box)
        if region.kind != "text":
            area.set("data-kind", region.kind)
        paragraph = add(area, "p", class_="ocr_par", id=f"par_1_{place}", title=box)
        for number, line in enumerate(region.lines, 1):
            _add_line(add, paragraph, f"{place}_{number}", line)
    return as_bytes(root, doctype="<!DOCTYPE html>")


def _numbers(box: tuple[int, int, int, int]) -> str:
    return " ".join(map(str, box))


def _add_line(add: Any, parent: Any, name: str, line: RecordLine) -> None:
    title = f"bbox {_numbers(line.box)}; {_baseline(line)}; x_wconf {100 * line.confidence:.0f}"
    item = add(parent, "span", class_="ocr_line", id=f"line_1_{name}", title=title)
    for number, word in enumerate(line.words, 1):
        title = f"bbox {_numbers(word.box)}; x_wconf {100 * word.confidence:.0f}"
        made = add(item, "span", word.text, class_="ocrx_word", id=f"word_1_{name}_{number}", title=title)
        if word.estimated:
            made.set("data-estimated", "yes")
        made.tail = " " if number < len(line.words) else None


def _baseline(line: RecordLine) -> str:
    """Slope, and height above the box's lower left corner, which a line that stands upright has not."""
    (x, y), (to_x, to_y) = line.baseline[0], line.baseline[-1]
    left, _top, _right, bottom = line.box
    if abs(to_x - x) < abs(to_y - y):
        return f"textangle {'90' if to_y < y else '270'}"
    slope = (to_y - y) / (to_x - x)
    return f"baseline {slope:.4f} {y + slope * (left - x) - bottom:.0f}"
