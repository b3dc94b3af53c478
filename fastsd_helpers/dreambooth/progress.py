"""Where a run is, as it is told to whoever watches."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Progress", "Report", "log_progress"]

logger = logging.getLogger("fastsd_helpers")


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


Report = Callable[[Progress], None]


def log_progress(progress: Progress) -> None:
    """Log the progress as a terminal shows it: each message, and about 20 lines of a stage's steps."""
    if progress.message:
        logger.info("%s", progress.message)
    elif progress.step == progress.steps or progress.step % max(1, progress.steps // 20) == 0:
        left = f", {progress.seconds_left:.0f} s left" if progress.seconds_left is not None else ""
        logger.info("%s %d of %d: loss %.4f%s", progress.stage, progress.step, progress.steps, progress.loss, left)
