"""The readers that a form offers: those taught or shrunk in any session of this store, and the published ones."""

import json
from pathlib import Path
from typing import Any

from fastsd_helpers.files import size_in_words
from fastsd_helpers.registry import models

__all__ = ["reader_choices"]


def reader_choices(session: Any = None) -> list[tuple[str, str]]:
    """What the list of readers shows, and its value: auto, this session's readers, those of others, published ones.

    Args:
        session: the open reading session; None where there is none.
    """
    entries = [("auto: the best one for the images", "auto")]
    if session is not None:
        own = [session.folder]
        try:
            others = sorted(path for path in session.folder.parent.iterdir() if path.is_dir() and path not in own)
        except OSError:  # a Drive that is busy: what is known without it is offered
            others = []
        for folder in [*own, *others]:
            entries += _of(folder)
    for spec in models(kind="reader"):
        size = f", {size_in_words(spec.about_bytes)}" if spec.about_bytes else ""
        entries.append((f"{spec.key}: {spec.title}{size}", spec.key))
    return entries


def _of(folder: Path) -> list[tuple[str, str]]:
    """The reader a session taught last, and its int8 copy."""
    try:
        record = json.loads((folder / "session.json").read_text(encoding="utf-8"))
        path = folder / str((record.get("taught") or {})["path"])
        known = json.loads((path.parent / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    found = []
    if (path / "config.json").is_file():
        rate = f"{100 * known.get('cer_after', 0):.1f} % CER"
        found.append((f"fine-tuned in {folder.name}: {rate}, {known.get('train_lines', 0)} lines", str(path)))
        if (folder / "int8" / "quantization.json").is_file():
            found.append((f"quantized in {folder.name}: int8, for a CPU", str(folder / "int8")))
    return found
