"""What the notebook's cells show: uploads, crops, captions, the live view, export, free space, disconnecting."""

import base64
import datetime
import hashlib
import html
import io
import json
import random
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
from test_forms import text_of
from test_importing import old_session

from fastsd_helpers import forms
from fastsd_helpers.dreambooth.dataset.prepared import load_dataset
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig
from fastsd_helpers.dreambooth.photos.browser_uploads import list_uploads, save_uploads
from fastsd_helpers.dreambooth.results.hub_upload import UploadConfig
from fastsd_helpers.dreambooth.results.learned import ExportConfig
from fastsd_helpers.dreambooth.running.engine import TrainResult
from fastsd_helpers.dreambooth.running.live import Live
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import (
    DriveReadOnly,
    FastSDError,
    Interrupted,
    SessionError,
    SettingsError,
    TrainingFailed,
    VerificationFailed,
)
from fastsd_helpers.forms import RunConfig, SessionConfig, desk, open_session, playground, prepare_pictures, show_form
from fastsd_helpers.forms.dreambooth import caption_editor, exporting, training
from fastsd_helpers.forms.dreambooth.live_view import LiveView
from fastsd_helpers.forms.dreambooth.uploading import uploaded_files
from fastsd_helpers.forms.widgets import work_view
from fastsd_helpers.forms.widgets.loss_curve import draw_loss_curve
from fastsd_helpers.forms.widgets.view import in_words
from fastsd_helpers.playground import PlaygroundConfig
from fastsd_helpers.processes import LocalProcess
from fastsd_helpers.sessions import Session, list_sessions

ipywidgets = pytest.importorskip("ipywidgets")
Image = pytest.importorskip("PIL.Image")

IS_7 = ipywidgets.__version__.startswith("7.")


def photo(seed: int = 1, size: tuple[int, int] = (120, 80)) -> bytes:
    data = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])).save(data, "PNG")
    return data.getvalue()


def upload_value(files: dict[str, bytes]) -> Any:
    """What the browser's files are in FileUpload.value of this ipywidgets."""
    if IS_7:
        return {name: {"metadata": {"name": name}, "content": data} for name, data in files.items()}
    about = {"type": "", "last_modified": datetime.datetime.now(datetime.UTC)}
    return tuple(
        {**about, "name": name, "size": len(data), "content": memoryview(data)} for name, data in files.items()
    )


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session.create("rex", root=tmp_path / "sessions")


@pytest.fixture
def prepared(session: Session) -> Session:
    save_uploads(session, [(f"zib dog ({number}).png", photo(number)) for number in (1, 2, 3)])
    form = forms.show_photos_form(session)
    form.update(images=str(session.folder / "uploads"), size=64)
    prepare_pictures(form.config(), session)
    return session


def find(box: Any, kind: str, words: str = "") -> Any:
    """The first widget of a kind whose description holds some words."""
    if type(box).__name__ == kind and words in str(getattr(box, "description", "")):
        return box
    for child in getattr(box, "children", ()):
        if (found := find(child, kind, words)) is not None:
            return found
    return None


# ------------------------------------------------------------------------------------------------- uploads


def test_both_shapes_of_an_upload_are_read() -> None:
    assert uploaded_files({"a.png": {"content": b"1"}}) == [("a.png", b"1")]
    assert uploaded_files(({"name": "a.png", "content": memoryview(b"1")},)) == [("a.png", b"1")]
    assert uploaded_files(()) == uploaded_files({}) == []


def test_what_is_uploaded_is_in_the_session_at_once_and_becomes_the_setting(session: Session) -> None:
    form = forms.show_photos_form(session)
    button = find(form.box, "FileUpload")
    button.set_trait("value", upload_value({"zib dog (1).png": photo(1), "zib dog (1).txt": b"zib dog on a beach"}))
    assert form.config().images == str(session.folder / "uploads")
    assert "1 uploaded photo in this session, 1 with a caption" in text_of(form.box)
    again = forms.show_photos_form(Session.open("rex", root=session.folder.parent))
    assert again.config().images == str(session.folder / "uploads"), "also after a restart"
    again.update(size=64)
    prepare_pictures(again.config(), session)
    assert load_dataset(session).train[0].prompt == "zib dog on a beach"


def test_a_second_upload_adds_and_says_what_it_left_out(session: Session) -> None:
    form = forms.show_photos_form(session)
    button = find(form.box, "FileUpload")
    button.set_trait("value", upload_value({"a.png": photo(1)}))
    button.set_trait(
        "value", upload_value({"copy of a.png": photo(1), "a.png": photo(2), "film.mp4": b"x", "empty.jpg": b""})
    )
    names = [path.name for path in list_uploads(session)]
    assert names == ["a (2).png", "a.png"]
    shown = text_of(form.box)
    for words in ("copy of a.png: is here already as a.png", "film.mp4: is not an image", "empty.jpg: is empty"):
        assert words in shown


def send_pieces(bridge: Any, name: str, data: bytes, size: int) -> list[str]:
    """Hand a file to the bridge as the page's own code does; returns the answers."""
    answers = []
    for number, offset in enumerate(range(0, max(len(data), 1), size), start=1):
        part = base64.b64encode(data[offset : offset + size]).decode()
        piece = {"n": number, "name": name, "offset": offset, "size": len(data), "data": part}
        bridge._field.value = json.dumps(piece)
        answers.append(bridge._ack.value)
    return answers


def test_a_file_in_pieces_arrives_whole_and_every_piece_is_answered(session: Session) -> None:
    form = forms.show_photos_form(session)
    answers = send_pieces(form._bridge, "zib dog (1).png", photo(1), 1000)
    assert len(answers) > 20
    assert all(f'data-n="{number}"' in answer for number, answer in enumerate(answers, start=1))
    assert list_uploads(session)[0].read_bytes() == photo(1)
    assert form.config().images == str(session.folder / "uploads")
    send_pieces(form._bridge, "nothing.png", b"", 1000)
    assert "nothing.png: is empty" in text_of(form.box)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "{}",
        '{"n": 1, "name": "a.png", "offset": 5, "size": 9, "data": ""}',
        '{"n": 1, "name": "a.png", "offset": 0, "size": 99999999999, "data": ""}',
        '{"n": 1, "name": "a.png", "offset": 0, "size": 3, "data": "???"}',
    ],
)
def test_a_piece_that_does_not_fit_is_neither_kept_nor_answered(session: Session, text: str) -> None:
    form = forms.show_photos_form(session)
    form._bridge._field.value = text
    assert form._bridge._ack.value == ""
    assert list_uploads(session) == []


def test_a_zip_is_unpacked_safely(session: Session) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("dogs/zib (1).png", photo(1))
        archive.writestr("dogs/zib (1).txt", "zib at home")
    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../../evil.png", photo(2))
    report = save_uploads(session, [("dogs.zip", data.getvalue()), ("evil.zip", evil.getvalue())])
    assert report.saved == ("zib (1).png", "zib (1).txt")
    assert report.skipped[0][0] == "evil.zip"
    assert not list(session.folder.parent.parent.rglob("evil*"))


@pytest.mark.parametrize("name", ["../../up.png", "/etc/up.png", "C:\\up.png", "con.png", "\x00.png"])
def test_a_hostile_name_stays_in_the_uploads_folder(session: Session, name: str) -> None:
    saved = save_uploads(session, [(name, photo(1))]).saved
    assert [path.name for path in list_uploads(session)] == list(saved)
    assert len(saved) == 1


def test_uploads_can_be_removed_again(session: Session) -> None:
    form = forms.show_photos_form(session)
    find(form.box, "FileUpload").set_trait("value", upload_value({"a.png": photo(1)}))
    find(form.box, "Button", "Remove all").click()
    assert len(list_uploads(session)) == 1, "it asks first"
    find(form.box, "Button", "Yes, remove all").click()
    assert list_uploads(session) == []
    assert form.config().images == ""


# ------------------------------------------------------------------------------------------------ run all again


def test_prepared_pictures_stay_when_no_new_photos_are_named(
    prepared: Session, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    before = prepared.record["dataset"]["id"]
    result = prepare_pictures(PrepareConfig(), prepared)
    assert (result.train, result.size) == (3, 64)
    assert prepared.record["dataset"]["id"] == before
    assert "the 3 images that are prepared in this session are used" in caplog.text


def test_prepared_pictures_stay_when_the_named_photos_are_gone(prepared: Session, tmp_path: Path) -> None:
    assert prepare_pictures(PrepareConfig(images=str(tmp_path / "gone"), size=64), prepared).train == 3


def test_pictures_stay_while_their_training_runs(prepared: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsd_helpers.forms.dreambooth.notebook.find_training", lambda session: object())
    before = prepared.record["dataset"]["id"]
    with prepared.lock():  # `prepare` itself would be refused
        assert prepare_pictures(PrepareConfig(images=str(prepared.folder / "uploads")), prepared).train == 3
    assert prepared.record["dataset"]["id"] == before


def test_the_demo_is_prepared_again_when_it_was_the_demo(session: Session) -> None:
    assert prepare_pictures(PrepareConfig(), session).train == 6
    assert prepare_pictures(PrepareConfig(), session).train == 6
    assert Session.open("rex", root=session.folder.parent).record["dataset"]["demo"] is True


def test_crops_of_the_demos_pictures_stay_too(session: Session) -> None:
    prepare_pictures(PrepareConfig(), session)
    editor = forms.edit_crops(session)
    editor._hidden.value = "4,4,100"
    find(editor.box, "Button", "Use these crops").click()
    before = session.record["dataset"]["id"]
    prepare_pictures(PrepareConfig(), session)
    assert session.record["dataset"]["id"] == before
    assert session.record["dataset"]["demo"] is True


def test_a_session_of_the_old_notebook_opens_and_uses_its_own_pictures() -> None:
    root = Path.cwd() / "Fast-Dreambooth" / "Sessions"
    old_session(root / "my_dog")
    session = open_session(SessionConfig(session_name="my dog"))
    assert session.record["imported"]["by"] == "fast-DreamBooth"
    assert prepare_pictures(PrepareConfig(size=64), session).train == 3
    assert Session.open("my_dog", root=root).record["dataset"]["demo"] is False
    assert open_session(SessionConfig(session_name="my_dog")).record["id"] == session.record["id"]


def test_a_session_from_elsewhere_is_imported_once_and_opened_from_then_on(tmp_path: Path) -> None:
    origin = old_session(tmp_path / "shared" / "my_dog")
    config = SessionConfig(session_name="rex", import_from=str(origin))
    first = open_session(config)
    assert first.record["imported"]["from"] == str(origin)
    assert open_session(config).record["id"] == first.record["id"]


# ------------------------------------------------------------------------------------------------------ crops


def test_a_dragged_box_is_used_when_the_pictures_are_prepared_again(prepared: Session) -> None:
    editor = forms.edit_crops(prepared)
    editor._choice.value = "zib dog (2).png"
    editor._hidden.value = "33,0,40"  # what the page writes at the end of a drag
    assert editor.boxes == {"zib dog (2).png": (33, 0, 73, 40)}
    assert [editor._sliders[name].value for name in ("left", "top", "side")] == [33, 0, 40]
    find(editor.box, "Button", "Use these crops").click()
    items = {item["source"]: item for item in prepared.record["dataset"]["images"]}
    assert items["zib dog (2).png"]["box"] == [33, 0, 73, 40]
    assert items["zib dog (2).png"]["method"] == "box"
    assert items["zib dog (1).png"]["method"] != "box"
    assert "1 with a crop of your own" in editor._message.value
    with Image.open(prepared.folder / items["zib dog (2).png"]["file"]) as made:
        expected = Image.open(io.BytesIO(photo(2))).crop((33, 0, 73, 40)).resize((64, 64), Image.Resampling.LANCZOS)
        assert made.tobytes() == expected.tobytes()


def test_of_whole_photos_the_crop_editor_says_why_there_is_nothing_to_correct(prepared: Session) -> None:
    form = forms.show_photos_form(prepared)
    form.update(crop="none")
    prepare_pictures(form.config(), prepared)
    editor = forms.edit_crops(prepared)
    assert "no crop to correct" in editor._message.value
    assert "✗" not in editor._message.value
    assert editor._controls.layout.display == "none"


def test_sliders_do_the_same_and_never_leave_the_photo(prepared: Session) -> None:
    editor = forms.edit_crops(prepared)
    name = editor._choice.value
    editor._sliders["side"].value = 32
    editor._sliders["left"].value = 88
    editor._sliders["top"].value = 48
    assert editor.boxes[name] == (88, 48, 120, 80)
    editor._sliders["side"].value = 80
    assert editor.boxes[name] == (40, 0, 120, 80), "moved back into the photo"


def test_crops_of_mine_survive_the_next_run_and_go_when_they_are_given_up(prepared: Session) -> None:
    editor = forms.edit_crops(prepared)
    name = editor._choice.value
    editor._hidden.value = "1,2,50"
    find(editor.box, "Button", "Use these crops").click()
    form = forms.show_photos_form(prepared)
    prepare_pictures(form.config(), prepared)  # the cells are run again
    again = forms.edit_crops(prepared)
    assert again.boxes == {name: (1, 2, 51, 52)}
    find(again.box, "Button", "Automatic").click()
    find(again.box, "Button", "Use these crops").click()
    assert forms.edit_crops(prepared).boxes == {}


def test_boxes_that_are_not_used_yet_are_there_when_the_cell_is_run_again(prepared: Session) -> None:
    editor = forms.edit_crops(prepared)
    name, other = editor._choice.value, editor._choice.options[1][1]
    editor._hidden.value = "1,2,50"
    editor._choice.value = other
    editor._choice.value = name
    assert editor.boxes == {name: (1, 2, 51, 52)}
    again = forms.edit_crops(Session.open("rex", root=prepared.folder.parent))
    assert again.boxes == {name: (1, 2, 51, 52)}
    assert "not applied yet" in again._message.value
    find(again.box, "Button", "Use these crops").click()
    assert Session.open("rex", root=prepared.folder.parent).record.get("crop_draft") in (None, {})
    third = forms.edit_crops(prepared)
    third._forget()
    assert forms.edit_crops(prepared).boxes == {}, "that a box was given up is held too"


def test_boxes_held_for_other_photos_are_passed_over(prepared: Session) -> None:
    prepared.save(crop_draft={"gone.png": [0, 0, 9, 9], "zib dog (1).png": [0, 0, 5000, 5000], "zib dog (2).png": "?"})
    editor = forms.edit_crops(prepared)
    assert set(editor.boxes) <= {"zib dog (1).png"}
    editor._choice.value = "zib dog (1).png"
    assert editor._sliders["side"].value <= 80


def test_a_drag_does_not_draw_the_picture_anew_and_so_keeps_the_keyboard_on_the_square(prepared: Session) -> None:
    editor = forms.edit_crops(prepared)
    before = editor._picture.value
    editor._hidden.value = "1,2,50"
    assert editor._picture.value == before
    editor._sliders["left"].value = 20
    assert editor._picture.value != before


@pytest.mark.parametrize("text", ["", "a,b,c", "1,2", "999,999,999", "-50,-50,10"])
def test_what_a_page_may_write_never_breaks_the_editor(prepared: Session, text: str) -> None:
    editor = forms.edit_crops(prepared)
    editor._hidden.value = text
    for left, top, right, bottom in editor.boxes.values():
        assert 0 <= left < right <= 120
        assert 0 <= top < bottom <= 80


def test_photos_that_are_gone_are_a_sentence(prepared: Session) -> None:
    for path in list_uploads(prepared):
        path.unlink()
    editor = forms.edit_crops(prepared)
    assert "no longer where it was" in editor._message.value


def test_an_editor_without_pictures_says_what_to_do(session: Session) -> None:
    assert "Prepare your photos first: the cell that reads the photos" in forms.edit_crops(session)._message.value
    assert "Prepare your photos first: the cell that reads the photos" in text_of(forms.edit_captions(session).box)


# --------------------------------------------------------------------------------------------------- captions


def test_a_caption_is_changed_and_taken_back(prepared: Session) -> None:
    editor = forms.edit_captions(prepared)
    assert editor._table.value.count("zib dog") >= 3
    name = editor._choice.value
    editor._text.value = "zib dog  on <b>Mars</b>"
    editor._save.click()
    assert (prepared.captions / f"{Path(name).stem}.txt").read_text() == "zib dog on <b>Mars</b>\n"
    assert "&lt;b&gt;Mars" in editor._table.value
    assert "<b>Mars" not in editor._table.value, "shown as text"
    assert "zib dog on <b>Mars</b>" in {image.prompt for image in load_dataset(prepared).train}
    editor._text.value = ""
    editor._save.click()
    assert {image.prompt for image in load_dataset(prepared).train} == {"zib dog"}


def test_after_the_training_has_begun_the_editor_warns(prepared: Session) -> None:
    prepared.save(progress={"stage": "unet", "step": 4, "steps": 9})
    editor = forms.edit_captions(prepared)
    editor._text.value = "zib dog at sea"
    editor._save.click()
    assert "choose 'start over'" in html.unescape(editor._message.value)


def test_typed_words_are_kept_when_another_photo_is_shown_and_when_the_cell_is_run_again(prepared: Session) -> None:
    editor = forms.edit_captions(prepared)
    first, second = editor._choice.options[:2]
    editor._choice.value = first
    editor._text.value = "zib dog in the snow"
    editor._choice.value = second
    assert editor._text.value != "zib dog in the snow"
    editor._choice.value = first
    assert editor._text.value == "zib dog in the snow"
    editor._text.value = "zib dog in the rain"
    again = forms.edit_captions(prepared)
    again._choice.value = first
    assert again._text.value == "zib dog in the rain"
    assert (prepared.captions / f"{Path(first).stem}.txt").read_text() == "zib dog in the rain\n"


def test_words_that_cannot_be_saved_are_held_and_saved_later(
    prepared: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = forms.edit_captions(prepared)
    first, second = editor._choice.options[:2]
    real = caption_editor.set_caption

    def refuse(*_words: object) -> None:
        raise DriveReadOnly("The folder cannot be written.", "Ask for edit access to this folder")

    monkeypatch.setattr(caption_editor, "set_caption", refuse)
    editor._text.value = "zib dog in the snow"
    assert "not saved yet" in editor._message.value
    assert "Ask for edit access" in editor._message.value
    editor._choice.value = second
    assert editor._text.value == ""
    editor._choice.value = first
    assert editor._text.value == "zib dog in the snow"
    monkeypatch.setattr(caption_editor, "set_caption", real)
    editor._save.click()
    assert (prepared.captions / f"{Path(first).stem}.txt").read_text() == "zib dog in the snow\n"


def test_looking_at_photos_writes_no_caption(prepared: Session) -> None:
    editor = forms.edit_captions(prepared)
    for name in editor._choice.options:
        editor._choice.value = name
    assert not list(prepared.captions.glob("*.txt"))


def test_next_goes_through_the_photos_and_says_when_it_is_the_last(prepared: Session) -> None:
    editor = forms.edit_captions(prepared)
    names = list(editor._choice.options)
    for number, name in enumerate(names):
        assert editor._choice.value == name
        editor._text.value = f"zib dog {number} times"
        editor._next.click()
    assert "the last photo" in editor._message.value
    assert [(prepared.captions / f"{Path(name).stem}.txt").read_text() for name in names] == [
        f"zib dog {number} times\n" for number in range(len(names))
    ]


def test_one_prompt_for_all_photos_asks_before_it_replaces_words_and_can_be_taken_back(prepared: Session) -> None:
    editor = forms.edit_captions(prepared)
    first, second = editor._choice.options[:2]
    editor._choice.value = second
    editor._text.value = "zib dog at sea"
    editor._choice.value = first
    editor._text.value = "a photo of zib dog"
    editor._all.click()
    assert second in editor._message.value, "whose words would be lost is said first"
    assert "zib dog at sea" in {image.prompt for image in load_dataset(prepared).train}
    editor._all.click()
    assert {image.prompt for image in load_dataset(prepared).train} == {"a photo of zib dog"}
    assert editor._undo.layout.display != "none"
    editor._undo.click()
    assert "zib dog at sea" in {image.prompt for image in load_dataset(prepared).train}
    third = prepared.captions / f"{Path(editor._choice.options[2]).stem}.txt"
    assert {image.path.stem: image.prompt for image in load_dataset(prepared).train}[third.stem] == "zib dog"


def test_one_prompt_for_all_without_words_of_your_own_needs_one_press(prepared: Session) -> None:
    editor = forms.edit_captions(prepared)
    editor._text.value = "a photo of zib dog"
    editor._all.click()
    assert {image.prompt for image in load_dataset(prepared).train} == {"a photo of zib dog"}


def test_words_beyond_what_the_model_reads_are_said(prepared: Session) -> None:
    prepared.save(base_model={"ref": "demo"})
    editor = forms.edit_captions(prepared)
    editor._text.value = "zib dog " + "very " * 90
    assert "of 77 tokens" in editor._message.value
    assert "is ignored" in editor._message.value
    assert "over 77 tokens" in editor._table.value


def test_every_picture_has_words_for_those_who_do_not_see_it(prepared: Session) -> None:
    for view in (forms.edit_captions(prepared), forms.edit_crops(prepared)):
        drawn = text_of(view.box)
        tags = [tag for tag in re.findall(r"<img[^>]*>", drawn) if "display:none" not in tag]
        assert tags
        assert all(re.search(r'alt="[^"]+"', tag) for tag in tags), tags


# -------------------------------------------------------------------------------------------------- live view


def live(**values: Any) -> Live:
    own = {"process": LocalProcess(1, "1"), "stage": "unet", "step": 30, "steps": 100, "seconds_left": 125.0}
    return Live(**own | values)


def test_the_view_shows_progress_time_loss_memory_and_words(session: Session) -> None:
    view = LiveView()
    shown = live(losses={"unet": [(1, 0.5), (30, 0.25)]}, host_bytes=3 * 2**30, gpu_bytes=2**31, messages=["saved"])
    view.show_run(shown, {"text_encoder": 20, "unet": 100}, session.samples, force=True)
    text = text_of(view.box)
    assert "U-Net (part 2 of 2): step 30 of 100, about 2 min left" in text
    assert (view._bar.done, view._bar.total) == (50, 120)
    assert 'aria-valuenow="42"' in text
    for words in ("loss 0.3750", "GPU memory 2.0 GiB", "memory 3.0 GiB", "saved", "<svg", "polyline"):
        assert words in text


def test_what_was_under_way_is_said_until_the_next_message_or_the_end_and_the_rest_stays(session: Session) -> None:
    view = LiveView()
    said = ["Saved.", "Generating images before and after: 2 each, 4 denoising steps ..."]
    view.show_run(live(messages=said), {"unet": 100}, session.samples)
    assert "Generating images" in view._message.value
    said.append("Generating before and after: 74 % ...")
    view.show_run(live(messages=said), {"unet": 100}, session.samples)
    assert "74 %" in view._message.value
    assert "denoising steps" not in view._message.value
    ended = [*said, "DONE: rex.safetensors was read back and verified (9 tensors, sha256 0123...)."]
    view.show_run(live(messages=ended), {"unet": 100}, session.samples)
    for words, there in (("Saved.", True), ("74 %", False), ("DONE: rex.safetensors", True)):
        assert (words in view._message.value) == there
    view.show_run(live(messages=said), {"unet": 100}, session.samples)
    view.end("Done", good=True)
    assert "Saved." in view._message.value
    assert "Generating" not in view._message.value
    view.end("Done", good=True, keep=False)
    assert not view._message.value


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (Live(), "Starting the training"),
        (Live(process=LocalProcess(1, "1")), "Loading the model"),
        (live(stage="text_encoder", step=20, steps=20), "Text encoder is trained; U-Net is next"),
        (live(step=100), "writing the file"),
        (live(stage="text_encoder", step=2, steps=20), "about 2 min left in this part"),
    ],
)
def test_the_view_says_in_which_part_it_is(session: Session, state: Live, words: str) -> None:
    view = LiveView()
    view.show_run(state, {"text_encoder": 20, "unet": 100}, session.samples)
    assert words in view._head.value


def test_the_view_says_how_many_processes_share_the_training(session: Session) -> None:
    view = LiveView()
    view.show_run(live(), {"unet": 100}, session.samples, processes=2)
    assert "2 processes" in view._facts.value
    view.show_run(live(), {"unet": 100}, session.samples)
    assert "processes" not in view._facts.value


def test_the_newest_sample_is_shown_small(session: Session) -> None:
    view = LiveView()
    Image.new("RGB", (4096, 1024), "red").save(session.samples / "unet-000010.png")
    (session.samples / "unet-000020.png").write_bytes(b"half a picture")
    (session.samples / "unet-000020.png").touch()
    view.show_run(live(), {"unet": 100}, session.samples, force=True)
    Image.new("RGB", (4096, 1024), "blue").save(session.samples / "unet-000030.png")
    view.show_run(live(), {"unet": 100}, session.samples, force=True)
    data = base64.b64decode(re.search(r"base64,([^\"]+)", view._sample.value)[1])
    with Image.open(io.BytesIO(data)) as picture:
        assert max(picture.size) <= 1024
        assert picture.getpixel((5, 5))[2] > 200
    assert "unet-000030" in view._sample_title.value


def test_a_loss_curve_is_drawn_for_any_numbers() -> None:
    assert "no step yet" in draw_loss_curve({}, {})
    odd = [(1, float("nan")), (2, 0.0), (3, float("inf")), (4, 1e-9), (5, 1e9)]
    for steps in ({}, {"unet": 5}):
        drawn = draw_loss_curve({"unet": odd, "text_encoder": [(1, 0.2)]}, steps)
        assert "nan" not in drawn
        assert "inf" not in drawn


@pytest.mark.parametrize(
    ("seconds", "words"), [(12.4, "12 s"), (89, "89 s"), (125, "2 min"), (3900, "65 min"), (7500, "2 h 05 min")]
)
def test_time_is_said_as_people_do(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


class Pretended:
    """A child that takes five looks; it suffices because `run_training` only calls what is here (test_child.py)."""

    def __init__(self, session: Session, outcome: Any) -> None:
        self.session, self.outcome, self.asked = session, outcome, []

    def live(self) -> Live:
        return live(step=5)

    def stop(self) -> None:
        self.asked.append("stop")

    def kill(self) -> None:
        self.asked.append("kill")

    def is_running(self) -> bool:
        return True

    def wait(self, what: str, *, between: Any) -> Any:
        for _ in range(5):
            between()
        if isinstance(self.outcome, list):
            raise self.outcome.pop(0)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> list[LiveView]:
    made: list[LiveView] = []

    class Kept(LiveView):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(training, "LiveView", Kept)
    return made


def result_of(session: Session) -> TrainResult:
    path = session.exports / "rex.safetensors"
    path.write_bytes(b"model")
    sha256 = hashlib.sha256(b"model").hexdigest()
    return TrainResult(path, sha256, path, path, path, 0.2, 0.1, 0, 3, 1.0)


def test_a_running_training_is_shown_not_started_again(
    session: Session, monkeypatch: pytest.MonkeyPatch, views: list[LiveView]
) -> None:
    child = Pretended(session, result_of(session))
    monkeypatch.setattr(training, "find_training", lambda session: child)
    monkeypatch.setattr(training, "start_training", lambda *a, **k: pytest.fail("started a second one"))
    assert training.run_training(DreamBoothConfig(), session) == child.outcome
    assert "Done: rex.safetensors" in views[0]._head.value
    assert views[0]._bar.done == views[0]._bar.total


def test_stop_asks_to_save_and_a_second_press_ends_at_once(
    session: Session, monkeypatch: pytest.MonkeyPatch, views: list[LiveView]
) -> None:
    child = Pretended(session, Interrupted("Stopped at unet step 5.", "Go on."))
    monkeypatch.setattr(training, "find_training", lambda session: child)
    looks = []

    def press() -> None:
        looks.append(1)
        if len(looks) in (2, 4):
            find(views[0].box, "Button").click()

    monkeypatch.setattr(work_view, "answer_widgets", press)
    with pytest.raises(Interrupted, match="Stopped at unet step 5"):
        training.run_training(DreamBoothConfig(), session)
    assert child.asked == ["stop", "kill"]
    assert "Stopped: run this cell again to resume" in views[0]._head.value


def test_interrupting_the_cell_stops_and_waits_and_twice_leaves_it_saving(
    session: Session, monkeypatch: pytest.MonkeyPatch, views: list[LiveView]
) -> None:
    for outcome, words in (
        ([KeyboardInterrupt(), Interrupted("Stopped at 5.", "")], "Stopped at 5"),
        ([KeyboardInterrupt(), KeyboardInterrupt()], "interrupted twice"),
    ):
        child = Pretended(session, outcome)
        monkeypatch.setattr(training, "find_training", lambda session, child=child: child)
        with pytest.raises(Interrupted, match=words):
            training.run_training(DreamBoothConfig(), session)
        assert child.asked == ["stop"]


def test_a_failure_is_said_once_below_the_cell_and_a_finished_run_shows_its_losses(
    session: Session, monkeypatch: pytest.MonkeyPatch, views: list[LiveView]
) -> None:
    child = Pretended(session, TrainingFailed("Memory ran out.", "Change batch_size."))
    Image.new("RGB", (30, 20), "red").save(session.logs / "loss.png")
    session.save(result={"loss_plot": "logs/loss.png"})
    monkeypatch.setattr(Pretended, "live", lambda self: Live())
    monkeypatch.setattr(training, "find_training", lambda session: child)
    with pytest.raises(TrainingFailed):
        training.run_training(DreamBoothConfig(), session)
    shown = text_of(views[0].box)
    assert "the reason is below" in views[0]._head.value
    assert "Memory ran out." not in shown, "the cell's own error says it"
    assert "no step yet" not in shown
    assert 'alt="the losses of the entire run"' in shown
    with pytest.raises(SettingsError, match="ExportConfig"):
        training.run_training(ExportConfig(), session)  # type: ignore[arg-type]


def test_what_was_asked_for_once_is_taken_back_when_it_has_begun_and_not_when_it_was_refused(
    session: Session, monkeypatch: pytest.MonkeyPatch, views: list[LiveView]
) -> None:
    form = show_form(RunConfig)
    form.update(more_steps=20, more_text_encoder_steps=5, disconnect_when_done=True)
    asked: list[dict[str, Any]] = []
    child = Pretended(session, FastSDError("Refused.", "Otherwise."))
    child.live = Live
    monkeypatch.setattr(training, "find_training", lambda session: None)
    monkeypatch.setattr(training, "start_training", lambda *_, **words: asked.append(words) or child)
    monkeypatch.setattr(training, "disconnect_when_safe", lambda *_, **words: asked.append(words))
    with pytest.raises(FastSDError, match="Refused"):
        training.run_training(DreamBoothConfig(), session, form.config())
    assert (form.values()["more_steps"], form.values()["more_text_encoder_steps"]) == (20, 5), "for another try"
    child.outcome = result_of(session)
    training.run_training(DreamBoothConfig(), session, form.config())
    more = {"more_steps": 20, "more_text_encoder_steps": 5}
    assert asked == [{"restart": False, "take_over": False, **more}] * 2 + [{"disconnect": True}]
    assert form.config() == RunConfig(), "Run all a second time goes on and does nothing twice"
    form.update(start_over=True)
    child.outcome = Interrupted("Stopped at unet step 5.", "Go on.")
    with pytest.raises(Interrupted):
        training.run_training(DreamBoothConfig(), session, form.config())
    assert asked[-1]["restart"] is True
    assert form.config() == RunConfig()
    assert "RunConfig" not in session.record.get("forms", {})
    with pytest.raises(SettingsError, match="exclude each other"):
        RunConfig(more_steps=1, start_over=True)


def test_a_form_gives_what_was_typed_and_what_the_session_kept_and_no_default(session: Session) -> None:
    from fastsd_helpers.dreambooth.settings import given_values

    form = show_form(DreamBoothConfig, restore=session)
    assert given_values(form.config()) == {}
    form.update(seed=42, flip=False, unet_lr=1e-5)
    assert given_values(form.config()) == {"unet_lr": 1e-5, "seed": 42, "flip": False}
    desk.clear()  # a new kernel
    again = show_form(DreamBoothConfig, restore=Session.open(session.name, root=session.folder.parent))
    assert {"seed": 42, "unet_lr": 1e-5}.items() <= given_values(again.config()).items()


# -------------------------------------------------------------------------------- export, upload, space, the end


def test_what_training_wrote_is_not_written_twice(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        exporting, "export", lambda config, session: asked.append(config) or types.SimpleNamespace(path=1, sha256=2)
    )
    monkeypatch.setattr(exporting, "finished_result", lambda session, run: {"path": "rex.safetensors"})
    assert forms.export_model(ExportConfig(), session) is None
    assert asked == []
    forms.export_model(ExportConfig(dtype="fp32"), session)
    assert asked == [ExportConfig(dtype="fp32", overwrite=True)], "the cell may be run twice"


class Pages:
    """`open_playground`, whose real page is tested in test_playground.py; here it only has to be opened and closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, PlaygroundConfig]] = []
        self.closed = 0
        self.error: FastSDError | None = None
        monkeypatch.setattr(playground, "open_playground", self._open)

    def _open(self, ref: str, config: PlaygroundConfig) -> Any:
        if self.error is not None:
            raise self.error
        self.asked.append((ref, config))
        page = types.SimpleNamespace(url="http://127.0.0.1:7/", tunnel=None, block=lambda: "Link: <here>")
        page.close = lambda: setattr(self, "closed", self.closed + 1)
        return page


def test_the_playground_opens_and_closes_by_its_buttons(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(monkeypatch)
    view = forms.show_playground(PlaygroundConfig(), session)
    assert pages.asked == [], "running all cells opens nothing"
    find(view.box, "Button", "Open").click()
    find(view.box, "Button", "Open").click()
    assert pages.asked == [(str(session.folder), PlaygroundConfig())]
    assert 'href="http://127.0.0.1:7/"' in view._message.value
    assert "&lt;here&gt;" in view._message.value
    find(view.box, "Button", "Close").click()
    assert (pages.closed, view.page) == (1, None)
    pages.error = SessionError("The session rex has no finished model yet.", "Train it.")
    find(view.box, "Button", "Open").click()
    assert "no finished model yet" in view._message.value
    assert not view._open.disabled


def test_in_colab_the_playground_is_for_its_user_alone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(monkeypatch)
    monkeypatch.setattr(playground, "where", lambda: "colab")
    monkeypatch.setattr(playground, "in_notebook", lambda: True)
    forms.show_playground(PlaygroundConfig(), session).open()
    forms.show_playground(PlaygroundConfig(share="gradio"), session).open()
    assert [config.share for _ref, config in pages.asked] == ["colab", "gradio"]


def test_without_a_name_nothing_is_uploaded(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="fastsd_helpers")
    assert forms.upload_model(UploadConfig(), session) is None
    assert "Nothing was uploaded" in caplog.text


def test_a_session_is_deleted_only_after_a_second_press(session: Session) -> None:
    other = Session.create("cat", root=session.folder.parent)
    (other.samples / "a.png").write_bytes(b"x" * 5000)
    view = forms.show_space(session)
    labels = dict((value, label) for label, value in view._choice.options)
    assert "5." in labels[("cat", None)]
    assert "(this one)" in labels[("rex", None)]
    view._choice.value = ("cat", None)
    assert view._sure.layout.display == "none"
    view._delete.click()
    assert "Delete the session cat" in view._message.value
    assert other.folder.is_dir()
    view._choice.value = ("rex", None)
    assert view._sure.layout.display == "none", "another choice asks again"
    view._choice.value = ("cat", None)
    view._delete.click()
    view._sure.click()
    assert [item.name for item in list_sessions(session.folder.parent)] == ["rex"]
    assert "trash" not in view._message.value, "this is not a Drive"


def test_what_is_said_of_room_on_drive_is_true_of_what_was_deleted(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsd_helpers.drive.mount_kind", lambda _folder: "drive")
    for name in ("000001-unet-000001", "000002-unet-000002"):
        (session.checkpoints / name).mkdir()
        (session.checkpoints / name / "unet.safetensors").write_bytes(b"x" * 5000)
    Session.create("cat", root=session.folder.parent)
    view = forms.show_space(session)
    assert "Checkpoints free their space by themselves" in view._head.value
    assert "finished files count on Google Drive until its trash is emptied" in view._head.value
    view._choice.value = ("rex", "000001-unet-000001")
    view._delete.click()
    view._sure.click()
    assert "Deleted: 5.0 kB. Checkpoints free their space by themselves" in view._message.value
    assert "trash" not in view._message.value
    view._choice.value = ("cat", None)
    view._delete.click()
    view._sure.click()
    assert "drive.google.com/drive/trash" in view._message.value


def test_a_running_session_is_not_deleted(session: Session) -> None:
    view = forms.show_space(session)
    view._choice.value = ("rex", None)
    with session.lock():
        view._sure.click()
    assert "in use" in view._message.value
    assert session.folder.is_dir()


class Colab:
    """`google.colab` with what ends a runtime; it suffices because both calls take and give nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None
        colab = types.ModuleType("google.colab")
        colab.runtime = types.SimpleNamespace(unassign=lambda: self.calls.append("unassign"))
        colab.drive = types.SimpleNamespace(flush_and_unmount=self._flush)
        for name, module in (("google", types.ModuleType("google")), ("google.colab", colab)):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("fastsd_helpers.runtime.in_notebook", lambda: True)
        (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
        monkeypatch.setattr("fastsd_helpers.drive.MOUNT_POINTS", (tmp_path / "drive",))

    def _flush(self) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append("flush")


def test_the_machine_goes_back_only_when_the_model_is_safe(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    colab, result = Colab(monkeypatch, tmp_path), result_of(session)
    assert forms.disconnect_when_safe(result, session, disconnect=False) is False
    assert colab.calls == []
    assert forms.disconnect_when_safe(result, session, disconnect=True) is True
    assert colab.calls == ["flush", "unassign"]
    result.path.write_bytes(b"half")
    with pytest.raises(VerificationFailed, match="Do not disconnect"):
        forms.disconnect_when_safe(result, session, disconnect=True)
    assert colab.calls == ["flush", "unassign"]


def test_a_drive_that_cannot_be_flushed_keeps_the_machine(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    colab, result = Colab(monkeypatch, tmp_path), result_of(session)
    colab.error = ValueError("mount is busy")
    with pytest.raises(Exception, match="mount is busy") as caught:
        forms.disconnect_when_safe(result, session, disconnect=True)
    assert "the machine is kept" in caught.value.hint
    assert colab.calls == []


def test_elsewhere_than_in_colab_nothing_is_given_back(session: Session) -> None:
    assert forms.disconnect_when_safe(result_of(session), session, disconnect=True) is False
