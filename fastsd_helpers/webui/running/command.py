"""The exact command, environment, memory allocator and login file a web UI is started with."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastsd_helpers.drive import delivers_late
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.processes import environment_for, looks_secret
from fastsd_helpers.tunnels import Login
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.extensions.installation import folder_of
from fastsd_helpers.webui.flags import Machine, choose_flags
from fastsd_helpers.webui.places import Places, model_folder
from fastsd_helpers.webui.placing.in_store import families_in_store
from fastsd_helpers.webui.placing.needed import NeededFile
from fastsd_helpers.webui.settings import LaunchConfig
from fastsd_helpers.wording import size_in_words

__all__ = ["LaunchPlan", "environment_of", "find_allocator", "plan_launch", "preload", "with_allocator"]

_ALLOCATORS = re.compile(r"libtcmalloc(_minimal)?\.so\.\d+")  # not _debug, which is slow
_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
)


@dataclass(frozen=True)
class LaunchPlan:
    """What would be started."""

    command: list[str] = field(repr=False)  # holds a password
    environment: dict[str, str]  # what is set beside the process's own
    cwd: Path
    port: int
    reasons: list[str]
    login_file: Path | None
    hidden: list[str] = field(repr=False)
    passed_on: tuple[str, ...] = ()  # names of this process's environment that the user wants it to have too
    files: tuple[NeededFile, ...] = ()  # that the model needs in this web UI

    def lines(self) -> list[str]:
        """In words for people, ready to paste into a shell; without passwords."""
        shown = [word if word not in self.hidden else "•••" for word in self.command]
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return [
            *self.reasons,
            *self._files(),
            f"cd {shlex.quote(str(self.cwd))}",
            " ".join([*settings, *map(shlex.quote, shown)]),
        ]

    def _files(self) -> list[str]:
        sized = [file.bytes for file in self.files if file.bytes]
        lines = [
            f"{file.folder}/{file.name or '(named by its site)'}"
            f"{f'  {size_in_words(file.bytes)}' if file.bytes else ''}  from {file.source}"
            for file in self.files
        ]
        return [*lines, f"{len(self.files)} files, {size_in_words(sum(sized))}."] if len(sized) > 1 else lines


def plan_launch(
    config: LaunchConfig,
    ui: WebUI,
    places: Places,
    machine: Machine,
    *,
    family: str,
    model: Path | None,
    login: Login,
    files: Sequence[NeededFile] = (),
) -> LaunchPlan:
    """Put together the command for a web UI; nothing is started or written, the store's models are looked at.

    Args:
        family: of the model, such as sdxl.
        model: the checkpoint file to start with; None: whatever the UI finds.
        files: what the model needs, for the plan's words.
        login: user and password of the UI itself.

    Raises:
        WebUIError: this UI does not run the family.
        DriveError: the store does not answer.
    """
    chosen, reasons = choose_flags(
        ui,
        family,
        machine,
        vram=config.vram,
        precision=config.precision,
        attention=config.attention,
        also=families_in_store(ui, places),
    )
    port = config.port or ui.port
    words, login_file, hidden = _words_of_ui(config, ui, places, port, model, login)
    environment = {
        "GIT_TERMINAL_PROMPT": "0",
        "GRADIO_ANALYTICS_ENABLED": "False",
        # A notebook sets one that only its own kernel has.
        "MPLBACKEND": "Agg",
        "PYTHONUNBUFFERED": "1",
        # A crash of compiled code says in its log which file, and so which extension, had called it.
        "PYTHONFAULTHANDLER": "1",
        "COMMANDLINE_ARGS": "",
    }
    # The same addresses that the installation used, should the UI look for its code again.
    environment |= {
        item.variable: str(folder_of(places, item)) for item in ui.repositories if item.variable and item.folder
    }
    guard = Path(__file__).parents[1] / "guards" / ui.guard
    environment["FASTSD_GUARD"] = json.dumps(
        {"admin": config.allow_admin, "data": str(places.data), "store": str(places.store), "port": port}
    )
    command = [str(places.python), "-u", str(guard), ui.entry, *chosen, *words, *shlex.split(config.extra_args)]
    passed_on = tuple(config.pass_env.split())
    for name in passed_on:
        warning = ": it looks like a secret, which every extension can read then" if looks_secret(name) else ""
        reasons = [*reasons, f"pass_env: {name} is passed on{warning}"]
    return LaunchPlan(command, environment, places.code, port, reasons, login_file, hidden, passed_on, tuple(files))


def with_allocator(chosen: LaunchPlan, ui: WebUI, places: Places) -> LaunchPlan:
    """The plan with the memory allocator of this machine, where the web UI gains by it and it is installed."""
    if ui.key == "comfyui":  # its own way to start knows none
        return chosen
    library = find_allocator(places.python if places.python.exists() else Path(sys.executable))
    if library is None:
        return chosen
    reason = f"{library.name} is loaded first: memory is freed when models are switched (not with NO_TCMALLOC)."
    more = {"LD_PRELOAD": preload(library)}
    return replace(chosen, environment=chosen.environment | more, reasons=[*chosen.reasons, reason])


def environment_of(plan: LaunchPlan) -> dict[str, str]:
    """The whole environment of the process: no token, no password, nothing of the notebook's own Python."""
    return {**environment_for("web UI", also=plan.passed_on), **plan.environment}


def _words_of_ui(
    config: LaunchConfig, ui: WebUI, places: Places, port: int, model: Path | None, login: Login
) -> tuple[list[str], Path | None, list[str]]:
    if ui.key == "comfyui":
        # It has no login of its own: it listens on this machine alone, and the gate stands in front of every link.
        words = ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(places.data)]
        words += ["--output-directory", str(places.data / "outputs"), "--disable-auto-launch"]
        # A database does not belong on Drive, where its settings are kept; by itself it looks for it among its code.
        words += ["--database-url", f"sqlite:///{places.data / 'comfyui.db'}"]
        if not config.allow_admin:
            words.append("--disable-api-nodes")  # they ask other services for what their account pays
        return words, None, []
    store = places.store
    login_file = places.run / "login"
    words = ["--port", str(port), "--data-dir", str(places.data)]
    words += ["--ui-settings-file", str(store / "config.json"), "--ui-config-file", str(store / "ui-config.json")]
    words += ["--styles-file", str(store / "styles.csv")]
    # Everything is installed and fetched beforehand; what an extension's installer brings would undo the lock.
    words += ["--skip-install", "--disable-console-progressbars", "--gradio-auth-path", str(login_file)]
    if not config.allow_admin:
        # It listens there anyway; named, it is the UI's own lock on extensions. The others are its locks on folders.
        words += ["--server-name", "127.0.0.1", "--hide-ui-dir-config"]
        words += ["--freeze-specific-settings", "api_enable_requests,api_forbid_local_requests"]
    hidden = [login.password]
    if ui.key == "a1111":
        words += ["--models-dir", str(places.models), "--no-download-sd-model", "--do-not-download-clip"]
        words += ["--ckpt", str(model)] if model is not None else []
    else:
        # It asks for the newest torch, which drivers of rented machines need not know.
        words.append("--skip-version-check")
        # Forge Neo starts with the model that was used last, and has one flag for each kind of folder.
        kinds = {"checkpoint": "--ckpt-dirs", "lora": "--lora-dirs", "vae": "--vae-dirs"}
        kinds |= {"text-encoder": "--text-encoder-dirs", "embedding": "--embeddings-dir"}
        for kind, flag in kinds.items():
            folder = model_folder(places, ui, kind)
            words += [flag, str(folder)]
            if kind in ("vae", "text-encoder"):
                words += [flag, str(folder / "store")]  # of these two it follows no link to a folder
    if delivers_late(store):
        words.append("--no-hashing")  # it would read every model on Drive as a whole
    if config.theme != "auto":
        words += ["--theme", config.theme]
    if config.api:
        if not f"{login.user}{login.password}".isascii():
            raise SettingsError(
                f"The API of {ui.title} accepts only ASCII characters in user and password.",
                "Choose others, or leave the API out (--no-api).",
            )
        # Without --api-auth: a command line can be read by every user of the machine. The guarded start takes the
        # API's login from the file of the page's.
        words.append("--api")
    return words, login_file, hidden


def find_allocator(python: Path, folders: Sequence[str] = _LIBRARIES) -> Path | None:
    """Google's memory allocator on this machine, with which a Python starts; None where none is installed.

    With the allocator of the C library memory is not given back when a model is switched, so that the RAM of a small
    machine ends after a few (AUTOMATIC1111's own webui.sh does the same as this).

    None too where NO_TCMALLOC is set, or an allocator is loaded into this process's children anyway (Colab does so).

    Args:
        python: the interpreter that it is for.
        folders: where it is looked for.
    """
    if os.environ.get("NO_TCMALLOC") or re.search(r"tcmalloc|jemalloc|mimalloc", os.environ.get("LD_PRELOAD", "")):
        return None
    found = [path for folder in folders if Path(folder).is_dir() for path in Path(folder).iterdir()]
    found = sorted((path for path in found if _ALLOCATORS.fullmatch(path.name)), key=lambda path: len(path.name))
    return next((path for path in found if _works(python, path)), None)


def preload(library: Path) -> str:
    """The value of LD_PRELOAD with the library in front of what this process has there."""
    return " ".join(filter(None, [str(library), environment_for("web UI").get("LD_PRELOAD", "")]))


def _works(python: Path, library: Path) -> bool:
    # One for another processor or another C library is told by the loader, which then goes on without it.
    environment = {**environment_for("program"), "LD_PRELOAD": str(library)}
    command = [str(python), "-I", "-S", "-c", "import ctypes; ctypes.CDLL(None).tc_version"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and not done.stderr
