"""What a command answers: one JSON object for programs, lines and tables for people."""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Answer", "now_and_then", "open_session", "pairs", "plain", "section", "table"]

_EVERY_S = 5.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command found or made: `data` for `--json`, `lines` for people."""

    data: dict[str, Any]
    lines: list[str]


def open_session(chosen: argparse.Namespace) -> Any:
    """The session that a command line names."""
    from fastsd_helpers.sessions import Session

    return Session.open(chosen.session, root=chosen.root)


def plain(value: Any) -> Any:
    """Turn results into what JSON has: dataclasses into objects, paths into absolute text, not-a-number into null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {spec.name: plain(getattr(value, spec.name)) for spec in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, under a head."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]


def pairs(values: dict[str, Any]) -> list[str]:
    """One indented line per name, with the values in one column; nothing is a dash; a sentence has its own line."""
    width = max((len(name) for name in values), default=0)
    below = "\n" + " " * (width + 4)
    return [f"  {name.replace('_', ' ').ljust(width)}  {_in_words(value, below)}" for name, value in values.items()]


def now_and_then(tell: Callable[..., None]) -> Callable[..., None]:
    """Let a progress be told every five seconds, with whatever it is called with then."""
    last = time.monotonic()

    def told(*words: Any) -> None:
        nonlocal last
        if time.monotonic() - last >= _EVERY_S:
            last = time.monotonic()
            tell(*words)

    return told


def _in_words(value: Any, below: str = ", ") -> str:
    if value is None or value in ("", [], {}, ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        words = [_in_words(item) for item in value]
        return (below if any(len(word.split()) > 4 for word in words) else ", ").join(words)
    return str(value)


def section(title: str, lines: list[str]) -> list[str]:
    """A titled block of lines, or nothing when there are none."""
    return [title, *lines] if lines else []
