"""Recognition models go to the Hub, fine-tuned and int8, and come back by Hub id and by a key of the registry."""

import json
import shutil

import pytest
from hub_upload_server import TOKEN, upload_hub
from PIL import Image, ImageDraw, ImageFont
from tiny_readers import write_reader

from fastsd_helpers import forms, registry
from fastsd_helpers.cli import main
from fastsd_helpers.downloads import models_table
from fastsd_helpers.errors import DownloadError, ModelError, SessionUnfinished, SettingsError, WrongFamily
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.model.checkpoint import open_checkpoint
from fastsd_helpers.trocr.model.openvino_engine import write_graphs
from fastsd_helpers.trocr.reading.session import ReadingSession
from fastsd_helpers.trocr.teaching.hub_upload import ReaderUploadConfig, card_head, upload

pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")  # what was uploaded is downloaded again
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with upload_hub(tmp_path / "hub", monkeypatch) as server:
        yield server


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "run" / "model"
    write_reader(folder, "base", seed=1)
    (folder / "README.md").write_text(f"{card_head('demo-reader')}# A model\n")
    (folder / "training_args.bin").write_bytes(b"not a part of it")
    return folder


def read(model):
    picture = Image.new("RGB", (300, 60), "white")
    ImageDraw.Draw(picture).text((10, 10), "over the lazy dog", "black", ImageFont.load_default(28))
    return Reader(model, max_new_tokens=6).read([picture])[0].text


def test_a_fine_tuned_model_arrives_private_with_its_card_and_reads_the_same_from_there(hub, model, tmp_path, capsys):
    assert main(["trocr", "upload", str(tmp_path / "run"), "--repo", "hand", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["repo"], told["private"]) == ("ada/hand", True)
    assert hub.private == {"ada/hand"}
    there = hub.folder / "ada" / "hand"
    assert not (there / "training_args.bin").exists()
    card = (there / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "base_model" not in card, "the built-in model is no repository"
    assert TOKEN not in card
    assert told["sha256"] in hub.sent
    assert read("ada/hand") == read(model)
    assert main(["trocr", "upload", str(tmp_path / "run"), "--repo", "hand"]) == 0
    said = capsys.readouterr().err
    assert "1 is there already" in said
    assert "LFS files" not in said, "no bar of nothing"
    assert "model.safetensors" in hub.commits[0]
    assert "model.safetensors" not in hub.commits[1]
    assert main(["trocr", "upload", str(tmp_path / "run"), "--repo", "grace/hand"]) != 0
    assert "It has to be of grace" in capsys.readouterr().err


def test_an_int8_model_is_a_row_of_the_registry_like_any_other(hub, model, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    folder = write_graphs(open_checkpoint(model, precision="fp32"), tmp_path / "int8", method="dynamic")
    (folder / "README.md").write_text(f"{card_head('microsoft/trocr-base-handwritten')}# A model, int8\n")
    result = upload(ReaderUploadConfig(repo="ada/hand-int8", private=False), folder)
    assert {"openvino/encoder.bin", "openvino/decoder.bin", "openvino/decoder.xml", "openvino/about.json"} <= set(
        result.files
    )
    card = (hub.folder / "ada" / "hand-int8" / "README.md").read_text()
    assert 'base_model: "microsoft/trocr-base-handwritten"' in card
    assert "license: other" in card
    rows = models_table()
    row = {name: value for name, value in rows["trocr-base-handwritten"].items() if name != "sources"}
    rows = rows | {"hand-int8": {**row, "title": "A model, int8", "sources": [{"repo": "ada/hand-int8"}]}}
    monkeypatch.setattr(registry, "models_table", lambda: rows)
    reader = Reader("hand-int8")
    assert reader.checkpoint.has_graphs
    assert read("hand-int8") == read(folder)


def test_what_is_no_model_of_ones_own_is_not_uploaded(hub, model, tmp_path):
    with pytest.raises(SettingsError, match="repo"):
        upload(ReaderUploadConfig(), model)
    with pytest.raises(SettingsError, match="no folder"):
        upload(ReaderUploadConfig(repo="hand"), tmp_path / "trocr-base-handwritten")
    (model / "README.md").unlink()
    with pytest.raises(ModelError, match="no model card"):
        upload(ReaderUploadConfig(repo="hand"), model)
    (model / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WrongFamily, match="not a TrOCR model"):
        upload(ReaderUploadConfig(repo="hand"), model)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("demo-reader", 'license: "Apache-2.0"\nbase_model: "demo-reader"'),
        ("grace/letters", 'license: "that of the model it was made from"\nbase_model: "grace/letters"'),
    ],
)
def test_a_card_tells_what_the_model_was_made_from_and_no_place_of_this_machine(tmp_path, base, expected):
    assert expected in card_head(base)
    assert card_head(str(tmp_path)).count(str(tmp_path.parent)) == 0


# ------------------------------------------------------------------------------------------------ the notebook


@pytest.fixture
def session(model, tmp_path):
    """A session whose model is the fine-tuned one."""
    pytest.importorskip("ipywidgets")
    session = ReadingSession(tmp_path / "my-handwriting")
    run = session.folder / "fine-tuned" / "abc"
    shutil.copytree(model, run / "model")
    (run / "lines.json").write_text('{"learned": [], "held_out": []}')
    session.save(taught={"model": "demo-reader", "path": "fine-tuned/abc/model"})
    return session


def filled(session, **values):
    form = forms.show_form(forms.SessionUploadConfig, restore=session)
    form.update(**values)
    return form.config()


def test_cell_9_uploads_the_fine_tuned_model_private_and_says_its_link(hub, session, caplog):
    caplog.set_level("INFO", "fastsd_helpers")
    assert forms.upload_reader(filled(session), session) is None
    assert "Nothing was uploaded: give a name in `repo`" in caplog.text
    assert hub.requests == []
    result = forms.upload_reader(filled(session, repo="hand", hf_token=TOKEN), session)
    assert (result.repo, result.private) == ("ada/hand", True)
    assert hub.private == {"ada/hand"}
    assert f"Uploaded and compared: {hub.url}/ada/hand (private)." in caplog.text
    assert read("ada/hand") == read(session.reader)
    kept = (session.folder / "session.json").read_text()
    assert '"hand"' in kept, "the name is there at the next visit"
    assert TOKEN not in kept + caplog.text


def test_cell_9_uploads_the_int8_copy_of_just_this_model_and_no_other(hub, session):
    copy, weights = session.folder / "int8", session.folder / "fine-tuned" / "abc" / "model" / "model.safetensors"
    shutil.copytree(weights.parent, copy)  # what it holds is the command's business
    int8 = filled(session, repo="hand-int8", model="int8")

    def note(chosen, written):
        made_of = {"path": "fine-tuned/abc/model", "written": written}
        session.save(int8=made_of, int8_report={"chosen": chosen})

    written = weights.stat().st_mtime
    for chosen, when in (("fp32", written), ("dynamic", written - 60)):  # of before; of an earlier model
        note(chosen, when)
        with pytest.raises(SessionUnfinished, match="no int8 copy of the model it fine-tuned last"):
            forms.upload_reader(int8, session)
    assert hub.requests == []
    note("dynamic", written)
    (copy / "README.md").write_text(f"{card_head('demo-reader')}# The copy\n")
    assert forms.upload_reader(int8, session).repo == "ada/hand-int8"
    assert "# The copy" in (hub.folder / "ada" / "hand-int8" / "README.md").read_text()


def test_cell_9_names_what_is_missing(hub, session, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="at most one /"):
        filled(session, repo="https://huggingface.co/ada/hand")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DownloadError, match="needs a Hugging Face token") as caught:
        forms.upload_reader(filled(session, repo="hand"), session)
    assert "the field of the form" in caught.value.hint
    with pytest.raises(DownloadError, match="does not let this token write to hand"):
        forms.upload_reader(filled(session, repo="hand", hf_token="hf_" + "read" * 6), session)
    empty = ReadingSession(tmp_path / "another")
    with pytest.raises(SessionUnfinished, match="No model was fine-tuned in this session yet") as caught:
        forms.upload_reader(filled(empty, repo="hand", hf_token=TOKEN), empty)
    assert "cell 5b" in caught.value.hint
    assert hub.private == set()
