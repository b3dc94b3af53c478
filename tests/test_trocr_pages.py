"""Pages: reading order, joining, turning; and the real detector on a page drawn here."""

import math
import sys
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw, ImageFont
from tiny_readers import write_reader

from fastsd_helpers.errors import DependencyMissing
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.pages.line_pieces import join_pieces
from fastsd_helpers.trocr.pages.page_reader import _upside_down, find_lines, read_page, turn_back
from fastsd_helpers.trocr.pages.reading_order import order_boxes
from fastsd_helpers.trocr.reading.attention import draw_attention, find_attention


def column(x, rows, width=200, first=100):
    return [(x, first + 40 * row, x + width, first + 40 * row + 25) for row in range(rows)]


def test_two_columns_are_read_one_after_the_other_below_their_heading():
    heading = (0, 20, 460, 60)
    left, right = column(0, 5), column(260, 5)
    foot = (0, 400, 460, 430)
    mixed = [*right[::-1], foot, *left[::2], heading, *left[1::2]]
    assert order_boxes(mixed) == [heading, *left, *right, foot]


def test_columns_whose_rows_are_not_level_and_of_unequal_length():
    left, right = column(0, 6), column(260, 4, first=113)
    assert order_boxes([*right, *left]) == [*left, *right]


def test_a_single_column_with_short_lines_is_read_downwards():
    rows = [(0, 40 * row, 100 + 60 * (row % 3), 40 * row + 25) for row in range(7)]
    assert order_boxes(rows[::-1]) == rows


def test_words_of_one_line_are_joined_and_columns_are_not():
    words = [(0, 10, 90, 35), (100, 12, 180, 36), (400, 10, 500, 35)]
    assert join_pieces(words) == [(0, 10, 180, 36), (400, 10, 500, 35)]


@pytest.mark.parametrize("angle", [90, 180, 270, 3.0])
def test_a_point_of_a_turned_page_is_found_again(angle):
    page = Image.new("L", (301, 201), 0)
    page.paste(255, (40, 150, 43, 153))
    turned = page.rotate(angle, expand=True, resample=2)
    box = turned.point(lambda value: 255 * (value > 60)).getbbox()
    x, y = turn_back(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), turned.size, page.size, angle)
    assert math.dist((x, y), (41.5, 151.5)) < 2


def draw_page():
    page = Image.new("RGB", (1000, 700), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=34)
    for row in range(6):
        pen.text((40, 60 + 90 * row), f"left line {row} of text", font=font, fill="black")
        pen.text((560, 60 + 90 * row), f"right line {row} here", font=font, fill="black")
    return page


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("angle", [0, 4])
def test_the_lines_of_a_drawn_page_are_found_in_order(tmp_path, angle):
    pytest.importorskip("rapidocr")
    write_reader(tmp_path / "reader", seed=1, end=4.0)
    reader = Reader(tmp_path / "reader", precision="fp32", max_new_tokens=4)
    page = draw_page().rotate(angle, expand=True, fillcolor="white", resample=2)
    assert len(find_lines(page)) >= 12
    result = read_page(reader, page, name="drawn", order="columns")
    assert len(result.lines) == 12
    if abs(result.turned % 360) < 45 or abs(result.turned % 360) > 315:  # random weights cannot tell which way is up
        assert result.turned == pytest.approx(-angle, abs=1)
        centres = [tuple(sum(axis) / 4 for axis in zip(*line.box, strict=True)) for line in result.lines]
        assert all(x < page.width / 2 for x, _y in centres[:6])
        assert all(x > page.width / 2 for x, _y in centres[6:])
        assert [y for _x, y in centres[:6]] == sorted(y for _x, y in centres[:6])


class Detector:
    """Finds the given boxes on every page, and says of every line whether it stands upright."""

    def __init__(self, boxes, upright):
        self.boxes, self.upright, self.looked = boxes, list(upright), 0

    def __call__(self, image, *, use_det, **_more):
        self.looked += use_det
        label = "0" if self.upright[0] else "180"
        if not use_det:
            self.upright.append(self.upright.pop(0))
        return SimpleNamespace(boxes=self.boxes, scores=None, cls_res=[(label, 1.0)])


@pytest.mark.parametrize(("upright", "looked", "turned"), [(True, 1, 0.0), (False, 2, 180.0)])
def test_a_page_is_looked_at_once_unless_it_is_upside_down(tmp_path, upright, looked, turned):
    write_reader(tmp_path / "reader", seed=1, end=4.0)
    reader = Reader(tmp_path / "reader", precision="fp32", max_new_tokens=4)
    boxes = [[(40, top), (440, top), (440, top + 40), (40, top + 40)] for top in (60, 150)]
    detector = Detector(boxes, [upright] * 2 + [not upright] * 2)  # two lines, each both ways up
    page = read_page(reader, draw_page(), detector=detector)
    assert (detector.looked, page.turned, len(page.lines)) == (looked, turned, 2)


def test_places_upside_down_are_those_of_the_turned_page():
    quad = ((10.0, 20.0), (90.0, 25.0), (88.0, 45.0), (8.0, 40.0))
    (turned,) = _upside_down([quad], (300, 200))
    back = [turn_back(point, (300, 200), (300, 200), 180) for point in turned]
    assert [(round(x, 6), round(y, 6)) for x, y in back] == [quad[2], quad[3], quad[0], quad[1]]
    assert turned[0] == (212.0, 155.0), "the upper left corner of the writing as it stands then"


def test_attention_is_a_map_per_token_and_can_be_drawn(tmp_path):
    write_reader(tmp_path / "reader", seed=1)
    reader = Reader(tmp_path / "reader", precision="fp32", max_new_tokens=5)
    picture = draw_page().crop((0, 40, 420, 110))
    found = find_attention(reader, picture)
    assert found.weights.shape == (len(found.pieces), 4, 4)
    assert (found.weights >= 0).all()
    assert (found.weights.sum((1, 2)) <= 1.0001).all()
    assert draw_attention(picture, found).width == 600


def test_a_short_heading_is_read_before_the_columns_below_it():
    heading = (250.0, 50.0, 366.0, 80.0)
    left = [(72.0, 157.0 + 80 * row, (198.0, 241.0, 400.0)[row], 187.0 + 80 * row) for row in range(3)]
    right = [(633.0, 160.0 + 80 * row, 985.0, 190.0 + 80 * row) for row in range(3)]
    assert order_boxes([*right, *left, heading]) == [heading, *left, *right]
    # Columns whose lines stand between each other's are columns all the same.
    lower = [(x, y + 40, r, b + 40) for x, y, r, b in right]
    assert order_boxes([*lower, *left]) == [*left, *lower]


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_what_finds_lines_is_missed_before_a_page_is_looked_at(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    if package == "onnxruntime":
        pytest.importorskip("rapidocr")
    monkeypatch.setitem(sys.modules, package, None)  # makes its import an ImportError
    with pytest.raises(DependencyMissing, match=f"needs the package {package}") as caught:
        find_lines(Image.new("RGB", (64, 64), "white"))
    assert "fastsd install trocr" in caught.value.hint
