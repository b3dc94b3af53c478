"""The captions of prepared images: which has which prompt, a new one from a person, those of a captioning model."""

from pathlib import Path, PurePosixPath
from typing import Any

from fastsd_helpers import demo
from fastsd_helpers.captions.prompts import (
    DEFAULT_CAPTIONER,
    describe_pictures,
    name_subject,
    read_caption,
    write_caption,
)
from fastsd_helpers.device import describe_device
from fastsd_helpers.dreambooth.dataset.prepared import (
    PromptRow,
    load_dataset,
    prompt_of,
    prompt_table,
    recorded_images,
    settle_exchange,
)
from fastsd_helpers.errors import DatasetError, FastSDError
from fastsd_helpers.inert import require_inert
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions import Session
from fastsd_helpers.wording import list_some

__all__ = ["caption_pictures", "find_picture", "prompt_rows", "set_caption"]


def prompt_rows(session: Session) -> list[PromptRow]:
    """List every prepared image with its exact prompt; tokens are counted when the model's tokenizer is here.

    Raises:
        DatasetError: nothing is prepared.
    """
    return prompt_table(session, tokenizer=_tokenizer_here(session))


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
        raise DatasetError(
            f"Session {session.name!r} has no prepared images.",
            f"Prepare your photos first: fastsd dreambooth prepare {session.name}",
        )
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
    return list_some([PurePosixPath(item["file"]).name for item in items], 8)


def set_caption(session: Session, name: str, words: str | None) -> Path:
    """Give a prepared image these words as its exact prompt; None or blanks go back to what its photo came with.

    Writes captions/NAME.txt. A run that has begun with other captions goes on only with --restart.

    Raises:
        DatasetError: no image of that name.
        DriveError: the caption cannot be written.
    """
    settle_exchange(session)  # or it would be written beside images that are about to go
    item = find_picture(session, name)
    path = session.captions / f"{PurePosixPath(item['file']).stem}.txt"
    # The caption that came with the photo, or else none: then its name speaks.
    write_caption(path, words if words and words.strip() else item.get("came_with", item.get("caption")))
    return path


def caption_pictures(session: Session, *, model: str = DEFAULT_CAPTIONER) -> list[Path]:
    """Describe every prepared image that has no caption, with the words of its name in the description.

    Writes captions/NAME.txt one by one, so a stop loses nothing; captions that are there stay as they are. A run that
    has begun with other captions goes on only with --restart.

    Returns:
        The files that were written.

    Raises:
        DatasetError: nothing is prepared. ModelNotFound, WrongFamily: the model cannot be used.
    """
    load_dataset(session)  # every image is there and unchanged
    missing = []
    settle_exchange(session)
    for item in recorded_images(session):
        name = PurePosixPath(item["file"])
        caption = session.captions / f"{name.stem}.txt"
        if read_caption(caption) is None:
            subject = prompt_of(session, item, None)
            missing.append((session.folder / name, caption, subject))
    if not missing:
        return []
    written = []
    described = describe_pictures([path for path, _, _ in missing], model=model, device=describe_device().kind)
    for (_, caption, subject), words in zip(missing, described, strict=True):
        session.captions.mkdir(exist_ok=True)
        write_caption(caption, name_subject(words, subject))
        written.append(caption)
    return written
