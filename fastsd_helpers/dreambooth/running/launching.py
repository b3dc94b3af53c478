"""A training on several processes of this machine: started with `accelerate launch`, watched, and answered for.

The process that is asked to train does not train then. It holds the session's lock, passes on what the first of the
others reports, lets them save and end when it is asked to, and says in a sentence what went wrong in one of them.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import sys
import threading
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastsd_helpers.background import environment_of_ours
from fastsd_helpers.device import peak_memory_bytes
from fastsd_helpers.dreambooth.presets import BASE_ON_A_GPU
from fastsd_helpers.dreambooth.results.finishing import TrainResult
from fastsd_helpers.dreambooth.running.live import Progress, Report, live_folder
from fastsd_helpers.dreambooth.settings import DreamBoothConfig, given_values
from fastsd_helpers.dreambooth.training.beginning import MoreSteps
from fastsd_helpers.errors import FastSDError, Interrupted, SessionBusy, TrainingFailed, needs_package
from fastsd_helpers.files import file_errors
from fastsd_helpers.options import words_of
from fastsd_helpers.processes import LOST, OWN_THREADS, PLACE, Child, JournalTail, JournalWriter, LogTail, watched_over
from fastsd_helpers.sessions import Session
from fastsd_helpers.sessions.record import read_record

__all__ = ["launch", "launch_command", "model_named", "reporter", "result_from", "train_words"]

logger = logging.getLogger("fastsd_helpers")

_LOOK_EVERY_S = 0.1
_NEWS = "news.jsonl"
_TO_SAVE_S = 1800.0  # how long they get to save once they are asked to stop


def train_words(
    config: DreamBoothConfig, session: Session, *, restart: bool = False, take_over: bool = False, more: MoreSteps
) -> list[str]:
    """The words after `fastsd` that train with these settings; settings left alone are left out, as a person would."""
    words = ["dreambooth", "train", session.name, "--root", str(session.folder.parent)]
    words += words_of(config, given_values(config))
    words += ["--restart"] * restart + ["--take-over"] * take_over
    counts = {"--more-steps": more.last, "--more-text-encoder-steps": more.text_encoder}
    return [*words, *(f"{flag}={count}" for flag, count in counts.items() if count)]


def model_named(config: DreamBoothConfig, session: Session) -> str:
    """What the run will start from, as far as it can be told without looking at the machine."""
    record = session.record
    if config.base_model != "auto":
        return config.base_model
    if ref := (record.get("base_model") or {}).get("ref"):
        return ref
    return "demo" if (record.get("dataset") or {}).get("demo") else BASE_ON_A_GPU


def launch_command(count: int, words: Sequence[str]) -> list[str]:
    """The command that starts `fastsd WORDS` in so many processes of this machine, whatever `accelerate config` says.

    Source: `accelerate launch --help`. Several processes are "multi_gpu" there without a GPU too.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--gpu_ids", "all"),
        *("--num_processes", str(count), "--num_machines", "1", "--machine_rank", "0", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads),
        *("-m", "fastsd_helpers", *words, "--json"),
    ]


def launch(
    count: int,
    words: Sequence[str],
    session: Session,
    report: Report,
    *,
    model: str,
    stop: threading.Event,
    lock: Any,
) -> TrainResult:
    """Train on so many processes; returns what the first of them made.

    Args:
        words: the command line after `fastsd` that trains.
        session: what it trains; its lock is held by the caller.
        report: gets every Progress of the first process.
        model: what they open, for the tokens they may need.
        stop: when it is set, they are asked to save and end.
        lock: when it is lost, they are asked so too.

    Raises:
        Interrupted: they were asked to stop.
        SessionBusy: another run has broken the lock.
        TrainingFailed: one of them was killed or broke down.
        FastSDError: what one of them says.
    """
    with needs_package("Training on several processes", "Run: fastsd install dreambooth"):
        import accelerate  # noqa: F401
    place = live_folder(session) / f"ranks-{secrets.token_hex(4)}"
    with file_errors(place, "create"):
        place.mkdir(parents=True, mode=0o700)
        (place / "watcher").write_text(str(os.getpid()), encoding="ascii")
    try:
        child = Child(launch_command(count, words), log=place / "log", env=_environment(place, model))
        try:
            _watch(child, place, report, stop, lock)
        finally:
            child.close()
        return _answer(count, place, session, stop, lock)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _environment(place: Path, model: str) -> dict[str, str]:
    own = environment_of_ours(model) | {PLACE: str(place)}
    if "OMP_NUM_THREADS" not in own:
        own[OWN_THREADS] = "1"
    if not os.path.exists("/dev/nvidiactl") and "OMP_WAIT_POLICY" not in own:
        own |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # they share the cores
    return own


def _watch(child: Child, place: Path, report: Report, stop: threading.Event, lock: Any) -> None:
    news, log = JournalTail(place / _NEWS), LogTail(place / "log")
    asked: float | None = None
    while True:
        running = child.alive()
        for row in news.read()[0]:
            if "pid" not in row:  # the first one says who writes
                report(Progress(**row))
        for line in log.read(ended=not running):
            logger.debug("%s", line)
        if not running:
            return
        if asked is None and (stop.is_set() or lock.lost):
            asked = time.monotonic()
            (place / "stop").touch()
        if asked is not None and time.monotonic() - asked > _TO_SAVE_S:
            return  # the caller ends it
        time.sleep(_LOOK_EVERY_S)


def reporter(report: Report) -> Report:
    """Where the first process reports to: the process that watches over it, which passes it on; alone, `report`."""
    place = watched_over()
    if place is None:
        return report
    writer = JournalWriter(place / _NEWS)

    def write(progress: Progress) -> None:
        held = {"host_bytes": peak_memory_bytes("host"), "gpu_bytes": peak_memory_bytes("cuda")}
        writer.append({**vars(progress), **held})

    return write


# ------------------------------------------------------------------------------------------------------- the end


def _answer(count: int, place: Path, session: Session, stop: threading.Event, lock: Any) -> TrainResult:
    """What they have answered; the cause, and not its consequence in the others."""
    answers = [_read(place / f"{rank}.json") for rank in range(count)]
    session.record.update(read_record(session.folder).record)
    first = answers[0]
    if first is not None and "error" not in first:
        return result_from(first)
    if lock.lost:
        raise SessionBusy(
            "Another run has broken this session's lock.",
            "This run stopped; the other one resumes from the last checkpoint.",
        )
    said = [answer for answer in answers if answer is not None and not answer.get("error", LOST).startswith(LOST)]
    causes = sorted(said, key=lambda answer: answer.get("exit_code") == Interrupted.exit_code)
    if causes and (stop.is_set() or causes[0].get("exit_code") != Interrupted.exit_code):
        cause = causes[0]
        kind = {Interrupted.exit_code: Interrupted, 1: TrainingFailed}.get(cause.get("exit_code", 1), FastSDError)
        raise kind(str(cause["error"]), str(cause.get("hint", "")))
    if stop.is_set():
        raise Interrupted("The training was stopped.", "What was saved is kept: train again to resume.")
    gone = [rank for rank, answer in enumerate(answers) if answer is None]
    which = f"Process {gone[0] + 1} of {count}" if len(gone) == 1 else f"One of the {count} processes"
    raise TrainingFailed(
        f"{which} of this training was killed from outside or crashed, and the others ended with it. Usually the "
        "memory ran out.",
        "What was saved is kept: train again with the same session to resume, with the same number of processes or "
        f"with one (--processes 1).{_last_words(place)}",
    )


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        found = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
        return found if isinstance(found, dict) else None
    return None


def _last_words(place: Path) -> str:
    tail = LogTail(place / "log")
    tail.read(ended=True)
    lines = [line for line in tail.last if "Error" in line][-2:]
    return "\nIts last output:\n" + "\n".join(lines) if lines else ""


def result_from(answer: Mapping[str, Any]) -> TrainResult:
    """The result as another process's own `train` returned it: the command prints every field of it."""
    kinds = typing.get_type_hints(TrainResult)
    values: dict[str, Any] = {}
    for item in fields(TrainResult):
        if item.name in answer:
            value = answer[item.name]
            values[item.name] = Path(value) if kinds[item.name] is Path else value
    return TrainResult(**values)
