"""What a text names, and how a model of each kind is brought here: asked little, checked wholly, taken up again."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault
from test_downloads import NEEDED, at_home, start_hub, write_files

from fastsd_helpers import registry
from fastsd_helpers.captions import prompts
from fastsd_helpers.cli import main
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.errors import (
    CheckpointError,
    DiskFull,
    FastSDError,
    ModelError,
    ModelNotFound,
    SessionUnfinished,
    WrongFamily,
)
from fastsd_helpers.model_lookup import (
    BASE_MODEL,
    CAPTIONER,
    CONTROLNET,
    LORA,
    READER,
    find_folder,
    lora_file,
    require_inert,
    understand,
)
from fastsd_helpers.sessions import Session, find_session
from fastsd_helpers.webui import find_places, find_ui, place_model

__all__ = ["at_home", "start_hub"]  # fixtures

READER_FILES = {
    "config.json": {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "trocr"}},
    "generation_config.json": {"of": "generation"},
    "preprocessor_config.json": {"of": "pictures"},
    "tokenizer.json": {"of": "words"},
    "README.md": "a reader",
    "model.safetensors": b"s" * 3000,
    "pytorch_model.bin": b"b" * 3000,
    "onnx/decoder.onnx": b"o" * 3000,
}
CAPTIONER_FILES = {
    "config.json": {"model_type": "blip"},
    "vocab.txt": "a\nb",
    "model.safetensors": b"s" * 3000,
    "pytorch_model.bin": b"b" * 3000,
}
CONTROLNET_FILES = {
    "config.json": {"_class_name": "ControlNetModel"},
    "diffusion_pytorch_model.safetensors": b"s" * 3000,
    "diffusion_pytorch_model.bin": b"b" * 3000,
    "README.md": "x",
}
LORA_FILES = {"pytorch_lora_weights.safetensors": b"s" * 3000, "README.md": "x", "sample.png": b"p"}
KINDS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "reader": (
        READER,
        READER_FILES,
        {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"},
    ),
    "captioner": (CAPTIONER, CAPTIONER_FILES, {"config.json", "vocab.txt", "model.safetensors"}),
    "controlnet": (CONTROLNET, CONTROLNET_FILES, {"config.json", "diffusion_pytorch_model.safetensors"}),
    "lora": (LORA, LORA_FILES, {"pytorch_lora_weights.safetensors"}),
}
# What each kind is told from: with this file changed it is another kind.
OTHERS = {
    "reader": {"config.json": {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}},
    "captioner": {"config.json": {"model_type": "clip"}},
    "controlnet": {"config.json": {"_class_name": "AutoencoderKL"}},
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def write_sdxl(folder: Path) -> Path:
    """The small files of an SDXL pipeline, and weights of some bytes."""
    parts = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
    weights = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    weights["text_encoder_2"] = "model"
    kinds = {"scheduler": "EulerDiscreteScheduler", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    theirs = {part: "CLIPTextModel" for part in parts if part.startswith("text")}
    theirs |= {part: "CLIPTokenizer" for part in parts if part.startswith("token")}
    index = {part: ["diffusers", kind] for part, kind in kinds.items()}
    index |= {part: ["transformers", kind] for part, kind in theirs.items()}
    files: dict[str, Any] = {"model_index.json": index}
    for part in parts:
        files[f"{part}/config.json"] = {}
        if part in weights:
            files[f"{part}/{weights[part]}.safetensors"] = b"s" * 3000
        if part.startswith("tokenizer"):
            files |= {f"{part}/{name}": {} for name in ("tokenizer_config.json", "vocab.json")}
            files[f"{part}/merges.txt"] = "a b"
    files["scheduler/scheduler_config.json"] = {}
    files["unet/config.json"] = {"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time"}
    return write(folder, files)


def large(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".safetensors", ".bin", ".onnx"))]


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("sd15", "key"),
        ("trocr-base-handwritten", "key"),
        (" sd15 ", "key"),
        ("model", "folder"),
        ("./model", "folder"),
        ("owner/model", "folder"),  # a path that is here comes before the Hub
        ("file.safetensors", "file"),
        ("owner/name", "hub"),
        ("owner/name@v1.0", "hub"),
        ("https://huggingface.co/owner/name", "hub"),
        ("https://huggingface.co/owner/name/tree/main", "hub"),
        ("https://huggingface.co/owner/name/resolve/main/a.safetensors", "link"),
        ("https://example.org/a.safetensors", "link"),
        ("HTTPS://example.org/a", "link"),
        ("exports/rex.safetensors", "nothing"),  # the shape of a Hub id, and the name of a file that is not here
        ("exports/rex.CKPT", "nothing"),
        ("sd1.5", "nothing"),
        ("a/b/c", "nothing"),
        ("/no/such", "nothing"),
        ("~nobody-here/x", "nothing"),
        ("x" * 5000, "nothing"),
        ("a\0b", "nothing"),
        ("", "nothing"),
    ],
)
def test_what_a_text_names_is_told_without_asking_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "owner/model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "file.safetensors").write_bytes(b"x")
    name = understand(text)
    assert (name.what, name.text) == (what, text.strip())
    assert (name.spec is not None) is (what == "key")
    assert (name.path is not None) is (what in ("folder", "file"))
    if what == "hub":
        assert name.repo == "owner/name"
        assert name.revision == {"@": "v1.0", "t": "main"}.get("@" if "@" in text else "t" if "/tree/" in text else "")


def test_a_key_that_is_misspelt_is_guessed() -> None:
    for text, meant in (("sd51", "sd15"), ("SDXL ", "sdxl"), ("flux-dve", "flux-dev")):
        with pytest.raises(ModelNotFound) as caught:
            find_folder(text, BASE_MODEL)
        assert f"Did you mean '{meant}'?" in caught.value.hint
    with pytest.raises(ModelNotFound) as caught:
        find_folder("trocr-base-handwriten", READER)
    assert "Did you mean 'trocr-base-handwritten'?" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "ref"), [(BASE_MODEL, "demo-reader"), (READER, "sd15"), (BASE_MODEL, "sdxl-vae"), (CAPTIONER, "demo")]
)
def test_a_key_of_another_kind_is_told_what_it_is(kind: Any, ref: str) -> None:
    with pytest.raises(WrongFamily, match=rf"'{ref}' .* is not a {kind.noun}"):
        find_folder(ref, kind)


def test_a_link_is_no_folder_unless_it_can_be_converted() -> None:
    for kind in (BASE_MODEL, READER, CAPTIONER):
        with pytest.raises(ModelError, match=f"is a link that cannot be used as a {kind.noun}"):
            find_folder("https://example.org/model.safetensors?token=secret", kind)


# ------------------------------------------------------------------- the wrong kind, before anything is fetched


@pytest.mark.parametrize("key", [spec.key for spec in registry.models() if not spec.trainable])
def test_a_key_that_cannot_be_trained_is_refused_without_a_request(start_hub: Any, tmp_path: Path, key: str) -> None:
    hub = start_hub({})
    with pytest.raises(WrongFamily, match=f"'{key}' is a .* model, which DreamBooth here cannot train yet") as caught:
        BaseModel.fetch(key)
    assert "'sd15'" in caught.value.hint
    assert hub.requests == []


def test_the_command_line_refuses_it_so_too(
    start_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = start_hub({})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    image = pytest.importorskip("PIL.Image")
    for number in range(2):
        image.effect_noise((96, 96), 60 + number).convert("RGB").save(pictures / f"zib robot ({number}).png")
    assert main(["dreambooth", "new", "rex"]) == 0
    assert main(["dreambooth", "prepare", "rex", "--images", str(pictures), "--size", "64"]) == 0
    capsys.readouterr()
    assert main(["dreambooth", "train", "rex", "--base-model", "flux-dev"]) == 2
    assert "'flux-dev' is a flux model" in capsys.readouterr().err
    assert hub.requests == []


def test_a_repository_of_another_family_is_refused_before_its_weights(start_hub: Any, tmp_path: Path) -> None:
    hub = start_hub({"somebody/flux": write_flux(tmp_path / "flux")})
    with pytest.raises(
        WrongFamily, match="The Hub's somebody/flux is a flux model, which DreamBooth here cannot train"
    ):
        BaseModel.fetch("somebody/flux")
    assert large(hub.downloaded()) == []
    places = find_places(find_ui("a1111"), folder=str(tmp_path / "ui"), store=str(tmp_path / "store"))
    with pytest.raises(FastSDError, match=r"does not run 'somebody/flux', which is a flux model"):
        place_model("somebody/flux", find_ui("a1111"), places)
    assert large(hub.downloaded()) == []


def write_flux(folder: Path) -> Path:
    write_sdxl(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = index.pop("unet")
    (folder / "unet").rename(folder / "transformer")
    (folder / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", OTHERS)
def test_a_repository_of_another_kind_is_refused_before_its_weights(start_hub: Any, tmp_path: Path, kind: str) -> None:
    what, files, _wanted = KINDS[kind]
    folder = write(tmp_path / "served", files | OTHERS[kind])
    hub = start_hub({"a/b": folder})
    with pytest.raises(WrongFamily, match=r"The Hub's a/b is (no|a clip)"):
        find_folder("a/b", what)
    assert large(hub.downloaded()) == []
    with pytest.raises(WrongFamily, match=r"served is (no|a clip)"):
        find_folder(folder, what)


def test_two_kinds_in_one_folder_are_judged_by_what_is_asked_for(tmp_path: Path) -> None:
    both = write(write_files(tmp_path / "both", NEEDED), {"adapter_config.json": {}, "lora.safetensors": b"x"})
    assert find_folder(both, BASE_MODEL) == both
    assert lora_file(find_folder(both, LORA)) == both / "lora.safetensors"
    with pytest.raises(ModelError, match="is a LoRA adapter, not a complete recognition model"):
        find_folder(both, READER)


# ------------------------------------------------------------------------------------------- whole and checked


@pytest.mark.parametrize("kind", KINDS)
def test_of_each_kind_the_wanted_files_come_and_no_others(start_hub: Any, tmp_path: Path, kind: str) -> None:
    what, files, wanted = KINDS[kind]
    hub = start_hub({"a/b": write(tmp_path / "served", files)})
    folder = find_folder("a/b", what, cache_dir=tmp_path / "cache")
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert here == wanted == set(hub.downloaded())
    again = len(hub.requests)
    assert find_folder("a/b", what, cache_dir=tmp_path / "cache") == folder
    assert not [request for request in hub.requests[again:] if "/cdn/" in request.path], "nothing is fetched twice"


@pytest.mark.parametrize("kind", KINDS)
def test_a_download_of_each_kind_that_is_cut_goes_on(
    start_hub: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, files, _wanted = KINDS[kind]
    hub = start_hub({"a/b": write(tmp_path / "served", files)})
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # what it keeps comes in such pieces
    hub.faults.append(Fault(r"/cdn/.*safetensors", cut_after=1000))
    folder = find_folder("a/b", what, cache_dir=tmp_path / "cache")
    weights = next(name for name in files if name.endswith(".safetensors"))
    assert (folder / weights).read_bytes() == files[weights]
    ranges = [request.range for request in hub.requests if "/cdn/" in request.path]
    assert [range for range in ranges if range and re.fullmatch(r"bytes=(500|1000)-(2999)?", range)], ranges


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_kind_that_arrives_with_other_bytes_is_refused(
    start_hub: Any, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    what, files, _wanted = KINDS[kind]
    hub = start_hub({"a/b": write(tmp_path / "served", files)})
    hub.faults.append(Fault(r"/cdn/.*safetensors", flip=True, times=1))
    with caplog.at_level(logging.WARNING):
        find_folder("a/b", what, cache_dir=tmp_path / "one")
    assert "arrived damaged; fetching it again" in caplog.text
    hub.faults.append(Fault(r"/cdn/.*safetensors", flip=True, times=99))
    with pytest.raises(ModelError, match="arrived damaged twice: it does not match the Hub's hash"):
        find_folder("a/b", what, cache_dir=tmp_path / "two")


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_copy_of_each_kind_serves_offline_and_a_broken_one_does_not(
    start_hub: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, files, _wanted = KINDS[kind]
    hub = start_hub({"a/b": write(tmp_path / "served", files)})
    folder = find_folder("a/b", what, cache_dir=tmp_path / "cache")
    asked = len(hub.requests)
    for value in ("1", "TRUE", "yes", "on"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert find_folder("a/b", what, cache_dir=tmp_path / "cache") == folder
    assert len(hub.requests) == asked
    weights = folder / next(name for name in files if name.endswith(".safetensors"))
    content = bytearray(weights.read_bytes())
    content[5] ^= 1
    weights.resolve().write_bytes(content)
    with pytest.raises(ModelError, match="is not on this machine and HF_HUB_OFFLINE is set"):
        find_folder("a/b", what, cache_dir=tmp_path / "cache")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.stop()
    with pytest.raises(ModelError, match="cannot be reached"):
        find_folder("c/d", what, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_room_for_each_kind_is_looked_for_first(
    start_hub: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, files, _wanted = KINDS[kind]
    hub = start_hub({"a/b": write(tmp_path / "served", files)})
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 1000)
    with pytest.raises(DiskFull, match="are needed for a/b"):
        find_folder("a/b", what, cache_dir=tmp_path / "cache")
    assert large(hub.downloaded()) == []


def test_a_readers_mirrors_are_tried_in_their_order(start_hub: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from dataclasses import replace

    real = registry.find_model("trocr-small-handwritten")
    sources = tuple(registry.Source(repo, None) for repo in ("gone/one", "a/b"))
    changed = replace(real, sources=sources)
    everything = registry.models(None)
    monkeypatch.setattr(
        "fastsd_helpers.model_lookup.names.models",
        lambda kind="base": [changed if spec.key == real.key else spec for spec in everything],
    )
    start_hub({"a/b": write(tmp_path / "served", READER_FILES)})
    assert (find_folder(real.key, READER, cache_dir=tmp_path / "cache") / "model.safetensors").is_file()


def test_of_several_loras_in_one_place_none_is_guessed(start_hub: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "served", {"one.safetensors": b"1", "two.safetensors": b"2"})
    hub = start_hub({"a/b": folder})
    for ref in ("a/b", folder):
        with pytest.raises(ModelError, match=r"holds 2 files \(one\.safetensors, two\.safetensors\)"):
            find_folder(ref, LORA)
    assert large(hub.downloaded()) == []


def test_a_captioner_of_the_hub_describes(start_hub: Any, tmp_path: Path) -> None:
    from test_captions import make_captioner

    start_hub({"a/blip": make_captioner(tmp_path / "blip")})
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 30), 120).save(tmp_path / "a.png")
    said = list(prompts.describe_pictures([tmp_path / "a.png"], model="a/blip"))
    assert said == list(prompts.describe_pictures([tmp_path / "a.png"], model=str(tmp_path / "blip")))


def test_a_reader_of_the_hub_reads(start_hub: Any, tmp_path: Path) -> None:
    from tiny_readers import noise_pictures, write_reader

    from fastsd_helpers.trocr import Reader

    write_reader(tmp_path / "reader")
    start_hub({"a/reader": tmp_path / "reader"})
    settings = {"precision": "fp32", "max_new_tokens": 8}
    texts = [line.text for line in Reader("a/reader", **settings).read(noise_pictures(2))]
    assert texts == [line.text for line in Reader(tmp_path / "reader", **settings).read(noise_pictures(2))]


def test_what_convert_and_inspect_are_not_given_here_is_told_how_to_get(tmp_path: Path) -> None:
    from fastsd_helpers.checkpoints import convert, inspect

    for ref, hint in (
        ("sd15", "fastsd models get sd15"),
        ("owner/name", "fastsd models get owner/name"),
        ("x.ckpt", ""),
    ):
        for ask in (lambda ref=ref: convert(Path(ref), tmp_path / "out.safetensors"), lambda ref=ref: inspect(ref)):
            with pytest.raises(CheckpointError) as caught:
                ask()
            assert (hint or "Check the path") in caught.value.hint
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        convert(tmp_path / "pipe.safetensors", tmp_path / "out.safetensors")


# ---------------------------------------------------------------------------------------------- the gate


def test_links_are_followed_and_what_leads_nowhere_or_round_is_refused(tmp_path: Path) -> None:
    model = write_files(tmp_path / "model", NEEDED)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")  # as in the Hub's cache
    assert find_folder(model, BASE_MODEL) == model
    extra = model / "unet" / "extra.json"
    extra.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"extra\.json is a link that leads nowhere"):
        find_folder(model, BASE_MODEL)
    extra.unlink()
    extra.symlink_to(extra)
    with pytest.raises(ModelError, match=r"extra\.json is a link that leads nowhere .*symbolic links"):
        require_inert([model])
    extra.unlink()
    (model / "unet" / "round").symlink_to(model, target_is_directory=True)
    with pytest.raises(ModelError, match="is a link to a folder that holds it"):
        require_inert([model])


def test_circles_reached_by_links_end_at_once_however_many_there_are(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for number in range(40):  # walked one by one, they would be 2^40 ways
        (model / f"round-{number}").symlink_to(model, target_is_directory=True)
    (tmp_path / "link").symlink_to(model, target_is_directory=True)
    with pytest.raises(ModelError, match="is a link to a folder that holds it"):
        require_inert([tmp_path / "link"])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "0").mkdir()
    for number in range(30):  # no circle: each folder twice in the next
        (tmp_path / "deep" / f"{number + 1}").mkdir()
        for name in "ab":
            (tmp_path / "deep" / f"{number + 1}" / name).symlink_to(tmp_path / "deep" / f"{number}")
    require_inert([tmp_path / "deep"])


def test_a_folder_that_is_a_circle_itself_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for kind in (BASE_MODEL, READER, LORA):
        with pytest.raises(FastSDError) as caught:
            find_folder(str(tmp_path / "a"), kind)
        assert caught.value.exit_code == 2


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="is not a file but a pipe"):
        require_inert([tmp_path / "model.safetensors"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_the_gate(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, files, _wanted = KINDS[kind]
    seen: list[Path] = []
    monkeypatch.setattr("fastsd_helpers.model_lookup.finding.require_inert", lambda paths: seen.extend(paths))
    folder = find_folder(write(tmp_path / "own", files), what)
    assert seen == [folder]


# ---------------------------------------------------------------------------------------------- sessions


def test_a_session_is_found_by_its_name_and_by_its_folder_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = Session.create("rex", root=tmp_path / "sessions")
    elsewhere = tmp_path / "copied"
    session.folder.rename(elsewhere)
    assert find_session("copied", root=tmp_path / "sessions").folder == elsewhere, "its folder, from here"
    elsewhere.rename(session.folder)
    for ref in ("rex", str(session.folder), session.folder):
        assert find_session(ref, root=tmp_path / "sessions").folder == session.folder
    for ref in ("", "max", "sd15", "a/b", str(tmp_path), "x" * 5000, "~nobody-here"):
        assert find_session(ref, root=tmp_path / "sessions") is None, ref


def test_a_session_without_a_finished_model_says_so_in_one_way(tmp_path: Path) -> None:
    session = Session.create("rex", root=tmp_path)
    with pytest.raises(SessionUnfinished, match="The session rex has no finished model yet") as caught:
        session.finished_model()
    assert isinstance(caught.value, ModelNotFound)
    assert "fastsd dreambooth export rex" in caught.value.hint
    for number, name in enumerate(("old", "new", ".hidden")):
        (session.exports / f"{name}.safetensors").write_bytes(b"x")
        os.utime(session.exports / f"{name}.safetensors", (number, number))
    assert session.finished_model().name == "new.safetensors"
