"""A training in a process of its own: exactly the command `fastsd dreambooth train`, started, found again, stopped.

A notebook trains this way, so that its memory is free afterwards, a killed training is a sentence and not a dead
kernel, and a new kernel finds the run that is still going on.
"""

from collections.abc import Mapping
from typing import Any

from fastsd_helpers.background import Background, command_of
from fastsd_helpers.dreambooth.results.finishing import TrainResult, finished_result
from fastsd_helpers.dreambooth.running.launching import model_named, result_from, train_words
from fastsd_helpers.dreambooth.running.live import JournalReader, Live, live_folder
from fastsd_helpers.dreambooth.running.out_of_memory import shortage
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.dreambooth.training.beginning import MoreSteps
from fastsd_helpers.dreambooth.training.segments import legs_of, segments_in
from fastsd_helpers.errors import FastSDError, Interrupted
from fastsd_helpers.sessions import Session, local_holder
from fastsd_helpers.sessions.record import read_record

__all__ = ["TrainingChild", "find_training", "planned_steps", "start_training", "train_command"]


def train_command(
    config: DreamBoothConfig,
    session: Session,
    *,
    restart: bool = False,
    take_over: bool = False,
    more_steps: int = 0,
    more_text_encoder_steps: int = 0,
) -> list[str]:
    """The command line that trains with these settings; settings left alone are left out, as a person would."""
    more = MoreSteps(more_steps, more_text_encoder_steps)
    return command_of(train_words(config, session, restart=restart, take_over=take_over, more=more))


def start_training(config: DreamBoothConfig, session: Session, **how: Any) -> "TrainingChild":
    """Start the training of a session in its own process, and return at once.

    The process is in a session of its own and goes on when the one that started it ends, whatever ends that: only
    `stop` and `kill` end it early. A notebook's cell that waits for it (`forms.run_training`) asks it to save and end
    when the cell is interrupted, which JupyterLab also does before it restarts a kernel.

    Args:
        config: as for `train`.
        session: as for `train`.
        how: restart, take_over, more_steps, more_text_encoder_steps, as for it.

    Raises:
        DriveError: the local folder for its log cannot be written.
    """
    session.settle_identity()
    command, model = train_command(config, session, **how), model_named(config, session)
    return TrainingChild.start(command, live_folder(session), model=model, session=session)


def find_training(session: Session) -> "TrainingChild | None":
    """Find the training of a session that is running on this machine, whoever started it; None when there is none.

    Raises:
        DriveError: the session's folder cannot be read.
    """
    session.settle_identity()
    folder = live_folder(session)
    if (started := TrainingChild.find(folder, session=session)) is not None:
        return started
    holder = local_holder(session.folder, session.record["id"])
    if holder is not None and JournalReader(session).read().process == holder:
        return TrainingChild(folder, holder, session=session)  # begun in a terminal
    return None


class TrainingChild(Background):
    """A training that runs, or has just run, in another process of this machine.

    Attributes:
        session: what it trains.
    """

    def __init__(self, *about: Any, session: Session) -> None:
        super().__init__(*about)
        self.session = session
        self._journal = JournalReader(session)

    def live(self) -> Live:
        """What it says about itself; empty until it has said anything."""
        found = self._journal.read()
        return found if found.process == self.process else Live()

    def log_lines(self, count: int = 12) -> list[str]:
        """The end of what it has printed, with secrets hidden."""
        return super().log_lines(count) if self._log is not None else self._journal.read().messages[-count:]

    def wait(self, what: str = "The training", **options: Any) -> TrainResult:
        """Wait until it has ended; then return what it made, or raise what went wrong.

        Args:
            what: in the sentence when it died.
            options: `between` and `every_s`, see `Background.wait`.

        Raises:
            Interrupted: it was asked to stop, and has saved.
            TrainingFailed: it was killed, ran out of memory, or broke down.
            FastSDError: what its command line ended with.
        """
        return super().wait(what, log=self.session.logs / "train.log", **options)

    def _result(self, what: str) -> TrainResult:
        # The child has saved the session meanwhile; this object catches up.
        self.session.record.update(read_record(self.session.folder).record)
        return result_from(super()._result(what)) if self._out is not None else self._result_from_session()

    def _result_from_session(self) -> TrainResult:
        run = int(self.session.record.get("run", 1))
        done = finished_result(self.session, run)
        if done is None:
            raise Interrupted(
                "The training that was started in a terminal ended before it was finished.",
                "That terminal shows the reason. Run this cell again to resume from the last checkpoint.",
            )
        steps = sum(planned_steps(self.session.record).values())
        return TrainResult(**done, first_step=0, steps=steps, seconds=0.0)

    def _killed(self, what: str, how: str) -> FastSDError:
        used = self.live().host_bytes
        held = f"; it had used {used / 2**30:.1f} GiB" if used else ""
        fact = f"{what} was killed from outside{self._where()}{how}{held}. Usually the machine ran out of memory"
        return shortage(self.session, "host", fact)

    def _where(self) -> str:
        live = self.live()
        stage = live.stage.replace("_", " ")
        return f" after {stage} step {live.step} of {live.steps}" if stage else " at its start"


def planned_steps(record: Mapping[str, Any]) -> dict[str, int]:
    """Stage -> its steps in all segments of the session's run; empty before a run has recorded them."""
    steps: dict[str, int] = {}
    for leg in legs_of(segments_in(record)):
        steps[leg.stage] = leg.end
    return steps
