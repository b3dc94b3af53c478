"""What Forge Neo starts with: the base model and the files beside it, written into its own settings."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.runtime import logger
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.places import Places, model_folder
from fastsd_helpers.webui.placing.model_files import BASE_KINDS, PlacedModel, base_family

__all__ = ["choose_in_settings"]

# Its names for the families (modules_forge/presets.py).
_PRESETS = {"sd15": "sd", "sdxl": "xl", "flux": "flux"}
_MODULES = "forge_additional_modules"
_VERSION = re.compile(r"""^VERSION_UID\b[^=\n]*= *["']([^"'\n]+)["']""", re.MULTILINE)


def choose_in_settings(placed: Sequence[PlacedModel], ui: WebUI, places: Places) -> None:
    """Write the base model, its text encoders and its VAE into the settings file; every other setting stays.

    The file also gets the mark of its version: with settings of another one, or of AUTOMATIC1111 in the same store, it
    asks on its terminal whether to go on, and nobody is there to answer.

    Raises:
        DriveError: the file cannot be read or written.
    """
    file = places.store / "config.json"
    settings = _read(file)
    base = next((model for model in placed if model.kind in BASE_KINDS), None)
    if settings is None:
        if base is not None:
            logger.warning("%s is not a settings file, so the model has to be chosen on the page.", file)
        return
    new = _chosen(base, placed, settings, ui, places) if base is not None else {}
    version = _version_of(places)
    if version is not None and (new or file.exists()):  # one that is not there it makes itself
        new["VERSION_UID"] = version
    if any(settings.get(key) != value for key, value in new.items()):
        with file_errors(file, "write"):
            write_atomic(file, json.dumps(settings | new, indent=4).encode())


def _chosen(
    base: PlacedModel, placed: Sequence[PlacedModel], settings: dict[str, Any], ui: WebUI, places: Places
) -> dict[str, Any]:
    name = base.path.relative_to(model_folder(places, ui, base.kind)).as_posix()
    preset = _PRESETS.get(base_family(base.family) or "")
    beside = sorted(str(model.path) for model in placed if model.kind in ("vae", "text-encoder"))
    new: dict[str, Any] = {"sd_model_checkpoint": name}
    if preset is not None:
        own = f"{_MODULES}_{preset}"
        # Those of another family would be loaded into this one.
        chosen = beside or (settings.get(own) or [])
        new |= {"forge_preset": preset, f"forge_checkpoint_{preset}": name, own: chosen, _MODULES: chosen}
    elif beside:
        new[_MODULES] = beside
    return new


def _version_of(places: Places) -> str | None:
    """What its code takes for the mark of its own version; None when that has none."""
    try:
        text = (places.code / "modules" / "launch_utils.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = _VERSION.search(text)
    return found[1] if found else None


def _read(file: Path) -> dict[str, Any] | None:
    with file_errors(file, "read"):
        if not file.exists():
            return {}
        text = file.read_bytes()
    try:
        found = json.loads(text or b"{}")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
