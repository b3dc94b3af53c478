"""Pages as plain text, JSON and CSV."""

import csv
import io
import json
from collections.abc import Iterable

from fastsd_helpers.trocr.exports.record import PageRecord

__all__ = ["BOM", "no_formula", "pages_csv", "pages_json", "pages_text"]

BOM = "\ufeff"  # a spreadsheet takes a file without it for its own country's code page
_HEAD = ("page", "region", "line", "text", "confidence", "left", "top", "right", "bottom", "notes", "problem")


def no_formula(text: str) -> str:
    """Text that no spreadsheet computes: an apostrophe before what it would take for a formula."""
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") or text[:1] in ("\t", "\r") else text


def pages_text(records: Iterable[PageRecord]) -> bytes:
    """The lines alone, one below the other; an empty line between two pages."""
    pages = ["".join(f"{line.text}\n" for line in record.lines) for record in records]
    return "\n".join(pages).encode()


def pages_json(records: Iterable[PageRecord]) -> bytes:
    """All that is known of the pages: {"pages": [...]}."""
    return (
        json.dumps({"pages": [record.as_json() for record in records]}, ensure_ascii=False, indent=1) + "\n"
    ).encode()


def pages_csv(records: Iterable[PageRecord]) -> bytes:
    """A row for each line, with its box; a page that could not be read has one with the reason."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(_HEAD)
    for record in records:
        if record.problem or not record.lines:
            why = no_formula(record.problem or "no line was found")
            writer.writerow([no_formula(record.name), "", "", "", "", "", "", "", "", "", why])
        for place, region in enumerate(record.regions, 1):
            for number, line in enumerate(region.lines, 1):
                row = [
                    no_formula(record.name),
                    f"{region.kind} {place}",
                    number,
                    no_formula(line.text),
                    line.confidence,
                ]
                writer.writerow([*row, *line.box, " ".join(line.notes), ""])
    return (BOM + out.getvalue()).encode()
