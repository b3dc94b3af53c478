"""The web UI notebook's cells, without a web UI: what they refuse, offer, show and delete."""

import sys
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers import forms
from fastsd_helpers.errors import InstallError, Interrupted, SettingsError, WebUICrashed, WebUIError
from fastsd_helpers.forms import NotebookUI, StoreConfig
from fastsd_helpers.forms import webui as cells
from fastsd_helpers.tunnels import Login, TunnelConfig
from fastsd_helpers.webui import ControlNetConfig, InstallConfig, LaunchConfig, ModelsConfig, find_ui, shelf

ipywidgets = pytest.importorskip("ipywidgets")


class FakeUI:
    """What the cells use of a running web UI; the real one is in test_webui.py and the notebook's own tests."""

    def __init__(self) -> None:
        self.ui, self.port, self.seconds, self.model_loaded = find_ui("a1111"), 7860, 12.0, True
        self.login, self.log, self.runs, self.died = Login("fastsd", "ui-password-77"), "run.log", True, None

    def alive(self) -> bool:
        return self.runs

    def problem(self) -> WebUICrashed | None:
        return self.died

    def stop(self) -> None:
        self.runs = False


class FakeLink:
    """What the views use of an open link."""

    def __init__(self, url: str = "https://calm-fox.example") -> None:
        self.url, self.note, self.closed = url, "A <note>.", False

    def block(self) -> str:
        return f"Link:      {self.url}\nUser:      fastsd\nPassword:  ui-password-77\nValid:     until it is stopped"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def webui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NotebookUI:
    monkeypatch.setattr(cells, "_known", {})
    made = cells.open_store(StoreConfig(store=str(tmp_path / "store"), without_gpu=True))
    made.folder = str(tmp_path / "programs")
    return made


def test_settings_of_another_form_are_refused_with_what_to_run(webui: NotebookUI) -> None:
    for call, wrong in (
        (cells.install_ui, TunnelConfig()),
        (cells.fetch_models, InstallConfig()),
        (cells.fetch_controlnets, InstallConfig()),
        (cells.start_ui, InstallConfig()),
        (cells.share_ui, LaunchConfig()),
    ):
        with pytest.raises(SettingsError, match="The form shown last is for") as caught:
            call(wrong, webui)
        assert caught.value.hint == "Run the cell just above this one first."


def test_run_again_the_store_is_the_same_one_with_what_it_started(webui: NotebookUI, tmp_path: Path) -> None:
    again = cells.open_store(StoreConfig(store=str(tmp_path / "store")))
    assert again is webui
    assert again.without_gpu is False
    other = cells.open_store(StoreConfig(store=str(tmp_path / "other")))
    assert other is not webui


def test_a_form_starts_with_what_earlier_cells_settled(webui: NotebookUI, tmp_path: Path) -> None:
    webui.model, webui.ui = "/somewhere/m.safetensors", find_ui("comfyui")
    assert webui.known(LaunchConfig) == {
        "store": str(tmp_path / "store"),
        "ui": "comfyui",
        "folder": str(tmp_path / "programs"),
        "model": "/somewhere/m.safetensors",
    }
    assert set(webui.known(InstallConfig)) == {"store", "ui", "folder"}
    form = forms.show_form(LaunchConfig, given=webui.known(LaunchConfig))
    assert form.config().model == "/somewhere/m.safetensors"
    assert not form.config().password, "left empty: a strong one is made"
    assert not forms.show_form(TunnelConfig).config().ngrok_token


@pytest.mark.parametrize("problem", ["gpu", "network"])
def test_where_no_web_ui_can_run_every_cell_says_so_and_the_playground_is_offered(
    webui: NotebookUI, problem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    if problem == "gpu":
        webui.without_gpu = False
        monkeypatch.setattr(cells, "describe_device", lambda: type("Device", (), {"kind": "cpu"}))
        said = "There is no GPU here"
    else:
        said = "The packages could not be had"

        def fail(config: InstallConfig) -> None:
            raise InstallError("The packages could not be had: no network.", "Check the connection.")

        monkeypatch.setattr(cells, "install_webui", fail)
    assert cells.install_ui(InstallConfig(folder=webui.folder), webui) is None
    assert said in caplog.text
    assert cells.fetch_models(ModelsConfig(), webui) == []
    assert cells.fetch_controlnets(ControlNetConfig(), webui) == []
    assert cells.share_ui(TunnelConfig(), webui) is None
    assert caplog.text.count(f"Nothing is done here: {said}") == 3
    view = cells.start_ui(LaunchConfig(), webui)
    assert f"No web UI is started. {said}" in caplog.text
    assert [button.description for button in view.box.children[0].children] == ["Open the playground", "Close it"]
    assert not Path(webui.folder).exists()


def test_a_wrong_setting_is_said_and_not_taken_for_a_missing_network(webui: NotebookUI) -> None:
    with pytest.raises(SettingsError, match="it must be NAME=PLACE"):
        cells.install_ui(InstallConfig(folder=webui.folder, mirrors="nonsense"), webui)


def test_controlnets_are_for_the_model_that_was_chosen(
    webui: NotebookUI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    asked = []
    module = sys.modules["fastsd_helpers.webui.models"]
    monkeypatch.setattr(
        module,
        "place_controlnet",
        lambda base, task, ui, places: asked.append((base, task)) or module.PlacedModel(Path(task), "x", base, "done"),
    )
    webui.family = "sdxl"
    cells.fetch_controlnets(ControlNetConfig(tasks="canny, depth"), webui)
    cells.fetch_controlnets(ControlNetConfig(tasks="canny", base="sd21-512"), webui)
    assert asked == [("sdxl", "canny"), ("sdxl", "depth"), ("sd21-512", "canny")]
    assert cells.fetch_controlnets(ControlNetConfig(), webui) == []
    assert "No ControlNet was asked for; for sdxl there is openpose" in caplog.text


def test_models_in_the_store_are_kept_and_an_empty_one_gets_a_model(
    webui: NotebookUI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    asked = []
    module = sys.modules["fastsd_helpers.webui.models"]
    made = module.PlacedModel(webui.store / "m.safetensors", "checkpoint", "sd15", "downloaded")
    monkeypatch.setattr(module, "place_model", lambda ref, ui, places, **more: asked.append((ref, more)) or made)
    cells.fetch_models(ModelsConfig(lora="a.safetensors, b.safetensors"), webui)
    lora = {"kind": "lora"}
    assert asked == [("sd15", {}), ("a.safetensors", lora), ("b.safetensors", lora)]
    assert "there is none yet, so sd15 is taken" in caplog.text
    assert (webui.model, webui.family) == (str(webui.store / "m.safetensors"), "sd15")
    folder = webui.store / "models" / "Stable-diffusion"
    (folder / "mine.safetensors").write_bytes(b"x")
    asked.clear()
    assert cells.fetch_models(ModelsConfig(), webui) == []
    assert asked == []
    assert "1 in" in caplog.text
    assert webui.model == "", "the web UI takes what is there"


def test_the_start_shows_the_last_lines_and_how_it_went(webui: NotebookUI, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(cells.StartView, "display", lambda self: shown.append(self))
    first, second = FakeUI(), FakeUI()
    started = [first, second]

    def start(config: LaunchConfig, *, show: Any) -> FakeUI:
        for number in range(20):
            show(f"line <{number}>")
        return started.pop(0)

    monkeypatch.setattr(cells, "launch", start)
    assert cells.start_ui(LaunchConfig(folder=webui.folder, store=str(webui.store)), webui) is None
    assert "✓ AUTOMATIC1111 v1.10.1 answers after 12 s; its model is loaded." in shown[0]._head.value
    assert "line &lt;19&gt;" in shown[0]._log.value
    assert "line &lt;11&gt;" not in shown[0]._log.value
    cells.start_ui(LaunchConfig(), webui)
    assert (first.runs, second.runs) == (False, True), "one at a time"
    second.runs, second.died = (
        False,
        WebUICrashed("It ended: the GPU's memory was not enough.", "Choose a smaller one."),
    )
    with pytest.raises(WebUICrashed):
        cells.share_ui(TunnelConfig(), webui)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), WebUIError("Port 7860 is in use.", "Choose another one.")])
def test_a_start_that_is_stopped_or_fails_says_so_below_the_cell(
    webui: NotebookUI, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(cells.StartView, "display", lambda self: shown.append(self))

    def start(config: LaunchConfig, *, show: Any) -> None:
        raise error

    monkeypatch.setattr(cells, "launch", start)
    with pytest.raises((Interrupted, WebUIError)):
        cells.start_ui(LaunchConfig(folder=webui.folder, store=str(webui.store)), webui)
    assert ("Stopped: nothing is running" in shown[0]._head.value) or ("Port 7860" in shown[0]._head.value)
    assert webui.running is None


def test_the_block_is_shown_whole_and_follows_a_new_address(
    webui: NotebookUI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="fastsd_helpers")
    with pytest.raises(WebUIError, match="does not run"):
        cells.share_ui(TunnelConfig(), webui)
    asked: list[Any] = []

    def share(running: FakeUI, config: TunnelConfig, *, on_change: Any) -> FakeLink:
        asked.append((config, on_change))
        return FakeLink()

    monkeypatch.setattr(cells, "share", share)
    webui.running = FakeUI()
    view = cells.share_ui(TunnelConfig(kind="localtunnel"), webui)
    for words in ("https://calm-fox.example", "fastsd", "ui-password-77", "until it is stopped", "A &lt;note&gt;."):
        assert words in view._text.value
    assert asked[0][0].kind == "localtunnel"
    asked[0][1](FakeLink("https://new-fox.example"))
    assert "https://new-fox.example" in view._text.value
    first = webui.link
    cells.share_ui(TunnelConfig(), webui)
    assert first.closed, "one link at a time"
    assert "ui-password-77" not in caplog.text


def test_stopping_takes_a_press_and_says_what_runs(webui: NotebookUI) -> None:
    view = forms.show_stop(webui)
    assert view._message.value == "No web UI runs."
    webui.running, webui.link = FakeUI(), FakeLink()
    running = webui.running
    view._look.click()
    assert "runs on port 7860; its link is https://calm-fox.example" in view._message.value
    view._stop.click()
    assert not running.runs
    assert webui.running is None
    assert "Stopped" in view._message.value
    webui.running = FakeUI()
    webui.running.runs, webui.running.died = False, WebUICrashed("It ended by itself.", "Start it again.")
    view._look.click()
    assert "✋ It ended by itself. Start it again." in view._message.value


def test_what_is_kept_is_listed_by_size_and_deleted_after_a_second_press(webui: NotebookUI) -> None:
    assert forms.show_kept(webui)._delete.disabled
    places = webui.places
    shelf_of = {"Stable-diffusion": 5000, "Lora": 300}
    sys.modules["fastsd_helpers.webui.places"].prepare_places(places, webui.ui)
    for folder, size in shelf_of.items():
        (places.store / "models" / folder / "m.safetensors").write_bytes(b"x" * size)
    (places.store / "models" / "Stable-diffusion" / "m.yaml").write_text("x")
    (places.store / "models" / "Stable-diffusion" / "Put models here.txt").write_text("")
    (places.store / "outputs" / "a").mkdir()
    (places.store / "outputs" / "a" / "1.png").write_bytes(b"x" * 1000)
    (places.root / "code").mkdir()
    (places.root / "code" / "launch.py").write_bytes(b"x" * 9000)
    view = forms.show_kept(webui)
    kinds = [item.kind for _label, item in view._choice.options]
    assert kinds == ["program", "checkpoint", "pictures", "lora"]
    items = {item.kind: item for _label, item in view._choice.options}
    view._choice.value = items["checkpoint"]
    assert items["checkpoint"].path.exists()
    view._delete.click()
    assert "Delete m.safetensors (5.0 kB)? This cannot be undone." in view._message.value
    view._sure.click()
    assert not items["checkpoint"].path.exists()
    assert not items["checkpoint"].path.with_suffix(".yaml").exists()
    assert "5.0 kB freed" in view._message.value
    for kind in ("pictures", "program"):
        view._choice.value = next(item for _label, item in view._choice.options if item.kind == kind)
        view._delete.click()
        view._sure.click()
    assert (places.store / "outputs").is_dir()
    assert not list((places.store / "outputs").iterdir())
    assert not places.root.exists()
    assert (places.store / "models" / "Lora" / "m.safetensors").is_file(), "links are removed, not followed"


def test_a_program_that_runs_is_not_deleted(webui: NotebookUI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "read_state", lambda places: type("State", (), {"title": "AUTOMATIC1111"}))
    monkeypatch.setattr(shelf, "is_running", lambda state: True)
    with pytest.raises(WebUIError, match="is running, so it was not deleted"):
        shelf.delete_kept(shelf.Kept("program", "x", webui.places.root, 1), webui.places)


def test_colabs_own_link_shows_the_web_uis_own_login(monkeypatch: pytest.MonkeyPatch) -> None:
    # No gate is in front of that link, so the page asks for what the web UI itself wants.
    module = sys.modules["fastsd_helpers.webui.launch"]
    link = type("Link", (), {"kind": "colab", "login": None})()
    monkeypatch.setattr(module, "open_tunnel", lambda port, **more: link)
    running = FakeUI()
    assert module.share(running, TunnelConfig(kind="colab")).login == running.login
