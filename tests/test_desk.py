"""The notebook's memory: forms drawn anew, the session that is open, and the cell that makes what another one needs."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_notebooks import NOTEBOOKS, code_cells, without_magics

from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import SessionError, SettingsError
from fastsd_helpers.forms import ReadingSessionConfig, RunConfig, SessionConfig, desk, open_reading, open_session
from fastsd_helpers.forms.desk import MAKERS
from fastsd_helpers.forms.widgets.form import show_form
from fastsd_helpers.options import check, option
from fastsd_helpers.sessions import Session

pytest.importorskip("ipywidgets")


@dataclass(frozen=True)
class PaintConfig:
    """What a wall gets."""

    coats: int = option(2, help="layers", low=1, high=9)
    colour: str = option("white", help="any")
    glossy: bool = option(False, help="shines")

    def __post_init__(self) -> None:
        check(self)


def titled(source: str) -> str:
    """The number in a cell's title: "2a" of "# @title 2a · Choose the session"."""
    return source.removeprefix("# @title ").split(" ")[0]


def made_by(source: str) -> set[str]:
    """The variables that a cell makes at its top level, and not for itself alone."""
    tree = ast.parse(without_magics(source))
    return {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


# ------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_table_names_the_cell_that_makes_each_variable_other_cells_read(path: Path) -> None:
    cells = code_cells(path)[1:]
    made: dict[str, str] = {}
    for source in cells:
        made |= dict.fromkeys(made_by(source), titled(source))
        read = {node.id for node in ast.walk(ast.parse(without_magics(source)))
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}  # fmt: skip
        for name in read & made.keys():
            assert name in MAKERS, f"{path.name}: {name} is read in {titled(source)}"
            assert MAKERS[name].cell == made[name], f"{path.name}: {name}"


def test_a_form_in_the_table_is_the_one_that_its_cell_draws() -> None:
    drawn = {
        "show_photos_form": "PrepareConfig",
        "show_lines_form": "ReadPicturesConfig",
        "show_teach_form": "TeachConfig",
        "show_store_form": "StoreConfig",
        "show_ui_form": "InstallConfig",
        "show_start_form": "LaunchConfig",
    }
    for path in NOTEBOOKS:
        for source in code_cells(path)[1:]:
            for name in made_by(source) & MAKERS.keys():
                known = MAKERS[name].settings.split()
                words = {word for word in drawn if f"{word}(" in source}
                assert not known or any(f"({word}" in source for word in known) or drawn[words.pop()] in known


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["session"], "✗ Run cell 2b first: it makes `session`."),
        (["session_form", "session"], "✗ Run cells 2a and 2b first: they make `session_form` and `session`."),
        (["pictures"], "✗ Run cell 3b first: it makes `pictures`."),
        (["settings_form", "run_form", "session"],
         "✗ Run cells 4, 5a and 2b first: they make `settings_form`, `run_form` and `session`."),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_with_the_cells_to_run(names: list[str], sentence: str) -> None:
    assert desk.say_missing(names) == sentence


# ------------------------------------------------------------------------------------------------- the kernel


def run_cells(cells: list[str], folder: Path, *, allow_errors: bool = True) -> Any:
    """Run cells in one kernel, going on after those that fail."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(
        notebook, timeout=300, allow_errors=allow_errors, resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def errors_of(notebook: Any) -> list[str]:
    """What each cell's error shows; "" for a cell that went well."""
    shown = []
    for cell in notebook.cells:
        texts = ["\n".join(out["traceback"]) for out in cell.outputs if out["output_type"] == "error"]
        shown.append("".join(texts))
    return shown


@pytest.mark.notebook
def test_in_a_kernel_a_cell_without_its_predecessor_says_which_one_to_run(tmp_path: Path) -> None:
    cells = [
        "from fastsd_helpers import run_training\nresult = run_training(settings_form.config(), session, run_form)",
        "from fastsd_helpers import show_space\nshow_space(session)",
        "sesion",  # somebody's own: as ever
        "def mine():\n    return session\nmine()",
        "session_form = 1",
        "session",
        "import fastsd_helpers.forms.desk as desk\ndesk.attend_errors()\ndesk.attend_errors()\npictures",
        "1 / 0",
        "print('still here')",
    ]
    notebook = run_cells(cells, tmp_path)
    shown = errors_of(notebook)
    assert shown[0] == (
        "✗ Run cells 2a, 2b, 4 and 5a first: they make `session_form`, `session`, `settings_form` and `run_form`."
    )
    assert shown[1] == "✗ Run cells 2a and 2b first: they make `session_form` and `session`."
    assert "name 'sesion' is not defined" in shown[2]
    assert "Traceback" in shown[2]
    assert "name 'session' is not defined" in shown[3]
    assert "Run cell" not in shown[3]
    assert shown[5] == "✗ Run cell 2b first: it makes `session`."
    assert shown[6] == "✗ Run cell 3b first: it makes `pictures`."
    assert "ZeroDivisionError" in shown[7]
    assert shown[8] == ""


@pytest.mark.notebook
def test_a_stop_is_said_in_plain_words_without_the_box_of_an_error_and_run_all_ends_there(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    hint = "Train again with the same session to resume."
    stopped = f"raise Interrupted('Stopped at unet step 5 of 9; everything is saved.', {hint!r})"
    cells = [f"import fastsd_helpers.forms\nfrom fastsd_helpers.errors import Interrupted\n{stopped}", "print('on')"]
    notebook = run_cells(cells, tmp_path)
    (said,) = notebook.cells[0].outputs
    assert (said["output_type"], said["name"]) == ("stream", "stdout")
    assert said["text"] == (
        "Stopped at unet step 5 of 9; everything is saved.\n"
        "Run the training cell again to resume, in a new kernel too.\n"
    )
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="Stopped at unet step 5"):
        run_cells(cells, tmp_path, allow_errors=False)


@pytest.mark.notebook
def test_the_handler_that_somebody_else_has_put_there_still_gets_its_errors(tmp_path: Path) -> None:
    cells = [
        "def tell(shell, kind, error, trace, tb_offset=None):\n    print('mine:', error)\n"
        "get_ipython().set_custom_exc((KeyError,), tell)",
        "from fastsd_helpers import show_form\n{}['gone']",
        "webui",
    ]
    notebook = run_cells(cells, tmp_path)
    assert "mine: 'gone'" in json.dumps(notebook.cells[1].outputs)
    assert errors_of(notebook)[2] == "✗ Run cells 2a and 2b first: they make `store_form` and `webui`."


# ------------------------------------------------------------------------------------------------- forms drawn anew


def test_a_form_drawn_anew_keeps_what_was_typed_then_what_the_session_saved_then_the_defaults(tmp_path: Path) -> None:
    session = Session.create("wall", root=tmp_path)
    first = show_form(PaintConfig, restore=session)
    first.update(coats=5)
    first.config()
    desk.clear()  # a new kernel
    second = show_form(PaintConfig, restore=Session.open("wall", root=tmp_path))
    assert second.values() == {"coats": 5, "colour": "white", "glossy": False}
    second.update(colour="red", glossy=True)
    third = show_form(PaintConfig, restore=Session.open("wall", root=tmp_path))
    assert third.values() == {"coats": 5, "colour": "red", "glossy": True}


def test_what_was_typed_and_is_wrong_is_there_to_be_mended(tmp_path: Path) -> None:
    session = Session.create("wall", root=tmp_path)
    show_form(PaintConfig, restore=session).update(coats="many")
    again = show_form(PaintConfig, restore=session)
    assert again.values()["coats"] == "many"
    with pytest.raises(SettingsError, match="coats"):
        again.config()


def test_a_value_set_back_to_its_default_stays_so(tmp_path: Path) -> None:
    session = Session.create("wall", root=tmp_path)
    show_form(PaintConfig, restore=session).update(coats=7)
    show_form(PaintConfig, restore=session).update(coats=2)
    assert show_form(PaintConfig, restore=session).values()["coats"] == 2


def test_what_was_typed_for_one_session_is_not_shown_for_another(tmp_path: Path) -> None:
    wall, door = Session.create("wall", root=tmp_path), Session.create("door", root=tmp_path)
    show_form(PaintConfig, restore=wall).update(colour="red")
    assert show_form(PaintConfig, restore=door).values()["colour"] == "white"
    assert show_form(PaintConfig, restore=wall).values()["colour"] == "red"


def test_a_form_that_keeps_nothing_in_the_session_remembers_within_the_kernel_and_per_session() -> None:
    open_session(SessionConfig(session_name="wall"))
    show_form(PaintConfig).update(colour="red")
    assert show_form(PaintConfig).values()["colour"] == "red"
    door = open_session(SessionConfig(session_name="door"))
    assert show_form(PaintConfig).values()["colour"] == "white"
    assert "forms" not in door.record


def test_only_what_was_entered_is_kept_and_counts_as_given(tmp_path: Path) -> None:
    session = Session.create("wall", root=tmp_path)
    form = show_form(DreamBoothConfig, restore=session)
    form.update(unet_steps=7)
    form.config()
    assert session.record["forms"]["DreamBoothConfig"] == {"unet_steps": 7}


def test_a_form_kept_by_an_earlier_version_gives_its_values_and_claims_no_more(tmp_path: Path) -> None:
    session = Session.create("wall", root=tmp_path)
    session.save(forms={"PaintConfig": {"coats": 4, "colour": "white", "glossy": False}})
    form = show_form(PaintConfig, restore=session)
    assert form.values() == {"coats": 4, "colour": "white", "glossy": False}
    assert form._given() == {"coats"}


# ------------------------------------------------------------------------------------------------- the right session


def test_a_form_of_another_session_says_which_cell_to_run() -> None:
    rex = open_session(SessionConfig(session_name="rex"))
    settings, run = show_form(DreamBoothConfig, restore=rex), show_form(RunConfig)
    open_session(SessionConfig(session_name="cat"))
    for form, cell in ((settings, "cell 4"), (run, "cell 5a")):
        with pytest.raises(SettingsError, match="belongs to the session rex, and cat is open now") as caught:
            form.config()
        assert caught.value.hint.startswith(f"Run {cell} again")
    open_session(SessionConfig(session_name="rex"))
    assert settings.config() == DreamBoothConfig()


def test_a_form_further_up_can_be_edited_at_any_time_without_being_drawn_anew() -> None:
    choosing = show_form(SessionConfig)
    choosing.update(session_name="rex")
    rex = open_session(choosing.config())
    settings = show_form(DreamBoothConfig, restore=rex)
    settings.update(unet_steps=3)
    choosing.update(session_name="cat")
    assert open_session(choosing.config()).name == "cat"
    choosing.update(session_name="rex")
    assert open_session(choosing.config()).name == "rex"
    settings.update(unet_steps=9)
    assert settings.config().unet_steps == 9


def test_another_name_in_2a_without_2b_trains_nothing() -> None:
    choosing = show_form(SessionConfig)
    choosing.update(session_name="rex")
    rex = open_session(choosing.config())
    settings = show_form(DreamBoothConfig, restore=rex)
    choosing.update(session_name="cat")
    with pytest.raises(SettingsError, match="Cell 2a shows the session cat now, and the session rex is open") as caught:
        settings.config()
    assert caught.value.hint.startswith("Run cell 2b")
    choosing.update(session_name=" rex ")
    assert settings.config() == DreamBoothConfig()
    choosing.update(google_drive=False)
    with pytest.raises(SettingsError, match="another place"):
        settings.config()


def test_after_a_2b_that_failed_no_form_serves_the_session_that_was_open_before() -> None:
    rex = open_session(SessionConfig(session_name="rex"))
    settings = show_form(DreamBoothConfig, restore=rex)
    with pytest.raises(SessionError):
        open_session(SessionConfig(session_name="../up"))
    with pytest.raises(SettingsError, match="No session is open") as caught:
        settings.config()
    assert caught.value.hint == "Run cell 2b."


def test_without_a_notebooks_session_forms_work_for_any_session(tmp_path: Path) -> None:
    forms = [show_form(PaintConfig, restore=Session.create(name, root=tmp_path)) for name in ("a", "b")]
    assert [form.config().coats for form in forms] == [2, 2]


def test_a_reading_session_is_the_open_one_too() -> None:
    first = open_reading(ReadingSessionConfig(session_name="letters"))
    form = show_form(PaintConfig, restore=first)  # type: ignore[arg-type]
    open_reading(ReadingSessionConfig(session_name="diary"))
    with pytest.raises(SettingsError, match="letters, and diary is open"):
        form.config()


def test_what_is_done_once_is_emptied_in_the_form_that_asked_for_it() -> None:
    open_session(SessionConfig(session_name="rex"))
    form = show_form(RunConfig)
    form.update(more_steps=5)
    desk.untick(RunConfig, more_steps=None, start_over=False)
    assert form.config() == show_form(RunConfig).config() == RunConfig()
