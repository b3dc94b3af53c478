"""Pages out and in: what was read and written as PAGE and ALTO is, read back as ground truth, the same lines."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from tiny_readers import write_reader

from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.exports.alto import alto_xml
from fastsd_helpers.trocr.exports.page_xml import page_xml
from fastsd_helpers.trocr.exports.record import record_of
from fastsd_helpers.trocr.pages.line_images import clip_line, clip_outline, cut_outline, outline_of
from fastsd_helpers.trocr.pages.line_pieces import join_quads
from fastsd_helpers.trocr.pages.page_reader import cut_lines, open_detector
from fastsd_helpers.trocr.reading.dataset import read_lines
from fastsd_helpers.trocr.reading.transcription import TranscribeConfig, transcribe
from fastsd_helpers.trocr.teaching.evaluation import evaluate

PAPER, INK = (238, 232, 214), (30, 30, 60)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    write_reader(folder, "base", seed=1)
    return Reader(folder, precision="fp32", max_new_tokens=6)


def draw_half(slope, rows=3):
    half = Image.new("RGB", (640, 420), PAPER)
    for row in range(rows):
        text = f"line {row} over the lazy"
        ImageDraw.Draw(half).text((60, 90 + 90 * row), text, INK, ImageFont.load_default(40))
    return half.rotate(slope, fillcolor=PAPER, resample=Image.Resampling.BICUBIC)


def spread():
    """Two pages that slope against each other, the first reaching over the edge, and a note up its margin."""
    page = Image.new("RGB", (1360, 420), PAPER)
    page.paste(draw_half(3).crop((70, 0, 640, 420)), (0, 0))
    page.paste(draw_half(-3), (720, 0))
    note = Image.new("RGB", (260, 50), PAPER)
    ImageDraw.Draw(note).text((5, 5), "paid in full", INK, ImageFont.load_default(36))
    page.paste(note.rotate(90, expand=True), (640, 80))
    return page


@pytest.mark.parametrize("turn", [0, 9])
def test_a_page_written_as_page_and_alto_is_read_back_as_the_very_same_lines(reader, tmp_path, turn):
    pytest.importorskip("rapidocr")
    pytest.importorskip("lxml")
    page = spread().rotate(turn, expand=True, fillcolor=PAPER, resample=Image.Resampling.BICUBIC)
    found, crops = cut_lines(reader, page, detector=open_detector(), order="columns")
    assert len(crops) == 7
    written = record_of(found, file="scan.png")
    for name, write in (("page", page_xml), ("alto", alto_xml)):
        folder = tmp_path / name
        folder.mkdir()
        page.save(folder / "scan.png")
        (folder / "scan.xml").write_bytes(write(written))
        again = read_lines(folder)
        assert [line.text for line in again.lines] == [line.text for line in written.lines]
        for line, crop in zip(again.lines, crops, strict=True):
            assert np.array_equal(np.asarray(line.picture), np.asarray(crop))
        assert evaluate(reader, again).scores.cer.rate == 0


def test_every_page_of_a_tiff_and_of_a_pdf_is_found_again_by_its_transcription(reader, tmp_path):
    for package in ("rapidocr", "lxml", "pypdfium2"):
        pytest.importorskip(package)
    first, second = draw_half(0, rows=2), draw_half(2, rows=3)
    for name in ("fax.tiff", "book.pdf"):
        first.save(tmp_path / name, save_all=True, append_images=[second], resolution=100)
    done = transcribe(reader, [str(tmp_path)], tmp_path, TranscribeConfig(("page",), pages="pages"))
    assert done.problems == []
    again = read_lines(tmp_path)
    assert {line.page for line in again.lines} == {f"{name}-000{n}.page" for name in ("fax", "book") for n in (1, 2)}
    assert len(again.lines) == 10
    assert evaluate(reader, again).scores.cer.rate == 0


def test_a_baseline_drawn_from_the_wrong_end_is_turned_and_writing_on_its_head_is_not():
    page = Image.new("RGB", (400, 200), "white")
    ImageDraw.Draw(page).rectangle((60, 60, 100, 90), fill="black")  # at the line's beginning, and above
    outline = ((50, 50), (350, 50), (350, 110), (50, 110))
    level = np.asarray(cut_outline(page, outline))
    assert np.array_equal(np.asarray(cut_outline(page, outline, ((350, 97), (50, 97)))), level), "Hebrew"
    on_its_head = np.asarray(cut_outline(page, outline, ((350, 63), (50, 63))))
    assert np.array_equal(on_its_head, level[::-1, ::-1])
    upwards = np.asarray(cut_outline(page, outline, ((330, 110), (330, 50))))
    assert np.array_equal(upwards, np.rot90(level, -1))


def test_an_outline_over_the_edge_keeps_its_direction_and_one_beside_the_page_is_none():
    (place,) = join_quads([((-20, 90), (300, 50), (305, 90), (-15, 130))])
    shape = clip_outline(outline_of(place), (400, 300))
    assert min(x for x, _y in shape) == 0
    assert len(shape) >= 4
    (x0, y0), (x1, y1) = clip_line(((-20, 130), (300, 90)), (400, 300))
    assert (x0, x1) == (0, 300)
    assert (y1 - y0) / (x1 - x0) == pytest.approx(-40 / 320, abs=0.01)
    assert clip_outline(((500, 10), (600, 10), (600, 40), (500, 40)), (400, 300)) == ()
    assert clip_line(((10, 320), (200, 320)), (400, 300)) == ((10, 300), (200, 300)), "cut off at the foot"


def test_the_outline_of_a_bending_line_goes_around_all_its_pieces_once():
    pieces = [((0, 0), (200, 0), (200, 40), (0, 40)), ((190, 40), (400, 90), (395, 130), (185, 80)),
              ((410, 120), (600, 230), (590, 270), (400, 160))]  # fmt: skip
    (place,) = join_quads(pieces)
    shape = outline_of(place)
    page = Image.new("RGB", (700, 400), "white")
    for a, b, c, d in pieces:  # writing in the middle of each
        upper, lower = [[(3 * p + q) / 4 for p, q in zip(one, two, strict=True)] for one, two in ((a, d), (d, a))]
        right = [(3 * p + q) / 4 for p, q in zip(b, c, strict=True)]
        ImageDraw.Draw(page).polygon([tuple(upper), tuple(right), tuple(lower)], fill="black")
    ImageDraw.Draw(page).rectangle((450, 20, 600, 60), fill="red")  # another line, above the end of this one
    baseline = clip_line((place.corners[3], place.corners[2]), page.size)
    cut = np.asarray(cut_outline(page, clip_outline(shape, page.size), baseline))
    black, whole = ((255.0 - picture[:, :, 0]).sum() for picture in (cut, np.asarray(page)))  # red counts as white
    assert black == pytest.approx(whole, rel=0.02)
    assert not ((cut[:, :, 0] > 200) & (cut[:, :, 1] < 60)).any()
