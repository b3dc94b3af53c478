"""Folders of images, TIFFs and PDFs into files: names, formats, going on after a kill, and what cannot be read."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont
from tiny_readers import write_reader

from fastsd_helpers.errors import FastSDError, SettingsError
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.pages.inputs import gather, to_rgb
from fastsd_helpers.trocr.pages.line_pieces import join_pieces, join_quads
from fastsd_helpers.trocr.pages.page_reader import looks_like_page
from fastsd_helpers.trocr.pages.reading_order import choose_order, regions_of
from fastsd_helpers.trocr.reading.folder import read_folder
from fastsd_helpers.trocr.reading.transcription import TranscribeConfig, count_shares, join_pages, transcribe

LINES = TranscribeConfig(("txt", "json", "csv"), pages="lines")


def draw(text, size=(300, 60), ink="black", paper="white"):
    picture = Image.new("RGB", size, paper)
    ImageDraw.Draw(picture).text((10, 10), text, fill=ink, font=ImageFont.load_default(28))
    return picture


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    write_reader(folder, "base", seed=1)
    return Reader(folder, precision="fp32", max_new_tokens=6)


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    for number in (1, 2, 10):
        draw(f"page {number}").save(folder / f"page{number}.png")
    draw("one").save(folder / "fax.tiff", save_all=True, append_images=[draw("two"), draw("three")])
    draw("below").save(folder / "deep" / "page1.png")
    draw("a").save(folder / "deep" / "two.pdf", save_all=True, append_images=[draw("b")])
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def test_every_frame_and_page_is_an_item_of_its_own_in_natural_order(scans):
    names = [item.name for item in gather(scans)]
    assert names == ["broken.png", "deep/page1.png", "deep/two.pdf, page 1", "deep/two.pdf, page 2",
                     "fax.tiff, page 1", "fax.tiff, page 2", "fax.tiff, page 3",
                     "page1.png", "page2.png", "page10.png"]  # fmt: skip


def test_each_input_gets_its_files_and_what_cannot_be_read_stops_nothing(reader, scans, tmp_path):
    pytest.importorskip("pypdfium2")
    out = tmp_path / "out"
    done = transcribe(reader, [str(scans)], out, LINES)
    assert (done.inputs, done.pages, done.read_now, done.read_before) == (7, 10, 10, 0)
    assert len(done.problems) == 1
    assert "broken.png" in done.problems[0]
    made = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.txt"))
    assert made == ["deep/page1.txt", "deep/two.txt", "fax.txt", "page1.txt", "page10.txt", "page2.txt"]
    pages = json.loads((out / "fax.json").read_text(encoding="utf-8"))["pages"]
    assert [page["name"] for page in pages] == ["fax.tiff, page 1", "fax.tiff, page 2", "fax.tiff, page 3"]
    assert pages[0]["file"] == "fax.tiff"
    # The same command again reads nothing but what failed, and a file that is gone comes back.
    (out / "fax.txt").unlink()
    again = transcribe(reader, [str(scans)], out, LINES)
    assert (again.pages, again.read_now, len(again.problems)) == (10, 1, 1)
    assert (out / "fax.txt").is_file()
    # A picture that was replaced is read again, and other settings are refused.
    draw("something else, longer than before").save(scans / "page2.png")
    assert transcribe(reader, [str(scans)], out, LINES).read_now == 2
    with pytest.raises(SettingsError, match="other settings"):
        transcribe(reader, [str(scans)], out, TranscribeConfig(("txt",), pages="auto"))


def test_files_of_one_page_are_numbered_where_an_input_has_several(reader, scans, tmp_path):
    pytest.importorskip("lxml")
    out = tmp_path / "out"
    draw("not a page of the fax").save(scans / "fax-0001.png")
    draw("the same name").save(scans / "page1.bmp")
    transcribe(reader, [str(scans)], out, TranscribeConfig(("alto",), pages="lines"))
    made = sorted(path.name for path in out.glob("*.alto.xml"))
    assert made == ["fax-0001.alto.xml", "fax-0001.png.alto.xml", "fax-0002.alto.xml", "fax-0003.alto.xml",
                    "page1.bmp.alto.xml", "page1.png.alto.xml", "page10.alto.xml", "page2.alto.xml"]  # fmt: skip


def test_results_inside_the_folder_of_the_scans_are_no_scans(reader, scans):
    pytest.importorskip("img2pdf")
    out = scans / "results"
    config = TranscribeConfig(("pdf",), pages="lines")
    first = transcribe(reader, [str(scans)], out, config)
    assert transcribe(reader, [str(scans)], out, config).inputs == first.inputs


_RUN = """
import sys
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.reading.folder import read_folder
from fastsd_helpers.trocr.reading.transcription import TranscribeConfig, transcribe
config = TranscribeConfig(("txt", "json", "csv"), pages="lines")
print(transcribe(Reader(sys.argv[1], precision="fp32", max_new_tokens=6), [sys.argv[2]], sys.argv[3], config).read_now)
"""


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_files(reader, scans, tmp_path):
    pytest.importorskip("pypdfium2")
    (scans / "broken.png").unlink()

    def run(out, **more):
        script = _RUN.replace("sys.argv[3]", "__import__('pathlib').Path(sys.argv[3])")
        words = [sys.executable, "-c", script, str(reader.checkpoint.folder), str(scans), str(tmp_path / out)]
        return subprocess.run(words, env=os.environ | more, capture_output=True, text=True, check=False)

    whole = transcribe(reader, [str(scans)], tmp_path / "whole", LINES)
    for fault in ("trocr.page:4", "trocr.file.write:1", "trocr.file.after_rename:2"):
        assert run("cut", FASTSD_FAULT=fault).returncode == -signal.SIGKILL
    notes = next((tmp_path / "cut" / ".fastsd-run").glob("*.jsonl"))
    notes.write_bytes(notes.read_bytes() + b'{"stamp": [1')  # a note that the kill cut
    last = run("cut")
    assert last.returncode == 0, last.stderr
    assert int(last.stdout.strip()) < whole.pages

    def files(out: Path) -> dict[str, bytes]:
        found = (path for path in out.rglob("*") if path.is_file() and ".fastsd-run" not in path.parts)
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}

    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_processes_divide_the_pages_of_few_files_and_end_with_the_files_of_one(reader, scans, tmp_path):
    pytest.importorskip("pypdfium2")
    drawn = [draw(f"number {number}") for number in range(5)]
    drawn[0].save(tmp_path / "five.pdf", save_all=True, append_images=drawn[1:])
    sources = [str(tmp_path / "five.pdf"), str(scans / "broken.png")]
    whole = transcribe(reader, sources, tmp_path / "one", LINES)
    text = (tmp_path / "one" / "five.txt").read_text()

    def read_share(number, out, **more):
        return transcribe(reader, sources, out, LINES, shard=(number, 3), joined=True, **more)

    def cut(_done):
        raise KeyboardInterrupt

    for out in (tmp_path / "three", tmp_path / "then-one"):
        with pytest.raises(KeyboardInterrupt):
            read_share(1, out, progress=cut)  # it has read page 2, and no other process one before it
    shares = [read_share(number, tmp_path / "three") for number in range(3)]
    assert [share.read_now for share in shares] == [2, 2, 1], "pages 1 and 4; 5 and the damaged image; 3"
    assert not list((tmp_path / "three").glob("*.txt")), "nobody has all pages"
    joined = join_pages(sources, tmp_path / "three", LINES, shares)
    assert (joined.inputs, joined.pages, joined.read_now, joined.read_before) == (2, 6, 5, 1)
    assert joined.problems == whole.problems
    assert [path.name for path in joined.files] == [path.name for path in whole.files] == [
        "five.txt", "five.json", "five.csv"]  # fmt: skip
    assert (tmp_path / "three" / "five.txt").read_text() == text
    known = transcribe(reader, sources, tmp_path / "three", LINES)
    assert (known.read_now, known.read_before) == (1, 5), "the damaged image is looked at again"
    assert transcribe(reader, sources, tmp_path / "then-one", LINES).read_now == 5
    assert (tmp_path / "then-one" / "five.txt").read_text() == text


def test_a_file_for_each_process_is_read_by_one_alone(reader, scans, tmp_path):
    names = [str(scans / name) for name in ("fax.tiff", "page1.png")]
    shares = [transcribe(reader, names, tmp_path / "two", LINES, shard=(number, 2), joined=True) for number in (0, 1)]
    assert [(share.inputs, share.read_now) for share in shares] == [(1, 3), (1, 1)]
    assert join_pages(names, tmp_path / "two", LINES, shares).inputs == 2
    assert [count_shares(some, tmp_path / "two") for some in (names, names[1:])] == [2, 1]
    # Shards of the user's own are whole files, for nobody joins them.
    alone = [transcribe(reader, names[:1], tmp_path / "own", LINES, shard=(number, 2)) for number in (0, 1)]
    assert [(share.inputs, share.read_now) for share in alone] == [(1, 3), (0, 0)]


def test_white_ink_on_nothing_and_on_black_is_read_as_black_on_white(reader):
    clear = Image.new("RGBA", (300, 60), (0, 0, 0, 0))
    ImageDraw.Draw(clear).text((10, 10), "light ink", fill=(255, 255, 255, 255), font=ImageFont.load_default(28))
    plain = to_rgb(clear)
    assert plain.getpixel((299, 59)) == (255, 255, 255)
    assert plain.convert("L").getextrema()[0] < 50
    pixels = reader.checkpoint.pixels
    dark, light = pixels.resize(draw("x", ink="white", paper="black")), pixels.resize(draw("x"))
    assert abs(dark.astype(int) - light).mean() < 3
    brown = draw("x", ink=(30, 20, 10), paper=(90, 70, 50))  # dark paper, and darker ink
    assert pixels.resize(brown)[0, 0].tolist() == [90, 70, 50]


def test_pieces_are_joined_side_by_side_and_never_one_above_the_other():
    for first, second in (((0, 0, 1000, 130), (0, 45, 1000, 175)), ((0, 0, 1000, 130), (400, 60, 1500, 190))):
        assert len(join_pieces([first, second])) == 2
    assert join_pieces([(0, 0, 400, 40), (390, 5, 800, 44)]) == [(0, 0, 800, 44)]
    assert join_pieces([(0, 0, 400, 40), (100, 10, 130, 30)]) == [(0, 0, 400, 40)], "a part of a line"
    # Two words that rise together, whose level boxes would hardly share a height.
    rising = [((0, 100), (300, 60), (305, 100), (5, 140)), ((320, 57), (600, 20), (605, 60), (325, 97))]
    (place,) = join_quads(rising)
    assert place.width == pytest.approx(610, abs=12)
    assert place.height < 60
    up = join_quads([((10, 0), (50, 0), (50, 300), (10, 300))])
    assert up[0].turned
    assert up[0].corners[0] == pytest.approx((10, 300))


def table(rows, *columns):
    return [(left, 100.0 + 60 * row, right, 130.0 + 60 * row) for left, right in columns for row in range(rows)]


def test_tables_are_read_by_rows_verse_by_columns_and_hebrew_from_the_right():
    cells = table(4, (50, 150), (300, 500), (800, 880))
    texts = ["word"] * len(cells)
    assert choose_order(cells, texts) == "rows"
    assert regions_of(cells, "rows")[0][1][:3] == [cells[0], cells[4], cells[8]]
    verse = table(5, (50, 350), (500, 800))
    assert choose_order(verse, ["o my love"] * 10) == "columns"
    assert choose_order(verse, ["Paid to Smith"] * 5 + ["12.50"] * 5) == "rows"
    news = table(8, (50, 340), (360, 650), (670, 960))
    assert choose_order(news, ["running text"] * 24) == "columns"
    assert choose_order(verse, ["שלום עולם"] * 10) == "rtl"
    assert regions_of(verse, "rtl")[0][1][:5] == verse[5:]


def test_a_note_beside_the_text_is_a_region_of_its_own_after_it():
    text = table(8, (300, 900))
    note = [(40.0, 220.0, 180.0, 250.0), (40.0, 260.0, 170.0, 290.0)]
    assert regions_of([*note, *text], "columns") == [("text", text), ("margin", note)]


def test_a_line_is_no_page_however_high_and_a_strip_of_two_lines_may_be_one():
    assert not looks_like_page(draw("a line of text with a g and a k", (600, 60)))
    strip = Image.new("RGB", (1200, 160), "white")
    for top in (10, 85):
        ImageDraw.Draw(strip).text(
            (20, top), "two lines one below the other, on a strip", "black", font=ImageFont.load_default(48)
        )
    assert looks_like_page(strip)


def test_a_place_that_cannot_be_written_is_named_and_the_model_is_as_it_was(reader, scans, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "deep").write_text("a file where a folder has to be")
    with pytest.raises(FastSDError, match="deep"):
        transcribe(reader, [str(scans)], out, LINES)
    assert reader.watches is False, "other readings take no longer"


def read_texts(out):
    return {path.name: path.read_text() for path in out.glob("*.txt")}


def test_results_of_a_file_that_is_still_there_are_not_written_over_by_anothers(reader, tmp_path):
    out, first, second = tmp_path / "out", tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    draw("one").save(first / "a.png")
    draw("two").save(first / "a.bmp")
    draw("three, another page").save(second / "a.png")
    transcribe(reader, [str(first / "a.png")], out, LINES)
    kept = read_texts(out)
    for other in (first / "a.bmp", second / "a.png"):
        done = transcribe(reader, [str(other)], out, LINES)
        assert (done.inputs, done.read_now) == (1, 0)
        assert f"{other.name} is not read: {out / 'a'} is what was read of {first / 'a.png'}" in done.problems[0]
        assert read_texts(out) == kept
    # Nor where size and time are the same, as of unpacked scans without compression.
    (first / "b.bmp").write_bytes((first / "a.bmp").read_bytes())
    draw("owt").save(second / "b.bmp")
    for folder in (first, second):
        os.utime(folder / "b.bmp", (1e9, 1e9))
    assert not transcribe(reader, [str(first / "b.bmp")], out, LINES).problems
    assert transcribe(reader, [str(second / "b.bmp")], out, LINES).problems
    # A copy is the same page; a file that was scanned anew, or that lies elsewhere now, is read.
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "a.png").write_bytes((first / "a.png").read_bytes())
    assert not transcribe(reader, [str(copy / "a.png")], out, LINES).problems
    (copy / "a.png").unlink()
    draw("one, scanned anew").save(first / "a.png")
    assert transcribe(reader, [str(first / "a.png")], out, LINES).read_now == 1
    (first / "a.png").unlink()
    assert transcribe(reader, [str(second / "a.png")], out, LINES).read_now == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_name_that_is_no_utf8_stops_nothing(reader, tmp_path):
    scans = os.fsencode(tmp_path / "scans")
    os.mkdir(scans)
    for number, name in enumerate((b"gr\xfc\xdfe.png", b"plain.png", b"zwei\nzeilen.png")):
        draw(f"line {number}").save(tmp_path / "line.png")
        os.rename(tmp_path / "line.png", os.path.join(scans, name))
    done = transcribe(reader, [str(tmp_path / "scans")], tmp_path / "out", LINES)
    assert (done.read_now, done.problems) == (3, [])
    made = {path.name for path in (tmp_path / "out").glob("*.txt")}
    assert made == {"gr\ufffd\ufffde.txt", "plain.txt", "zwei\nzeilen.txt"}
    assert transcribe(reader, [str(tmp_path / "scans")], tmp_path / "out", LINES).read_now == 0
    read_folder(reader, tmp_path / "scans", tmp_path / "rows")
    rows = [json.loads(row) for row in (tmp_path / "rows" / "lines.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["name"] for row in rows] == ["gr\ufffd\ufffde.png", "plain.png", "zwei\nzeilen.png"]


def test_names_too_long_for_an_ending_are_shortened_and_a_file_named_twice_is_read_once(reader, tmp_path):
    pytest.importorskip("lxml")
    scans = tmp_path / "scans"
    scans.mkdir()
    for last in ("a", "b"):
        draw(last).save(scans / f"{'ü' * 125}{last}.png")
    config = TranscribeConfig(("alto",), pages="lines")
    sources = [str(scans), str(scans / f"{'ü' * 125}a.png")]
    for expected in (2, 0):
        assert transcribe(reader, sources, tmp_path / "out", config).read_now == expected
    made = sorted(path.name for path in (tmp_path / "out").glob("*.xml"))
    assert made == [f"{'ü' * 116}-2.alto.xml", f"{'ü' * 116}.alto.xml"]
