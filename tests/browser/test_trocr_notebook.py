"""A person reads own lines in a real JupyterLab, corrects by keyboard alone, teaches, stops, and goes on."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from installed import require_installed
from PIL import Image, ImageDraw, ImageFont
from tiny_readers import noise_pictures, write_reader

from browser.lab import ROOT, Lab, on_front, open_browser, start_lab

require_installed("accelerate")

pytest.importorskip("playwright")

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(3600)]

STEPS = 400


def focused(lab: Lab) -> str:
    """The label of the field that has the keyboard."""
    return lab.page.evaluate(
        "() => { const at = document.activeElement; return at.labels && at.labels[0] ? at.labels[0].innerText : ''; }"
    )


@on_front("7.7.1")
def test_own_lines_are_read_corrected_by_keyboard_taught_stopped_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widgets7: bool
) -> None:
    pytest.importorskip("jupyterlab")
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    write_reader(tmp_path / "reader", "stage1", spread=0.15, end=2.0)
    lines = tmp_path / "lines"
    lines.mkdir()
    for place, picture in enumerate(noise_pictures(12)):
        picture.save(lines / f"page{place // 3}-{place}.png")
    folder = tmp_path / "lab"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "trocr.ipynb", folder)
    shots = os.environ.get("FASTSD_SCREENSHOTS")
    shots = Path(shots) / f"trocr{7 if widgets7 else 8}" if shots else None
    with open_browser() as page, start_lab(folder, widgets7=widgets7) as address:
        lab = Lab(page, address, "trocr.ipynb", shots)
        session = folder / "Fast-TrOCR" / "Sessions" / "my-handwriting"
        read(lab, lines, tmp_path / "reader")
        correct_by_keyboard(lab, session)
        teach_stop_and_go_on(lab, session)


@on_front("8")
def test_a_folder_of_scans_becomes_a_zip_of_pdf_and_alto_with_what_was_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widgets7: bool
) -> None:
    for package in ("jupyterlab", "rapidocr", "lxml", "pikepdf", "img2pdf"):
        pytest.importorskip(package)
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    write_reader(tmp_path / "reader", "stage1", spread=0.15, end=2.0)
    scans = tmp_path / "scans"
    scans.mkdir()
    for place in range(2):
        page = Image.new("RGB", (700, 420), "white")
        for row in range(3):
            pen = ImageDraw.Draw(page)
            pen.text((60, 70 + 110 * row), f"letter {place} line {row}", "black", ImageFont.load_default(42))
        page.save(scans / f"letter{place}.png")
    folder = tmp_path / "lab"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "trocr.ipynb", folder)
    shots = os.environ.get("FASTSD_SCREENSHOTS")
    with open_browser() as page, start_lab(folder, widgets7=widgets7) as address:
        lab = Lab(page, address, "trocr.ipynb", Path(shots) / "trocr-zip" if shots else None)
        for cell in ("2a", "2b", "3a"):
            lab.run(cell)
        lab.enter("3a", "images", str(scans))
        lab.enter("3a", "reader", str(tmp_path / "reader"))
        lab.run("3b")
        lab.wait_for_output("3b", "6 lines read")
        lab.run("4")
        lab.wait_for_output("4", "0 of 6 lines reviewed")
        first = lab.field("4", "line 1")
        first.scroll_into_view_if_needed()
        first.focus()
        lab.page.keyboard.press("Control+a")
        lab.page.keyboard.type("letter the first")
        lab.page.keyboard.press("Enter")
        lab.wait_for_output("4", "1 of 6 lines reviewed")
        lab.cell("3b").get_by_role("button", name="Write the files").click()
        lab.wait_for_output("3b", "4 files")
        lab.shoot("3b-files", "3b")
        with lab.page.expect_download() as download:
            lab.cell("3b").get_by_role("link", name="Download my-handwriting.zip").click()
        with zipfile.ZipFile(download.value.path()) as found:
            assert sorted(found.namelist()) == ["letter0.alto.xml", "letter0.pdf", "letter1.alto.xml", "letter1.pdf"]
            assert b'CONTENT="letter"' in found.read("letter0.alto.xml")


def read(lab: Lab, lines: Path, reader: Path) -> None:
    for cell in ("2a", "2b", "3a"):
        lab.run(cell)
    lab.enter("3a", "images", str(lines))
    lab.enter("3a", "reader", str(reader))
    lab.shoot("3a", "3a")
    lab.run("3b")
    assert "12 lines read" in lab.wait_for_output("3b", "12 lines read")
    lab.shoot("3b", "3b")


def correct_by_keyboard(lab: Lab, session: Path) -> None:
    """Type into the first line, Enter, Enter on the second as it stands; back, and over the end of the page."""
    lab.run("4")
    lab.wait_for_output("4", "0 of 12 lines reviewed")
    keys = lab.page.keyboard
    first = lab.field("4", "line 1")
    first.scroll_into_view_if_needed()
    first.focus()
    keys.press("Control+a")
    keys.type("the quick fox")
    keys.press("Enter")
    assert focused(lab) == "line 2"
    keys.press("Enter")
    lab.wait_for_output("4", "2 of 12 lines reviewed")
    assert focused(lab) == "line 3"
    keys.press("Shift+Enter")
    assert focused(lab) == "line 2", "back, and the cell is not run by it"
    keys.press("Tab")
    assert focused(lab) == "line 3", "one Tab a line: the buttons between are passed"
    lab.shoot("4-two-corrected", "4")
    for _ in range(8):
        keys.type("x")  # the text is selected: it is typed over
        keys.press("Enter")
    lab.wait_for_output("4", "lines 11 to 12 are shown")
    lab.page.wait_for_function("() => document.activeElement.labels && document.activeElement.labels[0]")
    assert focused(lab) == "line 11", "Enter on the last of a page turns it"
    keys.press("Shift+Enter")
    lab.wait_for_output("4", "lines 1 to 10 are shown")
    keys.press("Escape")
    lab.wait_for_output("4", "9 of 12 lines reviewed")
    kept = json.loads((session / "corrections.json").read_text(encoding="utf-8"))
    assert "the quick fox" in {entry["text"] for entry in kept.values()}
    lab.run("4")
    lab.wait_for_output("4", "9 of 12 lines reviewed")
    lab.shoot("4-again", "4")


def teach_stop_and_go_on(lab: Lab, session: Path) -> None:
    lab.run("5a")
    lab.wait_for_output("5a", r"9 corrected lines: \d+ for training, \d+ held out for validation")
    wanted = {"epochs": str(STEPS / 2), "batch size": "4", "patience": "0", "measure every": "100"}
    for name, value in wanted.items():
        lab.enter("5a", name, value)
    lab.shoot("5a", "5a")
    lab.run("5b", wait=False)
    lab.wait_for_output("5b", r"Step [1-9]\d* of \d+, about", timeout_s=900)
    lab.shoot("5b-running", "5b")
    lab.cell("5b").get_by_role("button", name="Stop").click()
    lab.wait_done("5b", timeout_s=600)
    stopped = lab.wait_for_output("5b", r"stopped at step \d+ of \d+")
    lab.shoot("5b-stopped", "5b")
    at = int(re.search(r"stopped at step (\d+) of", stopped)[1])
    assert "Run this cell again to resume" in stopped
    lab.run("5b", wait=False)
    lab.wait_done("5b", timeout_s=1200)
    ended = lab.wait_for_output("5b", r"Done: ")
    lab.shoot("5b-done", "5b")
    assert not re.search(r"Traceback|Writing model shards|PosixPath|Warning", ended)
    (result,) = (session / "fine-tuned").glob("*/result.json")
    assert json.loads(result.read_text(encoding="utf-8"))["first_step"] == at
