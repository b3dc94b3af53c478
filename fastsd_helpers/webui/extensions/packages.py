"""What an extension asks for: its requirements and its installer, in the web UI's environment and within its lock."""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastsd_helpers.errors import DependencyMissing, WebUIError
from fastsd_helpers.files import sha256_of, write_atomic
from fastsd_helpers.processes import Child, environment_for
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.extensions.repositories import commit_of
from fastsd_helpers.webui.places import Places
from fastsd_helpers.wheels import read_lock
from fastsd_helpers.wheels.environment import find_uv, read_environment

__all__ = ["prepare_extension", "put_away", "switch_off", "switch_on"]

_INTRODUCTION = re.compile(r"Using Python |Resolved \d+ |error: No solution found")
_FILES = ("requirements.txt", "install.py")


def prepare_extension(ui: WebUI, places: Places, name: str, *, wait_s: float) -> bool:
    """Install what an extension asks for; False when that was done before and it is the same extension still.

    No package of the web UI's own lock is moved to another version: an extension that wants one is refused.

    Args:
        wait_s: how long its requirements and its installer may take together.

    Raises:
        WebUIError: it failed or took too long; the sentence has its last words.
        DependencyMissing: there is no uv.
    """
    folder = places.extensions / name
    asked = [file for file in _FILES if (folder / file).is_file()]
    mark = [commit_of(folder), *(sha256_of(folder / file) for file in asked)]
    if read_object(_done_file(places)).get(name) == mark:
        return False
    if asked:
        ends = time.monotonic() + wait_s
        with tempfile.TemporaryDirectory(prefix="fastsd-extension-") as work:
            limits = Path(work) / "constraints.txt"
            limits.write_text("".join(f"{row}\n" for row in _locked(ui, places)), encoding="utf-8")
            if "requirements.txt" in asked:
                words = [*_pip(places), "--constraints", str(limits), "-r", str(folder / "requirements.txt")]
                _run(name, "its requirements", words, places, folder, environment_for("install"), ends)
            if "install.py" in asked:
                # Its installer calls the pip of the environment, which uv leaves out.
                _run(name, "pip", [*_pip(places), "pip"], places, folder, environment_for("install"), ends)
                words = [str(places.python), "-u", str(folder / "install.py")]
                where = folder if ui.key == "comfyui" else places.code
                _run(name, "its installer", words, places, where, _of_installer(ui, places, limits), ends)
    write_atomic(_done_file(places), json.dumps(read_object(_done_file(places)) | {name: mark}).encode())
    return bool(asked)


def _locked(ui: WebUI, places: Places) -> list[str]:
    names = [row.name for row in read_lock().find(ui.lock_set, ui.python).rows]
    there = read_environment(places.python, names).installed
    return [f"{name}=={version}" for name, version in sorted(there.items())]


def _pip(places: Places) -> list[str]:
    uv = find_uv()
    if uv is None:
        raise DependencyMissing("uv is not installed, and it installs what extensions ask for.", "Run: pip install uv")
    return [str(uv), "pip", "install", "--no-config", "--no-progress", "--python", str(places.python)]


def _of_installer(ui: WebUI, places: Places, limits: Path) -> dict[str, str]:
    # As AUTOMATIC1111 runs it (modules/launch_utils.py): its own modules can be imported, and know their folders.
    own = {"PIP_CONSTRAINT": str(limits), "UV_CONSTRAINT": str(limits), "PYTHONPATH": str(places.code)}
    if ui.key != "comfyui":
        own["COMMANDLINE_ARGS"] = f"--data-dir '{places.data}' --skip-torch-cuda-test"
    return {**environment_for("install"), **own, "GIT_TERMINAL_PROMPT": "0", "PIP_NO_INPUT": "1"}


def _run(
    name: str, what: str, words: Sequence[str], places: Places, cwd: Path, env: Mapping[str, str], ends: float
) -> None:
    log = places.logs / f"extension-{name}.log"
    try:
        child = Child(words, log=log, cwd=cwd, env=env)
    except OSError as err:
        raise WebUIError(f"{what} could not be run: {os.strerror(err.errno or 0)}.", f"See {log}.") from err
    try:
        code = child.wait(max(1.0, ends - time.monotonic()))
        said = [line.strip(" ×╰─▶│├\t") for line in child.last_lines(4)]
        last = " / ".join(line for line in said if not _INTRODUCTION.match(line))[-300:].rstrip(" .")
    finally:
        child.close()
    if code is None:
        raise WebUIError(f"{what} did not end in time; its last output: {last or 'nothing'}.", f"See {log}.")
    if code != 0:
        raise WebUIError(f"{what} failed (exit {code}): {last or 'it said nothing'}.", f"See {log}.")


def switch_off(places: Places, name: str) -> Path:
    """Move an extension to where the web UI does not look; returns its new place."""
    return _move(places.extensions / name, places.switched_off / name)


def put_away(places: Places, name: str) -> None:
    """Move an extension that its owner has taken out to a folder from which nothing brings it back."""
    for folder in (places.extensions, places.switched_off):
        if (folder / name).is_dir():
            _move(folder / name, places.data / "extensions-removed" / name)


def _move(folder: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = target.with_name(f"{target.name}.old")
    while free.exists():
        free = free.with_name(f"{free.name}.old")
    if target.exists():
        target.rename(free)  # an older one of this name: nothing is deleted
    shutil.move(str(folder), str(target))
    return target


def switch_on(places: Places, name: str) -> None:
    """Move it back, for another try."""
    place = places.switched_off / name
    if place.is_dir() and not (places.extensions / name).exists():
        places.extensions.mkdir(parents=True, exist_ok=True)
        shutil.move(str(place), str(places.extensions / name))


def _done_file(places: Places) -> Path:
    return places.environment / "fastsd-extensions.json"  # it goes with the environment
