"""Every module imports with the standard library alone, says nothing, writes nothing and calls nobody."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_layout import ENGINES

ROOT = Path(__file__).resolve().parents[1]
# Asked for here, because tests run with a home folder of their own.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
VERSIONS = ("3.11", "3.12", "3.13")

# Runs in a Python without site-packages: whatever is imported and is neither ours nor the standard library fails.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
acts = []
def watch(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        acts.append(f"opens {args[0]} for writing")
    elif event in ("os.mkdir", "os.remove", "os.rename", "subprocess.Popen", "socket.connect", "socket.getaddrinfo"):
        acts.append(f"{event} {args[:1]}")
sys.path.insert(0, sys.argv[1])
import fastsd_helpers
sys.addaudithook(watch)
names = [m.name for m in pkgutil.walk_packages(fastsd_helpers.__path__, "fastsd_helpers.") if "__main__" not in m.name]
names = [name for name in names if ".guards." not in name]  # run in a web UI's process, where there is no package
names = [name for name in names if name not in sys.argv[2:]]
for name in names:
    importlib.import_module(name)
foreign = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - {"fastsd_helpers", "__main__"}
print(json.dumps({"names": names, "acts": acts, "foreign": sorted(foreign)}))
"""


def find_python(version: str) -> str | None:
    """A Python of that version: this one, one on the path, or one of pyenv's."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    candidates = [shutil.which(f"python{version}"), *sorted(map(str, PYENV.glob(f"versions/{version}.*/bin/python")))]
    for candidate in filter(None, candidates):
        # A pyenv shim can be on the path and still refuse to run.
        asked = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == version:
            return candidate
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_every_module_imports_with_the_standard_library_alone(version: str, tmp_path: Path) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"Python {version} is not installed (uv python install {version})")
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [python, "-I", "-S", "-B", "-W", "error", "-c", IMPORT_ALL, str(ROOT), *ENGINES],
        capture_output=True,
        text=True,
        cwd=empty,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said, _, last = done.stdout.rstrip("\n").rpartition("\n")
    assert said == "", "something prints while it is imported"
    result = json.loads(last)
    assert result["foreign"] == []
    assert result["acts"] == []
    assert {"fastsd_helpers.errors", "fastsd_helpers.cli", "fastsd_helpers.forms.widgets.form"} <= set(result["names"])
    assert list(empty.iterdir()) == []


def test_a_module_that_needs_more_would_be_noticed(tmp_path: Path) -> None:
    package = tmp_path / "fastsd_helpers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "greedy.py").write_text("import numpy\n")
    command = [sys.executable, "-I", "-S", "-B", "-c", IMPORT_ALL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "No module named 'numpy'" in done.stderr


def test_a_module_that_writes_at_import_would_be_noticed(tmp_path: Path) -> None:
    package = tmp_path / "fastsd_helpers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "busy.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').close()\n")
    command = [sys.executable, "-I", "-S", "-B", "-c", IMPORT_ALL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "for writing" in json.loads(done.stdout.splitlines()[-1])["acts"][0]
