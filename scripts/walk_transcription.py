"""Drive the handwriting notebook in Chromium as an editor of pages does, and keep a screenshot of every step.

    python scripts/walk_transcription.py SCREENSHOTS

Two drawn pages are read by the built-in model with a language model of a text file; their lines are corrected in the
form and read again, so that the gain is told; a model is fine-tuned on them, and the pages are read by it; then the
PAGE files are taken home, one of them is edited, and a model is fine-tuned on that. Fails where a step shows nothing.
"""

import os
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser.lab import Lab, open_browser, start_lab  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

_WORDS = (
    "over the lazy dog",
    "into a quiet garden",
    "where nobody had been",
    "and the old dog",
    "the garden was quiet",
    "nobody saw the dog",
)
TEXTS = [[f"{_WORDS[row]} {('once', 'again')[page]}" for row in range(6)] for page in range(2)]


def main() -> None:
    shots = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="fastsd-walk-") as name:
        work = Path(name)
        os.environ["FASTSD_SCRATCH"] = str(work / "scratch")
        draw_pages(work / "scans")
        (work / "letters.txt").write_text(
            "\n".join(f"{text}." for page in TEXTS for text in page) * 8, encoding="utf-8"
        )
        folder = work / "lab"
        folder.mkdir()
        shutil.copy(ROOT / "notebooks" / "trocr.ipynb", folder)
        with open_browser() as page, start_lab(folder) as address:
            lab = Lab(page, address, "trocr.ipynb", shots)
            session = folder / "Fast-TrOCR" / "Sessions" / "my-handwriting"
            read(lab, work)
            correct(lab)
            read_again(lab, "3-with-gain", r"Language model, on 12 corrected lines, greedy: CER")
            model = teach(lab, session, "5-taught")
            lab.enter("3a", "reader", str(model))
            lab.enter("3a", "language", "auto")
            read_again(lab, "3-read-by-own-model", "12 lines read")
            lab.run("6")
            lab.shoot("6-compared", "6")
            data = edit_page_files(lab, work)
            lab.enter("5a", "data", str(data))
            teach(lab, session, "5-taught-on-page-files")
    print(f"Walked; the screenshots are in {shots}.")


def draw_pages(folder: Path) -> None:
    """Pages in a type that the built-in model reads with errors."""
    folder.mkdir()
    for number, lines in enumerate(TEXTS):
        page = Image.new("RGB", (760, 640), (244, 240, 228))
        for row, text in enumerate(lines):
            ImageDraw.Draw(page).text((60, 50 + 95 * row), text, (40, 40, 70), ImageFont.load_default(42))
        page.save(folder / f"letter{number}.png")


def read(lab: Lab, work: Path) -> None:
    for cell in ("2a", "2b", "3a"):
        lab.run(cell)
    lab.enter("3a", "images", str(work / "scans"))
    lab.enter("3a", "reader", "demo-reader")
    lab.enter("3a", "language", str(work / "letters.txt"))
    lab.shoot("3a-form", "3a")
    lab.run("3b", wait=False)
    lab.wait_for_output("3b", "12 lines read", timeout_s=900)
    lab.shoot("3b-read", "3b")


def correct(lab: Lab) -> None:
    lab.run("4")
    lab.wait_for_output("4", "0 of 12 lines reviewed")
    right = [text for page in TEXTS for text in page]
    for number, text in enumerate(right, 1):
        field = lab.field("4", f"line {number}")
        field.scroll_into_view_if_needed()
        field.focus()
        lab.page.keyboard.press("Control+a")
        lab.page.keyboard.type(text)
        lab.page.keyboard.press("Enter")
        if number == 4:
            lab.shoot("4-correcting", "4")
        lab.wait_for_output("4", f"{number} of 12 lines reviewed")
    lab.shoot("4-corrected", "4")


def read_again(lab: Lab, name: str, pattern: str) -> None:
    lab.run("3b", wait=False)
    lab.wait_for_output("3b", pattern, timeout_s=900)
    lab.wait_done("3b", timeout_s=900)
    lab.shoot(name, "3b")


def teach(lab: Lab, session: Path, name: str) -> Path:
    """Fine-tune; returns the model that is new."""
    before = set(session.glob("fine-tuned/*/model"))
    if not before:
        lab.run("5a")
    for field, value in {"epochs": "30", "batch size": "4", "patience": "0", "measure every": "20"}.items():
        lab.enter("5a", field, value)
    lab.shoot(f"{name}-form", "5a")
    lab.run("5b", wait=False)
    lab.wait_for_output("5b", "Done: ", timeout_s=1500)
    lab.wait_done("5b", timeout_s=600)
    lab.shoot(name, "5b")
    shown = lab.output("5b")
    if re.search(r"Traceback|PosixPath|Warning", shown):
        raise RuntimeError(shown)
    (model,) = set(session.glob("fine-tuned/*/model")) - before
    return model


def edit_page_files(lab: Lab, work: Path) -> Path:
    """Download the pages as PAGE XML, change a line in one, and put them beside their images."""
    cell = lab.cell("3b")
    for label, wanted in (("searchable PDF", False), ("ALTO", False), ("PAGE", True)):
        cell.get_by_label(label, exact=True).set_checked(wanted)
    cell.get_by_role("button", name="Write the files").click()
    lab.wait_for_output("3b", "2 files", timeout_s=600)
    lab.shoot("3b-page-files", "3b")
    with lab.page.expect_download() as download:
        cell.get_by_role("link", name="Download my-handwriting.zip").click()
    data = work / "edited"
    shutil.copytree(work / "scans", data)
    with zipfile.ZipFile(download.value.path()) as found:
        found.extractall(data)
    path = data / "letter0.page.xml"
    text = path.read_text(encoding="utf-8")
    if TEXTS[0][0] not in text:
        raise RuntimeError("The PAGE file lacks what was corrected.")
    path.write_text(text.replace(TEXTS[0][0], "over the lazy dogs once"), encoding="utf-8")
    return data


if __name__ == "__main__":
    main()
