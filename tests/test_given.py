"""What a user gave: folders of every kind, Hub caches, files under wrong names, and what is no model at all."""

import json
import os
import shutil
import struct
import zipfile

import pytest

pytest.importorskip("numpy")
from table_models import folder, original, read, values, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile
from fastsd_helpers.checkpoints.given import identify
from fastsd_helpers.errors import CheckpointError, FastSDError, ModelError
from fastsd_helpers.model_lookup import BASE_MODEL, find_folder

LORA = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 8, 1, 1),
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (8, 2, 1, 1),
}
PEFT = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": (2, 8, 1, 1),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": (8, 2, 1, 1)}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("kept") / "model", "sd15", "F16")


@pytest.fixture
def model(kept, tmp_path):
    """A pipeline that may be added to; its own files are hard links."""
    shutil.copytree(kept, tmp_path / "model", copy_function=os.link)
    return tmp_path / "model"


def test_a_pipeline_is_one_whatever_lies_beside_its_parts(model, tmp_path):
    write(model / "pytorch_lora_weights.safetensors", values(PEFT))
    write(model / "adapter_model.safetensors", values(PEFT))
    write(model / "unet" / "adapter_model.safetensors", values(PEFT))
    write(model / "another.safetensors", values(LORA))
    (model / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert identify(model).what == "pipeline"
    written = checkpoints.convert(model, tmp_path / "out.safetensors")
    assert (written.family, written.tensors) == ("sd15", len(original("sd15")))
    assert checkpoints.inspect(model).family == "sd15"


def test_a_part_is_one_whatever_lies_beside_it_and_a_lora_folder_is_one_without_weights_of_its_own(model, tmp_path):
    write(model / "vae" / "pytorch_lora_weights.safetensors", values(PEFT))
    assert (identify(model / "vae").what, identify(model / "vae").part) == ("part", "vae")
    write(tmp_path / "lora" / "pytorch_lora_weights.safetensors", values(PEFT))
    write(tmp_path / "lora" / "extra.safetensors", values(PEFT))
    assert identify(tmp_path / "lora").what == "lora"
    assert checkpoints.inspect(tmp_path / "lora").kind == "lora peft"


def cache(model, place, commits=("abc",), main="abc"):
    root = place / "models--a--b"
    for folder_name in ("blobs", "refs"):
        (root / folder_name).mkdir(parents=True)
    for commit in commits:
        for number, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
            link = root / "snapshots" / commit / path.relative_to(model)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = root / "blobs" / f"{number:040x}"
            if not blob.exists():
                os.link(path, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (root / "refs" / "main").write_text(main)
    return root


def test_a_hub_cache_is_read_at_the_snapshot_that_main_names(kept, tmp_path):
    root = cache(kept, tmp_path, ("abc", "def"), "def\n")
    for given in (root, root / "snapshots"):
        found = identify(given)
        assert (found.what, found.path) == ("pipeline", root / "snapshots" / "def")
        assert found.notes == ("The Hub cache models--a--b was read at def.",)
    written = checkpoints.convert(root, tmp_path / "out.safetensors")
    assert "was read at def" in written.notes[0]
    assert read(written.path) == read(checkpoints.convert(kept, tmp_path / "same.safetensors").path)
    assert checkpoints.inspect(root).path == root / "snapshots" / "def"
    assert find_folder(str(root), BASE_MODEL) == root / "snapshots" / "def", "placing and training find it too"


def test_a_hub_cache_without_one_clear_snapshot_names_them(kept, tmp_path):
    (tmp_path / "one").mkdir()
    root = cache(kept, tmp_path / "one", ("abc",), "gone")
    assert identify(root).path.name == "abc", "there is only one"
    (root / "snapshots" / "def").mkdir()
    for main in ("gone", None):
        (root / "refs" / "main").write_text(main) if main else (root / "refs" / "main").unlink()
        with pytest.raises(ModelError, match=r"2 snapshots \(abc, def\)") as caught:
            identify(root)
        assert str(root / "snapshots" / "abc") in caught.value.hint
        with pytest.raises(ModelError, match="2 snapshots"):
            find_folder(str(root), BASE_MODEL)
    shutil.rmtree(root / "snapshots")
    (root / "snapshots").mkdir()
    with pytest.raises(ModelError, match="holds no snapshot"):
        identify(root)
    with pytest.raises(ModelError, match="Hub cache of 1 model: models--a--b") as caught:
        identify(root.parent)
    assert "models--a--b" in caught.value.hint


def test_a_folder_with_one_model_file_stands_for_it_and_one_with_several_names_them(tmp_path):
    place = tmp_path / "downloaded"
    file = write(place / "my lora.safetensors", values(LORA))
    (place / "samples").mkdir()
    (place / "samples" / "1.png").write_bytes(b"\x89PNG")
    (place / "config.json").write_text("{}")
    assert (identify(place).what, identify(place).path) == ("file", file)
    written = checkpoints.convert(place, tmp_path / "out.safetensors")
    assert written.family == "sd15-lora"
    assert "my lora.safetensors is the only model file" in written.notes[0]
    write(place / "other.ckpt", values(LORA))
    with pytest.raises(CheckpointError, match=r"holds 2 model files: my lora\.safetensors, other\.ckpt"):
        identify(place)
    with pytest.raises(CheckpointError, match="holds 2 model files"):
        checkpoints.inspect(place)


@pytest.mark.parametrize("content", [None, "notes.txt", "vae"])
def test_a_folder_that_is_no_model_is_said_to_be_none(content, kept, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    if content == "vae":
        shutil.copytree(kept / "vae", place / "vae", copy_function=os.link)
    elif content:
        (place / content).write_text("x")
    said = {None: "is empty", "notes.txt": "is not a Diffusers model", "vae": "no model_index.json"}[content]
    for use in (identify, checkpoints.inspect, lambda place: checkpoints.convert(place, tmp_path / "o.safetensors")):
        with pytest.raises(FastSDError, match=said):
            use(place)


def test_a_network_of_another_kind_is_looked_at_and_not_converted(tmp_path):
    write(tmp_path / "net" / "diffusion_pytorch_model.safetensors", values({"a.weight": (2, 2)}))
    (tmp_path / "net" / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    assert "ControlNetModel" in checkpoints.inspect(tmp_path / "net").what
    for name in ("out.safetensors", "out"):
        with pytest.raises(FastSDError, match="a ControlNet"):
            checkpoints.convert(tmp_path / "net", tmp_path / name, dtype="fp16")


# ------------------------------------------------------------------------------------------ inspect on folders


def test_inspect_says_of_a_pipeline_what_it_is_and_counts_every_part(model):
    write(model / "safety_checker" / "model.safetensors", values({"a": (3,)}))
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (model / "model_index.json").unlink()
    (model / "model_index.json").write_text(json.dumps(index))
    found = checkpoints.inspect(model, scan=True)
    assert (found.kind, found.family, found.prediction, found.sha256) == ("pipeline", "sd15", "epsilon", None)
    assert found.parts["safety_checker"] == 12
    assert set(found.dtypes) == {"F16", "F32"}
    assert found.tensors == 1 + sum(
        len(read(next((model / part).glob("*.safetensors")))) for part in ("unet", "vae", "text_encoder")
    )
    assert (found.not_finite, found.problems) == ({}, ())


def test_inspect_never_fails_on_a_pipeline_it_knows_half(model):
    shutil.rmtree(model / "scheduler")
    config = model / "unet" / "config.json"
    values_of = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps({**values_of, "time_cond_proj_dim": 256}))
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    found = checkpoints.inspect(model)
    assert (found.kind, found.family) == ("pipeline", None)
    assert "scheduler" in found.missing
    said = " ".join(problem.what for problem in found.problems)
    assert "model_index.json names scheduler" in said
    assert "not a complete safetensors file" in said
    assert "U-Net" in found.parts


# ----------------------------------------------------------------------------------------- files by their content


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin", ".CKPT"])
def test_a_safetensors_file_of_another_name_is_read_as_one_and_that_is_said(ending, tmp_path):
    file = write(tmp_path / "model.safetensors", original("sd15", "F16"))
    misnamed = file.rename(tmp_path / f"misnamed{ending}")
    written = checkpoints.convert(misnamed, tmp_path / "out.safetensors")
    assert any("is a safetensors file: it was read as one" in note for note in written.notes)
    assert read(written.path) == read(misnamed)
    found = checkpoints.inspect(misnamed)
    assert (found.family, found.format) == ("sd15", "safetensors")
    assert any("is a safetensors file" in sentence for sentence in found.advice)


def test_a_blob_of_a_hub_cache_has_no_ending_and_is_read(tmp_path):
    file = write(tmp_path / "model.safetensors", original("sd15", "F16"))
    blob = file.rename(tmp_path / "0123456789abcdef")
    assert checkpoints.convert(blob, tmp_path / "out.safetensors").family == "sd15"


def test_a_pickle_of_another_name_is_named_as_that(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    for use in (checkpoints.inspect, lambda path: checkpoints.convert(path, tmp_path / "out")):
        with pytest.raises(FastSDError, match=r"is called \.safetensors and is a pickle"):
            use(tmp_path / "model.safetensors")


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", b"x")
    return path.read_bytes()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265146304\n"
OTHERS = {
    "page": (lambda path: b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "is a web page"),
    "spaced page": (lambda path: b"\n  <HTML lang='en'>", "is a web page"),
    "pointer": (lambda path: POINTER, r"is a Git LFS pointer.*4,265,146,304 bytes"),
    "gguf": (lambda path: b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "is a GGUF file"),
    "picture": (lambda path: b"\x89PNG\r\n\x1a\n" + bytes(40), "is an image, not a model"),
    "zip": (zipped, "a zip archive"),
}


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ""])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_model_is_named_whatever_it_is_called(kind, ending, tmp_path):
    make, said = OTHERS[kind]
    path = tmp_path / f"model{ending}"
    path.write_bytes(make(path))
    for use in (checkpoints.inspect, lambda path: checkpoints.convert(path, tmp_path / "out")):
        with pytest.raises(FastSDError, match=said) as caught:
            use(path)
        assert caught.value.hint


TEXTS = {
    "diffusion_pytorch_model.safetensors.index.json": ('{"weight_map": {}}', "the list of the files of a model"),
    "adapter_config.json": ('{"peft_type": "LORA"}', "a text file, not a model"),
    "v1-inference.yaml": ("model:\n  target: ldm\n", "a text file, not a model"),
    "gone.safetensors": ("Entry not found", "a text file, not a model"),
    "model.onnx": ("\x08\x07\x12\x07pytorch", "an ONNX model"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_lies_beside_a_models_weights_is_named_and_not_called_a_damaged_model(name, tmp_path):
    text, said = TEXTS[name]
    (tmp_path / name).write_text(text)
    for use in (checkpoints.inspect, lambda path: checkpoints.convert(path, tmp_path / "out")):
        with pytest.raises(FastSDError, match=said) as caught:
            use(tmp_path / name)
        assert caught.value.hint


@pytest.mark.parametrize("names", [["single_transformer_blocks.12.attn.to_k.weight"], list(original("t5"))])
def test_one_of_the_files_of_a_model_is_called_that_and_never_a_smaller_model(names, tmp_path):
    tensors = values(dict.fromkeys(names, (2, 2)))
    shard = write(tmp_path / "model-00002-of-00003.safetensors", tensors)
    found = checkpoints.inspect(shard, hashes=False)
    assert (found.kind, found.family, found.what) == ("shard", None, "file 2 of the 3 of a model (a shard)")
    with pytest.raises(FastSDError, match=r"file 2 of the 3(.|\n)*Give the folder"):
        checkpoints.convert(shard, tmp_path / "out.safetensors")
    alone = write(tmp_path / "model-00001-of-00001.safetensors", original("sd15", "F16"))
    assert checkpoints.inspect(alone, hashes=False).family == "sd15"


def mixed(rest):
    """A file that begins as safetensors; as a pickle its length is the step LONG1 over 22 bytes, up to `rest`."""
    length = 0x8A | 22 << 8
    return struct.pack("<Q", length) + (b'{"__metadata__":' + rest).ljust(length)


def test_a_safetensors_file_that_would_run_under_a_pickles_name_is_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(mixed(b"cposix\nsystem\n(S'true'\ntR."))
    with pytest.raises(FastSDError, match=r"(begins as|is) a pickle of a kind"):
        checkpoints.inspect(tmp_path / "model.ckpt")
    # An honest length can look like any step, but names nothing to call.
    (tmp_path / "honest.ckpt").write_bytes(mixed(b'{"a":"R.R."}}'))
    assert checkpoints.inspect(tmp_path / "honest.ckpt").format == "safetensors"


# ------------------------------------------------------------------------------------------------- long headers


def long_header(path, metadata, tensors=1):
    header = {f"t{number}": {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]}
              for number in range(tensors)}  # fmt: skip
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(tensors))
    return path, len(text)


def test_a_lora_with_all_its_training_tags_is_read(tmp_path):
    tags = json.dumps({"10_x": {f'some "tag" number {i} \u00fc\U0001f600': i for i in range(230_000)}})
    path, size = long_header(tmp_path / "a.safetensors", {"ss_tag_frequency": tags, "short": "\\ \u2028"})
    assert size > 12_000_000
    with SafetensorsFile(path) as file:
        assert file.metadata == {"ss_tag_frequency": tags, "short": "\\ \u2028"}
    assert checkpoints.inspect(path, hashes=False).metadata["ss_tag_frequency"] == tags


def test_reading_a_long_header_takes_little_more_memory_than_its_texts(tmp_path):
    import tracemalloc

    path, size = long_header(tmp_path / "a.safetensors", {"tags": 'x "y", ' * 1_500_000})
    tracemalloc.start()
    try:
        SafetensorsFile(path).close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 13_000_000
    assert peak < 2.5 * size, "parsing it as a whole takes more"


def test_a_header_beyond_the_references_bound_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:  # sparse: nothing of it is written
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(100_000_009)
    with pytest.raises(FastSDError, match="its header has 100,000,001 bytes; the limit is"):
        checkpoints.inspect(path)
    with pytest.raises(CheckpointError, match="the limit is"):
        SafetensorsFile(path)
