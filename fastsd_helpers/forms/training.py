"""The training cell: start the child process or find the one that runs, show it, stop it, hand its result back."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.dreambooth.child import TrainingChild, find_training, planned_steps, start_training
from fastsd_helpers.dreambooth.engine import TrainResult
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import FastSDError, Interrupted
from fastsd_helpers.forms import desk
from fastsd_helpers.forms.form import require
from fastsd_helpers.forms.live_view import LiveView
from fastsd_helpers.forms.polling import answer_widgets
from fastsd_helpers.forms.sharing import disconnect_when_safe
from fastsd_helpers.options import check, option
from fastsd_helpers.sessions import Session
from fastsd_helpers.sessions.record import read_record

__all__ = ["RunConfig", "run_training"]

logger = logging.getLogger("fastsd_helpers")

_LOOK_EVERY_S = 0.5
_STOPPED = "Stopped: run this cell again to go on."
_ENDED = "The training has ended before its end; why is said below."


@dataclass(frozen=True)
class RunConfig:
    """What this run of the training cell does beside going on with the session's run."""

    more_steps: int | None = option(
        None,
        help="after the end of a finished run: train on for this many steps, with the settings, photos and captions as "
        "they are now; empty: go on with what was begun",
        low=1,
        high=200_000,
    )
    start_over: bool = option(False, help="begin again at step 0; the finished files of the run before stay")
    disconnect_when_done: bool = option(
        False, help="give the machine back when the model is written and checked, so that it costs nothing more"
    )
    more_text_encoder_steps: int | None = option(
        None,
        help="the same for the text encoder, before the U-Net's; for new words or other captions",
        low=1,
        high=200_000,
        advanced=True,
    )

    def __post_init__(self) -> None:
        both = self.start_over and (self.more_steps or self.more_text_encoder_steps)
        check(self, ["start_over and more_steps exclude each other: choose one"] if both else [])


def run_training(
    config: DreamBoothConfig,
    session: Session,
    run_config: RunConfig | None = None,
    *,
    restart: bool = False,
    take_over: bool = False,
) -> TrainResult:
    """Train in a process of its own and watch it; a training of this session that is running already is watched.

    The cell waits until the training has ended. Its Stop button, and the notebook's own, let it save and end; so does
    a restart of the kernel from JupyterLab's menu, which interrupts the cell first. A kernel that is killed instead
    (it crashed, or Colab's "Restart session") leaves the training alone: the cell run again shows it. Where the page
    was loaded anew, the view with its Stop button comes back, or the cell run again brings it.

    Args:
        config: settings; a training that is running keeps its own.
        session: with prepared pictures.
        run_config: train on after the end, start over, disconnect. What was asked for is taken back in its form as soon
            as it has begun, so that the same cell run again goes on with it.
        restart: the same as `start_over` there.
        take_over: use the session although another machine's run seems to hold it.

    Raises:
        SettingsError: these are the settings of another form, or not what the session's run was begun with.
        Interrupted: it was stopped, and has saved.
        TrainingFailed: it was killed, ran out of memory, or broke down.
        FastSDError: what else the training ended with.
    """
    require(config, DreamBoothConfig)
    wanted = run_config or RunConfig()
    require(wanted, RunConfig)
    child = find_training(session)
    if child is None:
        child = start_training(
            config,
            session,
            restart=restart or wanted.start_over,
            take_over=take_over,
            more_steps=wanted.more_steps or 0,
            more_text_encoder_steps=wanted.more_text_encoder_steps or 0,
        )
        watch = _Watch(child, LiveView(), _take_back)
    else:
        logger.info("A training of this session is running already; this cell shows it.")
        if restart or wanted.start_over or wanted.more_steps or wanted.more_text_encoder_steps:
            logger.info("It goes on as it was begun: what the training's form asks for is kept until it has ended.")
        watch = _Watch(child, LiveView())
    logger.info("To stop it: the Stop button, or the notebook's own for this cell. Both let the training save first.")
    result = _wait(child, watch, session)
    if wanted.disconnect_when_done:
        desk.untick(RunConfig, disconnect_when_done=False)
        disconnect_when_safe(result, session, disconnect=True)
    return result


def _wait(child: TrainingChild, watch: "_Watch", session: Session) -> TrainResult:
    view = watch.view
    view.display()
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
        stopped = isinstance(err, Interrupted)
        watch.look(last=True)
        if stopped:
            watch.note_begun()
        view.end(_STOPPED if stopped else _ENDED, good=False, plot=_recorded_plot(session))
        raise
    watch.look(last=True)
    watch.note_begun()
    end = "Finished before" if result.first_step == result.steps else "Done"
    view.end(f"{end}: {result.path.name} is written and checked.", good=True, plot=result.loss_plot)
    return result


def _take_back() -> None:
    """Empty what was asked for once, so that "Run all" goes on with it and does not begin it twice."""
    desk.untick(RunConfig, more_steps=None, more_text_encoder_steps=None, start_over=False)


class _Watch:
    """Looks at the child twice a second, and answers the notebook's buttons more often than that."""

    def __init__(self, child: TrainingChild, view: LiveView, begun: Callable[[], None] = lambda: None) -> None:
        self._child, self.view = child, view
        self._begun: Callable[[], None] | None = begun
        self._asked = 0
        self._looked = 0.0
        self._steps: dict[str, int] = {}

    def look(self, *, last: bool = False) -> None:
        """Pass on what was clicked, then show what is new."""
        answer_widgets()
        if self.view.stop_clicks > self._asked:
            self._asked = self.view.stop_clicks
            if self._asked == 1:
                self._child.stop()
            else:
                self._child.kill()
        if last or time.monotonic() - self._looked >= _LOOK_EVERY_S:
            live = self._child.live()
            if live.stage and not self._steps:
                self.note_begun()
                # The run saves its segments before its first step.
                self._steps = planned_steps(read_record(self._child.session.folder).record)
            self.view.show(live, self._steps, self._child.session.samples, force=last)
            self._looked = time.monotonic()

    def note_begun(self) -> None:
        """What was asked for has begun: it was not refused."""
        if self._begun is not None:
            self._begun()
            self._begun = None

    def ask_to_stop(self) -> None:
        """Do what the Stop button does."""
        self.view.stop_once()


def _recorded_plot(session: Session) -> Path | None:
    """The losses of the session's finished run, when there is one."""
    made = (read_record(session.folder).record.get("result") or {}).get("loss_plot")
    return session.folder / made if made else None
