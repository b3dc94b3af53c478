"""Change images of lines a little while training: TrOCR's own set of changes, and elastic bending.

TrOCR was trained with one of: a turn of up to 10 degrees, blur, thicker ink, thinner ink, a smaller image, an
underline, or none (unilm, trocr/data_aug.py, `DA2`). Elastic bending is what helped most in later comparisons
(arXiv 2508.11499).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["KINDS", "change_line"]

KINDS = ("none", "turn", "blur", "thicker", "thinner", "smaller", "underline", "elastic")


def change_line(picture: "Image.Image", chance: "np.random.Generator", kind: str | None = None) -> "Image.Image":
    """Return an RGB image changed in one way, drawn from KINDS with equal chances unless named."""
    from PIL import Image, ImageDraw, ImageFilter

    kind = kind or KINDS[int(chance.integers(len(KINDS)))]
    paper = _paper(picture)
    if kind == "turn":
        angle = float(chance.uniform(-10, 10))
        return picture.rotate(angle, Image.Resampling.BILINEAR, expand=True, fillcolor=paper)
    if kind == "blur":
        return picture.filter(ImageFilter.GaussianBlur(float(chance.uniform(0.5, 1.5))))
    if kind == "thicker":  # ink is dark: the darkest of the neighbours wins
        return picture.filter(ImageFilter.MinFilter(3))
    if kind == "thinner":
        return picture.filter(ImageFilter.MaxFilter(3))
    if kind == "smaller":
        small = (max(1, picture.width // 3), max(1, picture.height // 3))
        return picture.resize(small, Image.Resampling.NEAREST)
    if kind == "underline":
        changed = picture.copy()
        y = int(picture.height * float(chance.uniform(0.8, 0.98)))
        ink = tuple(int(value) for value in chance.integers(0, 80, 3))
        ImageDraw.Draw(changed).line((0, y, picture.width, y), fill=ink, width=max(1, picture.height // 40))
        return changed
    if kind == "elastic":
        return _elastic(picture, chance, paper)
    return picture


def _paper(picture: "Image.Image") -> tuple[int, int, int]:
    """The colour of the paper: the median of the border."""
    import numpy as np

    values = np.asarray(picture)
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    red, green, blue = (int(value) for value in np.median(border, axis=0))
    return red, green, blue


def _elastic(picture: "Image.Image", chance: "np.random.Generator", paper: Any) -> "Image.Image":
    import numpy as np
    from PIL import Image

    width, height = picture.size
    columns, rows = max(2, width // max(1, height)), 2
    across, down = np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1)
    x, y = np.meshgrid(across, down)
    x = x + chance.normal(0, 0.06 * height, x.shape)
    y = y + chance.normal(0, 0.06 * height, y.shape)
    mesh = []
    for row in range(rows):
        for column in range(columns):
            target = (int(across[column]), int(down[row]), int(across[column + 1]), int(down[row + 1]))
            corners = [(row, column), (row + 1, column), (row + 1, column + 1), (row, column + 1)]
            mesh.append((target, [value for at in corners for value in (x[at], y[at])]))
    return picture.transform(picture.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR, fillcolor=paper)
