"""A training in a process of its own: exactly the command `fastsd dreambooth train`, started, found again, stopped.

A notebook trains this way, so that its memory is free afterwards, a killed training is a sentence and not a dead
kernel, and a new kernel finds the run that is still going on.
"""

import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastsd_helpers.background import answered_error, environment_of_ours, last_answer, tail
from fastsd_helpers.dreambooth.engine import TrainResult
from fastsd_helpers.dreambooth.live import JournalReader, Live, live_folder
from fastsd_helpers.dreambooth.segments import legs_of, segments_in
from fastsd_helpers.dreambooth.settings import DreamBoothConfig, given_values
from fastsd_helpers.dreambooth.shortage import shortage
from fastsd_helpers.errors import DriveError, FastSDError, Interrupted, TrainingFailed
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.options import options_of
from fastsd_helpers.processes import Child, LocalProcess
from fastsd_helpers.runtime import redact
from fastsd_helpers.sessions import Session, local_holder
from fastsd_helpers.sessions.record import read_record

__all__ = ["TrainingChild", "find_training", "planned_steps", "start_training", "train_command"]

logger = logging.getLogger("fastsd_helpers")

_POINTER = "child.json"
_SIGNAL_OF_THE_SYSTEM = 9  # what the kernel's out-of-memory killer sends


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
    command = [sys.executable, "-m", "fastsd_helpers", "dreambooth", "train", session.name]
    command += ["--root", str(session.folder.parent)]
    given = given_values(config)
    for item in options_of(DreamBoothConfig):
        if item.name not in given or item.secret:
            continue
        value = given[item.name]
        if item.kind is bool:
            command.append(item.flag if value else item.flag.replace("--", "--no-", 1))
        else:  # in one word, so that a value that begins with a dash is no flag
            command.append(f"{item.flag}={value}")
    command += ["--restart"] * restart + ["--take-over"] * take_over
    more = {"--more-steps": more_steps, "--more-text-encoder-steps": more_text_encoder_steps}
    command += [f"{flag}={count}" for flag, count in more.items() if count]
    return [*command, "--json"]


def start_training(
    config: DreamBoothConfig,
    session: Session,
    *,
    restart: bool = False,
    take_over: bool = False,
    more_steps: int = 0,
    more_text_encoder_steps: int = 0,
) -> "TrainingChild":
    """Start the training of a session in its own process, and return at once.

    The process is in a session of its own and goes on when the one that started it ends, whatever ends that: only
    `stop` and `kill` end it early. A notebook's cell that waits for it (`forms.run_training`) asks it to save and end
    when the cell is interrupted, which JupyterLab also does before it restarts a kernel.

    Args:
        config, session, restart, take_over, more_steps, more_text_encoder_steps: as for `train`.

    Raises:
        DriveError: the local folder for its log cannot be written.
    """
    session.settle_identity()
    folder = live_folder(session)
    name = secrets.token_hex(4)
    with file_errors(folder, "write to"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in [*folder.glob("*.out"), *folder.glob("*.log")]:
            old.unlink()
        out, log = folder / f"{name}.out", folder / f"{name}.log"
        command = train_command(
            config,
            session,
            restart=restart,
            take_over=take_over,
            more_steps=more_steps,
            more_text_encoder_steps=more_text_encoder_steps,
        )
        child = Child(command, log=log, out=out, env=environment_of_ours(_model_named(config, session)), outlives=True)
    own = child.process
    pointer = {"pid": own.pid, "start": own.start, "out": out.name, "log": log.name}
    write_atomic(folder / _POINTER, json.dumps(pointer).encode())
    return TrainingChild(session, own, out=out, log=log, child=child)


def _model_named(config: DreamBoothConfig, session: Session) -> str:
    """What the run will start from, as far as it can be told without looking at the machine."""
    record = session.record
    if config.base_model != "auto":
        return config.base_model
    if ref := (record.get("base_model") or {}).get("ref"):
        return ref
    return "demo" if (record.get("dataset") or {}).get("demo") else "sd15"


def find_training(session: Session) -> "TrainingChild | None":
    """Find the training of a session that is running on this machine, whoever started it; None when there is none.

    Raises:
        DriveError: the session's folder cannot be read.
    """
    session.settle_identity()
    folder = live_folder(session)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # nothing was started here, or not wholly
        pointer = json.loads((folder / _POINTER).read_bytes())
        started = LocalProcess(pointer["pid"], pointer["start"])
        if started.is_alive():
            return TrainingChild(session, started, out=folder / pointer["out"], log=folder / pointer["log"])
    holder = local_holder(session.folder, session.record["id"])
    if holder is not None and JournalReader(session).read().process == holder:
        return TrainingChild(session, holder)  # begun in a terminal
    return None


class TrainingChild:
    """A training that runs, or has just run, in another process of this machine.

    Attributes:
        session: what it trains.
        process: who it is.
    """

    def __init__(
        self,
        session: Session,
        process: LocalProcess,
        *,
        out: Path | None = None,
        log: Path | None = None,
        child: Child | None = None,
    ) -> None:
        self.session = session
        self.process = process
        self._out, self._log, self._child = out, log, child
        self._journal = JournalReader(session)

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._child.alive() if self._child is not None else self.process.is_alive()

    def live(self) -> Live:
        """What it says about itself; empty until it has said anything."""
        found = self._journal.read()
        return found if found.process == self.process else Live()

    def log_lines(self, count: int = 12) -> list[str]:
        """The end of what it has printed, with secrets hidden."""
        if self._log is None:
            return self._journal.read().messages[-count:]
        lines = redact(tail(self._log)).replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip()][-count:]

    def stop(self) -> None:
        """Ask it to save and end; it ends between two steps. Nothing happens when it has ended."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once: what it did since its newest checkpoint is lost, and done again by the next run."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def wait(self, *, between: Callable[[], None] = lambda: None, every_s: float = 0.2) -> TrainResult:
        """Wait until it has ended; then return what it made, or raise what went wrong.

        Args:
            between: called again and again meanwhile.
            every_s: how long to sleep between the calls.

        Raises:
            Interrupted: it was asked to stop, and has saved.
            TrainingFailed: it was killed, ran out of memory, or broke down.
            FastSDError: what its command line ended with.
        """
        while self.is_running():
            between()
            time.sleep(every_s)
        between()
        self._keep_log()
        # The child has saved the session meanwhile; this object catches up.
        self.session.record.update(read_record(self.session.folder).record)
        if self._out is None:
            return self._result_from_session()
        answer = last_answer(self._out)
        if answer is None:
            raise self._death()
        if "error" in answer:
            raise answered_error(answer)
        return _as_result(answer)

    def _result_from_session(self) -> TrainResult:
        from fastsd_helpers.dreambooth.finish import finished_result

        run = int(self.session.record.get("run", 1))
        done = finished_result(self.session, run)
        if done is None:
            raise Interrupted(
                "The training that was begun in a terminal has ended before it was finished.",
                "That terminal says why. Run this cell again to go on from what is saved.",
            )
        return TrainResult(**done, first_step=0, steps=self._planned_steps(), seconds=0.0)

    def _planned_steps(self) -> int:
        return sum(planned_steps(self.session.record).values())

    def _death(self) -> FastSDError:
        live, code = self.live(), self._child.returncode if self._child is not None else None
        where = (
            f"after {live.stage.replace('_', ' ')} step {live.step} of {live.steps}" if live.stage else "at its start"
        )
        # Of a process begun by another kernel the system does not tell how it ended.
        if code in (None, -_SIGNAL_OF_THE_SYSTEM):
            said = f" (signal {_SIGNAL_OF_THE_SYSTEM})" if code else ""
            used = f"; it had used {live.host_bytes / 2**30:.1f} GiB" if live.host_bytes else ""
            fact = f"The training was ended from outside {where}{said}{used}. Most often the machine's memory ran out"
            return shortage(self.session, "host", fact)
        lines = "\n".join(self.log_lines(6))
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return TrainingFailed(
            f"The training crashed {where} ({how}).",
            f"What was saved before is intact; run it again to go on. Its last words:\n{lines}",
        )

    def _keep_log(self) -> None:
        """Leave the end of the log in the session, where a bug report finds it."""
        if self._log is None:
            return
        try:
            write_atomic(self.session.logs / "train.log", redact(tail(self._log)).encode())
        except (DriveError, OSError) as err:
            logger.debug("The training's log was not kept: %s.", err)


def planned_steps(record: Mapping[str, Any]) -> dict[str, int]:
    """Stage -> its steps in all segments of the session's run; empty before a run has recorded them."""
    steps: dict[str, int] = {}
    for leg in legs_of(segments_in(record)):
        steps[leg.stage] = leg.end
    return steps


def _as_result(answer: Mapping[str, Any]) -> TrainResult:
    """The result as the child's own `train` returned it: the command prints every field of it."""
    kinds = typing.get_type_hints(TrainResult)
    values = {}
    for item in fields(TrainResult):
        if item.name in answer:
            value = answer[item.name]
            values[item.name] = Path(value) if kinds[item.name] is Path else value
    return TrainResult(**values)
