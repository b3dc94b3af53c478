"""Whether a run has begun with the very photos that are to be prepared again."""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth.dataset.originals import own_place
from fastsd_helpers.dreambooth.dataset.prepared import recorded_images
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig
from fastsd_helpers.dreambooth.photos.finding import Photos, open_photos
from fastsd_helpers.dreambooth.photos.image_names import printable
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.sessions import Session

__all__ = ["has_begun_with"]


def has_begun_with(config: PrepareConfig, session: Session) -> bool:
    """Whether a run of this session has begun with these photos and settings, captions of the photos included.

    Then what was decided when they were prepared (prompts, crops, held-out photos) is kept where cells are run again,
    though a later version would decide otherwise.
    """
    dataset: dict[str, Any] = session.record.get("dataset") or {}
    if "run" not in session.record or not dataset.get("settings"):
        return False
    # Settings that did not exist then were what they are when left alone.
    begun = {spec.name: spec.default for spec in fields(PrepareConfig)} | dataset["settings"]
    begun |= {"size": dataset.get("size"), "crop": dataset.get("crop")}
    now = {spec.name: getattr(config, spec.name) for spec in fields(PrepareConfig)}
    if {**begun, "images": "", "held_out": ""} != {**now, "images": "", "held_out": ""}:
        return False
    return _same(config.images, session, held_out=config.held_out)


def _same(images: str, session: Session, *, held_out: str) -> bool:
    known = {item.get("source_sha256"): item for item in recorded_images(session)}
    skipped = {item["source"] for item in (session.record["dataset"].get("skipped") or [])}
    left_out = own_place(session, Path(held_out).expanduser()) if held_out else None
    seen: set[str] = set()
    try:
        for place in filter(None, (images, held_out)):
            path = own_place(session, Path(place).expanduser())
            with open_photos(path, leave_out=left_out if place == images else None) as photos:
                for name in photos.names:
                    sha256 = hashlib.sha256(photos.read(name)).hexdigest()
                    if sha256 in known and _caption_is(photos, name, known[sha256]):
                        seen.add(sha256)
                    elif printable(name) not in skipped:
                        return False
    except DatasetError:
        return False
    return seen == set(known)


def _caption_is(photos: Photos, name: str, item: dict[str, Any]) -> bool:
    return photos.caption(name) in (None, item.get("came_with", item.get("caption")), item.get("caption"))
