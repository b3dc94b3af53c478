"""The notebook's form that looks at a model file or converts it, and a page's button that says how long it takes."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers import demo
from fastsd_helpers.errors import CheckpointError, FastSDError, ModelError, SettingsError
from fastsd_helpers.forms import ModelFileConfig, look_or_convert
from fastsd_helpers.forms.widgets import page_view
from fastsd_helpers.tunnels import LocalPage
from fastsd_helpers.webui import InstallConfig

pytest.importorskip("ipywidgets")

MODEL = demo.MODEL_FOLDER if hasattr(demo, "MODEL_FOLDER") else Path(demo.__file__).parent / "model"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", logger="fastsd_helpers")
    return caplog


def test_left_as_it_is_the_cell_says_that_there_is_nothing_to_do(said: pytest.LogCaptureFixture) -> None:
    assert look_or_convert(ModelFileConfig()) is None
    assert said.messages == ["No file was given, so there is nothing to inspect."]


def test_a_folder_becomes_one_file_which_is_looked_at_and_becomes_a_folder(
    said: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    one = tmp_path / "one.safetensors"
    assert look_or_convert(ModelFileConfig(file=str(MODEL), write_to=str(one), number_format="fp16")) is None
    assert one.is_file()
    assert f"Written, read back and compared: {one}" in said.text
    said.clear()
    assert look_or_convert(ModelFileConfig(file=str(one), every_number=True)) is None
    for words in ("one.safetensors: ", "million parameters", "Its hash: ", "SHA-256 "):
        assert words in said.text
    look_or_convert(ModelFileConfig(file=str(one), write_to=str(tmp_path / "folder"), lends=str(MODEL)))
    assert (tmp_path / "folder" / "model_index.json").is_file()
    said.clear()
    look_or_convert(ModelFileConfig(file=str(tmp_path / "folder")))
    assert "folder: a Diffusers folder of sd15" in said.text
    with pytest.raises(FastSDError, match=r"exists|there already") as caught:
        look_or_convert(ModelFileConfig(file=str(one), write_to=str(tmp_path / "folder")))
    assert "Traceback" not in str(caught.value)
    for text in said.messages:
        for raw in ("PosixPath(", "CheckpointFile(", "Inspection(", "--"):
            assert raw not in text


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (None, SettingsError),
        ("folder", (CheckpointError, ModelError)),
        (b"", CheckpointError),
        (b"<!DOCTYPE html>" * 9, CheckpointError),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{}", (CheckpointError, ModelError)),
    ],
    ids=["not there", "a folder", "empty", "a page", "cut"],
)
def test_what_is_no_model_file_is_a_sentence(tmp_path: Path, made: Any, error: Any) -> None:
    path = tmp_path / "m.safetensors"
    if made == "folder":
        path.mkdir()
    elif made is not None:
        path.write_bytes(made)
    with pytest.raises(error) as caught:
        look_or_convert(ModelFileConfig(file=str(path)))
    assert caught.value.hint


def test_a_name_to_write_to_needs_a_file_and_another_form_is_refused() -> None:
    with pytest.raises(SettingsError, match="write_to needs a file"):
        ModelFileConfig(write_to="x.safetensors")
    with pytest.raises(SettingsError, match="This cell got the form of"):
        look_or_convert(InstallConfig())  # type: ignore[arg-type]


def test_a_page_that_takes_long_to_open_says_how_long_and_what_the_library_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_view, "_TELL_EVERY_S", 0.01)
    shown, go_on = [], threading.Event()

    class Page(LocalPage):
        def __init__(self) -> None:
            pass

        def close(self) -> None:
            shown.append("ended")

    def start() -> LocalPage:
        logging.getLogger("fastsd_helpers").warning("The weights are read.")
        assert go_on.wait(60)
        return Page()

    view = page_view.PageView("playground", start, lambda page: ("http://127.0.0.1:1", "User: x"))

    def note(change: Any) -> None:
        shown.append(change["new"])
        if "The weights are read." in change["new"]:
            go_on.set()

    view._message.observe(note, names="value")
    view._open.click()
    assert any("Loading the model… 0 s. The weights are read." in text for text in shown)
    assert "http://127.0.0.1:1" in view._message.value
    before = len(shown)
    view._close.click()
    assert "Closed." in view._message.value
    assert "ended" in shown[before:], "the page itself is closed"
    assert [text for text in shown[before:] if "Loading" in text] == [], "nothing is said after it is open"


def test_a_page_that_cannot_be_opened_says_why_and_can_be_tried_again() -> None:
    def start() -> LocalPage:
        raise ModelError("There is no model <x>.", "Choose another one.")

    def where(page: LocalPage) -> tuple[str, str]:
        raise AssertionError(page)

    view = page_view.PageView("playground", start, where)
    view._open.click()
    assert "There is no model &lt;x&gt;." in view._message.value
    assert "Choose another one." in view._message.value
    assert not view._open.disabled
