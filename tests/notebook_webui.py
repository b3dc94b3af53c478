"""For tests of the web UI notebook: the edges of its kernel, put in place by a file that IPython runs first.

The web UI is a real Gradio server with AUTOMATIC1111's flags and log lines; its code comes from a local repository
through the real installation; the packages are those of this very Python. The link is localtunnel's, whose program
leads to the gate's own port: what the services do is tested in test_tunnels.py.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bare_guard import use_bare_guard
from tunnel_doubles import FORWARD, make_program

__all__ = ["GRADIO_APP", "LINK", "fake_edges", "prepare_kernel"]

# The settings of a link that the program of `prepare_kernel` makes, from the process that holds it too.
LINK = {"kind": "localtunnel", "localtunnel_server": "http://127.0.0.1:9"}

GRADIO_APP = """
import sys
words = sys.argv[1:]
port = int(words[words.index("--port") + 1])
user, password = open(words[words.index("--gradio-auth-path") + 1]).read().split(":")
import gradio
with gradio.Blocks(analytics_enabled=False, title="Stable Diffusion") as blocks:
    box = gradio.Textbox(label="Prompt")
    box.submit(lambda text: text[::-1], box, box, api_name="turn")
blocks.launch(server_port=port, auth=(user, password), prevent_thread_lock=True, quiet=True)
print("Startup time: 1s", flush=True)
print("Model loaded in 1s", flush=True)
blocks.block_thread()
"""


def prepare_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a repository with the small web UI, and have every kernel that is started from now on use it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed (apt install git)")
    for package in ("gradio", "aiohttp"):
        pytest.importorskip(package)
    upstream = folder / "upstream"
    upstream.mkdir(parents=True)
    (upstream / "launch.py").write_text(GRADIO_APP, encoding="utf-8")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *words], cwd=upstream, check=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], cwd=upstream, check=True, capture_output=True, text=True
    ).stdout.strip()
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    tests = str(Path(__file__).resolve().parent)
    guard = use_bare_guard(folder, monkeypatch)
    (startup / "10-edges.py").write_text(
        f"import sys\nsys.path.insert(0, {tests!r})\n"
        f"import notebook_webui\nnotebook_webui.fake_edges({str(upstream)!r}, {commit!r}, {str(guard)!r})\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    target = "target = int(sys.argv[sys.argv.index('--port') + 1])\n"
    said = "say(f'your url is: http://127.0.0.1:{forward(target)}'); stay()"
    make_program(folder / "programs", "lt", FORWARD + target + said)
    monkeypatch.setenv("PATH", f"{folder / 'programs'}{os.pathsep}{os.environ['PATH']}")


def fake_edges(upstream: str, commit: str, guard: str) -> None:
    """In the kernel: the one repository, and an environment that is this Python.

    The guard in place of the real one asks for nothing of AUTOMATIC1111's, which is not there.
    """
    from fastsd_helpers.webui import catalog

    real = catalog.find_ui("a1111")
    repositories = (dataclasses.replace(real.repositories[0], urls=(upstream,), revision=commit),)
    small = dataclasses.replace(real, repositories=repositories, alive_path="/", guard=guard)

    def make_environment(folder: Path, *, python: str) -> Path:
        interpreter = folder / "bin" / "python"
        interpreter.parent.mkdir(parents=True, exist_ok=True)
        interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        interpreter.chmod(0o755)
        return interpreter

    def find_ui(key: str) -> Any:
        return small if key == "a1111" else catalog.find_ui(key)

    for module in ("webui.extensions.installation", "webui.running.launching", "forms.webui.cells"):
        __import__(f"fastsd_helpers.{module}")
        sys.modules[f"fastsd_helpers.{module}"].find_ui = find_ui
    installing = sys.modules["fastsd_helpers.webui.extensions.installation"]
    installing.make_environment = make_environment
    installing.install = lambda name, **more: type("Report", (), {"changes": ()})
    installing.check_room = lambda *_args, **_more: None
