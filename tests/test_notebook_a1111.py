"""The web UI notebook runs from start to end: with a small real web UI, and where none can run."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from notebook_webui import prepare_kernel
from test_notebooks import ROOT, output_of, run_notebook
from tunnel_doubles import free_port

from fastsd_helpers.webui import stop

NOTEBOOK = ROOT / "notebooks" / "a1111.ipynb"

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(1800)]


def widgets_overlay(version: str) -> Path | None:
    """The folder with ipywidgets 7.7.1, or None for the 8 that is installed."""
    pytest.importorskip("nbclient")
    overlay = ROOT / ".venv-ipywidgets7" if version == "7.7.1" else None
    if overlay is not None and not overlay.is_dir():
        pytest.skip(f"{overlay.name} is not there; `make setup` makes it")
    return overlay


def shown_by_widgets(notebook: Any) -> str:
    """Every text that a widget shows, as the browser gets it."""
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    return "\n".join(str(state["state"].get("value", "")) for state in states)


@pytest.mark.parametrize("widgets", ["8", "7.7.1"])
def test_it_installs_starts_and_shares_twice(tmp_path: Path, widgets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = widgets_overlay(widgets)
    prepare_kernel(tmp_path / "edges", monkeypatch)
    folder = str(tmp_path / "programs")
    changes = {
        "StoreConfig": {"without_gpu": True},
        "InstallConfig": {"folder": folder, "controlnet": False},
        "ModelsConfig": {"model": "demo"},
        "LaunchConfig": {"port": free_port(), "wait_s": 300},
        "TunnelConfig": {"kind": "cloudflared"},
    }
    work = tmp_path / "work"
    work.mkdir()
    try:
        notebook = run_notebook(NOTEBOOK, work, changes=changes, widgets=overlay, times=2)
    finally:
        stop("a1111", folder=folder, store=str(work / "sd" / "stable-diffusion-webui"))
    said, seen = output_of(notebook), shown_by_widgets(notebook)
    assert "AUTOMATIC1111 v1.10.1 is installed in" in said
    assert "code of a1111: was there already" in said, "the second time nothing is fetched"
    assert "demo.safetensors (checkpoint): converted" in said
    assert "The playground draws with it" in said, "the demo's shape is not for web UIs"
    assert "for sd15 there is canny" in said
    assert seen.count("AUTOMATIC1111 v1.10.1 answers after") == 2
    assert "its model is loaded" in seen
    passwords = set(re.findall(r"Password:  (\S+)", seen))
    assert len(passwords) == 2, "one for each start"
    assert not any(password in said for password in passwords), "the password is in no output that is kept"
    assert "runs on port" in seen
    assert "demo.safetensors" in str(notebook.metadata.widgets)


def test_without_a_network_the_playground_is_offered_and_the_reason_said(tmp_path: Path) -> None:
    widgets_overlay("8")
    changes = {
        "StoreConfig": {"without_gpu": True},
        # A place that has nothing: what git says of GitHub without a network, on every machine.
        "InstallConfig": {"folder": str(tmp_path / "programs"), "mirrors": f"a1111={tmp_path}/nowhere.git"},
    }
    notebook = run_notebook(NOTEBOOK, tmp_path, changes=changes)
    said = output_of(notebook)
    assert "The code of a1111 could not be had" in said or "GB left" in said
    assert "The cells below offer the playground instead" in said
    assert "No web UI is started. The code of a1111 could not be had" in said or "GB left" in said
    assert said.count("Nothing is done here: ") == 3, "models, ControlNets, link"
    buttons = [state["state"].get("description") for state in _states(notebook)]
    assert "Open the playground" in buttons


def test_without_a_gpu_nothing_is_installed_unless_it_was_asked_for(tmp_path: Path) -> None:
    widgets_overlay("8")
    if os.path.exists("/proc/driver/nvidia/version"):
        pytest.skip("there is a GPU here")
    notebook = run_notebook(NOTEBOOK, tmp_path, changes={"InstallConfig": {"folder": str(tmp_path / "programs")}})
    said = output_of(notebook)
    assert "There is no GPU here, on which AUTOMATIC1111 v1.10.1 needs seconds" in said
    assert "tick `without gpu` above" in said
    assert not (tmp_path / "programs").exists()


def _states(notebook: Any) -> list[dict[str, Any]]:
    return list(notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values())
