"""The captions of prepared images as a person edits them: which image has which prompt, and a new one for it."""

import logging
from pathlib import Path, PurePosixPath
from typing import Any

from fastsd_helpers import demo
from fastsd_helpers.captions import write_caption
from fastsd_helpers.dreambooth.dataset import PromptRow, prompt_table, recorded_images, settle_exchange
from fastsd_helpers.errors import DatasetError, FastSDError
from fastsd_helpers.inert import require_inert
from fastsd_helpers.sessions import Session

__all__ = ["find_picture", "prompt_rows", "set_caption"]

logger = logging.getLogger("fastsd_helpers")


def prompt_rows(session: Session, *, instance_prompt: str | None = None) -> list[PromptRow]:
    """List every prepared image with its exact prompt; tokens are counted when the model's tokenizer is here.

    Raises:
        DatasetError: nothing is prepared.
    """
    return prompt_table(session, instance_prompt, _tokenizer_here(session))


def _tokenizer_here(session: Session) -> Any:
    """The tokenizer of the session's model, when that is on this machine: counting is not worth a download."""
    ref = (session.record.get("base_model") or {}).get("ref")
    if (session.record.get("dataset") or {}).get("demo") and ref is None:
        ref = "demo"
    folder = demo.MODEL_FOLDER if ref == "demo" else Path(str(ref)).expanduser()
    if not ref or not (folder / "tokenizer").is_dir():
        return None
    try:
        from transformers import CLIPTokenizer
    except ImportError:
        return None
    try:
        require_inert(folder / "tokenizer")
        return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    except (OSError, ValueError, FastSDError) as err:
        logger.debug("The tokenizer in %s cannot be used: %s.", folder, err)
        return None


def find_picture(session: Session, name: str) -> dict[str, Any]:
    """Find what session.json says about an image by its file name, its stem, or the name of the photo it came from.

    Raises:
        DatasetError: there is none of that name, or several are meant.
    """
    images = recorded_images(session)
    if not images:
        raise DatasetError(f"Session {session.name!r} has no prepared images.", "Run prepare with your photos first.")
    for keys in (_own_names, _source_names):
        found = [item for item in images if name in keys(item)]
        if len(found) == 1:
            return found[0]
        if found:
            raise DatasetError(f"Several images are named {name!r}.", f"Choose one of: {_names_of(found)}.")
    raise DatasetError(f"No prepared image is named {name!r}.", f"Choose one of: {_names_of(images)}.")


def _own_names(item: dict[str, Any]) -> set[str]:
    path = PurePosixPath(item["file"])
    return {item["file"], path.name, path.stem}


def _source_names(item: dict[str, Any]) -> set[str]:
    # A record that was rebuilt from the folder does not know the photos.
    path = PurePosixPath(item.get("source", ""))
    return {str(path), path.name, path.stem}


def _names_of(items: list[dict[str, Any]]) -> str:
    names = [PurePosixPath(item["file"]).name for item in items]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def set_caption(session: Session, name: str, words: str | None) -> Path:
    """Give a prepared image these words as its exact prompt; None or blanks go back to what its photo came with.

    Writes captions/NAME.txt. A run that has begun with other captions goes on only with --restart.

    Raises:
        DatasetError: no image of that name. DriveError: the caption cannot be written.
    """
    settle_exchange(session)  # or it would be written beside pictures that are about to go
    item = find_picture(session, name)
    path = session.captions / f"{PurePosixPath(item['file']).stem}.txt"
    # The caption that came with the photo, or else none: then its name speaks.
    write_caption(path, words if words and words.strip() else item.get("came_with", item.get("caption")))
    return path
