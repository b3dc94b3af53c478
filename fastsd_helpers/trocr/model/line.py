"""What reading one line gives: its text, how sure the model was of each token, and what was odd about it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Alternative", "Line", "Token"]


class Token(NamedTuple):
    """One token of a line: its id, its own piece of text and the probability the model gave it (0..1)."""

    id: int
    text: str
    confidence: float


class Alternative(NamedTuple):
    """A text that the line may have, and the reader's log-probability of it: of all its tokens and of the end."""

    text: str
    log_prob: float


@dataclass(frozen=True)
class Line:
    """One line that was read, or why it could not be: then `problem` is a sentence and `text` is empty."""

    text: str
    confidence: float  # exp of the mean log-probability of its tokens and of the end, 0..1; 0 when not read
    tokens: tuple[Token, ...] = ()
    box: tuple[tuple[float, float], ...] | None = None  # its corners on the page in pixels, clockwise from top left
    name: str = ""  # file, page or place in the list it came from
    problem: str | None = None
    notes: tuple[str, ...] = ()  # "cut": the limit came before the end; "looped": it repeated itself, see LoopGuard
    # Of a line that was found on a page: its outline, what its letters stand on, and its region (kind, number from 1).
    polygon: tuple[tuple[float, float], ...] | None = None
    baseline: tuple[tuple[float, float], ...] | None = None
    region: tuple[str, int] = ("text", 1)
    centres: tuple[float, ...] | None = None  # where the reader looked for each token, 0 (left) to 1; None: not kept
    alternatives: tuple[Alternative, ...] = ()  # the likeliest texts, this one first; where they were asked for

    def as_row(self) -> dict[str, Any]:
        """The line as plain values for JSON, CSV or a table."""
        found: dict[str, Any] = {}
        if self.polygon and self.baseline:
            found["polygon"] = [list(point) for point in self.polygon]
            found["baseline"] = [list(point) for point in self.baseline]
            found["region"] = list(self.region)
        if self.centres:
            found["centres"] = [round(place, 4) for place in self.centres]
        if self.alternatives:
            found["alternatives"] = [{"text": text, "log_prob": round(log, 6)} for text, log in self.alternatives]
        return {
            "name": self.name,
            "text": self.text,
            "confidence": round(self.confidence, 6),
            "tokens": [[token.id, token.text, round(token.confidence, 6)] for token in self.tokens],
            "box": [list(corner) for corner in self.box] if self.box else None,
            "notes": list(self.notes),
            "problem": self.problem,
            **found,
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Line":
        """The line that `as_row` wrote; other keys of the row are not looked at.

        Args:
            row: with the keys that `as_row` writes.
        """
        tokens = tuple(Token(int(place), str(text), float(sure)) for place, text, sure in row["tokens"])
        box, polygon, baseline = (_points(row.get(name)) for name in ("box", "polygon", "baseline"))
        kind, number = row.get("region") or ("text", 1)
        centres = tuple(float(place) for place in row["centres"]) if row.get("centres") else None
        others = tuple(Alternative(str(one["text"]), float(one["log_prob"])) for one in row.get("alternatives") or ())
        return cls(
            row["text"], float(row["confidence"]), tokens, box, row["name"], row["problem"], tuple(row["notes"]),
            polygon, baseline, (str(kind), int(number)), centres, others,
        )  # fmt: skip


def _points(values: Any) -> tuple[tuple[float, float], ...] | None:
    return tuple((float(x), float(y)) for x, y in values) if values else None
