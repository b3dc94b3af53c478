"""Models where a web UI looks for them: found, checked, converted when needed, and linked, not copied."""

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.controlnet import fetch_controlnet, find_controlnet, tasks
from fastsd_helpers.downloads import HubFile, fetch
from fastsd_helpers.downloads.pipeline import Listing
from fastsd_helpers.errors import CheckpointError, ModelError, ModelNotFound, WebUIError
from fastsd_helpers.files import file_errors, new_link
from fastsd_helpers.model_lookup import base_model, find_folder, require_inert, understand
from fastsd_helpers.options import check, option
from fastsd_helpers.registry import ModelSpec, detect_family, family_of, models
from fastsd_helpers.sessions import find_session
from fastsd_helpers.webui.catalog import WebUI, uis
from fastsd_helpers.webui.places import Places, model_folder, prepare_places, store_folder

__all__ = [
    "ControlNetConfig",
    "ModelsConfig",
    "PlacedModel",
    "family_named",
    "place_controlnet",
    "place_controlnets",
    "place_model",
    "place_models",
    "require_named",
]

logger = logging.getLogger("fastsd_helpers")

_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".gguf", ".bin")
_FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
_WIDTH = 320  # of the first layer of every Stable Diffusion that web UIs know


@dataclass(frozen=True)
class PlacedModel:
    """A model where the web UI finds it."""

    path: Path
    kind: str
    family: str | None
    how: str  # there already, linked, converted, downloaded


@dataclass(frozen=True)
class ModelsConfig:
    """Models to put where a web UI finds them; several of a kind are separated by commas."""

    model: str = option(
        "auto",
        help="base model: key, Hub id, file, link or session; auto: yours, else Stable Diffusion",
        known="webui_models",
    )
    lora: str = option("", help="LoRA: files or links", known="webui_loras")
    vae: str = option("", help="VAE: files or links", advanced=True, known="webui_vaes")
    embedding: str = option(
        "", help="embeddings (textual inversion): files or links", advanced=True, known="webui_embeddings"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ControlNetConfig:
    """ControlNets to fetch: pictures that steer the drawing."""

    tasks: str = option(
        "", help="such as canny, openpose, depth; separated by commas; empty: none", known="controlnets"
    )
    base: str = option(
        "auto", help="the base model they are for; auto: the one chosen above", advanced=True, known="controlnet_bases"
    )

    def __post_init__(self) -> None:
        check(self)


def place_models(config: ModelsConfig, ui: WebUI, places: Places) -> list[PlacedModel]:
    """Put every model of the settings where a web UI finds it; the base model comes first, when one was placed.

    With "auto" nothing is fetched while the store has a base model; an empty one gets Stable Diffusion 1.5.

    Raises:
        What `place_model` raises; what was placed before stays.
    """
    prepare_places(places, ui)
    ref = config.model.strip()
    if ref == "auto":
        with _file_errors(places):
            there = sorted(path.name for path in store_folder(places, ui, "checkpoint").rglob("*") if _is_model(path))
        ref = "" if there else "sd15"
        why = (
            f"{len(there)} in {places.store}: {', '.join(there[:5])}"
            if there
            else "there is none yet, so sd15 is taken"
        )
        logger.info("Base models: %s.", why)
    placed = [place_model(ref, ui, places)] if ref else []
    for kind in ("lora", "vae", "embedding"):
        placed += [place_model(item, ui, places, kind=kind) for item in _listed(getattr(config, kind))]
    for model in placed:
        logger.info("%s (%s): %s", model.path.name, model.kind, model.how)
    return placed


def place_controlnets(
    config: ControlNetConfig, ui: WebUI, places: Places, *, family: str | None = None
) -> list[PlacedModel]:
    """Fetch a ControlNet for each task of the settings.

    Args:
        family: of the base model that is used, for base "auto"; Stable Diffusion 1.5 when None.

    Raises:
        What `place_controlnet` raises.
    """
    base = (family or "sd15") if config.base.strip() in ("auto", "") else config.base.strip()
    wanted = _listed(config.tasks)
    if not wanted:
        logger.info("No ControlNet was asked for; for %s there is %s.", base, ", ".join(tasks(base, ui=ui.key)))
    placed = [place_controlnet(base, task, ui, places) for task in wanted]
    for model in placed:
        logger.info("%s (for %s): %s", model.path.name, base, model.how)
    return placed


@contextlib.contextmanager
def _file_errors(places: Places) -> Iterator[None]:
    """Drive can go at any moment: what the system says of a file becomes a sentence that names it."""
    try:
        yield
    except OSError as err:
        with file_errors(err.filename or places.store, "use"):
            raise


def _listed(text: str) -> list[str]:
    return [word for word in (word.strip() for word in text.split(",")) if word]


def _is_model(path: Path) -> bool:
    return path.suffix in (".safetensors", ".ckpt") and path.is_file()


def family_named(ref: str) -> str | None:
    """The family of a model as far as it can be told without fetching it; None when it cannot."""
    name = understand(ref)
    if name.spec is not None:
        return name.spec.family
    if name.what == "folder" and (name.path / "model_index.json").is_file():
        return detect_family(name.path)
    return _family_of_file(name.path) if name.what == "file" else None


def place_model(ref: str, ui: WebUI, places: Places, *, kind: str = "checkpoint") -> PlacedModel:
    """Put a model where a web UI looks for it.

    Args:
        ref: a registry key, a file, a Diffusers folder, a link, a Hub id, or (for checkpoints) the name or folder of a
            DreamBooth session, whose newest finished model is taken.
        kind: checkpoint, lora, vae, embedding or text-encoder.

    Returns:
        Where it is. A file of the user's is linked; a download is kept in the store; a Diffusers folder is converted
        to one file in the store.

    Raises:
        ModelNotFound, ModelError, WebUIError: there is no such model, or this UI does not run its family.
        DownloadError, DriveError, CheckpointError: it could not be brought or converted.
    """
    prepare_places(places, ui)
    with _file_errors(places):
        return _place(ref, ui, places, kind)


def _place(ref: str, ui: WebUI, places: Places, kind: str) -> PlacedModel:
    source, how = _bring(ref, ui, places, kind)
    require_inert(_with_description(source))
    family = _family_of_file(source) if kind == "checkpoint" else None
    if family is not None:
        _require_family(ui, family, ref)
        _warn_of_shape(source, ui)
    folder = model_folder(places, ui, kind)
    if source.resolve().is_relative_to(store_folder(places, ui, kind)):
        return PlacedModel(
            folder / "store" / source.resolve().relative_to(store_folder(places, ui, kind)), kind, family, how
        )
    target = folder / source.name
    if target.exists() and not target.is_symlink():
        return PlacedModel(target, kind, family, "there already")
    _link_with_config(source, target)
    return PlacedModel(target, kind, family, how)


def place_controlnet(base: str, task: str, ui: WebUI, places: Places) -> PlacedModel:
    """Fetch the ControlNet for a base model and a task into the store, under the name by which the UI recognises it.

    Raises:
        ModelError: it does not go together with this base or this UI; the hint says what does. DownloadError.
    """
    row = find_controlnet(base, task, ui=ui.key)
    prepare_places(places, ui)
    path = fetch_controlnet(row, store_folder(places, ui, "controlnet"))
    require_inert(_with_description(path))
    return PlacedModel(
        model_folder(places, ui, "controlnet") / "store" / path.name, "controlnet", row.family, "downloaded"
    )


def _bring(ref: str, ui: WebUI, places: Places, kind: str) -> tuple[Path, str]:
    store = store_folder(places, ui, kind)
    name = understand(ref)
    if name.what == "link":
        return fetch(ref, store), "downloaded"
    if name.what == "file":
        if name.path.suffix.lower() not in _FILES:
            raise ModelError(f"{name.path} is no model file.", f"Give a file that ends in {', '.join(_FILES)}.")
        return name.path, "linked"
    there = store / ref
    if there.is_file():
        return there, "there already"
    if kind == "checkpoint":
        if name.spec is not None:
            return _bring_key(name.spec, ui, store)
        session = find_session(ref)
        if session is not None:
            return session.finished_model(), "linked"
        if name.what in ("folder", "hub"):
            return _converted(ref, Path(ref).name, ui, store), "converted"
    raise _not_found(ref, ui)


def require_named(ref: str, ui: WebUI, places: Places) -> None:
    """Check that a text names a model at all; nothing is fetched or written.

    Raises:
        ModelNotFound: it is no key, file, folder, link, Hub id, session, or file in the store.
    """
    there = store_folder(places, ui, "checkpoint") / ref
    if understand(ref).what == "nothing" and not there.is_file() and find_session(ref) is None:
        raise _not_found(ref, ui)


def _not_found(ref: str, ui: WebUI) -> ModelNotFound:
    keys = [spec.key for spec in models() if spec.family in ui.families]
    near = difflib.get_close_matches(ref.strip().lower(), keys, n=1)
    problem = f"There is no model '{ref}' for {ui.title}."
    if "://" in ref or re.match(r"(www\.)?[\w-]+(\.[\w-]+)*\.(ai|co|com|net|org|red)/", ref.strip().lower()):
        return ModelNotFound(problem, "If it is meant as a link, it begins with https://; copy it whole.")
    if ref.strip().lower().endswith(_FILES):
        return ModelNotFound(
            f"There is no file '{ref}', neither in this folder nor among the models of {ui.title}.",
            "Give its whole path; names are case-sensitive.",
        )
    meant = f"Did you mean {near[0]}? Otherwise g" if near else "G"
    return ModelNotFound(problem, f"{meant}ive a file, a link, a Hub id, a session, or a key: {', '.join(keys)}.")


def _bring_key(spec: ModelSpec, ui: WebUI, store: Path) -> tuple[Path, str]:
    _require_family(ui, spec.family, spec.key)
    if not spec.checkpoint:
        return _converted(spec.key, spec.key, ui, store), "converted"
    about = spec.checkpoint
    wanted = HubFile(about["repo"], about["file"], about.get("revision"))
    return fetch(wanted, store, size=about.get("bytes"), sha256=about.get("sha256")), "downloaded"


def _converted(ref: str, name: str, ui: WebUI, store: Path) -> Path:
    """One file of a Diffusers folder or repository; one that is newer than the folder is kept."""
    from fastsd_helpers.checkpoints import convert

    def accept(spec: ModelSpec) -> None:
        _require_family(ui, spec.family, ref)

    def check(listing: Listing) -> None:
        _require_family(ui, family_of(listing), ref)

    folder = find_folder(ref, base_model(accept, check))
    target = store / f"{name}.safetensors"
    newest = max((file.stat().st_mtime for file in folder.rglob("*") if file.is_file()), default=0)
    if target.is_file() and target.stat().st_mtime >= newest:
        return target
    logger.info("%s is converted to one file for %s.", name, ui.title)
    convert(folder, target, overwrite=True, hashes=False)
    return target


def _family_of_file(path: Path) -> str | None:
    """What `inspect` says a checkpoint is; a LoRA, a ControlNet or a damaged file is refused here."""
    from fastsd_helpers.checkpoints.inspector import inspect

    if path.suffix.lower() == ".gguf":
        return "flux"
    found = inspect(path, hashes=False)
    if found.kind in ("lora", "controlnet"):
        raise ModelError(
            f"{path.name} is {found.what}, not a base model.",
            "Give it as what it is, and a base model beside it.",
        )
    for problem in found.problems:
        logger.info("%s: %s", path.name, problem.what)
    return found.family


def _warn_of_shape(path: Path, ui: WebUI) -> None:
    """Say that a model of other widths, like the embedded one, is for the playground alone."""
    from fastsd_helpers.checkpoints.sources import open_file

    if path.suffix.lower() != ".safetensors" or path.with_suffix(".yaml").is_file():
        return
    try:
        source = open_file(path)
    except CheckpointError:
        return  # what is wrong with it was said already
    try:
        fact = source.tensors.get(_FIRST_LAYER)
    finally:
        source.close()
    if fact is not None and fact.shape[0] != _WIDTH:
        logger.warning(
            "%s has %d channels where a Stable Diffusion has %d: %s will refuse it. The playground draws with it.",
            path.name,
            fact.shape[0],
            _WIDTH,
            ui.title,
        )


def _require_family(ui: WebUI, family: str, ref: str) -> None:
    if family not in ui.families:
        others = [other.title for other in uis() if family in other.families]
        raise WebUIError(
            f"{ui.title} does not run '{ref}', which is a {family} model.",
            f"Choose {' or '.join(others)}, or a model of {', '.join(ui.families)}.",
        )


def _link_with_config(source: Path, target: Path) -> None:
    """Link a file, and the .yaml of the same name that says how SD 2.1 is to be read."""
    for file in _with_description(source):
        new_link(target.with_suffix(file.suffix) if file != source else target, file)


def _with_description(source: Path) -> list[Path]:
    """A file, and the .yaml of the same name, by which a web UI builds the network."""
    description = source.with_suffix(".yaml")
    return [source, *([description] if description != source and description.is_file() else [])]
