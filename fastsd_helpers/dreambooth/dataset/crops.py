"""The crops that a person corrects: the photos as they were, the box on each, and a new `prepare` with those boxes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd_helpers.dreambooth.dataset.originals import own_place
from fastsd_helpers.dreambooth.dataset.prepared import recorded_images
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, PrepareResult, prepare
from fastsd_helpers.dreambooth.photos.decoding import decode_photo
from fastsd_helpers.dreambooth.photos.finding import open_photos
from fastsd_helpers.dreambooth.photos.image_names import printable
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.options import options_of
from fastsd_helpers.sessions import Session

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Crop", "keeps_shapes", "list_crops", "open_original", "prepare_with_boxes", "prepared_settings"]

_BOXES = "crop-boxes.json"


@dataclass(frozen=True)
class Crop:
    """The part of one photo that is trained on: left, top, right, bottom in pixels of the upright photo."""

    source: str  # the photo's name in its folder or zip
    file: str  # the prepared image
    box: tuple[int, int, int, int]
    by_hand: bool
    held_out: bool


def list_crops(session: Session) -> list[Crop]:
    """List the crops of a session's images.

    Raises:
        DatasetError: nothing is prepared, or the images were prepared whole (crop none).
    """
    images = [item for item in recorded_images(session) if "box" in item and "source" in item]
    if not images:
        raise DatasetError(
            f"Session {session.name!r} has no prepared images.",
            f"Prepare your photos first: fastsd dreambooth prepare {session.name}",
        )
    if keeps_shapes(session):
        raise DatasetError(
            "These images were prepared without cropping.", "Choose crop smart or center, and prepare again."
        )
    return [
        Crop(item["source"], item["file"], tuple(item["box"]), item["method"] == "box", item["held_out"])
        for item in images
    ]


def keeps_shapes(session: Session) -> bool:
    """Whether the session's images were prepared whole (crop none), so that there is no crop to correct."""
    return bool((session.record.get("dataset") or {}).get("crop") == "none")


def prepared_settings(session: Session) -> PrepareConfig:
    """The settings that the session's images were prepared with.

    Raises:
        DatasetError: they are not known, as after session.json was rebuilt.
    """
    dataset = session.record.get("dataset") or {}
    if "settings" not in dataset:
        raise DatasetError("It is not recorded how these images were prepared.", "Give the photos to `prepare` again.")
    known = {item.name for item in options_of(PrepareConfig)}
    values = {"size": dataset["size"], "crop": dataset["crop"], **dataset["settings"]}
    return PrepareConfig(**{name: value for name, value in values.items() if name in known})


def open_original(session: Session, crop: Crop) -> "Image.Image":
    """Open the photo that an image was cut from: upright RGB.

    Raises:
        DatasetError: the photo is not where it was.
    """
    config = prepared_settings(session)
    gone = DatasetError(
        f"The photo {crop.source} is no longer where it was when the images were prepared.",
        "Give the photos again (upload them, or name their folder or zip), prepare, then correct the crops.",
    )
    place = Path((config.held_out if crop.held_out and config.held_out else config.images) or "").expanduser()
    place = own_place(session, place)
    if not config.images or not place.exists():
        raise gone
    with open_photos(place) as photos:
        # The record keeps names as they can be shown; nearly always that is the name itself.
        for name in photos.names:
            if printable(name) == crop.source:
                return decode_photo(photos.read(name)).image
    raise gone


def prepare_with_boxes(session: Session, boxes: Mapping[str, tuple[int, int, int, int]]) -> PrepareResult:
    """Prepare the same photos again with these boxes; photos without one are cropped as before.

    Writes crop-boxes.json into the session, then what `prepare` writes.

    Raises:
        DatasetError: a box does not fit, or the photos are gone.
        SessionBusy: a run is using the session.
        DriveError: the session cannot be written.
    """
    config = prepared_settings(session)
    if not config.images:
        raise DatasetError("The original photos are no longer here.", "Give them to `prepare` again.")
    path = session.folder / _BOXES
    write_atomic(path, json.dumps({name: list(box) for name, box in boxes.items()}, indent=1).encode())
    values = {item.name: getattr(config, item.name) for item in options_of(PrepareConfig)}
    demo = (session.record.get("dataset") or {}).get("demo")
    result = prepare(PrepareConfig(**values | {"boxes": str(path) if boxes else ""}), session)
    if demo is not None:
        session.save(dataset=session.record["dataset"] | {"demo": demo})
    if not boxes:
        with file_errors(path, "remove"):
            path.unlink(missing_ok=True)
    return result
