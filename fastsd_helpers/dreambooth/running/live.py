"""What a running training says about itself: a small local file that the run appends to and anybody may read.

The file lies on this machine's own disk, not on Drive: it is written twice a second, and only whoever is on the same
machine can watch or stop the run. A line that was cut by a kill is passed over; a new run begins a new file.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsd_helpers.device import peak_memory_bytes
from fastsd_helpers.files import scratch_root
from fastsd_helpers.processes import JournalTail, JournalWriter, LocalProcess
from fastsd_helpers.runtime import logger, redact
from fastsd_helpers.sessions import Session
from fastsd_helpers.wording import label_of

__all__ = [
    "Journal",
    "JournalReader",
    "Live",
    "Progress",
    "Report",
    "live_folder",
    "log_progress",
    "scratch_folder",
]

_FILE = "progress.jsonl"
_EVERY_S = 0.5
_MOST_POINTS = 600  # of a loss curve; neighbours are averaged beyond
_MOST_MESSAGES = 200


def scratch_folder(session: Session, suffix: str = "") -> Path:
    """A local folder for this session alone; FASTSD_SCRATCH moves it. Nothing is created."""
    return scratch_root() / f"{session.record['id']}{suffix}"


def live_folder(session: Session) -> Path:
    """The local folder of a session's live files; FASTSD_SCRATCH moves it. Nothing is created."""
    return scratch_folder(session, "-live")


@dataclass(frozen=True)
class Progress:
    """Where a run is; handed to `report` after every step, and with `message` when there is something to say."""

    stage: str = ""
    step: int = 0  # finished steps of this stage
    steps: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    message: str = ""
    history: Mapping[str, Sequence[float]] | None = None  # stage -> every loss so far, when a run is gone on with
    host_bytes: int = 0  # the most held so far by the process that trains, where that is another one
    gpu_bytes: int = 0


Report = Callable[[Progress], None]


def log_progress(progress: Progress) -> None:
    """Log the progress as a terminal shows it: each message, and about 20 lines of a stage's steps."""
    if progress.message:
        logger.info("%s", progress.message)
    elif progress.step == progress.steps or progress.step % max(1, progress.steps // 20) == 0:
        left = f", {progress.seconds_left:.0f} s left" if progress.seconds_left is not None else ""
        logger.info(
            "%s %d of %d: loss %.4f%s", label_of(progress.stage), progress.step, progress.steps, progress.loss, left
        )


class Journal:
    """Appends a run's progress to its session's live file and logs it; give it to `train` as `report`.

    At most one line each half second, with the mean loss of the steps in between, so that a day's run stays under
    20 MB. A disk that is full costs the watchers their news, never the run.
    """

    def __init__(self, session: Session, *, every_s: float = _EVERY_S) -> None:
        # Opened at the first word of the run, which comes after it got the session's lock: a run that is refused must
        # not wipe out the news of the one that holds it.
        self._append = JournalWriter(live_folder(session) / _FILE).append
        self._every_s = every_s
        self._last = -math.inf  # the first step is always noted, however short a time the machine has been on
        self._losses: list[float] = []

    def __call__(self, progress: Progress) -> None:
        """Log the progress as a terminal shows it, and note it for watchers."""
        log_progress(progress)
        if progress.message:
            self._append({"message": redact(progress.message)})
            if progress.history:
                self._append({"history": _thinned(progress.history)})
            return
        if progress.loss is not None:
            self._losses.append(progress.loss)
        now = time.monotonic()
        if now - self._last < self._every_s and progress.step != progress.steps:
            return
        mean = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses, self._last = [], now
        self._append(
            {
                "stage": progress.stage,
                "step": progress.step,
                "steps": progress.steps,
                "loss": mean,
                "left_s": progress.seconds_left,
                "host": progress.host_bytes or peak_memory_bytes("host"),
                "gpu": progress.gpu_bytes or peak_memory_bytes("cuda"),
            }
        )


@dataclass
class Live:
    """What is known of a run at one moment."""

    process: LocalProcess | None = None  # who writes the file
    began: float | None = None  # seconds since 1970
    stage: str = ""
    step: int = 0  # finished steps of this stage
    steps: int = 0
    seconds_left: float | None = None  # of this stage
    host_bytes: int = 0  # the most it has held so far
    gpu_bytes: int = 0
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # stage -> (step, mean loss) in order
    messages: list[str] = field(default_factory=list)  # the newest 200


class JournalReader:
    """Reads a session's live file, each time only what is new."""

    def __init__(self, session: Session) -> None:
        self._tail = JournalTail(live_folder(session) / _FILE)
        self._live = Live()

    def read(self) -> Live:
        """The newest state; empty when no run has written anything."""
        rows, anew = self._tail.read()
        if anew:
            self._live = Live()
        for row in rows:
            try:
                self._take(row)
            except (ValueError, KeyError, TypeError) as err:
                logger.debug("A row of a training's news could not be read: %s.", err)
        return self._live

    def _take(self, line: dict[str, Any]) -> None:
        live = self._live
        if "pid" in line:
            live.process, live.began = LocalProcess(line["pid"], line["start"]), line["began"]
        elif "message" in line:
            live.messages = [*live.messages, line["message"]][-_MOST_MESSAGES:]
        elif "history" in line:
            live.losses = {stage: [(step, loss) for step, loss in points] for stage, points in line["history"].items()}
        else:
            live.stage, live.step, live.steps = line["stage"], line["step"], line["steps"]
            live.seconds_left, live.host_bytes, live.gpu_bytes = line["left_s"], line["host"], line["gpu"]
            if line["loss"] is not None:
                points = live.losses.setdefault(live.stage, [])
                points.append((live.step, line["loss"]))
                if len(points) > _MOST_POINTS:
                    live.losses[live.stage] = _halved(points)


def _thinned(history: Mapping[str, Sequence[float]]) -> dict[str, list[tuple[float, float]]]:
    """The losses of earlier processes as points of a curve, few enough to be read at a glance."""
    curves = {}
    for stage, losses in history.items():
        points = [(float(step), loss) for step, loss in enumerate(losses, 1)]
        while len(points) > _MOST_POINTS:
            points = _halved(points)
        curves[stage] = points
    return curves


def _halved(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    pairs = zip(points[::2], points[1::2], strict=False)
    halved = [((a + b) / 2, (x + y) / 2) for (a, x), (b, y) in pairs]
    return halved if len(points) % 2 == 0 else [*halved, points[-1]]
