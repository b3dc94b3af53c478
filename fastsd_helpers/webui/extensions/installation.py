"""Install a web UI: its environment, its code at pinned commits, its folders; done again, it does what is missing."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastsd_helpers.files import check_room, write_atomic
from fastsd_helpers.runtime import logger
from fastsd_helpers.webui.catalog import Repository, WebUI, find_ui
from fastsd_helpers.webui.extensions.owned import OwnExtensions
from fastsd_helpers.webui.extensions.repositories import clone, commit_of, read_mirrors
from fastsd_helpers.webui.places import Places, find_places, prepare_places
from fastsd_helpers.webui.settings import InstallConfig, read_extensions
from fastsd_helpers.wheels import install, make_environment

__all__ = ["InstallResult", "folder_of", "install_webui"]

_ROOM_BYTES = 12 * 10**9  # environment with CUDA and what is unpacked meanwhile
_SAY_EVERY_S = 30.0
_ROOM_LEFT_BYTES = 2 * 10**9  # when the environment is there already


@dataclass(frozen=True)
class InstallResult:
    """What was installed where."""

    ui: str
    path: Path  # the code
    python: Path
    store: Path
    log: Path
    seconds: float
    steps: dict[str, float]  # step -> seconds
    commits: dict[str, str]
    extensions: list[str]  # of the owner's, those that run
    switched_off: dict[str, str]  # those that do not, and why


def install_webui(config: InstallConfig | None = None) -> InstallResult:
    """Install a web UI, or bring an installation up to what this version needs.

    Killed and run again it goes on where it was: what is whole already is only looked at. Writes `install.log` in the
    folder of logs, and `installed.json` when all is done.

    Args:
        config: which one, where, with which extensions; the defaults when None.

    Returns:
        Its folders, the commits of its code, its extensions, and the seconds it took.

    Raises:
        WebUIError: the code was not downloaded.
        InstallError: the environment could not be made.
        DependencyMissing: the environment could not be made.
        DiskFull: not enough room on this machine's disk.
    """
    config = config or InstallConfig()
    ui = find_ui(config.ui)
    places = find_places(ui, folder=config.folder or None, store=config.store or None)
    _name_leftovers(ui, places)
    owned = OwnExtensions(ui, places, config)
    added = read_extensions(config.extensions)
    mirrors = read_mirrors(
        config.mirrors, [*(item.name for item in (*ui.repositories, *added)), *(item.name for item in owned.kept)]
    )
    needed = _ROOM_LEFT_BYTES if places.python.exists() else _ROOM_BYTES
    check_room(places.root, needed, ui.title, hint="Free some space, or choose another folder with --folder.")
    prepare_places(places, ui)
    log = places.logs / "install.log"
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    level = logger.level
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)  # the file holds every step, whatever the screen shows
    try:
        return _install(config, ui, places, mirrors, owned, log)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def _name_leftovers(ui: WebUI, places: Places) -> None:
    # Where earlier versions put it, from where it cannot serve its own page.
    old = Path.home() / ".cache" / "fastsd" / "webui" / ui.key
    if ui.hides_dotted and old.is_dir() and places.root != old:
        logger.warning(
            "%s of an earlier version is in %s, where its page has no scripts. It is installed again in %s. The old "
            "folder can be deleted; extensions of your own are in data/extensions there.",
            ui.title,
            old,
            places.root,
        )


def _install(
    config: InstallConfig, ui: WebUI, places: Places, mirrors: dict[str, str], owned: OwnExtensions, log: Path
) -> InstallResult:
    started, steps = time.monotonic(), {}

    def step(name: str, work: Callable[[], Any]) -> None:
        begun = time.monotonic()
        try:
            with _said_to_go_on(name, begun):
                changed = work()
        finally:
            steps[name] = round(time.monotonic() - begun, 2)
        how = "done in" if changed is not False else "was there already; looked at in"
        logger.info("%s: %s %.1f s", name, how, steps[name])

    wanted = [item for item in ui.repositories if config.controlnet or item.name != "controlnet"]
    # Code first: it is small, and a place that is gone is found out before gigabytes are fetched.
    for item in wanted:
        step(f"code of {item.name}", partial(clone, item, folder_of(places, item), mirrors=mirrors))
    owned.bring(step, mirrors)
    there = places.python.exists()
    step("environment", lambda: (make_environment(places.environment, python=ui.python), not there)[1])
    skip = [name.strip() for name in config.skip_packages.split(",") if name.strip()]
    step("packages", lambda: bool(install(ui.lock_set, python=places.python, skip=skip).changes))
    owned.prepare(step)
    commits = {item.name: commit_of(folder_of(places, item)) or "" for item in wanted} | owned.commits()
    result = InstallResult(
        ui=ui.key,
        path=places.code,
        python=places.python,
        store=places.store,
        log=log,
        seconds=round(time.monotonic() - started, 1),
        steps=steps,
        commits=commits,
        extensions=owned.running(),
        switched_off=owned.switched_off,
    )
    record = {name: getattr(result, name) for name in ("ui", "commits", "steps", "extensions")}
    record |= {"store": str(places.store), "controlnet": config.controlnet}
    write_atomic(places.installed, (json.dumps(record, indent=1) + "\n").encode())
    logger.info("%s is installed in %s (%.0f s).", ui.title, places.root, result.seconds)
    return result


@contextlib.contextmanager
def _said_to_go_on(name: str, begun: float) -> Iterator[None]:
    """Say now and then that a step goes on: packages take ten minutes, in which nothing else is said."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(_SAY_EVERY_S):
            logger.info("%s: still running, %.0f s so far", name, time.monotonic() - begun)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def folder_of(places: Places, repository: Repository) -> Path:
    """Where the code of one repository belongs."""
    if repository.folder.startswith("extension/"):
        return places.extensions / repository.folder.removeprefix("extension/")
    return places.code / repository.folder if repository.folder else places.code
