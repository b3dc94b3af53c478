"""Every `fastsd` command that a page, a notebook or a docstring shows is one that the parser takes."""

import argparse
import contextlib
import functools
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

from fastsd_helpers.cli.parser import build_parser  # noqa: E402

PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
_FENCE = re.compile(r"^[ >]*```(\w*)[^\n]*\n(.*?)^[ >]*```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_WORD = re.compile(r"(?:^|[\s(/])fastsd (?=[a-z])")
# What stands for something else: FOLDER, model.safetensors of one's own, [flags], a|b, ...
_PLACEHOLDER = re.compile(r"^(?:\[.*|.*\]|\.\.\.|…)$")


def shown_in(path: Path) -> list[tuple[str, bool]]:
    """Each command that a page shows, and whether it is a whole one, to be copied, or the mention of one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return commands_of(text)


def commands_of(text: str) -> list[tuple[str, bool]]:
    found = []
    for language, block in _FENCE.findall(text):
        if language in ("", "sh", "bash", "shell", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                found += [(command, True) for command in _commands_in(line.split(" #")[0])]
    for code in _INLINE.findall(_FENCE.sub("", text)):
        found += [(command, False) for command in _commands_in(" ".join(code.split()))]
    return found


def _commands_in(line: str) -> list[str]:
    """The commands of a line, each without what leads to the program and what comes after it."""
    parts = re.split(r"&&|\|\||;|(?<=\s)\|(?=\s)", line)
    return [f"fastsd {part[match.end() :].strip()}" for part in parts if (match := _WORD.search(part))]


def problem_with(command: str, whole: bool) -> str:
    """What the parser says against a command; a mention may leave arguments out, but not name flags that are none."""
    words = [word for word in shlex.split(command)[1:] if not _PLACEHOLDER.match(word)]
    parser = _parser()
    while words and (inner := _commands_below(parser).get(words[0])):
        parser, words = inner, words[1:]
    if _commands_below(parser):  # a group of commands
        return f"{parser.prog} has no command {words[0]!r}" if words and not words[0].startswith("-") else ""
    if not whole:
        flags = {flag for action in parser._actions for flag in action.option_strings}
        named = [word.split("=")[0] for word in words if word.startswith("-") and len(word) > 1]
        return "".join(f"{parser.prog} has no flag {flag}" for flag in named if flag not in flags)
    return _refusal(parser, words)


@functools.cache
def _parser() -> argparse.ArgumentParser:
    return build_parser()


def _commands_below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    groups = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(groups[0]) if groups else {}


def _refusal(parser: argparse.ArgumentParser, words: list[str]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return _wrong_value(parser, vars(parser.parse_args(words)))
        except SystemExit as ended:
            return said.getvalue() if ended.code else ""
        except Exception as refused:  # the parser's own errors, in words
            return str(refused)
    return ""


def _wrong_value(parser: argparse.ArgumentParser, given: dict) -> str:
    """A word that its flag's settings class will refuse: the parser only shows in `a|b` or N what it must be."""
    for action in parser._actions:
        value, kind = given.get(action.dest), action.metavar
        if not (action.option_strings and isinstance(value, str) and isinstance(kind, str)) or value.isupper():
            continue
        choices = kind.split("|")
        fits = value in choices if len(choices) > 1 else kind not in "NX" or re.fullmatch(r"-?\d[\d.e-]*", value)
        if not fits and value != action.default:
            return f"{parser.prog}: {action.option_strings[0]} is {value!r}, not {kind}"
    return ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shown_command_is_one_that_the_parser_takes(path):
    wrong = {command: problem for command, whole in shown_in(path) if (problem := problem_with(command, whole))}
    assert wrong == {}


def test_the_pages_show_commands_at_all():
    shown = [command for path in PAGES for command, whole in shown_in(path) if whole]
    assert len(shown) >= 19
    assert len({command.split()[1] for command in shown}) >= 5


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nfastsd dreambooth learn rex\n```",
        "```\n.venv/bin/fastsd dreambooth train rex --stepz 5   # soon\n```",
        "```sh\nexport A=1 && fastsd convert one.safetensors\n```",
        "```sh\nfastsd convert a b --dtype fp12\n```",
        "```sh\nfastsd dreambooth train rex --unet-steps many\n```",
        "```sh\nfastsd convert a b \\\n    --verifi\n```",
        "Use `fastsd trocr reed` then.",
        "Use `fastsd trocr read --page` or\n`fastsd doctor --jsn` then.",
        "Use `python -m x; fastsd webui launch --dryrun`.",
    ],
)
def test_a_planted_wrong_command_is_found(text):
    assert any(problem_with(command, whole) for command, whole in commands_of(text))


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nfastsd convert MODEL NEW.safetensors --merge LORA:0.7   # or two\n```",
        "`fastsd trocr`, `fastsd trocr read IMAGE ... [--pages]` and `fastsd --help`",
        "```python\nfastsd nonsense --of python\n```",
        "```sh\nfastsd doctor --json | head -3\n```",
    ],
)
def test_what_is_right_is_let_pass(text):
    assert [problem for command, whole in commands_of(text) if (problem := problem_with(command, whole))] == []
