"""Help, messages, notebooks and docs use the field's terms: phrases that an expert could not search for stay out."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What may not come back, and what is said instead.
INSTEAD = {
    r"left alone:": "default:",
    r"may be left alone": "optional",
    r"number format": "precision, dtype",
    r"beginnings kept": "beam width",
    r"of the sums\b": "compute dtype",
    r"encoder's sums": "int8 activations (W8A8)",
    r"pull of weights": "weight decay",
    r"in which the rate rises": "warmup ratio",
    r"times (that )?every line is seen": "epochs",
    r"forward passes summed": "gradient accumulation steps",
    r"pictures per forward pass": "batch size",
    r"mirrored pictures": "horizontal flip",
    r"what learns:": "trainable parts",
    r"lines at once": "batch size",
    r"word vectors": "token embeddings",
    r"squashed": "resized without aspect ratio",
    r"wrong characters": "CER",
    r"wrong words": "WER",
    r"class pictures": "class (regularization) images",
    r"\bpictures of (lines|pages|handwritten)": "images of",
    r"how strongly (the|a) prompt steers": "guidance scale (CFG)",
    r"noise that is one value per channel": "offset noise strength",
    r"noise the (first )?(picture|image) starts from": "seed",
    r"\bto be had\b": "available",
    r"could not be had": "could not be downloaded",
    r"what it was made with": "how it was made",
    r"\bput right\b": "fixed",
    r"no finite numbers?": "NaN or Inf",
    r"\blet go of\b": "released",
    r"what lends": "source of missing configs",
    r"onto this machine, whole": "download",
    r"what this machine is": "environment report",
    r"nothing stands in the way": "no problems found",
    r"beside plain": "versus, next to",
    r"as diffusers publishes it": "baseline",
    r"opened anew": "reopened",
    r"begin anew": "start again",
    r"run (it|cell 5b|this cell) again to go on": "resume",
    r"[Gg]oing on (after|from) step": "resuming",
    r"every stranger": "unauthenticated client",
    r"shrink(ing)? (it|was)|[Nn]othing to shrink": "quantize to int8",
    r"the reader (that )?(was )?taught": "the fine-tuned model",
    r"least sure first": "lowest confidence first",
    r"so many (measurements|minutes|steps)": "this many",
    r"gave back other bytes": "returned different bytes",
    r"wants a (GPU|login)": "needs",
    r"last words:\\n": "last output",
}
BANNED = re.compile("|".join(f"(?:{pattern})" for pattern in INSTEAD), re.IGNORECASE)


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the words of every text of a file: literals of code with a space in them, cells, lines of a page."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
                yield node.lineno, " ".join(node.value.split())
    elif path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(source)["cells"]):
            yield number, "".join(cell["source"])
    else:
        yield from enumerate(source.splitlines(), 1)


def found_in(path: Path) -> list[str]:
    """A sentence for every phrase of a file that has a standard term: file, line, phrase, term."""
    found = []
    for line, text in texts_of(path):
        for match in BANNED.finditer(text):
            term = next(term for pattern, term in INSTEAD.items() if re.fullmatch(pattern, match[0], re.IGNORECASE))
            found.append(f"{path.name}:{line}: {match[0]!r}; say: {term}")
    return found


def test_no_text_says_in_other_words_what_the_field_has_a_term_for() -> None:
    package = [
        path
        for path in (*(ROOT / "fastsd_helpers").rglob("*.py"), *(ROOT / "fastsd_helpers").glob("*/**/*.toml"))
        if path != ROOT / "fastsd_helpers" / "captions" / "prompts.py"
    ]
    pages = [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "notebooks").glob("*.ipynb"),
    ]
    assert len(package) > 100
    assert len(pages) > 5
    assert [said for path in (*package, *pages) for said in found_in(path)] == []


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.py", 'x = 1\nHELP = "beginnings kept at every step"\n', "a.py:2: 'beginnings kept'; say: beam width"),
        ("b.md", "# Page\nWrong characters: 3 %\n", "b.md:2: 'Wrong characters'; say: CER"),
        ("c.ipynb", '{"cells": [{"source": ["a ", "number format"]}]}', "c.ipynb:0: 'number format'; say: precision"),
    ],
)
def test_a_phrase_is_told_with_its_file_line_and_term(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert [said[: len(told)] for said in found_in(tmp_path / name)] == [told]
