"""Tests of base models made of single files: tokenizers, families that cannot be trained, links, and a real run."""

import functools
import http.server
import json
import logging
import threading
from dataclasses import replace

import pytest
from installed import require_installed

pytest.importorskip("torch")

from dreambooth_runs import config_for
from hub_server import HubServer
from table_models import original, write
from tiny_models import TINY, build_pipeline, make_tokenizer

from fastsd_helpers.checkpoints import convert
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.downloads import holds_secret
from fastsd_helpers.dreambooth import train
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.dreambooth.training import single_files
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.errors import CheckpointError, ModelError, SettingsError, WrongFamily
from fastsd_helpers.model_lookup import fetch_model
from fastsd_helpers.registry import find_model

require_installed("diffusers")

WORDS = TINY["text"]["vocab_size"]  # what the model's text encoder knows, and the published one's too
MIRROR = "benjamin-paine/stable-diffusion-v1-5"


@pytest.fixture(autouse=True)
def _kept_here(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSD_MODELS", str(tmp_path / "kept"))


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    """A model whose shape can be read from its weights alone, as that of every published one, as a folder."""
    folder = tmp_path_factory.mktemp("dream")
    build_pipeline(TINY, folder / "words", seed=7).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def dream_file(dream):
    """The same model as one file."""
    path = dream.parent / "dream.safetensors"
    convert(dream, path)
    return path


@pytest.fixture
def start_hub(tmp_path, monkeypatch):
    """Serve a tokenizer of so many words as that of the published SD 1.5."""
    with HubServer({}) as server:

        def start(words: int) -> HubServer:
            folder = tmp_path / "published"
            make_tokenizer(folder / "tokenizer", WORDS)
            vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
            vocabulary |= {f"word{number}": number for number in range(words - len(vocabulary))}
            (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
            (folder / "tokenizer" / "special_tokens_map.json").write_text("{}")
            server.repos[MIRROR] = folder
            return server

        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield start


def weights(base: BaseModel) -> dict:
    return {**base.load("unet").state_dict(), **base.load("vae").state_dict()}


def test_a_single_file_becomes_the_folder_it_came_from_with_a_published_tokenizer(dream, dream_file, start_hub):
    start_hub(WORDS)
    base = BaseModel.fetch(str(dream_file))
    assert (base.spec.family, base.spec.prediction_type) == ("sd15", "epsilon")
    before, after = weights(BaseModel.fetch(str(dream))), weights(base)
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert base.load_tokenizers()["text_encoder"]("zib").input_ids
    assert BaseModel.fetch(str(dream_file)).folder == base.folder, "the second time it is found again"


def test_a_file_of_the_packaged_model_is_trained_from_and_needs_no_hub(tmp_path, monkeypatch, small_session):
    file = tmp_path / "mine.safetensors"
    convert(fetch_model("demo"), file)
    monkeypatch.setattr(
        "fastsd_helpers.dreambooth.training.single_files.fetch_hub_file", lambda *_: pytest.fail("the Hub")
    )
    base = BaseModel.fetch(str(file))
    demo = BaseModel.fetch("demo")
    before, after = weights(demo), weights(base)
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json", "text_encoder/config.json"):
        assert (base.folder / name).read_bytes() == (demo.folder / name).read_bytes()
    assert base.folder.parent == tmp_path / "kept" / "converted"
    result = train(config_for(file, unet_steps=1, text_encoder_steps=1), small_session)
    assert result.path.is_file()
    assert small_session.record["base_model"]["ref"] == str(file)


def test_a_link_becomes_a_base_model(dream_file, start_hub, tmp_path):
    start_hub(WORDS)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(dream_file.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        link = f"http://127.0.0.1:{server.server_port}/dream.safetensors"
        base = BaseModel.fetch(link)
        server.shutdown()
    assert base.ref == link
    assert (tmp_path / "kept" / "dream.safetensors").read_bytes() == dream_file.read_bytes()
    assert base.folder.parent == tmp_path / "kept" / "converted"


def test_a_tokenizer_of_other_words_is_refused_before_anything_is_written(dream_file, start_hub, tmp_path):
    start_hub(WORDS + 1)
    with pytest.raises(
        ModelError, match=r"has a vocabulary of 49408 tokens, and the tokenizer of .* has 49409"
    ) as caught:
        BaseModel.fetch(str(dream_file))
    assert "fastsd convert FILE FOLDER --base" in caught.value.hint
    assert list((tmp_path / "kept" / "converted").iterdir()) == []


def test_without_the_hub_the_sentence_says_that_a_tokenizer_is_lacking(dream_file, tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer \(single-file checkpoints have none\)") as caught:
        BaseModel.fetch(str(dream_file))
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert "fastsd convert" in caught.value.hint
    assert list((tmp_path / "kept" / "converted").iterdir()) == []


def test_a_file_that_cannot_be_trained_is_refused_before_anything_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    files = {
        "a LoRA in kohya's names": {"lora_unet_x.lora_up.weight": torch.zeros(1, 1)},
        "a VAE of Stable Diffusion": {
            "decoder.mid.attn_1.q.weight": torch.zeros(1, 1, 1, 1),
            "decoder.conv_in.weight": torch.zeros(1, 4, 1, 1),
        },
        "an SDXL inpainting file": {
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 9, 1, 1),
            "conditioner.embedders.1.model.token_embedding.weight": torch.zeros(2, 1),
        },
    }
    for words, tensors in files.items():
        save_file(tensors, tmp_path / "file.safetensors")
        with pytest.raises(WrongFamily, match=rf"file\.safetensors is {words}, which DreamBooth here cannot train"):
            BaseModel.fetch(str(tmp_path / "file.safetensors"))
    (tmp_path / "file.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError):
        BaseModel.fetch(str(tmp_path / "file.safetensors"))
    assert list((tmp_path / "kept" / "converted").iterdir()) == []


def test_what_is_worth_knowing_of_the_conversion_is_said(dream_file, start_hub, caplog):
    caplog.set_level(logging.WARNING, logger="fastsd_helpers")
    start_hub(WORDS)
    BaseModel.fetch(str(dream_file))
    assert "number of attention heads is a guess" in caplog.text
    assert "No tokenizer was written" not in caplog.text


@pytest.mark.parametrize(
    ("link", "secret"),
    [
        ("https://civitai.com/api/download/models/1?type=Model&format=SafeTensor", False),
        ("https://civitai.com/api/download/models/1?type=Model&token=0123abcd", True),
        ("https://example.org/model.safetensors?API_KEY=x", True),
        ("https://name:word@example.org/model.safetensors", True),
        ("https://example.org/@name/model.safetensors#token=1", False),
        ("https://[bad/model.safetensors", False),
        ("owner/name@main", False),
    ],
)
def test_a_link_with_a_token_in_it_is_refused_because_settings_are_written_down(link, secret):
    assert holds_secret(link) is secret
    if secret:
        with pytest.raises(SettingsError, match="a link with a token or password in it") as caught:
            DreamBoothConfig(base_model=link)
        assert not any(word in str(caught.value) for word in ("0123abcd", "name:word"))
    else:
        assert DreamBoothConfig(base_model=link).base_model == link


def test_a_run_that_was_begun_before_this_was_asked_goes_on_with_noise(tmp_path):
    spec = replace(find_model("sd21-768"), prediction_type="unknown")
    base = BaseModel("a/b", tmp_path, spec)
    with pytest.raises(SettingsError, match="Nothing in a/b says"):
        base.predicting("auto", None)
    assert base.predicting("auto", None, begun=True).spec.prediction_type == "epsilon"
    assert base.predicting("v_prediction", None, begun=True).spec.prediction_type == "v_prediction"


@pytest.mark.parametrize("key", ["sdxl", "sd21"])
@pytest.mark.parametrize(
    ("marks", "metadata", "told"),
    [
        ({}, {}, False),
        ({}, {"modelspec.title": "x"}, False),
        ({}, {"modelspec.prediction_type": "epsilon"}, True),
        ({"v_pred": (TensorFact("F32", (0,)), b"")}, {}, True),
    ],
)
def test_a_file_says_what_it_predicts_or_the_folder_of_it_does_not(tmp_path, key, marks, metadata, told):
    path = write(tmp_path / "xl.safetensors", {**original(key, "F16"), **marks}, metadata)
    assert single_files._look(path) == (key, 50)
    convert(path, tmp_path / "folder")
    schedule = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert ("prediction_type" in schedule) is told


def test_what_diffusers_would_take_is_not_said_of_a_file_that_is_asked_about_before_it_is_trained(
    tmp_path, monkeypatch, caplog
):
    from types import SimpleNamespace

    from fastsd_helpers.checkpoints.converter import _unsaid

    notes = (_unsaid("sdxl", None), "The widths match no published model.")
    monkeypatch.setattr(single_files, "_look", lambda file: ("sdxl", WORDS))
    monkeypatch.setattr(single_files, "_packaged", lambda family, words: tmp_path)
    monkeypatch.setattr(single_files, "convert", lambda *_, **__: SimpleNamespace(notes=notes))
    with caplog.at_level(logging.WARNING, "fastsd_helpers"):
        single_files.make_base(tmp_path / "silent.safetensors", tmp_path / "folder")
    assert [record.getMessage() for record in caplog.records] == [f"silent.safetensors: {notes[1]}"]
