"""Tables of lines: .csv, .tsv, .jsonl and .txt, with an image's name and its text; IAM's and PPOCRLabel's lists."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr.ground_truth.iam import is_iam, rows_of_iam
from fastsd_helpers.trocr.ground_truth.labels import (
    GROUP_COLUMNS,
    PAGE_COLUMNS,
    PICTURE_COLUMNS,
    TEXT_COLUMNS,
    column_of,
    label_text,
    read_texts,
)
from fastsd_helpers.trocr.ground_truth.pictures import PictureFinder
from fastsd_helpers.trocr.ground_truth.ppocr import is_ppocr, rows_of_ppocr
from fastsd_helpers.trocr.ground_truth.rows import LeftOut, Row

__all__ = ["OWN_NAME", "TABLES", "TABLE_SUFFIXES", "no_columns", "rows_of_table"]

# What a line is called in tables that we write ourselves, where its image lies elsewhere.
OWN_NAME = "fastsd_line"
TABLES = (
    *("metadata.jsonl", "metadata.csv", "labels.csv", "labels.tsv", "labels.jsonl", "labels.txt", "gt.txt"),
    *("lines.txt", "words.txt", "ascii/lines.txt", "ascii/words.txt", "Label.txt", "rec_gt.txt"),
)
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")


def rows_of_table(path: Path) -> Iterator[Row | LeftOut]:
    """The lines of one table; a row that cannot be used becomes a sentence with its number.

    Raises:
        DatasetError: it cannot be read, or has no columns for images and texts.
    """
    text = next(iter(read_texts([path]).values()))
    if isinstance(text, LeftOut):
        raise DatasetError(str(text), "Save it again as UTF-8.")
    suffix = path.suffix.lower()
    if suffix == ".txt" and is_iam(text):
        yield from rows_of_iam(path, text)
        return
    if suffix == ".txt" and is_ppocr(text):
        yield from rows_of_ppocr(path, text)
        return
    if suffix == ".jsonl":
        rows = _rows_of_jsonl(path, text)
    elif suffix == ".txt":
        rows = _rows_of_text(text)
    else:
        rows = _rows_of_csv(path, text)
    yield from _found_rows(path, rows)


def _found_rows(path: Path, rows: Iterable[tuple[int, Any]]) -> Iterator[Row | LeftOut]:
    finder = PictureFinder(path.parent)
    seen: dict[str, str] = {}
    for number, row in rows:
        place = f"{path.name}, line {number}:"
        if isinstance(row, str):
            yield LeftOut(f"{place} {row}", "a broken row")
            continue
        name, label, group, page, *elsewhere = row
        if name in seen:
            same = "the same text" if seen[name] == label else "another text"
            yield LeftOut(f"{place} {name} comes a second time, with {same}; left out.", "twice")
            continue
        seen[name] = label
        picture = finder.find(elsewhere[0] if elsewhere else name)
        if picture is None:
            yield LeftOut(f"{place} there is no image {name}.", "no image")
            continue
        found = label_text(label, name)
        yield found if isinstance(found, LeftOut) else Row(name, picture, found, group, page or "")


def no_columns(what: str, columns: Iterable[Any], picture: Any, text: Any) -> DatasetError:
    """The error of a table without a column for images or texts."""
    missing = " and ".join(words for words, column in (("the image's name", picture), ("its text", text)) if not column)
    return DatasetError(
        f"{what} has no column for {missing}; its columns are {', '.join(map(str, columns))}.",
        f"Name them {PICTURE_COLUMNS[0]} and {TEXT_COLUMNS[0]}.",
    )


def _rows_of_jsonl(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as err:
            yield number, f"not JSON: {err}."
            continue
        if not isinstance(row, dict):
            yield number, "not a JSON object."
            continue
        picture, label = column_of(row, PICTURE_COLUMNS), column_of(row, TEXT_COLUMNS)
        if not picture or not label:
            raise no_columns(f"{path.name}, line {number},", row, picture, label)
        group, page = (_of_column(row, columns) for columns in (GROUP_COLUMNS, PAGE_COLUMNS))
        if OWN_NAME in row:
            yield number, (str(row[OWN_NAME]), row[label], group, page, str(row[picture]))
        else:
            yield number, (str(row[picture]), row[label], group, page)


def _of_column(row: dict[str, Any], wanted: tuple[str, ...]) -> str | None:
    column = column_of(row, wanted)
    return str(row[column]) if column and row[column] not in (None, "") else None


def _rows_of_text(text: str) -> Iterator[tuple[int, Any]]:
    """`name<tab>text` or `name text`, as IAM's gt_test.txt; '#' begins a comment.

    Only a line feed ends a line: other signs that Python takes for an end (U+2028, form feed) may stand in a text.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, label = line.partition("\t") if "\t" in line else line.partition(" ")
        yield number, (name.strip(), label, None, None) if separator else "a name and no text."


def _rows_of_csv(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    head = next((line for line in text.split("\n") if line.strip()), "")
    # Excel takes this line for the separator of the table below it.
    said = re.fullmatch(r"sep=(.)\s*", head.strip("\ufeff\r"))
    if said:
        text = text.replace(head, "", 1)
        head = next((line for line in text.split("\n") if line.strip()), "")
    # Tabs in a .csv and semicolons (Excel in half of Europe) are common; the head tells, texts may hold any of them.
    delimiter = said[1] if said else max("\t;,|", key=head.count)
    try:
        columns, rows = _parse_csv(path, text, delimiter, csv.QUOTE_MINIMAL)
        run_on = any("\n" in field for _number, row in rows for field in row.values() if isinstance(field, str))
    except DatasetError:
        run_on = True
        if delimiter != "\t":
            raise
    if run_on and delimiter == "\t":
        # Programs that write tabs often do not quote: a text that begins with " has run on to the next one.
        columns, rows = _parse_csv(path, text, delimiter, csv.QUOTE_NONE)
    picture, label = column_of(columns, PICTURE_COLUMNS), column_of(columns, TEXT_COLUMNS)
    if not picture or not label:
        raise no_columns(path.name, columns, picture, label)
    for number, row in rows:
        if row.get(None):
            yield number, f"more fields than the head has ({row[picture]}); put quotes around the text."
        elif row[picture] is None or row[label] is None:
            yield number, "fewer fields than the head has."
        elif "\n" in row[label].strip():
            lost = row[label].strip().count("\n")
            yield number, f"the text of {row[picture]} goes on over {lost} more lines; a quote in it is not closed?"
        else:
            group, page = (_of_column(row, wanted) for wanted in (GROUP_COLUMNS, PAGE_COLUMNS))
            yield number, (row[picture].strip(), row[label], group, page)


def _parse_csv(
    path: Path, text: str, delimiter: str, quoting: Literal[0, 3]
) -> tuple[list[str], list[tuple[int, dict[Any, Any]]]]:
    """The head and the rows of a table, each row with the number of its last line."""
    begins = re.match(r"(?:[^\S\n]*\n)*", text)
    blank = begins[0] if begins else ""  # lines before the head, which would be taken for it
    above = blank.count("\n")
    reader = csv.DictReader(io.StringIO(text[len(blank) :], newline=""), delimiter=delimiter, quoting=quoting)
    try:
        return list(reader.fieldnames or []), [(above + reader.line_num, row) for row in reader]
    except csv.Error as err:
        raise DatasetError(
            f"{path.name}, after line {above + reader.line_num}: {err}.", "Look for a quote that is not closed there."
        ) from err
