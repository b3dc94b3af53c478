"""ControlNets where a web UI looks for them: those of the table by task, and any other file."""

from dataclasses import dataclass

from fastsd_helpers.controlnet import (
    controlnets,
    fetch_controlnet,
    find_controlnet,
    find_controlnets,
    tasks,
    total_bytes,
)
from fastsd_helpers.errors import ModelError, ModelNotFound
from fastsd_helpers.files import check_room
from fastsd_helpers.model_lookup import understand
from fastsd_helpers.options import Checked, option
from fastsd_helpers.runtime import logger
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.places import Places, model_folder, prepare_places, store_folder
from fastsd_helpers.webui.placing.model_files import base_family, look_at, require_kind
from fastsd_helpers.webui.placing.models import PlacedModel, listed, place
from fastsd_helpers.wording import size_in_words

__all__ = ["ControlNetConfig", "place_controlnet", "place_controlnets"]

_ALL = "all"
_NO_TASK = ("file", "folder", "link", "hub")  # what a word can be besides a task or a row's key


@dataclass(frozen=True)
class ControlNetConfig(Checked):
    """ControlNets to fetch: images that steer the drawing."""

    tasks: str = option(
        "",
        help=(
            "ControlNets: tasks such as canny, openpose, depth, or files and links; separated by "
            "commas; all: all that fit; empty: none"
        ),
        known="controlnets",
    )
    base: str = option(
        "auto", help="base model they are for; auto: the one chosen above", advanced=True, known="controlnet_bases"
    )


def place_controlnets(
    config: ControlNetConfig, ui: WebUI, places: Places, *, family: str | None = None
) -> list[PlacedModel]:
    """Fetch a ControlNet for each task of the settings.

    Args:
        config: the base model and the tasks.
        ui: the web UI, as `find_ui` gives it.
        places: its folders, as `find_places` gives them.
        family: of the base model that is used, for base "auto"; Stable Diffusion 1.5 when None.

    Returns:
        Where each is, in the order of the tasks.

    Raises:
        FastSDError: what `place_controlnet` raises.
    """
    base = (base_family(family) or "sd15") if config.base.strip() in ("auto", "") else config.base.strip()
    wanted = listed(config.tasks)
    if not wanted:
        logger.info("No ControlNet was chosen; for %s there is %s.", base, ", ".join(tasks(base, ui=ui.key)))
    if [word.lower() for word in wanted] == [_ALL]:
        rows = find_controlnets(base, ui=ui.key)
        wanted = [row.key for row in rows] or ["canny"]  # where there is none, the refusal says what works
        prepare_places(places, ui)
        what = f"the {len(rows)} ControlNets for {base} ({size_in_words(total_bytes(rows))})"
        check_room(store_folder(places, ui, "controlnet"), total_bytes(rows), what, hint="Name the tasks you need.")
    for task in wanted:  # a slip in the last one is said before the first is fetched
        if understand(task).what not in _NO_TASK:
            find_controlnet(base, task, ui=ui.key)
    placed = [place_controlnet(base, task, ui, places) for task in wanted]
    for model in placed:
        logger.info("%s (for %s): %s", model.path.name, base, model.how)
        if model.family and base_family(model.family) != base_family(family or model.family):
            logger.warning("%s is for %s, and the base model is of %s.", model.path.name, model.family, family)
    return placed


def place_controlnet(base: str | None, task: str, ui: WebUI, places: Places) -> PlacedModel:
    """Fetch the ControlNet for a base model and a task into the store, under the name by which the UI recognises it.

    Args:
        base: a registry key or a family; None only with a row's key, a file or a link.
        task: a task, a row's key (sd15-canny), a file, a link or a Hub id.
        ui: the web UI, as `find_ui` gives it.
        places: its folders, as `find_places` gives them.

    Returns:
        Where it is, and how it came there.

    Raises:
        ModelError: it does not go together with this base or this UI; the hint says what does.
        DownloadError: it could not be downloaded.
    """
    if understand(task).what in _NO_TASK:
        return place(task, ui, places, kind="controlnet")[0]
    if not base:
        row = next((row for row in controlnets() if row.key == task.strip().lower()), None)
        if row is None:
            raise ModelNotFound(
                f"'{task}' is a task, and ControlNets belong to a base model.", "Name it, such as --base sd15."
            )
        base = row.family
    row = find_controlnet(base, task, ui=ui.key)
    prepare_places(places, ui)
    # Flux's are plain LoRAs, which are loaded as such; SDXL's are read by the loaders of ControlNets.
    kind = "lora" if row.kind == "control-lora" and row.family == "flux" else "controlnet"
    path = fetch_controlnet(row, store_folder(places, ui, kind))
    found = look_at(path)
    require_kind(path, found, "lora" if found.kind == "lora" and row.kind == "control-lora" else "controlnet")
    if found.family and base_family(found.family) != row.family:
        raise ModelError(f"{path.name} is for {found.family}, not for {row.family}.", "Choose another ControlNet.")
    return PlacedModel(model_folder(places, ui, kind) / "store" / path.name, kind, row.family, "downloaded")
