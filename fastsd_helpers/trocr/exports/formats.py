"""The file formats a page can be written in: which write a file for each page, and which one for a whole input."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastsd_helpers.errors import SettingsError, needs_package
from fastsd_helpers.trocr.exports.alto import alto_xml
from fastsd_helpers.trocr.exports.hocr import hocr_html
from fastsd_helpers.trocr.exports.page_xml import page_xml
from fastsd_helpers.trocr.exports.pdf import searchable_pdf
from fastsd_helpers.trocr.exports.record import PageRecord, settled
from fastsd_helpers.trocr.exports.tables import pages_csv, pages_json, pages_text
from fastsd_helpers.trocr.exports.xml import load_lxml

__all__ = ["FORMATS", "PER_PAGE", "WHOLE", "parse_formats", "require_formats", "whole_file"]

# Format -> (ending, what writes it).
PER_PAGE: dict[str, tuple[str, Callable[[PageRecord], bytes]]] = {
    "alto": (".alto.xml", alto_xml),
    "page": (".page.xml", page_xml),
    "hocr": (".hocr", hocr_html),
}
WHOLE = {"txt": ".txt", "json": ".json", "csv": ".csv", "pdf": ".pdf"}
FORMATS = (*WHOLE, *PER_PAGE)


def parse_formats(text: str) -> tuple[str, ...]:
    """`alto,pdf` -> ("alto", "pdf").

    Raises:
        SettingsError: one that does not exist.
    """
    wanted = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not wanted:
        raise SettingsError(
            f"--format has {', '.join(unknown) or 'nothing in it'}.",
            f"Choose from {', '.join(FORMATS)}, with commas between them; jsonl stands alone.",
        )
    return wanted


def require_formats(formats: Sequence[str]) -> None:
    """Refuse formats whose package is not installed, before anything is read.

    Raises:
        DependencyMissing: naming the package.
    """
    if set(formats) & set(PER_PAGE):
        load_lxml()
    if "pdf" in formats:
        with needs_package("Writing a searchable PDF", "Run: fastsd install trocr, or choose other formats."):
            import img2pdf  # noqa: F401
            import pikepdf  # noqa: F401


def whole_file(format: str, source: Path, records: Iterable[PageRecord], least_confidence: float = 0.0) -> bytes:
    """The content of the one file of an input: txt, json, csv or pdf.

    Args:
        source: the image or PDF the pages are of.
        least_confidence: txt and pdf leave out the text of lines that are less sure.
    """
    if format == "json":
        return pages_json(records)
    if format == "csv":
        return pages_csv(records)
    kept = [settled(record, least_confidence)[0] for record in records]
    return pages_text(kept) if format == "txt" else searchable_pdf(source, kept)
