"""Walk through the DreamBooth notebook with SDXL as a user does, in a real JupyterLab and Chromium.

    python scripts/walk_sdxl.py [--out FOLDER] [--only sdxl gpus] [--write]

Forms are filled in by the labels of their fields. Illustrious XL is chosen from the list of base models; what answers
for the Hub is a server on 127.0.0.1, and the model has SDXL's own layers at small widths with random weights, so the
samples are noise. Photos and class images have several shapes and keep them. Two processes train a LoRA on the CPU;
they are stopped, the page is loaded anew, and the kernel is restarted and goes on. Then the playground, another file
format, and the web UI notebook, which takes the base model and the LoRA. `gpus` walks the same notebook in a kernel
that seems to have two GPUs. Every cell is photographed into FOLDER; `--write` records what the cells said in
benchmarks/results/walk_sdxl.md.
"""

import argparse
import datetime
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser.lab import Lab, open_browser, start_lab  # noqa: E402
from browser.test_a1111_notebook import run  # noqa: E402
from dreambooth_runs import build_base  # noqa: E402
from hub_server import HubServer  # noqa: E402
from notebook_webui import prepare_kernel  # noqa: E402

from fastsd_helpers.checkpoints import convert  # noqa: E402
from fastsd_helpers.registry import find_model  # noqa: E402
from fastsd_helpers.sessions.record import read_record  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "walk_sdxl.md"
MODEL = "illustrious-xl"
CAT = ROOT / "docs" / "images" / "cat.jpg"  # 451 x 300
SHAPES = [(0, 0, 451, 300), (100, 0, 300, 300), (70, 0, 370, 300), (0, 60, 451, 260), (120, 0, 270, 300)]
CLASS_SHAPES = [(0, 0, 300, 200), (40, 0, 190, 300)]
STEPS = 6
SETTINGS = {"unet steps": str(STEPS), "resolution": "512", "save every": "3", "sample every": "5"}
FOLDED = {"resolutions": "512, 576", "processes": "2", "lora rank": "4"}
NOT_FOR_PEOPLE = re.compile(r"Traceback|PosixPath|Result\(|Config\(|^(False|None|\[\])$", re.MULTILINE)


class Walk:
    """The rows of the record: what was done in which cell, what was read there, and how long it took."""

    def __init__(self, shots: Path) -> None:
        self.shots, self.rows = shots, list[tuple[str, str, float]]()

    def look(self, lab: Lab, title: str, pattern: str = r"\S", *, name: str = "", timeout_s: float = 600) -> str:
        """Wait until a cell says this, photograph it, and refuse what is not meant for people."""
        began = time.monotonic()
        lab.cell(title).scroll_into_view_if_needed()
        try:
            said = lab.wait_for_output(title, f"{pattern}|✗", timeout_s=timeout_s)
        finally:
            lab.shoot(f"{len(self.rows) + 1:02}-{(name or title).strip()}", title)
        if found := NOT_FOR_PEOPLE.search(said):
            raise SystemExit(f"Cell {title} shows {found[0]!r}:\n{said}")
        if "✗" in re.sub("✗ Stopped at ", "", said):
            raise SystemExit(f"Cell {title} refuses:\n{said}")
        matched = re.search(pattern, said)
        line = next((line for line in said.splitlines() if matched and matched[0].splitlines()[0] in line), "")
        self.rows.append((name or title, "" if pattern == r"\S" else line.strip(), time.monotonic() - began))
        print(f"{name or title}: {line.strip()[:150]}", flush=True)
        return said

    def run(self, lab: Lab, title: str, pattern: str = r"\S", *, name: str = "") -> str:
        """Run a cell to its end, and look at it."""
        run(lab, title)
        return self.look(lab, title, pattern, name=name)


def write_pictures(folder: Path, boxes: list[tuple[int, int, int, int]], name: str) -> list[str]:
    """Parts of the photo of a cat, in several shapes; named after what they show."""
    folder.mkdir()
    whole = Image.open(CAT)
    for number, box in enumerate(boxes, start=1):
        whole.crop(box).save(folder / f"{name} ({number}).jpg", quality=92)
    return [str(path) for path in sorted(folder.iterdir())]


def restart_and_run_all(lab: Lab) -> None:
    """As from the menu."""
    lab.page.locator(".lm-MenuBar-item", has_text="Kernel").first.click()
    lab.page.locator(".lm-Menu-item", has_text=re.compile("Restart Kernel and Run All")).first.click()
    lab.page.locator(".jp-Dialog .jp-mod-accept").click()


@contextmanager
def hub(work: Path) -> Iterator[HubServer]:
    """What answers for the Hub: Illustrious XL's repository, with the model as a folder and as a single file."""
    spec = find_model(MODEL)
    served = build_base(work / "hub" / "model", "sdxl")
    convert(served, served / spec.checkpoint["file"], dtype="fp16")
    with HubServer({spec.sources[0].repo: served}) as server:
        os.environ |= {"HF_ENDPOINT": server.url, "HF_HOME": str(work / "hf")}
        yield server


@contextmanager
def laboratory(folder: Path, startup: Path, shots: Path) -> Iterator[Callable[[str], Lab]]:
    """A JupyterLab with the notebooks and a file that every kernel runs first; gives what opens a notebook."""
    settings = folder / ".settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # Every cell is drawn, also one that is out of sight.
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    shutil.copytree(startup, folder / ".ipython" / "profile_default" / "startup")
    for name in ("dreambooth.ipynb", "a1111.ipynb"):
        shutil.copy(ROOT / "notebooks" / name, folder)
    with open_browser() as page, start_lab(folder) as address:
        browser = page.context.browser

        def open_notebook(name: str) -> Lab:
            fresh = browser.new_page(viewport={"width": 1280, "height": 2700})
            fresh.set_default_timeout(600_000)
            return Lab(fresh, address, name, shots)

        yield open_notebook


def sdxl(work: Path, walk: Walk) -> None:
    """Illustrious XL, mixed shapes, two processes, stopped and gone on with, tried, placed."""
    with pytest.MonkeyPatch.context() as patch, hub(work) as server:
        prepare_kernel(work / "edges", patch)
        startup = work / "edges" / "ipython" / "profile_default" / "startup"
        with laboratory(work / "lab", startup, walk.shots) as open_notebook:
            lab = open_notebook("dreambooth.ipynb")
            session = work / "lab" / "Fast-Dreambooth" / "Sessions" / "cat"
            choose_session_and_photos(lab, walk, write_pictures(work / "photos", SHAPES, "zib cat"))
            write_pictures(work / "class", CLASS_SHAPES, "cat")
            choose_settings(lab, walk, work / "class")
            train_and_stop(lab, walk)
            come_back(lab, walk, session)
            try_and_write(lab, walk)
            if not any(name.startswith("unet/") for name in server.downloaded()):
                raise SystemExit(f"The Hub was not asked for the U-Net: {server.downloaded()}")
        # A JupyterLab of its own: a second page of the same one opens the notebooks of the first again.
        with laboratory(work / "lab-webui", startup, walk.shots) as open_notebook:
            shutil.copytree(session.parents[1], work / "lab-webui" / "Fast-Dreambooth")
            place(open_notebook("a1111.ipynb"), walk, work)


def choose_session_and_photos(lab: Lab, walk: Walk, photos: list[str]) -> None:
    """A new session; photos that keep their shapes."""
    walk.run(lab, "1")
    walk.run(lab, "2a")
    lab.enter("2a", "session name", "cat")
    walk.run(lab, "2b", "Created the session cat")
    walk.run(lab, "3a")
    lab.cell("3a").locator("input.fastsd-file").set_input_files(photos)
    lab.enter("3a", "size", "576")
    lab.enter("3a", "crop", "none")
    walk.look(lab, "3a", f"{len(photos)} uploaded photos in this session", name="3a-uploaded")
    walk.run(lab, "3b", "images to train on")
    walk.run(lab, "3c", "no crop to correct")
    walk.run(lab, "3d")
    walk.run(lab, "3e")


def choose_settings(lab: Lab, walk: Walk, class_images: Path) -> None:
    """The model from the list, then what few steps need; the dry run says where each image goes."""
    walk.run(lab, "4 ")
    lab.enter("4 ", "base model", MODEL)
    lab.page.wait_for_timeout(1500)
    walk.look(lab, "4 ", "Fair AI Public License", name="4-model")
    for name, value in SETTINGS.items():
        lab.enter("4 ", name, value)
    lab.enter("4 ", "class prompt", "a cat")
    lab.unfold("4 ")
    for name, value in (FOLDED | {"class folder": str(class_images)}).items():
        lab.enter("4 ", name, value)
    lab.page.wait_for_timeout(1500)
    walk.look(lab, "4 ", name="4-settings")
    walk.run(lab, "4b")
    lab.cell("4b").get_by_role("button", name="Dry run").click()
    walk.look(lab, "4b", "Nothing was trained", name="4b-dry-run", timeout_s=600)


def train_and_stop(lab: Lab, walk: Walk) -> None:
    """Two processes; stopped in the middle."""
    walk.run(lab, "5a")
    lab.run("5b", wait=False)
    walk.look(lab, "5b", rf"step [2-9] of {STEPS}", name="5b-training", timeout_s=1800)
    lab.cell("5b").locator(".fastsd-stop").click()
    lab.wait_done("5b", timeout_s=600)
    walk.look(lab, "5b", r"Stopped at unet step \d+", name="5b-stopped")


def come_back(lab: Lab, walk: Walk, session: Path) -> None:
    """The page loaded anew, the kernel restarted, and everything run: the session is there and goes on."""
    lab.page.keyboard.press("Control+s")
    lab.page.wait_for_timeout(3000)
    lab.page.reload()
    lab.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    lab.wait_for_kernel()
    restart_and_run_all(lab)
    lab.page.wait_for_timeout(3000)
    lab.wait_done("11", timeout_s=1800)
    walk.look(lab, "2a", name="again-2a")
    walk.look(lab, "2b", "Resuming cat, last used", name="again-2b")
    walk.look(lab, "3b", "A training was started with these images", name="again-3b")
    walk.look(lab, "4 ", name="again-4")
    walk.look(lab, "5b", r"Done: \S+ is written and checked", name="again-5b")
    walk.look(lab, "6", r"Loss", name="again-6")
    walk.look(lab, "11", r"Safe: ", name="again-11")
    record = read_record(session).record
    if record["settings"]["processes"] != 2 or record["base_model"]["ref"] != MODEL:
        raise SystemExit(f"It was not trained so: {record['settings']}")
    if not re.search(rf"Resuming after step \d+ of {STEPS}", (session / "logs" / "train.log").read_text()):
        raise SystemExit("The training began again instead of going on.")


def try_and_write(lab: Lab, walk: Walk) -> None:
    """The playground draws before and after; then a Diffusers-named LoRA, and what the file is."""
    walk.run(lab, "7a")
    walk.run(lab, "7b")
    lab.cell("7b").locator("button", has_text="Open the playground").click()
    said = walk.look(lab, "7b", r"Open: http://127\.0\.0\.1:\d+", name="7b-open")
    page = lab.page.context.browser.new_page(viewport={"width": 1100, "height": 1000})
    page.set_default_timeout(600_000)
    page.goto(re.search(r"Open: (http://127\.0\.0\.1:\d+/?)", said)[1])
    page.get_by_label("Prompt", exact=True).fill("a zib cat")
    for slider, value in (("Steps", "2"), ("Size in pixels", "512")):
        page.get_by_label(f"number input for {slider}", exact=True).fill(value)
        page.keyboard.press("Tab")
    page.get_by_role("button", name="Generate").click()
    page.locator(".grid-container img").nth(1).wait_for()  # before and after
    page.wait_for_timeout(1500)
    lab.shoot_page(f"{len(walk.rows):02}-7b-page", page)
    page.close()
    lab.cell("7b").locator("button", has_text="Close it").click()
    lab.wait_for_output("7b", "Closed")
    walk.run(lab, "8a")
    walk.run(lab, "8b", "already written this file")
    walk.run(lab, "8c")
    lab.cell("8c").get_by_role("button", name="Inspect it").click()
    walk.look(lab, "8c", "LoRA", name="8c-inspected")
    walk.run(lab, "10")


def place(lab: Lab, walk: Walk, work: Path) -> None:
    """The web UI notebook takes the base model and the LoRA from the session."""
    programs, store = work / "programs", work / "store"
    run(lab, "1")
    run(lab, "2a")
    lab.unfold("2a")
    lab.enter("2a", "store", str(store))
    lab.enter("2a", "without gpu", "yes")
    run(lab, "2b")
    run(lab, "3a")
    lab.unfold("3a")
    lab.enter("3a", "folder", str(programs))
    walk.run(lab, "3b", "is installed in", name="webui-3b")
    run(lab, "4a")
    lab.enter("4a", "model", MODEL)
    lab.enter("4a", "lora", "session cat: lora.safetensors")
    lab.page.wait_for_timeout(1500)
    walk.look(lab, "4a", name="webui-4a")
    walk.run(lab, "4b", rf"{re.escape(find_model(MODEL).checkpoint['file'])} \(checkpoint\)", name="webui-4b")
    walk.look(lab, "4b", r"cat-lora\.safetensors \(lora\)", name="webui-4b")
    # The web UI is started with the store's folders; what is elsewhere is linked into its own.
    placed = {path.name for folder in (programs, store) for path in folder.rglob("*.safetensors")}
    if not {"cat-lora.safetensors", find_model(MODEL).checkpoint["file"]} <= placed:
        raise SystemExit(f"Not all is where the web UI looks: {sorted(placed)}")


def gpus(work: Path, walk: Walk) -> None:
    """A kernel that seems to have two GPUs: the notebook, with nothing but fewer steps, starts two ranks."""
    startup = work / "seeming" / "startup"
    startup.mkdir(parents=True)
    text = "import torch\ntorch.cuda.device_count = lambda: 2\n"
    (startup.parent / "sitecustomize.py").write_text(text, encoding="utf-8")  # of what the kernel starts
    path = os.pathsep.join([str(startup.parent), str(ROOT)])
    text += f"import os\nos.environ['PYTHONPATH'] = {path!r}\n"
    (startup / "10-gpus.py").write_text(text, encoding="utf-8")
    with laboratory(work / "lab-gpus", startup, walk.shots) as open_notebook:
        lab = open_notebook("dreambooth.ipynb")
        for title in ("1", "2a", "2b", "3a", "3b", "4 "):
            lab.run(title)
        for name, value in {"base model": "demo", "method": "lora", "unet steps": "6", "sample every": "0"}.items():
            lab.enter("4 ", name, value)
        lab.enter("4 ", "text encoder steps", "0")
        lab.page.wait_for_timeout(1500)
        lab.run("5a")
        lab.run("5b", wait=False)
        lab.wait_done("5b", timeout_s=1800)
        walk.look(lab, "5b", r"Done: \S+ is written and checked", name="gpus-5b")
        session = work / "lab-gpus" / "Fast-Dreambooth" / "Sessions" / "my-subject"
        used = read_record(session).record["settings"]["processes"]
        walk.rows.append(("gpus", f"{used} processes trained", 0.0))
        if used != 2:
            raise SystemExit(f"{used} processes trained, not 2.")


PARTS: dict[str, Callable[[Path, Walk], None]] = {"sdxl": sdxl, "gpus": gpus}


def record(rows: list[tuple[str, str, float]]) -> str:
    """The page of results."""
    kept = [
        (name, re.sub(r"/\S*/(?=Fast-Dreambooth|class\b|programs\b)", ".../", said))
        for name, said, _seconds in rows
        if said
    ]
    table = [f"| {name} | {said.replace('|', '/')} |" for name, said in kept]
    about = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores"
    return "\n".join(
        [
            "# The DreamBooth notebook walked with SDXL",
            "",
            f"`python scripts/walk_sdxl.py --write`: {about}.",
            "",
            "A real JupyterLab in Chromium, worked by the fields' labels. Illustrious XL is chosen from the list; the "
            "model has SDXL's layers at small widths and random weights, served on 127.0.0.1. "
            f"{len(SHAPES)} photos and {len(CLASS_SHAPES)} class images of several shapes, {STEPS} steps of a LoRA on "
            "two CPU processes. The web UI that is installed is a small stand-in. The kernel of the last two rows "
            "seems to have two GPUs.",
            "",
            "| cell | what it said |",
            "|---|---|",
            *table,
            "",
        ]
    )


def main() -> int:
    """Walk; 0 when every cell said what it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the screenshots here")
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULTS.name}")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ |= {"FASTSD_SCRATCH": str(work / "scratch"), "OMP_NUM_THREADS": "1"}
        walk = Walk(asked.out or work / "shots")
        for part in asked.only:
            PARTS[part](work, walk)
    if asked.write:
        RESULTS.write_text(record(walk.rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
