"""The contact sheet: every photo with its crop drawn on it, the crop itself, and what is to be said about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.files import write_atomic
from fastsd_helpers.images.files import png_bytes
from fastsd_helpers.images.smart_crop import CropBox

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

__all__ = ["MOST_CELLS", "Cell", "draw_contact_sheet", "make_cell"]

MOST_CELLS = 60
_THUMB = 232
_PAD = 14
_GAP = 18
_CELL_W = 2 * _THUMB + 3 * _PAD
_HEADER = 74
_PAPER, _CARD, _EDGE = (244, 243, 240), (255, 255, 255), (222, 220, 214)
_INK, _FAINT, _AMBER, _TEAL = (34, 34, 38), (120, 118, 112), (176, 92, 0), (0, 122, 112)
_METHODS = {
    "box": "your box",
    "yunet": "faces",
    "mtcnn": "faces",
    "haar": "faces",
    "saliency": "subject",
    "center": "centre",
    "none": "full photo",
}


@dataclass
class Cell:
    """One photo on the sheet, already small: the original with its box, the crop, and the words below."""

    original: "Image.Image"
    crop: "Image.Image"
    facts: str
    item: dict[str, Any]  # what session.json says about the picture: source, warnings, held_out


def make_cell(photo: "Image.Image", picture: "Image.Image", box: CropBox, item: dict[str, Any]) -> Cell:
    """Shrink a photo and its prepared image to what the sheet shows, so that neither is kept in memory."""
    long = box.method == "none" and box.size != photo.size
    how = "part of a long photo" if long else _METHODS["none" if box.size == photo.size else box.method]
    return Cell(_draw_box(photo, box), _fit(picture), f"{photo.width} x {photo.height}  ·  {how}", item)


def _fit(image: "Image.Image") -> "Image.Image":
    from PIL import Image, ImageOps

    kind = Image.Resampling.LANCZOS if max(image.size) > _THUMB else Image.Resampling.BICUBIC
    return ImageOps.contain(image, (_THUMB, _THUMB), kind)


def _draw_box(photo: "Image.Image", box: CropBox) -> "Image.Image":
    from PIL import Image, ImageDraw

    small = _fit(photo)
    x, y = small.width / photo.width, small.height / photo.height
    left, top = round(box.left * x), round(box.top * y)
    right, bottom = max(left + 1, round(box.right * x)), max(top + 1, round(box.bottom * y))
    outside = Image.blend(small, Image.new("RGB", small.size, "white"), 0.62)
    outside.paste(small.crop((left, top, right, bottom)), (left, top))
    if box.size != photo.size:
        draw = ImageDraw.Draw(outside)
        draw.rectangle((left, top, right - 1, bottom - 1), outline="white", width=4)
        draw.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline=_TEAL, width=2)
    return outside


def draw_contact_sheet(path: Path, cells: Sequence[Cell], *, title: str, size: int, total: int) -> None:
    """Write the sheet as a PNG; `total` is the number of images when more were prepared than are shown.

    Raises:
        DriveError: the file cannot be written.
    """
    from PIL import Image, ImageDraw

    columns = min(3, max(1, len(cells)))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(_cell_height(cell) for cell in row) for row in rows]
    width = columns * _CELL_W + (columns + 1) * _GAP
    sheet = Image.new("RGB", (width, _HEADER + sum(heights) + _GAP * len(rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    facts = f"{total} images, {size} px  ·  left: the photo with its crop, right: the prepared image"
    if len(cells) < total:
        facts += f"  ·  {len(cells)} of {total} shown"
    title_font, font = _font(24), _font(15)
    draw.text((_GAP, 14), _shorten(draw, title, title_font, width - 2 * _GAP), fill=_INK, font=title_font)
    draw.text((_GAP, 46), _shorten(draw, facts, font, width - 2 * _GAP), fill=_FAINT, font=font)
    y = _HEADER
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            _draw_cell(sheet, draw, cell, _GAP + column * (_CELL_W + _GAP), y, height)
        y += height + _GAP
    write_atomic(path, png_bytes(sheet))


def _cell_height(cell: Cell) -> int:
    words = 12 + 20 + 20 + 18 * min(3, len(cell.item["warnings"]))
    return 2 * _PAD + max(cell.original.height, cell.crop.height) + words


def _draw_cell(sheet: "Image.Image", draw: "ImageDraw.ImageDraw", cell: Cell, x: int, y: int, height: int) -> None:
    draw.rounded_rectangle((x, y, x + _CELL_W, y + height), radius=10, fill=_CARD, outline=_EDGE)
    area = max(cell.original.height, cell.crop.height)
    for column, picture in enumerate((cell.original, cell.crop)):
        left = x + _PAD + column * (_THUMB + _PAD) + (_THUMB - picture.width) // 2
        top = y + _PAD + (area - picture.height) // 2
        sheet.paste(picture, (left, top))
        # So that a white photo has an end on the white card.
        draw.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_EDGE)
    text_y = y + _PAD + area + 12
    room = _CELL_W - 2 * _PAD
    name_font, font = _font(16), _font(13)
    badge = draw.textlength("held out", font=font) if cell.item["held_out"] else 0
    name = _shorten(draw, cell.item["source"], name_font, room - badge - (16 if badge else 0))
    draw.text((x + _PAD, text_y), name, fill=_INK, font=name_font)
    if badge:
        draw.text((x + _CELL_W - _PAD - badge, text_y + 2), "held out", fill=_TEAL, font=font)
    draw.text((x + _PAD, text_y + 22), _shorten(draw, cell.facts, font, room), fill=_FAINT, font=font)
    for line, warning in enumerate(cell.item["warnings"][:3]):
        draw.text(
            (x + _PAD, text_y + 41 + 18 * line), _shorten(draw, f"! {warning}", font, room), fill=_AMBER, font=font
        )


def _font(size_px: int) -> "ImageFont.ImageFont | ImageFont.FreeTypeFont":
    from PIL import ImageFont

    return ImageFont.load_default(size_px)


def _shorten(
    draw: "ImageDraw.ImageDraw", text: str, font: "ImageFont.ImageFont | ImageFont.FreeTypeFont", room: float
) -> str:
    """Cut the middle out of a text that is too long; the end of a file name tells photos apart."""
    if draw.textlength(text, font=font) <= room:
        return text
    for length in range(len(text) - 1, 2, -1):
        shorter = f"{text[: (length + 1) // 2]}…{text[len(text) - length // 2 :]}"
        if draw.textlength(shorter, font=font) <= room:
            return shorter
    return "…"
