"""Where a fine-tuning is, as it is told to whoever watches."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastsd_helpers.processes import JournalTail, JournalWriter, LocalProcess
from fastsd_helpers.runtime import redact

__all__ = ["JOURNAL", "TeachingNews", "TeachingProgress", "TeachingReport", "note_progress", "steps_in_words"]

JOURNAL = "teaching.jsonl"  # in the local folder of a run
_EVERY_S = 0.5


@dataclass(frozen=True)
class TeachingProgress:
    """Where a run is: handed to `report` at every stage, after every step and every measurement."""

    stage: str = ""  # before, teaching, after
    step: int = 0  # finished steps of all processes of this run together
    steps: int = 0
    seconds_left: float | None = None
    loss: float | None = None
    cer: float | None = None  # of a measurement on the held-out lines
    message: str = ""


TeachingReport = Callable[[TeachingProgress], None]


def note_progress(path: Any) -> TeachingReport:
    """Make a report that notes the progress in a journal, at most twice a second, every measurement at once."""
    writer, last = JournalWriter(path), -_EVERY_S
    stage = ""

    def note(progress: TeachingProgress) -> None:
        nonlocal last, stage
        now = time.monotonic()
        soon = progress.stage == stage and progress.step != progress.steps
        if soon and progress.cer is None and not progress.message and now - last < _EVERY_S:
            return
        last, stage = now, progress.stage
        row = {name: value for name, value in vars(progress).items() if value not in (None, "")}
        writer.append(row | ({"message": redact(progress.message)} if progress.message else {}))

    return note


class TeachingNews:
    """What is known of a run at one moment; `look` brings it up to date.

    Attributes:
        process: who writes the journal; None while nothing is known.
        began: seconds since 1970.
        stage, step, steps, seconds_left: see TeachingProgress.
        curve: (step, CER) of every measurement, those of earlier processes of the run too.
        messages: what it said.
    """

    def __init__(self, path: Any) -> None:
        self._tail = JournalTail(path)
        self._clear()

    def _clear(self) -> None:
        self.process: LocalProcess | None = None
        self.began: float | None = None
        self.stage, self.step, self.steps = "", 0, 0
        self.seconds_left: float | None = None
        self.curve: list[tuple[int, float]] = []
        self.messages: list[str] = []

    def look(self) -> "TeachingNews":
        """Read what is new."""
        rows, anew = self._tail.read()
        if anew:
            self._clear()
        for row in rows:
            if "pid" in row:
                self.process, self.began = LocalProcess(row["pid"], row["start"]), row["began"]
            elif "message" in row:
                self.messages.append(str(row["message"]))
            else:
                # A measurement tells no time: what was known before it still holds.
                known = self.seconds_left if row.get("stage", self.stage) == self.stage else None
                self.stage, self.step, self.steps = row.get("stage", self.stage), row["step"], row["steps"]
                self.seconds_left = row.get("seconds_left", known)
                if row.get("cer") is not None:
                    self.curve.append((row["step"], row["cer"]))
        return self


def steps_in_words(steps: int, curve: Sequence[Sequence[float]]) -> str:
    """How many steps a model took, and which of them it is of: "120 steps (best at step 60, which is kept)".

    Args:
        steps: of the entire run.
        curve: (step, CER) of every measurement; the first of the lowest is the model's.
    """
    best = min((point for point in curve if math.isfinite(point[1])), key=lambda point: point[1], default=(steps, 0.0))
    return f"{steps} steps" + (f" (best at step {int(best[0])}, which is kept)" if best[0] != steps else "")
