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

from fastsd_helpers.device import count_memory_kills
from fastsd_helpers.errors import WebUICrashed, WebUIError
from fastsd_helpers.files import write_atomic
from fastsd_helpers.processes import Child, LocalProcess, LogTail, boot_id, end_group
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.tunnels import Login, Tunnel
from fastsd_helpers.tunnels.ports import PortNote, note_port, open_private, read_port
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.places import Places
from fastsd_helpers.webui.running.circumstances import look_around
from fastsd_helpers.webui.running.crash import explain_crash

__all__ = [
    "LocalUI",
    "RunState",
    "end_process",
    "explain_end",
    "find_at_port",
    "find_end",
    "is_running",
    "note_stopped",
    "port_is_free",
    "read_run",
    "start_process",
    "write_login",
]

_KEPT_LOGS = 5
_STOPPED = "stopped"  # a mark beside the record of a run: it was ended on purpose
_READ_LINES = 400  # of a log's end, for why it ended: one error can be a hundred lines


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
    admin: bool = False  # a link to it may administer it, as was asked for at this start
    kills: int | None = None  # programs that the system had ended for lack of memory before; see device.py


class LocalUI:
    """What every web UI that runs on this machine has, whoever started it; see RunningUI and AttachedUI."""

    ui: WebUI
    places: Places
    port: int
    state: RunState  # from its start on
    login: Login
    tunnel: Tunnel | None

    @property
    def url(self) -> str:
        """Its address on this machine."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """The log of the run."""
        return Path(self.state.log)


def start_process(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    places: Places,
    title: str,
    port: int,
    hidden: Sequence[str],
    admin: bool = False,
) -> tuple[Child, RunState]:
    """Start a web UI with its output in a new log file, in which no hidden text appears.

    Raises:
        WebUIError: the program cannot be started.
    """
    log = _new_log(places)
    with contextlib.suppress(FileNotFoundError):
        (places.run / _STOPPED).unlink()
    try:
        child = Child(command, log=log, env=env, cwd=cwd, hidden=hidden, outlives=True)
    except OSError as err:
        raise WebUIError(
            f"{title} cannot be started: {command[0]}: {os.strerror(err.errno or errno.EIO)}.",
            "Run `fastsd webui install`.",
        ) from err
    shown = list(command)
    for text in filter(None, hidden):
        shown = [word.replace(text, "•••") for word in shown]
    started = int(child.process.start or 0)
    state = RunState(
        places.ui, title, child.pid, started, boot_id(), port, str(log), shown, admin, count_memory_kills()
    )
    write_atomic(places.run / "state.json", json.dumps(asdict(state)).encode())
    note_port(port, PortNote(child.process, run=places.run))
    return child, state


def read_run(run: Path) -> RunState | None:
    """What was started last, by the folder of its runs; None when nothing was, or its record cannot be read."""
    try:
        return RunState(**read_object(run / "state.json"))
    except TypeError:
        return None


def find_at_port(port: int) -> tuple[RunState, Login | None] | None:
    """The web UI that listens at a port, whatever process of this user started it, and its own login, if it has one.

    None where no web UI listens.
    """
    note = read_port(port)
    if note is None or note.run is None:
        return None
    state = read_run(note.run)
    if state is None or state.port != port or not is_running(state):
        return None
    return (state, _read_login(note.run / "login"))


def write_login(path: Path, login: Login) -> None:
    """Write a login for this user alone, in the form that AUTOMATIC1111 and Forge read."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f"{login.user}:{login.password}")


def _read_login(path: Path) -> Login | None:
    try:
        with open_private(path) as file:
            user, _, password = file.read(4096).strip().partition(":")
    except (OSError, ValueError):
        return None
    return Login(user, password) if user and password else None


def is_running(state: RunState) -> bool:
    """Whether that very process still runs."""
    return state.boot == boot_id() and _leader(state).is_alive()


def note_stopped(places: Places) -> None:
    """Remember that what was started last was ended on purpose, and take its login away."""
    with contextlib.suppress(OSError):
        (places.run / _STOPPED).touch()
    with contextlib.suppress(OSError):
        (places.run / "login").unlink()


def find_end(places: Places) -> WebUICrashed | None:
    """Why what was started last has ended, whoever started it; None while it runs, and when it was ended on purpose."""
    state = read_run(places.run)
    if state is None or is_running(state) or (places.run / _STOPPED).exists():
        return None
    if state.boot != boot_id():
        return WebUICrashed(f"{state.title} ended when this machine was restarted.", "Start it again.")
    if "--gradio-auth-path" in state.command and not (places.run / "login").exists():
        return None  # ended on purpose by a version that made no mark
    return explain_end(state, None, places)


def explain_end(state: RunState, code: int | None, places: Places) -> WebUICrashed:
    """Why a web UI has ended: by its exit code (None: not known), its log, and what the machine has left now."""
    tail = LogTail(state.log, keep=_READ_LINES)
    with contextlib.suppress(OSError):
        tail.read(ended=True)
    return explain_crash(state.title, code, list(tail.last), around=look_around(places, state.kills))


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
