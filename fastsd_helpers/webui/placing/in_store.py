"""What lies in the store: text encoders and VAE that a base model lacks, and the families of its base models.

A web UI can be switched to any of these families while it runs.
"""

from collections.abc import Iterator
from pathlib import Path

from fastsd_helpers.checkpoints import inspector
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.files import file_errors
from fastsd_helpers.registry import find_model
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.places import Places, model_folder, store_folder
from fastsd_helpers.webui.placing.bundles import file_name, parts_of
from fastsd_helpers.webui.placing.model_files import BASE_KINDS, ENDINGS, look_at

__all__ = ["families_in_store", "find_part", "is_base_file"]

_WORDS = {"T5": "t5", "CLIP": "clip_l", "VAE": "ae"}  # in the names that people give these files
_CERTAIN_BYTES = 6 * 10**9  # no Stable Diffusion 1.5 or 2.1 is larger: on Drive nothing need be read
_SMALL_BYTES = 22 * 10**8  # nor is any SDXL or Flux smaller


def find_part(part: str, family: str | None, ui: WebUI, places: Places, *, largest: bool = False) -> Path | None:
    """A part that a base model of a family needs beside it, wherever it was placed from; None when there is none.

    The names of the registry come first; then another file that is what is wanted, by its name and its content.

    Args:
        part: a key of `parts_of(family)`.
        largest: of two sizes rather the large one.
    """
    keys = parts_of(family)[part]
    rows = [find_model(key) for key in (keys if largest else keys[::-1])]
    kind = rows[0].kind
    if kind not in dict(ui.folders):
        return None
    folders = (model_folder(places, ui, kind), store_folder(places, ui, kind))
    there = {path.name: path for folder in folders for path in _models(folder)}
    exact = next((there[name] for row in rows if (name := file_name(row)) in there), None)
    if exact is not None:
        return exact
    named = (there[name] for name in sorted(there) if _WORDS[part] in name.lower())
    return next((path for path in named if _is_part(path, kind, family, told=part != "CLIP")), None)


def _models(folder: Path) -> Iterator[Path]:
    """Files of models in a folder, with links followed: to their owner's file."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in ENDINGS and path.is_file():
            yield path.resolve()


def _is_part(path: Path, kind: str, family: str | None, *, told: bool) -> bool:
    try:
        found = look_at(path)
    except FastSDError:
        return False
    # A CLIP-L is that of several families, so its file tells none.
    return found.kind == kind and found.family == (family if told else None)


def families_in_store(ui: WebUI, places: Places) -> dict[str, str]:
    """The families of the base models there, each with the name of one file; only those that the web UI runs.

    Sizes tell most of them; of the others the header is read, and one that cannot be read is left out.

    Raises:
        DriveError: the store does not answer.
    """
    found: dict[str, str] = {}
    for kind, name in ui.folders:
        folder = places.store / "models" / name
        if kind not in BASE_KINDS:
            continue
        with file_errors(folder, "read"):
            files = [(path, path.stat().st_size) for path in sorted(folder.rglob("*")) if is_base_file(path)]
        for path, size in files:
            family = _family_of(path, size)
            if family in ui.families:
                found.setdefault(family, path.name)
    return found


def _family_of(path: Path, size: int) -> str | None:
    if path.suffix == ".gguf":
        return "flux"
    if size < _SMALL_BYTES:
        return "sd15"
    if path.suffix == ".ckpt" or _CERTAIN_BYTES < size < 8 * 10**9:
        return "sdxl" if size > _CERTAIN_BYTES else "sd15"
    try:
        family = inspector.inspect(path, hashes=False).family
    except FastSDError:
        return "sdxl" if size > _CERTAIN_BYTES else None  # as much memory as its size wants
    return "flux" if family is not None and family.startswith("flux") else family


def is_base_file(path: Path) -> bool:
    """Whether a file can be a base model, by its name."""
    return path.suffix in (".safetensors", ".ckpt", ".gguf") and path.is_file()
