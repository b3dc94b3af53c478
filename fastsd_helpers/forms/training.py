"""The training cell: start the child process or find the one that runs, show it, stop it, hand its result back."""

import logging
import time
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth.child import TrainingChild, find_training, start_training
from fastsd_helpers.dreambooth.engine import TrainResult
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import FastSDError, Interrupted
from fastsd_helpers.forms.form import require
from fastsd_helpers.forms.live_view import LiveView
from fastsd_helpers.forms.polling import answer_widgets
from fastsd_helpers.sessions import Session
from fastsd_helpers.sessions.record import read_record

__all__ = ["run_training"]

logger = logging.getLogger("fastsd_helpers")

_LOOK_EVERY_S = 0.5
_STOPPED = "Stopped; where it stands is said below."
_ENDED = "The training has ended before its end; why is said below."


def run_training(
    config: DreamBoothConfig, session: Session, *, restart: bool = False, take_over: bool = False
) -> TrainResult:
    """Train in a process of its own and watch it; a training of this session that is running already is watched.

    The cell waits until the training has ended. Its Stop button, and the notebook's own, let it save first.

    Args:
        config: settings; a training that is running keeps its own.
        session: with prepared pictures.
        restart: begin at step 0 although there is an unfinished or finished run; that run's file is kept.
        take_over: use the session although another machine's run seems to hold it.

    Raises:
        SettingsError: these are the settings of another form.
        Interrupted: it was stopped, and has saved.
        TrainingFailed: it was killed, ran out of memory, or broke down.
        FastSDError: what else the training ended with.
    """
    require(config, DreamBoothConfig)
    child = find_training(session)
    if child is None:
        child = start_training(config, session, restart=restart, take_over=take_over)
    else:
        logger.info("A training of this session is running already; this cell shows it.")
    view = LiveView()
    _display(view.box)
    watch = _Watch(child, view)
    try:
        try:
            result = child.wait(between=watch.look)
        except KeyboardInterrupt:  # the notebook's interrupt button
            watch.ask_to_stop()
            result = child.wait(between=watch.look)
    except KeyboardInterrupt as err:
        view.end("This cell has ended; the training is still saving, in its own process.", good=False)
        raise Interrupted(
            "The cell was interrupted twice; the training saves and ends by itself.", "Run the cell again to watch it."
        ) from err
    except FastSDError as err:
        watch.look(last=True)
        view.end(_STOPPED if isinstance(err, Interrupted) else _ENDED, good=False, plot=_recorded_plot(session))
        raise
    watch.look(last=True)
    view.end(f"Done: {result.path.name} is written and checked.", good=True, plot=result.loss_plot)
    return result


class _Watch:
    """Looks at the child twice a second, and answers the notebook's buttons more often than that."""

    def __init__(self, child: TrainingChild, view: LiveView) -> None:
        self._child, self._view = child, view
        self._asked = 0
        self._looked = 0.0
        self._steps: dict[str, int] = {}

    def look(self, *, last: bool = False) -> None:
        """Pass on what was clicked, then show what is new."""
        answer_widgets()
        if self._view.stop_clicks > self._asked:
            self._asked = self._view.stop_clicks
            if self._asked == 1:
                self._child.stop()
            else:
                self._child.kill()
        if last or time.monotonic() - self._looked >= _LOOK_EVERY_S:
            live = self._child.live()
            if live.stage and not self._steps:
                self._steps = _planned_steps(self._child.session)
            self._view.show(live, self._steps, self._child.session.samples, force=last)
            self._looked = time.monotonic()

    def ask_to_stop(self) -> None:
        """Do what the Stop button does."""
        self._view.stop_once()


def _recorded_plot(session: Session) -> Path | None:
    """The losses of the session's finished run, when there is one."""
    made = (read_record(session.folder).record.get("result") or {}).get("loss_plot")
    return session.folder / made if made else None


def _planned_steps(session: Session) -> dict[str, int]:
    # The run saves its settings before its first step.
    settings = read_record(session.folder).record.get("settings") or {}
    return {stage: settings.get(f"{stage}_steps") or 0 for stage in ("text_encoder", "unet")}


def _display(box: Any) -> None:
    from IPython.display import display

    display(box)
