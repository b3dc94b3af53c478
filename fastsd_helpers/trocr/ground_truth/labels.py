"""The text of a label, whatever form it is in: plain, a number, Donut's JSON, a file of any code page."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.names.code_pages import decode_text, guess_page
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.ground_truth.rows import LeftOut, why_unusable
from fastsd_helpers.trocr.pages.inputs import PICTURE_SUFFIXES

__all__ = [
    "GROUP_COLUMNS",
    "PAGE_COLUMNS",
    "PICTURE_COLUMNS",
    "TEXT_COLUMNS",
    "TEXT_SUFFIXES",
    "column_of",
    "label_text",
    "read_texts",
    "texts_of",
]

PICTURE_COLUMNS = ("file_name", "filename", "image", "image_path", "file", "path", "picture", "img", "name")
TEXT_COLUMNS = ("text", "transcription", "transcript", "label", "ground_truth", "gt", "sentence", "words")
GROUP_COLUMNS = ("group", "writer", "writer_id", "page", "document", "form")
PAGE_COLUMNS = ("page", "document", "form")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")


def column_of(columns: Iterable[Any], wanted: tuple[str, ...]) -> Any:
    """The first of the wanted columns that is there, in the spelling it has there; None when none is."""
    by_name = {str(column).strip().lower(): column for column in columns}
    return next((by_name[name] for name in wanted if name in by_name), None)


def label_text(value: Any, name: str) -> str | LeftOut:
    """The text of a label, stripped; a sentence that begins with `name` where it cannot be a line's text."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # what pandas makes of years and house numbers
    if isinstance(value, float) and value == value:  # not-a-number is an empty cell
        return LeftOut(
            f"{name} has a number for its text, {value}, which may have lost zeros. Save the column as text.",
            "a number",
        )
    if isinstance(value, (dict, list)) or (isinstance(value, str) and value.lstrip()[:1] == "{"):
        value = _of_donut(value)
    text = value.strip() if isinstance(value, str) else value
    wrong = why_unusable(text, PICTURE_SUFFIXES)
    return LeftOut(f"{name} {wrong[0]}", wrong[1]) if wrong else text


def _of_donut(value: Any) -> Any:
    """The text in a label of Donut and SynthDoG; any other value as it was, objects as JSON.

    Source: clovaai/donut, README, "Data": {"gt_parse": {"text_sequence": ...}}.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    if isinstance(found, dict):
        inner = found.get("gt_parse", found)
        for key in ("text_sequence", "text"):
            if isinstance(inner, dict) and isinstance(inner.get(key), str) and len(inner) == 1:
                return inner[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_texts(paths: Sequence[Path]) -> dict[Path, str | LeftOut]:
    """The text of each file; a guess of the code page is made for all of them together, and logged with an example."""
    found: dict[Path, str | LeftOut] = {}
    written: dict[Path, bytes] = {}
    for path in paths:
        try:
            written[path] = path.read_bytes()
        except OSError as err:
            found[path] = LeftOut(f"{path.name} cannot be read: {err}.", "a damaged file")
    guess = guess_page(written.values())
    if guess is not None:
        many = len(paths) > 1
        logger.warning("%s", guess.line(f"Texts in {paths[0].parent.name} are" if many else f"{paths[0].name} is"))
    for path, data in written.items():
        found[path] = _decode(path, data, guess.code_page if guess else None)
    return found


def _decode(path: Path, data: bytes, page: str | None) -> str | LeftOut:
    text = decode_text(data, page)
    if "\ufffd" in text and "\ufffd".encode() not in data:
        before = text.partition("\ufffd")[0][-20:]
        kind = "UTF-16" if data[:1] in (b"\xff", b"\xfe") else "UTF-8"
        return LeftOut(f"{path.name} is not {kind} throughout: after {before!r} it cannot be read.", "not UTF-8")
    return text


def texts_of(paths: Iterable[Path]) -> list[str]:
    """The texts of files and of folders of them (.txt, .md, .rst).

    Raises:
        DatasetError: one is not there, or is no text, or there is no letter in any of them.
    """
    paths = [path.expanduser() for path in paths]
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DatasetError(f"There is no file or folder {path}.", "Check the path; names are case-sensitive.")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in found if file.is_file() and (file == path or file.suffix in TEXT_SUFFIXES)]
    if not files:
        raise DatasetError("There is no text file in the folder.", f"Put files there that end in {TEXT_SUFFIXES[0]}.")
    texts = []
    for text in read_texts(files).values():
        if isinstance(text, LeftOut):
            raise DatasetError(str(text), "Save it as UTF-8.")
        texts.append(text)
    if not any(text.strip() for text in texts):
        named = ", ".join(str(path) for path in paths)
        raise DatasetError(f"There is no text in {named}.", "Name a file with text of the kind that is to be read.")
    return texts
