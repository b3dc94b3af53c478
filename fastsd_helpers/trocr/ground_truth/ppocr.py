"""The labels PPOCRLabel writes: an image, a tab, and a JSON list of texts with their corners.

Source: PaddleOCR, docs, "text detection dataset"; PPOCRLabel's README.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsd_helpers.trocr.ground_truth.crops import PageCrops
from fastsd_helpers.trocr.ground_truth.labels import label_text
from fastsd_helpers.trocr.ground_truth.pictures import PictureFinder
from fastsd_helpers.trocr.ground_truth.rows import LeftOut, Row

__all__ = ["is_ppocr", "rows_of_ppocr"]

_NOT_READABLE = ("###", "*")


def is_ppocr(text: str) -> bool:
    """Whether a text file has an image, a tab and a list of marked texts in its first line."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    return _marked(first.partition("\t")[2]) is not None


def rows_of_ppocr(path: Path, text: str) -> Iterator[Row | LeftOut]:
    """Every text of every image as a line, cut out along its corners; the image is its page."""
    finder = PictureFinder(path.parent, [path.parent.parent])
    for number, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        name, _tab, labels = row.rstrip("\r").partition("\t")
        marked = _marked(labels)
        if marked is None:
            yield LeftOut(f"{path.name}, line {number}: no list of texts with their corners.", "a broken row")
            continue
        picture = finder.find(name.strip())
        if picture is None:
            count = len(marked)
            yield LeftOut(f"{path.name}, line {number}: there is no image {name}.", "no image", lines=count)
            continue
        page, crops = name.strip().rpartition(".")[0] or name.strip(), PageCrops(picture)
        for place, entry in enumerate(marked, 1):
            yield _row(f"{page} line {place}", page, crops, entry)


def _marked(labels: str) -> list[dict[str, Any]] | None:
    try:
        found = json.loads(labels)
    except ValueError:
        return None
    if not isinstance(found, list) or not all(isinstance(entry, dict) and "transcription" in entry for entry in found):
        return None
    return found


def _row(name: str, page: str, crops: PageCrops, entry: dict[str, Any]) -> Row | LeftOut:
    if entry.get("difficult") or entry["transcription"] in _NOT_READABLE:
        return LeftOut(f"{name} is marked as unreadable.", "marked unreadable")
    label = label_text(entry["transcription"], name)
    if isinstance(label, LeftOut):
        return label
    try:
        corners = tuple((float(x), float(y)) for x, y in entry.get("points", ()))
    except (TypeError, ValueError):
        corners = ()
    if len(corners) < 3:
        return LeftOut(f"{name} has no corners.", "no outline")
    return Row(name, crops.add(corners), label, page, page=page)
