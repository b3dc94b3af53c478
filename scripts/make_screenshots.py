"""Make the pictures of the README: the notebooks in a real JupyterLab and Chromium, with the built-in models.

    python scripts/make_screenshots.py [--out docs/images] [--only photos dreambooth webui trocr] [--raw FOLDER]

Needs no network and no GPU. `dreambooth` trains the built-in model while it is photographed, which takes ten minutes on
two cores; the others a minute or two each. The photo of a cat is by Stefan van der Walt (CC0, from scikit-image).
--raw keeps every picture as it was taken.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser.lab import Lab, open_browser, start_lab  # noqa: E402

from fastsd_helpers.demo import SUBJECTS_FOLDER  # noqa: E402

WIDTH, SCALE = 880, 1.5  # of a picture in pixels of the page, and how many pixels each becomes
CAT = ROOT / "docs" / "images" / "cat.jpg"


class Photographer:
    """One notebook on the screen, and what was photographed of it."""

    def __init__(self, lab: Lab, raw: Path) -> None:
        self.lab, self.page, self.raw = lab, lab.page, raw

    def shoot(self, name: str, title: str, *, height: int = 585) -> Path:
        """Photograph what is below a cell, as much as one screen of this height shows."""
        thing = self.lab.cell(title).locator(".jp-Cell-outputWrapper").first
        thing.evaluate(
            "part => { part.scrollIntoView({block: 'start'});"
            " part.closest('.jp-WindowedPanel-outer, .jp-Notebook').scrollBy(0, -8); }"
        )
        self.page.mouse.move(1, 1)
        self.page.wait_for_timeout(700)
        path = self.raw / f"{name}.png"
        box = self.page.locator(".jp-NotebookPanel-notebook").first.bounding_box()
        clip = {"x": box["x"], "y": box["y"], "width": WIDTH, "height": height}
        self.page.screenshot(path=str(path), clip=clip)
        return path


@contextmanager
def notebook(name: str, work: Path, raw: Path) -> Iterator[Photographer]:
    """Open a copy of a notebook in a folder of its own."""
    folder = work / name
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder)
    with open_browser() as page, start_lab(folder) as address:
        page.close()
        browser = page.context.browser
        page = browser.new_page(viewport={"width": WIDTH + 80, "height": 960}, device_scale_factor=SCALE)
        page.set_default_timeout(180_000)
        lab = Lab(page, address, f"{name}.ipynb")
        page.keyboard.press("Control+b")  # the list of files, which takes a third of the width
        page.wait_for_timeout(1000)
        yield Photographer(lab, raw)


def photos(work: Path, raw: Path, out: Path) -> None:
    """The photos of a cat with their crops, and the crop editor."""
    folder = work / "photos"
    folder.mkdir()
    whole = Image.open(CAT)
    for number, box in enumerate([(0, 0, 451, 300), (60, 0, 451, 280), (0, 20, 420, 300)], start=1):
        whole.crop(box).save(folder / f"zib cat ({number}).jpg", quality=92)
    with notebook("dreambooth", work, raw) as camera:
        lab = camera.lab
        for title in ("2a", "2b", "3a"):
            lab.run(title)
        lab.enter("3a", "images", str(folder))
        lab.enter("3a", "size", "256")
        for title in ("3b", "3c"):
            lab.run(title)
        lab.cell("3c").locator(".fastsd-box").wait_for()
        camera.page.wait_for_timeout(1500)
        picture = camera.shoot("photos-prepared", "3b", height=724)
    save(picture, out / "photos.webp")


def dreambooth(work: Path, raw: Path, out: Path) -> None:
    """A whole training on the built-in model and one of its subjects, as a moving picture."""
    with notebook("dreambooth", work, raw) as camera:
        shutil.copytree(SUBJECTS_FOLDER / "mushroom", work / "dreambooth" / "photos-of-it")
        lab = camera.lab
        lab.run("2a")
        lab.enter("2a", "session name", "mushroom")
        for title in ("2b", "3a"):
            lab.run(title)
        lab.enter("3a", "images", "photos-of-it")
        lab.enter("3a", "size", "128")
        frames = [(camera.shoot("train-1-photos", "3a"), 2.5)]
        lab.run("3b")
        frames.append((camera.shoot("train-2-prepared", "3b"), 3))
        lab.run("4")
        lab.enter("4", "base model", "demo")
        camera.page.wait_for_timeout(1000)
        frames.append((camera.shoot("train-3-settings", "4"), 2.5))
        lab.run("5a")
        lab.run("5b", wait=False)
        for stage, step in (("Text encoder", 40), ("U-Net", 20), ("U-Net", 80), ("U-Net", 140), ("U-Net", 190)):
            wait_for_step(lab, stage, step)
            frames.append((camera.shoot(f"train-4-{stage}-{step}", "5b"), 1.2))
        lab.wait_done("5b", timeout_s=3600)
        frames.append((camera.shoot("train-5-done", "5b"), 6))
    save_moving(frames, out / "dreambooth.webp")


def wait_for_step(lab: Lab, stage: str, step: int) -> None:
    """Wait until a stage has taken so many steps, or the cell has ended."""
    for _ in range(14_400):
        said = lab.output("5b")
        found = re.search(rf"{stage} \(part \d of \d\): step (\d+) of", said)
        if "Done:" in said or (found and int(found[1]) >= step):
            return
        lab.page.wait_for_timeout(250)


def webui(work: Path, raw: Path, out: Path) -> None:
    """The web UI notebook where there is no GPU: what it says, and the page that it opens instead."""
    with notebook("a1111", work, raw) as camera:
        lab = camera.lab
        for title in ("2a", "2b", "3a", "3b", "4a", "4b", "6a", "6b"):
            lab.run(title)
        lab.cell("6b").locator("button", has_text="Open the playground").click()
        said = lab.wait_for_output("6b", r"Open: http://127\.0\.0\.1:\d+")
        page = camera.page.context.browser.new_page(
            viewport={"width": WIDTH, "height": 640}, device_scale_factor=SCALE, color_scheme="light"
        )
        page.set_default_timeout(180_000)
        page.goto(re.search(r"Open: (http://127\.0\.0\.1:\d+/?)", said)[1])
        page.get_by_label("Prompt", exact=True).fill("a red heart in the middle, night background")
        page.get_by_role("button", name="Generate").click()
        page.locator(".grid-container img").first.wait_for()
        page.wait_for_timeout(1500)
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_timeout(500)
        page.screenshot(path=str(raw / "webui-page.png"))
        page.close()
        form = camera.shoot("webui-start", "6a", height=390)
        camera.shoot("webui-6b", "6b", height=420)
        lab.cell("6b").locator("button", has_text="Close it").click()
    save_stacked([form, raw / "webui-page.png"], out / "webui.webp")


def trocr(work: Path, raw: Path, out: Path) -> None:
    """The built-in lines: corrected in the table, and read before and after the model learned from them."""
    with notebook("trocr", work, raw) as camera:
        lab = camera.lab
        for title in ("2a", "2b", "3a", "3b", "4"):
            lab.run(title)
        camera.shoot("trocr-read", "3b")
        lab.cell("4").get_by_role("button", name="Next").first.click()
        lab.wait_for_output("4", "lines 11 to 20 are shown")
        table = camera.shoot("trocr-table", "4", height=560)
        lab.run("5a")
        lab.run("5b", wait=False)
        lab.wait_done("5b", timeout_s=3600)
        camera.shoot("trocr-learned", "5b")
        lab.run("6")
        compared = camera.shoot("trocr-compare", "6", height=365)
    save(table, out / "trocr.webp")
    save(compared, out / "trocr-compare.webp")


def save(picture: Path, path: Path) -> None:
    """Write one picture, small."""
    Image.open(picture).convert("RGB").save(path, quality=82, method=6)


def save_stacked(pictures: list[Path], path: Path) -> None:
    """Write pictures below one another."""
    opened = [Image.open(picture).convert("RGB") for picture in pictures]
    gap = 24
    height = sum(picture.height for picture in opened) + gap * (len(opened) - 1)
    sheet, top = Image.new("RGB", (max(picture.width for picture in opened), height), "#c8c8c8"), 0
    for picture in opened:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    sheet.save(path, quality=82, method=6)


def save_moving(frames: list[tuple[Path, float]], path: Path) -> None:
    """Write pictures one after the other, each for its seconds."""
    opened = [Image.open(picture).convert("RGB") for picture, _ in frames]
    opened = [picture.resize((WIDTH, round(picture.height * WIDTH / picture.width))) for picture in opened]
    seconds = [int(1000 * length) for _, length in frames]
    opened[0].save(path, save_all=True, append_images=opened[1:], duration=seconds, loop=0, quality=78, method=6)


PARTS: dict[str, Callable[[Path, Path, Path], None]] = {
    "photos": photos,
    "dreambooth": dreambooth,
    "webui": webui,
    "trocr": trocr,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--raw", type=Path, help="keep every picture as it was taken here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = asked.raw or Path(folder) / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        os.environ["FASTSD_SCRATCH"] = str(Path(folder) / "scratch")
        for part in asked.only:
            work = Path(folder) / part
            work.mkdir()
            PARTS[part](work, raw, asked.out)
    for path in sorted(asked.out.glob("*.webp")):
        print(f"{path.stat().st_size / 1000:6.0f} kB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
