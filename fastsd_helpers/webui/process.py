"""A running web UI: started in a group of its own, watched through its log, found again from another process, ended."""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastsd_helpers.drive import write_atomic
from fastsd_helpers.errors import WebUIError
from fastsd_helpers.webui import log_filter
from fastsd_helpers.webui.places import Places

__all__ = ["LogTail", "RunState", "end_process", "is_running", "port_is_free", "read_state", "start_process"]

_KEPT_LOGS = 5


@dataclass(frozen=True)
class RunState:
    """What is known about a started web UI; kept in a file, so that another process finds it."""

    ui: str
    title: str
    pid: int  # also its process group
    started: int  # ticks after the machine's start, so that another process with this number is not taken for it
    boot: str
    port: int
    log: str
    command: list[str]  # without passwords


def start_process(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    places: Places,
    title: str,
    port: int,
    hidden: Sequence[str],
) -> tuple[subprocess.Popen[bytes], RunState]:
    """Start a web UI with its output in a new log file, in which no hidden text appears.

    Raises:
        WebUIError: the program cannot be started.
    """
    log = _new_log(places)
    reading, writing = os.pipe()
    try:
        # Its own session too: the filter must outlive the notebook just as the web UI does.
        subprocess.Popen(
            [sys.executable, "-I", "-S", log_filter.__file__, str(log)],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "FASTSD_HIDE": "\n".join(hidden)},
            start_new_session=True,
        )
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as err:
        raise WebUIError(
            f"{title} cannot be started: {command[0]}: {os.strerror(err.errno or errno.EIO)}.",
            "Run `fastsd webui install`.",
        ) from err
    finally:
        os.close(reading)
        os.close(writing)
    shown = [_hide(word, hidden) for word in command]
    state = RunState(places.ui, title, process.pid, _start_ticks(process.pid), _boot_id(), port, str(log), shown)
    write_atomic(places.run / "state.json", json.dumps(asdict(state)).encode())
    return process, state


def read_state(places: Places) -> RunState | None:
    """What was started last; None when nothing was, or its record cannot be read."""
    try:
        return RunState(**json.loads((places.run / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_running(state: RunState) -> bool:
    """Whether that very process still runs."""
    return state.boot == _boot_id() and state.started != 0 and _start_ticks(state.pid) == state.started


def end_process(state: RunState, *, grace_s: float = 10, process: "subprocess.Popen[bytes] | None" = None) -> None:
    """End a web UI with all it started, politely first; nothing else is touched."""
    if not is_running(state):
        return
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(state.pid, number)
        ends = time.monotonic() + patience_s
        while time.monotonic() < ends:
            if process is not None:
                process.poll()  # takes the exit code of a child, which stays a zombie otherwise
            if not is_running(state):
                break
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(state.pid, signal.SIGKILL)  # what it started and left behind
    # A process whose first thread has ended counts as ended, but its port is taken until its last thread has.
    ends = time.monotonic() + 5
    while _threads_of(state.pid) > 1 and time.monotonic() < ends:
        time.sleep(0.02)
    if process is not None:
        # `poll` of two threads at once tells only one of them the exit code; `wait` tells both.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _threads_of(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def port_is_free(port: int) -> bool:
    """Whether a program could listen on a port of this machine."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class LogTail:
    """Reads a growing log line by line.

    Attributes:
        last: its last 60 lines, without empty ones and without the many states of a progress bar.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, self._position, self._rest = Path(path), 0, b""
        self.last: deque[str] = deque(maxlen=60)

    def read(self) -> list[str]:
        """The lines that came since the last call."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        texts = [line.rsplit(b"\r", 1)[-1].decode("utf-8", errors="replace").rstrip() for line in lines]
        texts = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text) for text in texts]
        self.last.extend(text for text in texts if text)
        return texts

    def wait_for(
        self, patterns: Mapping[str, str], *, until: float, alive: threading.Event | None = None
    ) -> str | None:
        """Wait until a line matches one of the patterns; its name, or None at `until` (on `time.monotonic`)."""
        while True:
            for text in self.read():
                for name, pattern in patterns.items():
                    if pattern and re.search(pattern, text):
                        return name
            if time.monotonic() >= until or (alive is not None and not alive.is_set()):
                return None
            time.sleep(0.1)


def _new_log(places: Places) -> Path:
    places.logs.mkdir(parents=True, exist_ok=True)
    old = sorted(places.logs.glob("run-*.log"))
    for path in old[: max(0, len(old) - _KEPT_LOGS + 1)]:
        with contextlib.suppress(OSError):
            path.unlink()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        path = places.logs / f"run-{stamp}-{number:03}.log"
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            return path
    raise WebUIError(f"{places.logs} is full of logs.", "Delete some of them.")


def _hide(word: str, hidden: Sequence[str]) -> str:
    for text in hidden:
        word = word.replace(text, "•••") if text else word
    return word


def _start_ticks(pid: int) -> int:
    """When a process started; 0 when there is none or it has ended. Source: proc(5), fields 3 and 22 of stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""
