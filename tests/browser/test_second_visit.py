"""A person comes back in a real JupyterLab: restart and "Run all" go on with the named session and its own photos."""

import os
import random
import re
import shutil
from pathlib import Path

import pytest
from dreambooth_runs import draw_quickly, train_again
from faults.fingerprints import hash_file

from browser.lab import ROOT, Lab, on_front, open_browser, start_lab

Image = pytest.importorskip("PIL.Image")

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(3600)]

STEPS = 24
SETTINGS = {"base model": "demo", "unet steps": str(STEPS), "text encoder steps": "0", "resolution": "64"}
SETTINGS |= {"sample every": "0", "batch size": "1"}


def photos(folder: Path) -> list[str]:
    made = []
    for number in (1, 2, 3, 4):
        path = folder / f"zib robot ({number}).png"
        Image.frombytes("RGB", (160, 120), random.Random(number).randbytes(3 * 160 * 120)).save(path)
        made.append(str(path))
    return made


def restart_and_run_all(lab: Lab) -> None:
    lab.page.locator(".lm-MenuBar-item, .p-MenuBar-item", has_text="Kernel").first.click()
    lab.page.locator(".lm-Menu-item, .p-Menu-item", has_text=re.compile("Restart Kernel and Run All")).first.click()
    lab.page.locator(".jp-Dialog .jp-mod-accept").click()


@pytest.fixture(scope="module")
def whole() -> dict[str, str]:
    """The weights of the training that nobody stopped, for both: their photos and settings are the same."""
    return {}


@on_front("7.7.1")
def test_restart_and_run_all_go_on_with_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, str], widgets7: bool
) -> None:
    pytest.importorskip("jupyterlab")
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    folder = tmp_path / "lab"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "dreambooth.ipynb", folder)
    shots = os.environ.get("FASTSD_SCREENSHOTS")
    with open_browser() as page, start_lab(folder, widgets7=widgets7) as address:
        lab = Lab(page, address, "dreambooth.ipynb", Path(shots) / f"visit{7 if widgets7 else 8}" if shots else None)
        sessions = folder / "Fast-Dreambooth" / "Sessions"
        first_visit(lab, sessions, photos(tmp_path))
        restart_and_run_all(lab)
        second_visit(lab, sessions)
    if not whole:
        draw_quickly(monkeypatch)  # pictures go into no weight
        whole["rex"] = hash_file(train_again(sessions / "rex", SETTINGS))
    assert whole["rex"] == hash_file(sessions / "rex" / "exports" / "rex.safetensors")


def first_visit(lab: Lab, sessions: Path, files: list[str]) -> None:
    """Cells too early, a session's name typed into the form that stands there, own photos, a training that is cut."""
    lab.run("6")
    assert "Run cells 2a and 2b first" in lab.output("6")
    lab.run("2a")
    lab.enter("2a", "session name", "cat")
    lab.run("2b")
    lab.enter("2a", "session name", "rex")  # without running 2a again
    lab.shoot("2a-named", "2a")
    lab.run("2b")
    assert (sessions / "rex").is_dir()
    lab.run("3a")
    lab.cell("3a").locator("input.fastsd-file").set_input_files(files)
    lab.wait_for_output("3a", "4 uploaded photos in this session")
    lab.enter("3a", "size", "64")
    lab.shoot("3a-uploaded", "3a")
    lab.run("3b")
    lab.run("4")
    lab.unfold("4")
    for name, value in SETTINGS.items():
        lab.enter("4", name, value)
    lab.page.wait_for_timeout(1000)
    lab.run("5a")
    lab.shoot("5a", "5a")
    lab.run("5b", wait=False)
    lab.wait_for_output("5b", rf"step [2-9] of {STEPS}", timeout_s=900)


def below(lab: Lab, title: str) -> str:
    """What is below a cell once it is in sight: JupyterLab draws no others."""
    lab.cell(title).scroll_into_view_if_needed()
    return lab.wait_for_output(title, r"\S")


def second_visit(lab: Lab, sessions: Path) -> None:
    lab.wait_for_kernel()
    lab.cell("11").scroll_into_view_if_needed()
    lab.wait_done("11", timeout_s=1800)
    lab.shoot("again-page")
    assert "Resuming rex, last used" in below(lab, "2b")
    below(lab, "2a")
    chosen = lab.field("2a", "session name").locator("option:checked").inner_text()
    assert " ".join(chosen.split()).startswith("rex · last used")
    assert "Done: rex.safetensors is written and checked" in below(lab, "5b")
    assert "rex.safetensors" in below(lab, "6")
    assert lab.cell("6").locator("img:not([alt=''])").count() == 2
    assert re.search(rf"Resuming after step \d+ of {STEPS}", (sessions / "rex" / "logs" / "train.log").read_text())
    for number in ("2a", "2b", "3b", "5b", "6", "8b", "9b", "11"):
        assert not re.search(r"PosixPath|Result\(|^False$|^\[\]$", below(lab, number), flags=re.MULTILINE)
        lab.shoot(f"again-{number}", number)
    assert sorted(path.name for path in sessions.iterdir() if path.is_dir()) == ["cat", "rex"]
    assert not list((sessions / "cat" / "exports").iterdir())
