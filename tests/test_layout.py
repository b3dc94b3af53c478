"""The package's shape: imports only go up the list, edges of the world are known to few, files stay small."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fastsd_helpers"

# From the base to the surface: a file imports only from names above its own. A new file needs its place here.
ORDER = (
    "wording",
    "errors",
    "options",
    "device",
    "runtime",
    "processes",
    "files",
    "drive",
    "names",
    "inert",
    "images",
    "downloads",
    "registry",
    "uploads",
    "controlnet",
    "model_lookup",
    "background",
    "launching",
    "wheels",
    "doctor",
    "captions",
    "checkpoints",
    "sessions",
    "demo",
    "tunnels",
    "dreambooth",
    "webui",
    "trocr",
    "playground",
    "story",
    "bench",
    "forms",
    "cli",
    "__main__",
)
WORKFLOWS = {"dreambooth", "webui", "trocr"}
KNOW_COLAB = {"runtime", "drive"}
# They run in a web UI's own process, where this package is not installed, and know each other by their bare names.
GUARDS = {path.stem for path in (PACKAGE / "webui" / "guards").glob("*.py")}
# Engines: they import the packages they compute with at their top. Whatever else is imported needs the standard library
# alone, so nothing but another engine imports one at its own top; whoever needs one does so inside a function.
ENGINES = {
    "fastsd_helpers.checkpoints.lora.changes": {"numpy"},
    "fastsd_helpers.checkpoints.lora.fusing": {"numpy"},
    "fastsd_helpers.checkpoints.lora.layers": {"numpy"},
    "fastsd_helpers.checkpoints.lora.lycoris": {"numpy"},
    "fastsd_helpers.checkpoints.lora.second_reader": {"numpy"},
    "fastsd_helpers.checkpoints.lora_converter": {"numpy"},
    "fastsd_helpers.checkpoints.models.merge": set(),
    "fastsd_helpers.checkpoints.models.merge_places": set(),
    "fastsd_helpers.checkpoints.models.merged_source": {"numpy"},
    "fastsd_helpers.images.faces": {"numpy"},
}


class Import(NamedTuple):
    """One imported module; `level` is module (runs at import), function, or typing (never runs)."""

    name: str
    level: str


def imports_of(source: str, module: str) -> list[Import]:
    """Every import of a source text, relative ones resolved against `module` (dotted, a package ends in .__init__)."""
    found: list[Import] = []

    def visit(node: ast.AST, level: str) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.rsplit(".", node.level)[0] if node.level else ""
            name = ".".join(part for part in (base, node.module or "") if part)
            # `from package import submodule` names the submodule; `from module import thing` the module itself.
            found.extend(Import(f"{name}.{alias.name}", level) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                visit(child, "typing")
            for child in node.orelse:
                visit(child, level)
        else:
            inner = "function" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) else level
            for child in ast.iter_child_nodes(node):
                visit(child, inner if level == "module" else level)

    visit(ast.parse(source), "module")
    return found


def unit_of(name: str) -> str | None:
    """The name in ORDER that a dotted name of ours belongs to; None for the bare package and for other packages."""
    parts = name.split(".")
    if parts[0] != "fastsd_helpers" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in ORDER or (PACKAGE / parts[1]).exists() else None


def layout_problems(unit: str, module: str, source: str) -> Iterator[str]:
    """Everything in one file that breaks the rules of the layout."""
    for name, level in imports_of(source, module):
        top, other = name.split(".")[0], unit_of(name)
        if other is not None and other != unit:
            if ORDER.index(other) > ORDER.index(unit):
                yield f"{module} reaches up to {other}"
            if {unit, other} <= WORKFLOWS:
                yield f"{module} is a workflow that imports another one, {other}"
        if top == "ipywidgets" and unit != "forms":
            yield f"{module} imports ipywidgets; only forms does"
        beside = GUARDS if module.startswith("fastsd_helpers.webui.guards.") else set()
        own = ENGINES.get(module, set())
        if level == "module" and top not in {*sys.stdlib_module_names, "fastsd_helpers", *beside, *own}:
            yield f"{module} imports {top} at module level; do it inside the function that needs it"
        if level == "module" and module not in ENGINES and ENGINES.keys() & {name, name.rpartition(".")[0]}:
            yield f"{module} imports the engine {name} at module level; do it inside the function that needs it"
    if "google.colab" in source and unit not in KNOW_COLAB:
        yield f"{module} mentions google.colab; only {' and '.join(sorted(KNOW_COLAB))} do"


def our_files() -> list[tuple[str, str, Path]]:
    """(unit, dotted module, file) of every source file; the package's own __init__ is not among them."""
    files = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            files.append((parts[0], ".".join(("fastsd_helpers", *parts)), path))
    return files


def test_every_file_has_its_place_in_the_list() -> None:
    units = {unit for unit, _module, _path in our_files()}
    assert units <= set(ORDER), f"not in the list: {sorted(units - set(ORDER))}"
    assert {"errors", "options", "runtime", "forms", "cli"} <= units


def test_the_page_for_contributors_has_the_same_list() -> None:
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("| floor |")[2].partition("\n\n")[0].splitlines()[2:]
    named = [name.strip() for row in table for name in row.replace("\\", "").split("|")[2].split(",")]
    assert tuple(named) == ORDER


@pytest.mark.parametrize(("unit", "module", "path"), our_files(), ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_a_file_keeps_to_the_layout(unit: str, module: str, path: Path) -> None:
    assert list(layout_problems(unit, module, path.read_text(encoding="utf-8"))) == []


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which of our modules each imports, at any level: dotted module (a package ends in .__init__) -> modules."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for module, source in sources.items():
        for name, _level in imports_of(source, module):
            # `package.thing`: the submodule of that name where there is one, else what the package itself defines.
            parent = name.rpartition(".")[0]
            candidates = [name, f"{name}.__init__", parent, f"{parent}.__init__"]
            target = next((candidate for candidate in candidates if candidate in sources), None)
            if target not in (None, module):
                graph[module].add(target)
    return graph


def test_modules_import_each_other_in_no_circle() -> None:
    # Those that never run, for types, and those inside functions count: a reader follows them all the same.
    sources = {module: path.read_text(encoding="utf-8") for _unit, module, path in our_files()}
    sources["fastsd_helpers.__init__"] = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    try:
        TopologicalSorter(import_graph(sources)).prepare()
    except CycleError as err:
        pytest.fail(f"these modules import each other in a circle: {' -> '.join(err.args[1])}")


@pytest.mark.parametrize(
    "back",
    [
        "from pkg.a import thing",
        "def f():\n    from pkg import a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.a import Thing",
        "import pkg",
    ],
)
def test_a_circle_is_noticed_at_every_level(back: str) -> None:
    graph = import_graph({"pkg.__init__": "from pkg.a import thing", "pkg.a": "from pkg import b", "pkg.b": back})
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


# A folder of more files than this is parted into wings by phase.
_WIDEST = 16


def test_no_folder_is_wider_than_a_reader_can_see() -> None:
    folders = {path.parent for _unit, _module, path in our_files()}
    wide = {str(folder.relative_to(PACKAGE)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in wide.items() if count > _WIDEST} == {}


def wing_graph(room: str, graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Which wings and files of a folder import which others of it; `room` and the modules of `graph` are dotted."""
    wings: dict[str, set[str]] = {}
    for module, imported in graph.items():
        if module.startswith(f"{room}."):
            wing = module.removeprefix(f"{room}.").partition(".")[0]
            others = {
                name.removeprefix(f"{room}.").partition(".")[0] for name in imported if name.startswith(f"{room}.")
            }
            wings.setdefault(wing, set()).update(others - {wing})
    return wings


def test_the_wings_of_a_folder_import_one_way_only() -> None:
    graph = import_graph({module: path.read_text(encoding="utf-8") for _unit, module, path in our_files()})
    rooms = {module.rpartition(".")[0].rpartition(".")[0] for module in graph} | {"fastsd_helpers"}
    assert {"fastsd_helpers.dreambooth", "fastsd_helpers.forms"} <= rooms
    for room in sorted(rooms - {""}):
        try:
            TopologicalSorter(wing_graph(room, graph)).prepare()
        except CycleError as err:
            pytest.fail(f"parts of {room} import each other in a circle: {' -> '.join(err.args[1])}")


def test_wings_that_import_each_other_are_noticed_though_no_module_does() -> None:
    sources = {"p.a.one": "from p.b.one import x", "p.b.one": "", "p.b.two": "from p.a import two", "p.a.two": ""}
    with pytest.raises(CycleError):
        TopologicalSorter(wing_graph("p", import_graph(sources))).prepare()
    TopologicalSorter(import_graph(sources)).prepare()


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    long = {path.name: count for _u, _m, path in our_files() if (count := len(path.read_text().splitlines())) > 500}
    assert not long, "split these by meaning into a package of the same name"


def test_the_type_checker_looks_at_every_module() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    spared = [name for row in settings["overrides"] for name in row["module"] if name.startswith(PACKAGE.name)]
    assert (settings["files"], spared) == ([PACKAGE.name], [])
    assert not {"exclude", "ignore_errors"} & settings.keys()
    silenced = [module for _unit, module, path in our_files() if "# mypy:" in path.read_text(encoding="utf-8")]
    assert not silenced, "a whole file is taken out of the check"


def _names_in(path: Path) -> set[str]:
    """The names at the top of a file, also under a condition."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_what_the_scripts_import_from_here_is_there() -> None:
    """Some run for minutes and none in the tests: a name that has moved would be noticed by who runs it next."""
    root = PACKAGE.parent
    missing = []
    for script in sorted((root / "scripts").glob("*.py")):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            places = [
                place / f"{node.module.replace('.', '/')}.py" for place in (root, root / "tests", root / "scripts")
            ]
            for path in filter(Path.is_file, places):
                gone = {alias.name for alias in node.names} - _names_in(path)
                missing += [f"{script.name}: {name} of {node.module}" for name in sorted(gone)]
    assert missing == []


def test_the_list_of_engines_holds_no_module_that_is_none() -> None:
    # One without a package of its own is on it because it imports another engine.
    needs = {}
    for _unit, module, path in our_files():
        at_import = {name for name, level in imports_of(path.read_text(encoding="utf-8"), module) if level == "module"}
        packages = {name.split(".")[0] for name in at_import} - {*sys.stdlib_module_names, "fastsd_helpers"}
        others = {other for name in at_import for other in (name, name.rpartition(".")[0]) if other in ENGINES}
        if module in ENGINES and (packages or others):
            needs[module] = packages
    assert needs == ENGINES


def test_the_package_itself_imports_nothing_at_import() -> None:
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    at_import = {name for name, level in imports_of(source, "fastsd_helpers.__init__") if level == "module"}
    assert {name.split(".")[0] for name in at_import} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("unit", "source", "expected"),
    [
        ("errors", "from fastsd_helpers.cli import main", "reaches up to cli"),
        ("errors", "from fastsd_helpers import cli", "reaches up to cli"),
        ("drive", "def f():\n    from .sessions import Session", "reaches up to sessions"),
        ("webui", "from fastsd_helpers.dreambooth import train", "is a workflow"),
        ("sessions", "def f():\n    import ipywidgets", "only forms"),
        ("sessions", "import torch", "at module level"),
        ("sessions", "class A:\n    import numpy", "at module level"),
        ("dreambooth", "from fastsd_helpers.checkpoints.lora import layers", "imports the engine"),
        ("dreambooth", "from fastsd_helpers.checkpoints.lora_converter import write_kohya", "imports the engine"),
        ("sessions", "try:\n    from PIL import Image\nexcept ImportError: pass", "at module level"),
        ("sessions", "def f():\n    from google.colab import drive", "mentions google.colab"),
    ],
)
def test_the_rules_notice_a_file_that_breaks_them(unit: str, source: str, expected: str) -> None:
    assert expected in "; ".join(layout_problems(unit, f"fastsd_helpers.{unit}", source))


@pytest.mark.parametrize(
    "source",
    [
        "from fastsd_helpers.errors import FastSDError",
        "def f():\n    import torch",
        "def f():\n    from fastsd_helpers.images import faces",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        "from fastsd_helpers import __version__",
    ],
)
def test_the_rules_let_a_good_file_pass(source: str) -> None:
    assert list(layout_problems("sessions", "fastsd_helpers.sessions", source)) == []
