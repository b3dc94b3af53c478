"""A web UI that runs already, whoever of this user started it: found by the record of its run, shared, ended."""

import contextlib
import json
from typing import Any

from fastsd_helpers.errors import DriveError, WebUICrashed
from fastsd_helpers.files import write_atomic
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.tunnels import Login, Tunnel
from fastsd_helpers.webui.catalog import WebUI, find_ui
from fastsd_helpers.webui.extensions.kept import keep_settings
from fastsd_helpers.webui.places import Places, find_places
from fastsd_helpers.webui.running.background import BackgroundLink, end_link, read_link
from fastsd_helpers.webui.running.process import (
    LocalUI,
    RunState,
    end_process,
    find_at_port,
    find_end,
    is_running,
    note_stopped,
    read_run,
)

__all__ = [
    "AttachedUI",
    "background_link",
    "find_link",
    "find_running",
    "note_run",
    "read_note",
    "status",
    "stop",
]


class AttachedUI(LocalUI):
    """A running web UI that another process started, as a kernel does that was restarted since.

    Attributes:
        port: where it listens, on 127.0.0.1.
        login: its own user and password.
        model_loaded: None: its log was not followed from here.
        seconds: 0, likewise.
    """

    model_loaded: bool | None = None
    seconds = 0.0

    def __init__(self, ui: WebUI, places: Places, state: RunState, login: Login) -> None:
        self.ui, self.places, self.state, self.login = ui, places, state, login
        self.port = state.port
        self.tunnel: Tunnel | None = None
        self._stopped = False
        self._problem: WebUICrashed | None = None

    def alive(self) -> bool:
        """Whether its process still runs."""
        return is_running(self.state)

    def problem(self) -> WebUICrashed | None:
        """Why it ended, when it has ended by itself; None while it runs or after it was stopped, by whomever."""
        if self._stopped or self.alive():
            return None
        self._problem = self._problem or find_end(self.places)
        return self._problem

    def stop(self) -> None:
        """End the link, then the web UI with all it started; calling it twice is harmless."""
        self._stopped = True
        if self.tunnel is not None:
            self.tunnel.close()
        stop(self.ui.key, folder=str(self.places.root.parent), store=str(self.places.store))


def find_running(ui: str = "a1111", *, folder: str | None = None, store: str | None = None) -> AttachedUI | None:
    """Find a web UI that was started before and still runs; None when it does not, or when its login is not known here.

    Args:
        ui: its key.
        folder: as at its start.
        store: as at its start.

    Returns:
        The web UI, with its port and login, or None.
    """
    spec = find_ui(ui)
    places = find_places(spec, folder=folder, store=store)
    state = read_run(places.run)
    if state is None or not is_running(state):
        return None
    found = find_at_port(state.port)
    login = found[1] if found is not None else None
    return AttachedUI(spec, places, state, login) if login is not None else None


def find_link(running: Any) -> BackgroundLink | None:
    """The link that a process of its own holds for a running web UI; None when there is none. It has the login.

    Args:
        running: the web UI, as `find_running` or `launch` gives it.
    """
    link = read_link(running.places.run)
    return link.with_login(running.login) if link is not None else None


def note_run(running: Any, **about: Any) -> None:
    """Keep, beside the record of a run, what it was started or shared with, so that the next look can compare it."""
    noted = read_note(running) | about | {"pid": running.state.pid, "started": running.state.started}
    with contextlib.suppress(DriveError):
        write_atomic(running.places.run / "note.json", json.dumps(noted).encode())


def read_note(running: Any) -> dict[str, Any]:
    """What `note_run` kept of this very run; nothing of an earlier one."""
    noted = read_object(running.places.run / "note.json")
    same = noted.get("pid"), noted.get("started")
    return noted if same == (running.state.pid, running.state.started) else {}


def status(ui: str = "a1111", *, folder: str | None = None, store: str | None = None) -> tuple[RunState | None, bool]:
    """What was started last of this web UI, and whether it still runs.

    Args:
        ui: its key: a1111, forge-neo or comfyui.
        folder: the folder of code and environments; left alone, the usual place.
        store: the data directory; left alone, the usual place.
    """
    state = read_run(find_places(find_ui(ui), folder=folder, store=store).run)
    return state, state is not None and is_running(state)


def background_link(ui: str = "a1111", *, folder: str | None = None, store: str | None = None) -> BackgroundLink | None:
    """The link that `share_in_background` made of this web UI, at its present address; None when there is none.

    Args:
        ui: its key: a1111, forge-neo or comfyui.
        folder: the folder of code and environments; left alone, the usual place.
        store: the data directory; left alone, the usual place.
    """
    return read_link(find_places(find_ui(ui), folder=folder, store=store).run)


def stop(ui: str = "a1111", *, folder: str | None = None, store: str | None = None) -> bool:
    """Stop this web UI, whoever started it; False when it is not running.

    Args:
        ui: its key: a1111, forge-neo or comfyui.
        folder: the folder of code and environments; left alone, the usual place.
        store: the data directory; left alone, the usual place.

    Returns:
        Whether it was running.
    """
    places = find_places(find_ui(ui), folder=folder, store=store)
    state = read_run(places.run)
    if state is None or not is_running(state):
        return False
    end_process(state)
    keep_settings(places)
    end_link(places.run)
    note_stopped(places)
    return True
