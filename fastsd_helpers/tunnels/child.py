"""One child process that speaks in lines: started in a group of its own, read without blocking, ended as a whole."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fastsd_helpers.tunnels import guard

__all__ = ["Child", "ChildEnded", "ChildMute"]

Found = TypeVar("Found")

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_KEPT_LINES = 200


class ChildEnded(Exception):
    """It ended before it said what was waited for."""


class ChildMute(Exception):
    """It did not say what was waited for in the time allowed."""


class Child:
    """A running child process and its last lines.

    It is ended with everything it started by `close`, and also when this process dies in whatever way.

    Args:
        command: program and arguments.
        env: its whole environment; None for this process's own.
        cwd: its directory.
        hidden: texts never kept in `lines`, such as a token.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        hidden: Sequence[str] = (),
    ) -> None:
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._hidden = [text for text in hidden if text]
        self._changed = threading.Condition()
        self._read, self._at_end = 0, False
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_lines, name="fastsd-child", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id, which is also its group's."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def last_lines(self, count: int = 20) -> list[str]:
        """The last lines it wrote, without colours and hidden texts."""
        with self._changed:
            return list(self.lines)[-count:]

    def wait_for(self, find: Callable[[str], Found | None], deadline: float) -> Found:
        """Give each of its lines to `find`, from the first on, until that returns something.

        Args:
            find: returns None for a line that is not the one; what it raises ends the waiting.
            deadline: on the clock of `time.monotonic`, in seconds.

        Raises:
            ChildEnded: it ended first. ChildMute: the deadline has passed.
        """
        seen = 0
        while True:
            with self._changed:
                while self._read == seen and not self._at_end:
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                        raise ChildMute
                fresh = list(self.lines)[-(self._read - seen) :] if self._read > seen else []
                seen, at_end = self._read, self._at_end
            for line in fresh:
                found = find(line)
                if found is not None:
                    return found
            if at_end and not fresh:
                raise ChildEnded
            if time.monotonic() >= deadline:
                raise ChildMute

    def close(self, grace_s: float = 3) -> None:
        """Ask it and all it started to end, and end them if they do not; calling it twice is harmless."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        # What the guard started may live on after the guard itself has ended.
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._reader.join(grace_s)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _read_lines(self) -> None:
        # Decoded by hand: a half letter of a download bar must not end the reading.
        with self._process.stdout as pipe:
            for raw in pipe:
                text = _COLOUR.sub("", raw.decode("utf-8", errors="replace")).rstrip()
                for hidden in self._hidden:
                    text = text.replace(hidden, "•••")
                with self._changed:
                    self.lines.append(text)
                    self._read += 1
                    self._changed.notify_all()
        with self._changed:
            self._at_end = True
            self._changed.notify_all()
