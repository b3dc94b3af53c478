"""Smart crop: the subject stays in the square, faces come first, and boxes typed by the user are obeyed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.images import faces as faces_module
from fastsd_helpers.images.smart_crop import CropBox, crop_box, find_saliency, square_box

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared" / "data" / "dreambooth"
pytestmark = pytest.mark.numeric  # of OpenCV


def draw_scene(width: int, height: int, subject: tuple[int, int, int, int], *, seed: int = 0) -> Image.Image:
    """A red ball with a blue stripe on a noisy green ground: colours, texture and an edge, as photos have."""
    noise = np.random.default_rng(seed).normal(0, 18, (height, width, 1))
    ground = np.array([70, 120, 60]) + noise + np.linspace(-25, 25, width)[None, :, None]
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    draw = ImageDraw.Draw(image)
    draw.ellipse(subject, fill=(200, 40, 40))
    left, top, right, bottom = subject
    draw.rectangle((left, (top + bottom) // 2 - 6, right, (top + bottom) // 2 + 6), fill=(40, 60, 190))
    return image


def holds(box: CropBox, subject: tuple[int, int, int, int]) -> bool:
    return box.left <= subject[0] and box.top <= subject[1] and box.right >= subject[2] and box.bottom >= subject[3]


@pytest.mark.parametrize(
    ("size", "subject"),
    [
        ((900, 400), (40, 120, 240, 320)),
        ((900, 400), (350, 120, 550, 320)),
        ((900, 400), (650, 90, 850, 290)),
        ((400, 900), (100, 30, 300, 230)),
        ((400, 900), (100, 660, 300, 860)),
        ((640, 480), (420, 200, 600, 380)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_square_holds_the_whole_subject_wherever_it_is(
    size: tuple[int, int], subject: tuple[int, int, int, int], seed: int
) -> None:
    box = crop_box(draw_scene(*size, subject, seed=seed))
    assert box.method == "saliency"
    assert box.size == (min(size), min(size))
    assert holds(box, subject)


@pytest.mark.parametrize("size", [(900, 400), (400, 900), (401, 400), (37, 300), (640, 640)])
def test_every_square_is_the_largest_that_fits_and_lies_within_the_photo(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    box = crop_box(Image.fromarray(noise))
    assert box.size == (min(size), min(size))
    assert 0 <= box.left < box.right <= size[0]
    assert 0 <= box.top < box.bottom <= size[1]


def test_a_flat_photo_a_square_photo_and_center_fall_back_to_the_centre() -> None:
    assert crop_box(Image.new("RGB", (900, 400), "grey")).as_tuple() == (250, 0, 650, 400)
    assert crop_box(Image.new("RGB", (900, 400), "grey")).method == "center"
    assert crop_box(draw_scene(300, 300, (0, 0, 90, 90))).as_tuple() == (0, 0, 300, 300)
    far_left = crop_box(draw_scene(900, 400, (40, 120, 240, 320)), method="center")
    assert (far_left.as_tuple(), far_left.method) == ((250, 0, 650, 400), "center")


def test_the_same_photo_is_always_cropped_the_same() -> None:
    scene = draw_scene(800, 500, (500, 100, 700, 300))
    assert crop_box(scene) == crop_box(scene.copy())


def test_saliency_is_higher_on_the_subject_than_elsewhere() -> None:
    saliency = find_saliency(draw_scene(960, 480, (600, 140, 800, 340)))
    assert saliency.shape == (48, 96)
    assert 0 <= saliency.min() <= saliency.max() <= 1
    subject = saliency[16:32, 62:78].mean()
    assert subject > 3 * saliency[:, :50].mean()
    assert find_saliency(Image.new("RGB", (960, 480), "white")) is None


def test_photos_that_are_not_rgb_are_cropped_too() -> None:
    for mode in ("L", "P", "RGBA", "CMYK"):
        assert crop_box(draw_scene(900, 400, (40, 120, 240, 320)).convert(mode)).size == (400, 400)


# ------------------------------------------------------------------------------------------------- faces


def test_all_faces_are_framed_when_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    faces = [(520.0, 60.0, 600.0, 160.0), (700.0, 60.0, 780.0, 160.0)]
    monkeypatch.setattr(faces_module, "find_faces", lambda image, face_model: ("yunet", faces))
    # A strong subject on the other side must not win against people.
    box = crop_box(draw_scene(1200, 400, (20, 120, 240, 340)))
    assert box.method == "yunet"
    assert holds(box, (520, 60, 780, 160))
    assert box.focus == (650, 110)


def test_faces_too_far_apart_are_not_answered_with_the_gap_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = (60.0, 60.0, 150.0, 170.0), (1000.0, 60.0, 1130.0, 220.0)
    monkeypatch.setattr(faces_module, "find_faces", lambda image, face_model: ("mtcnn", [left, right]))
    box = crop_box(Image.new("RGB", (1200, 400), "grey"))
    assert box.method == "mtcnn"
    assert holds(box, tuple(map(int, right)))  # the larger one, whole


def test_the_largest_group_of_faces_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    faces = [(100.0, 60.0, 180.0, 160.0), (250.0, 60.0, 330.0, 160.0), (1400.0, 60.0, 1480.0, 160.0)]
    monkeypatch.setattr(faces_module, "find_faces", lambda image, face_model: ("yunet", faces))
    assert holds(crop_box(Image.new("RGB", (1600, 400), "grey")), (100, 60, 330, 160))


def test_hair_above_a_face_at_the_top_stays_in_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces_module, "find_faces", lambda image, face_model: ("yunet", [(150.0, 200.0, 250.0, 320.0)]))
    assert crop_box(draw_scene(400, 900, (100, 640, 300, 840))).top <= 140


# ------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    ("box", "square"),
    [
        ([10, 20, 110, 120], (10, 20, 110, 120)),  # is one already
        ([100, 100, 200, 150], (100, 75, 200, 175)),  # extended evenly
        ([0, 0, 100, 50], (0, 0, 100, 100)),  # pushed back into the photo
        ([500, 150, 600, 400], (350, 150, 600, 400)),
        ([0, 100, 600, 200], (100, 0, 500, 400)),  # longer than the short side: its middle
        ([10.4, 20.4, 110.4, 120.4], (10, 20, 110, 120)),
    ],
)
def test_a_typed_box_becomes_a_square_within_the_photo(box: list[float], square: tuple[int, int, int, int]) -> None:
    result = square_box(box, 600, 400)
    assert (result.as_tuple(), result.method) == (square, "box")


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([1, 2, 3], "four numbers"),
        ([1, 2, 3, "4"], "four numbers"),
        ([1, 2, 3, float("nan")], "four numbers"),
        ([True, 2, 30, 40], "four numbers"),
        ([50, 20, 50, 100], "empty"),
        ([50, 100, 80, 20], "empty"),
        ([-5, 0, 100, 100], "outside"),
        ([0, 0, 601, 100], "outside"),
    ],
)
def test_a_box_that_makes_no_sense_is_refused_with_the_size_of_the_photo(box: list, problem: str) -> None:
    with pytest.raises(DatasetError, match=problem) as caught:
        square_box(box, 600, 400)
    assert "600 x 400" in caught.value.hint


# ------------------------------------------------------------------------------------------- real photos


@pytest.mark.skipif(
    not PHOTOS.is_dir(), reason=f"{PHOTOS} is missing: six sets of photos from github.com/google/dreambooth"
)
def test_smart_crop_keeps_more_of_real_subjects_than_the_centre_crop() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from measure_smart_crop import measure
    finally:
        sys.path.pop(0)
    boxes = json.loads((ROOT / "tests" / "data" / "subject_boxes.json").read_text())
    some = {name: box for name, box in boxes.items() if name.endswith("/01.jpg")}
    kept, _ = measure(PHOTOS, some)
    smart = np.mean([shares.smart for shares in kept.values()])
    center = np.mean([shares.center for shares in kept.values()])
    assert len(kept) > 60
    assert smart > center + 0.05
    assert smart > 0.8
