"""A running web UI: started in a group of its own, watched through its log, found again from another process, ended."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastsd_helpers.errors import WebUIError
from fastsd_helpers.files import write_atomic
from fastsd_helpers.processes import Child, LocalProcess, boot_id, end_group
from fastsd_helpers.webui.places import Places

__all__ = ["RunState", "end_process", "is_running", "port_is_free", "read_state", "start_process"]

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
) -> tuple[Child, RunState]:
    """Start a web UI with its output in a new log file, in which no hidden text appears.

    Raises:
        WebUIError: the program cannot be started.
    """
    log = _new_log(places)
    try:
        child = Child(command, log=log, env=env, cwd=cwd, hidden=hidden, outlives=True)
    except OSError as err:
        raise WebUIError(
            f"{title} cannot be started: {command[0]}: {os.strerror(err.errno or errno.EIO)}.",
            "Run `fastsd webui install`.",
        ) from err
    shown = [_hide(word, hidden) for word in command]
    started = int(child.process.start or 0)
    state = RunState(places.ui, title, child.pid, started, boot_id(), port, str(log), shown)
    write_atomic(places.run / "state.json", json.dumps(asdict(state)).encode())
    return child, state


def read_state(places: Places) -> RunState | None:
    """What was started last; None when nothing was, or its record cannot be read."""
    try:
        return RunState(**json.loads((places.run / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_running(state: RunState) -> bool:
    """Whether that very process still runs."""
    return state.boot == boot_id() and _leader(state).is_alive()


def end_process(state: RunState, *, grace_s: float = 10) -> None:
    """End a web UI with all it started, politely first; nothing else is touched."""
    if is_running(state):
        end_group(_leader(state), grace_s=grace_s)


def _leader(state: RunState) -> LocalProcess:
    return LocalProcess(state.pid, str(state.started) if state.started else None)


def port_is_free(port: int) -> bool:
    """Whether a program could listen on a port of this machine."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


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
