"""Start a web UI, wait until it answers, start it again when it ends by itself, stop it."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastsd_helpers.drive import check_health
from fastsd_helpers.errors import FastSDError, WebUICrashed, WebUIError, WebUINotInstalled
from fastsd_helpers.model_lookup import understand
from fastsd_helpers.processes import Child, LogTail
from fastsd_helpers.runtime import logger
from fastsd_helpers.tunnels import Login, Tunnel, choose_login
from fastsd_helpers.tunnels.services.probe import ask
from fastsd_helpers.webui.catalog import WebUI, find_ui
from fastsd_helpers.webui.extensions.kept import keep_settings
from fastsd_helpers.webui.flags import Machine, describe_machine
from fastsd_helpers.webui.places import Places, find_places, model_folder, prepare_places
from fastsd_helpers.webui.placing.forge_settings import choose_in_settings
from fastsd_helpers.webui.placing.model_files import BASE_KINDS
from fastsd_helpers.webui.placing.models import drive_errors, offer_workflow, place_needed
from fastsd_helpers.webui.placing.needed import Needed, find_needed
from fastsd_helpers.webui.running.background import end_link
from fastsd_helpers.webui.running.command import LaunchPlan, environment_of, plan_launch, with_allocator
from fastsd_helpers.webui.running.crash import explain_refusal
from fastsd_helpers.webui.running.last_words import is_noise
from fastsd_helpers.webui.running.process import (
    LocalUI,
    explain_end,
    is_running,
    note_stopped,
    port_is_free,
    read_run,
    start_process,
    write_login,
)
from fastsd_helpers.webui.settings import LaunchConfig

__all__ = ["RunningUI", "launch", "plan"]

_MOST_RESTARTS = 3
_MODEL_WAIT_S = 120  # for the model after the page is there
_KEEP_EVERY_S = 60.0  # for the settings of extensions: a rented machine can go at any moment
_GRACE_S = 10  # what it gets to end by itself


def plan(
    config: LaunchConfig | None = None,
    *,
    machine: Machine | None = None,
    family: str | None = None,
    root: Path | str | None = None,
) -> LaunchPlan:
    """What `launch` would start: files, command, environment and reasons; nothing is fetched, written or started.

    Args:
        config: as for `launch`.
        machine: another machine than this one, such as one of `flags.GPUS`; its RAM counts too.
        family: of the model; found out from `config.model`, or from what is in the store, when None.
        root: where sessions lie; None: the usual place.

    Raises:
        SettingsError: user or password are none.
        ModelNotFound: `config.model` names nothing.
        DriveError: the store or the folder of the model does not answer.
    """
    config = config or LaunchConfig()
    ui = find_ui(config.ui)
    places = find_places(ui, folder=config.folder or None, store=config.store or None)
    login = choose_login(config.user, config.password)
    here = machine or describe_machine()
    needed = _needed(config, ui, places, here, root)
    family = family or needed.family or "sd15"
    base = next((file for file in needed.files if file.kind in BASE_KINDS), None)
    model = model_folder(places, ui, base.kind) / "store" / base.name if base is not None and base.name else None
    chosen = plan_launch(config, ui, places, here, family=family, model=model, login=login, files=needed.files)
    chosen = replace(chosen, reasons=[*needed.reasons, *needed.warnings, *chosen.reasons])
    return with_allocator(chosen, ui, places) if machine is None else chosen  # of another one it is not known


def _needed(config: LaunchConfig, ui: WebUI, places: Places, machine: Machine, root: Path | str | None) -> Needed:
    if not config.model:
        return Needed(())
    with drive_errors(places):
        return find_needed(config.model, ui, places, machine, kind="checkpoint", t5=config.t5, root=root)


def launch(
    config: LaunchConfig | None = None,
    *,
    show: Callable[[str], None] | None = None,
    machine: Machine | None = None,
    root: Path | str | None = None,
) -> "RunningUI":
    """Start a web UI, wait until it answers, and say whether its model was loaded.

    It is not asked over HTTP before its log says that it may be: AUTOMATIC1111 ends when a request comes too early.

    Args:
        config: which one, its model, port and flags; the defaults when None.
        show: called with each line of its log while it starts.
        machine: what decides the sizes and flags; this machine when None.
        root: where sessions lie; None: the usual place.

    Returns:
        The web UI that answers, with `port`, `login`, and whether its model was loaded; it runs until `stop`.

    Raises:
        WebUINotInstalled: nothing is installed.
        WebUIError: one is running already, the port is taken, the model is of a family this UI lacks.
        WebUICrashed: it ended by itself; the sentence says why, as far as its log tells.
    """
    config = config or LaunchConfig()
    ui = find_ui(config.ui)
    places = find_places(ui, folder=config.folder or None, store=config.store or None)
    _require_startable(ui, places, config.port or ui.port)
    prepare_places(places, ui)
    check_health(places.store)
    machine = machine or describe_machine()
    with drive_errors(places):
        placed = place_needed(_needed(config, ui, places, machine, root), ui, places)
    base = next((model for model in placed if model.kind in BASE_KINDS), None)
    family = base.family if base and base.family else "sd15"
    login = choose_login(config.user, config.password)
    chosen = plan_launch(config, ui, places, machine, family=family, model=base.path if base else None, login=login)
    chosen = with_allocator(chosen, ui, places)
    if ui.key == "forge-neo":
        choose_in_settings(placed, ui, places)
    offer_workflow(placed, ui, places, keep=understand(config.model).what == "file")
    if chosen.login_file is not None:
        write_login(chosen.login_file, login)
    for reason in chosen.reasons:
        logger.info("%s", reason)
    running = RunningUI(ui, places, config, chosen, login, show)
    running.start()
    return running


def _require_startable(ui: WebUI, places: Places, port: int) -> None:
    if not places.python.exists() or not (places.code / ui.entry).exists():
        raise WebUINotInstalled(
            f"{ui.title} is not installed in {places.root}.", f"Run: fastsd webui install --ui {ui.key}"
        )
    state = read_run(places.run)
    if state is not None and is_running(state):
        raise WebUIError(
            f"{ui.title} is already running, on port {state.port}.", "Use it, or stop it: fastsd webui stop"
        )
    if not port_is_free(port):
        raise WebUIError(
            f"Port {port} of this machine is in use by another program.",
            f"Choose another one (--port {port + 1}), or stop that program.",
        )


class RunningUI(LocalUI):
    """A web UI that was started here.

    Attributes:
        port: where it listens, on 127.0.0.1.
        login: its own user and password; None for one that has no login.
        model_loaded: True, False when it refused the model, None while it has not said.
        seconds: from the start until it answered.
    """

    def __init__(
        self,
        ui: WebUI,
        places: Places,
        config: LaunchConfig,
        plan: LaunchPlan,
        login: Login,
        show: Callable[[str], None] | None,
    ) -> None:
        self.ui, self.places, self.port = ui, places, plan.port
        self.login = login
        self.model_loaded: bool | None = None
        self.seconds = 0.0
        self.restarts = 0
        self.tunnel: Tunnel | None = None
        self._config, self._plan, self._show = config, plan, show or (lambda line: None)
        self._child: Child | None = None
        self._on_cpu = "--use-cpu" in plan.command or "--cpu" in plan.command
        self._problem: tuple[Child, WebUICrashed] | None = None
        self._stopping = threading.Event()

    @property
    def _started(self) -> Child:
        assert self._child is not None  # `start` made it
        return self._child

    def start(self) -> None:
        """Start it and wait until it answers; `launch` has done so already."""
        begun = time.monotonic()
        plan = self._plan
        logger.info("%s is starting.", self.ui.title)
        self._child, self.state = start_process(
            plan.command,
            env=environment_of(plan),
            cwd=plan.cwd,
            places=self.places,
            title=self.ui.title,
            port=plan.port,
            hidden=plan.hidden,
            admin=self._config.allow_admin,
        )
        tail = LogTail(self.state.log, keep=200)
        try:
            self._wait_until_ready(tail, begun + self._config.wait_s)
        except BaseException as err:
            self._child.close(_GRACE_S)
            if not isinstance(err, WebUICrashed):
                note_stopped(self.places)
            raise
        self.seconds = time.monotonic() - begun
        logger.info("%s answers on port %d after %.0f s.", self.ui.title, self.port, self.seconds)
        self._wait_for_model(tail)
        threading.Thread(target=self._keep_settings, name="fastsd-settings", daemon=True).start()
        if self._config.restart:
            threading.Thread(target=self._keep_alive, name="fastsd-webui", daemon=True).start()

    def _wait_until_ready(self, tail: LogTail, until: float) -> None:
        while not self._look(tail, self.ui.ready):
            self._require_alive(tail)
            if time.monotonic() >= until:
                last = tail.last[-1] if tail.last else "nothing"
                raise WebUIError(
                    f"{self.ui.title} did not start within {self._config.wait_s} s; its last output: {last[:200]}",
                    "Look at its log (fastsd webui log), or allow more time with --wait-s.",
                )
            time.sleep(0.1)
        status, reason = 0, ""
        while not 200 <= status < 500:
            status, reason = ask(self.url + self.ui.alive_path, timeout_s=5)
            self._require_alive(tail)
            if time.monotonic() >= until:
                raise WebUIError(
                    f"{self.ui.title} says it is ready, but port {self.port} does not answer ({reason or status}).",
                    "Look at its log: fastsd webui log",
                )
            time.sleep(0.1)

    def _require_alive(self, tail: LogTail) -> None:
        if not self.alive():
            time.sleep(0.3)  # its last words may come a moment later
            self._look(tail)
            raise explain_end(self.state, self._started.returncode, self.places)

    def _look(self, tail: LogTail, wanted: str = "") -> bool:
        """Read what is new in the log, show it, remember what it says of the model; whether a line has the pattern."""
        found = False
        for line in tail.read():
            if not is_noise(line, on_cpu=self._on_cpu):
                self._show(line)
            if self.ui.loaded and re.search(self.ui.loaded, line):
                self.model_loaded = True
            elif self.ui.refused and re.search(self.ui.refused, line):
                self.model_loaded = False
            found = found or bool(wanted and re.search(wanted, line))
        return found

    def _wait_for_model(self, tail: LogTail) -> None:
        if not self.ui.loaded:
            return
        until = time.monotonic() + min(_MODEL_WAIT_S, self._config.wait_s)
        while self.model_loaded is None and time.monotonic() < until and self.alive():
            self._look(tail)
            time.sleep(0.1)
        if self.model_loaded is False:
            logger.warning("%s", explain_refusal(self.ui.title, list(tail.last), self.ui.refused))
        elif self.model_loaded is None:
            logger.info("The model is still being loaded; the page can be opened already.")

    def alive(self) -> bool:
        """Whether its process still runs."""
        return self._child is not None and self._child.alive()

    def problem(self) -> WebUICrashed | None:
        """Why it ended, when it has ended by itself; None while it runs or after `stop`."""
        if self.alive() or self._stopping.is_set() or self._child is None:
            return None
        if self._problem is None or self._problem[0] is not self._child:
            self._problem = (self._child, explain_end(self.state, self._child.returncode, self.places))
        return self._problem[1]

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait until it ends; its exit code, or None when it still runs after `timeout_s` seconds.

        Args:
            timeout_s: None: for as long as it runs.

        Returns:
            The exit code, or None.
        """
        return self._started.wait(timeout_s)

    def stop(self) -> None:
        """End the link, then the web UI with all it started; calling it twice is harmless."""
        self._stopping.set()
        if self.tunnel is not None:
            self.tunnel.close()
        if self._child is not None:
            self._child.close(_GRACE_S)
            keep_settings(self.places)
        end_link(self.places.run)
        note_stopped(self.places)

    def __enter__(self) -> "RunningUI":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _keep_settings(self) -> None:
        child, well = self._started, True
        while child.alive() and not self._stopping.wait(_KEEP_EVERY_S):
            well = keep_settings(self.places, quiet=not well)

    def _keep_alive(self) -> None:
        self._started.wait()
        if self._stopping.is_set():
            return
        problem = self.problem()
        if self.restarts >= _MOST_RESTARTS:
            logger.warning("%s It was started again %d times already, so it stays stopped.", problem, self.restarts)
            return
        self.restarts += 1
        logger.warning("%s It is started again.", problem.problem if problem else f"{self.ui.title} ended.")
        try:
            self.start()
            if self.tunnel is not None:
                self.tunnel.forget_upstream_login()
        except FastSDError as err:
            logger.warning("%s", err)
