"""Every family, both directions: names and shapes of the original, every bit back, prediction types, parts alone."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_families
from closeness import assert_close_to
from installed import require_installed
from tiny_families import FAMILIES, build_parts, make_folder, reference
from tiny_models import load_file, same_bits

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile
from fastsd_helpers.checkpoints.names.families import FAMILY_KEYS, PART_KEYS, find_family
from fastsd_helpers.checkpoints.names.layout import expected_shapes, match_names, measure
from fastsd_helpers.errors import CheckpointError

require_installed("diffusers")

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

LISTS = {"sd15": "sd15", "sd21": "sd21", "sdxl": "sdxl", "flux": "flux1-dev"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> (folder, part -> state dict); made when first asked for."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, make_folder(folder, family, seed=FAMILIES.index(family))
        return made[family]

    return get


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """Family -> what came of converting its folder; not to be changed."""

    @functools.cache
    def get(family):
        return checkpoints.convert(models(family)[0], tmp_path_factory.mktemp(family) / "a.safetensors", verify=True)

    return get


@pytest.fixture(scope="module")
def back_again(models, tmp_path_factory):
    """Family -> (one file with everything, the folder made of it); not to be changed."""

    @functools.cache
    def get(family):
        place = tmp_path_factory.mktemp(family)
        one = checkpoints.convert(models(family)[0], place / "one.safetensors", all_in_one=True).path
        checkpoints.convert(one, place / "back", verify=True)
        return one, place / "back"

    return get


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def flat(tensors):
    """Text encoders in one spelling, without the buffer that old files have."""
    return {
        name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if not name.endswith(("position_ids", "encoder.embed_tokens.weight"))
    }


def saved_weights(folder):
    """Part -> tensors of a Diffusers folder, read with the safetensors library."""
    return {path.parent.name: flat(load_file(path)) for path in folder.glob("*/*.safetensors")}


# ------------------------------------------------------------------------------------------------ names and shapes


@pytest.mark.parametrize("key", [*FAMILY_KEYS, *PART_KEYS])
def test_every_table_names_each_tensor_once_and_measures_what_it_uses(key):
    family = find_family(key)
    assert len(family.to_diffusers) == len(family.rows)
    assert len(family.to_original) == sum(len(row.diffusers) for row in family.rows)
    for part, name, _axis in family.measured.values():
        row = family.to_original[part, name]
        assert (row.form, len(row.diffusers)) == ("same", 1)


@pytest.mark.parametrize(("family", "name"), [("sd21", "sd21"), ("sdxl", "sdxl"), ("flux", "flux1-dev")])
def test_a_tiny_export_has_exactly_the_names_and_shapes_of_the_original(family, name, exported):
    written = exported(family)
    found = {key: tuple(tensor.shape) for key, tensor in load_file(written.path).items()}
    assert found == reference(f"{name}.tiny")[0]
    if family == "flux":
        assert written.beside == (written.path.with_name("ae.safetensors"),)
        vae = {key: tuple(tensor.shape) for key, tensor in load_file(written.beside[0]).items()}
        assert vae == reference("flux-ae.tiny")[0]


@pytest.mark.parametrize(
    ("family", "name", "guidance"),
    [("sd21", "sd21", True), ("sdxl", "sdxl", True), ("flux", "flux1-dev", True), ("flux", "flux1-schnell", False)],
)
def test_the_table_at_full_width_is_the_recorded_list(family, name, guidance):
    with torch.device("meta"):
        parts = build_parts(family, "full", guidance=guidance)
    assert shapes_of(family, parts) == reference(name)[0]
    if family == "flux":
        assert shapes_of("flux-ae", parts) == reference("flux-ae")[0]
        whole = shapes_of("flux-all-in-one", parts)
        bare = {name.removeprefix("model.diffusion_model."): shape for name, shape in whole.items()}
        assert bare.items() >= reference(name)[0].items()


def test_flux_schnell_has_no_guidance_and_says_so_in_its_metadata(place):
    make_folder(place / "model", "flux", guidance=False)
    written = checkpoints.convert(place / "model", place / "a.safetensors")
    assert set(load_file(written.path)) == set(reference("flux1-schnell.tiny")[0])
    with SafetensorsFile(written.path) as file:
        assert file.metadata["modelspec.architecture"] == "flux-1-schnell"


def shapes_of(key, parts):
    family = find_family(key)
    shapes = {}
    for part in family.parts:
        given = {name: tuple(tensor.shape) for name, tensor in parts[part].state_dict().items()}
        shapes[part] = {ours: given[theirs] for ours, theirs in match_names(family, part, given).items()}
    return expected_shapes(family, measure(family, shapes))


@pytest.mark.parametrize("family", ["sd15-inpaint", "sdxl-refiner"])
def test_the_full_width_of_families_without_a_recorded_list_fits_the_real_classes(family):
    with torch.device("meta"):
        parts = build_parts(family, "full")
    shapes = shapes_of(family, parts)
    first = shapes["model.diffusion_model.input_blocks.0.0.weight"]
    assert first == ((320, 9, 3, 3) if family == "sd15-inpaint" else (384, 4, 3, 3))
    stacked = sum(len(row.diffusers) - 1 for row in find_family(family).rows)
    assert len(shapes) + stacked == sum(len(model.state_dict()) for model in parts.values())


# ------------------------------------------------------------------------------------------------ both directions


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_comes_back_from_its_single_file_bit_for_bit(family, models, back_again, place):
    tensors, (one, folder) = models(family)[1], back_again(family)
    back = saved_weights(folder)
    assert back.keys() == tensors.keys()
    for part, given in tensors.items():
        wanted = flat(given)
        assert back[part].keys() == wanted.keys(), part
        for name, tensor in wanted.items():
            assert same_bits(back[part][name], tensor), f"{part} {name}"
    # And from there the same file again: what names the file differs in nothing that a reader sees.
    again = checkpoints.convert(folder, place / "two.safetensors", all_in_one=True)
    first, second = load_file(one), load_file(again.path)
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_configurations_written_build_models_that_take_the_weights_strictly(family, models, back_again):
    import diffusers
    import transformers

    _one, back = back_again(family)
    index = json.loads((back / "model_index.json").read_text())
    for part, tensors in models(family)[1].items():
        library = {"diffusers": diffusers, "transformers": transformers}[index[part][0]]
        model, info = getattr(library, index[part][1]).from_pretrained(back / part, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), part
        loaded = flat(model.state_dict())
        assert all(same_bits(loaded[name], tensor) for name, tensor in flat(tensors).items())


def save_as(form, folder, models_dir, tensors):
    """The parts of a folder again: in shards, as a variant, as .bin, with another spelling of the text encoder."""
    from safetensors.torch import save_file

    for path in folder.glob("*/*"):
        target = models_dir / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".safetensors":
            target.write_bytes(path.read_bytes())
    (models_dir / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
    for part, given in tensors.items():
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        given = {name: tensor.clone() for name, tensor in given.items() if name != "encoder.embed_tokens.weight"}
        if part == "text_encoder" and form == "prefixed":
            given = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in given.items()}
        if form == "bin":
            stem = "pytorch_model" if part.startswith("text") else stem
            torch.save(given, models_dir / part / f"{stem}.bin")
        elif form == "sharded":
            names = sorted(given)
            halves = names[::2], names[1::2]
            homes = {}
            for number, half in enumerate(halves, 1):
                file = f"{stem}-{number:05d}-of-00002.safetensors"
                save_file({name: given[name] for name in half}, models_dir / part / file)
                homes |= dict.fromkeys(half, file)
            index = {"metadata": {}, "weight_map": homes}
            (models_dir / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        else:
            ending = ".fp16.safetensors" if form == "variant" else ".safetensors"
            save_file(given, models_dir / part / f"{stem}{ending}")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sharded", "variant", "bin", "prefixed"])
@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_every_form_of_a_folder_gives_the_same_tensors(form, family, models, exported, place):
    folder, tensors = models(family)
    save_as(form, folder, place / "other", tensors)
    one = load_file(exported(family).path)
    two = load_file(checkpoints.convert(place / "other", place / "two.safetensors").path)
    assert one.keys() == two.keys()
    assert all(same_bits(one[name], two[name]) for name in one)


@pytest.mark.numeric
def test_stacked_and_turned_tensors_are_what_the_original_computes(models, exported):
    tensors = models("sdxl")[1]
    stored = load_file(exported("sdxl").path)
    second = flat(tensors["text_encoder_2"])
    block = "conditioner.embedders.1.model.transformer.resblocks.5.attn.in_proj_"
    for leaf in ("weight", "bias"):
        parts = [second[f"encoder.layers.5.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
        assert torch.equal(stored[block + leaf], torch.cat(parts))
    # OpenCLIP multiplies by it from the right, Hugging Face has a Linear.
    projection = stored["conditioner.embedders.1.model.text_projection"]
    x = torch.randn(2, projection.shape[0])
    assert torch.equal(projection, second["text_projection.weight"].T)
    theirs = torch.nn.functional.linear(x, second["text_projection.weight"])
    # The same sums of fp32 products in another order: up to 2.7e-7.
    assert_close_to(x @ projection, theirs, of_largest=3e-6)


def test_the_halves_of_fluxs_last_norm_are_swapped(models, exported):
    tensors = models("flux")[1]
    stored = load_file(exported("flux").path)
    scale, shift = tensors["transformer"]["norm_out.linear.weight"].chunk(2)
    assert torch.equal(stored["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))


def test_a_transpose_survives_a_change_of_format(models, place):
    folder, tensors = models("sdxl")
    written = checkpoints.convert(folder, place / "a.safetensors", dtype="bf16", verify=True)
    projection = load_file(written.path)["conditioner.embedders.1.model.text_projection"]
    assert torch.equal(projection, tensors["text_encoder_2"]["text_projection.weight"].T.to(torch.bfloat16))


# ------------------------------------------------------------------------------------------------ diffusers as reader


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "pipeline"), [("sd21", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")]
)
def test_diffusers_own_loader_reads_the_file_and_our_export_of_it_is_the_same_file(
    family, pipeline, models, exported, place
):
    import diffusers

    folder, tensors = models(family)
    one = exported(family)
    from diffusers.loaders import single_file_utils as theirs

    stored = load_file(one.path)
    unet = json.loads((folder / "unet" / "config.json").read_text())
    vae = json.loads((folder / "vae" / "config.json").read_text())
    back = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(stored), unet),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(stored), vae),
    }
    encoders = {"text_encoder": getattr(diffusers, pipeline)}
    for part in encoders:
        config = str(folder / part)
        with torch.no_grad():
            back[part] = clip_by_diffusers(theirs, stored, family, part, config)
    if family == "sdxl":
        back["text_encoder_2"] = clip_by_diffusers(theirs, stored, family, "text_encoder_2", "")
    for part, given in tensors.items():
        wanted = flat(given)
        found = flat(back[part])
        assert found.keys() == wanted.keys(), part
        assert all(same_bits(found[name].contiguous(), wanted[name]) for name in wanted), part
        saved = place / "theirs" / part
        saved.mkdir(parents=True)
        from safetensors.torch import save_file

        contiguous = {name: tensor.contiguous().clone() for name, tensor in back[part].items()}
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_file(contiguous, saved / f"{stem}.safetensors")
        (saved / "config.json").write_bytes((folder / part / "config.json").read_bytes())
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (place / "theirs" / name).parent.mkdir(exist_ok=True)
        (place / "theirs" / name).write_bytes((folder / name).read_bytes())
    two = load_file(checkpoints.convert(place / "theirs", place / "two.safetensors").path)
    assert stored.keys() == two.keys()
    assert all(same_bits(stored[name], two[name]) for name in stored)


def clip_by_diffusers(theirs, stored, family, part, config):
    """diffusers' own way from the original names to transformers'."""
    import transformers

    if family == "sdxl" and part == "text_encoder":
        return theirs.convert_ldm_clip_checkpoint(dict(stored), remove_prefix="conditioner.embedders.0.transformer.")
    prefix = "cond_stage_model.model." if family == "sd21" else "conditioner.embedders.1.model."
    parts = build_parts(family)
    kind = transformers.CLIPTextModel if part == "text_encoder" else transformers.CLIPTextModelWithProjection
    model = parts[part]
    assert isinstance(model, kind)
    return theirs.convert_open_clip_checkpoint(model, dict(stored), prefix=prefix)


# ------------------------------------------------------------------------------------------------ prediction types


def test_a_v_prediction_sd21_gets_a_yaml_and_says_so(place):
    import yaml

    make_folder(place / "model", "sd21", scheduler={"prediction_type": "v_prediction"})
    written = checkpoints.convert(place / "model", place / "v.safetensors")
    assert written.beside == (place / "v.yaml",)
    config = yaml.safe_load((place / "v.yaml").read_text())["model"]["params"]
    assert config["parameterization"] == "v"
    unet = config["unet_config"]["params"]
    assert (unet["model_channels"], unet["channel_mult"], unet["context_dim"]) == (32, [1, 2, 4, 4], 64)
    assert unet["use_linear_in_transformer"] is True
    assert config["cond_stage_config"]["params"]["layer"] == "penultimate"
    with SafetensorsFile(written.path) as file:
        assert file.metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
        assert file.metadata["modelspec.prediction_type"] == "v"
        assert "resblocks.23" in file.metadata["fastsd.left_out"]
    # The way back reads it from there.
    checkpoints.convert(written.path, place / "back")
    scheduler = json.loads((place / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


def test_a_v_prediction_sdxl_gets_the_marks_of_comfyui_and_forge(place):
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    make_folder(place / "model", "sdxl", scheduler=scheduler)
    written = checkpoints.convert(place / "model", place / "v.safetensors", verify=True)
    stored = load_file(written.path)
    assert stored["v_pred"].numel() == stored["ztsnr"].numel() == 0
    assert stored.keys() - reference("sdxl.tiny")[0].keys() == {"v_pred", "ztsnr"}
    assert not (place / "v.yaml").exists()
    half = checkpoints.convert(written.path, place / "half.safetensors", dtype="fp16")
    assert {"v_pred", "ztsnr"} <= load_file(half.path).keys()
    checkpoints.convert(written.path, place / "back")
    back = json.loads((place / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert (back["prediction_type"], back["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_an_sd21_file_that_does_not_say_what_it_predicts_is_converted_with_a_warning(exported, place):
    from safetensors.torch import save_file

    stored = load_file(exported("sd21").path)
    save_file(stored, place / "bare.safetensors")
    result = checkpoints.convert(place / "bare.safetensors", place / "back")
    assert any("v-prediction" in note for note in result.notes)


# ------------------------------------------------------------------------------------------------ SD 2.x extras


def test_the_last_layer_of_sd21_comes_from_a_base_file_and_is_never_invented(models, exported, place):
    from safetensors.torch import save_file

    folder, bare = models("sd21")[0], exported("sd21")
    assert any("24th layer" in note for note in bare.notes)
    everything = reference("sd21.tiny")[1]
    extras = {
        name: torch.randn(shape)
        for name, shape in everything.items()
        if "resblocks.23." in name or name.endswith(("text_projection", "logit_scale"))
    }
    assert len(extras) == 14
    base = {**load_file(bare.path), **extras, "betas": torch.zeros(1000)}
    save_file(base, place / "base.safetensors")
    written = checkpoints.convert(folder, place / "whole.safetensors", base=place / "base.safetensors", verify=True)
    stored = load_file(written.path)
    assert stored.keys() == bare_names(bare) | extras.keys()
    assert all(same_bits(stored[name], tensor) for name, tensor in extras.items())
    # A folder has no place for them, a file rewritten keeps them, and neither keeps the schedule.
    half = load_file(checkpoints.convert(place / "base.safetensors", place / "half.safetensors", dtype="fp16").path)
    assert half.keys() == stored.keys()
    checkpoints.convert(written.path, place / "back")
    assert not any("layers.23" in name for name in saved_weights(place / "back")["text_encoder"])
    with pytest.raises(CheckpointError, match=r"not a SD 2\.1 file"):
        checkpoints.convert(folder, place / "c.safetensors", base=exported("sd15").path)


def bare_names(written):
    return load_file(written.path).keys()


# ------------------------------------------------------------------------------------------------ parts alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "part", "key", "name"),
    [
        ("sd15", "vae", "vae", "encoder.mid.attn_1.q.weight"),
        ("flux", "vae", "flux-ae", "decoder.mid.attn_1.proj_out.weight"),
        ("sd15", "text_encoder", "clip-l", "text_model.encoder.layers.0.self_attn.q_proj.weight"),
        ("sd21", "text_encoder", "clip-h", "text_model.encoder.layers.22.mlp.fc1.weight"),
        ("sdxl", "text_encoder_2", "clip-g", "text_projection.weight"),
        ("flux", "text_encoder_2", "t5", "shared.weight"),
        ("flux", "transformer", "flux", "single_blocks.37.linear1.weight"),
    ],
)
def test_a_part_alone_becomes_a_file_and_a_folder_again(family, part, key, name, models, place):
    folder, tensors = models(family)
    written = checkpoints.convert(folder / part, place / "part.safetensors", verify=True)
    stored = load_file(written.path)
    assert (written.family, name in stored) == (key, True)
    result = checkpoints.convert(written.path, place / "back", verify=True)
    assert result.family == key
    (weights,) = (place / "back").glob("*.safetensors")
    back, wanted = flat(load_file(weights)), flat(tensors[part])
    assert back.keys() == wanted.keys()
    assert all(same_bits(back[name], wanted[name]) for name in wanted)
    assert (place / "back" / "config.json").is_file()


# ------------------------------------------------------------------------------------------------ without torch


def test_between_safetensors_files_torch_is_never_imported(models, place):
    folder, _ = models("sdxl")
    script = """
import sys
from fastsd_helpers import checkpoints
source, place = sys.argv[1:]
checkpoints.convert(source, f"{place}/a.safetensors", dtype="fp16", verify=True)
checkpoints.convert(f"{place}/a.safetensors", f"{place}/back", dtype="bf16", verify=True)
checkpoints.convert(f"{place}/a.safetensors", f"{place}/b.ckpt")
checkpoints.inspect(f"{place}/a.safetensors", scan=True)
loaded = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "diffusers", "transformers", "safetensors"})
assert loaded == [], loaded
"""
    command = [sys.executable, "-c", script, str(folder), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tiny_families.__doc__
    assert Path(place / "b.ckpt").stat().st_size > 1000
