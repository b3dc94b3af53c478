"""Text files of any code page, those of one data set judged together; what cannot be decoded is named."""

import logging
from collections.abc import Sequence
from pathlib import Path

from fastsd_helpers.names.code_pages import decode_text, guess_page
from fastsd_helpers.trocr.ground_truth.rows import LeftOut

__all__ = ["read_texts"]

logger = logging.getLogger("fastsd_helpers")


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
