"""The prepared images of a session: how a new set takes the old one's place, and how the set is read for training.

session.json is the moment at which an exchange counts, so a run that is killed anywhere leaves the old or the new set.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastsd_helpers.captions.prompts import read_caption, resolve_prompt
from fastsd_helpers.dreambooth.families import Framing
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import file_errors, sha256_of, write_atomic
from fastsd_helpers.runtime import fault_point, logger
from fastsd_helpers.sessions import Session
from fastsd_helpers.sessions.record import read_record

__all__ = [
    "PICTURE_FOLDERS",
    "Dataset",
    "PreparedImage",
    "PromptRow",
    "exchange_pictures",
    "finish_exchange",
    "load_dataset",
    "prompt_of",
    "prompt_table",
    "recorded_images",
    "settle_exchange",
    "start_exchange",
    "what_changed",
]

PICTURE_FOLDERS = ("instance_images", "held_out_images", "captions")
_NEW = ".prepare-new"
_OLD = ".prepare-old"
_REPLACED_BY = "replaced-by"
_CLIP_TOKENS = 77


@dataclass(frozen=True)
class PreparedImage:
    """One image to train on: an RGB PNG file and its exact prompt."""

    path: Path
    sha256: str
    prompt: str
    framing: Framing | None = None  # where it was cut from its photo; None for the whole of it
    focus: tuple[float, float] = (0.5, 0.5)  # its subject's place, as shares of width and height


@dataclass(frozen=True)
class Dataset:
    """The images of a session; those held out are never trained on."""

    train: tuple[PreparedImage, ...]
    held_out: tuple[PreparedImage, ...]


@dataclass(frozen=True)
class PromptRow:
    """One line of the prompt table; `tokens` counts start and end too and is None without a tokenizer."""

    image: str
    prompt: str
    tokens: int | None
    truncated: bool
    held_out: bool = False


def recorded_images(session: Session) -> list[dict[str, Any]]:
    """What session.json says about every prepared image; empty before the first prepare."""
    return (session.record.get("dataset") or {}).get("images") or []


# ----------------------------------------------------------------------------------------------- exchange


def start_exchange(session: Session) -> Path:
    """Tidy up after an exchange that was cut off, and make the empty folder for a new set of images."""
    finish_exchange(session)
    new = session.folder / _NEW
    with file_errors(new, "create"):
        for name in PICTURE_FOLDERS:
            (new / name).mkdir(parents=True)
    return new


def exchange_pictures(
    session: Session, new: Path, dataset: dict[str, Any], *, stay: "frozenset[str] | set[str]" = frozenset()
) -> None:
    """Put the new images in the old ones' place and record them; the old ones are deleted last.

    Args:
        session: whose lock is held.
        new: the folder of `start_exchange`, filled.
        dataset: what session.json shall say about the images.
        stay: files in the images' folders that are a user's ("instance_images/dog.jpg") and are not touched.

    Raises:
        DriveError: the old images and their record are back in place.
        DiskFull: the old images and their record are back in place.
    """
    old, before = session.folder / _OLD, session.record.get("dataset", {})
    token = secrets.token_hex(8)
    try:
        with file_errors(session.folder, "write to"):
            old.mkdir()
            # The bare token, as the version before reads it too, unless files stay.
            marker = {
                "token": token,
                "stay": sorted(stay),
                "new": {name: os.listdir(new / name) for name in PICTURE_FOLDERS},
            }
            write_atomic(old / _REPLACED_BY, (json.dumps(marker) if stay else token).encode())
            for name in PICTURE_FOLDERS:
                if any(file.startswith(f"{name}/") for file in stay):
                    _exchange_files(session, new, old, name, stay)
                    continue
                if (session.folder / name).exists():
                    os.replace(session.folder / name, old / name)
                fault_point("prepare.between")
                os.replace(new / name, session.folder / name)
        fault_point("prepare.before_record")
        session.save(dataset={"id": token, **dataset})
    except BaseException:
        # A failed save leaves its changes in memory; what is on disk decides.
        session.record["dataset"] = before
        finish_exchange(session)
        raise
    fault_point("prepare.after_record")
    _remove(old)


def _exchange_files(session: Session, new: Path, old: Path, name: str, stay: "frozenset[str] | set[str]") -> None:
    """Exchange one folder file by file, so that those that stay are never renamed."""
    (old / name).mkdir()
    for path in sorted((session.folder / name).iterdir()):
        if not _holds_any(f"{name}/{path.name}", stay):
            os.replace(path, old / name / path.name)
    fault_point("prepare.between")
    for path in sorted((new / name).iterdir()):
        os.replace(path, session.folder / name / path.name)


def _holds_any(place: str, stay: "frozenset[str] | set[str] | list[str]") -> bool:
    return any(file == place or file.startswith(f"{place}/") for file in stay)


def finish_exchange(session: Session) -> None:
    """Bring an exchange that was cut off to its end, or back to its beginning when session.json does not know it."""
    old = session.folder / _OLD
    if not _was_recorded(session):
        marker = _read_marker(session)
        with file_errors(session.folder, "write to"):
            for name in PICTURE_FOLDERS:
                if not (old / name).is_dir():
                    continue
                if any(file.startswith(f"{name}/") for file in marker["stay"]):
                    _put_back(session, old, name, marker["new"].get(name, []))
                    continue
                _remove(session.folder / name)
                os.replace(old / name, session.folder / name)
    _remove(old)
    _remove(session.folder / _NEW)


def _put_back(session: Session, old: Path, name: str, new: list[str]) -> None:
    for file in new:
        if not (session.folder / _NEW / name / file).exists():  # it was moved in already
            (session.folder / name / file).unlink(missing_ok=True)
    for path in sorted((old / name).iterdir()):
        os.replace(path, session.folder / name / path.name)


def _read_marker(session: Session) -> dict[str, Any]:
    """What is known of an exchange under way: its token, the files that stay in it, and the new ones."""
    nothing: dict[str, Any] = {"token": "", "stay": [], "new": {}}
    marker = session.folder / _OLD / _REPLACED_BY
    with file_errors(marker, "read"):
        if not marker.is_file():
            return nothing
        text = marker.read_text(encoding="utf-8")
    try:
        return nothing | (json.loads(text) if text.startswith("{") else {"token": text})
    except ValueError:  # cut short: then nothing was recorded either
        return nothing


def settle_exchange(session: Session) -> None:
    """Before something is written beside the images: finish an exchange that was cut off, or undo it.

    Raises:
        SessionBusy: it is still going on, in another process.
    """
    if (session.folder / _OLD).is_dir():
        with session.lock():
            finish_exchange(session)


def _was_recorded(session: Session) -> bool:
    token = _read_marker(session)["token"]
    if not token:
        return False
    # From the disk: this object may have been opened before another process prepared.
    dataset = read_record(session.folder).record.get("dataset") or {}
    return dataset.get("id") == token


def _homes(session: Session) -> Callable[[str], Path]:
    """Where each recorded file is ("captions/dog.txt"), even after an exchange that was cut off; nothing is changed."""
    old = session.folder / _OLD
    stay = _read_marker(session)["stay"]
    # A folder that was exchanged whole is one or the other; where files stay, each file is.
    whole = {name for name in PICTURE_FOLDERS if not any(file.startswith(f"{name}/") for file in stay)}
    aside = (
        {name for name in PICTURE_FOLDERS if (old / name).is_dir()}
        if old.is_dir() and not _was_recorded(session)
        else set()
    )

    def home(file: str) -> Path:
        name = file.partition("/")[0]
        if name in aside and (name in whole or (old / file).exists()):
            return old / file
        return session.folder / file

    return home


def _remove(folder: Path) -> None:
    with file_errors(folder, "remove"):
        if folder.exists():
            shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------ reading


def load_dataset(session: Session, *, instance_prompt: str | None = None) -> Dataset:
    """List the session's prepared images with their exact prompts, after checking that each is still the same.

    Captions are read anew, so an edited, added or removed .txt in captions/ counts.

    Returns:
        PNG files, RGB: size x size, or with crop none of their own shape and about that area.

    Raises:
        DatasetError: nothing is prepared, or an image is missing or has changed.
    """
    found: dict[bool, list[PreparedImage]] = {False: [], True: []}
    for item, path, prompt in _with_prompts(session, instance_prompt):
        if not path.is_file():
            raise DatasetError(
                f"The prepared image {path} is missing.",
                f"Prepare your photos again: fastsd dreambooth prepare {session.name}",
            )
        if sha256_of(path) != item["sha256"]:
            raise DatasetError(
                f"The prepared image {path} has changed since it was prepared.",
                "Run prepare again with the photo as you want it; images in the session must not be edited by hand.",
            )
        found[item["held_out"]].append(PreparedImage(path, item["sha256"], prompt, _framing_of(item), _focus_of(item)))
    return Dataset(tuple(found[False]), tuple(found[True]))


def _framing_of(item: dict[str, Any]) -> Framing | None:
    box = item.get("box")
    # Whole photos of earlier versions, which have no focus, were cut to multiples of 8; how is not noted.
    if box is None or (item.get("method") == "none" and "focus" not in item):
        return None
    if "photo_size" in item:
        return Framing(tuple(item["photo_size"]), tuple(box))
    # Prepared by an earlier version, which did not note the photo's size: the box is all that is known of it.
    return Framing.whole(box[2] - box[0], box[3] - box[1])


def _focus_of(item: dict[str, Any]) -> tuple[float, float]:
    if "focus" not in item:
        return (0.5, 0.5)
    (left, top, right, bottom), (x, y) = item["box"], item["focus"]
    return ((x - left) / (right - left), (y - top) / (bottom - top))


def prompt_table(session: Session, instance_prompt: str | None = None, tokenizer: Any = None) -> list[PromptRow]:
    """List every prepared image with its exact prompt and how many tokens that is.

    Args:
        session: a session whose images are prepared.
        instance_prompt: one prompt for all images that have no caption; None when it was left alone.
        tokenizer: a transformers CLIP tokenizer; words beyond its limit (77 tokens) are cut off in training.

    Raises:
        DatasetError: nothing is prepared.
    """
    rows = []
    for item, path, prompt in _with_prompts(session, instance_prompt):
        tokens = len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"]) if tokenizer is not None else None
        # Some tokenizers say "no limit" with a huge number.
        limit = min(getattr(tokenizer, "model_max_length", _CLIP_TOKENS), _CLIP_TOKENS)
        rows.append(PromptRow(path.name, prompt, tokens, tokens is not None and tokens > limit, item["held_out"]))
    cut = sum(row.truncated for row in rows)
    if cut:
        logger.warning(
            "%d of %d prompts are longer than the model's token limit; their ends are truncated.", cut, len(rows)
        )
    return rows


def _with_prompts(session: Session, instance_prompt: str | None) -> list[tuple[dict[str, Any], Path, str]]:
    images = recorded_images(session)
    if not images:
        raise DatasetError(
            f"Session {session.name!r} has no prepared images.",
            f"Prepare your photos first: fastsd dreambooth prepare {session.name}",
        )
    home = _homes(session)
    found = []
    for item in images:
        name = PurePosixPath(item["file"]).name
        caption = read_caption(home(f"captions/{PurePosixPath(name).stem}.txt"))
        found.append((item, home(item["file"]), prompt_of(session, item, caption, instance_prompt)))
    return found


def what_changed(begun: list[list[str]], dataset: Dataset) -> str:
    """What is different from the images and prompts that a run began with, in words.

    Args:
        begun: sha256 and prompt of each.
        dataset: what is there now.
    """
    now = {image.sha256: image for image in (*dataset.train, *dataset.held_out)}
    before = {sha256: prompt for sha256, prompt in begun}
    said = [
        f"the prompt of {image.path.name} was {before[sha256]!r} and is now {image.prompt!r}"
        for sha256, image in now.items()
        if sha256 in before and before[sha256] != image.prompt
    ]
    gone, new = len(before.keys() - now.keys()), len(now.keys() - before.keys())
    more = [f"and {len(said) - 3} more"] if len(said) > 3 else []
    counts = [
        f"{count} image{'s are' if count > 1 else ' is'} {what}"
        for count, what in ((gone, "gone"), (new, "new"))
        if count
    ]
    return "; ".join([*said[:3], *more, *counts]) or "their order, or which of them are held out"


def prompt_of(session: Session, item: dict[str, Any], caption: str | None, instance_prompt: str | None = None) -> str:
    """The exact prompt of a recorded image.

    What its name says, and what stands for names that say nothing, was decided when it was prepared and is recorded:
    later rules and another name of the session do not change what a run has begun with.
    """
    dataset = session.record.get("dataset") or {}
    return resolve_prompt(
        PurePosixPath(item["file"]).name,
        caption,
        instance_prompt=instance_prompt,
        session_name=dataset.get("unnamed") or session.name,
        words=item.get("stem_words"),
    )
