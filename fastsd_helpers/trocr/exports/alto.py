"""A page as ALTO 4.4, in pixels: what libraries and eScriptorium exchange."""

from typing import Any

from fastsd_helpers import __version__
from fastsd_helpers.trocr.exports.record import PageRecord, RecordLine
from fastsd_helpers.trocr.exports.xml import as_bytes, new_tree, points_text

__all__ = ["NAMESPACE", "alto_xml"]

NAMESPACE = "http://www.loc.gov/standards/alto/ns-v4#"
_SCHEMA = "http://www.loc.gov/standards/alto/v4/alto-4-4.xsd"
_MARGIN, _GUESS = "margin", "estimated"


def alto_xml(record: PageRecord) -> bytes:
    """The page as ALTO.

    Source: ALTO Editorial Board, alto-4-4.xsd.
    """
    root, add = new_tree(NAMESPACE, _SCHEMA, "alto", SCHEMAVERSION="4.4")
    _add_description(add, root, record)
    tags = add(root, "Tags")
    add(tags, "LayoutTag", ID=_MARGIN, LABEL="margin", DESCRIPTION="writing along the edge of the page")
    add(tags, "OtherTag", ID=_GUESS, LABEL="estimated", DESCRIPTION="position estimated from the line's width")
    if record.regions:
        group = add(add(root, "ReadingOrder"), "OrderedGroup", ID="order")
        for place in range(1, len(record.regions) + 1):
            add(group, "ElementRef", ID=f"order{place}", REF=f"r{place}")
    width, height = record.size
    size = {"WIDTH": str(width), "HEIGHT": str(height)}
    page = add(add(root, "Layout"), "Page", ID="page", PHYSICAL_IMG_NR=str(record.number), **size)
    space = add(page, "PrintSpace", HPOS="0", VPOS="0", **size)
    for place, region in enumerate(record.regions, 1):
        block = add(space, "TextBlock", ID=f"r{place}", **_place(region.box))
        if region.kind == "margin":
            block.set("TAGREFS", _MARGIN)
        for number, line in enumerate(region.lines, 1):
            _add_line(add, block, f"r{place}l{number}", line)
    return as_bytes(root)


def _add_description(add: Any, root: Any, record: PageRecord) -> None:
    about = add(root, "Description")
    add(about, "MeasurementUnit", "pixel")
    add(add(about, "sourceImageInformation"), "fileName", record.file)
    step = add(about, "Processing", ID="reading")
    add(step, "processingCategory", "contentGeneration")
    add(step, "processingStepDescription", "handwritten text recognition")
    if record.reader:
        add(step, "processingStepSettings", f"recognition model: {record.reader}")
    software = add(step, "processingSoftware")
    add(software, "softwareName", "fastsd_helpers")
    add(software, "softwareVersion", __version__)


def _place(box: tuple[int, int, int, int]) -> dict[str, str]:
    left, top, right, bottom = box
    return {"HPOS": str(left), "VPOS": str(top), "WIDTH": str(right - left), "HEIGHT": str(bottom - top)}


def _add_line(add: Any, block: Any, name: str, line: RecordLine) -> None:
    item = add(block, "TextLine", ID=name, BASELINE=points_text(line.baseline), **_place(line.box))
    add(add(item, "Shape"), "Polygon", POINTS=points_text(line.polygon))
    if not line.words:  # the schema wants a String in every line
        add(item, "String", ID=f"{name}w1", CONTENT="", WC=f"{line.confidence:.4f}", **_place(line.box))
    before: tuple[int, int, int, int] | None = None
    for number, word in enumerate(line.words, 1):
        if before is not None:
            gap = {"HPOS": str(min(before[2], word.box[0])), "VPOS": str(before[1])}
            add(item, "SP", WIDTH=str(max(0, word.box[0] - before[2])), **gap)
        tags = {"TAGREFS": _GUESS} if word.estimated else {}
        sure = f"{word.confidence:.4f}"
        add(item, "String", ID=f"{name}w{number}", CONTENT=word.text, WC=sure, **tags, **_place(word.box))
        before = word.box
