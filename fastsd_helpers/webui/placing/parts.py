"""The text encoders and the VAE that a base model lacks, as far as they lie where a web UI looks for them."""

from collections.abc import Iterator
from pathlib import Path

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.registry import find_model
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.places import Places, model_folder, store_folder
from fastsd_helpers.webui.placing.bundles import file_name, parts_of
from fastsd_helpers.webui.placing.model_files import ENDINGS, look_at

__all__ = ["find_part"]

_WORDS = {"T5": "t5", "CLIP": "clip_l", "VAE": "ae"}  # in the names that people give these files


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
    there = {path.name: path for folder in _folders(kind, ui, places) for path in _models(folder)}
    exact = next((there[name] for row in rows if (name := file_name(row)) in there), None)
    if exact is not None:
        return exact
    named = (there[name] for name in sorted(there) if _WORDS[part] in name.lower())
    return next((path for path in named if _is_part(path, kind, family, told=part != "CLIP")), None)


def _folders(kind: str, ui: WebUI, places: Places) -> tuple[Path, Path]:
    return model_folder(places, ui, kind), store_folder(places, ui, kind)


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
