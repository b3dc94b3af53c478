"""The handwriting notebook as a person uses it: upload lines, look, correct, teach, compare, open the shared page."""

import os
import re
import shutil
from pathlib import Path

import pytest
from tiny_readers import noise_pictures, write_reader

from browser.lab import PATIENCE_S, ROOT, Lab, open_browser, start_lab

for package in ("transformers", "jiwer", "accelerate", "gradio", "jupyterlab"):
    pytest.importorskip(package)

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(3600)]


def wait_until(lab, title, pattern, timeout_s=PATIENCE_S):
    """Wait until what is below a cell holds a pattern."""
    for _ in range(int(timeout_s * 2)):
        shown = lab.output(title)
        if re.search(pattern, shown):
            return shown
        lab.page.wait_for_timeout(500)
    raise AssertionError(f"{pattern!r} did not appear below {title}:\n{lab.output(title)[-2000:]}")


def fill(lab, title, values):
    for name, value in values.items():
        field = lab.field(title, name)
        if not field.is_visible():
            lab.cell(title).get_by_text("More settings").first.click()
            field.wait_for()
        lab.enter(title, name, value)
    lab.page.wait_for_timeout(1000)


def test_upload_look_correct_teach_compare_and_share(tmp_path):
    write_reader(tmp_path / "reader", "stage1", spread=0.15, end=2.0)
    files = []
    for place, picture in enumerate(noise_pictures(12)):
        # Lines by their shape, from three pages by their names.
        path = tmp_path / f"page{place // 4}-{place}.png"
        picture.resize((300, 40)).save(path)
        files.append(str(path))
    folder = tmp_path / "lab"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "trocr.ipynb", folder)
    shots = os.environ.get("FASTSD_SCREENSHOTS")
    session = folder / "Fast-TrOCR" / "Sessions" / "my-handwriting"
    with open_browser() as page, start_lab(folder) as address:
        lab = Lab(page, address, "trocr.ipynb", Path(shots) if shots else None)
        for title in ("1", "2a", "2b"):
            lab.run(title)
        lab.run("3a")
        lab.cell("3a").locator("input.fastsd-file").set_input_files(files)
        wait_until(lab, "3a", "12 uploaded files in this session", timeout_s=300)
        fill(lab, "3a", {"reader": str(tmp_path / "reader"), "precision": "fp32"})
        lab.shoot("trocr-3a-uploaded", "3a")
        lab.run("3b")
        wait_until(lab, "3b", "lines 1 to 12 of 12")
        assert lab.cell("3b").locator("td img").count() == 12
        lab.shoot("trocr-3b-read", "3b")
        correct(lab, session)
        teach(lab, session)
        share(lab, page)


def correct(lab, session):
    lab.run("4")
    fields = lab.cell("4").locator(".fastsd-line input")
    fields.first.wait_for()
    for place in range(fields.count()):
        fields.nth(place).fill(f"{place % 3}")
        fields.nth(place).press("Enter")
    wait_until(lab, "4", "10 of 12 lines looked at")
    lab.shoot("trocr-4-corrected", "4")
    assert (session / "text.txt").read_text(encoding="utf-8").splitlines()[:3] == ["0", "1", "2"]


def teach(lab, session):
    lab.run("5a")
    fill(lab, "5a", {"epochs": "30", "patience": "0", "held out": "0.3"})
    lab.shoot("trocr-5a-settings", "5a")
    lab.run("5b", wait=False)
    lab.wait_done("5b", timeout_s=900)
    assert "CER on" in lab.output("5b"), lab.output("5b")[-2000:]
    lab.shoot("trocr-5b-taught", "5b")
    assert len(list((session / "fine-tuned").glob("*/model/model.safetensors"))) == 1
    lab.run("6", wait=False)
    lab.wait_done("6", timeout_s=600)
    assert "lines that were not learned from" in lab.output("6")
    lab.shoot("trocr-6-compared", "6")


def share(lab, page):
    lab.run("8a")
    lab.run("8b")
    lab.cell("8b").locator(".fastsd-open-page").click()
    shown = wait_until(lab, "8b", r"user reader, password \S+", timeout_s=300)
    lab.shoot("trocr-8b-open", "8b")
    url = re.search(r"http://127\.0\.0\.1:\d+/?", shown)[0]
    password = re.search(r"password (\S+)", shown)[1]
    answer = page.request.post(f"{url.rstrip('/')}/login", form={"username": "reader", "password": password})
    assert answer.ok, "the password that is shown opens the page"
    lab.cell("8b").get_by_role("button", name="Close it").click()
    wait_until(lab, "8b", "Closed")
