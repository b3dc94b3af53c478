"""A person comes back: kernel or machine is a new one, and "Run all" goes on with the same session and photos."""

import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from faults.fingerprints import hash_file
from test_desk import errors_of
from test_notebooks import ROOT, code_cells, titles

from fastsd_helpers.dreambooth import train
from fastsd_helpers.dreambooth.dataset.prepared import recorded_images
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig
from fastsd_helpers.dreambooth.photos.browser_uploads import save_uploads
from fastsd_helpers.dreambooth.results.hub_upload import UploadConfig
from fastsd_helpers.dreambooth.results.learned import ExportConfig
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import SessionNotFound, SessionUnfinished, SettingsError, VerificationFailed
from fastsd_helpers.forms import (
    RunConfig,
    SessionConfig,
    desk,
    disconnect_when_safe,
    export_model,
    open_session,
    prepare_pictures,
    run_training,
    show_disconnect,
    show_form,
    show_photos_form,
    show_playground,
    show_prepared,
    show_result,
    upload_model,
)
from fastsd_helpers.playground.page import PlaygroundConfig
from fastsd_helpers.sessions import Session

pytest.importorskip("ipywidgets")
Image = pytest.importorskip("PIL.Image")

NOTEBOOK = ROOT / "notebooks" / "dreambooth.ipynb"


def photo(seed: int, size: tuple[int, int] = (120, 80)) -> bytes:
    data = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])).save(data, "PNG")
    return data.getvalue()


def photos(folder: Path, count: int = 5) -> Path:
    folder.mkdir()
    for number in range(1, count + 1):
        (folder / f"zib robot ({number}).png").write_bytes(photo(number))
    return folder


@pytest.fixture
def session() -> Session:
    return open_session(SessionConfig(session_name="rex"))


def come_back() -> tuple[Session, Any]:
    """A new kernel runs 2a to 3a untouched."""
    desk.clear()
    session = open_session(SessionConfig())
    return session, show_photos_form(session)


def sources(session: Session) -> list[str]:
    return sorted(Path(item["source"]).name for item in recorded_images(session))


# ------------------------------------------------------------------------------------------------- photos


def test_own_photos_are_never_replaced_by_the_robot(session: Session, tmp_path: Path) -> None:
    form = show_photos_form(session)
    form.update(images=str(photos(tmp_path / "mine")), size=64)
    prepare_pictures(form.config(), session)
    before = {path.name: path.read_bytes() for path in session.instance_images.iterdir()}
    for lost in (False, True):  # the folder is on another machine
        if lost:
            shutil.rmtree(tmp_path / "mine")
        again, form = come_back()
        made = prepare_pictures(form.config(), again)
        assert again.record["dataset"]["demo"] is False
        assert {path.name: path.read_bytes() for path in again.instance_images.iterdir()} == before
        assert made.contact_sheet.is_file()
    assert prepare_pictures(PrepareConfig(), again).train + made.held_out == 5, "nor when the form was emptied"
    assert again.record["dataset"]["demo"] is False


def test_uploads_are_taken_though_the_form_names_none_and_replace_the_robot(session: Session) -> None:
    prepare_pictures(PrepareConfig(), session)
    assert session.record["dataset"]["demo"] is True
    save_uploads(session, [(f"rex ({number}).png", photo(number)) for number in (1, 2, 3, 4)])
    prepare_pictures(PrepareConfig(size=64), session)
    assert session.record["dataset"]["demo"] is False
    assert sources(session) == [f"rex ({number}).png" for number in (1, 2, 3, 4)]


def test_uploads_of_a_copied_or_renamed_session_are_its_own(session: Session) -> None:
    form = show_photos_form(session)
    save_uploads(session, [(f"rex ({number}).png", photo(number)) for number in (1, 2, 3)])
    form.update(images=str(session.folder / "uploads"), size=64)
    form.config()
    session.folder.rename(session.folder.with_name("rexy"))
    again, form = come_back()
    assert again.name == "rexy"
    prepare_pictures(form.config(), again)
    assert sources(again) == [f"rex ({number}).png" for number in (1, 2, 3)]


def test_while_a_training_is_unfinished_the_same_photos_stay_as_they_were_prepared(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    folder = photos(tmp_path / "mine")
    config = PrepareConfig(images=str(folder), size=64)
    prepare_pictures(config, session)
    recorded = recorded_images(session)
    session.save(run=1, progress={"stage": "unet", "step": 3, "steps": 9})
    prepare_pictures(config, session)
    assert "A training was started with these images" in caplog.text
    assert recorded_images(session) == recorded
    (folder / "zib robot (6).png").write_bytes(photo(6))
    caplog.clear()
    prepare_pictures(config, session)
    assert len(recorded_images(session)) == 6, "another photo is the user's wish"


def test_the_contact_sheet_is_shown_with_words(session: Session, tmp_path: Path) -> None:
    made = prepare_pictures(PrepareConfig(images=str(photos(tmp_path / "mine")), size=64), session)
    shown = "".join(str(child.value) for child in show_prepared(made).box.children)
    assert 'alt="Contact sheet of the 5 prepared images with their prompts"' in shown
    assert "data:image/jpeg;base64," in shown


def test_the_cells_of_a_copy_of_the_earlier_notebook_still_work(tmp_path: Path) -> None:
    form = show_form(SessionConfig)
    session = open_session(form.config())
    assert session.name == "my-subject"
    form = show_photos_form(session)
    form.update(images=str(photos(tmp_path / "mine")), size=64)
    pictures = prepare_pictures(form.config(), session)
    assert pictures.contact_sheet.is_file()
    form = show_form(DreamBoothConfig, restore=session)
    form.update(unet_steps=3)
    assert form.config().unet_steps == 3
    with pytest.raises(SettingsError, match="cell 4") as caught:
        open_session(form.config())
    assert caught.value.hint == "Run cell 2a first, then this one."


# ------------------------------------------------------------------------------------------------- the result


def finished(session: Session) -> Session:
    """A session as a finished training leaves it."""
    import hashlib

    content = b"weights of " + session.name.encode()
    names = {"path": "exports/rex.safetensors", "grid": "samples/g.png", "loss_plot": "logs/loss.png",
             "model_card": "exports/README.md"}  # fmt: skip
    for name in names.values():
        (session.folder / name).write_bytes(content if name.endswith("tensors") else photo(1))
    digest = hashlib.sha256(content).hexdigest()
    session.save(result={**names, "run": 1, "sha256": digest, "loss_before": 0.5, "loss_after": 0.25})
    return session


def test_the_result_is_shown_from_the_session_after_a_restart(session: Session) -> None:
    finished(session)
    again, _form = come_back()
    view = show_result(again)
    assert view.lines[0].startswith("rex: rex.safetensors, ")
    assert "0.5000 before, 0.2500 after" in view.lines[2]
    shown = "".join(str(child.value) for child in view.box.children)
    assert shown.count("data:image") == 2
    for words in ("The same prompts and noise before and after the training of rex", "Loss of rex: 0.5000 before"):
        assert f'alt="{words}' in shown
    assert "PosixPath" not in shown
    assert "never" not in view.lines[2], "a session of an earlier version does not say what it was judged on"
    again.save(result=again.record["result"] | {"judged_on": "training images, reserved noise"})
    assert "Loss on training images, reserved noise: 0.5000 before" in show_result(again).lines[2]


def test_before_the_end_and_after_stop_the_result_says_what_to_run(session: Session) -> None:
    with pytest.raises(SessionUnfinished, match="has not been finished yet") as caught:
        show_result(session)
    assert caught.value.hint.startswith("Run cell 5b")
    session.save(progress={"stage": "unet", "step": 22, "steps": 200})
    for cell in (show_result, show_disconnect):
        with pytest.raises(SessionUnfinished, match="stopped after U-Net step 22 of 200") as caught:
            cell(session)
        assert caught.value.hint.startswith("Run cell 5b")


def test_a_result_that_was_lost_or_changed_says_so(session: Session) -> None:
    finished(session)
    (session.folder / "exports" / "rex.safetensors").write_bytes(b"cut")
    with pytest.raises(SessionUnfinished, match=r"rex.safetensors or an image next to it is missing"):
        show_result(session)
    with pytest.raises(VerificationFailed):
        show_disconnect(session)


def test_a_session_that_is_gone_says_so_in_every_cell_and_is_not_made_anew(session: Session, tmp_path: Path) -> None:
    """Its drive was disconnected, or it was renamed there: what it holds is neither missing nor to be trained again."""
    elsewhere = session.folder.rename(tmp_path / "elsewhere")
    cells = {
        "prepare": lambda: prepare_pictures(PrepareConfig(images=str(tmp_path)), session),
        "train": lambda: run_training(DreamBoothConfig(base_model="demo"), session, RunConfig()),
        "the library's train": lambda: train(DreamBoothConfig(base_model="demo"), session),
        "result": lambda: show_result(session),
        "try": lambda: show_playground(PlaygroundConfig(), session),
        "export": lambda: export_model(ExportConfig(), session),
        "upload": lambda: upload_model(UploadConfig(repo="somebody/zib"), session),
        "disconnect": lambda: show_disconnect(session),
    }
    for name, run in cells.items():
        with pytest.raises(SessionNotFound, match="is no longer in") as caught:
            run()
        assert "cell 2a" in caught.value.hint, name
        assert not session.folder.exists(), name
    assert elsewhere.is_dir()


def test_no_other_sessions_result_is_shown(session: Session) -> None:
    finished(session)
    cat = open_session(SessionConfig(session_name="cat"))
    with pytest.raises(SessionUnfinished, match="The training of cat"):
        show_result(cat)


def test_the_disconnect_works_from_the_session_and_in_its_old_forms(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    import types

    caplog.set_level("INFO", logger="fastsd_helpers")
    finished(session)
    result = types.SimpleNamespace(path=session.folder / session.record["result"]["path"],
                                   sha256=session.record["result"]["sha256"])  # fmt: skip
    assert disconnect_when_safe(session) is False
    assert disconnect_when_safe(result, session, disconnect=False) is False
    assert disconnect_when_safe(result, session, disconnect=True) is False, "this is not Colab"
    assert caplog.text.count("Safe: ") == 3
    view = show_disconnect(session)
    assert "shut down the kernel" in view._message.value
    view._end()
    assert "could not be disconnected from here" in view._message.value


# ------------------------------------------------------------------------------------------------- real kernels

TINY = {"unet_steps": 4, "text_encoder_steps": 0, "sample_every": 0, "base_model": "demo"}


class Visit:
    """One kernel in which the notebook's own cells are run, as often and in whatever order a person likes."""

    def __init__(self, folder: Path) -> None:
        nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
        self._new_cell = nbformat.v4.new_code_cell
        self._cells = dict(zip(titles(NOTEBOOK), code_cells(NOTEBOOK), strict=True))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.notebook = nbformat.v4.new_notebook()
        self._client = nbclient.NotebookClient(
            self.notebook, timeout=900, allow_errors=True, resources={"metadata": {"path": str(folder)}}
        )
        self._kernel = self._client.setup_kernel(env=environment)

    def __enter__(self) -> "Visit":
        self._kernel.__enter__()
        self.run("from fastsd_helpers import start_log\nstart_log()")  # as the first cell does
        return self

    def __exit__(self, *error: Any) -> None:
        self._kernel.__exit__(*error)

    def run(self, *numbers: str) -> str:
        """Run cells by their number ("2a"), or code of one's own; returns what is shown, and an error's sentence."""
        shown = []
        for number in numbers:
            cell = self._new_cell(self._cells.get(number, number))
            self.notebook.cells.append(cell)
            self._client.execute_cell(cell, len(self.notebook.cells) - 1)
            for out in cell.outputs:
                data = out.get("data", {})
                widget = data.get("application/vnd.jupyter.widget-view+json")
                shown.append(self._texts_of(widget["model_id"]) if widget else str(out.get("text", data)))
            shown += errors_of(type("Cells", (), {"cells": [cell]}))
        return "\n".join(shown)

    def _texts_of(self, model: str) -> str:
        """What a widget and those in it show."""
        state = self._client.widget_state.get(model, {})
        inside = [str(name).removeprefix("IPY_MODEL_") for name in state.get("children", ())]
        return "\n".join([str(state.get("value", "")), *map(self._texts_of, inside)])

    def run_all(self) -> str:
        """Every cell from top to bottom; stops at the first error, as JupyterLab does."""
        shown = []
        for number in self._cells:
            if number != "1":
                shown.append(self.run(number))
                if any(out["output_type"] == "error" for out in self.notebook.cells[-1].outputs):
                    break
        return "\n".join(shown)


def record_of(session: Path) -> dict[str, Any]:
    return json.loads((session / "session.json").read_text())


# The stop of a person at the second step: the child is asked as the Stop button asks it.
STOP_AFTER_TWO = """
from fastsd_helpers.dreambooth.running.child_process import TrainingChild
_wait = TrainingChild.wait
def wait(self, what, *, between=lambda: None, every_s=0.2):
    asked = []
    def look():
        between()
        if not asked and self.live().step >= 2:
            asked.append(self.stop())
    return _wait(self, what, between=look, every_s=0.02)
TrainingChild.wait = wait
"""


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_cells_in_any_order_stop_and_a_restart_end_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    mine = photos(tmp_path / "mine")
    weights = [
        hash_file(train_in_any_order(tmp_path / "one-go", mine)),
        hash_file(train_with_a_cut(tmp_path / "cut", mine)),
    ]
    assert weights[0] == weights[1]


def train_in_any_order(folder: Path, mine: Path) -> Path:
    """Cells run too early and out of order, forms edited without being drawn anew; then one training in one go."""
    folder.mkdir()
    sessions = folder / "Fast-Dreambooth" / "Sessions"
    with Visit(folder) as visit:
        assert "✗ Run cells 2a, 2b, 4 and 5a first" in visit.run("5b")
        assert "✗ Run cells 2a and 2b first" in visit.run("6")
        visit.run("2a", "session_form.update(session_name='rex')", "2b", "3a")
        visit.run(f"photos_form.update(images={str(mine)!r}, size=64)", "3b", "4", "5a")
        visit.run(f"settings_form.update(**{TINY})")
        visit.run("session_form.update(session_name='owl')")
        assert "Cell 2a shows the session owl now, and the session rex is open." in visit.run("5b")
        visit.run("2b")
        assert "This form belongs to the session rex, and owl is open now." in visit.run("5b")
        assert "This form belongs to the session rex" in visit.run("3b")
        visit.run("session_form.update(session_name='rex')", "2b")
        assert "rex.safetensors" in visit.run("5b", "6")
        said = visit.run("2b", "3b", "6", "11")
        assert "✗" not in said, "once more, without being drawn anew"
    assert not list((sessions / "owl" / "exports").iterdir())
    assert not list((sessions / "owl" / "instance_images").iterdir())
    return sessions / "rex" / "exports" / "rex.safetensors"


def train_with_a_cut(folder: Path, mine: Path) -> Path:
    """Stopped at its second step; then a new kernel, in which all cells are run untouched."""
    folder.mkdir()
    sessions = folder / "Fast-Dreambooth" / "Sessions"
    with Visit(folder) as visit:
        visit.run("2a", "session_form.update(session_name='rex')", "2b", "3a")
        visit.run(f"photos_form.update(images={str(mine)!r}, size=64)", "3b", "4")
        visit.run(f"settings_form.update(**{TINY})", "5a")
        said = visit.run(STOP_AFTER_TWO, "5b", "6")
        assert "Stopped" in said
        assert "The training of rex has not been finished" in said
        assert "Run cell 5b" in said
    assert record_of(sessions / "rex")["progress"]["step"] < 4
    with Visit(folder) as visit:
        said = visit.run_all()
    assert "Resuming rex, last used" in said
    assert "A training was started with these images" in said
    assert "robot are used" not in said
    assert "rex.safetensors" in said
    for raw in ("✗", "PosixPath", "'text/plain': 'False'", "'text/plain': '[]'", "'text/plain': \"{", "Result("):
        assert raw not in said
    assert [path.name for path in sessions.iterdir() if path.is_dir()] == ["rex"]
    assert record_of(sessions / "rex")["dataset"]["demo"] is False
    return sessions / "rex" / "exports" / "rex.safetensors"
