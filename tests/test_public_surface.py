"""What can be imported is declared, sorted, documented and typed."""

import importlib
import inspect
import pkgutil
import types
from typing import Any

import pytest

import fastsd_helpers

MODULES = ["fastsd_helpers"] + [
    found.name
    for found in pkgutil.walk_packages(fastsd_helpers.__path__, "fastsd_helpers.")
    if not found.name.endswith("__main__") and ".guards." not in found.name  # run in a web UI's process
]


def isort_style(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions, each in order: what ruff's RUF022 asks for."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name


def public_functions(module: types.ModuleType) -> list[tuple[str, Any]]:
    """(name, function) of every function and public method that the module declares in `__all__` and defines itself."""
    found = []
    for name in module.__all__:
        thing = getattr(module, name)
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            for method, raw in vars(thing).items():
                inner = raw.fget if isinstance(raw, property) else getattr(raw, "__func__", raw)
                if not method.startswith("_") and inspect.isfunction(inner):
                    found.append((f"{name}.{method}", inner))
        elif callable(thing):
            found.append((name, inspect.unwrap(thing)))
    return found


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_for(name: str) -> None:
    assert (importlib.import_module(name).__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_all_is_declared_sorted_and_true(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__, key=isort_style)
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [item for item in module.__all__ if not hasattr(module, item)]
    assert missing == []


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    classes = [
        item
        for item in module.__all__
        if inspect.isclass(getattr(module, item)) and not vars(getattr(module, item)).get("__doc__")
    ]
    undocumented = classes + [item for item, function in public_functions(module) if not inspect.getdoc(function)]
    assert undocumented == []


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_is_typed(name: str) -> None:
    untyped = []
    for item, function in public_functions(importlib.import_module(name)):
        signature = inspect.signature(function)
        parameters = [part for part in signature.parameters.values() if part.name not in ("self", "cls")]
        untyped += [f"{item}({part.name})" for part in parameters if part.annotation is inspect.Parameter.empty]
        if signature.return_annotation is inspect.Signature.empty:
            untyped.append(f"{item} -> ?")
    assert untyped == []


@pytest.mark.parametrize("name", fastsd_helpers.__all__)
def test_a_name_of_the_package_is_the_thing_itself(name: str) -> None:
    # A function and the module it lives in can have one name (dreambooth.prepare); the function must win.
    assert callable(getattr(fastsd_helpers, name))
    assert getattr(fastsd_helpers, name).__name__ == name
    assert name in dir(fastsd_helpers)


def test_a_name_that_does_not_exist_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastsd_helpers.nothing
