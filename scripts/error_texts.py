"""The text of every error that the code raises, with its hint: what docs/troubleshooting.md lists below each kind.

python scripts/error_texts.py [CLASS ...]    print them as the site shows them
"""

import ast
import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastsd_helpers import errors  # noqa: E402

VALUE = "…"  # where an error names a file, a number, a name


def error_classes() -> dict[str, type[errors.FastSDError]]:
    """Every kind of error, by its name, in the order of the tree in errors.py."""
    kinds = [getattr(errors, name) for name in errors.__all__]
    classes = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, errors.FastSDError)]
    return {kind.__name__: kind for kind in sorted(classes, key=lambda kind: inspect.getsourcelines(kind)[1])}


@functools.cache
def error_texts() -> dict[str, dict[str, list[str]]]:
    """Of every kind: each error's text, and the hints that the code gives with it; `…` stands for a value."""
    found: dict[str, dict[str, list[str]]] = {name: defaultdict(list) for name in error_classes()}
    for path in sorted((ROOT / "fastsd_helpers").rglob("*.py")):
        for node in _calls(path):
            if not isinstance(node.func, ast.Name) or node.func.id not in found or not node.args:
                continue
            hints = [text for part in node.args[1:2] for text in _texts(part)]
            hints += [text for word in node.keywords if word.arg == "hint" for text in _texts(word.value)]
            for problem in _texts(node.args[0]):
                if len(problem.replace(VALUE, "").split()) > 2:  # a text that the code puts together says nothing here
                    known = found[node.func.id][problem]
                    known += [hint for hint in hints if hint not in known and hint.strip(VALUE + " .")]
    return {name: dict(sorted(texts.items(), key=lambda item: item[0].lower())) for name, texts in found.items()}


def _calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


def _texts(node: ast.expr) -> Iterator[str]:
    """The sentences that an expression can be, each on one line."""
    yield from (" ".join(text.split()) for text in _sides(node))


def _sides(node: ast.expr) -> list[str]:
    """The texts that an expression can be: a text, one with values in it, either side of a choice, two joined."""
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return [*_sides(node.body), *_sides(node.orelse)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _sides(node.left) for right in _sides(node.right)]
    return [VALUE]


def as_markdown(name: str, level: int = 3) -> str:
    """Each error's text of one kind as a heading, its hints below."""
    lines = []
    for problem, hints in error_texts()[name].items():
        lines += [f"{'#' * level} {_plain(problem)}", "", *(f"→ {_plain(hint)}\n" for hint in hints)]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A text whose signs mean nothing to Markdown."""
    for sign in "\\`*_[]<>#|":
        text = text.replace(sign, "\\" + sign if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return text


if __name__ == "__main__":
    print("\n".join(f"## {name}\n\n{as_markdown(name)}" for name in sys.argv[1:] or error_classes()))
