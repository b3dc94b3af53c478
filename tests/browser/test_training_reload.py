"""A page that is loaded anew during a training shows it again, with its Stop button."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser.lab import ROOT, Lab, open_browser, start_lab

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(1800)]

BEGIN = """# @title 2 · Begin
from fastsd_helpers import DreamBoothConfig, PrepareConfig, RunConfig, Session
from fastsd_helpers import prepare, run_training, show_form, start_log

start_log()
session = Session.create("rex", root="Sessions")
prepare(PrepareConfig(images="photos", size=64), session)
run_form = show_form(RunConfig)
"""
TRAIN = """# @title 5 · Train
few = {"unet_steps": 400, "text_encoder_steps": 0, "sample_every": 0, "resolution": 64, "batch_size": 1}
result = run_training(DreamBoothConfig(base_model="demo", method="lora", **few), session, run_form.config())
"""


def wait_for(page: Any, is_so: Callable[[], bool]) -> None:
    """Look until it is so, for a minute at most."""
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        page.wait_for_timeout(100)


def step_of(lab: Lab) -> int:
    """The step that is shown below the training."""
    return int(re.search(r"step (\d+) of 400", lab.output("5"))[1])


def test_a_page_loaded_anew_shows_the_training_and_its_stop_button(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("jupyterlab")
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    folder = tmp_path / "lab"
    folder.mkdir()
    shutil.copytree(ROOT / "fastsd_helpers" / "demo" / "subjects" / "robot", folder / "photos")
    cells = [nbformat.v4.new_code_cell(source) for source in (BEGIN, TRAIN)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (folder / "train.ipynb").write_text(json.dumps(nbformat.v4.new_notebook(cells=cells, metadata=kernel)))
    with open_browser() as page, start_lab(folder) as address:
        lab = Lab(page, address, "train.ipynb")
        lab.run("2")
        lab.run("5", wait=False)
        stop = lab.cell("5").locator(".fastsd-stop")
        page.wait_for_function("() => /step \\d+ of 400/.test(document.body.innerText)", timeout=300_000)
        assert "To stop it" in lab.output("5")
        saved = (folder / "train.ipynb").stat().st_mtime_ns
        page.keyboard.press("Control+s")
        wait_for(page, lambda: (folder / "train.ipynb").stat().st_mtime_ns != saved)
        page.reload()
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        stop.wait_for(timeout=120_000)
        first = step_of(lab)
        assert first < 400
        wait_for(page, lambda: step_of(lab) > first)
        stop.click()
        page.wait_for_function("() => /Stopped: run this cell again to resume/.test(document.body.innerText)")
        assert list((folder / "Sessions" / "rex" / "checkpoints").iterdir())
