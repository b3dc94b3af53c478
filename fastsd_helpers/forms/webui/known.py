"""What the web UI notebook's forms offer: models of the store, of DreamBooth sessions and of the registry."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.controlnet import find_controlnets, tasks, total_bytes
from fastsd_helpers.drive import sessions_root
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.files import file_errors
from fastsd_helpers.registry import models
from fastsd_helpers.sessions.folders import children, models_in
from fastsd_helpers.webui import Places, WebUI, find_places, find_ui
from fastsd_helpers.webui.places import store_folder
from fastsd_helpers.webui.placing.bundles import runs_in
from fastsd_helpers.webui.placing.model_files import BASE_KINDS, ENDINGS, look_at
from fastsd_helpers.wording import size_in_words

if TYPE_CHECKING:
    from fastsd_helpers.sessions import Session

__all__ = [
    "known_controlnet_bases",
    "known_controlnets",
    "known_files",
    "known_model_files",
    "known_models",
    "known_start_models",
]

Entries = list[tuple[str, str]]

_MOST = 200  # a list that nobody can read helps nobody


def known_models(session: "Session | None" = None) -> Entries:
    """Base models to place: what is there, finished DreamBooth sessions, and the registry's for this web UI."""
    return [("auto: what is there, else Stable Diffusion 1.5", "auto"), *_base_models(session)]


def known_start_models(session: "Session | None" = None) -> Entries:
    """As `known_models`, for the start, which may leave the choice to the cells before it."""
    return [("the one placed in section 4, else what is there", ""), *_base_models(session)]


def known_files(session: "Session | None", kind: str) -> Entries:
    """Files of a kind: of the store, of the registry for this web UI, and the LoRAs that DreamBooth sessions made."""
    made = [(name, path) for name, path in _made_by_sessions() if _is_lora(path)] if kind == "lora" else []
    return [("none", ""), *_of_store(session, kind), *_of_sessions(made), *_of_registry(session, kind)]


def known_controlnets(session: "Session | None" = None) -> Entries:
    """Tasks that there is a ControlNet for, for the base model and web UI that were chosen."""
    ui, _places, family = _chosen(session)
    try:
        found = tasks(family, ui=ui.key)
    except FastSDError:  # there are none for this family or this web UI
        found = []
    if not found:
        return [("none", "")]
    rows = find_controlnets(family, ui=ui.key)
    whole = f"all that fit: {len(rows)} files, {size_in_words(total_bytes(rows))}"
    return [("none", ""), *((task, task) for task in found), (whole, "all")]


def known_controlnet_bases(session: "Session | None" = None) -> Entries:
    """Base models that there are ControlNets for."""
    ui, _places, _family = _chosen(session)
    entries = [("auto: the model of section 4", "auto")]
    for spec in models():
        if spec.kind == "base" and not spec.folder and spec.family in ui.families:
            try:
                found = tasks(spec.key, ui=ui.key)
            except FastSDError:
                continue
            entries += [(f"{spec.key}: {spec.title}", spec.key)] if found else []
    return entries


def known_model_files(session: "Session | None" = None) -> Entries:
    """Model files that can be looked at: of the store, and those that DreamBooth sessions have made."""
    ui, places, _family = _chosen(session)
    entries = [("none", "")]
    for kind, _name in ui.folders:
        folder = store_folder(places, ui, kind)
        entries += [(f"{kind}: {name}", str(folder / name)) for name in _files(folder)]
    return [*entries, *_of_sessions(_made_by_sessions())]


def _of_sessions(made: "Iterable[tuple[str, Path]]") -> Entries:
    """What sessions have made; a file that is called after its session says the name once, for names may be long."""
    return [(f"session {name}: {path.name.removeprefix(f'{name}-')}", str(path)) for name, path in made]


def _base_models(session: "Session | None") -> Entries:
    sessions = dict.fromkeys(name for name, _path in _made_by_sessions())
    there = dict.fromkeys(entry for kind in BASE_KINDS for entry in _of_store(session, kind))
    return [
        *there,
        *((f"your session {name}", name) for name in sessions),
        *(entry for kind in ("base", *BASE_KINDS) for entry in _of_registry(session, kind)),
    ]


def _of_registry(session: Any, kind: str) -> Entries:
    """Keys of a kind that the chosen web UI runs."""
    ui, _places, _family = _chosen(session)
    return [(f"{spec.key}: {spec.title}", spec.key) for spec in models(kind) if ui.key in runs_in(spec)]


def _is_lora(path: Path) -> bool:
    """Whether a session's file is a LoRA, by its header and not by its name; one that cannot be read is none."""
    try:
        return look_at(path).kind == "lora"
    except FastSDError:
        return False


def _chosen(session: Any) -> tuple[WebUI, Places, str]:
    """The web UI, its folders and the base model's family: the notebook's, or the usual ones where there is none."""
    if getattr(session, "places", None) is not None:
        return session.ui, session.places, session.family or "sd15"
    ui = find_ui("a1111")
    return ui, find_places(ui), "sd15"


def _of_store(session: Any, kind: str) -> Entries:
    ui, places, _family = _chosen(session)
    if kind not in dict(ui.folders):
        return []
    return [(f"in your folder: {name}", name) for name in _files(store_folder(places, ui, kind))]


def _files(folder: Path) -> Iterable[str]:
    """Names of the model files below a folder, sorted; a folder that is not there has none."""
    with file_errors(folder, "read"):
        found = [path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in found)[:_MOST]


def _made_by_sessions() -> list[tuple[str, Path]]:
    """(name of the session, file) of every model that a session has finished; only names are read."""
    root = sessions_root()
    with file_errors(root, "read"):
        return [(folder.name, path) for folder in children(root) for path in models_in(folder / "exports")]
