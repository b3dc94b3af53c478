"""Prepare a subject's photos for training: read, check, crop, name, caption and record them in the session."""

import datetime
import hashlib
import io
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from fastsd_helpers.captions import read_caption, words_of, write_caption
from fastsd_helpers.dreambooth.contact_sheet import MOST_CELLS, Cell, draw_contact_sheet, make_cell
from fastsd_helpers.dreambooth.dataset import (
    Dataset,
    PreparedImage,
    PromptRow,
    exchange_pictures,
    finish_exchange,
    load_dataset,
    prompt_table,
    recorded_images,
    start_exchange,
)
from fastsd_helpers.dreambooth.photos import Photos, decode_photo, measure_sharpness, open_photos, perceptual_hash
from fastsd_helpers.dreambooth.picture_names import number_series, printable, safe_stem, unique_stem
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import check_room, file_errors, write_atomic
from fastsd_helpers.options import check, option, to_values
from fastsd_helpers.sessions import Session
from fastsd_helpers.smart_crop import CropBox, crop_box, square_box

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Dataset",
    "PrepareConfig",
    "PrepareResult",
    "PreparedImage",
    "PromptRow",
    "load_dataset",
    "prepare",
    "prompt_table",
]

logger = logging.getLogger("fastsd_helpers")

_SHEET = "contact-sheet.png"
_HELD_OUT_EVERY = 10
_MANY = 100
_BLURRED_BELOW = 60.0
_SHARPNESS_NEEDS_PX = 384  # below, single pixels are judged, which are soft in most cameras
_ALIKE_BITS = 32  # of 255
_NO_PICTURES_HINT = "Give a folder or a zip with 5 to 30 photos of the subject (JPEG, PNG, WebP or HEIC)."


@dataclass(frozen=True)
class PrepareConfig:
    """Settings for preparing the photos of one subject."""

    images: str = option("", help="folder or zip with the subject's photos")
    size: int = option(512, help="side of the prepared pictures in pixels", low=64, high=4096, step=64)
    crop: Literal["smart", "center", "none"] = option(
        "smart", help="smart keeps the subject in the square, none keeps the photo's shape"
    )
    held_out: str = option("", help="folder or zip with photos that are only measured, never trained on", advanced=True)
    boxes: str = option(
        "",
        help='JSON file with a box for some photos: {"dog.jpg": [left, top, right, bottom]} in pixels',
        advanced=True,
    )
    face_model: str = option("", help="YuNet's ONNX file, to find faces with", advanced=True)

    def __post_init__(self) -> None:
        clash = self.boxes and self.crop == "none"
        check(self, ["boxes (--boxes) do not go with crop none, which keeps whole photos"] if clash else [])


@dataclass(frozen=True)
class PrepareResult:
    """What was prepared; `lines()` says it in words."""

    train: int
    held_out: int
    size: int
    images: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]
    notes: tuple[str, ...]
    contact_sheet: Path

    def lines(self) -> list[str]:
        """The report, one sentence a line."""
        held_out = f" and {self.held_out} held out" if self.held_out else ""
        pictures = "picture" if self.train == 1 else "pictures"
        report = [f"{self.train} {pictures} to train on{held_out}, {self.size} px."]
        report += [f"Skipped {item['source']}: {item['reason']}." for item in self.skipped]
        report += [f"{item['source']}: {', '.join(item['warnings'])}." for item in self.images if item["warnings"]]
        return [*report, *self.notes, f"Look at the crops: {self.contact_sheet}"]


@dataclass
class _Work:
    """What one `prepare` has gathered so far; pictures themselves are not kept."""

    config: PrepareConfig
    folder: Path
    boxes: dict[str, Any]
    edited: dict[str, str]
    images: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    stems: set[str] = field(default_factory=set)
    used_boxes: set[str] = field(default_factory=set)
    bad_boxes: list[str] = field(default_factory=list)


def prepare(config: PrepareConfig, session: Session) -> PrepareResult:
    """Turn photos into the session's training pictures, and write its contact sheet to logs/contact-sheet.png.

    The session's earlier pictures go only when the new ones are all there. Captions edited in the session stay with
    their photo. Without a held-out folder every 10th picture is held out, from 10 pictures up.

    Raises:
        DatasetError: no usable picture, an unsafe zip, or boxes that do not fit.
        SessionBusy: a run is using the session.
        DriveError, DiskFull: the session cannot be written; its pictures are as they were.
    """
    images = _source_of(config, session)
    held_out = Path(config.held_out).expanduser() if config.held_out else None
    boxes = _read_boxes(Path(config.boxes).expanduser()) if config.boxes else {}
    with session.lock():
        new = start_exchange(session)
        try:
            work = _Work(config, new, boxes, _edited_captions(session))
            _read_all(work, images, session, held_out=False, leave_out=held_out)
            if not work.images:
                raise _nothing_usable(images, work.skipped)
            if held_out:
                before = len(work.images)
                _read_all(work, held_out, session, held_out=True, leave_out=None)
                if len(work.images) == before:
                    raise _nothing_usable(held_out, work.skipped)
            else:
                _hold_some_out(work)
            _check_boxes(work)
            notes = _notes(work, session)
            draw_contact_sheet(new / _SHEET, work.cells, title=session.name, size=config.size, total=len(work.images))
            sheet = session.logs / _SHEET
            with file_errors(sheet, "write"):
                session.logs.mkdir(exist_ok=True)
                os.replace(new / _SHEET, sheet)
            exchange_pictures(session, new, _record_of(work))
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
    )
    for line in result.lines():
        logger.info("%s", line)
    return result


# -------------------------------------------------------------------------------------------------- input


def _source_of(config: PrepareConfig, session: Session) -> Path:
    if config.images:
        return Path(config.images).expanduser()
    # A session of the old notebook brings its pictures along; they were never recorded by a prepare.
    has_files = session.instance_images.is_dir() and any(session.instance_images.iterdir())
    if has_files and not recorded_images(session):
        return session.instance_images
    raise DatasetError("No photos were given.", _NO_PICTURES_HINT)


def _nothing_usable(path: Path, skipped: list[dict[str, str]]) -> DatasetError:
    if not skipped:
        return DatasetError(f"There are no pictures in {path}.", _NO_PICTURES_HINT)
    reasons = "; ".join(f"{item['source']} {item['reason']}" for item in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return DatasetError(f"None of the pictures in {path} can be used: {reasons}{more}.", _NO_PICTURES_HINT)


def _read_boxes(path: Path) -> dict[str, Any]:
    hint = 'Write it like {"dog.jpg": [left, top, right, bottom]}, in pixels of the upright photo.'
    try:
        boxes = json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise DatasetError(f"There is no file of boxes {path}.", hint) from err
    except OSError as err:
        raise DatasetError(f"The boxes {path} cannot be read: {err.strerror}.", hint) from err
    except (ValueError, RecursionError) as err:
        raise DatasetError(f"The boxes {path} are no JSON: {err}.", hint) from err
    if not isinstance(boxes, dict) or not all(isinstance(box, list) for box in boxes.values()):
        raise DatasetError(f"The boxes {path} are not a list of four numbers for each file name.", hint)
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
        work.bad_boxes.append(f"no usable photo is named {', '.join(unknown[:5])}.")
    if work.bad_boxes:
        raise DatasetError(f"The boxes do not fit: {' '.join(work.bad_boxes)}", f"Correct them in {work.config.boxes}.")


def _edited_captions(session: Session) -> dict[str, str]:
    """Captions written or changed in the session since they were prepared, by the hash of the photo they belong to."""
    edited = {}
    for item in recorded_images(session):
        caption = read_caption(session.captions / f"{PurePosixPath(item['file']).stem}.txt")
        # A record rebuilt from the folder knows neither the photos nor their captions.
        if caption and "source_sha256" in item and caption != item["caption"]:
            edited[item["source_sha256"]] = caption
    return edited


# ---------------------------------------------------------------------------------------------- pictures


def _read_all(work: _Work, path: Path, session: Session, *, held_out: bool, leave_out: Path | None) -> None:
    size, source_is_session = work.config.size, path.resolve() == session.instance_images.resolve()
    with open_photos(path, leave_out=leave_out) as photos:
        if not photos.names and not photos.skipped:
            return
        # A photograph as PNG takes about 1.5 bytes a pixel.
        what = f"{len(photos.names)} pictures"
        hint = "Make room there, choose a smaller --size, or another folder with --root."
        check_room(session.folder, 2 * size * size * len(photos.names), what, hint=hint)
        for name, reason in photos.skipped:
            work.skipped.append({"source": printable(name), "reason": reason})
        stems = number_series([PurePosixPath(name).stem for name in photos.names])
        for number, (name, stem) in enumerate(zip(photos.names, stems, strict=True), start=1):
            try:
                _read_one(work, photos, name, stem, held_out, session.captions if source_is_session else None)
            except DatasetError as err:
                work.skipped.append({"source": printable(name), "reason": err.problem.rstrip(".")})
            if number % 25 == 0:
                logger.info("%d of %d photos read.", number, len(photos.names))


def _read_one(work: _Work, photos: Photos, name: str, stem: str, held_out: bool, session_captions: Path | None) -> None:
    data = photos.read(name)
    photo = decode_photo(data)
    warnings = list(photo.warnings)
    box = _crop_of(work, name, photo.image)
    picture = _resize(photo.image, box, work.config, warnings)
    if min(box.size) >= _SHARPNESS_NEEDS_PX and measure_sharpness(photo.image.crop(box.as_tuple())) < _BLURRED_BELOW:
        warnings.append("blurred")
    payload = _encode_png(picture)
    sha256 = hashlib.sha256(payload).hexdigest()
    _compare_with_others(work, picture, sha256, warnings)
    caption = _caption_of(work, photos, name, hashlib.sha256(data).hexdigest(), session_captions, warnings)
    stem = unique_stem(safe_stem(stem), work.stems)
    folder = "held_out_images" if held_out else "instance_images"
    write_atomic(work.folder / folder / f"{stem}.png", payload)
    if caption:
        write_caption(work.folder / "captions" / f"{stem}.txt", caption)
    item = {
        "file": f"{folder}/{stem}.png",
        "sha256": sha256,
        "source": printable(name),
        "source_sha256": hashlib.sha256(data).hexdigest(),
        "stem_words": words_of(f"{stem}.png"),
        "caption": caption,
        "box": list(box.as_tuple()),
        "method": box.method,
        "held_out": held_out,
        "warnings": warnings,
    }
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
    width, height = image.size
    if work.config.crop == "none":
        return CropBox(0, 0, width, height, "none", (width / 2, height / 2))
    typed = _box_for(work, name, width, height)
    return typed or crop_box(image, method=work.config.crop, face_model=work.config.face_model or None)


def _resize(image: "Image.Image", box: CropBox, config: PrepareConfig, warnings: list[str]) -> "Image.Image":
    from PIL import Image

    part = image.crop(box.as_tuple())
    width, height = part.size
    size = config.size
    if min(width, height) < size:
        warnings.append(f"too small: {min(width, height)} px enlarged to {size}")
    if config.crop != "none":
        return part.resize((size, size), Image.Resampling.LANCZOS)
    scale = size / min(width, height)
    part = part.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.LANCZOS)
    # Both sides a multiple of 8, as the VAE needs them; what is over is cut off evenly.
    keep_w, keep_h = part.width // 8 * 8, part.height // 8 * 8
    left, top = (part.width - keep_w) // 2, (part.height - keep_h) // 2
    return part.crop((left, top, left + keep_w, top + keep_h))


def _encode_png(picture: "Image.Image") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _compare_with_others(work: _Work, picture: "Image.Image", sha256: str, warnings: list[str]) -> None:
    for item in work.images:
        if item["sha256"] == sha256:
            raise DatasetError(f"is the same picture as {item['source']}")
    own = perceptual_hash(picture)
    for item, other in zip(work.images, work.hashes, strict=True):
        if (own ^ other).bit_count() <= _ALIKE_BITS:
            warnings.append(f"looks almost like {item['source']}")
            break
    work.hashes.append(own)


def _caption_of(
    work: _Work, photos: Photos, name: str, source_sha256: str, session_captions: Path | None, warnings: list[str]
) -> str | None:
    if source_sha256 in work.edited:
        return work.edited[source_sha256]
    try:
        caption = photos.caption(name)
        if caption is None and session_captions is not None:
            caption = read_caption(session_captions / f"{PurePosixPath(name).stem}.txt")
        return caption
    except DatasetError as err:
        warnings.append(f"its .txt was ignored: {err.problem.rstrip('.')}")
        return None


def _hold_some_out(work: _Work) -> None:
    for item in work.images[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]:
        name = PurePosixPath(item["file"]).name
        with file_errors(work.folder, "write to"):
            os.replace(work.folder / item["file"], work.folder / "held_out_images" / name)
        item.update(file=f"held_out_images/{name}", held_out=True)


def _record_of(work: _Work) -> dict[str, Any]:
    settings = {key: value for key, value in to_values(work.config).items() if key not in ("size", "crop")}
    return {
        "size": work.config.size,
        "crop": work.config.crop,
        "prepared": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "images": work.images,
        "skipped": work.skipped,
    }


def _notes(work: _Work, session: Session) -> list[str]:
    train = sum(not item["held_out"] for item in work.images)
    notes = []
    if train == 1:
        notes.append("One picture teaches little more than itself: 5 to 30 from different sides do better.")
    if train > _MANY:
        notes.append(f"{train} pictures are many for one subject: 5 to 30 good ones usually do better, and faster.")
    progress = session.record.get("progress") or {}
    before = {(item["sha256"], item["held_out"]) for item in recorded_images(session)}
    after = {(item["sha256"], item["held_out"]) for item in work.images}
    if before and (progress.get("stage") or progress.get("step")) and before != after:
        notes.append(
            "Training has begun on other pictures: going on would mix the two sets, so start it again with --restart."
        )
    return notes
