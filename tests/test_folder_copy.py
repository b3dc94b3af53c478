"""A Diffusers folder in another dtype: every part, name, link and side file; and what cannot be recast."""

import json
import os
import shutil
import struct

import pytest

pytest.importorskip("numpy")
import numpy as np
from table_models import read, values, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.packed import refuse_packed
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.models import folder_copy
from fastsd_helpers.errors import CheckpointError, FastSDError, VerificationFailed

UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "cross_attention_dim": 16}
PARTS = {
    "unet": ("diffusers", UNET, "diffusion_pytorch_model"),
    "vae": ("diffusers", {"_class_name": "AutoencoderKL", "latent_channels": 4}, "diffusion_pytorch_model"),
    "text_encoder": ("transformers", {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}, "model"),
    "safety_checker": ("stable_diffusion", {"architectures": ["StableDiffusionSafetyChecker"]}, "model"),
    "image_encoder": ("transformers", {"architectures": ["CLIPVisionModelWithProjection"]}, "model"),
}


def weights(seed=0):
    made = values({"a.weight": (3, 4), "b.bias": (5,)}, seed=seed)
    return {**made, "position_ids": (TensorFact("I64", (1, 2)), np.arange(2, dtype="<i8").tobytes())}


def pipeline(path, parts=("unet", "vae", "text_encoder", "safety_checker", "image_encoder")):
    """A pipeline of three tensors a part: what a folder copy does, it does by names and contents alone."""
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    for seed, part in enumerate(parts):
        library, config, stem = PARTS[part]
        write(path / part / f"{stem}.safetensors", weights(seed), {"format": "pt"})
        (path / part / "config.json").write_text(json.dumps(config))
        name = config.get("_class_name") or config["architectures"][0]
        index[part] = [library, name]
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (path / "feature_extractor").mkdir()
    (path / "feature_extractor" / "preprocessor_config.json").write_text('{"do_resize": true}')
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture
def model(tmp_path):
    return pipeline(tmp_path / "model")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def recast(source, out, dtype="fp16"):
    return checkpoints.convert(source, out, dtype=dtype, verify=True)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_part_is_there_under_its_names_with_other_numbers(model, out):
    (model / "README.md").write_text("mine")
    (model / "extra" / "deep").mkdir(parents=True)
    (model / "extra" / "deep" / "words.txt").write_text("mine")
    write(model / "controlnet" / "diffusion_pytorch_model.safetensors", weights(9))
    written = recast(model, out)
    assert files(out) == files(model)
    assert (written.tensors, written.dtype, written.family) == (18, "fp16", "sd15")
    for path in model.rglob("*"):
        beside = out / path.relative_to(model)
        if path.suffix == ".safetensors":
            before, after = read(path), read(beside)
            assert before.keys() == after.keys()
            assert {dtype for dtype, _shape, _data in after.values()} == {"F16", "I64"}
            wide = np.frombuffer(before["a.weight"][2], "<f4")
            assert np.array_equal(np.frombuffer(after["a.weight"][2], "<f2"), wide.astype("<f2"))
        elif path.is_file():
            assert beside.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["relative", "absolute", "of a link"])
def test_links_are_followed_wherever_they_lead(kind, model, out, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    for part in ("vae", "safety_checker"):
        shutil.move(model / part, elsewhere / part)
        target = elsewhere / part
        if kind == "of a link":
            (tmp_path / f"{part}-link").symlink_to(target)
            target = tmp_path / f"{part}-link"
        (model / part).symlink_to(os.path.relpath(target, model) if kind == "relative" else target)
    shutil.move(model / "unet" / "config.json", elsewhere / "blob")
    (model / "unet" / "config.json").symlink_to(elsewhere / "blob")
    recast(model, out)
    assert len(files(out)) == 13
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "unet" / "config.json").read_bytes() == (elsewhere / "blob").read_bytes()


@pytest.mark.parametrize("place", ["vae", "unet/config.json", "safety_checker/model.safetensors", "notes.txt"])
def test_a_link_that_leads_nowhere_is_named_before_anything_is_written(place, model, out):
    path = model / place
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to("nowhere")
    with pytest.raises(FastSDError, match=f"{path} is a link that leads nowhere"):
        recast(model, out)
    assert not out.exists()


@pytest.mark.parametrize("target", [".", "..", "../../model/unet"])
def test_a_circle_of_links_is_named_before_anything_is_written(target, model, out):
    (model / "unet" / "again").symlink_to(target)
    with pytest.raises(FastSDError, match="it is a circular link"):
        recast(model, out)
    assert not out.exists()
    with pytest.raises(CheckpointError, match="it is a circular link"):
        list(folder_copy.walk_folders(model))


def shards(folder, stem, variant=""):
    """Two shards and their index in the place of a part's one file."""
    (whole,) = folder.glob("*.safetensors")
    tensors = {name: (TensorFact(dtype, shape), data) for name, (dtype, shape, data) in read(whole).items()}
    whole.unlink()
    homes = {}
    for number, name in enumerate(sorted(tensors), 1):
        file = f"{stem}{variant}-{number:05d}-of-00003.safetensors"
        write(folder / file, {name: tensors[name]})
        homes[name] = file
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1, "own": "words"}, "weight_map": homes}))


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_stay_shards_and_their_index_says_the_new_size(variant, model, out):
    shards(model / "unet", "diffusion_pytorch_model", variant)
    shards(model / "image_encoder", "model", variant)
    written = recast(model, out)
    assert files(out) == files(model)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("image_encoder", "model")):
        name = f"{stem}.safetensors.index{variant}.json"
        before, after = (json.loads((folder / part / name).read_text()) for folder in (model, out))
        assert after == {**before, "metadata": {"total_size": 3 * 4 * 2 + 5 * 2 + 2 * 8, "own": "words"}}
    assert any("variant fp16" in note for note in written.notes) == bool(variant)


def test_the_variant_is_that_which_loads_the_whole_model(model, out):
    for part in ("unet", "vae"):
        file = model / part / "diffusion_pytorch_model.safetensors"
        write(file.with_name("diffusion_pytorch_model.fp16.safetensors"), weights(70))
    full = recast(model, out)
    assert not any("fp16" in name for name in files(out)), "every part has full weights"
    assert any("diffusion_pytorch_model.fp16.safetensors" in note for note in full.notes)
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    written = recast(model, out.with_name("other"))
    assert {name for name in files(written.path) if "fp16" in name} == {
        f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("unet", "vae")
    }
    assert (written.path / "text_encoder" / "model.safetensors").is_file()


def test_pickles_keep_their_name_and_are_read_by_torch_alone(model, out):
    torch = pytest.importorskip("torch")
    tensors = {"a.weight": torch.randn(3, 4), "ids": torch.arange(3)}
    (model / "safety_checker" / "model.safetensors").unlink()
    torch.save(tensors, model / "safety_checker" / "pytorch_model.bin")
    recast(model, out, "bf16")
    assert files(out) == files(model)
    found = torch.load(out / "safety_checker" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(found["a.weight"], tensors["a.weight"].to(torch.bfloat16))
    assert torch.equal(found["ids"], tensors["ids"])


def test_of_several_sets_the_one_that_diffusers_loads_is_taken(model, out):
    torch = pytest.importorskip("torch")
    torch.save({"other": torch.zeros(1)}, model / "unet" / "diffusion_pytorch_model.bin")
    (model / "unet" / "model.safetensors").write_bytes(
        (model / "vae" / PARTS["vae"][2]).with_suffix(".safetensors").read_bytes()
    )
    (model / "vae" / "flax_model.msgpack").write_bytes(b"flax")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(b"onnx")
    written = recast(model, out)
    assert read(out / "unet" / "diffusion_pytorch_model.safetensors").keys() == weights().keys()
    left = next(note for note in written.notes if note.startswith("Left out"))
    for name in ("unet/diffusion_pytorch_model.bin", "unet/model.safetensors", "flax_model.msgpack", "model.onnx"):
        assert name in left
        assert not any(found.endswith(name) for found in files(out))


def test_what_lies_beside_a_pipeline_does_not_make_it_something_else(model, out):
    lora = {"unet.x.lora_A.weight": (2, 4), "unet.x.lora_B.weight": (4, 2)}
    write(model / "pytorch_lora_weights.safetensors", values(lora))
    write(model / "unet" / "adapter_model.safetensors", values(lora))
    (model / "v1-5-pruned.ckpt").write_bytes(b"another copy")
    written = recast(model, out)
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    for name in ("pytorch_lora_weights.safetensors", "unet/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
        assert any(note.startswith("Copied unchanged") and name in note for note in written.notes)
    assert "v1-5-pruned.ckpt" not in files(out)


def test_a_part_alone_is_recast_too(model, out):
    assert recast(model / "vae", out).family == "vae"
    assert files(out) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert read(out / "diffusion_pytorch_model.safetensors")["a.weight"][0] == "F16"


def test_the_source_is_not_written_into_nor_replaced(model, out):
    before = files(model)
    (out.parent / "link").symlink_to(model)
    for inside in (model / "copy", model / "unet" / "copy", out.parent / "link" / "copy", model, model.parent):
        with pytest.raises(CheckpointError):
            checkpoints.convert(model, inside, dtype="fp16", overwrite=True)
    assert files(model) == before


# ------------------------------------------------------------------------------------------ what is refused or said


def small(dtype, *shape):
    return TensorFact(dtype, shape)


PACKED = {
    "comfy": {"x.weight": small("F8_E4M3", 2, 2), "x.scale_weight": small("F32")},
    "scaled": {"x.weight": small("F8_E5M2", 2, 2), "x.weight_scale": small("F32", 1)},
    "inverse": {"x.weight": small("F8_E4M3", 2, 2), "x.weight_scale_inv": small("F32", 1, 1)},
    "inputs": {"x.weight": small("F8_E4M3", 2, 2), "x.input_scale": small("F32", 1)},
    "codes written as fractions": {"x.weight": small("F16", 2, 2), "x.weight_scale": small("F32", 1)},
    "marked": {"model.x.weight": small("F8_E4M3", 2, 2), "scaled_fp8": small("F8_E4M3", 2)},
    "quanto": {"x.weight._data": small("I8", 2, 2), "x.weight._scale": small("F16", 2, 1)},
    "quanto float": {"x.weight._data": small("F8_E4M3", 2, 2), "x.weight._scale": small("F16", 2, 1)},
    "nf4": {"x.weight": small("U8", 2, 1), "x.weight.absmax": small("F32", 1),
            "x.weight.quant_state.bitsandbytes__nf4": small("U8", 9)},
    "only its state": {"x.weight": small("U8", 2, 1), "x.weight.quant_state.bitsandbytes__fp4": small("U8", 9)},
    "int8": {"x.weight": small("I8", 2, 2), "x.SCB": small("F32", 2)},
    "int8 alone": {"x.weight": small("I8", 2, 2)},
    "gptq": {"x.qweight": small("I32", 2, 2), "x.qzeros": small("I32", 1), "x.scales": small("F16", 2)},
    "packed": {"x.weight_packed": small("I32", 2, 2), "x.weight_shape": small("I64", 2),
               "x.weight_scale": small("F16", 1)},
    "svd": {"x.qweight": small("I8", 2, 2), "x.wscales": small("F16", 2)},
    "mx": {"x.up_blocks": small("U8", 2, 2), "x.up_scales": small("U8", 2)},
    "root": {"weight": small("I8", 2, 2), "weight_scale": small("F32", 1)},
    "comfy_quant": {"x.weight": small("I8", 2, 2), "x.comfy_quant": small("U8", 9)},
}  # fmt: skip
PLAIN = {
    "fp8 norm of Flux": {"n.query_norm.scale": small("F8_E4M3", 4), "n.qkv.weight": small("F8_E4M3", 4, 4)},
    "fp8 of OpenCLIP": {"m.text_projection": small("F8_E4M3", 4, 4), "m.logit_scale": small("F32")},
    "tables": {"b.scale_shift_table": small("F32", 6, 4), "b.proj.weight": small("F16", 4, 4)},
    "counts": {"n.num_batches_tracked": small("I64"), "n.weight": small("F32", 4),
               "ids.position_ids": small("I64", 1, 4)},
    "layer scale": {"l.layer_scale": small("F32", 4), "l.weight": small("F16", 4, 4)},
    "quantizer": {"quant_conv.weight": small("F16", 4, 4), "quantize.embedding.weight": small("F32", 4, 4)},
    "mask": {"attn.bias": small("U8", 1, 1, 4, 4), "attn.c.weight": small("F32", 4, 4), "attn.m": small("BOOL", 4)},
    "codec": {"input_scale": small("F32", 1), "weight": small("F16", 4, 4)},
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED)
def test_codes_that_need_a_scale_are_known_by_what_lies_beside_them(kind, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds (scaled|quantized) .*cannot be converted"):
        refuse_packed("model", PACKED[kind])
    path = write(tmp_path / "a.safetensors", {name: (fact, bytes(fact.bytes)) for name, fact in PACKED[kind].items()})
    assert any("cannot be converted" in problem.what for problem in checkpoints.inspect(path).problems)
    placed = {f"model.diffusion_model.{name}": fact for name, fact in PACKED[kind].items()}
    with pytest.raises(CheckpointError):
        refuse_packed("model", placed)


@pytest.mark.parametrize(
    ("dtype", "size"), [("F4", 8), ("F6_E2M3", 12), ("F8_E8M0", 16), ("F8_E4M3FNUZ", 16), ("F8_E5M2FNUZ", 16)]
)
def test_formats_that_only_quantized_files_have_are_told_and_refused(dtype, size, tmp_path):
    name = "double_blocks.0.img_attn.qkv.weight"
    header = json.dumps({name: {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "in.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    found = checkpoints.inspect(path, scan=True)
    assert (found.family, found.dtypes) == ("flux", {dtype: size})
    assert f"in the format {dtype})" in found.problems[0].what
    with pytest.raises(CheckpointError, match=r"holds quantized weights .*cannot be converted"):
        checkpoints.convert(path, tmp_path / "out.safetensors", dtype="fp16")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a complete"):
        checkpoints.inspect(path)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_weights_with_a_scale_of_their_own_are_not_codes(kind, tmp_path):
    refuse_packed("model", PLAIN[kind])
    path = write(tmp_path / "a.safetensors", {name: (fact, bytes(fact.bytes)) for name, fact in PLAIN[kind].items()})
    assert not [problem for problem in checkpoints.inspect(path).problems if "cannot be converted" in problem.what]


@pytest.mark.parametrize("part", ["unet", "safety_checker", "vae"])
@pytest.mark.parametrize("kind", ["scaled", "quanto", "nf4", "int8 alone", "codes written as fractions"])
def test_a_folder_with_packed_weights_in_any_part_is_refused_whole(kind, part, model, out):
    (file,) = (model / part).glob("*.safetensors")
    write(file, {name: (fact, bytes(fact.bytes)) for name, fact in PACKED[kind].items()})
    with pytest.raises(CheckpointError, match=r"holds (scaled|quantized) .*cannot be converted"):
        recast(model, out)
    assert not out.exists()


@pytest.mark.parametrize("nested", [False, True])
def test_a_configuration_that_says_quantized_is_believed(nested, model, out):
    stated = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(
        json.dumps({**config, **({"text_config": stated} if nested else stated)})
    )
    with pytest.raises(FastSDError, match="says that the weights are quantized"):
        recast(model, out)
    with pytest.raises(FastSDError, match="says that the weights are quantized"):
        checkpoints.convert(model, out.with_suffix(".safetensors"))
    assert not out.exists()


def test_plain_8_bit_weights_are_widened_and_that_is_said(model, out):
    eight = {"a.weight": (small("F8_E4M3", 3, 4), bytes(range(0x38, 0x44)))}
    write(model / "safety_checker" / "model.safetensors", eight)
    written = recast(model, out)
    assert any("upcast from 8 bits" in note for note in written.notes)
    assert read(out / "safety_checker" / "model.safetensors")["a.weight"][0] == "F16"


@pytest.mark.parametrize("part", ["safety_checker", "unet"])
def test_a_gguf_file_in_the_place_of_weights_is_named(part, model, out):
    next((model / part).glob("*.safetensors")).unlink()
    (model / part / "model-Q4.gguf").write_bytes(b"GGUF" + bytes(60))
    for name in ("out", "out.safetensors"):
        with pytest.raises(CheckpointError, match="is a GGUF file"):
            recast(model, out.with_name(name))
    assert not out.exists()


@pytest.mark.parametrize("part", ["vae", "controlnet"])
def test_a_part_that_is_named_and_not_there_is_refused(part, model, out):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, part: ["diffusers", "AutoencoderKL"]}))
    shutil.rmtree(model / part, ignore_errors=True)
    with pytest.raises(FastSDError, match=part):
        recast(model, out)
    assert not out.exists()


def test_an_optional_part_that_downloads_leave_out_is_said_to_be_missing(model, out):
    shutil.rmtree(model / "safety_checker")
    notes = recast(model, out).notes
    assert any("safety_checker is named in model_index.json and is not in the source" in note for note in notes)


def test_a_part_that_lost_its_weights_on_the_way_is_noticed_without_verify(model, out, monkeypatch):
    real = folder_copy._write

    def forgetful(plan, folder, verify):
        if folder.name != "safety_checker":
            real(plan, folder, verify)

    monkeypatch.setattr(folder_copy, "_write", forgetful)
    with pytest.raises(VerificationFailed, match="safety_checker"):
        checkpoints.convert(model, out, dtype="fp16")
    assert not out.exists()


def test_a_value_too_large_for_the_new_format_stops_it_and_leaves_nothing(model, out):
    large = {"a.weight": (small("F32", 1), np.float32(1e6).tobytes())}
    write(model / "image_encoder" / "model.safetensors", large)
    with pytest.raises(CheckpointError, match="float16 ends at"):
        recast(model, out)
    assert not out.exists()
    assert not [name for name in os.listdir(out.parent) if name.endswith(".part")]


def test_random_folders_are_loaded_by_diffusers_as_before(tmp_path):
    pytest.importorskip("diffusers")
    from random_folders import build_all, differences

    models = build_all()
    for seed in (1, 5):
        (tmp_path / str(seed)).mkdir()
        assert differences(seed, models, tmp_path / str(seed)) == []
        shutil.rmtree(tmp_path / str(seed))
