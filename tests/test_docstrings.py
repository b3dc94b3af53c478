"""Docstrings of public functions are in the form that tools read: one parameter a line, one error a line."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from snapshots import _first_level

_ENTRY = re.compile(r"(\*{0,2}[A-Za-z_]\w*): \S")


def public_functions() -> dict[str, Any]:
    """Every function that the package and its modules of the first level declare, and every public method."""
    found = {}
    for module in _first_level():
        for name in module.__all__:
            thing = getattr(module, name)
            inner = vars(thing).items() if inspect.isclass(thing) else [("", thing)]
            for method, raw in inner:
                function = inspect.unwrap(getattr(raw, "__func__", raw)) if callable(raw) or method else raw
                if inspect.isfunction(function) and not method.startswith("_"):
                    found.setdefault(f"{function.__module__}.{function.__qualname__}", function)
    return found


def problems_of(docstring: str, parameters: list[str]) -> list[str]:
    """What a tool would read wrongly in a docstring."""
    found = []
    for section, entry in entries_of(docstring):
        named = _ENTRY.match(entry)
        if named is None:
            found.append(f"{section}: {entry!r} does not begin with one name and a colon")
        elif section == "Args" and named[1].lstrip("*") not in parameters:
            found.append(f"Args: there is no parameter {named[1]}")
        elif section == "Raises" and re.search(r"[.;] [A-Z]\w+(Error|Full|Failed|Missing|NotFound): ", entry):
            found.append(f"Raises: {entry!r} names a second error")
    return found


def entries_of(docstring: str) -> Iterator[tuple[str, str]]:
    """Section and text of each entry below Args and Raises."""
    section, indent = "", 0
    for line in inspect.cleandoc(docstring).splitlines():
        if head := re.match(r"( *)(Args|Raises|Returns|Yields|Attributes):$", line):
            section, indent = head[2], len(head[1]) + 4
        elif line.strip() and len(line) - len(line.lstrip()) < indent:
            section = ""
        elif section in ("Args", "Raises") and len(line) - len(line.lstrip()) == indent and line.strip():
            yield section, line.strip()


def test_every_public_function_has_a_docstring_that_tools_read():
    functions = public_functions()
    assert len(functions) > 150
    wrong = {}
    for name, function in functions.items():
        text = function.__doc__ or ""
        found = problems_of(text, list(inspect.signature(function).parameters))
        if found or not text:
            wrong[name] = found or ["no docstring"]
    assert wrong == {}


@pytest.mark.parametrize(
    ("docstring", "said"),
    [
        ("It.\n\nArgs:\n    one, two: both.", "does not begin with one name"),
        ("It.\n\nArgs:\n    three: of it.", "there is no parameter three"),
        ("It.\n\nRaises:\n    DriveError, DiskFull: the disk.", "does not begin with one name"),
        ("It.\n\nRaises:\n    DiskFull.", "does not begin with one name"),
        ("It.\n\nRaises:\n    DiskFull: no room. DriveError: gone.", "names a second error"),
    ],
)
def test_a_docstring_in_another_form_is_found(docstring, said):
    [problem] = problems_of(docstring, ["one", "two"])
    assert said in problem


def test_a_docstring_in_this_form_is_let_pass():
    arguments = "Args:\n    one: the first,\n        in two lines. Two: no name.\n    two: the other."
    text = f"It.\n\n{arguments}\n\nRaises:\n    DiskFull: no."
    assert problems_of(text, ["one", "two"]) == []
