"""A notebook has fields and cells and no flags: every message of the library, in the notebook's words."""

import ast
import functools
import logging
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.runtime import start_log
from fastsd_helpers.wording import count_in_words, for_notebook, natural_order

PACKAGE = Path(__file__).resolve().parents[1] / "fastsd_helpers"
# Said on the command line alone, or read by programs: lists of flags, patterns, model cards, the guards' own process.
ELSEWHERE = ("cli/", "bench/", "webui/guards/", "webui/arguments.py", "wording.py", "story.py", "demo/")
# Messages in tables.
TABLES = ("webui/running/crashes.toml", "wheels/failures.toml", "wheels/known_bad.toml")
FLAG = re.compile(r"(?<![\w-])--[a-z{]")
OTHER_PROGRAMS = re.compile(r"`uv [^`]*`|pip install [^\n.]*|'--lowram'")


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every text of a source file that somebody may read, with what is filled in shown as "unet"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                skipped.add(id(first.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(inner) for inner in ast.walk(node) if inner is not node}
        # What is run, matched or written to a file is nobody's message.
        if isinstance(node, ast.Call) and called_of(node) in ("re", "subprocess"):
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "unet" for part in node.values)
            yield node.lineno, "".join(map(str, parts))


def called_of(node: ast.Call) -> str | None:
    """The module whose function is called, where it is one level deep: `re` of `re.compile(...)`."""
    function = node.func
    return function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else None


@functools.cache
def messages_with_flags() -> list[tuple[str, str]]:
    """(where, text) of every sentence of the library in which a flag stands."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        source = path.read_text(encoding="utf-8")
        if name.startswith(ELSEWHERE) or not (FLAG.search(source) or "fastsd " in source):
            continue  # most have neither a flag nor a command, and parsing all of them takes seconds
        for line, text in texts_of(path):
            sentence = " " in text.strip() and not text.startswith(("# ", "-")) and "(?P<" not in text
            if sentence and (FLAG.search(text) or re.search(r"\bfastsd [a-z]+ ", text)):
                found.append((f"{name}:{line}", text))
    for name in TABLES:
        rows = tomllib.loads((PACKAGE / name).read_text(encoding="utf-8")).values()
        texts = [row.get(key, "") for table in rows for row in table for key in ("what", "meaning", "hint", "todo")]
        found += [(name, text) for text in texts if FLAG.search(text) or re.search(r"\bfastsd [a-z]+ ", text)]
    return found


def test_the_messages_are_found() -> None:
    texts = " ".join(text for _where, text in messages_with_flags())
    assert len(messages_with_flags()) > 70
    assert "--restart" in texts
    assert "--root" in texts
    assert "base_model (--base-model) is empty" in texts


@pytest.mark.parametrize(("where", "text"), messages_with_flags(), ids=lambda value: value[:40])
def test_no_message_shows_a_flag_below_a_cell(where: str, text: str) -> None:
    shown = for_notebook(text)
    assert not FLAG.search(OTHER_PROGRAMS.sub("", shown)), f"{where}: {shown}"
    # Where a command stays it is one that can be typed into a cell.
    assert not re.search(r"(?<!!)\bfastsd (dreambooth|webui|trocr|convert|install|models)\b", shown), shown


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("unet_steps (--unet-steps) is -1; the smallest is 0.", "unet steps is -1; the smallest is 0."),
        ("Start again with --restart.", "Start again with 'start over' (in the training's form)."),
        ("--more-steps N continues it", "'more steps' (in the training's form) continues it"),
        ("Leave them out with --no-ema.", "Leave them out with 'ema' off."),
        ("try --batch-size 1, a smaller --resolution", "try 'batch size' 1, a smaller 'resolution'"),
        ("choose base_model demo (--base-model demo).", "choose base model demo."),
        ("extensions (--extension) has a: no link.", "extensions has a: no link."),
        (
            "extra_args (--extra-args) has --share, --port, which is set elsewhere here",
            "extra args has --share, --port, which is set elsewhere here",
        ),
        ("The file '--odd name.png' is not an image.", "The file '--odd name.png' is not an image."),
        ("Run: fastsd install trocr", "Run: the first cell"),
        ("Run: fastsd install trocr-int8, or wait.", "Run: `!fastsd install trocr-int8` (in a cell), or wait."),
        (
            "To export that model: fastsd dreambooth export rex --checkpoint best",
            "To export that model: the cell that writes the file, with best as 'checkpoint'",
        ),
        ("Convert it: fastsd convert FILE.ckpt FILE.safetensors.", None),
        ("It costs 2 -- or 3 -- minutes.", "It costs 2 -- or 3 -- minutes."),
        ("Run: pip install --force-reinstall uv", "Run: pip install --force-reinstall uv"),
    ],
)
def test_flags_become_the_fields_of_the_form(said: str, shown: str | None) -> None:
    wanted = "Convert it: `!fastsd convert FILE.ckpt FILE.safetensors` (in a cell)." if shown is None else shown
    assert for_notebook(said) == wanted


@pytest.mark.parametrize(("where", "text"), messages_with_flags()[::5], ids=lambda value: value[:40])
def test_said_twice_it_stays_the_same(where: str, text: str) -> None:
    once = for_notebook(text)
    assert for_notebook(once) == once, where


def test_an_error_below_a_cell_has_no_flag_and_the_command_line_keeps_it() -> None:
    error = SettingsError("unet_steps (--unet-steps) is -1.", "Start from step 0 with --restart.")
    assert error._render_traceback_() == [
        "✗ unet steps is -1.",
        "   → Start from step 0 with 'start over' (in the training's form).",
    ]
    assert "(--unet-steps)" in str(error)


def test_the_log_below_a_cell_has_no_flag_and_that_of_a_terminal_keeps_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_log(sys.stdout)
    logging.getLogger("fastsd_helpers").info("Add %s.", "--take-over")
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    start_log()
    logging.getLogger("fastsd_helpers").info("Add %s.", "--keep-last 3")
    assert capsys.readouterr().out.splitlines() == ["Add --take-over.", "Add 'keep last' 3."]


def test_a_count_of_a_small_file_is_not_zero_millions() -> None:
    counts = {0: "0", 640: "640", 1_000: "1.0 thousand", 49_152: "49.2 thousand", 99_949: "99.9 thousand"}
    counts |= {100_000: "0.1 million", 859_520_964: "859.5 million", 11_901_408_320: "11,901.4 million"}
    assert {count: count_in_words(count) for count in counts} == counts


def test_numbers_in_names_count_as_people_count():
    names = ["dog (10)", "Dog (2)", "dog", "2", "10", "dog (2) b"]
    assert sorted(names, key=natural_order) == ["2", "10", "dog", "Dog (2)", "dog (2) b", "dog (10)"]
