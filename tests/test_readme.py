"""What the README promises is there: its links and pictures, and the families and formats that it lists."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from fastsd_helpers.registry import TRAINABLE_FAMILIES, find_model
from fastsd_helpers.webui.placing.bundles import runs_in
from fastsd_helpers.wheels import read_lock

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md")]
PAGES += [ROOT / "docs" / name for name in ("cookbook.md", "claims.md", "images/README.md")]
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_of_the_project_leads_to_one(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for picture, words, target in LINK.findall(text):
        assert words.strip() or not picture, f"{target}: a picture without words for who cannot see it"
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (page.parent / target.split("#")[0]).exists(), target


def test_the_pictures_are_small_and_all_of_them_are_shown() -> None:
    folder = ROOT / "docs" / "images"
    pictures = [path for path in folder.iterdir() if path.suffix != ".md"]
    assert sum(path.stat().st_size for path in pictures) < 3e6
    shown = {Path(target).name for picture, _, target in LINK.findall(README) if picture}
    assert {path.name for path in pictures if path.suffix == ".webp"} <= shown
    assert README.index("photos.webp") < README.index("dreambooth.webp"), (
        "the example that looks like a photo comes first"
    )


def rows(heading: str) -> dict[str, list[str]]:
    """The table below a heading: first cell -> the others."""
    table = README.split(f"## {heading}\n", 1)[1].strip().split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {first: rest for first, *rest in cells}


def test_the_families_are_trained_and_run_as_the_readme_says() -> None:
    table = rows("What it can do")
    keys = {"Stable Diffusion 1.5": "sd15", "Stable Diffusion 2.1": "sd21-512", "SDXL": "sdxl", "Flux.1": "flux-dev"}
    names = {"a1111": "AUTOMATIC1111", "forge-neo": "Forge Neo", "comfyui": "ComfyUI"}
    for words, key in keys.items():
        [said] = [rest for first, rest in table.items() if first.startswith(words)]
        assert (said[0] != "no") == (find_model(key).family in TRAINABLE_FAMILIES), f"{words}: {said[0]!r}"
        assert [names[ui] for ui in runs_in(find_model(key))] == said[2].split(", "), words


def test_the_pythons_of_the_readme_are_those_of_the_lock() -> None:
    locked = sorted({item.python for item in read_lock().sets if item.name == "trocr"}, key=lambda text: int(text[2:]))
    assert f"Python {locked[0]} to {locked[-1]}" in README
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert asked == f">={locked[0]}"


@pytest.mark.parametrize("name", ["dreambooth", "a1111", "trocr"])
def test_a_notebook_says_before_its_first_cell_what_it_takes(name: str) -> None:
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    first_code = next(number for number, cell in enumerate(cells) if cell["cell_type"] == "code")
    head = "".join("".join(cell["source"]) for cell in cells[:first_code])
    for word in ("Cost", "GPU", "Minutes", "Room", "What leaves this machine", "To stop"):
        assert f"**{word}**: " in head, word
    if name == "dreambooth":
        assert "consent" in head


def test_the_screenshot_script_takes_every_picture_that_the_readme_shows() -> None:
    script = (ROOT / "scripts" / "make_screenshots.py").read_text(encoding="utf-8")
    for picture, _, target in LINK.findall(README):
        if picture and target.startswith("docs/images/"):
            assert f'"{Path(target).name}"' in script, target
