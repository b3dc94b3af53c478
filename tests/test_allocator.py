"""Google's allocator is loaded before AUTOMATIC1111 where it is installed, and nothing else is ever loaded."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.webui import LaunchConfig, plan
from fastsd_helpers.webui.running import command as module
from fastsd_helpers.webui.running.command import environment_of, find_allocator, preload

PYTHON = Path(sys.executable)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small library under the allocator's name, which says its version as the real one does."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed (apt install gcc)")
    folder = tmp_path_factory.mktemp("lib")
    source = folder / "small.c"
    source.write_text('const char *tc_version(int *a, int *b, const char **c) { return "small 1"; }\n')
    library = folder / "libtcmalloc_minimal.so.4"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return folder


def test_it_is_found_by_name_and_must_load(libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_TCMALLOC", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    library = libraries / "libtcmalloc_minimal.so.4"
    assert find_allocator(PYTHON, [str(tmp_path / "nowhere"), str(libraries)]) == library
    for name in ("libtcmalloc_minimal_debug.so.4", "libtcmalloc.so", "libtcmalloc_minimal.so.4.txt"):
        shutil.copy(library, tmp_path / name)
    assert find_allocator(PYTHON, [str(tmp_path)]) is None, "other names are other things"
    (tmp_path / "libtcmalloc.so.4").write_bytes(b"\x7fELF of another processor")
    assert find_allocator(PYTHON, [str(tmp_path)]) is None
    assert find_allocator(PYTHON, [str(tmp_path), str(libraries)]) == library
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/x86_64-linux-gnu/libtcmalloc.so.4")
    assert find_allocator(PYTHON, [str(libraries)]) is None, "it is loaded anyway"
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setenv("NO_TCMALLOC", "1")
    assert find_allocator(PYTHON, [str(libraries)]) is None


def test_a_start_loads_it_first_and_keeps_what_was_loaded(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = libraries / "libtcmalloc_minimal.so.4"
    monkeypatch.delenv("NO_TCMALLOC", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(module.find_allocator, "__defaults__", ([str(libraries)],))
    where: dict[str, Any] = {"folder": str(tmp_path / "programs"), "store": str(tmp_path / "store")}
    made = plan(LaunchConfig(**where))
    code = "import ctypes; ctypes.CDLL(None).tc_version; print('loaded')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment_of(made), capture_output=True, text=True, check=False
    )
    assert done.stdout == "loaded\n", done.stderr
    assert any("is loaded first" in reason for reason in made.reasons)
    monkeypatch.setenv("LD_PRELOAD", str(library.with_name("other.so")))
    assert preload(Path("/x/libtcmalloc.so.4")) == f"/x/libtcmalloc.so.4 {libraries}/other.so"
    assert "LD_PRELOAD" not in plan(LaunchConfig(ui="comfyui", **where)).environment
    from fastsd_helpers.webui.flags import GPUS

    assert "LD_PRELOAD" not in plan(LaunchConfig(**where), machine=GPUS["T4"]).environment, "not known of another one"
