"""What a file is, by its bytes and not by its name: a model, or something that only looks like one."""

import struct
import zipfile
from pathlib import Path

from fastsd_helpers.errors import DownloadError
from fastsd_helpers.inert import require_inert
from fastsd_helpers.inert.headers import HEADER_LIMIT, open_header, read_entries

__all__ = ["PAGE_HINT", "SUFFIXES", "describe_content", "look_at_arrived", "require_model"]

# What a kind is called, and the ending its files have.
SUFFIXES = {
    "safetensors": ".safetensors",
    "checkpoint": ".ckpt",
    "gguf": ".gguf",
    "onnx": ".onnx",
    "zip archive": ".zip",
}
PAGE_HINT = (
    "The site requires a login or a token, or the link is that of a page: paste the link of the download itself."
)
_MODELS = ("safetensors", "checkpoint", "gguf", "onnx")
# What is often linked beside a model, or instead of it.
_OTHER_KINDS = {
    "image": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8"),
    "PDF document": (b"%PDF",),
    "compressed archive": (b"Rar!", b"7z\xbc\xaf\x27\x1c", b"\x1f\x8b", b"BZh", b"\xfd7zXZ"),
    "document or installer": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",),
}


def describe_content(path: Path) -> str:
    """Name the kind of a file: safetensors, checkpoint, gguf, onnx, zip archive, web page, program, text, empty, data.

    Images, PDF documents, other archives and installers have names of their own too.

    A safetensors file whose length is not what its header says is "broken safetensors".

    Args:
        path: the file, of which only the beginning is read.

    Returns:
        One of these names.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        return "empty"
    lowered = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if lowered.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "web page"
    if head.startswith((b"MZ", b"\x7fELF", b"#!", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")):
        return "program"
    for kind, starts in _OTHER_KINDS.items():
        if head.startswith(starts) or (kind == "image" and head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
            return kind
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "checkpoint"  # torch's format before zip files: a bare pickle
    if len(head) >= 9 and head[8:9] == b"{":
        return _kind_of_safetensors(path, struct.unpack("<Q", head[:8])[0])
    if path.suffix.lower() == ".onnx" and head[:1] == b"\x08":
        return "onnx"
    if not set(head) - set(range(32, 127)) - {9, 10, 13}:
        return "text"
    return "data"


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, EOFError):
        return "broken checkpoint"
    return "checkpoint" if pickles else "zip archive"


def _kind_of_safetensors(path: Path, length: int) -> str:
    """Source: the safetensors format description (8 bytes of length, a JSON header, then the tensors' bytes)."""
    size = path.stat().st_size
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        return "data" if length > HEADER_LIMIT else "broken safetensors"
    try:
        with open(path, "rb") as file:
            file.seek(8)
            entries = read_entries(open_header(file, length))
            end = max((entry["data_offsets"][1] for kind, _name, entry in entries if kind == "tensor"), default=0)
        return "safetensors" if 8 + length + end == size else "broken safetensors"
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return "broken safetensors"


def require_model(path: Path, shown: str) -> str:
    """Return the kind of a model file.

    Args:
        path: the file that arrived.
        shown: where it came from, for the message.

    Raises:
        DownloadError: it is none; the sentence says what it is and what usually is the reason.
    """
    kind = describe_content(path)
    if kind in _MODELS or kind == "data":
        return kind
    if kind == "web page":
        raise DownloadError(f"{shown} returned a web page instead of a file.", PAGE_HINT)
    if kind == "program":
        raise DownloadError(
            f"{shown} is a program, not a model.",
            "Nothing of it was kept. Choose a .safetensors file from a source you trust.",
        )
    if kind.startswith("broken"):
        raise DownloadError(
            f"{shown} is not a complete {kind.removeprefix('broken ')} file: its table of contents does not "
            "match its size.",
            "Run this again; if the problem persists, the source itself is damaged: use another one.",
        )
    what = {"empty": "an empty file", "image": "an image", "text": "plain text"}.get(kind, f"a {kind}")
    raise DownloadError(f"{shown} is {what}, not a model.", "Paste the link of a .safetensors file.")


def look_at_arrived(path: Path, name: str, shown: str, *, beside: bool = False) -> str:
    """Look into a file that arrived, before it gets its name; return its kind.

    Args:
        name: what it will be called.
        shown: where it came from, for the message.
        beside: it may be what lies beside the weights, a description or a vocabulary.

    Raises:
        DownloadError: it is not a model.
        UnsafeModel: it could run code.
    """
    small = beside and (name.endswith(".json") or name in ("merges.txt", "vocab.txt"))
    kind = "description" if small else require_model(path, shown)
    require_inert(path, name=name)
    return kind
