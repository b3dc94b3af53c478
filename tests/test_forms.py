"""A settings class becomes a form, on ipywidgets 8 and on the 7.7.1 that Colab has."""

import ast
import html
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from fastsd_helpers.device import Device
from fastsd_helpers.doctor import Diagnosis, Finding
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import DependencyMissing, InstallError, SessionError, SettingsError
from fastsd_helpers.forms import Form, SessionConfig, desk, open_session, prepare_pictures, readiness, show_form
from fastsd_helpers.forms.dreambooth import notebook
from fastsd_helpers.forms.widgets import model_choice
from fastsd_helpers.forms.widgets.style import read_style
from fastsd_helpers.options import check, given_names, option, options_of, to_values
from fastsd_helpers.registry import models
from fastsd_helpers.sessions import Session
from fastsd_helpers.wheels import Change, InstallReport

ipywidgets = pytest.importorskip("ipywidgets")

ROOT = Path(__file__).resolve().parents[1]
WIDGETS7 = ROOT / ".venv-ipywidgets7"


@dataclass(frozen=True)
class PaintConfig:
    """Settings for painting a wall."""

    base_model: str = option("auto", help="what it is painted on")
    finish: Literal["matt", "gloss"] = option("matt", help="how it shines")
    sheen: Literal["low", "high"] | None = option(None, help="how much")
    ladder: bool = option(False, help="use the <b>ladder</b>")
    primer: bool | None = option(None, help="paint twice")
    coats: int = option(2, help="layers of paint", low=1, high=9)
    speed: float = option(2e-6, help="square metres a second", low=0.0)
    unet_steps: int | None = option(None, help="strokes", low=0, advanced=True)
    shed_key: str | None = option(None, help="key of the shed", secret=True)

    def __post_init__(self) -> None:
        check(self)


def widget(form: Form[Any], name: str) -> Any:
    return form._fields[name].widget


def text_of(box: Any) -> str:
    """Everything a person can read in a form."""
    if str(getattr(box, "value", "")).startswith("<style>"):
        return ""
    own = " ".join(str(getattr(box, name, "")) for name in ("value", "placeholder", "description"))
    return " ".join([own, *(text_of(child) for child in getattr(box, "children", ()))])


def test_every_kind_of_setting_gets_its_widget() -> None:
    form = show_form(PaintConfig)
    kinds = {name: type(field.widget).__name__ for name, field in form._fields.items()}
    assert kinds == {
        "base_model": "Combobox",
        "finish": "Dropdown",
        "sheen": "Dropdown",
        "ladder": "Checkbox",
        "primer": "Dropdown",
        "coats": "Text",
        "speed": "Text",
        "unet_steps": "Text",
        "shed_key": "Password",
    }


def test_an_untouched_form_gives_the_defaults() -> None:
    assert show_form(PaintConfig).config() == PaintConfig()


def test_update_shows_and_gives_other_values() -> None:
    form = show_form(PaintConfig)
    form.update(coats=3, speed=0.5, finish="gloss", sheen="high", ladder=True, primer=False, unet_steps=7)
    expected = PaintConfig(coats=3, speed=0.5, finish="gloss", sheen="high", ladder=True, primer=False, unet_steps=7)
    assert form.config() == expected
    assert widget(form, "coats").value == "3"


def test_what_a_person_types_is_what_the_run_gets() -> None:
    form = show_form(PaintConfig)
    widget(form, "coats").value = " 5 "
    widget(form, "speed").value = "1e-4"
    widget(form, "ladder").value = True
    assert form.config() == PaintConfig(coats=5, speed=1e-4, ladder=True)


def test_an_emptied_field_is_left_alone_again() -> None:
    form = show_form(PaintConfig, given={"unet_steps": 7, "sheen": "low"})
    widget(form, "unet_steps").value = ""
    widget(form, "sheen").value = None
    assert form.config() == PaintConfig()


def test_bad_values_are_all_named_and_none_is_silently_moved_to_a_limit() -> None:
    form = show_form(PaintConfig)
    widget(form, "coats").value = "20"
    widget(form, "speed").value = "fast"
    with pytest.raises(SettingsError) as caught:
        form.config()
    assert "coats (--coats) is 20; the largest is 9" in caught.value.problem
    assert "speed (--speed) is 'fast'; it must be a number" in caught.value.problem


def test_the_form_says_at_once_what_is_wrong_and_stops_saying_it() -> None:
    form = show_form(PaintConfig)
    widget(form, "coats").value = "20"
    assert form._fields["coats"].problem == "coats is 20; the largest is 9"
    assert text_of(form.box).count("the largest is 9") == 1, "at its field, and once"
    assert form._message.value == ""
    widget(form, "coats").value = "9"
    assert "the largest is 9" not in text_of(form.box)


def test_what_is_wrong_stands_at_its_field_and_opens_the_folded_part_it_is_in() -> None:
    form = show_form(PaintConfig)
    widget(form, "unet_steps").value = "-3"
    assert "is -3; the smallest is 0" in form._fields["unet_steps"].problem
    assert "the smallest is 0" in text_of(form._fields["unet_steps"].row)
    assert form._more.selected_index == 0
    widget(form, "unet_steps").value = ""
    assert form._fields["unet_steps"].problem == ""
    assert form._more.selected_index == 0, "what the user looks at is not closed under the mouse"


def test_fields_that_do_not_go_together_complain_at_the_first_that_is_named() -> None:
    @dataclass(frozen=True)
    class FenceConfig:
        """Two boards and a rule."""

        posts: int = option(2, help="posts")
        boards: int = option(1, help="boards")

        def __post_init__(self) -> None:
            rules = ["boards (--boards) are more than posts (--posts) carry"] if self.boards > self.posts else []
            check(self, [*rules, *(["a fence needs a gate"] if self.posts == 13 else [])])

    form = show_form(FenceConfig)
    widget(form, "boards").value = "20"
    assert form._fields["boards"].problem == "boards are more than posts carry"
    assert form._fields["posts"].problem == ""
    widget(form, "posts").value = "13"
    assert "a fence needs a gate" in form._message.value, "what belongs to no field is said too"
    assert "--" not in text_of(form.box).replace("--jp", "")


def test_a_cell_that_uses_a_wrong_form_leaves_the_reason_at_the_field_too() -> None:
    form = show_form(PaintConfig, given={"coats": 20})
    with pytest.raises(SettingsError):
        form.config()
    assert "the largest is 9" in form._fields["coats"].problem
    form.update(coats=3)
    form.config()
    assert form._fields["coats"].problem == ""


def test_update_with_a_name_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(SettingsError) as caught:
        show_form(PaintConfig).update(roller=1)
    assert "roller" in caught.value.problem
    assert "coats" in caught.value.hint


@pytest.mark.parametrize("values", [{"finish": "silk"}, {"ladder": "perhaps"}])
def test_update_with_a_value_that_cannot_be_shown_names_the_choices(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"choose (matt, gloss|yes, no)"):
        show_form(PaintConfig).update(**values)


def test_the_help_is_shown_with_limits_and_as_text_not_as_markup() -> None:
    shown = text_of(show_form(PaintConfig).box)
    assert "layers of paint (1 to 9)" in shown
    assert "&lt;b&gt;ladder&lt;/b&gt;" in shown


def test_a_choice_that_follows_the_model_says_so_until_something_is_chosen() -> None:
    form = show_form(DreamBoothConfig)
    row = form._fields["method"].row
    widget(form, "base_model").value = "illustrious-xl"
    assert form.config().method == "full", "what the model brings is filled in later"
    assert not {"method", "lr_scheduler"} & given_names(form.config())
    assert "illustrious-xl: lora" in text_of(row)
    assert "illustrious-xl: constant_with_warmup" in text_of(form._fields["lr_scheduler"].row)
    assert widget(form, "method").label == "automatic", "not a value that will not be used"
    widget(form, "method").value = "full"
    assert "method" in given_names(form.config()), "its default can be chosen in one step"
    assert "illustrious-xl: lora" not in text_of(row)
    form.update(method=None)
    assert widget(form, "method").label == "automatic", "and not an empty list"
    assert "method" not in given_names(form.config())
    assert "illustrious-xl: lora" in text_of(row)


@pytest.mark.parametrize("every", [False, True])
def test_a_choice_that_follows_the_model_is_restored_as_it_was_left(every: bool, tmp_path: Path) -> None:
    session = Session.create("cat", root=tmp_path)
    values = to_values(DreamBoothConfig()) if every else {"unet_steps": 7}  # earlier versions kept every setting
    session.save(forms={"DreamBoothConfig": values})
    form = show_form(DreamBoothConfig, restore=session)
    assert widget(form, "method").label == "automatic"
    widget(form, "method").value = "full"
    form.config()
    assert widget(show_form(DreamBoothConfig, restore=session), "method").label == "full"


def test_a_field_left_alone_says_what_the_model_brings() -> None:
    form = show_form(PaintConfig)
    assert widget(form, "unet_steps").placeholder == "automatic"
    for name in ("sheen", "primer"):
        choice = widget(form, name)
        assert choice.label == "automatic"
        choice.index = 1
        assert form.values()[name] is not None
        choice.index = 0
        assert choice.label == "automatic", "it is chosen again, and not shown as nothing"
        assert form.values()[name] is None
    widget(form, "base_model").value = "demo"
    from fastsd_helpers.registry import find_model

    brings = f"demo: {find_model('demo').defaults['unet_steps']}"
    assert brings in text_of(form._fields["unet_steps"].row)
    widget(form, "base_model").value = "somebody/some-model"
    assert brings not in text_of(form._fields["unet_steps"].row)


def test_nothing_is_sent_to_a_field_in_which_somebody_may_be_typing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page shows the last value that was sent with whatever comes, and forgets what is typed and not sent yet."""
    form, sent = show_form(PaintConfig), []
    for field in form._fields.values():
        field.widget.observe(lambda change: sent.append((change.owner.description, change.name)))
    widget(form, "base_model").value = "demo"
    widget(form, "unet_steps").value = "-3"
    assert {owner for owner, _name in sent} <= {"base model", "base model: another one", "unet steps"}


def test_known_models_are_offered_and_others_may_be_typed() -> None:
    form = show_form(PaintConfig)
    assert {"auto", "demo", "sd15"} <= set(widget(form, "base_model").options)
    widget(form, "base_model").value = "somebody/some-model"
    assert form.config().base_model == "somebody/some-model"


def test_the_base_model_is_chosen_in_a_list_that_says_what_it_is_and_whether_it_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = Device("cuda", "Little GPU", int(9e9), False, (7, 5))
    monkeypatch.setattr(model_choice, "describe_device", lambda: small)
    form = show_form(DreamBoothConfig)
    choice = form._fields["base_model"].choice
    offered = [value for _label, value in choice.known.options]
    assert offered == ["auto", *(spec.key for spec in models() if spec.trainable), ""]
    choice.known.value = "sd15"
    assert form.config().base_model == "sd15"
    assert "⚠ wants 10 GB of GPU memory, and Little GPU has 9 GB" in text_of(form.box)
    form.update(method="lora")
    assert "✓ wants 6 GB" in text_of(form.box)
    form.update(base_model="https://example.org/model.safetensors")
    assert choice.known.value == ""
    assert "A link" in text_of(form.box)


def test_advanced_settings_are_folded_away() -> None:
    box = show_form(PaintConfig).box
    accordion = next(child for child in box.children if type(child).__name__ == "Accordion")
    assert accordion.selected_index is None
    assert "strokes" in text_of(accordion)
    assert "strokes" not in text_of(box.children[0])


PLAIN_OF_PAINT = ("base_model", "finish", "sheen", "ladder", "primer", "coats", "speed", "shed_key")


_SHOW = ("show_form", "show_ui_form", "show_store_form")


def forms_of_the_notebooks() -> list[type]:
    """Every settings class that a cell of a notebook shows as a form."""
    imported: dict[str, str] = {}
    shown: set[str] = set()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            source = re.sub(r"(?m)^(\s*)%.*", r"\1pass", "".join(cell["source"]))  # Jupyter's own commands
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom):
                    imported |= {alias.name: node.module for alias in node.names}
                elif isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("show_") and node.args:
                    name = getattr(node.args[0], "id", "")
                    shown |= {name} if name.endswith("Config") else set()
    return [getattr(importlib.import_module(imported[name]), name) for name in sorted(shown)]


def test_the_forms_of_the_notebooks_are_found() -> None:
    assert {"DreamBoothConfig", "SessionConfig", "LaunchConfig"} <= {made.__name__ for made in forms_of_the_notebooks()}


def parts_of(form: Form[Any]) -> tuple[set[str], set[str]]:
    """The names of the settings whose widget lies in the plain part, and in what is folded away."""

    def inside(box: Any) -> list[Any]:
        return [box, *(found for child in getattr(box, "children", ()) for found in inside(child))]

    folded = {id(each) for box in inside(form.box) if type(box).__name__ == "Accordion" for each in inside(box)}
    shown = {id(each) for each in inside(form.box)} - folded
    places = {name: id(field.widget) for name, field in form._fields.items()}
    return (
        {name for name, place in places.items() if place in shown},
        {name for name, place in places.items() if place in folded},
    )


def test_plain_settings_are_in_plain_sight() -> None:
    plain, folded = parts_of(show_form(PaintConfig))
    assert plain == set(PLAIN_OF_PAINT)
    assert folded == {"unet_steps"}


@pytest.mark.parametrize("settings", forms_of_the_notebooks(), ids=lambda settings: settings.__name__)
def test_every_form_of_a_notebook_shows_something_and_folds_away_what_says_so(settings: type) -> None:
    plain, folded = parts_of(show_form(settings))
    assert plain, "a form that is folded away whole"
    assert folded == {spec.name for spec in options_of(settings) if spec.advanced}
    assert plain | folded == {spec.name for spec in options_of(settings)}
    assert not plain & folded


def test_a_form_displays_itself_and_a_page_without_widgets_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display

    shown: list[Any] = []
    monkeypatch.setattr(IPython.display, "display", lambda data, *, raw: shown.append(data))
    form = show_form(PaintConfig)
    form._ipython_display_()
    (bundle,) = shown
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == form.box.model_id
    assert "JupyterLab" in bundle["text/plain"]
    assert "pip install" in bundle["text/plain"]
    assert "VBox" not in bundle["text/plain"]


def test_every_view_says_the_same_to_a_page_without_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsd_helpers.forms.widgets import view

    shown: list[Any] = []
    monkeypatch.setattr(view, "show_widget", shown.append)
    folder = Path(view.__file__).parents[1]
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert path.name == "view.py" or "display" not in calls, f"{path.name} shows something past `show_widget`"
    made = view.View()
    made.box = view.make_frame()
    made._ipython_display_()
    assert shown == [made.box]


def test_ipywidgets_that_are_too_old_are_named_with_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ipywidgets, "Combobox")
    with pytest.raises(DependencyMissing, match="needs ipywidgets 7"):
        show_form(PaintConfig)


def test_every_input_has_its_label_and_every_form_its_name() -> None:
    def inputs(box: Any) -> list[Any]:
        own = [box] if hasattr(box, "description") and hasattr(box, "value") else []
        return [*own, *(found for child in getattr(box, "children", ()) for found in inputs(child))]

    for settings in (PaintConfig, *forms_of_the_notebooks()):
        form = show_form(settings)
        found = [each for each in inputs(form.box) if type(each).__name__ not in ("HTML", "FileUpload")]
        assert len(found) >= len(form._fields)
        assert all(each.description.strip() for each in found), settings
        name = html.unescape(re.search(r'fastsd-name">([^<]*)', form.box.children[0].value)[1])
        assert len(name) > 3
        assert settings.__doc__.startswith(name)


# -------------------------------------------------------------------------------------------- a session


def test_what_was_entered_is_there_when_the_session_is_opened_again(tmp_path: Path) -> None:
    form = show_form(PaintConfig, restore=Session.create("wall", root=tmp_path))
    widget(form, "coats").value = "5"
    again = show_form(PaintConfig, restore=Session.open("wall", root=tmp_path))
    assert again.values()["coats"] == 5
    again.update(finish="gloss")
    again.config()
    third = show_form(PaintConfig, restore=Session.open("wall", root=tmp_path), given={"coats": 1})
    assert (third.values()["finish"], third.values()["coats"]) == ("gloss", 5), "what was entered wins"


def test_what_is_wrong_is_not_kept(tmp_path: Path) -> None:
    form = show_form(PaintConfig, restore=Session.create("wall", root=tmp_path))
    widget(form, "coats").value = "20"
    desk.clear()  # a new kernel
    assert show_form(PaintConfig, restore=Session.open("wall", root=tmp_path)).values()["coats"] == 2


def test_two_forms_of_one_session_keep_their_own_values(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class FloorConfig:
        """Another form."""

        coats: int = option(1, help="layers")

    session = Session.create("wall", root=tmp_path)
    show_form(PaintConfig, restore=session, given={"coats": 4}).config()
    show_form(FloorConfig, restore=session, given={"coats": 8}).config()
    opened = Session.open("wall", root=tmp_path)
    assert show_form(PaintConfig, restore=opened).values()["coats"] == 4
    assert show_form(FloorConfig, restore=opened).values()["coats"] == 8


def test_values_of_another_version_are_set_aside_and_said(tmp_path: Path) -> None:
    session = Session.create("wall", root=tmp_path)
    session.save(forms={"PaintConfig": {"roller": 1, "finish": "silk", "coats": 6}})
    form = show_form(PaintConfig, restore=session)
    assert form.config() == PaintConfig(coats=6)
    said = text_of(show_form(PaintConfig, restore=Session.open("wall", root=tmp_path)).box)
    assert "roller" not in said, "what was set aside is gone once the form has been saved again"


def test_what_was_set_aside_is_named_in_the_form(tmp_path: Path) -> None:
    session = Session.create("wall", root=tmp_path)
    session.save(forms={"PaintConfig": {"roller": 1, "finish": "silk"}})
    shown = text_of(show_form(PaintConfig, restore=session).box)
    assert "roller = 1" in shown
    assert "silk" in shown


def test_a_secret_is_neither_shown_nor_saved_nor_among_the_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHED_KEY", raising=False)
    session = Session.create("wall", root=tmp_path)
    form = show_form(PaintConfig, restore=session)
    widget(form, "shed_key").value = "open-sesame"
    form.update(coats=3)
    assert form.config().shed_key == "open-sesame"
    assert "shed_key" not in form.values()
    saved = b"".join(path.read_bytes() for path in session.folder.rglob("*") if path.is_file())
    assert b"coats" in saved
    assert b"open-sesame" not in saved


def test_a_secret_of_the_environment_need_not_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHED_KEY", "under-the-mat")
    assert show_form(PaintConfig).config().shed_key == "under-the-mat"


# -------------------------------------------------------------------------------------------- ipywidgets


def test_without_ipywidgets_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(DependencyMissing) as caught:
        show_form(PaintConfig)
    assert "pip install" in caught.value.hint


@pytest.mark.skipif("FASTSD_INNER_TESTS" in os.environ, reason="this is the inner run")
def test_everything_here_holds_on_colabs_ipywidgets_7_too() -> None:
    if not WIDGETS7.is_dir():
        pytest.skip(f"{WIDGETS7.name} is not there; `make setup` makes it")
    environment = os.environ | {"PYTHONPATH": str(WIDGETS7), "FASTSD_INNER_TESTS": "1"}
    version = "import ipywidgets; print(ipywidgets.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", version], capture_output=True, text=True, env=environment, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "7.7.1"
    files = [
        str(ROOT / "tests" / name)
        for name in ("test_forms.py", "test_forms_notebook.py", "test_known_values.py", "test_desk.py")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "passed" in done.stdout


# ---------------------------------------------------------------------------------- what the notebook's cells call


@pytest.fixture
def first_cell(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`set_up` on a machine whose installation and examination are what the test says."""
    seen: dict[str, Any] = {"report": InstallReport("dreambooth", "3.13", Path("p"), (), 11, 0, 0.1, "none", (), ())}

    def install(name: str, *, skip: tuple[str, ...]) -> InstallReport:
        seen.update(name=name, skip=skip)
        return seen["report"]

    said = {"gpu": "Tesla T4", "processor": "2 cores", "memory": "13.6 GB"}
    warning = Finding("warning", "Little room.", "Delete something.")
    found = Diagnosis(said, {"python": "3.13.15", "torch": "2.11.0"}, (Finding("note", "No matter."), warning))
    monkeypatch.setattr(readiness, "install", install)
    # For the whole process, and this one goes on with other tests.
    monkeypatch.setattr(readiness, "quieten_libraries", lambda: seen.update(quiet=True))
    monkeypatch.setattr(readiness, "examine", lambda **options: found)
    monkeypatch.setattr(readiness, "_DRIVERS", (Path(__file__),))
    return seen


def test_the_first_cell_installs_and_says_in_a_few_lines_what_this_machine_is(
    first_cell: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readiness.set_up("dreambooth")
    assert (first_cell["name"], first_cell["skip"], first_cell["quiet"]) == ("dreambooth", (), True)
    assert capsys.readouterr().err.splitlines() == [
        "This machine: GPU Tesla T4; 2 cores, 13.6 GB of memory; python 3.13.15, torch 2.11.0.",
        "⚠ Little room.",
        "   → Delete something.",
        "No problems found. Full report: fastsd doctor",
    ]
    monkeypatch.setattr(readiness, "_DRIVERS", ())
    readiness.set_up("trocr")
    assert (first_cell["name"], first_cell["skip"]) == ("trocr", ("bitsandbytes",))


def test_the_first_cell_says_what_it_installed_and_asks_for_a_restart_where_one_is_needed(
    first_cell: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    change = Change("pillow-heif", None, "1.8.1", 5_700_000, "fastsd needs pillow-heif>=0.18")
    first_cell["report"] = replace(first_cell["report"], changes=(change,), bytes=5_700_000, restart=("pillow-heif",))
    with pytest.raises(InstallError, match="Restart the runtime now: pillow-heif") as caught:
        readiness.set_up("dreambooth")
    assert "Restart session" in caught.value.hint
    said = capsys.readouterr().err
    assert "pillow-heif 1.8.1  (5.7 MB; fastsd needs pillow-heif>=0.18)" in said
    assert "No problems found" not in said


def test_a_session_is_made_once_and_opened_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    made = open_session(SessionConfig(session_name="rex"))
    made.save(seed=7)
    again = open_session(SessionConfig(session_name="rex"))
    assert again.folder == made.folder == Path.cwd() / "Fast-Dreambooth" / "Sessions" / "rex"
    assert again.record["seed"] == 7
    assert "Created the session rex" in caplog.text
    assert "Resuming rex, last used just now" in caplog.text


def test_a_session_name_that_cannot_be_a_folder_is_refused() -> None:
    with pytest.raises(SessionError):
        open_session(SessionConfig(session_name="../up"))


def test_in_colab_the_session_is_on_drive_unless_that_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(notebook, "where", lambda: "colab")
    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    monkeypatch.setattr(notebook, "mount_drive", lambda *, shared_drive: asked.append(shared_drive))
    on_drive = notebook.sessions_root(tmp_path / "drive")
    real_root = notebook.sessions_root
    monkeypatch.setattr(
        notebook, "sessions_root", lambda root=None, *, shared_drive="": real_root(root) if root else on_drive
    )
    assert open_session(SessionConfig(session_name="rex")).folder == on_drive / "rex"
    assert open_session(SessionConfig(session_name="cat", google_drive=False)).folder.is_relative_to(Path.cwd())
    open_session(SessionConfig(session_name="team", shared_drive="TrainingContext"))
    assert asked == [None, "TrainingContext"]


def test_photos_that_were_given_are_prepared_and_are_not_the_demo(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos").mkdir()
    image.effect_noise((96, 96), 60).convert("RGB").save(tmp_path / "photos" / "rex.png")
    session = Session.create("rex", root=tmp_path)
    assert prepare_pictures(PrepareConfig(images=str(tmp_path / "photos"), size=64), session).size == 64
    assert Session.open("rex", root=tmp_path).record["dataset"]["demo"] is False


def test_without_photos_the_demos_are_prepared_and_the_session_knows_it(tmp_path: Path) -> None:
    session = Session.create("rex", root=tmp_path)
    made = prepare_pictures(PrepareConfig(), session)
    assert (made.train, made.held_out, made.size) == (6, 6, 128)
    assert Session.open("rex", root=tmp_path).record["dataset"]["demo"] is True


def test_a_cell_that_gets_the_form_of_another_cell_says_which_cell_to_run() -> None:
    session = Session.create("rex")
    calls = ((open_session, (PrepareConfig(),)), (prepare_pictures, (SessionConfig(), session)))
    for call, words in calls:
        with pytest.raises(SettingsError) as caught:
            call(*words)
        assert type(words[0]).__name__ in caught.value.problem
        assert re.fullmatch(r"Run cell [23]a first, then this one\.", caught.value.hint)


@pytest.mark.parametrize("settings", [SessionConfig, PrepareConfig, DreamBoothConfig])
def test_every_form_of_the_notebook_gives_its_defaults_untouched_and_restores_what_was_entered(
    settings: type, tmp_path: Path
) -> None:
    session = Session.create("rex", root=tmp_path)
    form = show_form(settings, restore=session)
    untouched = settings(session_name="my-subject") if settings is SessionConfig else settings()
    assert form.config() == untouched
    assert show_form(settings, restore=Session.open("rex", root=tmp_path)).config() == untouched


def test_no_text_of_a_view_and_no_log_line_below_a_cell_breaks_inside_a_word_that_has_room() -> None:
    rules = dict(re.findall(r"([^{}]+)\{([^{}]*)\}", read_style()))
    named = {selector.strip(): values for selector, values in rules.items()}
    # "anywhere" counts a letter as the narrowest that a box may become, "break-word" a word.
    assert "overflow-wrap:break-word" in named[".fastsd-notice"]
    for selector in (".fastsd pre", ".jp-Notebook .jp-OutputArea-output pre"):
        assert "word-break:normal" in named[selector]
    assert "break-all" not in read_style()
