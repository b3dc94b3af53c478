"""The web UIs that can be installed: where their code comes from, which models they run, how they speak."""

import functools
from dataclasses import dataclass
from typing import Any

from fastsd_helpers.downloads.table import read_table
from fastsd_helpers.errors import WebUIError
from fastsd_helpers.tunnels.closed import A1111_CLOSED, COMFYUI_CLOSED
from fastsd_helpers.tunnels.gate.passing import ClosedPath

__all__ = ["Repository", "WebUI", "find_ui", "uis"]


@dataclass(frozen=True)
class Repository:
    """Code at one commit, with the places it can be had from, in order."""

    name: str  # what a mirror setting calls it
    folder: str  # below the UI's own code; "" is the UI itself; "extension/NAME" is one of its extensions
    urls: tuple[str, ...]
    revision: str  # a commit, or a tag where no commit is known here
    variable: str = ""  # by which AUTOMATIC1111 itself can be told another address


@dataclass(frozen=True)
class WebUI:
    """One web UI, as webuis.toml describes it."""

    key: str
    title: str
    python: str
    lock_set: str  # its set in wheels.lock
    repositories: tuple[Repository, ...]
    families: tuple[str, ...]  # of base models it runs
    entry: str
    port: int
    ready: str  # pattern of the line after which it may be asked over HTTP
    alive_path: str  # answers 200 without a login
    loaded: str = ""  # pattern of the line that says that the model is loaded
    refused: str = ""  # ... or that it is not
    has_login: bool = False
    folders: tuple[tuple[str, str], ...] = ()  # kind of model -> folder below models/
    hides_dotted: bool = False  # it serves no file below a folder whose name begins with a dot (Gradio 3, routes.py)
    closed: tuple[ClosedPath, ...] = ()  # what no visitor of a link may use
    runs_others: bool = False  # it also runs families that nothing here has a table of
    guard: str = ""  # file of guards/ that starts it
    tried: str = ""  # what of this was run, and when


_CLOSED = {"a1111": A1111_CLOSED, "comfyui": COMFYUI_CLOSED}


@functools.cache
def _table() -> tuple[WebUI, ...]:
    return tuple(_read(key, row) for key, row in read_table("webuis.toml").items())


def _read(key: str, row: dict[str, Any]) -> WebUI:
    own = {
        "closed": _CLOSED[row["closed"]],
        "families": tuple(row["families"]),
        "folders": tuple(row["folders"].items()),
        "repositories": tuple(Repository(**one | {"urls": tuple(one["urls"])}) for one in row["repositories"]),
    }
    return WebUI(key, **row | own)


def uis() -> list[WebUI]:
    """Every web UI, the default one first."""
    return list(_table())


def find_ui(key: str) -> WebUI:
    """Look up a web UI; raises WebUIError with the keys there are.

    Args:
        key: a1111, forge-neo or comfyui.

    Returns:
        What webuis.toml says of it.
    """
    for ui in uis():
        if ui.key == key:
            return ui
    raise WebUIError(f"There is no web UI '{key}' here.", f"Choose {', '.join(ui.key for ui in uis())}.")
