"""What is to be said of prepared images and their prompts before a training begins, and what cannot be trained on."""

import math
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from fastsd_helpers.captions.prompts import read_caption, words_of
from fastsd_helpers.dreambooth.dataset.buckets import size_of
from fastsd_helpers.dreambooth.dataset.prepared import Dataset, recorded_images
from fastsd_helpers.sessions import Session
from fastsd_helpers.wording import list_some

__all__ = ["advise", "least_tokens", "long_prompts_line", "notes_on_prepared"]

_MOST_TOKENS = 77
_MANY = 100  # images of one subject
# Source: the pattern of CLIP's byte-pair encoding. Each piece is one token or more.
_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_]+|\d|[^\s\w]+|_", re.IGNORECASE)


def least_tokens(prompt: str) -> int:
    """How many tokens a prompt has at the least, start and end with it; no tokenizer is needed."""
    return len(_PIECES.findall(prompt)) + 2


def long_prompts_line(
    prompts: dict[str, str], count: Callable[[str], int] = least_tokens, *, most: int = _MOST_TOKENS
) -> str | None:
    """A sentence on the prompts that are longer than a text encoder reads; None when there are none.

    Args:
        prompts: image -> prompt.
        count: tokens of a prompt, start and end with them.
        most: how many are read.
    """
    cut = [name for name, prompt in prompts.items() if count(prompt) > most]
    if not cut:
        return None
    return (
        f"{len(cut)} of {len(prompts)} prompts are longer than the {most} tokens the model reads: their "
        f"ends are truncated ({list_some(cut)}). Put the important words first, or shorten them."
    )


def notes_on_prepared(session: Session, images: list[dict[str, Any]], *, size: int, chosen: bool) -> list[str]:
    """Say what is to be said of images that take the place of those in the session's record.

    Args:
        images: what session.json will say about each.
        size: side they were prepared with, in pixels.
        chosen: the user named photos that are only measured.
    """
    notes = []
    held_out = [PurePosixPath(item["file"]).name for item in images if item["held_out"]]
    if held_out and not chosen:
        notes.append(
            f"Held out: {list_some(held_out)}. One photo of ten is never trained on (validation split); "
            "with hold-out none all are trained on."
        )
    train = len(images) - len(held_out)
    if train == 1:
        notes.append("With one image the model overfits: 5 to 30 photos from different sides work better.")
    if train > _MANY:
        notes.append(f"{train} images are many for one subject: 5 to 30 good ones usually work better, and faster.")
    said = {PurePosixPath(item["file"]).name: item["caption"] or item["stem_words"] for item in images}
    notes += filter(None, [long_prompts_line(said)])
    odd = sum(item["method"] == "none" and not _is_square(item["box"]) for item in images)
    if odd:
        notes.append(
            f"{odd} of {len(images)} images are not square: training sorts them into aspect-ratio buckets, and a dry "
            "run of it shows at which size each is trained and what is cut off."
        )
    trained = (session.record.get("settings") or {}).get("resolution")
    if isinstance(trained, int) and trained > size:
        notes.append(
            f"This session is trained at {trained} px, and these are {size} px: prepare them with size {trained}."
        )
    progress, recorded = session.record.get("progress") or {}, recorded_images(session)
    if recorded and (progress.get("stage") or progress.get("step")):
        before = {(item["sha256"], item["held_out"], _prompt_before(session, item)) for item in recorded}
        if before != {(item["sha256"], item["held_out"], item["caption"] or item["stem_words"]) for item in images}:
            notes.append(
                "Training has started on other images or prompts: resuming would mix the two sets, so start "
                "again with --restart."
            )
    return notes


def _is_square(box: list[int]) -> bool:
    return box[2] - box[0] == box[3] - box[1]


def _prompt_before(session: Session, item: dict[str, Any]) -> str:
    """What an image that was prepared before says by itself: its caption now, else the words of its name."""
    stem = PurePosixPath(item["file"]).stem
    return read_caption(session.captions / f"{stem}.txt") or item.get("stem_words", words_of(f"{stem}.png"))


def advise(
    session: Session,
    dataset: Dataset,
    *,
    resolution: int,
    instance_prompt: str | None,
    tokenizer: Any = None,
    most_tokens: int = _MOST_TOKENS,
) -> list[str]:
    """Say what of the user's would not be used as it was meant; `resolution` is the largest that is trained at.

    Raises:
        DatasetError: an image cannot be read.
    """
    lines = []
    images = (*dataset.train, *dataset.held_out)
    # Of an image that keeps its shape, the side of the square of its area.
    small = min((round(math.sqrt(math.prod(size_of(image)))) for image in images), default=resolution)
    if small < resolution:
        lines.append(
            f"The images were prepared at {small} px and are enlarged to {resolution} px, which blurs them: prepare "
            f"them again with size {resolution} (--size {resolution}), or train at resolution {small}."
        )
    if tokenizer is not None:
        line = long_prompts_line(
            {image.path.name: image.prompt for image in images},
            lambda prompt: len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"]),
            most=most_tokens,
        )
        lines += [line] if line else []
    if instance_prompt and instance_prompt.strip():
        captions = sum(read_caption(session.captions / f"{image.path.stem}.txt") is not None for image in images)
        if captions:
            which = "any image" if captions == len(images) else f"{captions} of {len(images)} images"
            lines.append(
                f"The instance prompt (--instance-prompt) is not used for {which}: they have captions of their own."
            )
    return lines
