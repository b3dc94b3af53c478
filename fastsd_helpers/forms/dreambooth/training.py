"""The training cell: start the child process or find the one that runs, show it, stop it, hand its result back."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from fastsd_helpers.dreambooth.running.child_process import TrainingChild, find_training, planned_steps, start_training
from fastsd_helpers.dreambooth.running.engine import TrainResult
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import FastSDError, Interrupted
from fastsd_helpers.forms import desk
from fastsd_helpers.forms.dreambooth.exporting import disconnect_when_safe
from fastsd_helpers.forms.dreambooth.live_view import LiveView
from fastsd_helpers.forms.widgets.form import require
from fastsd_helpers.forms.widgets.work_view import wait_for
from fastsd_helpers.options import check, option
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions import Session
from fastsd_helpers.sessions.record import read_record

__all__ = ["RunConfig", "run_training"]


@dataclass(frozen=True)
class RunConfig:
    """What this run of the training cell does beside going on with the session's run."""

    more_steps: int | None = option(
        None,
        help="after a finished run: train this many more steps, with the settings, photos and "
        "captions as they are now; empty: resume the run",
        low=1,
        high=200_000,
    )
    start_over: bool = option(False, help="start again at step 0; the finished files of the run before are kept")
    disconnect_when_done: bool = option(
        False, help="disconnect the runtime when the model is written and verified, so that it costs nothing more"
    )
    more_text_encoder_steps: int | None = option(
        None,
        help="the same for the text encoder, before the U-Net; for new words or other captions",
        low=1,
        high=200_000,
        advanced=True,
    )

    def __post_init__(self) -> None:
        both = self.start_over and (self.more_steps or self.more_text_encoder_steps)
        check(self, ["start_over and more_steps exclude each other: choose one"] if both else [])


_KEPT = (
    "It continues with the settings it was started with: what the training's form asks for is kept until it has ended."
)
_STOPPING = (
    "To stop it: the Stop button, or the notebook's own for this cell. Both let the training save a checkpoint first."
)


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
        session: with prepared images.
        run_config: train on after the end, start over, disconnect. What was asked for is taken back in its form as soon
            as it has begun, so that the same cell run again goes on with it.
        restart: the same as `start_over` there.
        take_over: use the session although another machine's run seems to hold it.

    Returns:
        What `dreambooth.train` gives.

    Raises:
        SettingsError: these are the settings of another form, or not what the session's run was begun with.
        Interrupted: it was stopped, and has saved.
        TrainingFailed: it was killed, ran out of memory, or broke down.
        FastSDError: what else the training ended with.
    """
    require(config, DreamBoothConfig)
    wanted = run_config or RunConfig()
    require(wanted, RunConfig)
    session.require_here()
    child, begun = find_training(session), lambda: None
    if child is None:
        child = start_training(
            config,
            session,
            restart=restart or wanted.start_over,
            take_over=take_over,
            more_steps=wanted.more_steps or 0,
            more_text_encoder_steps=wanted.more_text_encoder_steps or 0,
        )
        # What is asked for once is emptied, so that "Run all" goes on with it and does not begin it twice.
        begun = functools.partial(
            desk.untick, RunConfig, more_steps=None, more_text_encoder_steps=None, start_over=False
        )
    else:
        logger.info("A training of this session is running already; this cell shows it.")
        if restart or wanted.start_over or wanted.more_steps or wanted.more_text_encoder_steps:
            logger.info(_KEPT)
    logger.info(_STOPPING)
    result = _watch(child, session, begun)
    if wanted.disconnect_when_done:
        desk.untick(RunConfig, disconnect_when_done=False)
        disconnect_when_safe(result, session, disconnect=True)
    return result


def _watch(child: TrainingChild, session: Session, begun: Callable[[], None]) -> TrainResult:
    """Show the training until it has ended; `begun` is called once it is known not to have been refused."""
    view = LiveView()
    view.display()
    steps: dict[str, int] = {}
    processes = 1

    def show() -> None:
        nonlocal processes
        live = child.live()
        if live.stage and not steps:
            begun()
            # The run saves its segments before its first step.
            record = read_record(session.folder).record
            steps.update(planned_steps(record))
            processes = int((record.get("settings") or {}).get("processes") or 1)
        view.show_run(live, steps, session.samples, processes=processes, force=not child.is_running())

    try:
        result = wait_for(child, view, show, "The training")
    except FastSDError as err:
        if isinstance(err, Interrupted):
            begun()
        made = (read_record(session.folder).record.get("result") or {}).get("loss_plot")
        view.show_plot(session.folder / made if made else None)
        raise
    begun()
    end = "Already finished" if result.first_step == result.steps else "Done"
    view.end(f"{end}: {result.path.name} is written and checked.", good=True)
    view.show_plot(result.loss_plot)
    return result
