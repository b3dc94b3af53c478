"""Docstrings are in the form that tools read, and those of public functions say all: arguments, value, errors."""

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from snapshots import _first_level

import fastsd_helpers
from fastsd_helpers import errors

ROOT = Path(__file__).resolve().parents[1]
_ENTRY = re.compile(r"(\*{0,2}[A-Za-z_]\w*): \S")
_SECTION = re.compile(r"( *)(Args|Raises|Returns|Yields|Attributes):$")
# What the library itself stands on, and others do not import: one line says it, with the parameters' names in it.
FOUNDATION = {"files", "runtime"}
# A docstring that begins like this names the value; one that begins with a verb has to say it below.
_NAMES_THE_VALUE = {"The", "A", "An", "Every", "Everything", "Whether", "What", "Which", "Where", "Why", "How", "When"}
_NAMES_THE_VALUE |= {"As", "Link,", "Names"}


def public_functions() -> dict[str, Any]:
    """Every function and public method that the package and its modules of the first level declare, and every one of
    docs/reference/python.md."""
    things = [getattr(module, name) for module in _first_level() for name in module.__all__]
    shown = re.findall(r"^::: (\S+)\.(\w+)$", (ROOT / "docs/reference/python.md").read_text(encoding="utf-8"), re.M)
    things += [getattr(importlib.import_module(module), name) for module, name in shown]
    found = {}
    for thing in things:
        inner = vars(thing).items() if inspect.isclass(thing) else [("", thing)]
        for method, raw in inner:
            function = inspect.unwrap(getattr(raw, "__func__", raw)) if callable(raw) or method else raw
            if inspect.isfunction(function) and not method.startswith("_"):
                found.setdefault(f"{function.__module__}.{function.__qualname__}", function)
    return found


def entries_of(docstring: str) -> Iterator[tuple[str, str]]:
    """Section and text of each entry below Args and Raises, with the lines that go on with it."""
    section, indent, entry = "", 0, ""
    for line in [*inspect.cleandoc(docstring).splitlines(), "end"]:
        depth = len(line) - len(line.lstrip())
        if section in ("Args", "Raises") and line.strip() and depth > indent:
            entry += f" {line.strip()}"
        elif line.strip():
            if entry:
                yield section, entry
            entry = ""
            if head := _SECTION.match(line):
                section, indent = head[2], len(head[1]) + 4
            elif depth < indent:
                section = ""
            elif section in ("Args", "Raises"):
                entry = line.strip()


def problems_of(docstring: str, parameters: list[str] | None) -> list[str]:
    """What a tool would read wrongly in a docstring; without `parameters` their names are not compared."""
    found = []
    for section, entry in entries_of(docstring):
        named = _ENTRY.match(entry)
        if named is None:
            found.append(f"{section}: {entry!r} does not begin with one name and a colon")
        elif section == "Args" and parameters is not None:
            if named[1].lstrip("*") not in parameters:
                found.append(f"Args: there is no parameter {named[1]}")
            if any(re.search(rf"[.;] {name}: ", entry) for name in parameters):
                found.append(f"Args: {entry!r} names a second parameter")
        elif section == "Raises" and re.search(r"[.;] (And what |[A-Z]\w+( and its kin)?: )", entry):
            found.append(f"Raises: {entry!r} names a second error")
    return found


def gaps_of(function: Any) -> list[str]:
    """What a public function does not say of itself: a parameter, its value, or an error that there is none of."""
    text = inspect.cleandoc(function.__doc__ or "")
    entries = [(section, match[1].lstrip("*")) for section, entry in entries_of(text) if (match := _ENTRY.match(entry))]
    signature = inspect.signature(function)
    said = {name for section, name in entries if section == "Args"}
    found = [f"says nothing of {name}" for name in signature.parameters if name not in said | {"self", "cls"}]
    value = not str(signature.return_annotation).endswith(("None", "Iterator[None]", "inspect._empty'>"))
    value |= "|" in str(signature.return_annotation)
    if value and text.split(" ")[0] not in _NAMES_THE_VALUE and not re.search(r"^(Returns|Yields):$", text, re.M):
        found.append("does not say what it gives back")
    known = {**vars(builtins), **vars(errors), **function.__globals__}
    raised = [name for section, name in entries if section == "Raises"]
    return found + [f"raises {name}, which is no error" for name in raised if not is_error(known.get(name))]


def is_error(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, BaseException)


def is_foundation(name: str) -> bool:
    """Whether a function is one of those that `FOUNDATION` spares; none that the package itself gives out is."""
    module, function = name.removeprefix("fastsd_helpers.").partition(".")[0], name.rpartition(".")[2]
    return module in FOUNDATION and function not in fastsd_helpers.__all__


def test_every_public_function_says_its_parameters_its_value_and_its_errors():
    functions = {name: function for name, function in public_functions().items() if not is_foundation(name)}
    assert len(functions) > 200
    assert {name: gaps for name, function in functions.items() if (gaps := gaps_of(function))} == {}


def test_every_public_function_has_a_docstring():
    assert [name for name, function in public_functions().items() if not function.__doc__] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("fastsd_helpers/*")), ids=lambda path: path.stem)
def test_every_docstring_has_one_parameter_and_one_error_a_line(path):
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path] * (path.suffix == ".py")
    wrong = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found = problems_of(ast.get_docstring(node) or "", parameters_of(node))
                if found:
                    wrong[f"{file.name}: {node.name}"] = found
    assert wrong == {}


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> list[str] | None:
    """The names that a function, or the class with such an __init__, takes; None for another class."""
    if isinstance(node, ast.ClassDef):
        inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]  # of a dataclass
        return parameters_of(inits[0]) if inits else fields or None
    takes = node.args
    every = [*takes.posonlyargs, *takes.args, *takes.kwonlyargs, takes.vararg, takes.kwarg]
    return [item.arg for item in every if item is not None]


@pytest.mark.parametrize(
    ("docstring", "said"),
    [
        ("It.\n\nArgs:\n    one, two: both.", "does not begin with one name"),
        ("It.\n\nArgs:\n    three: of it.", "there is no parameter three"),
        ("It.\n\nArgs:\n    one: of it. two: of it, too.", "names a second parameter"),
        ("It.\n\nArgs:\n    one: of it, and so\n        on; two: of it, too.", "names a second parameter"),
        ("It.\n\nRaises:\n    DriveError, DiskFull: the disk.", "does not begin with one name"),
        ("It.\n\nRaises:\n    DiskFull.", "does not begin with one name"),
        ("It.\n\nRaises:\n    DiskFull: no room. DriveError: gone.", "names a second error"),
        ("It.\n\nRaises:\n    DiskFull: no\n        room. UnsafeModel: it runs.", "names a second error"),
        ("It.\n\nRaises:\n    DiskFull: no room. And what `other` raises.", "names a second error"),
    ],
)
def test_a_docstring_in_another_form_is_found(docstring, said):
    [problem] = problems_of(docstring, ["one", "two"])
    assert said in problem


def test_a_docstring_in_this_form_is_let_pass():
    arguments = "Args:\n    one: the first,\n        in two lines. Two: no name.\n    two: the other."
    text = f"It.\n\n{arguments}\n\nRaises:\n    DiskFull: no."
    assert problems_of(text, ["one", "two"]) == []


def test_what_a_function_leaves_out_is_found():
    def take(one: int, *, two: int = 2, **rest: int) -> int:
        """Take it.

        Args:
            one: the first.
            **rest: any others.

        Raises:
            DiskFull: no room.
            DiskEmpty: too much of it.
        """
        return one

    assert gaps_of(take) == [
        "says nothing of two",
        "does not say what it gives back",
        "raises DiskEmpty, which is no error",
    ]


def test_a_function_whose_first_words_name_its_value_need_not_name_it_again():
    def count() -> int:
        """The number of them."""
        return 1

    assert gaps_of(count) == []
