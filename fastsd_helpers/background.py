"""A command of this library in a process of its own: started, found again by a new kernel, stopped, its answer read.

A notebook does its long work this way: its memory is free afterwards, a process that is killed is a sentence and no
dead kernel, what other packages print does not land below the cell, and a new kernel finds the work still going on.
"""

import contextlib
import hashlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fastsd_helpers.errors import DriveError, FastSDError, Interrupted, TrainingFailed
from fastsd_helpers.files import file_errors, scratch_root, write_atomic
from fastsd_helpers.model_lookup import tokens_for
from fastsd_helpers.processes import Child, LocalProcess, environment_for, with_this_package
from fastsd_helpers.runtime import redact, secret

__all__ = ["Background", "answered_error", "command_of", "environment_of_ours", "local_folder"]

_POINTER = "child.json"
_KEPT_LOG_BYTES = 256 * 1024
_SIGNAL_OF_THE_SYSTEM = 9  # what the kernel's out-of-memory killer sends


def local_folder(of: Path) -> Path:
    """The folder on this machine's own disk for what belongs to a folder of the user's and to this machine alone.

    FASTSD_SCRATCH moves it. Nothing is created.

    Args:
        of: the folder of the user's, such as a session.
    """
    return scratch_root() / f"{hashlib.sha256(str(of.absolute()).encode()).hexdigest()[:20]}-live"


def command_of(words: Sequence[str]) -> list[str]:
    """The command line of `fastsd WORDS --json` in this Python.

    Args:
        words: of the command, without `fastsd`.
    """
    return [sys.executable, "-m", "fastsd_helpers", *words, "--json"]


def environment_of_ours(model: str) -> dict[str, str]:
    """The environment of a child that runs this library and opens `model`: with the tokens for that, and no others.

    Args:
        model: as the user named it: key, Hub id, path or link.
    """
    environment = with_this_package(environment_for("training", this_python=True))
    # From here, because Colab and Kaggle answer a notebook's kernel only; and only what this run's model may need.
    wanted = tokens_for(model)
    given = {name: token for name in wanted if (token := secret(name))}
    if "HF_TOKEN" in wanted and "HF_TOKEN" not in given:  # where huggingface_hub looks beside
        names = ("HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN")
        given |= {name: os.environ[name] for name in names if name in os.environ}
    return environment | given


def _tail(path: Path) -> str:
    """The end of a file, 256 KB at most; empty where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _KEPT_LOG_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _last_answer(path: Path) -> dict[str, Any] | None:
    """The JSON object that a command with --json wrote last; None where it wrote none."""
    lines = _tail(path).strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def answered_error(answer: Mapping[str, Any]) -> FastSDError:
    """The error that a command with --json has answered.

    Args:
        answer: with `error`, `hint` and `exit_code`.
    """
    kind = {130: Interrupted, 1: TrainingFailed}.get(answer.get("exit_code", 1), FastSDError)
    return kind(str(answer["error"]), str(answer.get("hint", "")))


class Background:
    """A command that runs, or has just run, in another process of this machine; made by `start` or `find`.

    Attributes:
        process: who it is.
        folder: its local files.
    """

    def __init__(
        self,
        folder: Path,
        process: LocalProcess,
        out: Path | None = None,
        log: Path | None = None,
        child: Child | None = None,
    ) -> None:
        self.folder, self.process = folder, process
        self._out, self._log, self._child = out, log, child
        self._asked_to_stop = False

    @classmethod
    def start(cls, command: Sequence[str], folder: Path, *, model: str, **own: Any) -> Self:
        """Start a command (`command_of`), and return at once; neither an interrupt nor a new kernel ends it.

        Args:
            command: prints its answer as JSON.
            folder: for its log and its answer, on this machine's own disk; see `local_folder`.
            model: what it opens, for the tokens it may need.
            own: what a subclass is made with beside.

        Returns:
            The command that runs now.

        Raises:
            DriveError: the folder cannot be written.
        """
        name = secrets.token_hex(4)
        with file_errors(folder, "write to"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in [*folder.glob("*.out"), *folder.glob("*.log")]:
                old.unlink()
            out, log = folder / f"{name}.out", folder / f"{name}.log"
            child = Child(command, log=log, out=out, env=environment_of_ours(model), outlives=True)
        process = child.process
        pointer = {"pid": process.pid, "start": process.start, "out": out.name, "log": log.name}
        write_atomic(folder / _POINTER, json.dumps(pointer).encode())
        return cls(folder, process, out, log, child, **own)

    @classmethod
    def find(cls, folder: Path, **own: Any) -> Self | None:
        """Find the command that was started for this folder and still runs; None when there is none.

        Args:
            folder: as it was given to `start`.
            **own: of the class, as they were given to `start`.

        Returns:
            The command, or None.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # nothing was started, or not wholly
            pointer = json.loads((folder / _POINTER).read_bytes())
            started = LocalProcess(pointer["pid"], pointer["start"])
            if started.is_alive():
                return cls(folder, started, folder / pointer["out"], folder / pointer["log"], **own)
        return None

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._child.alive() if self._child is not None else self.process.is_alive()

    def stop(self) -> None:
        """Ask it to save and end. Nothing happens when it has ended."""
        self._asked_to_stop = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once: what it has not saved is lost, and done again by the next run."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def log_lines(self, count: int = 12) -> list[str]:
        """The end of what it has printed, with secrets hidden; nothing of one whose log is not here.

        Args:
            count: of its last lines.
        """
        lines = redact(_tail(self._log)).replace("\r", "\n").splitlines() if self._log is not None else []
        return [line for line in lines if line.strip()][-count:]

    def wait(
        self, what: str, *, between: Callable[[], None] = lambda: None, every_s: float = 0.2, log: Path | None = None
    ) -> Any:
        """Wait until it has ended; then return its answer, or raise what went wrong.

        Args:
            what: the work, for the sentence when it died: "The fine-tuning".
            between: called again and again meanwhile.
            every_s: how long to sleep between the calls.
            log: where to keep the end of its log.

        Returns:
            The JSON object that the command printed last.

        Raises:
            Interrupted: it was asked to stop.
            TrainingFailed: it was killed, or broke down.
            FastSDError: what it says.
        """
        while self.is_running():
            between()
            time.sleep(every_s)
        between()
        if log is not None and self._log is not None:
            with contextlib.suppress(DriveError, OSError):  # for a bug report: it is no reason to fail
                write_atomic(log, redact(_tail(self._log)).encode())
        return self._result(what)

    def _result(self, what: str) -> Any:
        answer = _last_answer(self._out) if self._out is not None else None
        if answer is None:
            raise self._death(what)
        if "error" in answer:
            raise answered_error(answer)
        return answer

    def _death(self, what: str) -> FastSDError:
        code = self._child.returncode if self._child is not None else None
        if self._asked_to_stop and code in (None, -signal.SIGTERM, -signal.SIGKILL):
            # Before it could answer: while it began, or because it was then ended at once.
            return Interrupted(f"{what} was stopped{self._where()}.", "What was saved is kept: run it again to resume.")
        # Of a process begun by another kernel the system does not tell how it ended.
        if code in (None, -_SIGNAL_OF_THE_SYSTEM):
            return self._killed(what, f" (signal {_SIGNAL_OF_THE_SYSTEM})" if code else "")
        said = "\n".join(self.log_lines(6))
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return TrainingFailed(
            f"{what} crashed{self._where()} ({how}).",
            f"What was saved is kept: run it again to resume. Its last output:\n{said}",
        )

    def _killed(self, what: str, how: str) -> FastSDError:
        return TrainingFailed(
            f"{what} was killed from outside{self._where()}{how}. Usually the machine ran out of memory.",
            "What was saved is kept: run the cell again to resume; a smaller batch size needs less memory.",
        )

    def _where(self) -> str:
        """How far it was, as the rest of a sentence; "" where that is not known."""
        return ""
