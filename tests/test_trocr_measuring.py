"""The scripts that measure readers: figures are kept one by one, and what they measure is drawn as they say."""

import importlib
import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("torch")
pytest.importorskip("fontTools")
pytest.importorskip("transformers")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.startswith("measure_reader")]:
        del sys.modules[name]


def test_figures_are_kept_and_worked_out_once(tmp_path, script):
    measuring = script("measure_reader")
    pieces = measuring.Pieces(tmp_path, {"model": "a"}, 1e9)
    assert pieces.take("one", lambda: {"cer": 0.5}) == {"cer": 0.5}

    def interrupted():
        raise KeyboardInterrupt

    assert pieces.take("two", interrupted) is None
    assert not pieces.whole
    again = measuring.Pieces(tmp_path, {"model": "a"}, 1e9)
    assert again.take("one", interrupted) == {"cer": 0.5}
    assert again.take("two", lambda: 7) == 7
    assert json.loads((tmp_path / "pieces.json").read_text())["figures"] == {"one": {"cer": 0.5}, "two": 7}
    with pytest.raises(SystemExit, match="figures of other settings"):
        measuring.Pieces(tmp_path, {"model": "b"}, 1e9)


def test_a_run_stops_in_time_and_says_so(tmp_path, script):
    measuring = script("measure_reader")
    pieces = measuring.Pieces(tmp_path, {}, 0.02 / 60)
    try:
        assert pieces.take("long", lambda: __import__("time").sleep(30)) is None
    except KeyboardInterrupt:  # the time was over between two lines of ours
        pytest.skip("the clock was faster than the test")
    assert pieces.take("next", lambda: 1) is None


def test_digit_lines_are_real_digits_with_writers_apart(script):
    pytest.importorskip("sklearn")
    learning = script("measure_reader_learning")
    lines = learning.digit_lines(0, 1200, 5, 1)
    assert all(text.isdigit() and 3 <= len(text) <= 8 for _picture, text, _group in lines)
    assert all(picture.width == 44 * len(text) + 24 for picture, text, _group in lines)
    ink = [np.asarray(picture).min() for picture, _text, _group in lines]
    assert max(ink) < 60
    assert learning.digit_lines(0, 1200, 5, 1)[3][1] == lines[3][1], "a function of the seed"


def test_equal_errors_are_found_on_the_curves(script):
    learning = script("measure_reader_learning")
    decoder = {"curve": [[10, 0.5], [20, 0.3], [30, 0.4]], "steps": 30}
    full = {"curve": [[10, 0.4], [20, 0.25], [30, 0.1]], "steps": 30}
    assert "(30.0 %) after 20 steps; full training is as good after 20" in learning.compare_curves(full, decoder)
    slow = {"curve": [[10, 0.9]], "steps": 10}
    assert "does not get there in 10 steps" in learning.compare_curves(slow, decoder)
    assert "not all runs" in learning.compare_curves(None, decoder)


def test_lines_found_on_a_turned_page_are_matched_with_what_was_drawn(script):
    paging = script("measure_reader_pages")
    page = Image.new("L", (800, 600), 255)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(30)
    boxes = [(50, 60 + 100 * row, 450, 100 + 100 * row) for row in range(3)]
    for box in boxes:
        pen.text(box[:2], "some words", font=font, fill=0)
    angle = 2.0
    turned = page.rotate(angle, expand=True, fillcolor=255)
    from fastsd_helpers.trocr.pages.page_reader import turn_back

    def on_turned(x, y):
        return turn_back((x, y), page.size, turned.size, -angle)

    found = []
    for left, top, right, bottom in [boxes[2], boxes[0], (500, 10, 700, 40)]:
        corners = [on_turned(x, y) for x, y in ((left, top), (right, top), (right, bottom), (left, bottom))]
        found.append(SimpleNamespace(box=corners, text="x"))
    lines = [(None, "", box) for box in boxes]
    assert paging.match(found, lines, turned.size, page.size, angle) == [2, 0, None]


def test_a_turned_line_keeps_its_paper_and_its_ink(script):
    measuring = script("measure_reader")
    line = Image.new("L", (200, 40), 180)
    ImageDraw.Draw(line).rectangle((20, 15, 180, 25), fill=20)
    turned = np.asarray(measuring.turn(line, 5))
    assert turned.shape[0] > 50
    assert turned[0, 0] == turned[-1, -1] == 180
    assert turned.min() < 40


def test_fonts_that_are_held_out_are_not_learned_from(script):
    training = script("train_demo_reader")
    learned = {*training.SEEN, *training.CAPITALS, *training.MORE}
    held_out = {*training.HELD_OUT, *training.MORE_HELD_OUT}
    assert len(training.MORE_HELD_OUT) == 3
    assert not learned & held_out
    assert len(training.LISTED) == len(training.MORE) + 3
    assert all(len(name.split("@")[1].split(".")) == 3 for name, *_rest in training.LISTED)  # one version, no range


def test_listed_fonts_are_fetched_once(tmp_path, script, monkeypatch):
    training = script("train_demo_reader")
    asked = []

    def pack(command, cwd, check):
        asked.append(command[-1])
        with tarfile.open(Path(cwd) / "some.tgz", "w:gz") as package:
            held = tarfile.TarInfo("package/files/caveat-latin-400-normal.woff")
            held.size = 4
            package.addfile(held, io.BytesIO(b"wOFF"))

    monkeypatch.setattr(training, "LISTED", [["caveat@5.3.0", "400", "normal", "capitals"]])
    monkeypatch.setattr(training.subprocess, "run", pack)
    for _ in range(2):
        training.fetch_fonts(SimpleNamespace(fonts=tmp_path / "fonts"))
    assert asked == ["@fontsource/caveat@5.3.0"]
    assert (tmp_path / "fonts" / "caveat-latin-400-normal.woff").read_bytes() == b"wOFF"
