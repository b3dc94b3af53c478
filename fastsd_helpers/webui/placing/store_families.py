"""Families of the base models that lie in the store: a web UI can be switched to any of them while it runs."""

from pathlib import Path

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.files import file_errors
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.places import Places

__all__ = ["families_in_store"]

_KINDS = ("checkpoint", "diffusion-model")
_CERTAIN_BYTES = 6 * 10**9  # no Stable Diffusion 1.5 or 2.1 is larger: on Drive nothing need be read
_SMALL_BYTES = 22 * 10**8  # nor is any SDXL or Flux smaller


def families_in_store(ui: WebUI, places: Places) -> dict[str, str]:
    """The families of the base models there, each with the name of one file; only those that the web UI runs.

    Sizes tell most of them; of the others the header is read, and one that cannot be read is left out.

    Raises:
        DriveError: the store does not answer.
    """
    found: dict[str, str] = {}
    for kind, name in ui.folders:
        folder = places.store / "models" / name
        if kind not in _KINDS:
            continue
        with file_errors(folder, "read"):
            files = [(path, path.stat().st_size) for path in sorted(folder.rglob("*")) if _is_model(path)]
        for path, size in files:
            family = _family_of(path, size)
            if family in ui.families:
                found.setdefault(family, path.name)
    return found


def _is_model(path: Path) -> bool:
    return path.suffix in (".safetensors", ".ckpt", ".gguf") and path.is_file()


def _family_of(path: Path, size: int) -> str | None:
    from fastsd_helpers.checkpoints.inspector import inspect

    if path.suffix == ".gguf":
        return "flux"
    if size < _SMALL_BYTES:
        return "sd15"
    if path.suffix == ".ckpt" or _CERTAIN_BYTES < size < 8 * 10**9:
        return "sdxl" if size > _CERTAIN_BYTES else "sd15"
    try:
        family = inspect(path, hashes=False).family
    except FastSDError:
        return "sdxl" if size > _CERTAIN_BYTES else None  # as much memory as its size wants
    return "flux" if family is not None and family.startswith("flux") else family
