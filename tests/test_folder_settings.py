"""What a model's configuration says beyond its weights is carried through a single file, or named in one note."""

import json
import struct

import pytest
from table_models import folder, original, read, values, widths_of, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.prediction import MARKS, Prediction, prediction_of_file, prediction_of_folder
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, TensorFact
from fastsd_helpers.checkpoints.formats.sources import BytesSource
from fastsd_helpers.checkpoints.models.configs import VAE_FACTORS, component_config, model_index, scheduler_config
from fastsd_helpers.checkpoints.models.folder_settings import (
    SETTINGS,
    settings_in_words,
    settings_of_file,
    settings_of_folder,
)
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.errors import CheckpointError

MEAN, STD = (-1.6574, 1.886, -1.383, 2.5155), (8.4927, 5.9022, 6.5498, 5.2299)


@pytest.fixture
def place(tmp_path):
    """An empty folder of the test's own."""
    made = tmp_path / "place"
    made.mkdir()
    return made


def floats(*numbers, shape=None, code="f", dtype="F32"):
    content = struct.pack(f"<{len(numbers)}{code}", *numbers)
    return TensorFact(dtype, (len(numbers),) if shape is None else shape), content


PLAYGROUND = {"edm_mean": floats(*MEAN, shape=(1, 4, 1, 1)), "edm_std": floats(*STD, shape=(1, 4, 1, 1))}
COSXL = {"edm_vpred.sigma_max": floats(120.0, shape=()), "edm_vpred.sigma_min": floats(0.002, shape=())}


def config(path, **change):
    """A configuration, after these changes to it."""
    file = path / "config.json" if (path / "config.json").exists() else path / "scheduler_config.json"
    content = {**json.loads(file.read_text()), **change}
    if change:
        file.write_text(json.dumps(content))
    return content


def header(path):
    with SafetensorsFile(path) as file:
        return file.metadata


def notes_on_settings(written):
    return [note for note in written.notes if "settings of the folder" in note]


# ------------------------------------------------------------------------------------------------ EDM


@pytest.mark.parametrize("marks", [PLAYGROUND, COSXL], ids=["playground", "cosxl"])
def test_an_edm_model_stays_one_from_file_to_folder_and_back(marks, place):
    source = write(place / "in.safetensors", {**original("sdxl", "F16"), **marks})
    checkpoints.convert(source, place / "folder", verify=True)
    written = checkpoints.convert(place / "folder", place / "back.safetensors", verify=True)
    assert read(written.path) == read(source)
    assert notes_on_settings(written) == []
    # In another dtype the noise levels keep their digits.
    wide = checkpoints.convert(source, place / "wide.safetensors", dtype="bf16", verify=True)
    assert {name: read(wide.path)[name] for name in marks} == {name: read(source)[name] for name in marks}
    assert checkpoints.inspect(written.path, hashes=False).problems == ()


def test_playgrounds_folder_is_what_diffusers_itself_makes_of_the_file(place):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    import diffusers

    source = write(place / "in.safetensors", {**original("sdxl", "F16"), **PLAYGROUND})
    assert checkpoints.inspect(source, hashes=False).prediction == "edm"
    checkpoints.convert(source, place / "folder")
    tensors = {"edm_mean": torch.tensor(MEAN).reshape(1, 4, 1, 1), "edm_std": torch.tensor(STD).reshape(1, 4, 1, 1)}
    parameters = {"ch": 8, "ch_mult": [1, 2, 4, 4], "in_channels": 3, "out_ch": 3, "z_channels": 4, "num_res_blocks": 2}
    ldm = {"model": {"params": {"first_stage_config": {"params": {"ddconfig": parameters}}}}}
    theirs = utils.create_vae_diffusers_config_from_ldm(ldm, tensors)
    ours = config(place / "folder" / "vae")
    assert ours["scaling_factor"] == theirs["scaling_factor"] == 0.5
    for name in ("latents_mean", "latents_std"):
        assert torch.allclose(torch.tensor(ours[name]), theirs[name].flatten(), rtol=1e-7)
    library, name = json.loads((place / "folder" / "model_index.json").read_text())["scheduler"]
    assert (library, name) == ("diffusers", "EDMDPMSolverMultistepScheduler")
    scheduler = getattr(diffusers, name).from_pretrained(place / "folder" / "scheduler")
    assert (scheduler.config.sigma_data, scheduler.config.sigma_max, scheduler.config.sigma_min) == (0.5, 80.0, 0.002)
    scheduler.set_timesteps(4)
    assert abs(float(scheduler.sigmas[0]) - 80.0) < 1e-4


def test_cosxls_folder_has_its_noise_levels_and_predicts_velocity(place):
    diffusers = pytest.importorskip("diffusers")
    source = write(place / "in.safetensors", {**original("sdxl", "F16"), **COSXL})
    found = checkpoints.inspect(source, hashes=False)
    assert (found.what, found.prediction) == ("an SDXL (CosXL) file", "edm_v_prediction")
    checkpoints.convert(source, place / "folder")
    scheduler = diffusers.EDMEulerScheduler.from_pretrained(place / "folder" / "scheduler")
    said = {name: scheduler.config[name] for name in ("sigma_max", "sigma_min", "sigma_data", "prediction_type")}
    assert said == {"sigma_max": 120.0, "sigma_min": 0.002, "sigma_data": 1.0, "prediction_type": "v_prediction"}
    assert config(place / "folder" / "vae")["scaling_factor"] == 0.13025


def test_a_base_that_lends_configurations_does_not_make_an_ordinary_model_of_it(place):
    source = write(place / "in.safetensors", {**original("sdxl", "F16"), **PLAYGROUND})
    base = folder(place / "base", "sdxl", "F16")
    checkpoints.convert(source, place / "folder", base=base)
    vae = config(place / "folder" / "vae")
    assert (vae["scaling_factor"], vae["latents_mean"]) == (0.5, list(MEAN))
    assert config(place / "folder" / "scheduler")["sigma_max"] == 80.0
    index = json.loads((place / "folder" / "model_index.json").read_text())
    assert index["scheduler"][1] == config(place / "folder" / "scheduler")["_class_name"]


@pytest.mark.parametrize("code", ["f", "e", "d"])
def test_noise_levels_are_read_in_every_number_format(code, place):
    dtype = {"f": "F32", "e": "F16", "d": "F64"}[code]
    marks = {
        "edm_mean": floats(0.5, 1, 2, -4, code=code, dtype=dtype),
        "edm_std": floats(1, 2, 4, 8, code=code, dtype=dtype),
    }
    found = prediction_of_file(place / "in.safetensors", "sdxl", BytesSource(marks))
    assert found.edm is not None
    assert (found.edm.mean, found.edm.std) == ((0.5, 1.0, 2.0, -4.0), (1.0, 2.0, 4.0, 8.0))


@pytest.mark.parametrize(
    "damaged",
    [floats(1, 2, 3), floats(1, 2, 3, 0), floats(1, 2, 3, float("nan")), (TensorFact("I64", (4,)), bytes(32))],
    ids=["three", "zero", "nan", "whole"],
)
def test_noise_levels_that_are_none_are_a_sentence(damaged, place):
    marks = {"edm_mean": PLAYGROUND["edm_mean"], "edm_std": damaged}
    with pytest.raises(CheckpointError, match=r"'edm_std'.* 4 numbers above 0") as caught:
        prediction_of_file(place / "in.safetensors", "sdxl", BytesSource(marks))
    assert caught.value.hint


def test_a_file_with_damaged_noise_levels_is_inspected_and_not_converted(place):
    marks = {"edm_mean": PLAYGROUND["edm_mean"], "edm_std": floats(1, 2, 3)}
    source = write(place / "in.safetensors", {**original("sdxl", "F16"), **marks})
    assert "edm_std" in checkpoints.inspect(source, hashes=False).problems[0].what
    with pytest.raises(CheckpointError, match="edm_std"):
        checkpoints.convert(source, place / "folder")
    assert [path.name for path in place.iterdir()] == ["in.safetensors"]


# ------------------------------------------------------------------------------------------------ a VAE alone

ARCHITECTURES = {
    "sd15": "stable-diffusion-v1/vae",
    "sd21": "stable-diffusion-v2-768-v/vae",
    "sdxl": "stable-diffusion-xl-v1-base/vae",
    "flux": "flux-1-dev/vae",
    "sd3": "stable-diffusion-v3-medium/vae",
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_vae_gets_the_scaling_of_the_family_that_its_header_or_the_user_names(family, place):
    key = "flux-ae" if family in ("flux", "sd3") else "vae"
    scaling, shift = VAE_FACTORS[family]
    said = write(place / "said.safetensors", original(key), {"modelspec.architecture": ARCHITECTURES[family]})
    mute = write(place / "mute.safetensors", original(key))
    for name, source, options in (("a", said, {}), ("b", mute, {"family": family})):
        written = checkpoints.convert(source, place / name, **options)
        found = config(place / name)
        assert (found["scaling_factor"], found.get("shift_factor", 0.0)) == (scaling, shift)
        assert written.notes == ()
    # A file made of that folder, or of the mute file with the family named, says it.
    checkpoints.convert(place / "b", place / "back.safetensors")
    checkpoints.convert(mute, place / "named.safetensors", family=family)
    for name in ("back", "named"):
        checkpoints.convert(place / f"{name}.safetensors", place / f"{name}-folder")
        assert config(place / f"{name}-folder")["scaling_factor"] == scaling
    other = "sdxl" if key == "flux-ae" else "flux"
    with pytest.raises(CheckpointError, match="not of the family"):
        checkpoints.convert(mute, place / "no", family=other)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("vae", "2.x was written. SDXL's is 0.13025: specify the family (--family sdxl)"),
        ("flux-ae", "and shift_factor 0.1159 of Flux.1 were written. Stable Diffusion 3's are 1.5305 and 0.0609"),
    ],
)
def test_a_vae_that_says_nothing_is_converted_with_a_note_on_what_was_assumed(key, words, place):
    source = write(place / "in.safetensors", original(key))
    (note,) = checkpoints.convert(source, place / "folder").notes
    assert words in note
    assert str(config(place / "folder")["scaling_factor"]) in note
    assert any("--family" in line for line in checkpoints.inspect(source, hashes=False).advice)


def test_a_scaling_that_no_family_has_is_named_and_comes_back(place):
    checkpoints.convert(write(place / "in.safetensors", original("vae")), place / "folder", family="sdxl")
    config(place / "folder", scaling_factor=0.2, latents_mean=[1.0, 2.0, 3.0, 4.0])
    (note,) = checkpoints.convert(place / "folder", place / "out.safetensors").notes
    assert "VAE: scaling_factor 0.2, latents_mean [1.0, 2.0, 3.0, 4.0]" in note
    assert checkpoints.convert(place / "out.safetensors", place / "again").notes == ()
    again = config(place / "again")
    assert (again["scaling_factor"], again["latents_mean"]) == (0.2, [1.0, 2.0, 3.0, 4.0])
    (lost,) = checkpoints.convert(place / "out.safetensors", place / "out.ckpt").notes
    assert "They are lost" in lost


# ------------------------------------------------------------------------------------------------ whole folders

# As the published folders have them; `_class_name` last.
SD15 = {
    **{"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000},
    **{"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None},
    **{"clip_sample": False, "_diffusers_version": "0.6.0", "_class_name": "PNDMScheduler"},
}
SDXL = {
    **SD15,
    **{"interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0},
    **{"timestep_spacing": "leading", "use_karras_sigmas": False, "_class_name": "EulerDiscreteScheduler"},
}
SD21 = {**SD15, "prediction_type": "v_prediction", "_class_name": "DDIMScheduler"}
FLUX = {
    **{"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15},
    **{"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True},
    **{"_class_name": "FlowMatchEulerDiscreteScheduler"},
}
UNET = {"_diffusers_version": "0.19.0", "conv_in_kernel": 3, "class_embed_type": None, "upcast_attention": None} | {
    "dual_cross_attention": False, "mid_block_type": "UNetMidBlock2DCrossAttn", "resnet_time_scale_shift": "default",
}  # fmt: skip


def configurations(path, key):
    """The configurations of a whole folder, without its weights."""
    family, widths = find_family(key), widths_of(key)
    for part in family.parts:
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_text(json.dumps(component_config(family, part, widths)))
    (path / "scheduler").mkdir()
    schedule = scheduler_config(family, Prediction("epsilon", ""))
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    (path / "model_index.json").write_text(json.dumps(model_index(family, {})))
    return path


def settings_of(path, key):
    return settings_of_folder(path, find_family(key), widths_of(key), prediction_of_folder(path, key))


@pytest.mark.parametrize(
    ("key", "schedule"), [("sd15", SD15), ("sdxl", SDXL), ("sd21", SD21), ("flux-all-in-one", FLUX)]
)
def test_nothing_is_named_of_what_the_published_folders_say(key, schedule, place):
    source = configurations(place / "model", key)
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    if key != "flux-all-in-one":
        config(source / "unet", **{name: value for name, value in UNET.items() if name != "upcast_attention"})
    assert settings_of(source, key) == {}


@pytest.mark.parametrize(
    ("key", "part", "change", "words"),
    [
        ("sd15", "scheduler", {"prediction_type": "sample"}, 'prediction_type "sample"'),
        ("sd15", "scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr true"),
        ("sdxl", "scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr true"),
        ("sd15", "scheduler", {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}, 'class "EDMEulerScheduler"'),
        ("sdxl", "scheduler", {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}, 'class "EDMEulerScheduler"'),
        ("sd15", "scheduler", {"beta_schedule": "linear"}, 'beta_schedule "linear"'),
        ("sd15", "scheduler", {"beta_start": 0.0015, "beta_end": 0.0195}, "beta_end 0.0195, beta_start 0.0015"),
        ("sdxl", "scheduler", {"timestep_spacing": "trailing"}, 'timestep_spacing "trailing"'),
        ("sdxl", "scheduler", {"_class_name": "LCMScheduler"}, 'class "LCMScheduler"'),
        ("sdxl", "scheduler", {"_class_name": "TCDScheduler", "timestep_scaling": 9.0}, "timestep_scaling 9.0"),
        ("sdxl", "vae", {"scaling_factor": 0.18215}, "scaling_factor 0.18215"),
        ("sdxl", "vae", {"force_upcast": False}, "force_upcast false"),
        ("sd15", "vae", {"latents_std": [1.0, 1.5, 1.0, 1.0]}, "latents_std"),
        ("sd15", "unet", {"upcast_attention": True}, "upcast_attention true"),
        ("sd15", "unet", {"attention_head_dim": 4}, "attention_head_dim 4"),
        ("sd15", "unet", {"norm_eps": 1e-6, "act_fn": "gelu"}, 'act_fn "gelu"'),
    ],
)
def test_what_a_file_has_no_place_for_is_one_note(key, part, change, words, place):
    source = configurations(place / "model", key)
    config(source / part, **change)
    found = settings_of(source, key)
    assert found == {part: {name: value for name, value in change.items() if name != "norm_eps"}} | found
    (note,) = settings_in_words(found, header=True)
    assert words in note
    assert "header" in note
    # The header gives them back.
    assert settings_of_file({SETTINGS: json.dumps(found)}) == found
    (lost,) = settings_in_words(found, header=False)
    assert "They are lost" in lost


def test_settings_beyond_the_weights_come_back_from_a_file_and_are_lost_in_a_ckpt(place):
    source = folder(place / "model", "sd15", "F16")
    config(source / "scheduler", _class_name="LCMScheduler", timestep_spacing="trailing", prediction_type="sample")
    config(source / "unet", attention_head_dim=4)
    written = checkpoints.convert(source, place / "out.safetensors", verify=True)
    (note,) = notes_on_settings(written)
    for words in (
        'class "LCMScheduler"',
        'timestep_spacing "trailing"',
        'prediction_type "sample"',
        "U-Net: attention",
    ):
        assert words in note
    checkpoints.convert(written.path, place / "back")
    for part in ("scheduler", "unet"):
        assert config(place / "back" / part) == config(source / part)
    assert json.loads((place / "back" / "model_index.json").read_text())["scheduler"][1] == "LCMScheduler"
    (lost,) = notes_on_settings(checkpoints.convert(source, place / "out.ckpt"))
    assert "They are lost" in lost


@pytest.mark.parametrize(("key", "wide"), [("sd15", False), ("sd21", True), ("sd21-inpaint", True), ("sdxl", False)])
def test_an_sd2_folder_computes_attention_in_fp32_as_the_published_one(key, wide):
    made = component_config(find_family(key), "unet", widths_of(key))
    assert bool(made.get("upcast_attention")) is wide


@pytest.mark.parametrize("marks", [("v_pred", "ztsnr"), ("ztsnr",)], ids="-".join)
def test_the_marks_of_a_file_stay_and_say_what_it_predicts(marks, place):
    given = {mark: (TensorFact("F32", (0,)), b"") for mark in marks}
    source = write(place / "in.safetensors", {**original("sdxl", "F16"), **given})
    written = checkpoints.convert(source, place / "out.safetensors", dtype="bf16")
    assert {name for name in read(written.path) if name in MARKS} == set(marks)
    found = prediction_of_file(written.path, "sdxl", BytesSource(given))
    schedule = scheduler_config(find_family("sdxl"), found)
    # A file without a word on it makes a folder without one.
    assert schedule.get("prediction_type") == ("v_prediction" if "v_pred" in marks else None)
    assert schedule["rescale_betas_zero_snr"] is ("ztsnr" in marks)


@pytest.mark.parametrize("key", ["sdxl", "sd21"])
def test_a_file_without_a_word_on_what_it_predicts_makes_folders_and_files_without_one(key, place):
    source = write(place / "in.safetensors", original(key, "F16"))
    again = checkpoints.convert(source, place / "again.safetensors", dtype="bf16")
    assert "modelspec.prediction_type" not in header(again.path), "read back, it would be believed"
    written = checkpoints.convert(source, place / "folder")
    assert "prediction_type" not in config(place / "folder" / "scheduler")
    assert any("does not say whether it predicts noise (epsilon) or velocity (v). Diff" in n for n in written.notes)
    back = checkpoints.convert(place / "folder", place / "back.safetensors")
    assert "modelspec.prediction_type" not in header(back.path)
    told = write(place / "v.safetensors", {**original(key, "F16"), "v_pred": (TensorFact("F32", (0,)), b"")})
    checkpoints.convert(told, place / "v-folder")
    assert config(place / "v-folder" / "scheduler")["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("predicts", ["v_prediction", "epsilon", None])
def test_a_base_says_what_an_sd21_file_predicts_where_the_file_does_not_and_the_base_does(predicts, place):
    source = write(place / "in.safetensors", original("sd21", "F16"))
    base = folder(place / "base", "sd21", "F16")
    config(base / "scheduler", prediction_type=predicts)
    written = checkpoints.convert(source, place / "folder", base=base)
    assert config(place / "folder" / "scheduler").get("prediction_type") == predicts
    if predicts:
        assert written.notes[-1].endswith(f"velocity (v): what the base predicts ({predicts}) was taken.")
    else:
        assert "velocity (v), and neither does the base. Diffusers takes epsilon" in written.notes[-1]
    back = checkpoints.convert(place / "folder", place / "back.safetensors")
    assert header(back.path).get("modelspec.prediction_type") == ("v" if predicts == "v_prediction" else predicts)


def test_the_architecture_of_an_sd21_file_says_what_it_predicts_only_where_the_model_does(place):
    for predicts, end in ((None, ""), ("epsilon", "-512"), ("v_prediction", "-768-v")):
        word = f"stable-diffusion-v2{end}"
        model = folder(place / str(predicts), "sd21", "F16")
        config(model / "scheduler", prediction_type=predicts)
        made = checkpoints.convert(model, place / f"{predicts}.safetensors")
        assert header(made.path)["modelspec.architecture"] == word
        again = checkpoints.convert(made.path, place / f"{predicts} again.safetensors", dtype="bf16")
        assert header(again.path)["modelspec.architecture"] == word
    bare = checkpoints.convert(write(place / "bare.safetensors", original("sd21")), place / "new.safetensors")
    assert header(bare.path)["modelspec.architecture"] == "stable-diffusion-v2"
    assert "modelspec.resolution" not in header(bare.path), "they are of 512 and of 768 px"


@pytest.mark.parametrize(
    "said",
    [
        "not json",
        "[]",
        '{"scheduler": 3, "unknown": {"a": 1}}',
        '{"scheduler": {"_class_name": "os.system"}, "vae": {"_class_name": "AutoencoderKL"}}',
        '{"unet": {"block_out_channels": [1], "in_channels": 9, "A b": 1, "x": {"y": 1}}}',
        '{"vae": {"scaling_factor": [[1]], "down_block_types": ["x"], "latent_channels": 16}}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:30],
)
def test_a_header_that_says_something_else_changes_nothing(said, place):
    assert not any(settings_of_file({SETTINGS: said}).values())
    source = write(place / "in.safetensors", original("vae"), {SETTINGS: said})
    checkpoints.convert(source, place / "folder")
    checkpoints.convert(write(place / "plain.safetensors", original("vae")), place / "plain")
    assert config(place / "folder") == config(place / "plain")


def test_a_word_for_the_prediction_that_nobody_knows_is_passed_over(place):
    source = write(place / "in.safetensors", original("sd15", "F16"), {"modelspec.prediction_type": "magic"})
    assert checkpoints.inspect(source, hashes=False).prediction == "epsilon"
    sample = write(place / "x0.safetensors", original("sd15", "F16"), {"modelspec.prediction_type": "sample"})
    checkpoints.convert(sample, place / "folder")
    assert config(place / "folder" / "scheduler")["prediction_type"] == "sample"


def test_sd2_inpainting_goes_both_ways_and_is_inspected(place):
    source = folder(place / "model", "sd21-inpaint", "F16")
    written = checkpoints.convert(source, place / "out.safetensors", verify=True)
    found = checkpoints.inspect(written.path, hashes=False)
    assert (found.what, found.family) == ("a Stable Diffusion 2.x inpainting file", "sd21-inpaint")
    assert (found.missing, found.unexpected) == ((), ())
    checkpoints.convert(written.path, place / "back", verify=True)
    assert (
        json.loads((place / "back" / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    )
    assert config(place / "back" / "unet")["in_channels"] == 9
    again = checkpoints.convert(place / "back", place / "again.safetensors", verify=True)
    assert read(again.path) == read(written.path)


def test_a_flux_fill_file_with_everything_becomes_a_fill_folder(place):
    tensors = original("flux-all-in-one", "F16")
    name = "model.diffusion_model.img_in.weight"
    tensors |= values({name: (tensors[name][0].shape[0], 384)}, "F16")
    checkpoints.convert(write(place / "in.safetensors", tensors), place / "folder")
    assert json.loads((place / "folder" / "model_index.json").read_text())["_class_name"] == "FluxFillPipeline"
    assert config(place / "folder" / "transformer")["in_channels"] == 384
