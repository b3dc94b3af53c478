"""Pillow in a web UI: only the wanted formats are decoded, and names that newer versions dropped are there again."""

from typing import Any

from frame import patch, when_loaded

__all__ = ["FORMATS"]

# No PSD, EPS (which starts Ghostscript), FITS, ...: decoders that no web UI needs and that had most of the holes.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "ICO")


@patch("PIL.Image", "open", "fp mode= formats=")
def _(original: Any) -> Any:
    def open(fp: Any, mode: str = "r", formats: Any = None) -> Any:
        from PIL import Image

        Image.init()  # with a list given, Pillow loads no decoder by itself, and ends at one it has not
        asked = FORMATS if formats is None else [name.upper() for name in formats]
        wanted = [name for name in asked if name in FORMATS and name in Image.OPEN]
        if not wanted:
            raise ValueError("fastsd guard: this image format is not opened")
        return original(fp, mode, wanted)

    return open


@when_loaded("PIL.Image")
def _(module: Any) -> None:
    # Gone since Pillow 10; ControlNet's annotators and facexlib use them.
    for old, new in (("LINEAR", "BILINEAR"), ("CUBIC", "BICUBIC"), ("ANTIALIAS", "LANCZOS"), ("NEAREST", "NEAREST")):
        if not hasattr(module, old):
            setattr(module, old, getattr(module.Resampling, new))


@when_loaded("PIL.ImageDraw")
def _(module: Any) -> None:
    drawing = module.ImageDraw
    if not hasattr(drawing, "textsize"):

        def textsize(self: Any, text: str, font: Any = None, *more: Any, **named: Any) -> tuple[int, int]:
            left, top, right, bottom = self.textbbox((0, 0), text, font, **named)
            return right - min(left, 0), bottom - min(top, 0)

        drawing.textsize = textsize
    if not hasattr(drawing, "multiline_textsize"):

        def multiline_textsize(self: Any, text: str, font: Any = None, spacing: int = 4, **named: Any) -> Any:
            left, top, right, bottom = self.multiline_textbbox((0, 0), text, font, spacing=spacing, **named)
            return right - min(left, 0), bottom - min(top, 0)

        drawing.multiline_textsize = multiline_textsize


@when_loaded("PIL.ImageFont")
def _(module: Any) -> None:
    font = module.FreeTypeFont
    if not hasattr(font, "getsize"):

        def getsize(self: Any, text: str, *more: Any, **named: Any) -> tuple[int, int]:
            left, top, right, bottom = self.getbbox(text, **named)
            return right - min(left, 0), bottom - min(top, 0)

        font.getsize = getsize
