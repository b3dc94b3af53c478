"""A child process that is watched through its log: started in a group of its own, ended with all it started."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastsd_helpers.processes import guard, log_filter
from fastsd_helpers.processes.environment import environment_for
from fastsd_helpers.processes.identity import LocalProcess

__all__ = ["Child", "ChildEnded", "ChildMute", "LogTail", "end_group"]

Found = TypeVar("Found")

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_KEPT_LINES = 60
_LOOK_EVERY_S = 0.05
_FILTER_S = 2.0  # what the filter of the log gets to write the last words


class ChildEnded(Exception):
    """It ended before it said what was waited for."""


class ChildMute(Exception):
    """It did not say what was waited for in the time allowed."""


class Child:
    """A running child process with a log of what it says.

    It runs in a session and group of its own, so an interrupt of this process does not reach it, and reads nothing
    but what it is told.

    Args:
        command: program and arguments.
        log: the file that takes its output, made anew for this user alone; None for one without a name, which goes
            with this object.
        out: another file for standard output; `log` then has standard error.
        env: its whole environment, made with `environment_for`; None for what any program may have.
        cwd: its directory.
        hidden: texts that never reach the log, such as a token; they are replaced on the way to it.
        outlives: it goes on when this process has ended; else it is ended then, in whatever way this process dies.
        told: what it finds on its standard input, for secrets, which are safe neither in a command line nor in an
            environment; 60 KB at most, and only for one that outlives this process.
        pipe: standard output is read by this process, from `output`; a child that nobody reads waits.

    Attributes:
        process: who it is.
        output: its standard output, with `pipe`.

    Raises:
        OSError: the log cannot be made, or (where it outlives this process) the program cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path | None = None,
        out: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        hidden: Sequence[str] = (),
        outlives: bool = False,
        told: str = "",
        pipe: bool = False,
    ) -> None:
        own = ["-I", "-S"]  # the small programs beside this file need nothing but the standard library
        words = list(command) if outlives else [sys.executable, *own, guard.__file__, *command]
        self._filter: subprocess.Popen[bytes] | None = None
        self._unnamed: Any = None
        hidden = [text for text in hidden if text]
        if told and not outlives:
            raise ValueError("a child that ends with this process is told nothing")  # its input tells that
        with contextlib.ExitStack() as opened:
            if log is None:
                self._unnamed = file = tempfile.TemporaryFile()  # noqa: SIM115 - kept as long as this object
            else:
                file = opened.enter_context(_new_file(log))
            if hidden:
                reading, writing = os.pipe()
                opened.callback(os.close, writing)
                opened.callback(os.close, reading)
                self._filter = subprocess.Popen(
                    [sys.executable, *own, log_filter.__file__],
                    stdin=reading,
                    stdout=file,
                    stderr=subprocess.DEVNULL,
                    env=environment_for("filter"),
                    start_new_session=True,  # it must live as long as the child does
                )
                # Not in its environment or command line, which other programs can read as long as it runs.
                os.write(writing, log_filter.first_line(hidden))
                said: Any = writing
            else:
                said = file
            self._popen = subprocess.Popen(
                words,
                stdin=(_filled_pipe(told, opened) if told else subprocess.DEVNULL) if outlives else subprocess.PIPE,
                stdout=subprocess.PIPE if pipe else opened.enter_context(_new_file(out)) if out is not None else said,
                stderr=said if pipe or out is not None else subprocess.STDOUT,
                env=environment_for("program") if env is None else dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        self._log: Path | int = self._unnamed.fileno() if log is None else log
        self.output: Any = self._popen.stdout
        self.process = LocalProcess.of(self._popen.pid)

    @property
    def pid(self) -> int:
        """Its process id, which is also its group's."""
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the signal that ended it; None while it runs."""
        return self._popen.poll()

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._popen.poll() is None

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait until it ends; its exit code, or None when it still runs after `timeout_s` seconds.

        Args:
            timeout_s: None: for as long as it runs.

        Returns:
            The exit code, or None.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._popen.wait(timeout_s)
        return None

    def last_lines(self, count: int = 20) -> list[str]:
        """The last lines it wrote, without colours and hidden texts.

        Args:
            count: how many, at most.
        """
        tail = LogTail(self._log)
        tail.read(ended=not self._may_say_more())
        return list(tail.last)[-count:]

    def wait_for(self, find: Callable[[str], Found | None], deadline: float) -> Found:
        """Give each of its lines to `find`, from the first on, until that returns something.

        Args:
            find: returns None for a line that is not the one; what it raises ends the waiting.
            deadline: on the clock of `time.monotonic`, in seconds.

        Returns:
            What `find` has returned.

        Raises:
            ChildEnded: it ended first.
            ChildMute: the deadline has passed.
        """
        tail = LogTail(self._log)
        while True:
            ended = not self._may_say_more()  # asked before its words are read, so that none is missed
            for line in tail.read(ended=ended):
                found = find(line)
                if found is not None:
                    return found
            if ended:
                raise ChildEnded
            if time.monotonic() >= deadline:
                raise ChildMute
            time.sleep(_LOOK_EVERY_S)

    def _may_say_more(self) -> bool:
        if self.alive():
            return True
        if self._filter is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._filter.wait(_FILTER_S)
        return False

    def close(self, grace_s: float = 3) -> None:
        """Ask it and all it started to end, and end them if they do not; calling it twice is harmless.

        Args:
            grace_s: seconds between asking and ending.
        """
        end_group(self.process, grace_s=grace_s, popen=self._popen)
        for stream in (self._popen.stdin, self.output):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self._filter is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._filter.wait(_FILTER_S)


def _filled_pipe(text: str, opened: contextlib.ExitStack) -> int:
    reading, writing = os.pipe()
    opened.callback(os.close, reading)
    try:
        os.set_blocking(writing, False)  # a text that the pipe cannot hold is an error, and no standstill
        data = text.encode(errors="surrogateescape")
        if os.write(writing, data) < len(data):
            raise BlockingIOError(errno.EAGAIN, "more than a pipe holds")
    finally:
        os.close(writing)
    return reading


def _new_file(path: Path) -> Any:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return open(os.open(path, flags, 0o600), "wb")


def end_group(leader: LocalProcess, *, grace_s: float = 10, popen: "subprocess.Popen[bytes] | None" = None) -> None:
    """End a process that leads a group with all it started, politely first; nothing else is touched.

    Args:
        leader: the process; its number is its group's.
        grace_s: how long it may take to end by itself.
        popen: its handle, when this process started it.
    """

    def running() -> bool:
        # `poll` takes the exit code of a child, which stays a zombie otherwise.
        return popen.poll() is None if popen is not None else leader.is_alive()

    def send(number: int) -> None:
        # The system gives a number to nobody while a group bears it: the group is still this one's, unless another
        # process has the number of its leader.
        if not leader.was_replaced():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(leader.pid, number)

    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5)):
        ends = time.monotonic() + patience_s
        if running():
            send(number)
        while running() and time.monotonic() < ends:
            time.sleep(0.02)
    send(signal.SIGKILL)  # what it started and left behind
    # A process whose first thread has ended counts as ended, but its port is taken until its last thread has.
    ends = time.monotonic() + 5
    while _threads_of(leader.pid) > 1 and not leader.was_replaced() and time.monotonic() < ends:
        time.sleep(0.02)
    if popen is not None:
        # `poll` of two threads at once tells only one of them the exit code; `wait` tells both.
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(5)


def _threads_of(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


class LogTail:
    """Reads a growing log line by line.

    Args:
        log: the file, which may not be there yet; or the descriptor of an open one.
        keep: how many of its last lines are kept.

    Attributes:
        last: its last lines, without empty ones, colours, and the many states of a progress bar.
    """

    def __init__(self, log: Path | str | int, *, keep: int = _KEPT_LINES) -> None:
        self._log, self._position, self._rest = log, 0, b""
        self.last: deque[str] = deque(maxlen=keep)

    def read(self, *, ended: bool = False) -> list[str]:
        """The lines that came since the last call; with `ended` also one that lacks its end.

        Args:
            ended: whether nothing more will come.
        """
        data = self._new_bytes()
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if ended and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        # Decoded line by line: a half letter of a download's bar must not end the reading.
        texts = [line.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode("utf-8", errors="replace").rstrip() for line in lines]
        texts = [_COLOUR.sub("", text) for text in texts]
        self.last.extend(text for text in texts if text)
        return texts

    def _new_bytes(self) -> bytes:
        try:
            handle = self._log if isinstance(self._log, int) else os.open(self._log, os.O_RDONLY)
        except FileNotFoundError:
            return b""
        try:
            pieces = []
            position = self._position
            while piece := os.pread(handle, 2**20, position):
                pieces.append(piece)
                position += len(piece)
            return b"".join(pieces)
        finally:
            if not isinstance(self._log, int):
                os.close(handle)
