"""Prepare a subject's photos for training: read, check, crop, name, caption and record them in the session."""

import contextlib
import datetime
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from fastsd_helpers.captions.photo_names import NamedPhoto, name_photos, repeats_in
from fastsd_helpers.captions.prompts import read_caption, words_of, write_caption
from fastsd_helpers.dreambooth.dataset.advice import notes_on_prepared
from fastsd_helpers.dreambooth.dataset.buckets import LONGEST
from fastsd_helpers.dreambooth.dataset.contact_sheet import MOST_CELLS, Cell, draw_contact_sheet, make_cell
from fastsd_helpers.dreambooth.dataset.hold_out import choose_held_out, subject_of
from fastsd_helpers.dreambooth.dataset.originals import photos_of_user, set_aside, set_captions_aside
from fastsd_helpers.dreambooth.dataset.photo_places import find_held_out, find_photos, nothing_usable
from fastsd_helpers.dreambooth.dataset.prepared import (
    exchange_pictures,
    finish_exchange,
    prompt_of,
    recorded_images,
    start_exchange,
)
from fastsd_helpers.dreambooth.dataset.report import PrepareResult, counted_prompts
from fastsd_helpers.dreambooth.photos.decoding import decode_photo
from fastsd_helpers.dreambooth.photos.finding import Photos, open_photos
from fastsd_helpers.dreambooth.photos.image_names import printable, safe_stem, unique_stem
from fastsd_helpers.dreambooth.photos.likeness import measure_sharpness, perceptual_hash
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import check_room, file_errors, write_atomic
from fastsd_helpers.images.files import png_bytes
from fastsd_helpers.images.smart_crop import CropBox, crop_box, square_box, whole_box
from fastsd_helpers.options import check, option, to_values
from fastsd_helpers.runtime import logger
from fastsd_helpers.sessions import Session, whole_prompt

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PrepareConfig", "PrepareResult", "prepare"]

_SHEET = "contact-sheet.png"
_BLURRED_BELOW = 60.0
_SHARPNESS_NEEDS_PX = 384  # below, single pixels are judged, which are soft in most cameras
_ALIKE_BITS = 32  # of 255


@dataclass(frozen=True)
class PrepareConfig:
    """Settings for preparing the photos of one subject."""

    images: str = option("", help="folder or zip with the subject's photos")
    size: int = option(
        512,
        help="resolution: side of the prepared images in pixels; 1024 for SDXL and its derivatives",
        low=64,
        high=4096,
        step=64,
    )
    crop: Literal["smart", "center", "none"] = option(
        "smart",
        help="smart: a square crop around the subject; center: a square center crop; none: keeps the photo's aspect "
        "ratio, with an area of about size x size, for training in aspect-ratio buckets",
    )
    hold_out: Literal["auto", "none"] = option(
        "auto",
        help="validation split: auto holds out one photo of ten, to measure the loss on photos that were never "
        "trained on; none trains on all",
    )
    held_out: str = option(
        "", help="validation set: folder or zip with photos for the held-out loss, never trained on", advanced=True
    )
    boxes: str = option(
        "",
        help='JSON file with a crop box for some photos: {"dog.jpg": [left, top, right, bottom]} in pixels',
        advanced=True,
    )
    face_model: str = option("", help="YuNet's ONNX file, for face detection", advanced=True)

    def __post_init__(self) -> None:
        clash = self.boxes and self.crop == "none"
        check(self, ["boxes (--boxes) do not go with crop none, which keeps whole photos"] if clash else [])


@dataclass
class _Work:
    """What one `prepare` has gathered so far; images themselves are not kept."""

    config: PrepareConfig
    folder: Path
    boxes: dict[str, Any]
    edited: dict[str, tuple[str, str]]  # sha256 of a photo -> the stem of its image before, and its caption
    made_here: set[str]  # sha256 of this session's own images
    after_name: Path | None = None  # photos whose captions go on after the words of the name, as the old notebook's
    notes: list[str] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    stems: set[str] = field(default_factory=set)
    used_boxes: set[str] = field(default_factory=set)
    bad_boxes: list[str] = field(default_factory=list)


def prepare(config: PrepareConfig, session: Session) -> PrepareResult:
    """Turn photos into the session's training images, and write its contact sheet to logs/contact-sheet.png.

    The session's earlier images go only when the new ones are all there. Captions edited in the session stay with
    their photo. Without a held-out folder every 10th image is held out, from 10 images up.

    Args:
        config: where the photos are, and how they are cropped.
        session: an open session; no run may be using it.

    Returns:
        How many images there are, the contact sheet, and what was skipped or found, each with its reason.

    Raises:
        DatasetError: no usable image, an unsafe zip, or boxes that do not fit.
        SessionBusy: a run is using the session.
        DriveError: the session cannot be written; its images are as they were.
        DiskFull: the session cannot be written; its images are as they were.
    """
    boxes = _read_boxes(Path(config.boxes).expanduser()) if config.boxes else {}
    with session.lock():
        new = start_exchange(session)
        try:
            aside = set_aside(session)
            images = find_photos(config.images, session)
            held_out = find_held_out(config.held_out, config.images, session)
            work = _Work(config, new, boxes, _edited_captions(session), _made_here(session))
            work.notes += filter(None, [aside.line()])
            # Files that stay a while in these folders: no new image may get the name of one.
            work.stems |= {PurePosixPath(file).stem.casefold() for file in aside.stay}
            if (session.record.get("imported") or {}).get("captions") == "after the name":
                work.after_name = photos_of_user(session)
            _read_sources(work, session, images, held_out)
            if not held_out:
                _hold_some_out(work)
            _check_boxes(work)
            notes = _notes(work, session)
            draw_contact_sheet(new / _SHEET, work.cells, title=session.name, size=config.size, total=len(work.images))
            sheet = session.logs / _SHEET
            with file_errors(sheet, "write"):
                session.logs.mkdir(exist_ok=True)
                os.replace(new / _SHEET, sheet)
            # Once more: somebody may have put a photo there while the others were read.
            aside.stay |= set_aside(session).stay
            exchange_pictures(session, new, _record_of(work, session, images, held_out), stay=aside.stay)
        finally:
            finish_exchange(session)
    result = PrepareResult(
        train=sum(not item["held_out"] for item in work.images),
        held_out=sum(item["held_out"] for item in work.images),
        size=config.size,
        images=tuple(work.images),
        skipped=tuple(work.skipped),
        notes=tuple(notes),
        contact_sheet=sheet,
        prompts=counted_prompts([prompt_of(session, item, item["caption"]) for item in work.images]),
    )
    for line in result.lines():
        logger.info("%s", line)
    return result


# -------------------------------------------------------------------------------------------------- input


def _read_boxes(path: Path) -> dict[str, Any]:
    hint = 'Write it as {"dog.jpg": [left, top, right, bottom]}, in pixels of the upright photo.'
    try:
        boxes = json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise DatasetError(f"There is no file of crop boxes {path}.", hint) from err
    except OSError as err:
        raise DatasetError(f"The crop boxes in {path} cannot be read: {err.strerror}.", hint) from err
    except (ValueError, RecursionError) as err:
        raise DatasetError(f"The crop boxes in {path} are not valid JSON: {err}.", hint) from err
    if not isinstance(boxes, dict) or not all(isinstance(box, list) for box in boxes.values()):
        raise DatasetError(f"The crop boxes in {path} are not a list of four numbers for each file name.", hint)
    return boxes


def _box_for(work: _Work, name: str, width: int, height: int) -> CropBox | None:
    for key in (name, PurePosixPath(name).name):
        if key in work.boxes:
            work.used_boxes.add(key)
            try:
                return square_box(work.boxes[key], width, height)
            except DatasetError as err:
                work.bad_boxes.append(f"{key}: {err.problem} {err.hint}")
    return None


def _check_boxes(work: _Work) -> None:
    unknown = sorted(set(work.boxes) - work.used_boxes)
    if unknown:
        work.bad_boxes.append(f"no usable photo has the name {', '.join(unknown[:5])}.")
    if work.bad_boxes:
        raise DatasetError(f"The boxes do not fit: {' '.join(work.bad_boxes)}", f"Correct them in {work.config.boxes}.")


def _edited_captions(session: Session) -> dict[str, tuple[str, str]]:
    """Captions written or changed in the session since they were prepared, by the hash of the photo they belong to."""
    edited = {}
    for item in recorded_images(session):
        stem = PurePosixPath(item["file"]).stem
        caption = read_caption(session.captions / f"{stem}.txt")
        # A record rebuilt from the folder knows neither the photos nor their captions.
        if caption and "source_sha256" in item and caption != item.get("came_with", item["caption"]):
            edited[item["source_sha256"]] = (stem, caption)
    return edited


def _made_here(session: Session) -> set[str]:
    # One that was made from itself is a user's photo all the same.
    made = ((item["sha256"], item.get("source_sha256")) for item in recorded_images(session))
    return {own for own, source in made if source not in (None, own)}


# ---------------------------------------------------------------------------------------------- images


def _read_sources(work: _Work, session: Session, images: Path, held_out: Path | None) -> None:
    with contextlib.ExitStack() as opened:
        train = opened.enter_context(open_photos(images, leave_out=held_out))
        judged = opened.enter_context(open_photos(held_out)) if held_out else Photos([])
        # Names are judged together: the one photo that is held out counts on where the others end.
        named = name_photos([printable(name) for name in (*train.names, *judged.names)])
        _read_all(work, train, named[: len(train.names)], session, images, held_out=False)
        if not work.images:
            raise nothing_usable(images, work.skipped, work.notes)
        if held_out:
            before = len(work.images)
            _read_all(work, judged, named[len(train.names) :], session, held_out, held_out=True)
            if len(work.images) == before:
                raise nothing_usable(held_out, work.skipped, work.notes)


def _read_all(
    work: _Work, photos: Photos, named: list[NamedPhoto], session: Session, path: Path, *, held_out: bool
) -> None:
    size = work.config.size
    # A photograph as PNG takes about 1.5 bytes a pixel.
    hint = "Free some space there, choose a smaller --size, or another folder with --root."
    check_room(session.folder, 2 * size * size * len(photos.names), f"{len(photos.names)} images", hint=hint)
    work.skipped += [{"source": printable(name), "reason": reason} for name, reason in photos.skipped]
    work.notes += [*photos.notes, *filter(None, [photos.page_line()])]
    after_name = work.after_name is not None and path.resolve() == work.after_name.resolve()
    for number, (name, said) in enumerate(zip(photos.names, named, strict=True), start=1):
        try:
            _read_one(work, photos, name, said, held_out=held_out, after_name=after_name)
        except DatasetError as err:
            work.skipped.append({"source": printable(name), "reason": err.problem.rstrip(".")})
        if number % 25 == 0:
            logger.info("%d of %d photos read.", number, len(photos.names))
    if repeats := repeats_in(photos.names):
        folders = ", ".join(repr(folder) for folder in list(repeats)[:3])
        work.notes.append(f"The repeats in {folders} are ignored: every photo counts the same here.")


def _read_one(work: _Work, photos: Photos, name: str, said: NamedPhoto, *, held_out: bool, after_name: bool) -> None:
    data = photos.read(name)
    source_sha256 = hashlib.sha256(data).hexdigest()
    if source_sha256 in work.made_here:
        raise DatasetError("is an image prepared here, not a photo")
    photo = decode_photo(data)
    warnings = list(photo.warnings)
    box = _crop_of(work, name, photo.image)
    picture = _resize(photo.image, box, work.config, warnings)
    if min(box.size) >= _SHARPNESS_NEEDS_PX and measure_sharpness(photo.image.crop(box.as_tuple())) < _BLURRED_BELOW:
        warnings.append("blurred")
    payload = png_bytes(picture)
    sha256 = hashlib.sha256(payload).hexdigest()
    came_with = None
    try:
        came_with = photos.caption(name)
    except DatasetError as err:
        warnings.append(f"its .txt was ignored: {err.problem.rstrip('.')}")
    if came_with and after_name:
        came_with = whole_prompt(said.words, came_with)
    caption = work.edited.get(source_sha256, ("", came_with))[1]
    _compare_with_others(work, picture, sha256, warnings, caption)
    stem = unique_stem(safe_stem(said.stem), work.stems)
    folder = "held_out_images" if held_out else "instance_images"
    write_atomic(work.folder / folder / f"{stem}.png", payload)
    if caption:
        write_caption(work.folder / "captions" / f"{stem}.txt", caption)
    item: dict[str, Any] = {
        "file": f"{folder}/{stem}.png",
        "sha256": sha256,
        "source": printable(name),
        "source_sha256": source_sha256,
        "stem_words": said.words,
        "caption": caption,
        "came_with": came_with,  # the photo's own caption, which an edited one goes back to
        "photo_size": list(photo.image.size),
        "box": list(box.as_tuple()),
        "method": box.method,
        "held_out": held_out,
        "warnings": warnings,
    }
    if box.method == "none":
        item["focus"] = [round(value, 1) for value in box.focus]
    work.images.append(item)
    _add_cell(work, make_cell(photo.image, picture, box, item))


def _add_cell(work: _Work, cell: Cell) -> None:
    # However many photos there are, the sheet keeps as many as it shows: those with warnings first.
    if len(work.cells) == MOST_CELLS:
        calm = [number for number, kept in enumerate(work.cells) if not kept.item["warnings"]]
        if not calm or not cell.item["warnings"]:
            return
        del work.cells[calm[-1]]
    work.cells.append(cell)


def _crop_of(work: _Work, name: str, image: "Image.Image") -> CropBox:
    crop, face_model = work.config.crop, work.config.face_model or None
    if crop == "none":
        return whole_box(image, longest=LONGEST, face_model=face_model)
    return _box_for(work, name, *image.size) or crop_box(image, method=crop, face_model=face_model)


def _resize(image: "Image.Image", box: CropBox, config: PrepareConfig, warnings: list[str]) -> "Image.Image":
    from PIL import Image

    part = image.crop(box.as_tuple())
    width, height = part.size
    scale = config.size / math.sqrt(width * height)  # a square becomes size x size, others have that area
    if part.size != image.size and config.crop == "none":
        warnings.append(f"longer than {LONGEST}:1: only {width} x {height} px of it are used")
    size = round(width * scale), round(height * scale)
    if scale > 1:
        before, after = (f"{w} px" if w == h else f"{w} x {h} px" for w, h in (part.size, size))
        warnings.append(f"too small: {before} enlarged to {after}")
    return part.resize(size, Image.Resampling.LANCZOS)


def _compare_with_others(
    work: _Work, picture: "Image.Image", sha256: str, warnings: list[str], caption: str | None
) -> None:
    for item in work.images:
        if item["sha256"] == sha256:
            if caption and not item["caption"]:  # the words came with the other copy
                item.update(caption=caption, came_with=caption)
                write_caption(work.folder / "captions" / f"{PurePosixPath(item['file']).stem}.txt", caption)
            raise DatasetError(f"is the same image as {item['source']}")
    own = perceptual_hash(picture)
    for item, other in zip(work.images, work.hashes, strict=True):
        if (own ^ other).bit_count() <= _ALIKE_BITS:
            warnings.append(f"looks almost like {item['source']}")
            break
    work.hashes.append(own)


def _hold_some_out(work: _Work) -> None:
    if work.config.hold_out == "none":
        return
    for place in choose_held_out(subject_of(work.images)):
        item = work.images[place]
        name = PurePosixPath(item["file"]).name
        with file_errors(work.folder, "write to"):
            os.replace(work.folder / item["file"], work.folder / "held_out_images" / name)
        item.update(file=f"held_out_images/{name}", held_out=True)


def _record_of(work: _Work, session: Session, images: Path, held_out: Path | None) -> dict[str, Any]:
    settings = {key: value for key, value in to_values(work.config).items() if key not in ("size", "crop")}
    # Where the photos really are, for the next time: what was given may have been left alone.
    places = {"images": work.config.images if images == Path(work.config.images) else str(images)}
    if held_out:
        places["held_out"] = work.config.held_out if held_out == Path(work.config.held_out) else str(held_out)
    return {
        "size": work.config.size,
        "crop": work.config.crop,
        "prepared": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": settings | places,
        "unnamed": words_of(session.name) or session.name,
        "images": work.images,
        "skipped": work.skipped,
    }


def _notes(work: _Work, session: Session) -> list[str]:
    notes = list(work.notes)
    there = {item["source_sha256"] for item in work.images}
    if lost := [edited for sha256, edited in work.edited.items() if sha256 not in there]:
        written = set_captions_aside(session, dict(lost))
        notes.append(f"{len(lost)} captions of photos that are no longer here are kept in {written[0].parent}.")
    chosen = bool(work.config.held_out)
    return [*notes, *notes_on_prepared(session, work.images, size=work.config.size, chosen=chosen)]
