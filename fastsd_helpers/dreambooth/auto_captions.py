"""Captions for a session's pictures that have none of their own, made by a captioning model."""

from pathlib import Path, PurePosixPath

from fastsd_helpers.captions import (
    DEFAULT_CAPTIONER,
    describe_pictures,
    name_subject,
    read_caption,
    write_caption,
)
from fastsd_helpers.dreambooth.dataset import load_dataset, prompt_of, recorded_images, settle_exchange
from fastsd_helpers.runtime import describe_device
from fastsd_helpers.sessions import Session

__all__ = ["caption_pictures"]


def caption_pictures(session: Session, *, model: str = DEFAULT_CAPTIONER) -> list[Path]:
    """Describe every prepared picture that has no caption, with the words of its name in the description.

    Writes captions/NAME.txt one by one, so a stop loses nothing; captions that are there stay as they are. A run that
    has begun with other captions goes on only with --restart.

    Returns:
        The files that were written.

    Raises:
        DatasetError: nothing is prepared. ModelNotFound, WrongFamily: the model cannot be used.
    """
    load_dataset(session)  # every picture is there and unchanged
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
