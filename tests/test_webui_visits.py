"""The second visit of the web UI notebook: the web UI and link that an earlier kernel left are found and used again."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from bare_guard import use_bare_guard
from test_tunnels import LT
from tunnel_doubles import free_port, make_program

from fastsd_helpers import forms
from fastsd_helpers.errors import WebUIError
from fastsd_helpers.forms import NotebookUI, StoreConfig, desk
from fastsd_helpers.forms.webui import cells as cells
from fastsd_helpers.tunnels import TunnelConfig
from fastsd_helpers.webui import InstallConfig, LaunchConfig, find_places, find_running, find_ui, status, stop

pytest.importorskip("ipywidgets")
pytest.importorskip("aiohttp")

A1111 = find_ui("a1111")
LINK = TunnelConfig(kind="localtunnel", localtunnel_server="http://127.0.0.1:9", wait_s=30)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an installation whose program is a stub with a login, and a localtunnel that leads to the gate."""
    where = tmp_path / "ui"
    places = find_places(A1111, folder=where, store=tmp_path / "store")
    places.python.parent.mkdir(parents=True)
    places.python.symlink_to(sys.executable)
    places.code.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("stub_webui.py"), places.code / "launch.py")
    (places.code / "mood").write_text("good")
    use_bare_guard(tmp_path, monkeypatch)
    make_program(tmp_path / "programs", "lt", LT + "say(f'your url is: http://127.0.0.1:{forward(target)}'); stay()")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(cells, "_known", {})
    yield where
    stop("a1111", folder=str(where))


def visit(folder: Path, store: Path) -> NotebookUI:
    """Cells 1 to 3 of a new kernel, which knows nothing but what lies on disk."""
    desk.clear()
    cells._known.clear()
    webui = cells.open_store(StoreConfig(store=str(store), without_gpu=True))
    if not webui.program:
        forms.show_ui_form(InstallConfig, webui).update(folder=str(folder))
        webui.program = str(folder)
    return webui


def answers(url: str, webui: NotebookUI) -> int:
    login = webui.running.login
    return requests.get(f"{url}/sdapi/v1/options", auth=(login.user, login.password), timeout=30).status_code


def pid(folder: Path) -> int:
    state, runs = status("a1111", folder=str(folder))
    return state.pid if runs else 0


def test_after_a_restart_of_the_kernel_the_web_ui_and_its_link_go_on(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    store, config = tmp_path / "store", LaunchConfig(port=free_port(), wait_s=60)
    webui = visit(folder, store)
    assert cells.start_ui(config, webui) is None
    view = cells.share_ui(LINK, webui)
    first, link, password = pid(folder), webui.link, webui.running.login.password
    assert answers(link.url, webui) == 200
    assert password in view._message.value
    assert "localtunnel" in caplog.text or link.kind == "localtunnel"
    caplog.clear()

    webui = visit(folder, store)
    assert f"AUTOMATIC1111 v1.10.1 is already running, on port {config.port} of this machine." in caplog.text
    cells.start_ui(config, webui)
    assert "is already running with these settings" in caplog.text
    assert f"its link is open: {link.url}" in caplog.text
    view = cells.share_ui(LINK, webui)
    assert "The link opened before is still open." in caplog.text
    assert (pid(folder), webui.link.pid) == (first, link.pid), "the very same processes"
    assert password in view._message.value, "the login is told again, by the file that is this user's alone"
    assert password not in caplog.text
    assert answers(webui.link.url, webui) == 200
    stopping = forms.show_stop(webui)
    assert f"its link is {link.url}" in stopping._message.value
    stopping._stop.click()
    assert "Stopped." in stopping._message.value
    assert pid(folder) == 0
    wait_until(lambda: link.closed)
    stopping._stop.click()
    assert "nothing was stopped" in stopping._message.value


def wait_until(true: Any) -> None:
    while not true():
        time.sleep(0.05)


def test_other_settings_another_folder_or_another_password_start_it_anew(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    config = LaunchConfig(port=free_port(), wait_s=60)
    cells.start_ui(config, visit(folder, tmp_path / "store"))
    seen = [pid(folder)]

    def start_again(store: str, **changes: Any) -> None:
        webui = visit(folder, tmp_path / store)
        cells.start_ui(LaunchConfig(port=config.port, wait_s=60, **changes), webui)
        seen.append(pid(folder))
        assert seen[-1] not in [*seen[:-1], 0]
        assert webui.running.alive()

    start_again("store", vram="low")
    start_again("other", vram="low")
    start_again("other", vram="low", password="a-password-of-mine-77")
    caplog.clear()
    webui = visit(folder, tmp_path / "other")
    cells.start_ui(LaunchConfig(port=config.port, vram="low", password="a-password-of-mine-77"), webui)
    assert "is already running with these settings" in caplog.text
    assert pid(folder) == seen[-1]


def test_the_folder_may_be_changed_in_the_same_kernel_after_the_start(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    webui = visit(folder, tmp_path / "store")
    config = LaunchConfig(port=free_port(), wait_s=60)
    cells.start_ui(config, webui)
    first = pid(folder)
    other = cells.open_store(StoreConfig(store=str(tmp_path / "other")))
    assert (
        f"is already running, on port {config.port} of this machine with the folder {tmp_path / 'store'}" in caplog.text
    )
    cells.start_ui(config, other)
    assert pid(folder) not in (0, first)
    assert (tmp_path / "other" / "models").is_dir()
    assert webui.look() is not None, "there is one web UI, whichever folder is looked from"
    forms.show_stop(other)._stop.click()
    assert pid(folder) == 0
    with pytest.raises(WebUIError, match="The web UI is not running"):
        cells.share_ui(LINK, webui)


def test_one_that_ended_by_itself_is_said_with_its_cause_and_started_again(folder: Path, tmp_path: Path) -> None:
    webui = visit(folder, tmp_path / "store")
    config = LaunchConfig(port=free_port(), wait_s=60)
    cells.start_ui(config, webui)
    found = find_running("a1111", folder=str(folder), store=str(webui.store))
    os.kill(found.state.pid, 9)
    wait_until(lambda: not found.alive())
    assert found.problem() is not None
    assert "exit None" not in found.problem().problem, "how it ended is not known to who did not start it"
    wait_until(lambda: webui.look() is None)
    cells.start_ui(config, webui)
    assert webui.running.alive()


def test_a_web_ui_that_is_not_installed_names_the_cell_that_installs_it(tmp_path: Path) -> None:
    webui = visit(tmp_path / "nothing", tmp_path / "store")
    with pytest.raises(Exception, match="is not installed") as caught:
        cells.start_ui(LaunchConfig(), webui)
    assert caught.value.hint == "Run cell 3b, which installs it, then this one."
