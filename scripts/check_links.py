"""The links of README, docs and notebooks: inside they lead somewhere, outside they are in docs/outside-links.txt.

python scripts/check_links.py            say what is wrong, without a network
python scripts/check_links.py --ask      ask every outside address, and renew its line where it answers
"""

import json
import re
import sys
import tomllib
import urllib.request
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "docs" / "outside-links.txt"
OWN = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["fastsd"]["repository"]
_LINK = re.compile(r"\]\(<?([^()\s>]+)>?(?: \"[^\"]*\")?\)|<(https?://[^>\s]+)>|(?:src|href)=\"([^\"]+)\"")
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_COLAB = "https://colab.research.google.com/github/" + OWN.removeprefix("https://github.com/")


def pages() -> list[Path]:
    """Every page of the project that people read."""
    names = ("README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md")
    found = [*(ROOT / name for name in names), *sorted((ROOT / "docs").rglob("*.md"))]
    return [*found, *sorted((ROOT / "benchmarks").rglob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def links_of(path: Path) -> list[str]:
    """Every link and image of a page, in order; code has none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return [next(filter(None, found)) for found in _LINK.findall(_CODE.sub("", text))]


def outside_links() -> dict[str, str]:
    """Each outside address that pages may name, with when and how it was last looked at."""
    lines = [line for line in LIST.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {address: seen for address, _, seen in (line.partition(" ") for line in lines)}


def problems(path: Path) -> list[str]:
    """A sentence for every link of a page that leads nowhere, or outside to what is not in the list."""
    return [sentence for link in links_of(path) if (sentence := problem_with(link, path))]


def problem_with(link: str, page: Path) -> str:
    """What is wrong with one link; "" for nothing."""
    for own in (f"{OWN}/blob/main/", f"{OWN}/tree/main/", f"{_COLAB}/blob/main/"):
        if link.startswith(own):
            there = (ROOT / link.removeprefix(own).partition("#")[0]).exists()
            return "" if there else f"{page.name}: {link} names a file that is not here"
    if re.match(r"[a-z]+:", link):
        known = link in outside_links() or link == OWN or link.startswith(f"{OWN}/")
        return "" if known else f"{page.name}: {link} is not in {LIST.relative_to(ROOT)}"
    target, _, anchor = link.partition("#")
    file = (page.parent / target).resolve() if target else page
    if not file.exists():
        return f"{page.name}: {link} leads to no file"
    if anchor and file.suffix == ".md" and anchor not in anchors_of(file):
        return f"{page.name}: {link} names a heading that {file.name} does not have"
    return ""


def anchors_of(path: Path) -> set[str]:
    """The headings of a page as links name them."""
    text = _CODE.sub(lambda code: code[0] if code[0].count("`") == 2 else "", path.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


def ask() -> list[str]:
    """Ask every address of the list; those that answer get today's date. Returns those that did not, and why."""
    known, silent = outside_links(), []
    for address in known:
        request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0"}, method="GET")
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                known[address] = f"{date.today()} answered {answer.status}"
        except OSError as err:
            silent.append(f"{address}: {err}")
    head = [line for line in LIST.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    LIST.write_text(
        "\n".join([*head, *(f"{one} {seen}" for one, seen in sorted(known.items()))]) + "\n", encoding="utf-8"
    )
    return silent


if __name__ == "__main__":
    found = ask() if "--ask" in sys.argv else [one for path in pages() for one in problems(path)]
    print("\n".join(found) or "Every link is as it should be.")
    sys.exit(bool(found))
