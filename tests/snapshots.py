"""What others rely on, as sorted text: public names, the words of the command line, names in tables, the environment.

`scripts/renew_snapshots.py` writes these texts into tests/data/snapshots/; test_snapshots.py compares them. Nothing
here needs more than the standard library, or depends on the version of Python.
"""

import argparse
import ast
import dataclasses
import difflib
import importlib
import inspect
import json
import pkgutil
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastsd_helpers

DATA = Path(__file__).parent / "data" / "snapshots"
RENEW = "python scripts/renew_snapshots.py"
_PACKAGE = Path(fastsd_helpers.__file__).parent
# Names of the environment that are looked up through a variable are found by how they are spelt.
_OURS = re.compile(r"FASTSD_[A-Z_]+|[A-Z]+(_[A-Z]+)*_(AUTH)?TOKEN")


def renderers() -> dict[str, Any]:
    """Each snapshot's file name and the function that makes its lines."""
    return {
        "public_surface.txt": public_surface,
        "settings.txt": settings,
        "help_texts.txt": help_texts,
        "kept_names.txt": kept_names,
        "error_sentences.txt": error_sentences,
    }


def differences(recorded: list[str], found: list[str]) -> list[str]:
    """The lines that were lost (-) and that came (+), in order; one that changed is both."""
    lines = difflib.unified_diff(recorded, found, lineterm="", n=0)
    return [line for line in lines if line[:1] in "+-" and not line.startswith(("---", "+++"))]


# ------------------------------------------------------------------------------------------------ public names


def public_surface() -> list[str]:
    """Every name that the package, its packages and its modules of the first level declare, with what it takes."""
    places: dict[str, Any] = {}
    homes: dict[int, list[str]] = {}
    for module in _first_level():
        for name in module.__all__:
            place, thing = f"{module.__name__}.{name}", getattr(module, name)
            places[place] = thing
            if inspect.isclass(thing) or inspect.isroutine(thing):
                homes.setdefault(id(thing), []).append(place)
    lines = []
    for place, thing in places.items():
        # The package itself gives out what has its home below: described there, and only named here.
        home = max(homes.get(id(thing), [place]), key=lambda each: (each.count("."), each))
        lines += [f"{place} is {home}"] if home != place else _describe(place, thing)
    return sorted(lines)


def _first_level() -> list[types.ModuleType]:
    names = [found.name for found in pkgutil.iter_modules(fastsd_helpers.__path__) if not found.name.startswith("_")]
    return [fastsd_helpers, *(importlib.import_module(f"fastsd_helpers.{name}") for name in names)]


def _describe(place: str, thing: Any) -> Iterator[str]:
    if inspect.isclass(thing):
        parents = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        yield f"{place}: class{f' of {parents}' if parents else ''}"
        yield from (f"{place}.{line}" for line in _members(thing))
    elif inspect.isroutine(thing):
        yield f"{place}{_signature(thing)}"
    elif _is_plain(thing):
        yield f"{place} = {thing!r}"
    else:
        yield f"{place}: {'Path' if isinstance(thing, Path) else type(thing).__name__}"


def _members(thing: type) -> Iterator[str]:
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    for field in fields:
        if not field.name.startswith("_") and "help" not in field.metadata:  # a setting: those have a text of their own
            yield f"{field.name}: {_words(field.type)}{_default(field)}"
    seen = {field.name for field in fields}
    for name in getattr(thing, "_fields", ()):  # of a named tuple
        seen.add(name)
        yield f"{name}: {_words(thing.__annotations__[name])}"
    # Every error has what FastSDError has: said there alone.
    owners = [thing] if issubclass(thing, BaseException) else thing.__mro__
    for owner in owners:
        if not owner.__module__.startswith("fastsd_helpers"):
            continue
        for name, raw in vars(owner).items():
            if name in seen or (name.startswith("_") and name != "__init__"):
                continue
            seen.add(name)
            inner = getattr(raw, "__func__", raw)
            if isinstance(raw, property):
                yield f"{name}: {_words(inspect.signature(raw.fget).return_annotation)} (property)"
            elif name == "__init__" and (fields or issubclass(thing, BaseException)):
                continue  # what a dataclass is made with are its fields
            elif inspect.isfunction(inner):
                kind = {classmethod: " (of the class)", staticmethod: " (static)"}.get(type(raw), "")
                yield f"{name}{_signature(inner)}{kind}"
            elif _is_plain(raw):
                yield f"{name} = {raw!r}"
        for name in sorted(_set_on_itself(owner) - seen):
            seen.add(name)
            yield f"{name} (of each one)"


def _set_on_itself(owner: type) -> set[str]:
    """The public attributes that a class's methods set: `self.name = ...`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return {name for name in names if not name.startswith("_")}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) or (
        isinstance(value, tuple) and type(value) is tuple and all(isinstance(item, str | int | float) for item in value)
    )


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {_value(field.default)}"
    return f" = {field.default_factory.__name__}()" if field.default_factory is not dataclasses.MISSING else ""


def _signature(function: Any) -> str:
    signature = inspect.signature(inspect.unwrap(function))
    shown, starred = [], False
    for name, part in signature.parameters.items():
        if name in ("self", "cls"):
            continue
        if part.kind is part.KEYWORD_ONLY and not starred:
            shown.append("*")
        starred = starred or part.kind in (part.KEYWORD_ONLY, part.VAR_POSITIONAL)
        stars = {part.VAR_POSITIONAL: "*", part.VAR_KEYWORD: "**"}.get(part.kind, "")
        typed = "" if part.annotation is part.empty else f": {_words(part.annotation)}"
        default = "" if part.default is part.empty else f" = {_value(part.default)}"
        shown.append(f"{stars}{name}{typed}{default}")
    returned = signature.return_annotation
    arrow = "" if returned is inspect.Signature.empty else f" -> {_words(returned)}"
    return f"({', '.join(shown)}){arrow}"


def _words(annotation: Any) -> str:
    """A type as one writes it; Python's own text names the modules, and they differ between its versions."""
    if annotation in (None, type(None)):
        return "None"
    if isinstance(annotation, str):
        return annotation
    if annotation is Ellipsis:
        return "..."
    if isinstance(annotation, list):
        return f"[{', '.join(map(_words, annotation))}]"
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(map(_words, inner))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, inner))}]"
    if origin is not None and inner:
        return f"{_words(origin)}[{', '.join(map(_words, inner))}]"
    return getattr(annotation, "__name__", None) or getattr(annotation, "_name", None) or str(annotation)


def _value(value: Any) -> str:
    if inspect.isclass(value) or inspect.isroutine(value):
        return value.__name__
    if isinstance(value, Path):
        return f"Path({value.as_posix()!r})"
    plain = isinstance(value, str | int | float | tuple | list | dict | bytes) or value is None
    return repr(value) if plain else f"<{type(value).__name__}>"


# ---------------------------------------------------------------------------------------------------- settings


def settings() -> list[str]:
    """Every setting of every settings class, wherever that class lives: its type, default and limits."""
    from fastsd_helpers.options import options_of

    lines = set()
    for found in pkgutil.walk_packages(fastsd_helpers.__path__, "fastsd_helpers."):
        if found.name.endswith("__main__") or ".guards." in found.name:  # run in a web UI's process
            continue
        for thing in vars(importlib.import_module(found.name)).values():
            if not (inspect.isclass(thing) and dataclasses.is_dataclass(thing)):
                continue
            if not any("help" in field.metadata for field in dataclasses.fields(thing)):
                continue
            hints = typing.get_type_hints(thing)
            for item in options_of(thing):
                default = "" if item.default is dataclasses.MISSING else f" = {item.default!r}"
                limits = f"; from {item.low} to {item.high}" if (item.low, item.high) != (None, None) else ""
                more = "".join(f"; {word}" for word in ("secret", "advanced") if getattr(item, word))
                lines.add(f"{thing.__name__}.{item.name}: {_words(hints[item.name])}{default}{limits}{more}")
    return sorted(lines)


# ------------------------------------------------------------------------------------------------ command line


def commands(parser: argparse.ArgumentParser | None = None) -> Iterator[argparse.ArgumentParser]:
    """Every command and group of commands, each after the group it is in."""
    if parser is None:
        from fastsd_helpers.cli.parser import build_parser

        parser = build_parser()
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from commands(inner)


def help_texts() -> list[str]:
    """What every `--help` says, from the parser itself: argparse lays the same words out differently by version."""
    lines = []
    for parser in sorted(commands(), key=lambda each: each.prog):
        lines.append(f"{parser.prog}: {parser.description}")
        one_of = [[id(each) for each in group._group_actions] for group in parser._mutually_exclusive_groups]
        for group in parser._action_groups:
            words = []
            for action in group._group_actions:
                if isinstance(action, argparse._SubParsersAction):
                    listed = {each.dest: each.help for each in action._choices_actions}
                    words += [f"  {parser.prog} {name}: {help}" for name, help in listed.items()]
                elif not isinstance(action, argparse._HelpAction):
                    number = next((place for place, ids in enumerate(one_of, 1) if id(action) in ids), None)
                    words.append(f"  {parser.prog} {_flag(action)}{f' (one of group {number})' if number else ''}")
            lines += sorted(words)
    return lines


def _flag(action: argparse.Action) -> str:
    shown = ", ".join(action.option_strings) or action.metavar or action.dest
    if action.option_strings and action.nargs != 0:
        shown += f" {action.metavar or action.dest.upper()}"
    facts = [f"times {action.nargs}"] if action.nargs not in (None, 0) else []
    facts += [f"choose {', '.join(map(str, action.choices))}"] if action.choices else []
    facts += ["needed"] if action.option_strings and action.required else []
    if action.default not in (None, False, argparse.SUPPRESS) and action.default not in ([], ""):
        facts.append(f"default {action.default}")
    hidden = action.help in (None, argparse.SUPPRESS)
    more = f" ({'; '.join(facts)})" if facts else ""
    return f"{shown}{more}: {'(not shown)' if hidden else action.help}"


# ---------------------------------------------------------------------------------------------- names in tables


def kept_names() -> list[str]:
    """Keys of models, readers, ControlNets and web UIs, lock sets, extras, exit codes, and the environment's names."""
    from fastsd_helpers import controlnet, errors, registry, webui, wheels

    lines = [f"model key {spec.kind}: {spec.key}" for spec in registry.models(None)]
    lines += [f"lock set: {item.name} (Python {item.python})" for item in wheels.read_lock().sets]
    lines += [f"web UI: {ui.key}" for ui in webui.uis()]
    lines += [f"controlnet: {row.key}" for row in controlnet.controlnets()]
    classes = [getattr(errors, name) for name in errors.__all__]
    lines += [f"exit code {each.exit_code}: {each.__name__}" for each in classes if hasattr(each, "exit_code")]
    project = tomllib.loads((_PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines += [f"extra of the package: {name}" for name in project["optional-dependencies"]]
    lines += [f"program: {name}" for name in project["scripts"]]
    lines += [f"environment: {name}" for name in environment_variables()]
    return sorted(set(lines))


def environment_variables() -> list[str]:
    """The variables that the code asks the environment for."""
    found = set()
    for path in _PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _OURS.fullmatch(node.value):
                found.add(node.value)
            for asked in _asked_of_the_environment(node):
                name = asked.value if isinstance(asked, ast.Constant) else constants.get(getattr(asked, "id", ""))
                found |= {name} if isinstance(name, str) else set()
    return sorted(found)


def _asked_of_the_environment(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Subscript) and _is_environ(node.value):
        return [node.slice]
    if isinstance(node, ast.Compare) and _is_environ(node.comparators[0]):
        return [node.left]
    if isinstance(node, ast.Call) and node.args:
        function = node.func
        if isinstance(function, ast.Attribute) and (_is_environ(function.value) or function.attr == "getenv"):
            return node.args[:1]
    return []


def _is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


# ------------------------------------------------------------------------------------------------------ errors


def error_sentences() -> list[str]:
    """Every problem and hint that the code writes into an error of ours, by module; {} is a value put in."""
    from fastsd_helpers import errors

    lines = set()
    for path in _PACKAGE.rglob("*.py"):
        module = path.relative_to(_PACKAGE).with_suffix("").as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors.__all__:
                for part in (*node.args, *(word.value for word in node.keywords)):
                    lines |= {f"{module}: {node.func.id}: {text}" for text in _sentences(part)}
    return sorted(lines)


def _sentences(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        yield json.dumps("".join(map(str, parts)), ensure_ascii=False)[1:-1]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield json.dumps(node.value, ensure_ascii=False)[1:-1]
    elif isinstance(node, ast.IfExp | ast.BinOp):
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.expr):
                yield from _sentences(inner)
