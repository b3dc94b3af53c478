"""A page as PAGE XML, namespace 2019-07-15: what Transkribus, eScriptorium, OCR4all and OCR-D exchange."""

from typing import Any

from fastsd_helpers import __version__
from fastsd_helpers.trocr.exports.record import PageRecord, RecordLine, Word
from fastsd_helpers.trocr.exports.xml import as_bytes, new_tree, points_text, time_text

__all__ = ["NAMESPACE", "page_xml"]

NAMESPACE = "http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15"
_KINDS = {"text": "paragraph", "margin": "marginalia"}


def page_xml(record: PageRecord) -> bytes:
    """The page as PAGE XML; its times are those of the image, so that the same page gives the same bytes.

    Source: PRImA, PAGE-XML, pagecontent.xsd of 2019-07-15.
    """
    root, add = new_tree(NAMESPACE, f"{NAMESPACE}/pagecontent.xsd", "PcGts")
    about = add(root, "Metadata")
    add(about, "Creator", f"fastsd_helpers {__version__}")
    for tag in ("Created", "LastChange"):
        add(about, tag, time_text(record.changed))
    if record.reader:
        add(about, "MetadataItem", type="processingStep", name="recognition model", value=record.reader)
    width, height = record.size
    dots = f"{record.dpi:g}" if record.dpi else ""
    scale = {"imageXResolution": dots, "imageYResolution": dots, "imageResolutionUnit": "PPI"} if dots else {}
    size = {"imageWidth": str(width), "imageHeight": str(height)}
    page = add(root, "Page", imageFilename=record.file, **size, **scale)
    if record.number > 1:
        page.set("custom", f"pageNumber {{value:{record.number};}}")
    if record.regions:
        group = add(add(page, "ReadingOrder"), "OrderedGroup", id="order")
        for place in range(len(record.regions)):
            add(group, "RegionRefIndexed", index=str(place), regionRef=f"r{place + 1}")
    for place, region in enumerate(record.regions, 1):
        custom = f"readingOrder {{index:{place - 1};}}"
        item = add(page, "TextRegion", id=f"r{place}", type=_KINDS.get(region.kind, "other"), custom=custom)
        left, top, right, bottom = region.box
        add(item, "Coords", points=points_text([(left, top), (right, top), (right, bottom), (left, bottom)]))
        for number, line in enumerate(region.lines, 1):
            _add_line(add, item, f"r{place}l{number}", number - 1, line)
        _add_text(add, item, "\n".join(line.text for line in region.lines), None)
    return as_bytes(root)


def _add_line(add: Any, parent: Any, name: str, index: int, line: RecordLine) -> None:
    item = add(parent, "TextLine", id=name, custom=f"readingOrder {{index:{index};}}")
    add(item, "Coords", points=points_text(line.polygon))
    add(item, "Baseline", points=points_text(line.baseline))
    for number, word in enumerate(line.words, 1):
        _add_word(add, item, f"{name}w{number}", word)
    _add_text(add, item, line.text, line.confidence)


def _add_word(add: Any, parent: Any, name: str, word: Word) -> None:
    left, top, right, bottom = word.box
    item = add(parent, "Word", id=name)
    if word.estimated:
        item.set("custom", "position {estimated:true;}")
    add(item, "Coords", points=points_text([(left, top), (right, top), (right, bottom), (left, bottom)]))
    _add_text(add, item, word.text, word.confidence)


def _add_text(add: Any, parent: Any, text: str, confidence: float | None) -> None:
    item = add(parent, "TextEquiv", **({} if confidence is None else {"conf": f"{confidence:.4f}"}))
    add(item, "Unicode", text)
