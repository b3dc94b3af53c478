"""A submodule is used only where it is imported: what somebody else happened to import first is no ground to stand on.

Many packages give their submodules to whoever imports them by name and to nobody else, or only while another package
has imported them; then the same line works in one program and ends in an AttributeError in the next.
"""

import ast
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from tiny_readers import noise_pictures, write_reader

ROOT = Path(__file__).resolve().parents[1]
# Part of a package's documented namespace, loaded by `import package` itself in every version this library takes.
GIVEN = {"os.path", "numpy.random", "cv2.dnn"} | {
    f"torch.{name}" for name in ["amp", "autograd", "backends", "cuda", "nn", "optim", "utils", "version"]
}  # fmt: skip
GIVEN |= {"torch.nn.functional", "torch.nn.utils", "torch.backends.cpu", "torch.backends.mps"}


@functools.cache
def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def parts(name: str) -> set[str]:
    words = name.split(".")
    return {".".join(words[: place + 1]) for place in range(len(words))}


def borrowed(source: str) -> list[str]:
    """Submodules that a text uses as attributes of their package without importing them anywhere in it."""
    tree = ast.parse(source)
    called: dict[str, str] = {}
    loaded: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                called[alias.asname or top] = alias.name if alias.asname else top
                loaded |= parts(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            loaded |= parts(node.module)
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if is_module(whole):
                    called[alias.asname or alias.name] = whole
                    loaded.add(whole)
    found = set()
    for node in ast.walk(tree):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if not chain or not isinstance(node, ast.Name) or node.id not in called:
            continue
        # The outermost first: `a.b.c` is met as a whole, and as `a.b` again.
        whole = ".".join([called[node.id], *chain])
        if whole not in loaded | GIVEN and is_module(whole):
            found.add(whole)
    return sorted(found)


@pytest.mark.parametrize("path", sorted((ROOT / "fastsd_helpers").rglob("*.py")), ids=lambda path: path.name)
def test_a_submodule_is_used_only_where_it_is_imported(path: Path) -> None:
    assert borrowed(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import xml\nxml.dom.minidom.parse('x')", ["xml.dom", "xml.dom.minidom"]),
        ("import xml.dom\nxml.dom.minidom.parse('x')", ["xml.dom.minidom"]),
        ("import xml as x\nx.sax.parse('x')", ["xml.sax"]),
        ("from xml import dom\ndom.minidom.parse('x')", ["xml.dom.minidom"]),
        ("def f():\n    import importlib\n    importlib.metadata.version('x')", ["importlib.metadata"]),
        ("import xml.dom.minidom\nxml.dom.minidom.parse('x')", []),
        ("from xml.dom import minidom\nminidom.parse('x')", []),
        ("import json\njson.loads('1')\nself.xml.dom", []),
    ],
)
def test_a_borrowed_submodule_is_noticed(source: str, expected: list[str]) -> None:
    assert borrowed(source) == expected


READ = """
import sys
from fastsd_helpers import ReadingSessionConfig, open_reading, read_pictures
from fastsd_helpers.trocr.reading.session import ReadPicturesConfig
before = {name for name in sys.modules if name.startswith("huggingface_hub")}
assert not before, before
session = open_reading(ReadingSessionConfig("mine"))
read_pictures(ReadPicturesConfig(images=sys.argv[1], reader=sys.argv[2], pages="lines"), session)
print("read", len(session.lines()), session.record["reader"])
"""


@pytest.mark.parametrize("reader", ["auto", "someone/their-reader"])
def test_own_lines_are_read_by_a_reader_of_the_hub_in_a_python_that_has_imported_nothing(
    tmp_path: Path, reader: str
) -> None:
    for package in ("huggingface_hub", "transformers", "ipywidgets"):
        pytest.importorskip(package)
    write_reader(tmp_path / "reader", seed=1, end=4.0)
    lines = tmp_path / "lines"
    lines.mkdir()
    for place, picture in enumerate(noise_pictures(3)):
        picture.save(lines / f"{place}.png")
    repos = {"microsoft/trocr-base-handwritten": tmp_path / "reader", "someone/their-reader": tmp_path / "reader"}
    with HubServer(repos) as hub:
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", READ, str(lines), reader],
            env=os.environ | own,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("read 3 ")
    assert "model.safetensors" in hub.downloaded()
