"""Read folders of any size: in parts, each written whole or not at all, by one process or many.

Part p holds files p * 256 to p * 256 + 255 of the sorted list, whoever reads it. So a run that was killed, or one
shared out among several processes, ends with the same bytes as one that was not. The pages of a part that is not whole
yet are noted one by one, and not read again.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DatasetError, SettingsError
from fastsd_helpers.files import check_writable, file_errors, new_file, sha256_of, write_atomic
from fastsd_helpers.runtime import fault_point
from fastsd_helpers.trocr.exports.tables import BOM, no_formula
from fastsd_helpers.trocr.pages.inputs import PICTURE_SUFFIXES, list_files, open_file
from fastsd_helpers.trocr.reading.rows import read_items

__all__ = [
    "FORMATS",
    "BulkResult",
    "add_results",
    "count_parts",
    "is_begun",
    "parse_shard",
    "read_folder",
    "rows_to_bytes",
]

FORMATS = ("txt", "json", "csv", "jsonl")
_PART = 256
_SIZES = 1000  # images whose size is compared when a run goes on
_MANIFEST = "manifest.json"
_VERSION, _LINES_ALONE = 3, 2  # of the manifest: before 3, images of lines alone were read, in the order of bytes
_TOGETHER = 64  # files of single lines read, and noted, together
_PAGE_FROM_PX = 200  # of height: an image of less, or much wider, is a line or two


@dataclass(frozen=True)
class BulkResult:
    """What a run over a folder did: all images, those read now, those read before, and the result if complete."""

    pictures: int
    read_now: int
    read_before: int
    problems: int
    path: Path | None  # the joined result; None while parts of other shards are missing


def parse_shard(text: str | None) -> tuple[int, int]:
    """`2/4` -> (1, 4): this process's number from 0, and how many there are.

    Left alone it comes from what `accelerate launch` and `torchrun` set (RANK, WORLD_SIZE), else (0, 1).

    Raises:
        SettingsError: not of that form.
    """
    if text is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise SettingsError(f"--shard is {text!r}.", "Give it as 1/4 (the first of four) to 4/4.")
    return int(match[1]) - 1, int(match[2])


def read_folder(
    reader: Any,
    folder: Path,
    out: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    format: str = "jsonl",
    pages: str = "lines",
    order: Any = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> BulkResult:
    """Read every image and PDF of a folder and its subfolders into `out`; call it again to go on after a stop.

    Args:
        reader: a Reader.
        out: folder for parts/ and the joined lines.<format>; made when absent.
        shard: (number from 0, how many) of this process.
        format: of the joined file, one of FORMATS.
        pages: auto (each image is looked at), pages or lines.
        order: of a page's lines, see `cut_lines`.
        progress: called with (images done, all) after each part.

    Writes one file per part under its own name, once. Raises DatasetError when there are no images; SettingsError
    when `out` holds the results of another folder or other settings.
    """
    if not folder.is_dir():
        raise DatasetError(f"There is no folder {folder}.", "Check the path; names are case-sensitive.")
    parts_folder = out / "parts"
    if _version_of(out) == _LINES_ALONE:  # a run that an earlier version began goes on as it did
        names, pages = _list_pictures(folder), "lines"
        manifest = _manifest_of(reader, folder, names) | {"version": _LINES_ALONE}
    else:
        names = list_files(folder, leave_out=out)
        manifest = _manifest_of(reader, folder, names) | {"version": _VERSION, "pages": pages, "order": order}
    check_writable(parts_folder)
    _check_manifest(out, manifest)
    number, count = shard
    parts = range(0, (len(names) + _PART - 1) // _PART)
    mine = [part for part in parts if part % count == number]
    done = {part for part in parts if _part_path(parts_folder, part).is_file()}
    read_now = 0
    for part in mine:
        chunk = names[part * _PART : (part + 1) * _PART]
        if part not in done:
            notes = _part_path(parts_folder, part).with_suffix(".pages")
            rows = _read_part(reader, folder, chunk, pages, order, notes)
            write_atomic(_part_path(parts_folder, part), rows_to_bytes(rows, "jsonl"))
            notes.unlink(missing_ok=True)
            fault_point("trocr.part")
            read_now += len(chunk)
        if progress:
            progress(min(len(names), (part + 1) * _PART), len(names))
    before = sum(len(names[part * _PART : (part + 1) * _PART]) for part in mine if part in done)
    problems = sum(_problems_in(_part_path(parts_folder, part)) for part in mine)
    path = _join(parts_folder, list(parts), out / f"lines.{format}", format)
    return BulkResult(len(names), read_now, before, problems, path)


def add_results(results: Sequence[BulkResult]) -> BulkResult:
    """What several processes did together, each with its own shard; the last of them joined the parts."""
    now, before, problems = (
        sum(getattr(result, name) for result in results) for name in ("read_now", "read_before", "problems")
    )
    path = next((result.path for result in results if result.path), None)
    return BulkResult(results[0].pictures, now, before, problems, path)


def count_parts(folder: Path, out: Path) -> int:
    """How many parts `read_folder` reads this folder in, and so how many processes get one."""
    return math.ceil(len(list_files(folder, leave_out=out)) / _PART)


def is_begun(out: Path) -> bool:
    """Whether a run of `read_folder` into this folder was begun."""
    return (out / _MANIFEST).is_file()


def _version_of(out: Path) -> int:
    if not is_begun(out):
        return _VERSION
    try:
        return int(json.loads((out / _MANIFEST).read_text(encoding="utf-8")).get("version", _VERSION))
    except (OSError, ValueError, AttributeError):
        return _VERSION


def _problems_in(path: Path) -> int:
    rows = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return sum(json.loads(row).get("problem") is not None for row in rows if row)


def _read_part(
    reader: Any, folder: Path, names: list[str], pages: str, order: Any, notes: Path
) -> list[dict[str, Any]]:
    """The rows of a part's files; what a stopped run noted is not read again.

    A note is of files of single lines that were read together, or of one page.
    """
    rows: list[dict[str, Any]] = []
    at, first = 0, 1  # the file in turn, and the page of it
    for note in _noted(notes):  # they are a beginning of the part, in its order
        group, last = note["files"], note.get("page")
        if names[at : at + len(group)] != group:
            break
        rows += note["rows"]
        at, first = (at, last + 1) if last else (at + len(group), 1)
    together = max(_TOGETHER, 8 * reader.batch_size)
    while at < len(names):
        group = names[at : at + together] if pages == "lines" else _lines_from(folder, names[at : at + together])
        if len(group) > 1:
            items = (item for name in group for item in open_file(folder / name, name))
            now = [line.as_row() for lines in read_items(reader, items, pages, order=order) for line in lines]
            _note(notes, {"files": group, "rows": now})
            rows += now
        else:
            for item in open_file(folder / group[0], group[0], first=first):
                now = [line.as_row() for lines in read_items(reader, [item], pages, order=order) for line in lines]
                _note(notes, {"files": group, "page": item.number, "rows": now})
                fault_point("trocr.page")
                rows += now
            _note(notes, {"files": group, "rows": []})
        at, first = at + len(group), 1
    return rows


def _lines_from(folder: Path, names: list[str]) -> list[str]:
    """The first files that are images too small for a page, by their headers, to be read together; else the first."""
    from fastsd_helpers.errors import FastSDError
    from fastsd_helpers.images.files import open_picture

    found = []
    for name in names:
        try:
            if name.lower().endswith((".pdf", ".tif", ".tiff")):
                break
            with open_picture(folder / name) as picture:
                if picture.height >= _PAGE_FROM_PX and picture.width < 4 * picture.height:
                    break
        except (FastSDError, OSError):
            pass  # reported when its turn comes
        found.append(name)
    return found or names[:1]


def _note(path: Path, note: dict[str, Any]) -> None:
    with file_errors(path, "write"), path.open("ab") as file:
        # Names of files may have bytes that are no UTF-8; they come back as they were.
        file.write(b"\n" + json.dumps(note, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _noted(path: Path) -> list[dict[str, Any]]:
    """The notes of a run that was stopped; a last one that was cut is no note."""
    found = []
    for row in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(row))
    return [note for note in found if isinstance(note, dict) and {"files", "rows"} <= set(note)]


def _list_pictures(folder: Path) -> list[str]:
    """What earlier versions read: images alone, in the order of bytes."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        base = Path(root).relative_to(folder)
        names += [
            (base / name).as_posix()
            for name in files
            if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")
        ]
    if not names:
        raise DatasetError(f"There is no image in {folder}.", f"It takes {', '.join(PICTURE_SUFFIXES)}.")
    return sorted(names)


def _manifest_of(reader: Any, folder: Path, names: list[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    # Other images under the same names have other sizes; asking for a million of them takes minutes on Drive.
    for name in names[:: max(1, len(names) // _SIZES)]:
        with contextlib.suppress(OSError):  # a link to nowhere is reported when its turn comes
            digest.update(f"{(folder / name).stat().st_size}".encode())
        digest.update(b"\0")
    return {
        "folder": folder.name,
        "pictures": len(names),
        "pictures_sha256": digest.hexdigest(),
        "part": _PART,
        "reader": reader.checkpoint.folder.name,
        "weights_sha256": _weights_sha256(reader.checkpoint.folder),
        "precision": reader.checkpoint.precision,
        "beams": reader.settings.beams,
        "limits": [reader.limits.min_new_tokens, reader.limits.max_new_tokens],
        "loop_guard": reader.settings.loop_guard,
        "batch_size": reader.batch_size,
        **({"allowed_characters": allowed} if (allowed := reader.settings.allowed_characters) else {}),
    }


def _weights_sha256(folder: Path) -> str:
    """Of the model's weights, wherever they lie: every fine-tuned model's folder is called `model`."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".bin")]
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def _check_manifest(out: Path, wanted: dict[str, Any]) -> None:
    path = out / _MANIFEST
    if not path.is_file():
        write_atomic(path, json.dumps(wanted, indent=1).encode())
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*wanted, *found} if found.get(name) != wanted.get(name))
    if changed:
        told = ", ".join(f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}" for name in changed)
        raise SettingsError(f"{out} holds the results of another run: {told}.", "Name another folder with --out.")


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:07d}.jsonl"


def _join(folder: Path, parts: list[int], target: Path, format: str) -> Path | None:
    """Put all parts into one file, when all are there; rows are streamed, for a million of them fit no memory."""
    if not all(_part_path(folder, part).is_file() for part in parts):
        return None
    with new_file(target) as (file, _temporary):
        for index, part in enumerate(parts):
            # Not splitlines: JSON may hold U+2028 and its like as they are, which end a line for Python.
            text = _part_path(folder, part).read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.split("\n") if line]
            if format == "json":
                inner = rows_to_bytes(rows, "json").strip()[1:-1].strip(b"\n")
                file.write((b"[\n" if index == 0 else b",\n") + inner)
            else:
                file.write(rows_to_bytes(rows, format, head=index == 0))
        if format == "json":
            file.write(b"\n]\n")
    return target


def rows_to_bytes(rows: Iterable[dict[str, Any]], format: str, *, head: bool = True) -> bytes:
    """Rows of `Line.as_row` as a file's content: txt (one text a line), json, jsonl or csv (name, text, ..., box)."""
    if format == "txt":
        return "".join(f"{' '.join(row['text'].split())}\n" for row in rows).encode()
    if format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if format == "json":
        return ("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n").encode()
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    if head:
        out.write(BOM)
        writer.writerow(["name", "text", "confidence", "notes", "problem", "left", "top", "right", "bottom"])
    for row in rows:
        corners = row.get("box") or []
        places = [min(x for x, _y in corners), min(y for _x, y in corners), max(x for x, _y in corners),
                  max(y for _x, y in corners)] if corners else [""] * 4  # fmt: skip
        texts = no_formula(row["name"]), no_formula(row["text"])
        told = " ".join(row["notes"]), no_formula(row["problem"] or "")
        writer.writerow([*texts, row["confidence"], *told, *places])
    return out.getvalue().encode()
