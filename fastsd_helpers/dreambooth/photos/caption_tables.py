"""Captions of a whole set in one file: Hugging Face's metadata.jsonl and .csv, kohya's meta_cap.json, and their kin."""

import csv
import io
import json
import unicodedata
from pathlib import PurePosixPath
from typing import Any

from fastsd_helpers.names.code_pages import decode_text

__all__ = ["TABLE_SUFFIXES", "read_caption_table"]

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path", "img")
_TEXT_COLUMNS = ("text", "caption", "prompt", "captions", "description")
_MOST_BYTES = 16 * 2**20


def read_caption_table(name: str, data: bytes) -> dict[str, str]:
    """Read file name -> caption from a table; empty when the file is none.

    Args:
        name: of the table, for its kind and its folder: names in it are looked for beside it.
        data: its bytes.
    """
    if len(data) > _MOST_BYTES:
        return {}
    text = decode_text(data)
    suffix = PurePosixPath(name).suffix.lower()
    try:
        rows = _json_rows(text, lines=suffix == ".jsonl") if suffix in (".json", ".jsonl") else _csv_rows(text, suffix)
    except (ValueError, csv.Error, RecursionError):
        return {}
    folder = PurePosixPath(name).parent
    found = {}
    for row in rows:
        file, caption = _first(row, _FILE_COLUMNS), _first(row, _TEXT_COLUMNS)
        words = " ".join(caption.split())
        if file and words:
            path = folder / PurePosixPath(unicodedata.normalize("NFC", file.replace("\\", "/")))
            found[path.as_posix()] = words
    return found


def _json_rows(text: str, *, lines: bool) -> list[dict[str, Any]]:
    if lines:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        whole = json.loads(text)
        if isinstance(whole, dict):  # kohya: {"path": {"caption": "..."}}, or {"path": "..."}
            rows = [
                {"file_name": key, **(value if isinstance(value, dict) else {"text": value})}
                for key, value in whole.items()
                if isinstance(value, (dict, str))
            ]
        else:
            rows = whole if isinstance(whole, list) else []
    return [row for row in rows if isinstance(row, dict)]


def _csv_rows(text: str, suffix: str) -> list[dict[str, Any]]:
    head = text.splitlines()[0] if text.strip() else ""
    delimiter = "\t" if suffix == ".tsv" or "\t" in head else ";" if ";" in head and "," not in head else ","
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    return [{(key or "").strip().casefold(): value for key, value in row.items()} for row in rows]


def _first(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    value = next((row[name] for name in columns if isinstance(row.get(name), str)), "")
    return value.strip()
