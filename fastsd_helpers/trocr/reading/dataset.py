"""Lines with their text, from whatever people bring: tables, pairs of files, imagefolders, datasets.

A row that cannot be used is reported with its name and left out; the rest is used.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import write_atomic
from fastsd_helpers.images.files import png_bytes
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.alignment.pages import rows_of_aligned_pages
from fastsd_helpers.trocr.ground_truth.objects import rows_of_objects
from fastsd_helpers.trocr.ground_truth.pairs import rows_of_pairs
from fastsd_helpers.trocr.ground_truth.parquet import rows_of_parquet
from fastsd_helpers.trocr.ground_truth.rows import LeftOut, Row
from fastsd_helpers.trocr.ground_truth.tables import OWN_NAME, TABLE_SUFFIXES, TABLES, rows_of_table
from fastsd_helpers.trocr.ground_truth.transcribed_pages import (
    find_transcriptions,
    refuse_other_kinds,
    rows_of_transcriptions,
    unpacked,
)
from fastsd_helpers.trocr.pages.inputs import gather, shown_name

__all__ = ["LabelledLine", "LineSet", "align_lines", "group_of", "read_lines", "with_files", "write_table"]


# What the Hub and others call the parts of a divided set, and the part each is.
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Microsoft's layout of IAM: a table a part, and one folder of images.
_PART_TABLES = {f"{stem}_{name}.txt": part for stem in ("gt", "rec_gt") for name, part in _PARTS.items()}


@dataclass(frozen=True)
class LabelledLine:
    """One line and what it says.

    Attributes:
        picture: a path, an opened image, or an object that gives its pixels when asked. group: the writer or page it is
            from. page: the page, where that is another thing. part: train, validation or test, of a divided set.
    """

    name: str
    picture: Any
    text: str
    group: str
    page: str = ""
    part: str = ""


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
            "left_out_by_reason": self.left_out_by_reason(),
        }

    def left_out_by_reason(self) -> dict[str, int]:
        """How many lines were left out for what reason, the most frequent first."""
        counted: Counter[str] = Counter()
        for problem in self.problems:
            counted[getattr(problem, "reason", "unusable")] += getattr(problem, "lines", 1)
        return dict(counted.most_common())

    def of_part(self, *parts: str) -> "LineSet":
        """The lines of the first of these parts that has any."""
        for part in parts:
            if lines := [line for line in self.lines if line.part == part]:
                return LineSet(lines, self.problems, f"{self.source} ({part})")
        return LineSet([], self.problems, self.source)

    def has_part(self, part: str) -> bool:
        """Whether the set is divided and has lines of this part."""
        return any(line.part == part for line in self.lines)

    def in_form(self, form: Literal["NFC", "NFD", "none"]) -> "LineSet":
        """The same lines with their texts in one Unicode form: composed (NFC), decomposed (NFD), or as they are."""
        if form == "none":
            return self
        lines = [replace(line, text=unicodedata.normalize(form, line.text)) for line in self.lines]
        return LineSet(lines, self.problems, self.source)

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
        source: a table (.csv, .tsv, .jsonl, .parquet, or .txt with the name, a tab or blank, and the text; IAM's
            lines.txt and words.txt; PPOCRLabel's Label.txt), a PAGE or ALTO file, a zip of any of these, a folder with
            some of them in it (the Hub's imagefolder with its parts too), a folder of pairs (`a.jpg` with `a.gt.txt`
            or `a.txt`), a Hub dataset with columns image and text or several by part, a data frame, rows with names,
            (image, text) pairs, or what this function gave before.

    Raises:
        DatasetError: there is nothing of the kind, or no line of it can be used.
    """
    if isinstance(source, LineSet):
        return source
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        found = _gathered(_rows_of_path(path), str(path))
    else:
        found = _gathered(rows_of_objects(source), type(source).__name__)
    return _told(found)


def align_lines(reader: Any, source: Any, text: Path, *, keep: Path | None = None, order: Any = "auto") -> LineSet:
    """Lines of pages whose whole text is known: see `rows_of_aligned_pages`.

    Args:
        keep: a table to write them to, with their images beside it; where it is there already, of the same pages and
            text, they are taken from it.

    Raises:
        DatasetError: there is no page or no text, or no line of it can be used.
    """
    if keep is None:
        return _told(_gathered(rows_of_aligned_pages(reader, source, text, order=order), str(source)))
    mark, made = keep.with_suffix(".from.json"), _made_of(reader, source, text, order)
    if not (keep.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == made):
        mark.unlink(missing_ok=True)
        write_table(keep, align_lines(reader, source, text, order=order).lines)
        write_atomic(mark, made.encode())
    return read_lines(keep)


def _made_of(reader: Any, source: Any, text: Path, order: str) -> str:
    """What aligned lines depend on: the files of the pages and their texts, and the reader."""
    paths = [Path(source).expanduser(), text]
    files = [found for path in paths for found in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    states = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.is_file()]
    return json.dumps([states, str(reader.checkpoint.folder), reader.settings.beams, order])


def _told(found: LineSet) -> LineSet:
    """The set as it is, after telling what was left out of it."""
    for problem in found.problems[:20]:
        logger.warning("%s", problem)
    if len(found.problems) > 20:
        logger.warning("... and %d more lines left out.", len(found.problems) - 20)
    if found.problems:
        told = (f"{count} {reason}" for reason, count in found.left_out_by_reason().items())
        logger.warning("%d lines are used; left out: %s.", len(found.lines), ", ".join(told))
    if not found.lines:
        raise DatasetError(
            f"{found.source or 'What was given'} has no usable line"
            + (f": {found.problems[0]}" if found.problems else "."),
            "Each line needs an image and its text.",
        )
    return found


def write_table(path: Path, lines: Iterable[LabelledLine]) -> Path:
    """Write lines as a table that `read_lines` reads, under the names they have here.

    Images that are no files of their own (lines of a page, images of a data set) are written beside the table.
    """
    rows = [
        {OWN_NAME: line.name, "file_name": str(file.absolute()), "text": line.text, "group": line.group}
        for line, file in with_files(lines, path.with_suffix(""))
    ]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def with_files(lines: Iterable[LabelledLine], folder: Path) -> Iterator[tuple[LabelledLine, Path]]:
    """Each line with the file of its image; where it has none, one is written to `folder`, by number.

    A line whose image cannot be made is left out, with a warning.
    """
    for number, line in enumerate(lines, 1):
        if isinstance(line.picture, (str, Path)):
            yield line, Path(line.picture)
            continue
        item = next(iter(gather([line.picture])))
        if item.picture is None:
            logger.warning("%s is left out: %s", line.name, item.problem)
            continue
        file = folder / f"{number:06d}.png"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, png_bytes(item.picture))
        yield line, file


def group_of(name: str) -> str:
    """The folder a line lies in, else its name without the line's number: a01-122-02.jpg is of a01-122."""
    parent, _, last = name.rpartition("/")
    return parent or _page_of(last)


def _page_of(name: str) -> str:
    stem = name.rpartition("/")[2].rsplit(".", 1)[0]
    page = re.fullmatch(r"(.+?)[-_]\d+", stem)
    return page[1] if page else stem


def _gathered(rows: Iterable[Row | LeftOut], source: str) -> LineSet:
    found = LineSet([], source=source)
    guessed = False
    for row in rows:
        if isinstance(row, Row):
            guessed = guessed or row.group is None
            name = shown_name(row.name)
            group = group_of(name) if row.group is None else shown_name(row.group)
            found.lines.append(LabelledLine(name, row.picture, row.text, group, row.page, row.part))
        else:
            found.problems.append(row)
    if guessed and len({line.group for line in found.lines}) == 1:
        # All in one folder, which says nothing (images/0001.png): the names may say more.
        found.lines = [replace(line, group=_page_of(line.name)) for line in found.lines]
    return found


def _rows_of_path(path: Path) -> Iterator[Row | LeftOut]:
    suffix = path.suffix.lower()
    if path.is_dir():
        yield from _rows_of_folder(path)
    elif not path.is_file():
        raise DatasetError(f"There is no file or folder {path}.", "Check the path; names are case-sensitive.")
    elif suffix in TABLE_SUFFIXES:
        yield from rows_of_table(path)
    elif suffix == ".parquet":
        yield from rows_of_parquet(path)
    elif suffix == ".xml":
        yield from rows_of_transcriptions([path], path.parent)
    elif suffix == ".zip":
        inside = unpacked(path)
        yield from inside.problems
        yield from _rows_of_folder(inside.folder)
    else:
        refuse_other_kinds(path)
        kinds = f"{', '.join(TABLE_SUFFIXES)}, .parquet, .xml (PAGE, ALTO), .zip"
        raise DatasetError(f"{path.name} is not a table of lines.", f"Give {kinds} or a folder.")


def _rows_of_folder(folder: Path) -> Iterator[Row | LeftOut]:
    """What a folder holds: tables first, then tables by part, transcribed pages, parts in folders, pairs of files."""
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None) or _only_table(folder)
    if table is not None:
        yield from rows_of_table(table)
    elif tables := {name: part for name, part in _PART_TABLES.items() if (folder / name).is_file()}:
        for name, part in tables.items():
            yield from _in_part(rows_of_table(folder / name), part, "")
    elif pages := find_transcriptions(folder):
        yield from rows_of_transcriptions(pages, folder)
    elif parquets := sorted(path for path in folder.rglob("*.parquet") if not path.name.startswith(".")):
        for path in parquets:
            named = re.match(r"[A-Za-z]+", path.stem) or re.match(r"[A-Za-z]+", path.parent.name)
            yield from rows_of_parquet(path, _PARTS.get(named[0].lower(), "") if named else "")
    elif parts := [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.lower() in _PARTS]:
        for inner in parts:
            yield from _in_part(_rows_of_folder(inner), _PARTS[inner.name.lower()], f"{inner.name}/")
    else:
        rows = list(rows_of_pairs(folder))
        if not any(isinstance(row, Row) for row in rows):
            refuse_other_kinds(folder)
        if not rows:
            raise DatasetError(
                f"{folder} holds neither a table of lines, nor transcribed pages, nor images.",
                f"Put {', '.join(TABLES[:3])} there, PAGE or ALTO files with their images, or images with a .txt of "
                "the same name.",
            )
        yield from rows


def _in_part(rows: Iterable[Row | LeftOut], part: str, before: str) -> Iterator[Row | LeftOut]:
    for row in rows:
        if isinstance(row, Row):
            group = group_of(row.name) if row.group is None else row.group
            yield replace(row, name=before + row.name, group=group, part=part)
        else:
            yield row


def _only_table(folder: Path) -> Path | None:
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    return tables[0] if len(tables) == 1 else None
