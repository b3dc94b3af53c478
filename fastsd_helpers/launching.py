"""A command of this library on several processes of this machine: started with `accelerate launch`, and answered for.

The process that is asked does not do the work then. It passes on what the first of the others reports, lets them save
and end when it is asked to, and says in a sentence what went wrong in one of them.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastsd_helpers.background import answered_error, environment_of_ours
from fastsd_helpers.errors import Interrupted, TrainingFailed, needs_package
from fastsd_helpers.files import file_errors
from fastsd_helpers.processes import (
    LOST,
    OWN_THREADS,
    PLACE,
    Child,
    JournalTail,
    JournalWriter,
    LogTail,
    rank_here,
    watched_over,
)
from fastsd_helpers.runtime import logger

__all__ = ["launch", "launch_command", "log_to_watcher", "news_writer"]

_LOOK_EVERY_S = 0.1
_NEWS = "news-{}.jsonl"  # of each process
_TO_SAVE_S = 1800.0  # how long they get to save once they are asked to stop


def launch_command(count: int, words: Sequence[str]) -> list[str]:
    """The command that starts `fastsd WORDS` in so many processes of this machine, whatever `accelerate config` says.

    Source: `accelerate launch --help`. Several processes are "multi_gpu" there without a GPU too.

    Args:
        count: of the processes.
        words: of the command, without `fastsd`.
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
    folder: Path,
    *,
    what: str,
    model: str,
    tell: Callable[[int, dict[str, Any]], None],
    asked: Callable[[], bool],
    package: str,
) -> dict[str, Any]:
    """Run a command on so many processes.

    Args:
        count: of the processes.
        words: the command line after `fastsd`.
        folder: on this machine's own disk, for what they leave here meanwhile.
        what: the work, for sentences: "training".
        model: what they open, for the tokens they may need.
        tell: gets the number of a process and a row that it reports.
        asked: whether they shall save and end.
        package: what `fastsd install` is given for Accelerate.

    Returns:
        What the first of them answers, the JSON object of its command.

    Raises:
        Interrupted: they were asked to stop.
        TrainingFailed: one of them was killed or broke down.
        FastSDError: what one of them says.
    """
    with needs_package(f"A {what} on several processes", f"Run: fastsd install {package}"):
        import accelerate  # noqa: F401
    place = folder / f"ranks-{secrets.token_hex(4)}"
    with file_errors(place, "create"):
        place.mkdir(parents=True, mode=0o700)
        (place / "watcher").write_text(str(os.getpid()), encoding="ascii")
    try:
        child = Child(launch_command(count, words), log=place / "log", env=_environment(place, model))
        try:
            _watch(child, place, count, tell, asked)
        finally:
            child.close()
        return _answer(count, place, what, asked)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _environment(place: Path, model: str) -> dict[str, str]:
    own = environment_of_ours(model) | {PLACE: str(place)}
    if "OMP_NUM_THREADS" not in own:
        own[OWN_THREADS] = "1"
    if not os.path.exists("/dev/nvidiactl") and "OMP_WAIT_POLICY" not in own:
        own |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # they share the cores
    return own


def _watch(
    child: Child, place: Path, count: int, tell: Callable[[int, dict[str, Any]], None], asked: Callable[[], bool]
) -> None:
    news, log = [JournalTail(place / _NEWS.format(rank)) for rank in range(count)], LogTail(place / "log")
    since: float | None = None
    while True:
        running = child.alive()
        for rank, journal in enumerate(news):
            for row in journal.read()[0]:
                if "pid" not in row:  # the first one says who writes
                    tell(rank, row)
        for line in log.read(ended=not running):
            logger.debug("%s", line)
        if not running:
            return
        if since is None and asked():
            since = time.monotonic()
            (place / "stop").touch()
        if since is not None and time.monotonic() - since > _TO_SAVE_S:
            return  # the caller ends it
        time.sleep(_LOOK_EVERY_S)


# --------------------------------------------------------------------------------------------- one of the processes


def news_writer() -> JournalWriter | None:
    """Where this process reports to the one that watches over it; None where nobody does."""
    place = watched_over()
    return JournalWriter(place / _NEWS.format(rank_here())) if place is not None else None


@contextlib.contextmanager
def log_to_watcher(writer: JournalWriter | None, *, others: int = logging.ERROR) -> Iterator[None]:
    """Send what this process logs to the one that watches over it, as rows {message, level}.

    Args:
        writer: where it reports to.
        others: the least level that is kept of processes but the first: they say much that it says too.
    """
    before = logger.level
    if rank_here() > 0:
        logger.setLevel(others)
    handler = None if writer is None else _ToWatcher(writer)
    if handler is not None:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(before)
        if handler is not None:
            logger.removeHandler(handler)


class _ToWatcher(logging.Handler):
    def __init__(self, writer: JournalWriter) -> None:
        super().__init__(logging.INFO)
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.append({"message": record.getMessage(), "level": record.levelno})


# ------------------------------------------------------------------------------------------------------- the end


def _answer(count: int, place: Path, what: str, asked: Callable[[], bool]) -> dict[str, Any]:
    """What the first has answered; else the cause, and not its consequence in the others."""
    answers = [_read(place / f"{rank}.json") for rank in range(count)]
    first = answers[0]
    if first is not None and "error" not in first:
        return first
    said = [answer for answer in answers if answer is not None and not answer.get("error", LOST).startswith(LOST)]
    causes = sorted(said, key=lambda answer: answer.get("exit_code") == Interrupted.exit_code)
    if causes and (asked() or causes[0].get("exit_code") != Interrupted.exit_code):
        raise answered_error(causes[0])
    if asked():
        raise Interrupted(f"The {what} was stopped.", "What was saved is kept: run it again to resume.")
    gone = [rank for rank, answer in enumerate(answers) if answer is None]
    which = f"Process {gone[0] + 1} of {count}" if len(gone) == 1 else f"One of the {count} processes"
    raise TrainingFailed(
        f"{which} of this {what} was killed from outside or crashed, and the others ended with it. Usually the "
        "memory ran out.",
        "What was saved is kept: run it again to resume, with the same number of processes or with one "
        f"(--processes 1).{_last_words(place)}",
    )


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        found = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
        return found if isinstance(found, dict) else None
    return None


def _last_words(place: Path) -> str:
    tail = LogTail(place / "log")
    tail.read(ended=True)
    # The launcher's own error says that there was one.
    lines = [line for line in tail.last if "Error" in line and "ChildFailedError" not in line][-2:]
    return "\nIts last output:\n" + "\n".join(lines) if lines else ""
