"""Values that a form offers beside free text: the sessions there are, models, readers, checkpoints."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from fastsd_helpers.dreambooth.resume import Generation
    from fastsd_helpers.sessions import Session

__all__ = ["OTHER", "SOURCES", "checkpoint_choices", "known_values"]

# The value of an entry that words the choice to type something else, as "a new session: type its name".
OTHER = "\0other"

# Key -> "module:function" of this library; the function gets the open session, or None, and returns what
# `known_values` returns.
SOURCES: dict[str, str] = {
    "readers": "fastsd_helpers.forms.reader_choice:reader_choices",
    "checkpoints": "fastsd_helpers.forms.known:checkpoint_choices",
    "controlnet_bases": "fastsd_helpers.forms.webui_known:known_controlnet_bases",
    "controlnets": "fastsd_helpers.forms.webui_known:known_controlnets",
    "model_files": "fastsd_helpers.forms.webui_known:known_model_files",
    "webui_embeddings": "fastsd_helpers.forms.webui_known:known_embeddings",
    "webui_loras": "fastsd_helpers.forms.webui_known:known_loras",
    "webui_text_encoders": "fastsd_helpers.forms.webui_known:known_text_encoders",
    "webui_upscalers": "fastsd_helpers.forms.webui_known:known_upscalers",
    "webui_models": "fastsd_helpers.forms.webui_known:known_models",
    "webui_start_models": "fastsd_helpers.forms.webui_known:known_start_models",
    "webui_vaes": "fastsd_helpers.forms.webui_known:known_vaes",
    "sessions": "fastsd_helpers.forms.recent:session_choices",
    "reading_sessions": "fastsd_helpers.forms.recent:reading_choices",
}


def known_values(key: str, session: "Session | None" = None) -> list[tuple[str, str]]:
    """List the known values of a setting as (what the form shows, value), the one to offer first at the front.

    Args:
        key: what the setting names with `option(known=...)`.
        session: the open session; None where there is none yet.

    Raises:
        KeyError: no such list; a fault of the settings class.
    """
    module, _, function = SOURCES[key].partition(":")
    return getattr(importlib.import_module(module), function)(session)


def checkpoint_choices(session: "Session | None") -> list[tuple[str, str]]:
    """The checkpoints of a session that can be exported: the newest first, the best by held-out loss where it is kept.

    A checkpoint that is not whole (or not yet synced) is not offered.
    """
    entries = [("the newest", "")]
    if session is None:
        return entries
    from fastsd_helpers.dreambooth.best import BEST, find_best
    from fastsd_helpers.dreambooth.resume.generation import list_generations

    best = find_best(session.checkpoints, str(session.record.get("run", 1)))
    if best is not None and best.loss is not None:
        entries.append((f"the best: {_stage(best.stage)} step {best.step}, held-out loss {best.loss:.4f}", BEST))
    for name in list_generations(session.checkpoints):
        generation = _whole(session.checkpoints, name)
        if generation is not None:
            entries.append((f"{_stage(generation.stage)} step {generation.step}", name))
    return entries


def _stage(name: str) -> str:
    return {"unet": "U-Net", "text_encoder": "text encoder"}.get(name, name)


def _whole(folder: "Path", name: str) -> "Generation | None":
    """A checkpoint whose files are all there, by their sizes: the hashes of gigabytes are looked at when it is used."""
    from fastsd_helpers.dreambooth.resume.generation import NotWhole, read_generation, verify_files

    try:
        generation = read_generation(folder, name)
        verify_files(generation, hashes=False)
    except NotWhole:
        return None
    return generation
