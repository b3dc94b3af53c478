"""From what a user names to the files a web UI needs for it, each with its folder and where it comes from."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastsd_helpers.downloads import fetch, wanted_file
from fastsd_helpers.downloads.links import show_url
from fastsd_helpers.errors import DownloadError, FastSDError, ModelError, ModelNotFound, SessionUnfinished
from fastsd_helpers.model_lookup import Name, known_model, understand
from fastsd_helpers.registry import ModelSpec, detect_family, find_model, models
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions import Session, find_session
from fastsd_helpers.sessions.folders import models_in
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.flags import Machine
from fastsd_helpers.webui.places import Places, require_folder, store_folder
from fastsd_helpers.webui.placing.bundles import choose_bundle, file_name, parts_of, require_family, require_runs
from fastsd_helpers.webui.placing.conversion import converted, from_folder
from fastsd_helpers.webui.placing.in_store import find_part
from fastsd_helpers.webui.placing.model_files import BASE_KINDS, ENDINGS, a_kind, look_at, require_kind

__all__ = ["Needed", "NeededFile", "find_needed"]

_BASES = ("base", *BASE_KINDS)


@dataclass(frozen=True)
class NeededFile:
    """One file that a web UI needs.

    kind: a key of KINDS, or "auto" while only the file itself can tell. folder: the web UI's own. name: "" until a
    site has told it. bytes: exact or about; None where nobody published it. source: a link, a path or a Hub id.
    bring: gets the folder of the store, and gives the file and how it came.
    """

    kind: str
    folder: str
    name: str
    bytes: int | None
    source: str
    family: str | None = None
    bring: Callable[[Path], tuple[Path, str]] = field(repr=False, compare=False, kw_only=True)

    def about(self) -> dict[str, Any]:
        """As it is listed: kind, folder, name, bytes, source."""
        return {name: getattr(self, name) for name in ("kind", "folder", "name", "bytes", "source")}


@dataclass(frozen=True)
class Needed:
    """The files for one name, what was named first; why these; and what a user should know of them."""

    files: tuple[NeededFile, ...]
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def family(self) -> str | None:
        """The family of its base model, as far as it can be told without fetching it."""
        return next((file.family for file in self.files if file.kind in BASE_KINDS), None)


def find_needed(
    ref: str,
    ui: WebUI,
    places: Places,
    machine: Machine,
    *,
    kind: str = "auto",
    t5: str = "auto",
    root: Path | str | None = None,
) -> Needed:
    """Find out which files a web UI needs for what a user names; nobody is asked, nothing fetched or written.

    Args:
        ref: a registry key, a file, a Diffusers folder, a link, a Hub id, a file in the store, or the name or folder of
            a DreamBooth session. Of a session that trained a LoRA its base model is needed too.
        machine: decides the sizes.
        kind: a key of KINDS, checkpoint meaning any base model; auto: what it is.
        root: where sessions lie; None: the usual place.

    Raises:
        ModelNotFound: it names nothing, or something of another kind.
        ModelError: it names nothing, or something of another kind.
        WebUIError: this web UI does not run its family, or has no folder for its kind.
        SessionUnfinished: the session has made nothing yet.
    """
    if kind != "auto":
        require_folder(ui, kind)
    name = understand(ref)
    there = _in_store(name.text, ui, places, kind)
    if name.spec is None and name.what in ("hub", "nothing") and there is not None:
        found, path = there
        return _with_parts(_local(path, found, ui, "there already"), ui, places, t5)
    if name.spec is not None:
        return _of_key(name.spec, ui, machine, kind, t5)
    if name.what == "file" and name.path is not None:
        return _with_parts(_local(name.path, kind, ui, "linked"), ui, places, t5)
    if name.what == "link":
        return Needed((_of_link(name.text, kind, ui),))
    session = find_session(name.text, root=root)
    if session is not None:
        return _of_session(session, ui, places, machine, kind, t5, root)
    if name.what == "hub" and name.revision is None and (spec := _row_of(name, kind)) is not None:
        return _of_key(spec, ui, machine, kind, t5)
    if name.what in ("folder", "hub"):
        return Needed((_of_folder(name, kind, ui),))
    raise _not_found(name.text, ui, kind)


def _in_store(text: str, ui: WebUI, places: Places, kind: str) -> tuple[str, Path] | None:
    kinds = [kind] if kind != "auto" else list(dict(ui.folders))
    if kind == "checkpoint" and "diffusion-model" in dict(ui.folders):
        kinds.append("diffusion-model")
    for one in kinds:
        path = store_folder(places, ui, one) / text
        if text and path.is_file():
            return kind, path
    return None


def _file_in(ui: WebUI, kind: str, **values: Any) -> NeededFile:
    """A file of a kind, with the web UI's folder for it."""
    return NeededFile(kind, require_folder(ui, "checkpoint" if kind == "auto" else kind), **values)


# ------------------------------------------------------------------------------------------------- keys


def _of_key(spec: ModelSpec, ui: WebUI, machine: Machine, kind: str, t5: str) -> Needed:
    own = "checkpoint" if spec.kind in _BASES else spec.kind
    if spec.kind == "reader":
        raise ModelNotFound(f"'{spec.key}' ({spec.title}) reads handwriting; no web UI loads it.", _keys_hint(ui, kind))
    if kind not in ("auto", own, spec.kind):
        raise ModelNotFound(
            f"'{spec.key}' ({spec.title}) is {a_kind(own)}, not {a_kind(kind)}.",
            _keys_hint(ui, kind),
        )
    require_family(ui, spec.family, spec.key)
    if own != "checkpoint":
        return Needed((_of_row(spec, ui),))
    bundle = choose_bundle(spec, ui, machine, t5=t5)
    files = [_of_row(row, ui, smaller=bundle.smaller if row is bundle.specs[0] else ()) for row in bundle.specs]
    return Needed(tuple(files), bundle.reasons)


def _of_row(spec: ModelSpec, ui: WebUI, *, smaller: tuple[str, ...] = ()) -> NeededFile:
    about = spec.checkpoint
    if about is None:
        source = spec.folder or (spec.sources[0].repo if spec.sources else spec.key)
        return _file_in(
            ui,
            "checkpoint",
            name=f"{spec.key}.safetensors",
            bytes=spec.bytes,
            source=str(source),
            family=spec.family,
            bring=lambda store: (converted(spec.key, spec.key, ui, store), "converted"),
        )
    kind = "diffusion-model" if spec.sizes else "checkpoint" if spec.kind == "base" else spec.kind
    revision = about.get("revision") or "main"
    return _file_in(
        ui,
        kind,
        name=file_name(spec),
        bytes=spec.bytes,
        source=f"https://huggingface.co/{about['repo']}/resolve/{revision}/{about['file']}",
        family=spec.family,
        bring=lambda store: (_fetch_row(spec, store, smaller), "downloaded"),
    )


def _fetch_row(spec: ModelSpec, store: Path, smaller: tuple[str, ...]) -> Path:
    """Fetch the file of a row; a gated one that is refused gives way to its copy that is open to all."""
    wanted = wanted_file(spec.checkpoint or {}, store)
    try:
        return fetch(
            wanted.source, store, name=wanted.name, size=wanted.size, sha256=wanted.sha256, mirrors=wanted.mirrors
        )
    except (ModelError, DownloadError) as err:
        if not (spec.gated and smaller):
            raise
        logger.warning("%s %s Its copy '%s' is used instead, which needs no access.", err.problem, err.hint, smaller[0])
        return _fetch_row(find_model(smaller[0]), store, smaller[1:])


def _row_of(name: Name, kind: str) -> ModelSpec | None:
    """The row that a repository of the Hub is: that of a base model, or its only one."""
    if known_model(name.text) is None or kind not in ("auto", *BASE_KINDS):
        return None
    rows = [spec for spec in models(None) if name.repo.lower() in _repos(spec)]
    bases = [spec for spec in rows if spec.kind == "base" and spec.checkpoint]
    return bases[0] if len(bases) == 1 else rows[0] if len(rows) == 1 and rows[0].checkpoint else None


def _repos(spec: ModelSpec) -> set[str]:
    own = str((spec.checkpoint or {}).get("repo", ""))
    return {repo.lower() for repo in (*(source.repo for source in spec.sources), own) if repo}


# ------------------------------------------------------------------------------ files, links, folders, sessions


def _local(path: Path, kind: str, ui: WebUI, how: str) -> NeededFile:
    found = look_at(path)
    require_runs(found, ui, path.name)
    known = require_kind(path, found, kind)
    size = path.stat().st_size
    return _file_in(
        ui, known, name=path.name, bytes=size, source=str(path), family=found.family, bring=lambda _store: (path, how)
    )


def _with_parts(file: NeededFile, ui: WebUI, places: Places, t5: str) -> Needed:
    """A file, and of a model that lacks them the text encoders and VAE that were placed already."""
    beside = []
    if file.kind == "diffusion-model":
        large = t5 == "fp16"
        found = (find_part(part, file.family, ui, places, largest=large) for part in parts_of(file.family))
        beside = [path for path in found if path is not None]
    return Needed((file, *(_local(path, "auto", ui, "there already") for path in beside)))


def _of_link(link: str, kind: str, ui: WebUI) -> NeededFile:
    last = unquote(urlsplit(link).path.rsplit("/", 1)[-1])
    name = last if last.lower().endswith(ENDINGS) else ""
    return _file_in(
        ui, kind, name=name, bytes=None, source=show_url(link), bring=lambda store: (fetch(link, store), "downloaded")
    )


def _of_folder(name: Name, kind: str, ui: WebUI) -> NeededFile:
    title = Path(name.text.rstrip("/")).name.partition("@")[0]
    family = None
    if name.what == "folder" and name.path is not None and (name.path / "model_index.json").is_file():
        family = detect_family(name.path)
        if kind in ("auto", *BASE_KINDS):
            require_family(ui, family, name.text)

    whole = family is not None or kind == "checkpoint"
    return _file_in(
        ui,
        "checkpoint" if whole and kind == "auto" else kind,
        name=f"{title}.safetensors",
        bytes=None,
        source=name.text,
        family=family,
        bring=lambda store: from_folder(name, kind, title, ui, store),
    )


def _of_session(
    session: Session, ui: WebUI, places: Places, machine: Machine, kind: str, t5: str, root: Path | str | None
) -> Needed:
    newest = session.finished_model()
    made = sorted(models_in(session.exports), key=lambda path: -path.stat().st_mtime)
    fitting = [path for path in made if kind != "auto" and _is_kind(path, kind)]
    file = _local((fitting or [newest])[0].absolute(), "auto", ui, "linked")
    if file.kind != "lora":
        if kind == "lora":
            raise SessionUnfinished(
                f"The session {session.name} has no LoRA, but a full model ({file.name}).",
                "Give the session as the base model.",
            )
        return Needed((file,))
    base = (session.record.get("base_model") or {}).get("ref")
    try:
        if not base:
            raise ModelNotFound("Its record has no base model.", "Choose one of its family yourself.")
        name = understand(base)
        if name.spec is not None and name.spec.folder is not None:
            raise ModelError(
                f"Its base model, {base}, has an architecture that no web UI loads.",
                f"The playground can use both: fastsd playground {session.name}",
            )
        below = find_needed(base, ui, places, machine, kind="checkpoint", t5=t5, root=root)
    except FastSDError as err:
        warning = f"The LoRA of {session.name} is placed without its base model. {err.problem} {err.hint}"
        return Needed((file,), warnings=(warning,))
    return Needed((file, *below.files), below.reasons, below.warnings)


def _is_kind(path: Path, kind: str) -> bool:
    try:
        found = look_at(path).kind
    except FastSDError:
        return False
    return found == kind or (kind == "checkpoint" and found in BASE_KINDS)


# ------------------------------------------------------------------------------------------- nothing of that name


def _keys_hint(ui: WebUI, kind: str) -> str:
    wanted = _BASES if kind in ("auto", "checkpoint") else (kind,)
    keys = [spec.key for spec in models(None) if spec.kind in wanted and spec.family in ui.families]
    what = "a file, a link, a Hub id"
    return f"Give {what}, a session, or a key: {', '.join(keys)}." if keys else f"Give {what} or a session."


def _not_found(ref: str, ui: WebUI, kind: str) -> ModelNotFound:
    keys = [spec.key for spec in models(None) if spec.family in ui.families]
    near = difflib.get_close_matches(ref.lower(), keys, n=1)
    problem = f"There is no model '{ref}' for {ui.title}."
    if "://" in ref or re.match(r"(www\.)?[\w-]+(\.[\w-]+)*\.(ai|co|com|net|org|red)/", ref.lower()):
        return ModelNotFound(problem, "If it is meant as a link, it begins with https://; copy it whole.")
    if ref.lower().endswith(ENDINGS):
        return ModelNotFound(
            f"There is no file '{ref}', neither in this folder nor among the models of {ui.title}.",
            "Give its whole path; names are case-sensitive.",
        )
    return ModelNotFound(problem, f"{f'Did you mean {near[0]}? ' if near else ''}{_keys_hint(ui, kind)}")
