"""A reading session: lines and corrections stay, whatever is read again; what is corrected is a data set."""

import csv
import io
import json
import os
import shutil
import zipfile
from unittest import mock

import numpy as np
import pytest
from closeness import assert_same_lines, written
from PIL import Image, ImageDraw, ImageFont
from tiny_readers import STEPS, judge_by, noise_pictures, write_reader

from fastsd_helpers.errors import DatasetError, SessionDamaged, SessionError, SettingsError
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.pages.page_reader import looks_like_page
from fastsd_helpers.trocr.reading import rows as reading_rows
from fastsd_helpers.trocr.reading import session as reading_session
from fastsd_helpers.trocr.reading.session import ReadingSession, ReadPicturesConfig, choose_reader

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "reader"
    write_reader(folder, seed=1, end=4.0)
    return Reader(folder, precision="fp32", max_new_tokens=6)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for place, picture in enumerate(noise_pictures(5)):
        picture.save(folder / ("b" if place > 2 else ".") / f"scan-{place}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def draw_page(number, rows=2):
    page = Image.new("RGB", (900, 200 + 140 * rows), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(44)
    for row in range(rows):
        pen.text((80, 100 + 140 * row), f"The quick brown fox number {number + row}", font=font, fill="black")
    return page


@pytest.mark.numeric
def test_lines_are_read_kept_and_found_again(tmp_path, reader, pictures):
    session = ReadingSession(tmp_path / "mine")
    assert session.lines() == []
    told = []
    lines = session.read(reader, str(pictures), pages="lines", progress=told.append)
    assert [bool(line.read.problem) for line in lines].count(True) == 1
    good = [line for line in lines if not line.read.problem]
    assert len(good) == 5
    assert told[-1] == 6
    opened = [Image.open(line.picture) for line in good]
    expected = [reader.read(picture)[0] for picture in opened]
    judge = judge_by(reader, opened)
    assert_same_lines(written([line.read for line in good]), written(expected), of_largest=STEPS, judge=judge, ties=0)
    assert [line.text for line in good] == [line.text for line in expected]
    assert {line.source for line in good} >= {"scan"}
    again = ReadingSession(tmp_path / "mine")
    assert [line.text for line in again.lines()] == [line.text for line in lines]
    assert [line.read.confidence for line in again.lines()] == pytest.approx(
        [line.read.confidence for line in lines],
        abs=5e-7,  # six decimals are kept
    )


def test_two_notebooks_with_one_session_keep_each_others_corrections(tmp_path, reader, pictures):
    lines = [line for line in ReadingSession(tmp_path / "mine").read(reader, str(pictures), pages="lines") if line.key]
    one, other = ReadingSession(tmp_path / "mine"), ReadingSession(tmp_path / "mine")
    one.correct(lines[0].key, "one")
    other.correct(lines[1].key, "two")
    one.correct(lines[0].key, None)
    one.correct(lines[2].key, "three")
    right = {line.key: line.right for line in ReadingSession(tmp_path / "mine").lines()}
    assert [right[line.key] for line in lines[:3]] == [None, "two", "three"]


def test_a_second_stop_loses_nothing_of_the_first(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(reading_session, "_CHUNK", 2)
    folder, others = tmp_path / "pictures", tmp_path / "others"
    for place, picture in enumerate(noise_pictures(14)):
        target = folder if place < 10 else others
        target.mkdir(exist_ok=True)
        picture.save(target / f"{place:02d}.png")

    def stop_after(count):
        def stop(done):
            if done >= count:
                raise KeyboardInterrupt

        return stop

    session = ReadingSession(tmp_path / "mine")
    for images, count in ((folder, 6), (folder, 2), (others, 2)):
        with pytest.raises(KeyboardInterrupt):
            session.read(reader, str(images), pages="lines", progress=stop_after(count))
    session.read(reader, str(others), pages="lines")
    read = []
    counting = mock.Mock(wraps=reader)
    for name in ("checkpoint", "settings", "limits", "batch_size", "language"):
        setattr(counting, name, getattr(reader, name))
    counting.read = lambda items, **rest: read.extend(items) or reader.read(items, **rest)
    lines = session.read(counting, str(folder), pages="lines")
    assert len(lines) == 10
    assert len(read) == 4, "six were read before the first stop"
    read.clear()
    assert len(session.read(counting, str(others), pages="lines")) == 4
    assert not read, "what was read of other images is known when they are wanted again"


def test_a_reader_that_was_downloaded_again_reads_nothing_twice(tmp_path, reader, pictures):
    (pictures / "broken.png").unlink()  # is looked at every time: somebody may have copied it again
    session = ReadingSession(tmp_path / "mine")
    before = session.read(reader, str(pictures), pages="lines")
    shutil.copytree(reader.checkpoint.folder, tmp_path / "elsewhere" / "model")
    for path in (tmp_path / "elsewhere" / "model").iterdir():
        os.utime(path, (1, 1))
    again = Reader(tmp_path / "elsewhere" / "model", precision="fp32", max_new_tokens=reader.settings.max_new_tokens)
    read = []
    again.read = lambda items, **_rest: read.extend(items) or []
    assert session.read(again, str(pictures), pages="lines") == before
    assert not read


def test_what_the_version_before_has_read_is_not_read_again(tmp_path, reader, pictures):
    (pictures / "broken.png").unlink()  # is looked at every time: somebody may have copied it again
    session = ReadingSession(tmp_path / "mine")
    session.read(reader, str(pictures), pages="lines")
    path = tmp_path / "mine" / "lines.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    by = reading_rows.fingerprint_by_place(reader, "lines")
    path.write_text("".join(json.dumps(row | {"by": by}) + "\n" for row in rows))
    read = []
    counting = mock.Mock(wraps=reader)
    for name in ("checkpoint", "settings", "limits", "batch_size", "language"):
        setattr(counting, name, getattr(reader, name))
    counting.read = lambda items, **_rest: read.extend(items) or []
    assert len(ReadingSession(tmp_path / "mine").read(counting, str(pictures), pages="lines")) == len(rows)
    assert not read


def test_a_picture_that_cannot_be_read_is_no_line_of_the_text(tmp_path, reader, pictures):
    session = ReadingSession(tmp_path / "mine")
    lines = session.read(reader, str(pictures), pages="lines")
    assert [line.read.name for line in lines if line.read.problem] == ["broken.png"]
    text = (tmp_path / "mine" / "text.txt").read_text(encoding="utf-8").split("\n")
    assert len(text) == len(lines), "the last of them is what follows the last line's end"
    assert "broken.png" in (tmp_path / "mine" / "text.csv").read_text(encoding="utf-8-sig")


def zipped(*names, page=None):
    """A zip of images; with a code page its names are written in that, as Windows does, and it says nothing of it."""
    data = io.BytesIO()
    stand_ins = {
        f"{place:03d}".ljust(len(name.encode(page)), "x") if page else name: name for place, name in enumerate(names)
    }
    with zipfile.ZipFile(data, "w") as made:
        for name, picture in zip(stand_ins, noise_pictures(len(names)), strict=True):
            content = io.BytesIO()
            picture.save(content, "PNG")
            made.writestr(name, content.getvalue())
    raw = data.getvalue()
    for stand_in, name in stand_ins.items():
        raw = raw.replace(stand_in.encode(), name.encode(page or "utf-8"))
    return raw


def test_a_zip_with_folders_gives_its_pictures_and_two_of_one_name_stay_two(tmp_path):
    session = ReadingSession(tmp_path / "mine")
    names = ("page 1/scan_1.png", "page 2/scan_1.png", "__MACOSX/page 1/._scan_1.png", "notes.txt", "more.zip")
    made = session.save_uploads("C:\\letters.ZIP", zipped(*names))
    assert len(made.kept) == 2
    assert len({path.name for path in session.list_uploads()}) == 2
    assert [line for line in made.left_out if "notes.txt" in line and "neither an image" in line]
    assert [line for line in made.left_out if "zip in a zip" in line]
    again = session.save_uploads("letters.zip", zipped(*names))
    assert not again.kept
    assert len(again.there) == 2


def test_forty_files_dropped_twice_are_kept_once_under_other_names_too(tmp_path):
    session = ReadingSession(tmp_path / "mine")
    files = [(f"IMG_{place}.JPG", bytes([place]) * (100 + place)) for place in range(40)]
    for name, data in files * 2:
        made = session.save_uploads(name, data)
        assert not made.lines() or made.kept
    assert len(session.list_uploads()) == 40
    assert session.save_uploads("IMG_7 (1).JPG", files[7][1]).there == (("IMG_7 (1).JPG", "IMG_7.jpg"),)
    other = session.save_uploads("IMG_7.JPG", b"another picture of that name")
    assert other.lines() == ["IMG_7.JPG is kept as IMG_7-2.jpg."]


def test_names_of_a_zip_from_windows_are_read_in_the_letters_they_were_written_in(tmp_path):
    session = ReadingSession(tmp_path / "mine")
    made = session.save_uploads("letters.zip", zipped("Письмо бабушки.png", "Письмо деда.png", page="cp866"))
    assert {given for given, _name in made.kept} == {"Письмо бабушки.png", "Письмо деда.png"}
    assert "are read as Cyrillic" in made.left_out[0]


def test_what_is_no_zip_and_a_zip_without_pictures_are_said(tmp_path):
    session = ReadingSession(tmp_path / "mine")
    assert "damaged or not a zip file" in session.save_uploads("a.zip", b"PK").left_out[0]
    assert "holds no image" in session.save_uploads("b.zip", zipped("x/readme.md")).left_out[-1]
    assert session.list_uploads() == []


def test_corrections_stay_with_their_lines_when_they_are_read_again(tmp_path, reader, pictures):
    session = ReadingSession(tmp_path / "mine")
    lines = [line for line in session.read(reader, str(pictures), pages="lines") if line.key]
    session.correct(lines[0].key, "  Brown   fox ")
    session.correct(lines[1].key, lines[1].text or "x")
    session.correct(lines[2].key, "gone again")
    session.correct(lines[2].key, None)
    again = ReadingSession(tmp_path / "mine")
    read = {line.key: line for line in again.read(reader, str(pictures), pages="lines")}
    assert read[lines[0].key].right == read[lines[0].key].text == "Brown fox"
    assert read[lines[2].key].right is None
    rows = list(csv.DictReader((tmp_path / "mine" / "text.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert "Brown fox" in [row["text"] for row in rows]
    assert "Brown fox" in (tmp_path / "mine" / "text.txt").read_text(encoding="utf-8").splitlines()
    data = again.corrected()
    assert "Brown fox" in {line.text for line in data.lines}
    assert len(data.lines) == 2
    assert all(line.picture.is_file() for line in data.lines)


def test_lines_of_one_page_can_be_divided_and_those_of_several_stay_together(tmp_path, reader):
    folder = tmp_path / "one"
    folder.mkdir()
    for place, picture in enumerate(noise_pictures(12)):
        picture.save(folder / f"page-{place}.png")
    session = ReadingSession(tmp_path / "mine")
    for line in session.read(reader, str(folder), pages="lines"):
        session.correct(line.key, "fox")
    groups = [line.group for line in session.corrected().lines]
    assert groups == ["page, part 1"] * 5 + ["page, part 2"] * 5 + ["page, part 3"] * 2
    learned, held = session.corrected().split(0.2)
    assert {line.group for line in learned.lines}.isdisjoint(line.group for line in held.lines)


def test_pages_are_told_from_lines_and_their_lines_cut(tmp_path, reader):
    pytest.importorskip("rapidocr")
    assert not looks_like_page(Image.new("L", (900, 90)))
    assert not looks_like_page(Image.new("L", (300, 150)))
    page = draw_page(0, rows=6)
    assert looks_like_page(page)
    page.save(tmp_path / "page.png")
    session = ReadingSession(tmp_path / "mine")
    lines = session.read(reader, [str(tmp_path / "page.png"), noise_pictures(1)[0]])
    assert [line.source for line in lines] == ["page.png"] * 6 + ["image 2"]
    tops = [line.read.box[0][1] for line in lines[:6]]
    assert tops == sorted(tops)
    for line in lines[:6]:
        with Image.open(line.picture) as cut:
            assert cut.width > 5 * cut.height
            assert np.asarray(cut.convert("L")).min() < 60


def test_a_page_is_read_in_the_order_asked_for_and_read_anew_for_another(tmp_path, reader):
    pytest.importorskip("rapidocr")
    page = Image.new("RGB", (900, 480), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(44)
    for column in range(2):
        for row in range(3):
            pen.text((60 + 460 * column, 60 + 140 * row), f"cell {column} {row}", font=font, fill="black")
    session = ReadingSession(tmp_path / "mine")

    def places(order):
        lines = session.read(reader, [page], pages="pages", order=order)
        return [(line.read.box[0][0] > 450, line.read.box[0][1] // 140) for line in lines]

    by_column, by_row = places("columns"), places("rows")
    assert by_column == sorted(by_column)
    assert by_row == sorted(by_row, key=lambda place: place[1])
    assert places("columns") == by_column
    # Corrections of another version, whose cuts of the same lines had other pixels, follow their lines.
    rows, right = tmp_path / "mine" / "lines.jsonl", tmp_path / "mine" / "corrections.json"
    first = json.loads(rows.read_text().splitlines()[0])["key"]
    session.correct(first, "cell 0 0")
    told = rows.read_text().replace(first, "cut-otherwise").replace('"by": "', '"by": "other')
    rows.write_text(told)
    right.write_text(right.read_text().replace(first, "cut-otherwise"))
    again = ReadingSession(tmp_path / "mine").read(reader, [page], pages="pages", order="columns")
    assert [line.right for line in again] == ["cell 0 0", *[None] * 5]
    assert list(json.loads(right.read_text())) == [first]


def test_a_reading_that_was_cut_goes_on_and_nothing_is_read_twice(tmp_path, reader, monkeypatch):
    pytest.importorskip("rapidocr")
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(2):
        draw_page(number).save(folder / f"page-{number}.png")
    for place, picture in enumerate(noise_pictures(3)):
        picture.save(folder / f"z-{place}.png")
    whole = ReadingSession(tmp_path / "whole")
    whole.read(reader, str(folder))
    asked = []
    read = reader.read
    monkeypatch.setattr(reader, "read", lambda items, **rest: asked.append(len(items)) or read(items, **rest))
    cut = ReadingSession(tmp_path / "cut")

    def stop(done):
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.read(reader, str(folder), progress=stop)
    assert cut.lines() == []
    pages_read = len(asked)
    again = ReadingSession(tmp_path / "cut")
    again.read(reader, str(folder))
    assert len(asked) > pages_read
    assert (tmp_path / "cut" / "lines.jsonl").read_bytes() == (tmp_path / "whole" / "lines.jsonl").read_bytes()
    assert not (tmp_path / "cut" / "reading.jsonl").exists()
    asked.clear()
    again.read(reader, str(folder))
    assert sum(asked) == 0, "known by its pixels"
    other = Reader(reader.checkpoint.folder, precision="fp32", max_new_tokens=2)
    assert again.read(other, str(folder))[0].read.tokens != whole.lines()[0].read.tokens


def test_uploads_are_kept_under_safe_names_and_none_is_lost(tmp_path):
    session = ReadingSession(tmp_path / "mine")
    one = session.save_upload("../../My scan?.PNG", b"1")
    assert one.parent == session.uploads
    assert one.suffix == ".png"
    assert session.save_upload("../../My scan?.PNG", b"1") == one
    other = session.save_upload("My scan?.png", b"2")
    assert other != one
    assert {path.read_bytes() for path in session.list_uploads()} == {b"1", b"2"}


def test_what_cannot_be_done_is_said(tmp_path, reader, monkeypatch):
    with pytest.raises(SessionError):
        ReadingSession(tmp_path / "con")
    session = ReadingSession(tmp_path / "mine")
    with pytest.raises(DatasetError, match="No line has been corrected yet"):
        session.corrected()
    with pytest.raises(DatasetError, match="has no line 'nothing'"):
        session.correct("nothing", "x")
    line = session.read(reader, noise_pictures(1))[0]
    with pytest.raises(DatasetError, match="cannot be trained on"):
        session.correct(line.key, "  ")
    monkeypatch.setattr(reading_session, "SAMPLES_FOLDER", tmp_path / "none")
    with pytest.raises(DatasetError, match="no sample lines"):
        session.read_samples(reader)
    (tmp_path / "mine" / "corrections.json").write_text("{")
    with pytest.raises(SessionDamaged, match=r"corrections.json is damaged"):
        ReadingSession(tmp_path / "mine")


def test_samples_come_with_their_text(tmp_path, reader, monkeypatch):
    samples = tmp_path / "samples"
    samples.mkdir()
    rows = ["file_name,text,group"]
    for place, picture in enumerate(noise_pictures(4)):
        picture.save(samples / f"{place}.png")
        rows.append(f"{place}.png,word {place},{place // 2}")
    (samples / "labels.csv").write_text("\n".join(rows))
    monkeypatch.setattr(reading_session, "SAMPLES_FOLDER", samples)
    session = ReadingSession(tmp_path / "mine")
    assert [line.right for line in session.read_samples(reader)] == [f"word {place}" for place in range(4)]
    session.correct(session.lines()[0].key, "of mine")
    assert session.read_samples(reader)[0].right == "of mine"
    assert len({line.group for line in session.corrected().lines}) == 2
    # They are not mixed with what is one's own.
    own = session.read(reader, noise_pictures(2, seed=5))
    with pytest.raises(DatasetError, match="No line has been corrected yet"):
        session.corrected()
    session.correct(own[0].key, "fox")
    assert [line.text for line in session.corrected().lines] == ["fox"]


def test_the_reader_is_chosen_by_whose_pictures_they_are():
    assert choose_reader("auto", own_pictures=True)[0] == "trocr-base-handwritten"
    assert choose_reader("auto", own_pictures=False)[0] == "demo-reader"
    assert choose_reader("x/y", own_pictures=True) == ("x/y", "as asked")


def test_settings_of_reading_come_first_the_pictures_and_all_are_checked():
    from fastsd_helpers.options import options_of

    names = [item.name for item in options_of(ReadPicturesConfig)]
    assert names[:4] == ["images", "reader", "pages", "order"]
    with pytest.raises(SettingsError, match=r"beams.*pages|pages.*beams"):
        ReadPicturesConfig(beams=0, pages="all")
    with pytest.raises(SettingsError, match="reader"):
        ReadPicturesConfig(reader=" ")


def test_session_json_holds_what_was_entered(tmp_path):
    session = ReadingSession(tmp_path / "mine")
    session.save(reader="demo-reader")
    session.save_if_possible(forms={"A": {"b": 1}})
    kept = json.loads((tmp_path / "mine" / "session.json").read_text())
    assert (kept["reader"], kept["forms"]) == ("demo-reader", {"A": {"b": 1}})
