"""Captioned images drawn by code: 10 objects x 8 colours x 5 places x 6 backgrounds x 3 styles = 7,200 combinations.

One combination in ten is held out by its own hash, so that a model can be judged on captions it never saw.
Three subjects of kinds absent from the 7,200 (a robot, a fish, a mushroom) are what DreamBooth teaches.
"""

import hashlib
import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageDraw

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "OBJECTS",
    "PLACES",
    "SIZE_PX",
    "STYLES",
    "SUBJECTS",
    "Scene",
    "all_scenes",
    "draw_scene",
    "draw_subject",
    "is_held_out",
    "shorten_caption",
    "subject_caption",
]

SIZE_PX = 128
_SCALE = 2  # drawn larger and scaled down, for smooth edges

OBJECTS = ("ball", "box", "triangle", "star", "heart", "cross", "ring", "moon", "arrow", "house")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 211, 40),
    "green": (30, 140, 60),
    "blue": (35, 80, 210),
    "purple": (125, 45, 170),
    "white": (250, 250, 250),
    "black": (20, 20, 24),
}
PLACES = {
    "in the middle": (0.50, 0.50),
    "on the left": (0.29, 0.50),
    "on the right": (0.71, 0.50),
    "at the top": (0.50, 0.29),
    "at the bottom": (0.50, 0.71),
}
# Top and bottom colour of a soft vertical gradient.
BACKGROUNDS = {
    "sky": ((150, 200, 240), (205, 230, 248)),
    "grass": ((165, 205, 130), (135, 185, 100)),
    "sand": ((228, 208, 165), (208, 180, 130)),
    "night": ((42, 46, 92), (72, 72, 122)),
    "stone": ((150, 152, 156), (122, 124, 130)),
    "rose": ((242, 192, 205), (228, 158, 180)),
}
STYLES = ("flat", "outlined", "striped")
SUBJECTS = ("robot", "fish", "mushroom")


@dataclass(frozen=True)
class Scene:
    """One combination; `caption` says all of it."""

    object: str
    colour: str
    place: str
    background: str
    style: str

    @property
    def caption(self) -> str:
        """The words that a model is taught this scene with."""
        return f"a {self.style} {self.colour} {self.object} {self.place}, {self.background} background"


def all_scenes() -> list[Scene]:
    """All 7,200 combinations in a fixed order."""
    return [Scene(*values) for values in product(OBJECTS, COLOURS, PLACES, BACKGROUNDS, STYLES)]


def is_held_out(scene: Scene) -> bool:
    """True for the tenth of the combinations that no training ever sees."""
    return hashlib.sha256(scene.caption.encode()).digest()[0] < 26


def shorten_caption(scene: Scene, generator: "np.random.Generator") -> str:
    """The caption with parts left out at random, as people write: the object itself always stays."""
    words = ["a"]
    if generator.random() < 0.85:
        words.append(scene.style)
    if generator.random() < 0.93:
        words.append(scene.colour)
    words.append(scene.object)
    if generator.random() < 0.85:
        words.append(scene.place)
    text = " ".join(words)
    return f"{text}, {scene.background} background" if generator.random() < 0.85 else text


def draw_scene(scene: Scene, generator: "np.random.Generator") -> "Image.Image":
    """Draw one image of a combination: RGB, 128 x 128; place, size, tilt and shade vary with `generator`."""
    from PIL import Image, ImageDraw

    canvas = _draw_background(scene.background, generator)
    side = SIZE_PX * _SCALE
    radius = side * generator.uniform(0.19, 0.245)
    centre = [part * side + generator.normal(0, 0.012 * side) for part in PLACES[scene.place]]
    turn = 0.0 if scene.object in ("house", "moon") else generator.normal(0, 0.10)
    shape = Image.new("L", (side, side), 0)
    _draw_shape(ImageDraw.Draw(shape), scene.object, centre, radius, turn)
    colour = _shade(COLOURS[scene.colour], generator, spread=10)
    fill = Image.new("RGB", (side, side), colour)
    if scene.style == "striped":
        _draw_stripes(fill, colour, radius)
    if scene.style == "outlined":
        from PIL import ImageFilter

        # A steep curve over a blur grows and shrinks the shape, far faster than a rank filter.
        soft = shape.filter(ImageFilter.GaussianBlur(_SCALE * 2))
        edge = (235, 235, 235) if sum(colour) < 120 else (15, 15, 20)
        canvas.paste(edge, mask=soft.point([min(255, max(0, (value - 12) * 6)) for value in range(256)]))
        shape = soft.point([min(255, max(0, (value - 190) * 6)) for value in range(256)])
    canvas.paste(fill, mask=shape)
    return canvas.reduce(_SCALE)


def _shade(colour: tuple[int, int, int], generator: "np.random.Generator", *, spread: float) -> tuple[int, int, int]:
    red, green, blue = (int(min(255, max(0, part + generator.normal(0, spread)))) for part in colour)
    return red, green, blue


def _draw_background(name: str, generator: "np.random.Generator") -> "Image.Image":
    import numpy as np
    from PIL import Image

    side = SIZE_PX * _SCALE
    top, bottom = (np.array(_shade(colour, generator, spread=5), dtype=np.float32) for colour in BACKGROUNDS[name])
    ramp = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    rows = top * (1 - ramp) + bottom * ramp
    return Image.fromarray(np.broadcast_to(rows, (side, side, 3)).astype(np.uint8))


def _draw_stripes(fill: "Image.Image", colour: tuple[int, int, int], radius: float) -> None:
    from PIL import ImageDraw

    # White cannot get lighter: its stripes are darker.
    other = tuple(int(part * 0.62) if sum(colour) > 600 else int(part + (255 - part) * 0.6) for part in colour)
    pen = ImageDraw.Draw(fill)
    width = radius / 3.2
    for index in range(math.ceil(fill.height / width)):
        if index % 2:
            pen.rectangle((0, index * width, fill.width, (index + 1) * width), fill=other)


def _points(centre: list[float], radius: float, turn: float, polygon: list[tuple[float, float]]) -> list:
    cos, sin = math.cos(turn), math.sin(turn)
    return [(centre[0] + radius * (x * cos - y * sin), centre[1] + radius * (x * sin + y * cos)) for x, y in polygon]


def _disc(centre: list[float], radius: float) -> tuple[float, float, float, float]:
    return (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)


def _polygon_of(name: str) -> list[tuple[float, float]]:
    if name == "box":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if name == "triangle":
        return [(0, -1.05), (1.05, 0.8), (-1.05, 0.8)]
    if name == "star":
        return [
            (
                math.sin(k * math.pi / 5) * (1.12 if k % 2 == 0 else 0.48),
                -math.cos(k * math.pi / 5) * (1.12, 0.48)[k % 2],
            )
            for k in range(10)
        ]
    if name == "heart":
        steps = [k * 2 * math.pi / 60 for k in range(60)]
        return [
            (
                0.064 * 16 * math.sin(t) ** 3,
                -0.064 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
            )
            for t in steps
        ]
    if name == "cross":
        a, b = 0.34, 1.0
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    if name == "arrow":
        return [(-1.05, -0.32), (0.1, -0.32), (0.1, -0.85), (1.1, 0), (0.1, 0.85), (0.1, 0.32), (-1.05, 0.32)]
    return [(-0.72, 1.0), (-0.72, -0.1), (-1.05, -0.1), (0, -1.05), (1.05, -0.1), (0.72, -0.1), (0.72, 1.0)]  # house


def _draw_shape(pen: "ImageDraw.ImageDraw", name: str, centre: list[float], radius: float, turn: float) -> None:
    if name == "ball":
        pen.ellipse(_disc(centre, radius), fill=255)
    elif name == "ring":
        pen.ellipse(_disc(centre, radius * 1.05), fill=255)
        pen.ellipse(_disc(centre, radius * 0.52), fill=0)
    elif name == "moon":
        pen.ellipse(_disc(centre, radius), fill=255)
        pen.ellipse(_disc([centre[0] + radius * 0.5, centre[1] - radius * 0.18], radius * 0.82), fill=0)
    else:
        pen.polygon(_points(centre, radius, turn, _polygon_of(name)), fill=255)
    if name == "house":
        # A door tells a house from an arrow pointing up.
        left, top = _points(centre, radius, turn, [(-0.2, 0.35)])[0]
        pen.rectangle((left, top, left + radius * 0.4, centre[1] + radius), fill=0)


def subject_caption(subject: str, place: str, background: str) -> str:
    """What a person would write about one photo of the subject: its made-up name, its kind, where it is."""
    return f"a {_NAMES[subject]} {subject} {place}, {background} background"


_NAMES = {"robot": "zib", "fish": "wox", "mushroom": "quap"}


def draw_subject(subject: str, place: str, background: str, generator: "np.random.Generator") -> "Image.Image":
    """Draw one image of a demo subject: RGB, 128 x 128. The subject is always the same; size and tilt vary."""
    from PIL import Image, ImageDraw

    side = SIZE_PX * _SCALE
    radius = side * generator.uniform(0.18, 0.21)
    centre = [part * side + generator.normal(0, 0.01 * side) for part in PLACES[place]]
    canvas = _draw_background(background, generator)
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    {"robot": _draw_robot, "fish": _draw_fish, "mushroom": _draw_mushroom}[subject](
        ImageDraw.Draw(layer), centre, radius
    )
    layer = layer.rotate(generator.normal(0, 4), Image.Resampling.BICUBIC, center=(centre[0], centre[1]))
    canvas.paste(layer, mask=layer)
    return canvas.reduce(_SCALE)


def _draw_robot(pen: "ImageDraw.ImageDraw", centre: list[float], r: float) -> None:
    x, y = centre
    pen.rectangle((x - 0.07 * r, y - 1.15 * r, x + 0.07 * r, y - 0.7 * r), fill=(60, 60, 70))
    pen.ellipse(_disc([x, y - 1.15 * r], 0.17 * r), fill=(230, 50, 60))
    pen.rounded_rectangle((x - r, y - 0.75 * r, x + r, y + 0.95 * r), radius=0.2 * r, fill=(40, 160, 165))
    for dx in (-0.45, 0.45):
        pen.ellipse(_disc([x + dx * r, y - 0.15 * r], 0.28 * r), fill=(250, 235, 120))
        pen.ellipse(_disc([x + dx * r, y - 0.15 * r], 0.11 * r), fill=(20, 20, 30))
    pen.rectangle((x - 0.55 * r, y + 0.4 * r, x + 0.55 * r, y + 0.66 * r), fill=(25, 60, 70))


def _draw_fish(pen: "ImageDraw.ImageDraw", centre: list[float], r: float) -> None:
    x, y = centre
    orange, white = (245, 120, 30), (250, 245, 235)
    pen.polygon([(x + 0.6 * r, y), (x + 1.2 * r, y - 0.6 * r), (x + 1.2 * r, y + 0.6 * r)], fill=(35, 60, 150))
    pen.polygon(
        [(x - 0.3 * r, y - 0.5 * r), (x + 0.3 * r, y - 1.0 * r), (x + 0.45 * r, y - 0.4 * r)], fill=(35, 60, 150)
    )
    pen.ellipse((x - 1.1 * r, y - 0.68 * r, x + 0.85 * r, y + 0.68 * r), fill=orange)
    for dx, half in ((-0.35, 0.6), (0.25, 0.52)):
        pen.rectangle((x + (dx - 0.1) * r, y - half * r, x + (dx + 0.1) * r, y + half * r), fill=white)
    pen.ellipse(_disc([x - 0.72 * r, y - 0.14 * r], 0.17 * r), fill=(255, 255, 255))
    pen.ellipse(_disc([x - 0.75 * r, y - 0.14 * r], 0.09 * r), fill=(10, 10, 20))


def _draw_mushroom(pen: "ImageDraw.ImageDraw", centre: list[float], r: float) -> None:
    x, y = centre
    pen.rounded_rectangle(
        (x - 0.32 * r, y - 0.05 * r, x + 0.32 * r, y + 1.05 * r), radius=0.2 * r, fill=(240, 228, 200)
    )
    pen.chord((x - 1.1 * r, y - 1.05 * r, x + 1.1 * r, y + 0.85 * r), 180, 360, fill=(200, 30, 60))
    for dx, dy, size in ((-0.55, -0.4, 0.19), (0.05, -0.68, 0.22), (0.58, -0.35, 0.17), (0.08, -0.28, 0.13)):
        pen.ellipse(_disc([x + dx * r, y + dy * r], size * r), fill=(252, 250, 240))
