"""The web UI notebook's cells, without a web UI: what they refuse, offer, show and delete."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers import forms
from fastsd_helpers.errors import InstallError, Interrupted, ModelNotFound, SettingsError, WebUICrashed, WebUIError
from fastsd_helpers.forms import NotebookUI, StoreConfig, desk
from fastsd_helpers.forms.webui import cells as cells
from fastsd_helpers.forms.webui import views
from fastsd_helpers.forms.webui.forms import settled
from fastsd_helpers.processes import LocalProcess, boot_id
from fastsd_helpers.tunnels import Login, TunnelConfig
from fastsd_helpers.webui import ControlNetConfig, InstallConfig, LaunchConfig, ModelsConfig, find_ui
from fastsd_helpers.webui.running import disk_usage
from fastsd_helpers.webui.running.background import BackgroundLink

ipywidgets = pytest.importorskip("ipywidgets")


class FakeUI:
    """What the cells use of a running web UI; the real one is in test_webui_visits.py and the notebook's own tests."""

    def __init__(self, webui: NotebookUI, key: str = "a1111") -> None:
        self.ui, self.port, self.seconds, self.model_loaded = find_ui(key), 7860, 12.0, True
        self.login, self.log, self.runs, self.died = Login("fastsd", "ui-password-77"), "run.log", True, None
        self.places, self.state = webui.places, type("State", (), {"pid": id(self), "started": 1})
        self.places.run.mkdir(parents=True, exist_ok=True)

    def alive(self) -> bool:
        return self.runs

    def problem(self) -> WebUICrashed | None:
        return self.died

    def stop(self) -> None:
        self.runs = False


def make_link(url: str = "https://calm-fox.example", login: Login | None = None) -> BackgroundLink:
    """A link that a process holds: this one, which is alive."""
    me = LocalProcess.me()
    login = login or Login("fastsd", "ui-password-77")
    text = f"Link:      {url}\nValid:     until it is stopped"
    return BackgroundLink(url, "localtunnel", "A <note>.", text, None, None, me.pid, me.start, boot_id(), login)


@pytest.fixture
def webui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NotebookUI:
    monkeypatch.setattr(cells, "_known", {})
    made = cells.open_store(StoreConfig(store=str(tmp_path / "store"), without_gpu=True))
    made.program = str(tmp_path / "programs")
    return made


def test_settings_of_another_form_are_refused_with_what_to_run(webui: NotebookUI) -> None:
    for call, wrong, cell in (
        (cells.install_ui, TunnelConfig(), "3a"),
        (cells.fetch_models, InstallConfig(), "4a"),
        (cells.fetch_controlnets, InstallConfig(), "5a"),
        (cells.start_ui, InstallConfig(), "6a"),
        (cells.share_ui, LaunchConfig(), "7a"),
    ):
        with pytest.raises(SettingsError, match="This cell got the form of cell") as caught:
            call(wrong, webui)
        assert caught.value.hint == f"Run cell {cell} first, then this one."


def test_run_again_the_store_is_the_same_one_with_what_it_started(webui: NotebookUI, tmp_path: Path) -> None:
    again = cells.open_store(StoreConfig(store=str(tmp_path / "store")))
    assert again is webui
    assert again.without_gpu is False
    other = cells.open_store(StoreConfig(store=str(tmp_path / "other")))
    assert other is not webui


def shown(form: Any) -> list[str]:
    """The fields of a form that are there to be filled in."""
    return [name for name, field in form._fields.items() if field.row.layout.display != "none"]


def test_nothing_that_an_earlier_cell_has_settled_is_asked_again_and_all_of_it_is_followed(webui: NotebookUI) -> None:
    start = forms.show_ui_form(LaunchConfig, webui)
    assert not {"store", "ui", "folder"} & set(shown(start))
    assert {"model", "vram", "user", "password", "extra_args"} <= set(shown(start))
    installing = forms.show_ui_form(InstallConfig, webui)
    assert "store" not in shown(installing)
    assert {"ui", "folder", "extensions"} <= set(shown(installing))
    webui.ui, webui.program, webui.model = find_ui("comfyui"), "/elsewhere", "/somewhere/m.safetensors"
    config = start.config()
    assert (config.ui, config.folder, config.store) == ("comfyui", "/elsewhere", str(webui.store))
    assert settled(config, webui).model == "/somewhere/m.safetensors", "the one that was placed"
    assert settled(LaunchConfig(model="sd15"), webui).model == "sd15", "unless another one is named"
    assert not config.password, "left empty: a strong one is made"
    webui.save_if_possible(forms={"TunnelConfig": {"user": "a b", "minutes": 5}})  # by an earlier version
    link = forms.show_ui_form(TunnelConfig, webui)
    assert not {"user", "password"} & set(shown(link)), "a link asks for the web UI's own, of cell 6a"
    assert (link.config().ngrok_token, link.config().minutes) == (None, 5)


def test_what_was_typed_is_there_when_a_form_is_drawn_anew_and_on_the_next_visit(
    webui: NotebookUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = forms.show_ui_form(LaunchConfig, webui)
    first.update(user="anna", port=7999)
    first._fields["password"].widget.value = "typed-password-1"
    assert forms.show_ui_form(LaunchConfig, webui).config().user == "anna"
    forms.show_ui_form(ModelsConfig, webui).update(model="sd21-512")
    forms.show_ui_form(InstallConfig, webui).update(ui="comfyui", folder="/elsewhere")
    kept = (webui.store / "fastsd-notebook.json").read_text()
    assert "typed-password-1" not in kept
    # A new kernel, on another machine with the same store.
    desk.clear()
    monkeypatch.setattr(cells, "_known", {})
    again = cells.open_store(StoreConfig(store=str(webui.store)))
    assert (again.ui.key, again.program) == ("comfyui", "/elsewhere")
    assert forms.show_ui_form(LaunchConfig, again).config().port == 7999
    assert forms.show_ui_form(ModelsConfig, again).config().model == "sd21-512"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"forms": 3}', '{"forms": {"LaunchConfig": {"vram": "huge", "user": "anna", "new": 1}}}']
)
def test_a_record_that_is_damaged_or_of_another_version_costs_no_form(webui: NotebookUI, text: str) -> None:
    webui.store.mkdir(parents=True, exist_ok=True)
    (webui.store / "fastsd-notebook.json").write_text(text)
    again = NotebookUI(webui.store)
    config = forms.show_ui_form(LaunchConfig, again).config()
    assert (config.vram, config.user) == ("auto", "anna" if "anna" in text else "fastsd")


def test_the_form_of_the_store_shows_what_was_used_last_from_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms.show_store_form(StoreConfig).update(store=str(tmp_path / "mine"), without_gpu=True)
    forms.show_store_form(StoreConfig).config()
    desk.clear()
    again = forms.show_store_form(StoreConfig).config()
    assert (again.store, again.without_gpu) == (str(tmp_path / "mine"), True)
    desk.clear()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert forms.show_store_form(StoreConfig).config() == StoreConfig()
    assert "without_gpu" in shown(forms.show_store_form(StoreConfig)), "a message names it, so it is not folded away"


def test_the_forms_offer_what_is_there(webui: NotebookUI, tmp_path: Path) -> None:
    for kind, name in (("Stable-diffusion", "dreamy.safetensors"), ("Lora", "sub/ink.safetensors"), ("VAE", "v.pt")):
        path = webui.store / "models" / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    made = tmp_path / "Fast-Dreambooth" / "Sessions" / "rex" / "exports"
    made.mkdir(parents=True)
    (made / "rex.safetensors").write_bytes(b"x")
    placing = forms.show_ui_form(ModelsConfig, webui)

    def offered(form: Any, name: str) -> list[str]:
        return [value for _words, value in form._fields[name].choice.known.options]

    models = offered(placing, "model")
    assert models[0] == "auto"
    assert {"dreamy.safetensors", "rex", "sd15", "sdxl"} <= set(models)
    assert "flux-dev" not in models, "AUTOMATIC1111 does not run it"
    assert offered(forms.show_ui_form(LaunchConfig, webui), "model")[:2] == ["", "dreamy.safetensors"]
    assert "sub/ink.safetensors" in offered(placing, "lora")
    assert "v.pt" in offered(placing, "vae")
    nets = forms.show_ui_form(ControlNetConfig, webui)
    assert {"canny", "depth", "openpose"} <= set(offered(nets, "tasks"))
    webui.ui = find_ui("comfyui")
    assert "flux-dev" in offered(forms.show_ui_form(ModelsConfig, webui), "model")
    placing.update(lora="https://example.com/my.safetensors")
    assert placing.config().lora == "https://example.com/my.safetensors", "any other text can be typed"
    files = offered(forms.show_ui_form(forms.ModelFileConfig, webui), "file")
    assert str(made / "rex.safetensors") in files


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
        said = "The packages could not be downloaded"

        def fail(config: InstallConfig) -> None:
            raise InstallError("The packages could not be downloaded: no network.", "Check the connection.")

        monkeypatch.setattr(cells, "install_webui", fail)
    cells.install_ui(InstallConfig(folder=webui.program), webui)
    assert said in caplog.text
    cells.fetch_models(ModelsConfig(), webui)
    cells.fetch_controlnets(ControlNetConfig(), webui)
    assert cells.share_ui(TunnelConfig(), webui) is None
    assert caplog.text.count(f"Nothing is done here: {said}") == 3
    view = cells.start_ui(LaunchConfig(), webui)
    assert f"No web UI is started. {said}" in caplog.text
    assert [view._open.description, view._close.description] == ["Open the playground", "Close it"]
    assert not Path(webui.program).exists()


def test_a_wrong_setting_is_said_and_not_taken_for_a_missing_network(webui: NotebookUI) -> None:
    with pytest.raises(SettingsError, match="it must be NAME=PLACE"):
        cells.install_ui(InstallConfig(folder=webui.program, mirrors="nonsense"), webui)


def test_controlnets_are_for_the_model_that_was_chosen(
    webui: NotebookUI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    asked = []
    module = sys.modules["fastsd_helpers.webui.placing.controls"]
    monkeypatch.setattr(
        module,
        "place_controlnet",
        lambda base, task, ui, places: asked.append((base, task)) or module.PlacedModel(Path(task), "x", None, "done"),
    )
    webui.family = "sdxl"
    cells.fetch_controlnets(ControlNetConfig(tasks="canny, depth"), webui)
    cells.fetch_controlnets(ControlNetConfig(tasks="canny", base="sd21-512"), webui)
    assert asked == [("sdxl", "canny"), ("sdxl", "depth"), ("sd21-512", "canny")]
    asked.clear()
    assert cells.fetch_controlnets(ControlNetConfig(), webui) is None, "nothing raw below the cell"
    assert asked == []
    assert "No ControlNet was chosen; for sdxl there is openpose" in caplog.text


def test_models_in_the_store_are_kept_and_an_empty_one_gets_a_model(
    webui: NotebookUI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    asked = []
    module = sys.modules["fastsd_helpers.webui.placing.models"]
    made = module.PlacedModel(webui.store / "m.safetensors", "checkpoint", "sd15", "downloaded")
    monkeypatch.setattr(module, "find_needed", lambda ref, *_rest, **more: asked.append((ref, more["kind"])) or ref)
    monkeypatch.setattr(module, "place_needed", lambda ref, *_rest: [made])
    cells.fetch_models(ModelsConfig(lora="a.safetensors, b.safetensors"), webui)
    assert asked == [("sd15", "checkpoint"), ("a.safetensors", "lora"), ("b.safetensors", "lora")]
    assert "there is none yet, so sd15 is used" in caplog.text
    assert (webui.model, webui.family) == (str(webui.store / "m.safetensors"), "sd15")
    folder = webui.store / "models" / "Stable-diffusion"
    (folder / "mine.safetensors").write_bytes(b"x")
    asked.clear()
    assert cells.fetch_models(ModelsConfig(), webui) is None, "nothing raw below the cell"
    assert asked == []
    assert "1 in" in caplog.text
    assert webui.model == "", "the web UI takes what is there"


def test_the_start_shows_the_last_lines_and_how_it_went(webui: NotebookUI, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(cells.StartView, "display", lambda self: shown.append(self))
    first, second = FakeUI(webui), FakeUI(webui)
    started = [first, second]

    def start(config: LaunchConfig, *, show: Any) -> FakeUI:
        for number in range(7):
            show(f"line <{number}>")
        return started.pop(0)

    monkeypatch.setattr(cells, "launch", start)
    assert cells.start_ui(LaunchConfig(folder=webui.program, store=str(webui.store)), webui) is None
    assert "✓ AUTOMATIC1111 v1.10.1 answers after 12 s; its model is loaded." in shown[0]._message.value
    assert "line &lt;6&gt;" in shown[0]._log.value
    cells.start_ui(LaunchConfig(), webui)
    assert first.runs, "asked for again with the same settings it goes on"
    cells.start_ui(LaunchConfig(wait_s=30), webui)
    assert first.runs, "how long a start may take says nothing of what runs"
    cells.start_ui(LaunchConfig(vram="low"), webui)
    assert (first.runs, second.runs) == (False, True), "one at a time"
    second.runs, second.died = (
        False,
        WebUICrashed("It ended: the GPU's memory was not enough.", "Choose a smaller one."),
    )
    with pytest.raises(WebUICrashed):
        cells.share_ui(TunnelConfig(), webui)


@pytest.mark.parametrize(
    ("key", "said"),
    [("a1111", "its model is loading"), *((key, "loaded with the first image") for key in ("forge-neo", "comfyui"))],
)
def test_a_web_ui_that_loads_no_model_at_its_start_is_not_said_to(
    webui: NotebookUI, key: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(cells.StartView, "display", lambda self: shown.append(self))
    started = FakeUI(webui, key)
    started.model_loaded = None
    monkeypatch.setattr(cells, "launch", lambda _config, **_more: started)
    cells.start_ui(LaunchConfig(folder=webui.program, store=str(webui.store)), webui)
    assert said in shown[0]._message.value


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
        cells.start_ui(LaunchConfig(folder=webui.program, store=str(webui.store)), webui)
    assert ("Stopped: nothing is running" in shown[0]._message.value) or ("Port 7860" in shown[0]._message.value)
    assert webui.running is None


def wait_for(true: Any) -> None:
    """Wait until something holds; a test that never sees it ends by its own time limit."""
    while not true():
        time.sleep(0.01)


def test_the_block_is_shown_whole_and_follows_a_new_address(
    webui: NotebookUI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="fastsd_helpers")
    with pytest.raises(WebUIError, match="is not running") as caught:
        cells.share_ui(TunnelConfig(), webui)
    assert "cell 6b" in caught.value.hint
    asked: list[Any] = []
    monkeypatch.setattr(
        cells, "share_in_background", lambda running, config: asked.append(config) or make_link(login=running.login)
    )
    held: list[Any] = [make_link()]
    monkeypatch.setattr(views, "find_link", lambda running: held[0])
    monkeypatch.setattr(views, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(views.LinkView.follow, "__kwdefaults__", {"every_s": 0.01})
    webui.running = FakeUI(webui)
    view = cells.share_ui(TunnelConfig(kind="localtunnel"), webui)
    for words in ("https://calm-fox.example", "fastsd", "ui-password-77", "until it is stopped", "A &lt;note&gt;."):
        assert words in view._message.value
    assert (asked[0].kind, asked[0].password) == ("localtunnel", "ui-password-77"), "one login for both"
    held[0] = make_link("https://new-fox.example")
    wait_for(lambda: "https://new-fox.example" in view._message.value)
    assert webui.link.url == "https://new-fox.example"
    again = cells.share_ui(TunnelConfig(kind="localtunnel"), webui)
    assert len(asked) == 1, "asked for again with the same settings it is the same link"
    assert "https://new-fox.example" in again._message.value
    held[0] = None
    wait_for(lambda: "This link is closed." in again._message.value)
    assert "ui-password-77" not in caplog.text


def test_a_link_with_other_settings_replaces_the_one_before(webui: NotebookUI, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(BackgroundLink, "close", lambda self: closed.append(self.url))
    monkeypatch.setattr(
        cells, "share_in_background", lambda running, config: make_link(f"https://{config.kind}.example")
    )
    monkeypatch.setattr(cells, "share", lambda running, config, **more: make_link("https://colab.example"))
    webui.running = FakeUI(webui)
    for kind in ("localtunnel", "cloudflared", "colab"):
        cells.share_ui(TunnelConfig(kind=kind), webui)
        assert webui.link.url == f"https://{kind}.example"
    assert closed == ["https://localtunnel.example", "https://cloudflared.example"]


def test_stopping_takes_a_press_and_says_what_runs(webui: NotebookUI) -> None:
    view = forms.show_stop(webui)
    assert "No web UI is running." in view._message.value
    view._stop.click()
    assert "No web UI was running, so nothing was stopped." in view._message.value
    webui.running, webui.link = FakeUI(webui), make_link()
    running = webui.running
    view._look.click()
    assert "runs on port 7860; its link is https://calm-fox.example" in view._message.value
    view._stop.click()
    assert not running.runs
    assert webui.running is None
    assert "Stopped. Run cell 6b to start it again." in view._message.value
    webui.running = FakeUI(webui)
    webui.running.runs, webui.running.died = False, WebUICrashed("It ended by itself.", "Start it again.")
    view._look.click()
    assert "It ended by itself." in view._message.value
    assert "Start it again." in view._message.value


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
    assert "Deleted: 5.0 kB." in view._message.value
    for kind in ("pictures", "program"):
        view._choice.value = next(item for _label, item in view._choice.options if item.kind == kind)
        view._delete.click()
        view._sure.click()
    assert (places.store / "outputs").is_dir()
    assert not list((places.store / "outputs").iterdir())
    assert not places.root.exists()
    assert (places.store / "models" / "Lora" / "m.safetensors").is_file(), "links are removed, not followed"


def test_a_program_that_runs_is_not_deleted(webui: NotebookUI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_usage, "read_run", lambda run: type("State", (), {"title": "AUTOMATIC1111"}))
    monkeypatch.setattr(disk_usage, "is_running", lambda state: True)
    with pytest.raises(WebUIError, match="is running, so it was not deleted"):
        disk_usage.delete_kept(disk_usage.Kept("program", "x", webui.places.root, 1), webui.places)


def test_colabs_own_link_shows_the_web_uis_own_login(webui: NotebookUI, monkeypatch: pytest.MonkeyPatch) -> None:
    # No gate is in front of that link, so the page asks for what the web UI itself wants.
    module = sys.modules["fastsd_helpers.webui.running.sharing"]
    link = type("Link", (), {"kind": "colab", "login": None})()
    monkeypatch.setattr(module, "open_tunnel", lambda port, **more: link)
    running = FakeUI(webui)
    assert module.share(running, TunnelConfig(kind="colab")).login == running.login


# ------------------------------------------------------------------------------------- what a newcomer types


@pytest.mark.parametrize(
    ("typed", "problem", "hint"),
    [
        ("civitai.com/models/5", "There is no model", "it begins with https://"),
        ("htp://example.com/m.safetensors", "There is no model", "it begins with https://"),
        ("www.civitai.red/models/7/x", "There is no model", "it begins with https://"),
        ("nothere.safetensors", "There is no file 'nothere.safetensors'", "Give its whole path"),
        ("~/models/Gone.CKPT", "There is no file", "names are case-sensitive"),
        ("SD15", "There is no model 'SD15'", "Did you mean sd15?"),
        ("sdx", "There is no model", "Did you mean sdxl?"),
        ("my nonsense", "There is no model", "Give a file, a link, a Hub id, a session, or a key: "),
    ],
)
def test_a_model_that_is_none_says_what_is_wrong_with_what_was_typed(
    webui: NotebookUI, typed: str, problem: str, hint: str
) -> None:
    with pytest.raises(ModelNotFound) as caught:
        cells.fetch_models(ModelsConfig(model=typed), webui)
    assert problem in caught.value.problem
    assert hint in caught.value.hint
    assert "flux-dev" not in caught.value.hint, "only what this web UI runs"


def test_a_long_installation_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    installing = sys.modules["fastsd_helpers.webui.extensions.installation"]
    monkeypatch.setattr(installing, "_SAY_EVERY_S", 0.01)
    with installing._said_to_go_on("packages", time.monotonic()):
        wait_for(lambda: "packages: still running, 0 s so far" in caplog.text)
    before = len(caplog.records)
    time.sleep(0.05)
    assert len(caplog.records) == before, "nothing is said after the step"
