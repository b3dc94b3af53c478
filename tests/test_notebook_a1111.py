"""The web UI notebook runs from start to end: with a small real web UI, and where none can run."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from notebook_webui import LINK, prepare_kernel
from test_notebooks import ROOT, code_cells, output_of, run_notebook, widgets7
from tunnel_doubles import free_port

from fastsd_helpers.webui import background_link, status, stop

NOTEBOOK = ROOT / "notebooks" / "a1111.ipynb"

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(1800)]


def shown_by_widgets(notebook: Any) -> str:
    """Every text that a widget shows, as the browser gets it."""
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    return "\n".join(str(state["state"].get("value", "")) for state in states)


def settings_for(folder: Path) -> dict[str, dict[str, Any]]:
    """What a test enters in the forms."""
    return {
        "StoreConfig": {"without_gpu": True},
        "InstallConfig": {"folder": str(folder / "programs"), "controlnet": False},
        "ModelsConfig": {"model": "demo"},
        "LaunchConfig": {"port": free_port(), "wait_s": 300},
        "TunnelConfig": LINK,
    }


def test_it_installs_starts_and_shares_and_run_again_in_a_new_kernel_too_all_of_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nbclient")
    prepare_kernel(tmp_path / "edges", monkeypatch)
    work, changes = tmp_path / "work", settings_for(tmp_path)
    work.mkdir()
    where = {"folder": str(tmp_path / "programs"), "store": str(work / "sd" / "stable-diffusion-webui")}
    try:
        notebook = run_notebook(NOTEBOOK, work, changes=changes, widgets=widgets7(), times=2)
        first, link = status("a1111", **where), background_link("a1111", **where)
        # Nothing is entered this time: a new kernel, with ipywidgets 8, has nothing but what lies on disk.
        again = run_notebook(NOTEBOOK, work, changes={})
        assert status("a1111", **where) == first
        assert background_link("a1111", **where).pid == link.pid
    finally:
        stop("a1111", **where)
    said, seen = output_of(notebook), shown_by_widgets(notebook)
    assert "AUTOMATIC1111 v1.10.1 is installed in" in said
    assert "code of a1111: was there already" in said, "the second time nothing is fetched"
    assert "demo.safetensors (checkpoint): converted" in said
    assert "The playground can use it" in said, "the demo's shape is not for web UIs"
    assert "for sd15 there is canny" in said
    assert seen.count("AUTOMATIC1111 v1.10.1 answers after") == 1
    assert "its model is loaded" in seen
    assert "AUTOMATIC1111 v1.10.1 is already running with these settings" in said
    assert "The link opened before is still open." in said
    passwords = set(re.findall(r"Password:  (\S+)", seen))
    assert len(passwords) == 1
    assert f"its link is {link.url}" in seen
    assert "demo.safetensors" in str(notebook.metadata.widgets)
    later, shown = output_of(again), shown_by_widgets(again)
    assert "AUTOMATIC1111 v1.10.1 is already running, on port" in later
    assert "AUTOMATIC1111 v1.10.1 is already running with these settings" in later
    assert f"its link is open: {link.url}" in later
    assert set(re.findall(r"Password:  (\S+)", shown)) == passwords, "the login is shown again"
    for text in (said, later):
        assert not any(password in text for password in passwords), "the password is in no output that is kept"
        for raw in ("PosixPath(", "PlacedModel(", "InstallResult(", "Traceback", '"text/plain": ["[]"'):
            assert raw not in text, raw


def test_cells_out_of_order_say_which_one_to_run_and_follow_what_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nbclient")
    prepare_kernel(tmp_path / "edges", monkeypatch)
    cells = {title.split(" ")[2]: title for title in code_cells(NOTEBOOK)}
    changes = settings_for(tmp_path)
    other = str(tmp_path / "other store")
    start = f"start_form.update(**{changes['LaunchConfig']!r})"
    order = [
        cells["3b"],  # a notebook that was opened and run in the middle
        cells["1"],
        cells["3a"],
        cells["6b"],
        cells["2a"],
        "store_form.update(without_gpu=True)",
        cells["2b"],
        cells["6a"],
        start,
        cells["7b"],
        cells["3a"],
        f"ui_form.update(**{changes['InstallConfig']!r})",
        cells["6b"],
        cells["3b"],
        cells["6b"],
        f"store_form.update(store={other!r})",  # 2a is edited where it stands, and only 2b is run again
        cells["2b"],
        cells["6b"],
        cells["8"],
    ]
    work = tmp_path / "work"
    work.mkdir()
    try:
        outputs = run_cells(order, work)
        state, runs = status("a1111", folder=str(tmp_path / "programs"))
    finally:
        stop("a1111", folder=str(tmp_path / "programs"))
    said = dict(enumerate(outputs))
    assert said[0] == "✗ Run cells 2a, 2b and 3a first: they make `store_form`, `webui` and `ui_form`."
    assert said[2] == "✗ Run cells 2a and 2b first: they make `store_form` and `webui`."
    assert said[3] == "✗ Run cells 2a, 2b and 6a first: they make `store_form`, `webui` and `start_form`."
    assert "Run cell 7a first: it makes `link_form`" in said[9]
    assert "is not installed in" in said[12]
    assert "Run cell 3b" in said[12]
    assert "is installed in" in said[13]
    assert "answers on port" in said[14]
    assert "until cell 6b restarts it" in said[16]
    assert "which is running with other settings, is stopped first" in said[17]
    assert runs
    assert state.port == changes["LaunchConfig"]["port"], "what was typed before is used"
    assert (Path(other) / "models").is_dir()
    assert not any("Traceback" in text for text in outputs)


def run_cells(sources: list[str], work: Path) -> list[str]:
    """What each cell shows, run one after the other in one kernel, those that fail too."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    resources = {"metadata": {"path": str(work)}}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    NotebookClient(notebook, timeout=300, allow_errors=True, resources=resources).execute(env=environment)
    return [
        "".join(item.get("text", "") + "\n".join(item.get("traceback", [])) for item in cell.outputs)
        for cell in notebook.cells
    ]


def test_without_a_network_the_playground_is_offered_and_the_reason_said(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    changes = {
        "StoreConfig": {"without_gpu": True},
        # A place that has nothing: what git says of GitHub without a network, on every machine.
        "InstallConfig": {"folder": str(tmp_path / "programs"), "mirrors": f"a1111={tmp_path}/nowhere.git"},
    }
    notebook = run_notebook(NOTEBOOK, tmp_path, changes=changes)
    said = output_of(notebook)
    assert "The code of a1111 could not be downloaded" in said or "GB left" in said
    assert "The cells below offer the playground instead" in said
    assert "No web UI is started. The code of a1111 could not be downloaded" in said or "GB left" in said
    assert said.count("Nothing is done here: ") == 3, "models, ControlNets, link"
    buttons = [state["state"].get("description") for state in _states(notebook)]
    assert "Open the playground" in buttons


def test_without_a_gpu_nothing_is_installed_unless_it_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    if os.path.exists("/proc/driver/nvidia/version"):
        pytest.skip("there is a GPU here")
    notebook = run_notebook(NOTEBOOK, tmp_path, changes={"InstallConfig": {"folder": str(tmp_path / "programs")}})
    said = output_of(notebook)
    assert "There is no GPU here: AUTOMATIC1111 v1.10.1 takes minutes" in said
    assert "tick 'without gpu' in cell 2a" in said
    assert not (tmp_path / "programs").exists()


def _states(notebook: Any) -> list[dict[str, Any]]:
    return list(notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values())
