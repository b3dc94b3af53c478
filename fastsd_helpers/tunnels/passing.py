"""What passes the gate: paths that are closed, and headers that are added to answers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

__all__ = ["ClosedPath", "answer_headers", "refusal"]


@dataclass(frozen=True)
class ClosedPath:
    """A path of a web UI that no visitor may use: a pattern for the whole decoded path."""

    pattern: str


def refusal(method: str, raw_path: str, closed: Sequence[ClosedPath]) -> str | None:
    """A short sentence when this request must not pass; None otherwise."""
    decoded = raw_path
    while (more := unquote(decoded)) != decoded:
        decoded = more
    if ".." in re.split(r"[/\\?&=]", decoded):
        return "A path with .. in it does not pass."
    path = decoded.partition("?")[0]
    return "This is closed for visitors." if any(re.fullmatch(row.pattern, path) for row in closed) else None


def answer_headers(raw_path: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Headers to add to a passed answer."""
    return {}
