"""Find the subject of a photo and choose the square that keeps it.

A ladder of finders: faces (`faces.py`), saliency of our own (NumPy), else the centre. The square is the largest that
fits, so only its place along the photo's long side is chosen; a box typed or dragged by the user wins over all.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastsd_helpers.errors import DatasetError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from fastsd_helpers.images.faces import Face

__all__ = ["CropBox", "crop_box", "find_saliency", "square_box", "whole_box"]

# "haar" is in the records of earlier versions, which found faces by OpenCV's cascades.
Method = Literal["box", "yunet", "mtcnn", "haar", "saliency", "center", "none"]

_SALIENCY_SIDE_PX = 96
_GEODESIC_SIDE_PX = 48
# Below this spread of colour contrast (units of the negative log-likelihood) a photo has no subject to follow.
_FLAT_CONTRAST = 0.5


@dataclass(frozen=True)
class CropBox:
    """A part of a photo, in pixels after EXIF rotation: left and top are included, right and bottom are not."""

    left: int
    top: int
    right: int
    bottom: int
    method: Method
    focus: tuple[float, float]  # the point (x, y) that was aimed at, in pixels

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.right - self.left, self.bottom - self.top

    def as_tuple(self) -> tuple[int, int, int, int]:
        """The box as Pillow's `crop` takes it."""
        return self.left, self.top, self.right, self.bottom


def crop_box(
    image: "Image.Image", *, method: Literal["smart", "center"] = "smart", face_model: Path | str | None = None
) -> CropBox:
    """Choose the largest square of a photo that keeps its subject.

    Args:
        image: the photo, already rotated by its EXIF tag; any mode that converts to RGB.
        method: "center" ignores the content.
        face_model: YuNet's ONNX file; else the one that the variable FASTSD_FACE_MODEL names; else MTCNN.

    Returns:
        The square, in pixels of the photo, and what decided it.

    Raises:
        DatasetError: a face model was named and cannot be used.
    """
    from fastsd_helpers.images.faces import find_faces

    width, height = image.size
    middle = (width / 2, height / 2)
    saliency = None
    if method != "center" and width != height:
        rgb = image.convert("RGB")
        saliency = find_saliency(rgb)
        finder, faces = find_faces(rgb, face_model=face_model)
        if faces:
            start, focus = _frame_faces(width, height, faces, saliency)
            return _square_from(width, height, start, finder, focus)
    if saliency is None:
        return _square_from(width, height, abs(width - height) / 2, "center", middle)
    start = _best_start(_profile(saliency, width, height), width, height)
    return _square_from(width, height, start, "saliency", _centre_of_mass(saliency, width, height))


def whole_box(image: "Image.Image", *, longest: float, face_model: Path | str | None = None) -> CropBox:
    """The whole photo, with the place of its subject; of a longer one the part around it.

    Args:
        image: the upright photo.
        longest: the most that the long side may be, in short sides.
        face_model: as in `crop_box`.

    Raises:
        DatasetError: a face model was named and cannot be used.
    """
    width, height = image.size
    square = crop_box(image, face_model=face_model)
    # Along the long side the square is about the whole subject; across it only the subject's own place is known.
    middle = ((square.left + square.right) / 2, (square.top + square.bottom) / 2)
    focus = (middle[0], square.focus[1]) if width >= height else (square.focus[0], middle[1])
    most = math.ceil(min(width, height) * longest)
    kept_w, kept_h = min(width, most), min(height, most)
    left = round(min(max(focus[0] - kept_w / 2, 0), width - kept_w))
    top = round(min(max(focus[1] - kept_h / 2, 0), height - kept_h))
    return CropBox(left, top, left + kept_w, top + kept_h, "none", focus)


def square_box(box: Sequence[float], width: int, height: int) -> CropBox:
    """Extend a box that the user chose to a square within the photo, moving it as little as possible.

    A box longer than the photo's short side keeps as much of its middle as a square can hold.

    Args:
        box: left, top, right, bottom in pixels after EXIF rotation.
        width: the photo's size in pixels.
        height: the photo's size in pixels.

    Returns:
        The square, in pixels of the photo.

    Raises:
        DatasetError: not four numbers, empty, or reaching outside the photo.
    """
    hint = f"Give left, top, right, bottom in pixels of the upright photo, which is {width} x {height}."
    numbers = [v for v in box if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if len(box) != 4 or len(numbers) != 4:
        raise DatasetError(f"{list(box)} is not a box of four numbers.", hint)
    left, top, right, bottom = numbers
    if right - left < 1 or bottom - top < 1:
        raise DatasetError(f"The box {list(box)} is empty: right must be beyond left and bottom beyond top.", hint)
    if left < 0 or top < 0 or right > width or bottom > height:
        raise DatasetError(f"The box {list(box)} reaches outside the photo of {width} x {height}.", hint)
    side = min(math.ceil(max(right - left, bottom - top)), width, height)
    centre = ((left + right) / 2, (top + bottom) / 2)
    x = round(min(max(centre[0] - side / 2, 0), width - side))
    y = round(min(max(centre[1] - side / 2, 0), height - side))
    return CropBox(x, y, x + side, y + side, "box", centre)


# ------------------------------------------------------------------------------------------------- faces


def _frame_faces(
    width: int, height: int, faces: "list[Face]", saliency: "np.ndarray | None"
) -> tuple[float, tuple[float, float]]:
    """Place the square so that all faces are in it, or the most of them when they cannot all be.

    Among the places that are equally good for the faces the body decides, by saliency.
    """
    import numpy as np

    long, side = max(width, height), min(width, height)
    along = 0 if width >= height else 1
    # Half a face around it: detectors draw their box from brow to chin, without hair.
    spans = []
    for face in faces:
        low, high = face[along], face[along + 2]
        margin = (high - low) / 2
        spans.append(
            (max(0.0, low - margin), min(float(long), high + margin), (face[2] - face[0]) * (face[3] - face[1]))
        )
    starts = np.linspace(0, long - side, num=min(long - side + 1, 400))
    kept = np.zeros(len(starts))
    for low, high, area in spans:
        share = np.clip(np.minimum(high, starts + side) - np.maximum(low, starts), 0, None) / (high - low)
        # Squared: one whole face is worth more than two halves with the gap between them in the middle.
        kept += area * share**2
    good = starts[kept >= kept.max() * 0.995]
    inside = [
        f for f, (low, high, _) in zip(faces, spans, strict=True) if _overlaps(low, high, good[0], good[-1] + side)
    ]
    focus = (
        (min(f[0] for f in inside) + max(f[2] for f in inside)) / 2,
        (min(f[1] for f in inside) + max(f[3] for f in inside)) / 2,
    )
    wanted = focus[along] - side / 2
    if saliency is not None:
        wanted = (wanted + _best_start(_profile(saliency, width, height), width, height)) / 2
    return float(good[np.abs(good - wanted).argmin()]), focus


def _overlaps(low: float, high: float, start: float, end: float) -> bool:
    return min(high, end) - max(low, start) > (high - low) / 2


# ---------------------------------------------------------------------------------------------- saliency


def find_saliency(image: "Image.Image") -> "np.ndarray | None":
    """Map where a photo's subject probably is, by two signs that need no trained model.

    Contrast: how unlike the colours of the photo's frame a place is. Distance: how much colour change lies between a
    place and either end of the long side; a subject that touches the other two sides is not punished for it.

    Args:
        image: RGB.

    Returns:
        float [h, w] in 0..1, the long side at most 96; None when the photo is as good as flat.

    Source: the idea of the geodesic distance to the frame is of Wei et al., "Geodesic Saliency Using Background
    Priors" (ECCV 2012); of the likelihood under the frame's colours, of Zhu et al., "Saliency Optimization from Robust
    Background Detection" (CVPR 2014). The weights were chosen on photos of single subjects; see
    benchmarks/results/smart_crop.md.
    """
    import numpy as np

    lab = _smooth(_to_lab(_shrink(image, _SALIENCY_SIDE_PX)))
    contrast = _contrast_with_frame(lab)
    if np.ptp(contrast) < _FLAT_CONTRAST:
        return None
    distance = _distance_from_ends(_to_lab(_shrink(image, _GEODESIC_SIDE_PX)))
    saliency = 2 * _normalise(_enlarge(distance, contrast.shape)) + _normalise(contrast)
    return saliency / 3


def _shrink(image: "Image.Image", side_px: int) -> "np.ndarray":
    import numpy as np
    from PIL import Image

    scale = side_px / max(image.size)
    size = max(4, round(image.width * scale)), max(4, round(image.height * scale))
    kind = Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BILINEAR
    return np.asarray(image.resize(size, kind), dtype=np.float64)


def _enlarge(values: "np.ndarray", shape: tuple[int, int]) -> "np.ndarray":
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BILINEAR), dtype=np.float64)


def _to_lab(rgb: "np.ndarray") -> "np.ndarray":
    """Convert sRGB [h, w, 3] in 0..255 to CIE L*a*b* (D65), where distances are what an eye sees."""
    import numpy as np

    linear = np.where(rgb > 10.31, ((rgb / 255 + 0.055) / 1.055) ** 2.4, rgb / 255 / 12.92)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def _smooth(values: "np.ndarray") -> "np.ndarray":
    import numpy as np

    kernel = np.exp(-0.5 * (np.arange(-2, 3) / 0.7) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        edges = [(2, 2) if i == axis else (0, 0) for i in range(values.ndim)]
        padded = np.pad(values, edges, mode="edge")
        length = values.shape[axis]
        values = sum(kernel[i] * padded.take(range(i, i + length), axis=axis) for i in range(5))
    return values


def _normalise(values: "np.ndarray") -> "np.ndarray":
    import numpy as np

    low, high = np.percentile(values, (2, 98))
    return np.clip((values - low) / max(high - low, 1e-9), 0, 1)


def _contrast_with_frame(lab: "np.ndarray", spread: float = 10.0) -> "np.ndarray":
    """How unlikely each colour is among those within 3 % of the photo's edge (a kernel density, negative log)."""
    import numpy as np

    height, width, _ = lab.shape
    thick = max(1, round(0.03 * max(height, width)))
    inner = np.zeros((height, width), dtype=bool)
    inner[thick:-thick, thick:-thick] = True
    frame = lab[~inner]
    frame = frame[:: max(1, len(frame) // 200)]
    cells = lab.reshape(-1, 3)
    squared = (cells**2).sum(1)[:, None] + (frame**2).sum(1)[None] - 2 * cells @ frame.T
    likelihood = np.exp(-squared / (2 * spread**2)).mean(1)
    return -np.log(likelihood + 1e-3).reshape(height, width)


def _distance_from_ends(lab: "np.ndarray", ignored: float = 3.0) -> "np.ndarray":
    """Least colour change on any path to either end of the long side (Dijkstra); steps below `ignored` are free."""
    import numpy as np

    height, width, _ = lab.shape
    ends = [(y, x) for y in range(height) for x in (0, width - 1)]
    if height > width:
        ends = [(y, x) for x in range(width) for y in (0, height - 1)]
    distance = [[math.inf] * width for _ in range(height)]
    for y, x in ends:
        distance[y][x] = 0.0
    queue = [(0.0, y, x) for y, x in ends]
    colours = lab.tolist()
    while queue:
        so_far, y, x = heapq.heappop(queue)
        if so_far > distance[y][x]:
            continue
        for near_y, near_x in ((y, x + 1), (y + 1, x), (y, x - 1), (y - 1, x)):
            if 0 <= near_y < height and 0 <= near_x < width:
                reached = so_far + max(0.0, math.dist(colours[y][x], colours[near_y][near_x]) - ignored)
                if reached < distance[near_y][near_x]:
                    distance[near_y][near_x] = reached
                    heapq.heappush(queue, (reached, near_y, near_x))
    return np.array(distance)


# ------------------------------------------------------------------------------------------------- place


def _profile(saliency: "np.ndarray", width: int, height: int) -> "np.ndarray":
    """Sum saliency across the short side, with less weight towards all edges; float [cells along the long side]."""
    import numpy as np

    along = saliency if width >= height else saliency.T
    across_place = (np.arange(along.shape[0]) + 0.5) / along.shape[0] - 0.5
    along_place = (np.arange(along.shape[1]) + 0.5) / along.shape[1] - 0.5
    weights = np.exp(-((across_place[:, None] / 0.6) ** 2) / 2 - (along_place[None] / 0.4) ** 2 / 2)
    return (along * weights).sum(axis=0)


def _best_start(profile: "np.ndarray", width: int, height: int) -> float:
    """Where along the long side the square keeps the most; the outer eighths of the square count for less,
    so that the subject comes to lie well inside it."""
    import numpy as np

    long, side = max(width, height), min(width, height)
    places = (np.arange(len(profile)) + 0.5) * long / len(profile)
    starts = np.linspace(0, long - side, num=61)
    from_middle = np.abs(places[None] - (starts[:, None] + side / 2)) / (side / 2)
    weights = np.where(from_middle <= 1, 0.5 + 0.5 * np.clip((1 - from_middle) / 0.25, 0, 1), 0)
    scores = weights @ profile
    best = np.flatnonzero(scores >= scores.max() - 1e-9)
    return float(starts[best[len(best) // 2]])


def _centre_of_mass(saliency: "np.ndarray", width: int, height: int) -> tuple[float, float]:
    import numpy as np

    mass = saliency**2
    y = (mass.sum(1) * (np.arange(mass.shape[0]) + 0.5)).sum() / mass.sum() * height / mass.shape[0]
    x = (mass.sum(0) * (np.arange(mass.shape[1]) + 0.5)).sum() / mass.sum() * width / mass.shape[1]
    return float(x), float(y)


def _square_from(width: int, height: int, start: float, method: Method, focus: tuple[float, float]) -> CropBox:
    side = min(width, height)
    place = min(max(round(start), 0), max(width, height) - side)
    left, top = (place, 0) if width >= height else (0, place)
    return CropBox(left, top, left + side, top + side, method, focus)
