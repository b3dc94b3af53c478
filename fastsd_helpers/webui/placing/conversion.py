"""One file of a folder or a repository of the Hub: a whole pipeline converted, or the single weights file it holds."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from fastsd_helpers import checkpoints
from fastsd_helpers.downloads.pipeline import PIPELINE, Contents, Listing
from fastsd_helpers.errors import ModelError
from fastsd_helpers.files import check_room, placed
from fastsd_helpers.model_lookup import CONTROLNET, LORA, ModelKind, Name, base_model, find_folder, lora_file
from fastsd_helpers.registry import ModelSpec, family_of
from fastsd_helpers.runtime import logger
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.placing.bundles import require_family
from fastsd_helpers.webui.placing.model_files import BASE_KINDS, ENDINGS

__all__ = ["converted", "from_folder"]


def converted(ref: str, name: str, ui: WebUI, store: Path) -> Path:
    """One file of a Diffusers folder or repository; one that is newer than the folder is kept.

    Raises:
        WebUIError: this web UI does not run its family. CheckpointError, ModelError: it cannot be had or converted.
    """

    def accept(spec: ModelSpec) -> None:
        require_family(ui, spec.family, ref)

    def check(listing: Listing) -> None:
        require_family(ui, family_of(listing), ref)

    folder = find_folder(ref, base_model(accept, check))
    target = store / f"{name}.safetensors"
    newest = max((file.stat().st_mtime for file in folder.rglob("*") if file.is_file()), default=0)
    if target.is_file() and target.stat().st_mtime >= newest:
        return target
    logger.info("%s is converted to one file for %s.", name, ui.title)
    checkpoints.convert(folder, target, overwrite=True, hashes=False)
    return target


def from_folder(name: Name, kind: str, title: str, ui: WebUI, store: Path) -> tuple[Path, str]:
    """One file of a folder or repository: a whole pipeline is converted, of anything else its only weights are taken.

    Args:
        kind: of model, or auto.
        title: what a file is called that has no name of its own.

    Returns:
        The file, and how it came.

    Raises:
        ModelError: it is nothing that is one file; the hint says to give the file itself. And as for `converted`.
    """
    if kind in BASE_KINDS:
        return converted(name.text, title, ui, store), "converted"
    folder = find_folder(name.text, _one_of_any(ui, name.text) if kind == "auto" else _ONE.get(kind, LORA))
    if (folder / "model_index.json").is_file():
        return converted(name.text, title, ui, store), "converted"
    names = [path.name for path in folder.iterdir()]
    file = lora_file(folder) if set(names) & _ADAPTERS else folder / _only(name.text, names)
    if name.what == "folder":
        return file, "linked"
    target = store / f"{title}{file.suffix}"
    if not (target.is_file() and target.stat().st_size == file.stat().st_size):
        check_room(store, file.stat().st_size, title)
        with placed(target) as unfinished:
            shutil.copyfile(file, unfinished)
    return target, "downloaded"


_ONE = {"controlnet": CONTROLNET}
_ADAPTERS = {"pytorch_lora_weights.safetensors", "adapter_model.safetensors"}


def _only(where: str, names: Iterable[str]) -> str:
    files = sorted(name for name in names if name.lower().endswith(ENDINGS))
    if len(files) != 1:
        said = f"{len(files)} model files ({', '.join(files[:4])})" if files else "no model file"
        raise ModelError(f"{where} holds {said}.", "Give the file itself, or a link to it.")
    return files[0]


def _one_of_any(ui: WebUI, ref: str) -> ModelKind:
    """A whole pipeline of a family that the web UI runs, or one file of weights."""

    def wanted(listing: Listing) -> list[str]:
        if "model_index.json" not in listing.names:
            if set(listing.names) & _ADAPTERS:
                return LORA.contents.wanted(listing)
            return [_only(listing.where, [found for found in listing.names if "/" not in found])]
        require_family(ui, family_of(listing), ref)
        return PIPELINE.wanted(listing)

    def require(folder: Path) -> None:
        wanted(Listing.of_folder(folder))

    return ModelKind(Contents("model", wanted, require), None, "a file, a link to one, a Diffusers folder or a Hub id")
