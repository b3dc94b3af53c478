"""Models where a web UI looks for them: found, looked at, converted when needed, and linked, not copied."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.checkpoints.formats import file_content, sources
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.files import check_room, file_errors, new_link
from fastsd_helpers.model_lookup import understand
from fastsd_helpers.options import Checked, option
from fastsd_helpers.runtime import logger
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.flags import Machine, describe_machine
from fastsd_helpers.webui.places import Places, model_folder, prepare_places, require_folder, store_folder
from fastsd_helpers.webui.placing.bundles import parts_of, require_runs
from fastsd_helpers.webui.placing.in_store import find_part, is_base_file
from fastsd_helpers.webui.placing.model_files import (
    BASE_KINDS,
    KINDS,
    PlacedModel,
    base_family,
    look_at,
    require_kind,
    with_description,
)
from fastsd_helpers.webui.placing.needed import Needed, NeededFile, find_needed
from fastsd_helpers.webui.placing.workflows import write_workflow

__all__ = [
    "ModelsConfig",
    "PlacedModel",
    "drive_errors",
    "listed",
    "offer_workflow",
    "place",
    "place_model",
    "place_models",
    "place_needed",
]

_FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
_WIDTH = 320  # of the first layer of every Stable Diffusion that web UIs know


@dataclass(frozen=True)
class ModelsConfig(Checked):
    """Models to put where a web UI finds them; several of a kind are separated by commas."""

    model: str = option(
        "auto",
        help="base model: key, Hub id, file, link or session; auto: yours, else Stable Diffusion",
        known="webui_models",
    )
    lora: str = option("", help="LoRA: files, links, Hub ids or sessions", known="webui_loras")
    t5: Literal["auto", "fp8", "fp16"] = option(
        "auto", help="T5 precision: dtype of Flux's large text encoder", advanced=True
    )
    vae: str = option("", help="VAE: keys, files or links", advanced=True, known="webui_vaes")
    embedding: str = option(
        "", help="embeddings (textual inversion): files or links", advanced=True, known="webui_embeddings"
    )
    text_encoder: str = option(
        "", help="text encoders: keys, files or links", advanced=True, known="webui_text_encoders"
    )
    upscaler: str = option("", help="upscalers: files or links", advanced=True, known="webui_upscalers")


def place_models(
    config: ModelsConfig, ui: WebUI, places: Places, *, machine: Machine | None = None
) -> list[PlacedModel]:
    """Put every model of the settings where a web UI finds it; the base model comes first, when one was placed.

    With "auto" nothing is fetched while the store has a base model; an empty one gets Stable Diffusion 1.5.

    Args:
        config: base model, LoRA, VAE and others.
        ui: the web UI, as `find_ui` gives it.
        places: its folders, as `find_places` gives them.
        machine: decides the sizes; this machine when None.

    Returns:
        Where each is.

    Raises:
        FastSDError: what `place` raises; what was placed before stays.
    """
    prepare_places(places, ui)
    ref = config.model.strip()
    if ref == "auto":
        ref = _automatic(ui, places)
    named = [(ref, "checkpoint")] if ref else []
    for kind in ("lora", "vae", "text-encoder", "embedding", "upscaler"):
        named += [(item, kind) for item in listed(getattr(config, kind.replace("-", "_")))]
    placed: list[PlacedModel] = []
    base = None
    with drive_errors(places):
        # Each is looked at before the first is fetched: a slip in the last costs nobody gigabytes.
        for needed in [_find(item, ui, places, machine, kind=kind, t5=config.t5) for item, kind in named]:
            new = place_needed(needed, ui, places)
            placed += [model for model in new if base is None or model.kind not in BASE_KINDS]
            base = base or next((model for model in new if model.kind in BASE_KINDS), None)
    placed.sort(key=lambda model: model.kind not in BASE_KINDS)
    for model in placed:
        logger.info("%s (%s): %s", model.path.name, model.kind, model.how)
        if base is not None:
            _say_if_other_family(model, base)
    offer_workflow(placed, ui, places)
    return placed


def offer_workflow(placed: Sequence[PlacedModel], ui: WebUI, places: Places, *, keep: bool = False) -> None:
    """Write ComfyUI's workflow with these files, and say where it is; nothing for other web UIs."""
    workflow = write_workflow(placed, ui, places, keep=keep) if ui.key == "comfyui" else None
    if workflow is not None:
        logger.info("A workflow with these files is in ComfyUI's list of workflows: %s", workflow.stem)


def _automatic(ui: WebUI, places: Places) -> str:
    with drive_errors(places):
        folders = dict.fromkeys(store_folder(places, ui, kind) for kind in BASE_KINDS if kind in dict(ui.folders))
        there = sorted(path.name for folder in folders for path in folder.rglob("*") if is_base_file(path))
    why = f"{len(there)} in {places.store}: {', '.join(there[:5])}" if there else "there is none yet, so sd15 is used"
    logger.info("Base models: %s.", why)
    return "" if there else "sd15"


def _say_if_other_family(model: PlacedModel, base: PlacedModel) -> None:
    own, wanted = base_family(model.family), base_family(base.family)
    if model.kind not in BASE_KINDS and own and wanted and own != wanted:
        logger.warning(
            "%s is a %s for %s models, and the base model %s is of %s: together they have no effect or stop with an "
            "error.",
            model.path.name,
            KINDS[model.kind],
            own,
            base.path.name,
            wanted,
        )


@contextlib.contextmanager
def drive_errors(places: Places) -> Iterator[None]:
    """Drive can go at any moment: what the system says of a file becomes a sentence that names it."""
    try:
        yield
    except OSError as err:
        with file_errors(err.filename or places.store, "use"):
            raise


def listed(text: str) -> list[str]:
    """The words of a text, which commas separate."""
    return [word for word in (word.strip() for word in text.split(",")) if word]


def place_model(ref: str, ui: WebUI, places: Places, *, kind: str = "checkpoint") -> PlacedModel:
    """Put a model where a web UI looks for it; as `place`, whose first file of that kind is given.

    Args:
        ref: as for `place`.
        ui: the web UI, as `find_ui` gives it.
        places: its folders, as `find_places` gives them.
        kind: a key of KINDS.

    Returns:
        Where that file is.
    """
    placed = place(ref, ui, places, kind=kind)
    wanted = BASE_KINDS if kind == "checkpoint" else (kind,)
    return next((model for model in placed if model.kind in wanted), placed[0])


def place(
    ref: str,
    ui: WebUI,
    places: Places,
    *,
    kind: str = "auto",
    machine: Machine | None = None,
    t5: str = "auto",
    root: Path | str | None = None,
) -> list[PlacedModel]:
    """Put a model, and what it needs beside it, where a web UI looks for them; each file is looked at before.

    Args:
        ref: a registry key, a file, a Diffusers folder, a link, a Hub id, or the name or folder of a DreamBooth
            session: its finished model, or its LoRA with the base model.
        ui: the web UI, as `find_ui` gives it.
        places: its folders, as `find_places` gives them.
        kind: a key of KINDS, checkpoint meaning any base model; auto: what it is.
        machine: decides the sizes; this machine when None.
        t5: T5 precision: dtype of Flux's large text encoder: auto, fp8 or fp16.
        root: where sessions lie; None: the usual place.

    Returns:
        Where they are, what was named first. A file of the user's is linked; a download is kept in the store; a
        Diffusers folder is converted to one file in the store.

    Raises:
        ModelNotFound: there is no such model, it is of another kind, or this UI does not run its family.
        ModelError: there is no such model, it is of another kind, or this UI does not run its family.
        WebUIError: there is no such model, it is of another kind, or this UI does not run its family.
        DownloadError: it could not be brought or converted.
        DriveError: it could not be brought or converted.
        CheckpointError: it could not be brought or converted.
    """
    prepare_places(places, ui)
    with drive_errors(places):
        return place_needed(_find(ref, ui, places, machine, kind=kind, t5=t5, root=root), ui, places)


def _find(ref: str, ui: WebUI, places: Places, machine: Machine | None, **how: Any) -> Needed:
    return find_needed(ref, ui, places, machine or _machine_for(ref), **how)


def _machine_for(ref: str) -> Machine:
    """This machine; where sizes do not depend on it, it is not asked for, since that imports torch."""
    name = understand(ref)
    if name.what in ("file", "link", "folder") or (name.spec is not None and not parts_of(name.spec.family)):
        return Machine("this machine", 0, 0)
    return describe_machine()


def place_needed(needed: Needed, ui: WebUI, places: Places) -> list[PlacedModel]:
    """Bring the files that `find_needed` has found, and put each where the web UI looks for it.

    Raises:
        DiskFull: they do not fit, said before the first is fetched. And as for `place`.
    """
    for line in needed.reasons:
        logger.info("%s", line)
    missing = [file for file in needed.files if not _is_there(file, ui, places)]
    if len(needed.files) > 1:
        whole = sum(file.bytes or 0 for file in missing if file.source.startswith("https://"))
        check_room(
            places.store,
            whole,
            f"these {len(missing)} files",
            hint="Free some space in the data directory, or choose another one.",
        )
    placed = [_place(file, ui, places) for file in needed.files]
    for line in needed.warnings:
        logger.warning("%s", line)
    if placed and placed[0].kind == "diffusion-model":
        _say_what_is_missing(placed[0], ui, places)
    return placed


def _is_there(file: NeededFile, ui: WebUI, places: Places) -> bool:
    return file.kind != "auto" and bool(file.name) and (store_folder(places, ui, file.kind) / file.name).is_file()


def _place(file: NeededFile, ui: WebUI, places: Places) -> PlacedModel:
    known = file.kind if file.kind in dict(ui.folders) else "checkpoint"
    source, how = file.bring(store_folder(places, ui, known))
    found = look_at(source)
    kind = require_kind(source, found, file.kind)
    require_runs(found, ui, source.name)
    for note in found.notes:
        logger.info("%s: %s", source.name, note)
    if kind in BASE_KINDS:
        _warn_of_shape(source, ui)
    if found.four_bit:
        logger.warning(
            "%s holds 4-bit weights of bitsandbytes, which %s as it is installed here cannot draw with. Take a GGUF or "
            "fp8 file of the same model: a key, such as flux-dev, chooses the size.",
            source.name,
            ui.title,
        )
    require_folder(ui, kind)
    source = _moved(source, store_folder(places, ui, known), store_folder(places, ui, kind))
    folder, store = model_folder(places, ui, kind), store_folder(places, ui, kind)
    family = found.family or (file.family if file.family and kind in BASE_KINDS else None)
    name = _name_by_content(source)
    if source.resolve().is_relative_to(store):
        if name != source.name:
            logger.warning(
                "Web UIs detect the format by the file's ending: rename %s to %s, which is what it is.", source, name
            )
        return PlacedModel(folder / "store" / source.resolve().relative_to(store), kind, family, how)
    target = folder / name
    if target.exists() and not target.is_symlink():
        return PlacedModel(target, kind, family, "there already")
    for one in with_description(source):
        new_link(target.with_suffix(one.suffix) if one != source else target, one)
    return PlacedModel(target, kind, family, how)


def _name_by_content(source: Path) -> str:
    """A file's name with the ending that its content asks for: a web UI would unpickle a safetensors called .ckpt."""
    right = source.suffix.lower() in (".safetensors", ".sft") or not file_content.is_safetensors_file(source)
    return source.name if right else f"{source.stem}.safetensors"


def _moved(source: Path, arrived: Path, wanted: Path) -> Path:
    """A download whose kind only its content told goes to the folder of its kind; a user's own file stays."""
    if arrived == wanted or not source.resolve().is_relative_to(arrived) or source.parent != arrived:
        return source
    target = wanted / source.name
    if target.exists():
        return source
    wanted.mkdir(parents=True, exist_ok=True)
    for one in with_description(source):
        one.rename(target.with_suffix(one.suffix) if one != source else target)
    return target


def _say_what_is_missing(model: PlacedModel, ui: WebUI, places: Places) -> None:
    """A transformer alone draws nothing: name the parts that the store has not."""
    lacking = [
        f"fastsd webui place {keys[-1]} --ui {ui.key}"
        for part, keys in parts_of(model.family).items()
        if find_part(part, model.family, ui, places) is None
    ]
    if lacking:
        logger.warning(
            "%s is the model without its text encoders and VAE, which are not there yet. Download them: %s",
            model.path.name,
            "; ".join(lacking),
        )


def _warn_of_shape(path: Path, ui: WebUI) -> None:
    """Say that a model of other widths, like the embedded one, is for the playground alone."""
    # AUTOMATIC1111 alone reads a description of other widths from the file next to it.
    described = ui.key == "a1111" and path.with_suffix(".yaml").is_file()
    if path.suffix.lower() != ".safetensors" or described:
        return
    try:
        source = sources.open_file(path)
    except CheckpointError:
        return  # what is wrong with it was said already
    try:
        fact = source.tensors.get(_FIRST_LAYER)
    finally:
        source.close()
    if fact is not None and fact.shape[0] != _WIDTH:
        logger.warning(
            "%s has %d channels where a Stable Diffusion has %d: %s will refuse it. The playground can use it.",
            path.name,
            fact.shape[0],
            _WIDTH,
            ui.title,
        )
