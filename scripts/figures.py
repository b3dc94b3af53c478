"""Tie figures in prose to the results pages they come from, by names in benchmarks/figures.toml.

In README.md, CHANGELOG.md, docs/ and the notebooks' texts a figure stands between two comments that no reader sees:

    the loss falls by <!--=demo-loss-mean-->62 %<!--/--> on average

python scripts/figures.py            say what differs from benchmarks/results/
python scripts/figures.py --write    write the figures of the results pages into the marks
python scripts/figures.py --list     each name with what it shows now
"""

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "figures.toml"
RESULTS = ROOT / "benchmarks" / "results"
_TAKES = {"only": None, "first": lambda found: found[0], "mean": fmean, "lowest": min, "highest": max}
_MARK = re.compile(r"<!--=([\w-]+)-->(.*?)<!--/-->", re.DOTALL)
# What has to be marked or listed: shares, and how many times as fast or large. Inside of code it is a setting.
_SHARE = re.compile(r"\d+(?:\.\d+)?\s?%(?!\w)|\b\d+(?:\.\d+)? times (?:as|less|more|faster|slower|smaller|larger)")
_CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


@dataclass(frozen=True)
class Figure:
    """One figure of a results page and how prose writes it."""

    name: str
    page: str
    find: str  # a pattern with one group, the number; searched line by line
    show: str = "{:g}"  # how prose writes it; the number is `{}`
    take: str = "only"  # of several numbers: mean, lowest, highest, first
    of: float = 1.0  # multiplied with it: 100 makes a share a percentage
    left: bool = False  # what is missing to 100: "lower by 41 %" where the page says that 59 % are left

    def value(self) -> str:
        """What prose has to say, from the results page as it is now; raises LookupError where the page says nothing."""
        path = RESULTS / f"{self.page}.md"
        if not path.is_file():
            raise LookupError(f"{self.name}: there is no results page benchmarks/results/{self.page}.md")
        text = path.read_text(encoding="utf-8")
        found = [float(number.replace(",", "")) for number in re.findall(self.find, text, re.MULTILINE)]
        if not found or (self.take == "only" and len(set(found)) > 1):
            seen = ", ".join(f"{number:g}" for number in found) or "nothing"
            raise LookupError(f"{self.name}: {self.find!r} finds {seen} in benchmarks/results/{self.page}.md")
        choose = _TAKES[self.take]
        number = (choose(found) if choose else found[0]) * self.of
        number = 100 - number if self.left else number
        return self.show.format(number + 1e-9)  # a half is rounded up, as people do


def figures() -> dict[str, Figure]:
    """Every figure that prose may show, by name."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Figure(name, **row) for name, row in table["figure"].items()}


def unmeasured() -> dict[str, str]:
    """Shares that are no measurements of ours, as prose writes them, and why each needs no results page."""
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))["unmeasured"]


def pages() -> Iterator[Path]:
    """Every file whose prose shows figures."""
    yield from (ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md"))
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from sorted((ROOT / "notebooks").glob("*.ipynb"))


def marks(text: str) -> list[tuple[str, str]]:
    """Name and figure of every mark, in order."""
    return [(name, " ".join(shown.replace("\\n", " ").split())) for name, shown in _MARK.findall(text)]


def problems(path: Path, text: str) -> list[str]:
    """What is wrong with the figures of a text: another number than the page's, no such name, a share with no mark,
    a mark that tears its paragraph apart."""
    known, found = figures(), []
    for name, shown in marks(text):
        if name not in known:
            found.append(f"{path.name}: benchmarks/figures.toml has no figure {name!r}")
        elif shown != known[name].value():
            found.append(f"{path.name}: {name} is {known[name].value()!r} in its results page, here {shown!r}")
    for line in re.findall(r"^ *<!--=.*", text, re.MULTILINE):
        found.append(f"{path.name}: a line that begins with a mark is a paragraph of its own: {line.strip()[:60]}")
    rest = _MARK.sub("", _prose(path, text))
    for listed in unmeasured():
        rest = rest.replace(listed, "")
    for share in _SHARE.finditer(rest):
        around = " ".join(rest[max(share.start() - 50, 0) : share.end() + 20].split())
        found.append(f"{path.name}: {share[0]!r} has no mark and no line in benchmarks/figures.toml: ... {around}")
    return found


def _prose(path: Path, text: str) -> str:
    """The text that people read: of a notebook its text cells; code is no prose."""
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    return " ".join(_CODE.sub("", text).split())


def filled(text: str) -> str:
    """The text with every mark's figure taken from its results page."""
    known = figures()
    return _MARK.sub(lambda mark: f"<!--={mark[1]}-->{known[mark[1]].value()}<!--/-->", text)


def main(words: list[str]) -> int:
    if "--list" in words:
        for name, figure in figures().items():
            print(f"{name}: {figure.value()}  (benchmarks/results/{figure.page}.md)")
        return 0
    if "--write" in words:
        for path in pages():
            text = path.read_text(encoding="utf-8")
            if (new := filled(text)) != text:
                path.write_text(new, encoding="utf-8")
                print(f"written: {path.relative_to(ROOT)}")
    found = [problem for path in pages() for problem in problems(path, path.read_text(encoding="utf-8"))]
    print("\n".join(found) or "Every figure is that of its results page.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
