"""Lines with their text, from whatever people bring: tables, pairs of files, imagefolders, datasets.

A row that cannot be used is reported with its name and left out; the rest is used.
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import write_atomic
from fastsd_helpers.names.code_pages import decode_text, guess_page
from fastsd_helpers.trocr.pages.inputs import PICTURE_SUFFIXES

__all__ = ["LabelledLine", "LineSet", "group_of", "read_lines", "write_table"]

logger = logging.getLogger("fastsd_helpers")

_PICTURE_COLUMNS = ("file_name", "filename", "image", "image_path", "file", "path", "picture", "img", "name")
_TEXT_COLUMNS = ("text", "transcription", "transcript", "label", "ground_truth", "gt", "sentence", "words")
_GROUP_COLUMNS = ("group", "writer", "writer_id", "page", "document", "form")
# What a line is called in tables that we write ourselves, where its image lies elsewhere.
_OWN_NAME = "fastsd_line"
_TABLES = ("metadata.jsonl", "metadata.csv", "labels.csv", "labels.tsv", "labels.jsonl", "labels.txt", "gt.txt")
_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")


@dataclass(frozen=True)
class LabelledLine:
    """One line and what it says; `picture` is a path or an opened image, `group` the writer or page it is from."""

    name: str
    picture: Any
    text: str
    group: str


@dataclass
class LineSet:
    """Lines with their text, and what was wrong with those left out."""

    lines: list[LabelledLine]
    problems: list[str] = field(default_factory=list)
    source: str = ""

    def report(self) -> dict[str, Any]:
        """Counts that show whether a set can be learned from: lines, groups, lengths, letters and their numbers."""
        letters = Counter(letter for line in self.lines for letter in line.text)
        lengths = sorted(len(line.text) for line in self.lines)
        texts = Counter(line.text for line in self.lines)
        return {
            "source": self.source,
            "lines": len(self.lines),
            "groups": len({line.group for line in self.lines}),
            "characters": sum(lengths),
            "length_median": lengths[len(lengths) // 2] if lengths else 0,
            "length_max": lengths[-1] if lengths else 0,
            "different_letters": len(letters),
            "rare_letters": "".join(sorted(letter for letter, count in letters.items() if count < 5)),
            "repeated_texts": sum(count - 1 for count in texts.values()),
            "left_out": len(self.problems),
        }

    def split(self, part: float, *, seed: int = 0) -> tuple["LineSet", "LineSet"]:
        """Divide into (the rest, about `part` of the lines), never one group into both.

        Lines of one writer or page are alike: split by line, a test would be of what was learned by heart.

        Raises:
            DatasetError: fewer than two groups.
        """
        groups = Counter(line.group for line in self.lines)
        if len(groups) < 2:
            raise DatasetError(
                "All lines are of one group (writer or page), so none can be held out.",
                "Give the held-out lines as a folder of their own, add a column 'group' to the table, or hold none out "
                "(--held-out 0).",
            )
        order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
        wanted = part * len(self.lines)
        chosen: set[str] = set()
        count = 0
        for group in order[:-1]:
            if count >= wanted:
                break
            if count + groups[group] <= 2 * wanted:  # one long book must not take most of what is to be learned
                chosen.add(group)
                count += groups[group]
        if not chosen:
            smallest = min(order, key=lambda group: groups[group])
            chosen, count = {smallest}, groups[smallest]
        if count > 2 * wanted:
            logger.warning(
                "%d of %d lines are held out, more than was asked for: the smallest writer or page has so many. Give "
                "held-out lines of their own, or finer groups.", count, len(self.lines),
            )  # fmt: skip
        rest = [line for line in self.lines if line.group not in chosen]
        held = [line for line in self.lines if line.group in chosen]
        return LineSet(rest, source=self.source), LineSet(held, source=self.source)


def read_lines(source: Any) -> LineSet:
    """Read lines with their text.

    Args:
        source: a table (.csv, .tsv, .jsonl, or .txt with the name, a tab or blank, and the text), a folder with one
            of these in it (also metadata.jsonl or metadata.csv, the Hub's imagefolder), a folder of pairs
            (`a.jpg` with `a.txt` or `a.gt.txt`), a Hub dataset with columns image and text, (image, text) pairs, or
            what this function gave before.

    Raises:
        DatasetError: there is nothing of the kind, or no line of it can be used.
    """
    if isinstance(source, LineSet):
        return source
    if not isinstance(source, (str, Path)):
        found = _from_objects(source)
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            table = next((path / name for name in _TABLES if (path / name).is_file()), None) or _only_table(path)
            found = _from_table(table) if table else _from_pairs(path)
        elif path.is_file() and path.suffix.lower() in _TABLE_SUFFIXES:
            found = _from_table(path)
        elif path.is_file():
            raise DatasetError(
                f"{path.name} is not a table of lines.", f"Give {', '.join(_TABLE_SUFFIXES)} or a folder."
            )
        else:
            raise DatasetError(f"There is no file or folder {path}.", "Check the path; names are case-sensitive.")
        found.source = str(path)
    for problem in found.problems[:20]:
        logger.warning("%s", problem)
    if len(found.problems) > 20:
        logger.warning("... and %d more lines left out.", len(found.problems) - 20)
    if not found.lines:
        raise DatasetError(
            f"{found.source or 'What was given'} has no usable line"
            + (f": {found.problems[0]}" if found.problems else "."),
            "Each line needs an image and its text.",
        )
    return found


def write_table(path: Path, lines: Iterable[LabelledLine]) -> Path:
    """Write lines whose images are files as a table that `read_lines` reads, under the names they have here."""
    rows = [
        {_OWN_NAME: line.name, "file_name": str(Path(line.picture).absolute()), "text": line.text, "group": line.group}
        for line in lines
    ]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def _only_table(folder: Path) -> Path | None:
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    return tables[0] if len(tables) == 1 else None


def _from_objects(source: Iterable[Any]) -> LineSet:
    found = LineSet([], source=type(source).__name__)
    columns = getattr(source, "column_names", None)
    if columns is not None:
        of_picture, of_text = _column(columns, _PICTURE_COLUMNS), _column(columns, _TEXT_COLUMNS)
        if not of_picture or not of_text:
            raise _no_columns("The dataset", columns, of_picture, of_text)
        of_group = _column(columns, _GROUP_COLUMNS)
        rows = ((row[of_picture], row[of_text], str(row[of_group]) if of_group else None) for row in source)
    else:
        rows = ((*row, None) if len(row) == 2 else row for row in source)
    for place, (picture, text, group) in enumerate(rows):
        _add(found, f"line {place + 1}", picture, text, group or f"line {place + 1}")
    return found


def _add(found: LineSet, name: str, picture: Any, text: Any, group: str) -> None:
    if not isinstance(text, str) or not text.strip():
        found.problems.append(f"{name} has no text.")
    else:
        found.lines.append(LabelledLine(name, picture, text.strip(), group))


def _from_pairs(folder: Path) -> LineSet:
    found = LineSet([])
    pictures = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        raise DatasetError(
            f"{folder} holds neither a table of lines nor images.",
            f"Put {', '.join(_TABLES[:3])} there, or images with a .txt of the same name.",
        )
    beside = {path: [path.with_suffix(".txt"), path.with_suffix(".gt.txt")] for path in pictures}
    texts = {path: next((file for file in files if file.is_file()), None) for path, files in beside.items()}
    written = {file: file.read_bytes() for file in texts.values() if file is not None}
    guess = guess_page(written.values())
    if guess is not None:
        logger.warning("%s", guess.line(f"Texts in {folder.name} are"))
    for path, text in texts.items():
        name = path.relative_to(folder).as_posix()
        if text is None:
            found.problems.append(f"{name} has no {path.stem}.txt beside it.")
            continue
        try:
            words = _decode(text, written[text], guess.code_page if guess else None)
            _add(found, name, path, words, group_of(name))
        except DatasetError as err:
            found.problems.append(f"{name}: {err.problem}")
    return found


def group_of(name: str) -> str:
    """The folder a line lies in, else its name without the line's number: a01-122-02.jpg is of a01-122."""
    parent, _, last = name.rpartition("/")
    stem = last.rsplit(".", 1)[0]
    page = re.fullmatch(r"(.+?)[-_]\d+", stem)
    return parent or (page[1] if page else stem)


def _decode(path: Path, data: bytes, page: str | None) -> str:
    text = decode_text(data, page)
    if "\ufffd" in text and "\ufffd".encode() not in data:
        before = text.partition("\ufffd")[0][-20:]
        kind = "UTF-16" if data[:1] in (b"\xff", b"\xfe") else "UTF-8"
        raise DatasetError(
            f"{path.name} is not {kind} throughout: after {before!r} it cannot be read.", "Save it again as UTF-8."
        )
    return text


def _column(columns: Iterable[str], wanted: tuple[str, ...]) -> str | None:
    by_name = {str(column).strip().lower(): column for column in columns}
    return next((by_name[name] for name in wanted if name in by_name), None)


def _no_columns(what: str, columns: Iterable[Any], picture: Any, text: Any) -> DatasetError:
    missing = " and ".join(words for words, column in (("the image's name", picture), ("its text", text)) if not column)
    return DatasetError(
        f"{what} has no column for {missing}; its columns are {', '.join(map(str, columns))}.",
        f"Name them {_PICTURE_COLUMNS[0]} and {_TEXT_COLUMNS[0]}.",
    )


def _from_table(path: Path) -> LineSet:
    data = path.read_bytes()
    guess = guess_page([data])
    if guess is not None:
        logger.warning("%s", guess.line(f"{path.name} is"))
    text = _decode(path, data, guess.code_page if guess else None)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows = _rows_of_jsonl(path, text)
    elif suffix == ".txt":
        rows = _rows_of_text(text)
    else:
        rows = _rows_of_csv(path, text)
    found = LineSet([])
    seen: dict[str, str] = {}
    for number, row in rows:
        if isinstance(row, str):
            found.problems.append(f"{path.name}, line {number}: {row}")
            continue
        name, label, group, *elsewhere = row
        if name in seen:
            same = "the same text" if seen[name] == label else "another text"
            found.problems.append(f"{path.name}, line {number}: {name} comes a second time, with {same}; left out.")
            continue
        seen[name] = label
        picture = _find_picture(path.parent, elsewhere[0] if elsewhere else name)
        if picture is None:
            found.problems.append(f"{path.name}, line {number}: there is no image {name}.")
            continue
        _add(found, name, picture, label, group or group_of(name))
    return found


def _find_picture(folder: Path, name: str) -> Path | None:
    """The file a table means; many name it without its folder (images/) or its ending."""
    for base in (folder, folder / "images", folder / "image", folder / "lines"):
        for suffix in ("", ".png", ".jpg", ".jpeg", ".tif"):
            # A text in the name's place may be longer than names can be, or hold what they cannot.
            with contextlib.suppress(OSError, ValueError):
                if (base / f"{name}{suffix}").is_file():
                    return base / f"{name}{suffix}"
    return None


def _rows_of_jsonl(path: Path, text: str) -> Iterable[tuple[int, Any]]:
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
        picture, label = _column(row, _PICTURE_COLUMNS), _column(row, _TEXT_COLUMNS)
        if not picture or not label:
            raise _no_columns(f"{path.name}, line {number},", row, picture, label)
        group = _column(row, _GROUP_COLUMNS)
        of_group = str(row[group]) if group else None
        if _OWN_NAME in row:
            yield number, (str(row[_OWN_NAME]), row[label], of_group, str(row[picture]))
        else:
            yield number, (str(row[picture]), row[label], of_group)


def _rows_of_text(text: str) -> Iterable[tuple[int, Any]]:
    """`name<tab>text` or `name text`, as IAM's gt_test.txt; '#' begins a comment."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, label = line.partition("\t") if "\t" in line else line.partition(" ")
        yield number, (name.strip(), label, None) if separator else "a name and no text."


def _rows_of_csv(path: Path, text: str) -> Iterable[tuple[int, Any]]:
    head = next((line for line in text.splitlines() if line.strip()), "")
    # Tabs in a .csv and semicolons (Excel in half of Europe) are common; the head tells, texts may hold any of them.
    delimiter = max("\t;,|", key=head.count)
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
    picture, label = _column(columns, _PICTURE_COLUMNS), _column(columns, _TEXT_COLUMNS)
    if not picture or not label:
        raise _no_columns(path.name, columns, picture, label)
    group = _column(columns, _GROUP_COLUMNS)
    for number, row in rows:
        if row.get(None):
            yield number, f"more fields than the head has ({row[picture]}); put quotes around the text."
        elif row[picture] is None or row[label] is None:
            yield number, "fewer fields than the head has."
        elif "\n" in row[label].strip():
            lost = row[label].strip().count("\n")
            yield number, f"the text of {row[picture]} goes on over {lost} more lines; a quote in it is not closed?"
        else:
            yield number, (row[picture].strip(), row[label], row[group] if group else None)


def _parse_csv(
    path: Path, text: str, delimiter: str, quoting: Literal[0, 3]
) -> tuple[list[str], list[tuple[int, dict]]]:
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
