"""The DreamBooth notebook as a person uses it: upload, drag a crop, edit a caption, train, stop, go on."""

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from dreambooth_runs import draw_quickly, train_again
from faults.fingerprints import hash_file

from browser.lab import PATIENCE_S, ROOT, Lab, on_front, open_browser, start_lab

Image = pytest.importorskip("PIL.Image")

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(3600)]

SETTINGS = {"base model": "demo", "unet steps": "24", "text encoder steps": "0", "resolution": "64"}
SETTINGS |= {"sample every": "0", "batch size": "1"}


def photos(folder: Path) -> list[str]:
    """Three photos wider than high, the last one larger than a notebook's connection takes in one message."""
    made = []
    for number, (width, height) in enumerate(((300, 200), (260, 200), (2400, 1800)), start=1):
        noise = random.Random(number).randbytes(3 * width * height)
        path = folder / f"zib robot ({number}).png"
        Image.frombytes("RGB", (width, height), noise).save(path)
        made.append(str(path))
    assert os.path.getsize(made[-1]) > 12_000_000
    return made


@on_front("8")
def test_photos_crops_captions_training_stop_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widgets7: bool
) -> None:
    pytest.importorskip("jupyterlab")
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    folder = tmp_path / "lab"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "dreambooth.ipynb", folder)
    shots = os.environ.get("FASTSD_SCREENSHOTS")
    with open_browser() as page, start_lab(folder, widgets7=widgets7) as address:
        lab = Lab(page, address, "dreambooth.ipynb", Path(shots) if shots else None)
        session = folder / "Fast-Dreambooth" / "Sessions" / "my-subject"
        lab.run("2a")
        lab.run("2b")
        upload_photos(lab, photos(tmp_path), session)
        drag_a_crop(lab)
        edit_a_caption(lab, session)
        train_stop_and_go_on(lab, session)
        draw_in_the_playground(lab)
    draw_quickly(monkeypatch)  # pictures go into no weight
    assert hash_file(train_again(session, SETTINGS)) == hash_file(session / "exports" / "my-subject.safetensors")


def upload_photos(lab: Lab, files: list[str], session: Path) -> None:
    lab.run("3a")
    lab.cell("3a").locator("input.fastsd-file").set_input_files(files)
    lab.wait_for_output("3a", "3 uploaded photos in this session", timeout_s=300)
    for file in files:
        assert (session / "uploads" / Path(file).name).read_bytes() == Path(file).read_bytes()
    lab.enter("3a", "size", "64")
    lab.shoot("3a-uploaded", "3a")
    lab.run("3b")
    lab.shoot("3b-prepared", "3b")


def drag_a_crop(lab: Lab) -> None:
    lab.run("3c")
    chosen = lab.cell("3c").locator("select").first
    chosen.select_option(index=0)
    box = lab.cell("3c").locator(".fastsd-box")
    box.wait_for()
    lab.page.wait_for_timeout(2000)
    box.scroll_into_view_if_needed()
    place = box.bounding_box()
    frame = lab.cell("3c").locator(".fastsd-crop").bounding_box()
    room = frame["x"] + frame["width"] - place["x"] - place["width"]
    way = min(40, room) if room > 5 else -min(40, place["x"] - frame["x"])
    middle = (place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    lab.page.mouse.move(*middle)
    lab.page.mouse.down()
    lab.page.mouse.move(middle[0] + way, middle[1], steps=5)
    lab.page.mouse.up()
    lab.wait_for_output("3c", r"200 x 200 px at \d+, 0\. Not applied yet")
    lab.shoot("3c-dragged", "3c")
    lab.cell("3c").locator(".fastsd-apply-crops").click()
    lab.wait_for_output("3c", "1 with a crop of your own")
    lab.shoot("3c-used", "3c")


def edit_a_caption(lab: Lab, session: Path) -> None:
    lab.run("3d")
    lab.cell("3d").locator("textarea").first.fill("a zib robot on the moon")
    lab.cell("3d").locator(".fastsd-save-caption").click()
    lab.wait_for_output("3d", "Saved. Now: a zib robot on the moon")
    assert "a zib robot on the moon\n" in [path.read_text() for path in (session / "captions").iterdir()]
    lab.shoot("3d-saved", "3d")


def train_stop_and_go_on(lab: Lab, session: Path) -> None:
    lab.run("4")
    lab.unfold("4")
    for name, value in SETTINGS.items():
        lab.enter("4", name, value)
    lab.page.wait_for_timeout(1000)
    lab.shoot("4-settings", "4")
    lab.run("5a")
    lab.run("5b", wait=False)
    lab.wait_for_output("5b", r"step [2-9] of 24", timeout_s=900)
    lab.shoot("5-training", "5b")
    lab.cell("5b").locator(".fastsd-stop").click()
    lab.wait_done("5b", timeout_s=300)
    stopped: Any = re.search(r"Stopped at unet step (\d+) of 24; everything is saved", lab.output("5b"))
    assert stopped, lab.output("5b")[-2000:]
    lab.shoot("5-stopped", "5b")
    lab.run("5b", wait=False)
    lab.wait_done("5b", timeout_s=1200)
    assert "Done: my-subject.safetensors is written and checked" in lab.output("5b")
    assert f"Resuming after step {stopped[1]} of 24" in (session / "logs" / "train.log").read_text()
    assert (session / "exports" / "my-subject.safetensors").is_file()
    lab.shoot("5-done", "5b")
    lab.run("6")
    lab.shoot("6-result", "6")


def draw_in_the_playground(lab: Lab) -> None:
    lab.run("7a")
    lab.run("7b")
    lab.cell("7b").locator("button", has_text="Open the playground").click()
    address = re.search(
        r"Open: (http://127\.0\.0\.1:\d+/?)", lab.wait_for_output("7b", r"Open: http://127\.0\.0\.1:\d+")
    )
    lab.shoot("7-playground", "7b")
    page = lab.page.context.browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
    page.set_default_timeout(PATIENCE_S * 1000)
    page.goto(address[1])
    page.get_by_label("Prompt", exact=True).fill("a zib robot")
    page.get_by_role("button", name="Generate").click()
    pictures = page.locator(".grid-container img")
    pictures.nth(1).wait_for()  # before and after
    sizes = [
        picture.evaluate("picture => picture.decode().then(() => picture.naturalWidth)") for picture in pictures.all()
    ]
    assert sizes == [128, 128]
    lab.shoot_page("7-drawn", page)
    page.close()
    lab.cell("7b").locator("button", has_text="Close it").click()
    lab.wait_for_output("7b", "Closed")
