"""Draw lines that look written by hand: text, a free font and a style, all from one random generator.

No font is part of this package: `find_fonts` looks where Debian's packages put them, and in a folder of your own.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["LETTERS", "LineStyle", "TextSource", "draw_line", "find_fonts", "held_out_word"]

LETTERS = "".join(chr(code) for code in range(33, 127))
_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
_WORD = re.compile(r"[A-Za-z][a-z]+(?:'[a-z]+)?|[A-Z]{2,6}|\d{1,4}")
_HELD_OUT_EVERY = 12


def find_fonts(names: Iterable[str], folders: Sequence[str | Path] = _FONT_FOLDERS) -> dict[str, Path]:
    """Find font files by their names (`Kristi.ttf`) below some folders; names that are not there are left out."""
    wanted, found = set(names), {}
    for folder in folders:
        for path in sorted(Path(folder).expanduser().rglob("*")):
            if path.name in wanted:
                found.setdefault(path.name, path)
    return {name: found[name] for name in sorted(found)}


def held_out_word(word: str) -> bool:
    """Whether a word is kept for measuring: about one in twelve, by its letters alone."""
    import zlib

    return zlib.crc32(word.lower().encode()) % _HELD_OUT_EVERY == 0


class TextSource:
    """Lines of text to write: words of English prose, numbers, dates, amounts, names and made-up words.

    The prose is Python's own language reference (part of every Python), so no text has to be shipped.
    """

    def __init__(self, *, held_out: bool = False) -> None:
        import pydoc_data.topics

        words = _WORD.findall(" ".join(pydoc_data.topics.topics.values()))
        self.held_out = held_out
        self.words = [word for word in words if held_out_word(word) == held_out]

    def draw(self, chance: "np.random.Generator", longest: int = 32) -> str:
        """One line of 1 to `longest` characters."""
        target = int(chance.integers(3, longest + 1))
        parts: list[str] = []
        length = 0
        while True:
            part = self._part(chance)
            if length + len(part) + (1 if parts else 0) > target:
                break
            parts.append(part)
            length += len(part) + 1
        return " ".join(parts) or self._part(chance)[:longest]

    def _part(self, chance: "np.random.Generator") -> str:
        kind = chance.random()
        if kind < 0.72 or self.held_out:
            word = self.words[int(chance.integers(len(self.words)))]
            style = chance.random()
            word = word.capitalize() if style < 0.15 else word.upper() if style < 0.19 else word
            return word + self._ending(chance)
        if kind < 0.82:  # letters in no order: nothing can be guessed, so the picture must be read
            count = int(chance.integers(1, 8))
            return "".join(LETTERS[int(place)] for place in chance.integers(0, len(LETTERS), count))
        if kind < 0.90:
            return "".join(str(digit) for digit in chance.integers(0, 10, int(chance.integers(1, 7))))
        if kind < 0.94:
            return f"{chance.integers(1, 32)}.{chance.integers(1, 13)}.{chance.integers(1800, 2030)}"
        if kind < 0.97:
            return f"{'$#'[int(chance.integers(2))]}{chance.integers(0, 2000)}.{chance.integers(0, 100):02d}"
        return f"{LETTERS[32 + int(chance.integers(26))]}. {self.words[int(chance.integers(len(self.words)))].title()}"

    @staticmethod
    def _ending(chance: "np.random.Generator") -> str:
        if chance.random() > 0.16:
            return ""
        return [",", ".", ";", ":", "!", "?", "-", "'s", ")", '"'][int(chance.integers(10))]


@dataclass(frozen=True)
class LineStyle:
    """How far a line may stray; 0 everywhere is the font as it is, black on white."""

    slant: float = 0.25  # horizontal shear, either way
    rotation: float = 1.5  # degrees of the whole line, either way
    wobble: float = 0.06  # of the letter height: words up and down
    elastic: float = 0.05  # of the letter height: bending within words
    noise: float = 1.0  # paper, blur, rules, uneven light: 0 none, 1 as scans have it


def draw_line(
    text: str, font_path: Path, chance: "np.random.Generator", style: LineStyle | None = None, *, height: int = 64
) -> "Image.Image":
    """Draw `text` in a font, as somebody might have written and scanned it.

    Returns:
        A grey picture ("L") about `height` px high, as wide as the text needs; equal for equal generators.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    style = style or LineStyle()
    font = ImageFont.truetype(str(font_path), int(height * 0.62))
    gap = float(chance.uniform(0.75, 1.5))
    words, x = [], 0.0
    for word in text.split(" "):
        words.append((word, x, float(chance.normal(0, style.wobble)) * height))
        x += font.getlength(word) + font.getlength(" ") * gap * float(chance.uniform(0.8, 1.3))
    margin = height
    canvas = Image.new("L", (int(x) + 2 * margin, 3 * height), 0)
    pen = ImageDraw.Draw(canvas)
    thick = int(chance.random() < 0.2 * (style.noise > 0))
    for word, left, up in words:
        pen.text((margin + left, 1.3 * height + up), word, font=font, fill=255, stroke_width=thick, anchor="ls")
    canvas = _bend(canvas, chance, style, height)
    box = canvas.getbbox() or (0, 0, height, height)
    pad = chance.uniform(0.02, 0.35, 4) * height if style.noise else np.full(4, 0.12 * height)
    canvas = canvas.crop((int(box[0] - pad[0]), int(box[1] - pad[1] * 0.7), int(box[2] + pad[2]),
                          int(box[3] + pad[3] * 0.7)))  # fmt: skip
    return _scan(canvas, chance, style)


def _bend(ink: Any, chance: "np.random.Generator", style: LineStyle, height: int) -> Any:
    """Shear, turn and bend: a coarse net of corners is moved, and the picture with it."""
    import numpy as np
    from PIL import Image

    if not (style.slant or style.rotation or style.elastic):
        return ink
    width, tall = ink.size
    columns, rows = max(2, width // height), 4
    across, down = np.linspace(0, width, columns + 1), np.linspace(0, tall, rows + 1)
    x, y = np.meshgrid(across, down)
    shear = float(chance.uniform(-style.slant, style.slant))
    turn = np.tan(np.radians(float(chance.uniform(-style.rotation, style.rotation))))
    moved_x = x + shear * (y - tall / 2) + chance.normal(0, style.elastic * height, x.shape)
    moved_y = y + turn * (x - width / 2) + chance.normal(0, style.elastic * height, x.shape)
    mesh = []
    for row in range(rows):
        for column in range(columns):
            target = (int(across[column]), int(down[row]), int(across[column + 1]), int(down[row + 1]))
            corners = [(row, column), (row + 1, column), (row + 1, column + 1), (row, column + 1)]
            mesh.append((target, [value for at in corners for value in (moved_x[at], moved_y[at])]))
    return ink.transform(ink.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _scan(ink: Any, chance: "np.random.Generator", style: LineStyle) -> Any:
    """Put ink (255 = full) on paper: colours, uneven light, ruled lines, specks, a soft lens."""
    import numpy as np
    from PIL import Image, ImageFilter

    if not style.noise:
        return Image.eval(ink, lambda value: 255 - value)
    kind = chance.random()
    if kind < 0.12:
        ink = ink.filter(ImageFilter.MinFilter(3))
    elif kind < 0.24:
        ink = ink.filter(ImageFilter.MaxFilter(3))
    if chance.random() < 0.5:
        ink = ink.filter(ImageFilter.GaussianBlur(float(chance.uniform(0.3, 1.6)) * style.noise))
    values = np.asarray(ink, np.float32) / 255
    tall, width = values.shape
    paper = float(chance.uniform(150, 255))
    dark = float(chance.uniform(0, 0.55)) * paper
    if chance.random() < 0.3:  # a pen that runs dry
        fade = np.interp(np.arange(width), np.linspace(0, width, 6), chance.uniform(0.5, 1, 6))
        values = values * fade[None, :].astype(np.float32)
    page = np.full((tall, width), paper, np.float32)
    if chance.random() < 0.5:
        page += np.linspace(-1, 1, width, dtype=np.float32)[None, :] * float(chance.uniform(-25, 25)) * style.noise
    if chance.random() < 0.15:
        row = int(chance.uniform(0.6, 0.98) * tall)
        page[row : row + int(chance.integers(1, 3))] *= float(chance.uniform(0.5, 0.9))
    picture = page * (1 - values) + dark * values
    picture += chance.normal(0, float(chance.uniform(0, 10)) * style.noise, picture.shape)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
