"""Values that a form offers beside free text: the sessions there are, models, readers, checkpoints."""

import importlib
from typing import TYPE_CHECKING, Any

from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.registry import models
from fastsd_helpers.wording import size_in_words

if TYPE_CHECKING:
    from pathlib import Path

    from fastsd_helpers.dreambooth.resume import Generation
    from fastsd_helpers.sessions import Session

__all__ = ["OTHER", "SOURCES", "checkpoint_choices", "known_values", "reader_choices"]

# The value of an entry that words the choice to type something else, as "a new session: type its name".
OTHER = "\0other"

# Key -> "module:function" of this library, or "module:function:kind"; the function gets the open session, or None, and
# the kind where there is one, and returns what `known_values` returns.
SOURCES: dict[str, str] = {
    "readers": "fastsd_helpers.forms.widgets.known:reader_choices",
    "checkpoints": "fastsd_helpers.forms.widgets.known:checkpoint_choices",
    "controlnet_bases": "fastsd_helpers.forms.webui.known:known_controlnet_bases",
    "controlnets": "fastsd_helpers.forms.webui.known:known_controlnets",
    "model_files": "fastsd_helpers.forms.webui.known:known_model_files",
    "webui_embeddings": "fastsd_helpers.forms.webui.known:known_files:embedding",
    "webui_loras": "fastsd_helpers.forms.webui.known:known_files:lora",
    "webui_text_encoders": "fastsd_helpers.forms.webui.known:known_files:text-encoder",
    "webui_upscalers": "fastsd_helpers.forms.webui.known:known_files:upscaler",
    "webui_models": "fastsd_helpers.forms.webui.known:known_models",
    "webui_start_models": "fastsd_helpers.forms.webui.known:known_start_models",
    "webui_vaes": "fastsd_helpers.forms.webui.known:known_files:vae",
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
    module, function, *kind = SOURCES[key].split(":")
    return getattr(importlib.import_module(module), function)(session, *kind)


def checkpoint_choices(session: "Session | None") -> list[tuple[str, str]]:
    """The checkpoints of a session that can be exported: the newest first, the best by held-out loss where it is kept.

    A checkpoint that is not whole (or not yet synced) is not offered.
    """
    entries = [("the newest", "")]
    if session is None:
        return entries
    from fastsd_helpers.dreambooth.results.best_checkpoint import BEST, find_best
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


def reader_choices(session: Any = None) -> list[tuple[str, str]]:
    """What the list of readers shows, and its value: auto, this session's readers, those of others, published ones.

    Args:
        session: the open reading session; None where there is none.
    """
    entries = [("auto: what suits the images", "auto")]
    if session is not None:
        own = [session.folder]
        try:
            others = sorted(path for path in session.folder.parent.iterdir() if path.is_dir() and path not in own)
        except OSError:  # a Drive that is busy: what is known without it is offered
            others = []
        for folder in [*own, *others]:
            entries += _taught_in(folder)
    for spec in models(kind="reader"):
        size = f", {size_in_words(spec.about_bytes)}" if spec.about_bytes else ""
        entries.append((f"{spec.key}: {spec.title}{size}", spec.key))
    return entries


def _taught_in(folder: "Path") -> list[tuple[str, str]]:
    """The reader a session taught last, and its int8 copy."""
    taught = read_object(folder / "session.json").get("taught")
    path = folder / str(taught.get("path", "") if isinstance(taught, dict) else "")
    known = read_object(path.parent / "result.json")
    found = []
    if known and (path / "config.json").is_file():
        rate = f"{100 * known.get('cer_after', 0):.1f} % CER"
        found.append((f"fine-tuned in {folder.name}: {rate}, {known.get('train_lines', 0)} lines", str(path)))
        if (folder / "int8" / "quantization.json").is_file():
            found.append((f"quantized in {folder.name}: int8, for a CPU", str(folder / "int8")))
    return found
