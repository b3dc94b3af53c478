"""Forms of input, broken input, dtypes, destinations, verification; parity/ has the independent references."""

import json
import os
import resource
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from installed import require_installed
from tiny_models import PARTS, SMALL, build_parts, load_file, same_bits

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.errors import CheckpointError, DiskFull, DriveReadOnly, ModelError, VerificationFailed

require_installed("diffusers")

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DATE = {"modelspec.date": "2026-01-02T03:04:05+00:00", "modelspec.title": "fixed"}


@pytest.fixture
def place(tmp_path):
    """An empty folder."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_models.build_pipeline(SMALL, tmp_path_factory.mktemp("words"), seed=7), tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def folder(pipeline):
    pipe, path = pipeline
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tensors(pipeline):
    """Part -> state dict, in the newest spelling; treat as read-only, `dict(tensors[part])` before changing one."""
    parts = {part: getattr(pipeline[0], part).state_dict() for part in PARTS}
    text = {name.removeprefix("text_model."): tensor for name, tensor in parts["text_encoder"].items()}
    return {**parts, "text_encoder": text}


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """The fp32 export of the folder."""
    return checkpoints.convert(folder, tmp_path_factory.mktemp("export") / "tiny.safetensors", verify=True)


@pytest.fixture(scope="module")
def fixed_sha256(tensors, tmp_path_factory):
    """The hash of the export with a fixed date: whatever the input's form, the file must be this one."""
    path = tmp_path_factory.mktemp("fixed") / "fixed.safetensors"
    return checkpoints.write_checkpoint(tensors, path, metadata=DATE).sha256


# ---------------------------------------------------------------------------------------- names and shapes


def test_every_name_of_the_table_is_there_once_in_either_direction():
    family = find_family("sd15")
    assert len(family.to_original) == len(family.to_diffusers) == len(family.rows)


def test_an_unknown_family_is_refused_with_the_ones_there_are():
    with pytest.raises(CheckpointError, match=r"'sd99'(.|\n)*sd15"):
        find_family("sd99")


def test_a_model_whose_widths_all_differ_gets_its_shortcuts_where_the_widths_change(place):
    import diffusers

    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 32), cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8
    )
    parts = {part: model.state_dict() for part, model in build_parts(SMALL).items()} | {"unet": unet.state_dict()}
    written = checkpoints.write_checkpoint(parts, place / "odd.safetensors")
    shortcuts = {name for name in load_file(written.path) if "input_blocks" in name and "skip_connection.w" in name}
    assert {name.split(".")[3] for name in shortcuts} == {"4", "10"}


# --------------------------------------------------------------------------------------- forms of the input


def test_both_spellings_of_the_text_encoder_give_the_same_file(tensors, fixed_sha256, place):
    flat = {name.removeprefix("text_model."): tensor for name, tensor in tensors["text_encoder"].items()}
    long = {f"text_model.{name}": tensor for name, tensor in flat.items()}
    for number, spelling in enumerate((flat, long)):
        path = place / str(number) / "fixed.safetensors"
        written = checkpoints.write_checkpoint({**tensors, "text_encoder": spelling}, path, metadata=DATE)
        assert written.sha256 == fixed_sha256


def test_old_attention_names_of_the_vae_give_the_same_file(tensors, fixed_sha256, place):
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in tensors["vae"].items():
        for new, ancient in new_to_old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{ancient}.")
        old[name] = tensor
    assert any("proj_attn" in name for name in old)
    written = checkpoints.write_checkpoint({**tensors, "vae": old}, place / "fixed.safetensors", metadata=DATE)
    assert written.sha256 == fixed_sha256


def test_position_ids_are_left_out(tensors, fixed_sha256, place):
    text = {**tensors["text_encoder"], "embeddings.position_ids": torch.arange(77)[None]}
    written = checkpoints.write_checkpoint(
        {**tensors, "text_encoder": text}, place / "fixed.safetensors", metadata=DATE
    )
    assert written.sha256 == fixed_sha256


def save_as(form, pipe, folder):
    """Save each part in one of the forms a Diffusers folder can have on disk."""
    for part in PARTS:
        model, name = getattr(pipe, part), "model" if part == "text_encoder" else "diffusion_pytorch_model"
        if form == "sharded":
            model.save_pretrained(folder / part, max_shard_size="50KB")
            assert len(list((folder / part).glob("*.safetensors"))) > 1
        elif form == "variant":
            model.save_pretrained(folder / part, variant="fp16")
        elif form == "sharded variant":
            model.save_pretrained(folder / part, variant="fp16", max_shard_size="50KB")
            assert any("index" in path.name for path in (folder / part).iterdir())
        else:
            (folder / part).mkdir(parents=True)
            stem = "pytorch_model" if part == "text_encoder" else name
            torch.save(model.state_dict(), folder / part / f"{stem}.bin")


@pytest.mark.parametrize("form", ["sharded", "variant", "sharded variant", "bin"])
def test_every_form_of_a_folder_gives_the_same_file(form, pipeline, fixed_sha256, place):
    save_as(form, pipeline[0], place / "model")
    parts = {part: place / "model" / part for part in PARTS}
    written = checkpoints.write_checkpoint(parts, place / "fixed.safetensors", metadata=DATE)
    assert written.sha256 == fixed_sha256
    assert checkpoints.verify_checkpoint(written, parts) == fixed_sha256


def test_a_weights_file_and_an_old_style_pickle_are_taken_too(folder, tensors, fixed_sha256, place):
    torch.save({"state_dict": tensors["vae"]}, place / "vae.ckpt", _use_new_zipfile_serialization=False)
    parts = {
        "unet": folder / "unet" / "diffusion_pytorch_model.safetensors",
        "vae": place / "vae.ckpt",
        "text_encoder": tensors["text_encoder"],
    }
    assert checkpoints.write_checkpoint(parts, place / "fixed.safetensors", metadata=DATE).sha256 == fixed_sha256


def test_plain_weights_are_taken_before_a_variant(pipeline, tensors, fixed_sha256, place):
    vae = place / "vae"
    pipeline[0].vae.save_pretrained(vae)
    torch.save({"other": torch.zeros(1)}, vae / "diffusion_pytorch_model.fp16.bin")
    written = checkpoints.write_checkpoint({**tensors, "vae": vae}, place / "fixed.safetensors", metadata=DATE)
    assert written.sha256 == fixed_sha256


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no weights of the VAE"),
        (("diffusion_pytorch_model.ema.bin", "diffusion_pytorch_model.non_ema.bin"), "several variants"),
        (("diffusion_pytorch_model.bin", "pytorch_model.bin"), "holds both"),
    ],
)
def test_a_folder_without_one_clear_choice_of_weights_is_refused(files, message, tensors, place):
    (place / "vae").mkdir()
    for name in files:
        torch.save(tensors["vae"], place / "vae" / name)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.write_checkpoint({**tensors, "vae": place / "vae"}, place / "a.safetensors")


def change_index(folder, change):
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: sorted(folder.glob("*-00001-of-*"))[0].unlink(), "lacks diffusion_pytorch_model-00001"),
        (lambda folder: change_index(folder, lambda homes: homes.popitem()), "does not list there"),
        (lambda folder: change_index(folder, lambda homes: homes.update(extra=min(homes.values()))), "'extra'"),
        (lambda folder: change_index(folder, lambda homes: homes.update(extra="../other")), "outside its own folder"),
        (lambda folder: next(folder.glob("*.index.json")).write_text('{"weight_map'), "cannot be read"),
    ],
)
def test_shards_that_do_not_fit_their_index_are_refused(damage, message, pipeline, tensors, place):
    pipeline[0].vae.save_pretrained(place / "vae", max_shard_size="100KB")
    damage(place / "vae")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.write_checkpoint({**tensors, "vae": place / "vae"}, place / "a.safetensors")


class Harmful:
    """Unpickling it runs code: it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("kind", ["code", "no tensors", "text", "empty", "cut short"])
def test_a_pickle_that_is_not_plain_tensors_is_refused_and_not_run(kind, tensors, place):
    path = place / "vae.bin"
    if kind == "code":
        torch.save({"a": Harmful(place / "ran")}, path)
    elif kind == "no tensors":
        torch.save({"a": [1, 2]}, path)
    elif kind == "cut short":
        torch.save(tensors["vae"], path)
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        path.write_bytes(b"version https://git-lfs" if kind == "text" else b"")
    with pytest.raises(CheckpointError, match=r"vae\.bin"):
        checkpoints.write_checkpoint({**tensors, "vae": path}, place / "a.safetensors")
    assert not (place / "ran").exists()


def test_a_text_file_or_a_cut_file_in_place_of_safetensors_is_refused(folder, tensors, place):
    whole = (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    header_only = struct.pack("<Q", 1 << 60) + b"{}"
    overlapping = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode()
    broken = {
        "cut": whole[:-1000],
        "longer": whole + b"x",
        "text": b"version https://git-lfs.github.com/spec/v1\n" * 10,
        "empty": b"",
        "huge": header_only,
        "list": struct.pack("<Q", 2) + b"[]",
        "gap": struct.pack("<Q", len(overlapping)) + overlapping + b"12345678",
    }
    for name, content in broken.items():
        path = place / f"{name}.safetensors"
        path.write_bytes(content)
        said = "a Git LFS pointer" if name == "text" else "not a complete safetensors file"
        with pytest.raises(CheckpointError, match=f"{name}.safetensors is {said}"):
            checkpoints.write_checkpoint({**tensors, "vae": path}, place / "a.safetensors")


# ------------------------------------------------------------------------------- what is wrong with a part


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


def refused(parts, place, match):
    with pytest.raises(CheckpointError, match=match):
        checkpoints.write_checkpoint(parts, place / "refused.safetensors")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "missing", "message"),
    [
        ("text_encoder", "encoder.layers.11.", r"text encoder lacks the tensor 'encoder\.layers\.11\.self_attn"),
        ("text_encoder", "embeddings.token", r"text encoder lacks the tensor 'embeddings\.token_embedding"),
        ("unet", "down_blocks.1.resnets.0.conv_shortcut.bias", r"U-Net lacks .*conv_shortcut\.bias"),
        ("vae", "quant_conv.weight", r"VAE lacks the tensor 'quant_conv\.weight'"),
        ("vae", "decoder.", r"VAE lacks the tensor 'decoder\."),
    ],
)
def test_a_missing_tensor_is_named(part, missing, message, tensors, place):
    refused({**tensors, part: without(tensors[part], missing)}, place, message)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.base_layer.weight"),
        ("text_encoder", "text_model.text_projection.weight"),
        ("vae", "loss.logvar"),
    ],
)
def test_an_unknown_tensor_is_named(part, name, tensors, place):
    refused({**tensors, part: {**tensors[part], name: torch.zeros(2)}}, place, f"{name!r} that SD 1.5")


def test_a_wrapper_that_holds_the_text_encoder_in_both_spellings_is_refused(tensors, place):
    flat = {name.removeprefix("text_model."): tensor for name, tensor in tensors["text_encoder"].items()}
    both = {**flat, **{f"text_model.{name}": tensor for name, tensor in flat.items()}}
    refused({**tensors, "text_encoder": both}, place, "uses two naming schemes for its tensors")
    half = {(f"text_model.{name}" if "layers.3" in name else name): tensor for name, tensor in flat.items()}
    refused({**tensors, "text_encoder": half}, place, "uses two naming schemes for its tensors")


def test_a_tensor_of_another_shape_is_named(tensors, place):
    # SD 2.x has these as matrices: the names alone would pass.
    name = "down_blocks.0.attentions.0.proj_in.weight"
    unet = {**tensors["unet"], name: tensors["unet"][name][:, :, 0, 0]}
    refused({**tensors, "unet": unet}, place, r"proj_in\.weight' has the shape \[8, 8\]")
    inpainting = {**tensors["unet"], "conv_in.weight": torch.zeros(8, 9, 3, 3)}
    refused({**tensors, "unet": inpainting}, place, r"conv_in\.weight' has the shape \[8, 9, 3, 3\]")


def test_a_text_encoder_of_another_width_than_the_unet_reads_is_refused(tensors, place):
    config = transformers.CLIPTextConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=12,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    other = transformers.CLIPTextModel(config).state_dict()
    refused({**tensors, "text_encoder": other}, place, "U-Net fits a width of 16, the text encoder of 48")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_finite_number_stops_the_export_with_its_name(bad, tensors, place):
    name = "decoder.conv_out.bias"
    vae = {**tensors["vae"], name: torch.tensor([0.0, bad, 0.0])}
    refused({**tensors, "vae": vae}, place, f"VAE's tensor {name!r} contains NaN or Inf")


def test_a_weight_too_large_for_fp16_stops_the_export_and_fits_bf16(tensors, place):
    vae = {**tensors["vae"], "decoder.conv_out.bias": torch.tensor([0.0, 70000.0, 0.0])}
    parts = {**tensors, "vae": vae}
    with pytest.raises(CheckpointError, match=r"'decoder\.conv_out\.bias' reaches 7e\+04; float16 ends at"):
        checkpoints.write_checkpoint(parts, place / "a.safetensors", dtype="fp16")
    checkpoints.verify_checkpoint(checkpoints.write_checkpoint(parts, place / "b.safetensors", dtype="bf16"), parts)
    assert [path.name for path in place.iterdir()] == ["b.safetensors"]


def test_things_that_are_no_tensors_are_refused(tensors, place):
    refused({**tensors, "vae": {**tensors["vae"], "a": 3}}, place, "holds int under 'a'")
    refused({**tensors, "vae": {"a": torch.zeros(1, dtype=torch.complex64)}}, place, "complex64")
    refused({**tensors, "vae": {}}, place, "VAE holds no tensors")
    refused({**tensors, "vae": place / "nowhere"}, place, "There is no VAE at")
    refused({"unet": tensors["unet"]}, place, "The parts given are unet")


# --------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_each_format_is_torchs_own_rounding(dtype, torch_dtype, tensors, folder, place):
    written = checkpoints.convert(folder, place / "half.safetensors", dtype=dtype, verify=True)
    stored = load_file(written.path)
    for row in find_family("sd15").rows:
        if row.original in stored:
            (name,) = row.diffusers
            source = tensors[row.part][name].to(torch_dtype)
            assert same_bits(stored[row.original], source.reshape(stored[row.original].shape))
    assert written.bytes == written.path.stat().st_size


def test_keep_leaves_every_tensor_in_its_own_format(tensors, place):
    vae = {
        name: tensor.half() if name.startswith("encoder") else tensor.double() if "quant" in name else tensor
        for name, tensor in tensors["vae"].items()
    }
    text = {name: tensor.bfloat16() for name, tensor in tensors["text_encoder"].items()}
    parts = {"unet": tensors["unet"], "vae": vae, "text_encoder": text}
    written = checkpoints.write_checkpoint(parts, place / "mixed.safetensors")
    assert checkpoints.verify_checkpoint(written, parts) == written.sha256
    formats = {name: tensor.dtype for name, tensor in load_file(written.path).items()}
    assert formats["first_stage_model.encoder.conv_in.weight"] == torch.float16
    assert formats["first_stage_model.quant_conv.bias"] == torch.float64
    assert formats["model.diffusion_model.out.2.bias"] == torch.float32
    assert formats["cond_stage_model.transformer.text_model.final_layer_norm.bias"] == torch.bfloat16


def test_an_unknown_format_is_refused(tensors, place):
    with pytest.raises(CheckpointError, match=r"'int4'(.|\n)*keep, fp32, fp16, bf16"):
        checkpoints.write_checkpoint(tensors, place / "a.safetensors", dtype="int4")


def test_tensors_that_are_transposed_or_need_gradients_are_written_by_value(tensors, fixed_sha256, place):
    turned = {
        name: (tensor.t().contiguous().t() if tensor.dim() == 2 else tensor).requires_grad_()
        for name, tensor in ((name, tensor.clone()) for name, tensor in tensors["unet"].items())
    }
    written = checkpoints.write_checkpoint({**tensors, "unet": turned}, place / "fixed.safetensors", metadata=DATE)
    assert written.sha256 == fixed_sha256


# ------------------------------------------------------------------------------------------------- metadata


def test_metadata_follow_the_model_and_the_hash_is_that_of_the_data(exported):
    import hashlib

    with SafetensorsFile(exported.path) as file:
        metadata, start = file.metadata, file.data_start
    content = exported.path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == exported.sha256
    assert metadata.pop("modelspec.hash_sha256") == "0x" + hashlib.sha256(content[start:]).hexdigest()
    assert metadata.pop("modelspec.date")[:2] == "20"
    # The tiny model has its own number of heads, which no file has a place for.
    assert json.loads(metadata.pop("fastsd.settings"))["unet"]["attention_head_dim"] == 2
    assert metadata == {
        "format": "pt",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "64x64",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "tiny",
    }
    assert start % 8 == 0


def test_metadata_of_the_caller_win_and_must_be_text(tensors, place):
    given = {"modelspec.title": "Mein Hund 🐶", "fastsd.steps": "350+1500"}
    written = checkpoints.write_checkpoint(tensors, place / "a.safetensors", metadata=given)
    from safetensors import safe_open

    with safe_open(written.path, "pt") as file:
        assert given.items() <= file.metadata().items()
    with pytest.raises(CheckpointError, match="must be text"):
        checkpoints.write_checkpoint(tensors, place / "b.safetensors", metadata={"steps": 3})


# ---------------------------------------------------------------------------------------------- destinations


def test_an_existing_file_is_replaced_only_with_overwrite(tensors, place):
    path = place / "a.safetensors"
    path.write_text("precious")
    with pytest.raises(CheckpointError, match=r"a\.safetensors exists already(.|\n)*--overwrite"):
        checkpoints.write_checkpoint(tensors, path)
    assert path.read_text() == "precious"
    written = checkpoints.write_checkpoint(tensors, path, overwrite=True)
    assert checkpoints.verify_checkpoint(path, tensors) == written.sha256


def test_a_source_is_never_the_destination(folder, tensors, place):
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(CheckpointError, match="one of the files the model is read from"):
        checkpoints.write_checkpoint({**tensors, "vae": folder / "vae"}, weights, overwrite=True)
    with pytest.raises(CheckpointError, match="both source and destination"):
        checkpoints.convert(folder, folder, overwrite=True)
    assert weights.read_bytes() == before


@pytest.mark.parametrize("name", ["model.pt", "model", "model.safetensors.zip"])
def test_a_name_of_another_format_is_refused(name, tensors, place):
    with pytest.raises(CheckpointError, match=r"cannot be written(.|\n)*\.safetensors"):
        checkpoints.write_checkpoint(tensors, place / name)


def test_a_folder_as_destination_is_refused_and_an_absent_parent_is_made(tensors, place):
    (place / "dir.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        checkpoints.write_checkpoint(tensors, place / "dir.safetensors", overwrite=True)
    assert checkpoints.write_checkpoint(tensors, place / "a" / "b" / "c.safetensors").path.is_file()


def test_the_file_may_be_read_by_whom_the_umask_allows(tensors, place):
    before = os.umask(0o027)
    try:
        written = checkpoints.write_checkpoint(tensors, place / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE(written.path.stat().st_mode) == 0o640


def test_too_little_room_is_noticed_before_anything_is_written(tensors, place, monkeypatch):
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 1_000)
    with pytest.raises(DiskFull, match=r"\d MB are needed for the file"):
        checkpoints.write_checkpoint(tensors, place / "a.safetensors")
    assert list(place.iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_half_written(tensors, place):
    path = place / "a.safetensors"
    path.write_text("precious")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(DiskFull):
            checkpoints.write_checkpoint(tensors, path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "precious"
    assert list(place.iterdir()) == [path]


def test_a_read_only_folder_is_named(tensors, place, monkeypatch):
    real_open = Path.open

    def open_read_only(self, mode="r", *args, **kwargs):
        if "x" in mode:
            raise OSError(30, "Read-only file system")
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_read_only)
    with pytest.raises(DriveReadOnly):
        checkpoints.write_checkpoint(tensors, place / "a.safetensors")
    assert list(place.iterdir()) == []


KILLED = """
import sys
from pathlib import Path
from fastsd_helpers.checkpoints.formats.tensor_plan import copied
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.formats.safetensors_writer import write_safetensors
from fastsd_helpers.checkpoints.formats.sources import BytesSource
source = BytesSource({f"t{n}": (TensorFact("U8", (1000,)), bytes(1000)) for n in range(8)})
write_safetensors(Path(sys.argv[1]), {name: copied(source, name) for name in source.tensors}, metadata={})
"""


@pytest.mark.parametrize("fault", ["export.tensor:1", "export.tensor:8", "export.rename:1", "none:1"])
def test_a_kill_while_writing_leaves_the_old_file_and_the_next_run_cleans_up(fault, place):
    path = place / "a [1].safetensors"
    path.write_text("precious")

    def run(fault):
        environment = {**os.environ, "FASTSD_FAULT": fault, "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, timeout=60).returncode

    killed = fault != "none:1"
    assert run(fault) == (-9 if killed else 0)
    if killed:
        assert path.read_text() == "precious"
        assert [other.suffix for other in place.iterdir() if other != path] == [".part"]
        assert run("none:1") == 0
    assert list(place.iterdir()) == [path]
    with SafetensorsFile(path) as file:
        assert list(file.tensors) == [f"t{n}" for n in range(8)]


def test_the_temporary_file_of_a_living_process_is_left_alone(tensors, place):
    other = place / f".a.safetensors.{os.getppid()}.abcd.part"
    other.write_text("being written")
    checkpoints.write_checkpoint(tensors, place / "a.safetensors")
    assert other.read_text() == "being written"


# ----------------------------------------------------------------------------------------------- verification


@pytest.fixture
def written(tensors, place):
    return checkpoints.write_checkpoint(tensors, place / "a.safetensors")


def data_place(path, name):
    with SafetensorsFile(path) as file:
        return file._starts[name]


@pytest.mark.parametrize(
    "name", ["model.diffusion_model.out.2.bias", "cond_stage_model.transformer.text_model.final_layer_norm.weight"]
)
def test_one_flipped_bit_is_found_and_named(name, written, tensors):
    place = data_place(written.path, name)
    with written.path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(VerificationFailed, match=f"the tensor {name!r} differs from the .*first at value 0"):
        checkpoints.verify_checkpoint(written, tensors)


def test_a_file_of_the_right_tensors_but_another_header_is_not_the_one_written(written, tensors):
    content = written.path.read_bytes()
    written.path.write_bytes(content.replace(b'"modelspec.title":"a"', b'"modelspec.title":"b"', 1))
    with pytest.raises(VerificationFailed, match="has the SHA-256"):
        checkpoints.verify_checkpoint(written, tensors)
    assert checkpoints.verify_checkpoint(written.path, tensors) != written.sha256


def test_a_missing_an_extra_and_a_differently_stored_tensor_are_named(written, tensors):
    from safetensors.torch import save_file

    stored = load_file(written.path)
    name = "first_stage_model.quant_conv.bias"
    for change, message in (
        ({key: tensor for key, tensor in stored.items() if key != name}, f"lacks the tensor {name!r}"),
        ({**stored, "betas": torch.zeros(3)}, "contains an unexpected tensor 'betas'"),
        ({**stored, name: stored[name].half()}, r"as F16 \[8\]; it should be F32 \[8\]"),
        ({**stored, name: stored[name].reshape(4, 2)}, r"as F32 \[4, 2\]; it should be F32 \[8\]"),
    ):
        save_file(change, written.path)
        with pytest.raises(VerificationFailed, match=message):
            checkpoints.verify_checkpoint(written.path, tensors)


def test_a_cut_or_absent_file_is_not_verified(written, tensors):
    with written.path.open("r+b") as file:
        file.truncate(written.bytes - 1)
    with pytest.raises(VerificationFailed, match="not a complete safetensors file"):
        checkpoints.verify_checkpoint(written, tensors)
    written.path.unlink()
    with pytest.raises(VerificationFailed, match="cannot be opened"):
        checkpoints.verify_checkpoint(written, tensors)


def test_a_format_other_than_the_one_asked_for_is_noticed(written, tensors):
    with pytest.raises(VerificationFailed, match="should be F16"):
        checkpoints.verify_checkpoint(written.path, tensors, dtype="fp16")


def test_a_mapping_to_the_wrong_tensor_would_be_noticed(written, tensors):
    swapped = dict(tensors["text_encoder"])
    one, other = "encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.self_attn.k_proj.weight"
    swapped[one], swapped[other] = swapped[other], swapped[one]
    with pytest.raises(VerificationFailed, match=r"layers\.0\.self_attn\.[kq]_proj\.weight"):
        checkpoints.verify_checkpoint(written, {**tensors, "text_encoder": swapped})


# ---------------------------------------------------------------------------------------------------- convert


def test_convert_takes_the_prediction_type_and_resolution_from_the_folder(pipeline, place):
    pipe = pipeline[0]
    pipe.save_pretrained(place / "model")
    config = place / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    written = checkpoints.convert(place / "model", place / "v.safetensors")
    with SafetensorsFile(written.path) as file:
        assert file.metadata["modelspec.prediction_type"] == "v"
        assert file.metadata["modelspec.resolution"] == "64x64"


def test_convert_refuses_what_is_no_model_folder(place):
    (place / "empty").mkdir()
    with pytest.raises(ModelError):
        checkpoints.convert(place / "empty", place / "b.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.convert(place / "nowhere", place / "b.safetensors")
    assert [path.name for path in place.iterdir()] == ["empty"]


def test_convert_reads_every_byte_once(folder, place, monkeypatch):
    read = []
    real = os.preadv

    def count(descriptor, buffers, place):
        got = real(descriptor, buffers, place)
        read.append(got)
        return got

    monkeypatch.setattr(os, "preadv", count)
    written = checkpoints.convert(folder, place / "a.safetensors")
    with SafetensorsFile(written.path) as file:
        assert sum(read) == sum(fact.bytes for fact in file.tensors.values())


def test_the_public_names_are_there_and_no_others():
    assert checkpoints.__all__ == [
        "CheckpointFile",
        "Inspection",
        "convert",
        "inspect",
        "verify_checkpoint",
        "write_checkpoint",
    ]
    assert all(callable(getattr(checkpoints, name)) for name in checkpoints.__all__)
    with pytest.raises(AttributeError):
        _ = checkpoints.inspect_everything
    assert set(checkpoints.__all__) <= set(dir(checkpoints))
