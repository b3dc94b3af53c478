"""What was read and corrected in a session, as files in a zip: chosen formats, a link, and what is missing said."""

import base64
import io
import re
import zipfile

import pytest
from PIL import Image, ImageDraw, ImageFont
from tiny_readers import write_reader

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.reading.dataset import read_lines
from fastsd_helpers.trocr.reading.session import ReadingSession
from fastsd_helpers.trocr.reading.session_files import write_zip

pytest.importorskip("lxml")
pytest.importorskip("img2pdf")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    write_reader(folder, "base", seed=1)
    return Reader(folder, precision="fp32", max_new_tokens=6)


def draw(text, size=(420, 70)):
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((20, 12), text, "black", ImageFont.load_default(36))
    return picture


@pytest.fixture
def session(reader, tmp_path):
    scans = tmp_path / "scans"
    (scans / "box").mkdir(parents=True)
    draw("a line").save(scans / "line.png")
    draw("one").save(scans / "box" / "fax.tiff", save_all=True, append_images=[draw("two")])
    made = ReadingSession(tmp_path / "mine")
    made.read(reader, str(scans), pages="lines")
    made.save(images=str(scans), reader=str(reader.checkpoint.folder))
    return made


def test_a_session_gives_its_files_with_what_a_person_corrected(session, tmp_path):
    session.correct(session.lines()[0].key, "read the & rest")
    draw("came later").save(tmp_path / "scans" / "new.png")
    made = write_zip(session, str(tmp_path / "scans"), ("pdf", "page", "txt"))
    assert made.problems == ["new.png was not read in this session."]
    with zipfile.ZipFile(made.path) as found:
        assert sorted(found.namelist()) == sorted(made.names)
        assert {"box/fax-0001.page.xml", "box/fax-0002.page.xml", "box/fax.pdf", "line.pdf", "line.txt"} < set(
            made.names
        )
        assert b"%PDF" in found.read("line.pdf")[:8]
        found.extractall(tmp_path / "scans")
    # The files beside the images are ground truth: the corrected line is in it, cut as it was read.
    texts = {line.page: line.text for line in read_lines(tmp_path / "scans").lines}
    assert texts["box/fax-0001.page"] == "read the & rest"
    assert len(texts) == 3
    (tmp_path / "scans" / "line.png").unlink()
    with pytest.raises(DatasetError, match="not on this machine"):
        write_zip(session, str(tmp_path / "gone"), ("txt",))
    with pytest.raises(DatasetError, match="was read in this session"):
        write_zip(ReadingSession(tmp_path / "other"), str(tmp_path / "scans"), ("txt",))
    assert not (tmp_path / "other" / "transcription.zip").exists()


def test_the_formats_are_chosen_and_the_zip_is_a_link(session):
    pytest.importorskip("ipywidgets")
    from fastsd_helpers import forms

    view = forms.show_confidence(session).download
    assert [name for name, box in view.choices.items() if box.value] == ["pdf", "alto"]
    view.choices["pdf"].value = False
    view.button.click()
    data = re.search(r"download='mine.zip' href='data:application/zip;base64,([^']+)'", view._told.value)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(data[1]))) as found:
        assert sorted(found.namelist()) == ["box/fax-0001.alto.xml", "box/fax-0002.alto.xml", "line.alto.xml"]
    view.choices["alto"].value = False
    view.button.click()
    assert "No format is chosen" in view._told.value
    assert not view.button.disabled
