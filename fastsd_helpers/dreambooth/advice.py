"""What is to be said of prepared images and their prompts before a training begins, and what cannot be trained on."""

import re
from collections.abc import Callable
from typing import Any

from fastsd_helpers.captions import read_caption
from fastsd_helpers.dreambooth.dataset import Dataset
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.picture_files import PictureProblem, open_picture
from fastsd_helpers.sessions import Session

__all__ = ["MOST_TOKENS", "advise", "least_tokens", "long_prompts_line"]

MOST_TOKENS = 77
# Source: the pattern of CLIP's byte-pair encoding. Each piece is one token or more.
_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_]+|\d|[^\s\w]+|_", re.IGNORECASE)


def least_tokens(prompt: str) -> int:
    """How many tokens a prompt has at the least, start and end with it; no tokenizer is needed."""
    return len(_PIECES.findall(prompt)) + 2


def long_prompts_line(prompts: dict[str, str], count: Callable[[str], int] = least_tokens) -> str | None:
    """A sentence on the prompts that are longer than a text encoder reads; None when there are none.

    Args:
        prompts: image -> prompt.
        count: tokens of a prompt, start and end with them.
    """
    cut = [name for name, prompt in prompts.items() if count(prompt) > MOST_TOKENS]
    if not cut:
        return None
    shown = ", ".join(cut[:3]) + (f" and {len(cut) - 3} more" if len(cut) > 3 else "")
    return (
        f"{len(cut)} of {len(prompts)} prompts are longer than the {MOST_TOKENS} tokens the model reads: their "
        f"ends are truncated ({shown}). Put the important words first, or shorten them."
    )


def advise(
    session: Session, dataset: Dataset, *, resolution: int, instance_prompt: str | None, tokenizer: Any = None
) -> list[str]:
    """Say what of the user's would not be used as it was meant.

    Raises:
        DatasetError: an image is not square.
    """
    lines = []
    images = (*dataset.train, *dataset.held_out)
    sides = {}
    for image in images:
        width, height = _size_of(image.path)
        if width != height:
            raise DatasetError(
                f"{image.path.name} is {width} x {height}; training needs squares.",
                "Prepare the images again with --crop smart or --crop center.",
            )
        sides[image.path.name] = width
    small = min(sides.values(), default=resolution)
    if small < resolution:
        lines.append(
            f"The images were prepared at {small} px and are enlarged to {resolution} px, which blurs them: prepare "
            f"them again with size {resolution} (--size {resolution}), or train at resolution {small}."
        )
    if tokenizer is not None:
        line = long_prompts_line(
            {image.path.name: image.prompt for image in images},
            lambda prompt: len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"]),
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


def _size_of(path: Any) -> tuple[int, int]:
    try:
        with open_picture(path) as picture:
            return picture.size
    except PictureProblem as err:
        raise DatasetError(f"{path.name} {err.problem}.", "Prepare the images again.") from err
