"""What every reader of ground truth gives: a row with an image and its text, or a sentence why there is none."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["LeftOut", "Row", "why_unusable"]

_LONGEST_PATH = 255


class LeftOut(str):
    """A sentence about lines that are not used: `reason` is its kind in a few words, `lines` how many it is about."""

    reason: str
    lines: int

    def __new__(cls, sentence: str, reason: str = "unusable", *, lines: int = 1) -> "LeftOut":
        """Make the sentence, with its reason."""
        made = super().__new__(cls, sentence)
        made.reason, made.lines = reason, lines
        return made


@dataclass(frozen=True)
class Row:
    """One line of ground truth.

    Attributes:
        name: what the line is called. picture: a path, an image, or an object that gives its pixels when asked.
        text: what it says. group: writer, page or document it is from; None where the source does not say.
        page: the page it is on, where that is another thing than the group. part: train, validation or test, where the
            source is divided.
    """

    name: str
    picture: Any
    text: Any
    group: str | None = None
    page: str = ""
    part: str = ""


def why_unusable(text: Any, pictures: Iterable[str] = ()) -> tuple[str, str] | None:
    """What keeps a label from being the text of one line: (what is wrong, the reason to count by); None when nothing.

    Args:
        text: the label, stripped.
        pictures: endings of image files, for labels that are a file's name.
    """
    return next(_faults(text, tuple(pictures)), None)


def _faults(text: Any, pictures: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if not isinstance(text, str) or not text.strip():
        yield "has no text.", "no text"
        return
    if "\n" in text or "\r" in text:
        count = len(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
        yield f"has {count} lines of text: a page, or a broken row. Cut the page into lines first.", "several lines"
    if _is_json(text):
        yield "has JSON for its text. Name the column or field that holds the plain text.", "JSON"
    if _is_path(text, pictures):
        yield f"has a file's name for its text, {text[:80]!r}. Name the column that holds the text.", "a path"


def _is_json(text: str) -> bool:
    """Objects and lists of them; a text in brackets such as [sic] or [12] is a text."""
    import json

    if not (text.startswith("{") and text.endswith("}")) and not (text.startswith("[{") and text.endswith("}]")):
        return False
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return bool(found) and (isinstance(found, dict) or isinstance(found[0], dict))


def _is_path(text: str, pictures: tuple[str, ...]) -> bool:
    if len(text) > _LONGEST_PATH or not text.lower().endswith(pictures or ("\0",)):
        return False
    return "/" in text or "\\" in text or " " not in text
