"""Drive the handwriting notebook in Chromium as an editor of pages does, and keep a screenshot of every step.

    python scripts/walk_transcription.py SCREENSHOTS

Two drawn pages are read by the built-in model with a language model of a text file; their lines are corrected in the
form and read again, so that the gain is told; a model is fine-tuned on them and on more text, and the pages are read
by it; it and its int8 copy are uploaded to a stand-in of the Hub; then the PAGE files are taken home, one of them is
edited, and a model is fine-tuned on that. Fails where a step shows nothing, or something else than it should.
"""

import contextlib
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
from hub_upload_server import TOKEN, HubUploadServer  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

_WORDS = (
    "over the lazy dog",
    "into a quiet garden",
    "where nobody had been",
    "and the old dog",
    "the garden was quiet",
    "nobody saw the dog",
)
_READS = "hf_" + "read" * 6  # a token without write access
TEXTS = [[f"{_WORDS[row]} {('once', 'again')[page]}" for row in range(6)] for page in range(2)]


def main() -> None:
    shots = Path(sys.argv[1])
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastsd-walk-"))
        work = Path(name)
        os.environ["FASTSD_SCRATCH"] = str(work / "scratch")
        draw_pages(work / "scans")
        (work / "letters.txt").write_text(
            "\n".join(f"{text}." for page in TEXTS for text in page) * 8, encoding="utf-8"
        )
        folder = work / "lab"
        folder.mkdir()
        shutil.copy(ROOT / "notebooks" / "trocr.ipynb", folder)
        hub = stack.enter_context(HubUploadServer(work / "hub", token=TOKEN, readers=(_READS,)))
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(work / "hf")}
        os.environ.pop("HF_TOKEN", None)
        with open_browser() as page, start_lab(folder) as address:
            lab = Lab(page, address, "trocr.ipynb", shots)
            lab.run("1")
            session = folder / "Fast-TrOCR" / "Sessions" / "my-handwriting"
            upload_nothing(lab)
            read(lab, work)
            correct(lab)
            read_again(lab, "3-with-gain", r"Language model, on 12 corrected lines, greedy: CER")
            give_bad_text(lab, work)
            model = teach(lab, session, "5-taught")
            lab.enter("3a", "reader", str(model))
            lab.enter("3a", "language", "auto")
            read_again(lab, "3-read-by-own-model", "12 lines read")
            lab.run("6", wait=False)
            lab.wait_done("6", timeout_s=900)
            lab.shoot("6-compared", "6")
            upload(lab, hub)
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


def give_bad_text(lab: Lab, work: Path) -> None:
    """Name text for the language model that is not there, then an empty file, then nothing to use it for."""
    lab.run("5a")
    lab.unfold("5a")
    (work / "empty.txt").write_text("")
    for name, sentence in (("none.txt", "There is no file or folder"), ("empty.txt", "There is no text in")):
        lab.enter("5a", "text", str(work / name))
        look(lab, "5b", sentence, f"5-{name}")
    lab.enter("5a", "text", str(work / "letters.txt"))
    lab.field("5a", "language").uncheck()
    lab.wait_for_output("5a", "language is off")
    lab.shoot("5a-text-without-language", "5a")
    lab.field("5a", "language").check()


def look(lab: Lab, cell: str, sentence: str, name: str) -> None:
    """Run a cell, wait for what it has to say, and keep a screenshot of it."""
    lab.run(cell)
    lab.wait_for_output(cell, sentence)
    lab.shoot(name, cell)
    shown = lab.output(cell)
    if re.search(r"Traceback|PosixPath|Warning|LFS files", shown):
        raise RuntimeError(shown)


def upload_nothing(lab: Lab) -> None:
    """Upload before anything was fine-tuned: without a name, with a bad one, and with a good one."""
    for cell in ("2a", "2b", "9a"):
        lab.run(cell)
    lab.shoot("9a-form", "9a")
    look(lab, "9b", "Nothing was uploaded", "9b-no-name")
    lab.enter("9a", "repo", "https://huggingface.co/ada/hand")
    lab.wait_for_output("9a", "at most one /")
    lab.shoot("9a-bad-name", "9a")
    lab.enter("9a", "repo", "hand")
    look(lab, "9b", "No model was fine-tuned in this session yet", "9b-no-model")


def upload(lab: Lab, hub: HubUploadServer) -> None:
    """Upload the model: without a token, with wrong ones, with a right one, and twice; then its int8 copy."""
    look(lab, "9b", "needs a Hugging Face token", "9b-no-token")
    for token, name in ("hf_wrong", "unknown"), (_READS, "reading"):
        lab.enter("9a", "hf token", token)
        look(lab, "9b", "does not let this token write to hand", f"9b-{name}-token")
    lab.enter("9a", "hf token", TOKEN)
    look(lab, "9b", r"Uploaded and compared: .*/ada/hand \(private\)", "9b-uploaded")
    look(lab, "9b", "1 is there already", "9b-uploaded-again")
    lab.enter("9a", "model", "int8")
    lab.enter("9a", "repo", "hand-int8")
    look(lab, "9b", "has no int8 copy", "9b-no-int8")
    lab.run("7", wait=False)
    lab.wait_done("7", timeout_s=900)
    lab.shoot("7-quantized", "7")
    copied = "chosen" in lab.output("7") and "fp32 ✓" not in lab.output("7")
    look(lab, "9b", r"ada/hand-int8 \(private\)" if copied else "has no int8 copy", "9b-int8")
    if hub.private != {"ada/hand", *["ada/hand-int8"] * copied}:
        raise RuntimeError(f"On the Hub is {hub.private}.")


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
