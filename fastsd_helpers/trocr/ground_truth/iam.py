"""The IAM database's own lists: lines.txt and words.txt, with images in folders by form.

Source: the comments at the head of the lists; Marti and Bunke 2002, The IAM-database.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from fastsd_helpers.trocr.ground_truth.labels import label_text
from fastsd_helpers.trocr.ground_truth.pictures import PictureFinder
from fastsd_helpers.trocr.ground_truth.rows import LeftOut, Row

__all__ = ["is_iam", "rows_of_iam"]

# Name, result of the segmentation, grey level, then six numbers, or five and the word's grammatical tag; then the text.
_LINE = re.compile(r"(?P<name>[a-z]\d\d-\d{3}[a-z]?-\d\d(?P<word>-\d\d)?) (?P<result>ok|err) (?:\S+ ){6}(?P<text>.*)")
_FORM = re.compile(r"([a-z]\d\d-\d{3}[a-z]?) (\d{3}) ")


def is_iam(text: str) -> bool:
    """Whether a text file is one of IAM's lists: its first line that is no comment is built like one."""
    first = next((line for line in text.split("\n") if line.strip() and not line.startswith("#")), "")
    return _LINE.fullmatch(first.rstrip("\r")) is not None


def rows_of_iam(path: Path, text: str) -> Iterator[Row | LeftOut]:
    """The lines or words of a list, grouped by writer where forms.txt is beside it, else by form.

    A word that is marked `err` was cut wrong and is left out; a line marked so is whole, only its words are not.
    """
    up = path.parent.parent
    finder = PictureFinder(path.parent, [path.parent / "words", up / "lines", up / "words", up])
    writers = _writers(path)
    for number, row in enumerate(text.split("\n"), 1):
        if not row.strip() or row.startswith("#"):
            continue
        match = _LINE.fullmatch(row.rstrip("\r"))
        if match is None:
            yield LeftOut(f"{path.name}, line {number}: not built as a line of IAM's lists.", "a broken row")
            continue
        name = match["name"]
        form = "-".join(name.split("-")[:2])
        if match["word"] and match["result"] == "err":
            yield LeftOut(f"{path.name}, line {number}: {name} is marked as cut wrong (err).", "marked err")
            continue
        picture = finder.find(f"{name[:3]}/{form}/{name}.png") or finder.find(f"{form}/{name}.png") or finder.find(name)
        if picture is None:
            yield LeftOut(f"{path.name}, line {number}: there is no image {name}.", "no image")
            continue
        label = label_text(match["text"].replace("|", " "), name)
        yield label if isinstance(label, LeftOut) else Row(name, picture, label, writers.get(form, form), page=form)


def _writers(path: Path) -> dict[str, str]:
    """Form -> writer, from the list of forms beside this one."""
    try:
        text = (path.parent / "forms.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {match[1]: f"writer {match[2]}" for line in text.split("\n") if (match := _FORM.match(line))}
