"""Tests of the model registry; nothing here imports torch at module level, so that they run on a bare Python."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.errors import ModelError, ModelNotFound, SettingsError, WrongFamily
from fastsd_helpers.registry import (
    check_resolution,
    detect_family,
    find_model,
    models,
    require_trainable,
    spec_of,
)

XL_CHILDREN = ["illustrious-xl", "noobai-xl-eps", "noobai-xl-v", "pony-v6", "animagine-xl-4"]
KEYS = ["demo", "sd15", "sd15-inpaint", "sd21-512", "sd21-768", "sdxl", *XL_CHILDREN, "flux-dev", "flux-schnell"]

SD_UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "cross_attention_dim": 768,
    "sample_size": 64,
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL_UNET = {
    **SD_UNET,
    "cross_attention_dim": 2048,
    "sample_size": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_pipeline(
    folder: Path,
    *,
    unet: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
    text_encoders: int = 1,
    scheduler: dict[str, Any] | None = None,
) -> Path:
    """A Diffusers folder with real configs and a few bytes for weights: detection never opens weights."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    write_json(folder / "scheduler/scheduler_config.json", scheduler or {"prediction_type": "epsilon"})
    write_json(folder / "vae/config.json", VAE)
    parts = ["vae"]
    for part, config in (("unet", unet), ("transformer", transformer)):
        if config is not None:
            index[part] = ["diffusers", config["_class_name"]]
            write_json(folder / part / "config.json", config)
            parts.append(part)
    for name in ("text_encoder", "text_encoder_2")[:text_encoders]:
        index[name] = ["transformers", "CLIPTextModel"]
        write_json(folder / name / "config.json", {})
        (folder / name / "model.safetensors").write_bytes(b"weights")
    for part in parts:
        (folder / part / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    write_json(folder / "model_index.json", index)
    return folder


# ------------------------------------------------------------------------------------------------- the table


def test_the_keys_are_those_of_the_design_in_its_order():
    assert [spec.key for spec in models()] == KEYS


@pytest.mark.parametrize("key", KEYS)
def test_every_row_is_complete_and_plausible(key):
    spec = find_model(key)
    assert spec.title
    assert spec.licence
    assert spec.licence_page.startswith("https://")
    assert spec.checked == "never" or re.fullmatch(r"20\d\d-\d\d-\d\d", spec.checked)
    assert bool(spec.sources or spec.checkpoint) != bool(spec.folder)
    assert spec.min_px <= spec.native_px <= spec.max_px
    assert not any(px % spec.multiple for px in (spec.native_px, spec.min_px, spec.max_px))
    assert spec.prediction_type in ("epsilon", "v_prediction", "flow")
    for source in spec.sources:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repo)
        assert source.revision is None or re.fullmatch(r"[0-9a-f]{40}", source.revision)
    if spec.checkpoint:
        published = key not in XL_CHILDREN or key == "animagine-xl-4"
        assert re.fullmatch(r"[0-9a-f]{64}", spec.checkpoint.get("sha256", "" if published else "0" * 64))
        assert spec.checkpoint["file"].endswith(".safetensors")


READERS = [
    *(f"trocr-{size}-{what}" for size in ("small", "base", "large") for what in ("handwritten", "printed", "stage1")),
    *("trocr-base-str", "trocr-large-str"),
]


def test_the_readers_and_single_files_have_keys_of_their_own():
    assert [spec.key for spec in models("reader")] == ["demo-reader", *READERS]
    assert {spec.family for spec in models("reader")} == {"trocr"}
    assert "sdxl-vae" in {spec.key for spec in models("vae")}
    assert len({spec.key for spec in models(None)}) == len(models(None)) > len(models())
    for spec in models(None):
        assert spec.kind in ("base", "reader", "checkpoint", "diffusion-model", "vae", "text-encoder")
        assert bool(spec.sources or spec.checkpoint) != bool(spec.folder), spec.key
        assert spec.kind == "base" or not spec.defaults, spec.key
        for use, needed in spec.vram_gb.items():
            assert use in ("draw", "lora", "full")
            assert 0 < needed < 100
        about = spec.checkpoint or {}
        assert re.fullmatch(r"[0-9a-f]{64}", about.get("sha256", "0" * 64))
        assert spec.folder or spec.bytes or spec.key == "sd15-inpaint", f"{spec.key} has no size"


def test_the_release_check_notes_the_date_and_what_was_not_known():
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
    from check_registry import files_to_check, note_date

    row = '[a]\nchecked = "never"\n\n[a.checkpoint]\nrepo = "x/y"\nfile = "f"\nabout_bytes = 5\n'
    text = row + '\n[a-b]\nchecked = "never"\n'
    found = note_date(text, "a", "2026-12-01", {"bytes": 7, "sha256": "0" * 64})
    assert found.count('checked = "2026-12-01"') == 1
    assert "bytes = 7\n" in found
    assert "about_bytes" not in found
    assert found.endswith('[a-b]\nchecked = "never"\n')
    assert len(files_to_check()) > 90


def test_the_release_check_compares_with_the_hub_and_ends_in_words_without_it(tmp_path):
    import hashlib
    import os
    import subprocess
    import sys

    pytest.importorskip("huggingface_hub")
    from hub_server import HubServer

    scripts = Path(__file__).resolve().parents[1] / "scripts"
    code = "import sys; from check_registry import compare; print(compare('a/b', sys.argv[1], None, 3, sys.argv[2])[0])"

    def compared(endpoint: str, file: str, content: bytes) -> subprocess.CompletedProcess:
        words = [sys.executable, "-c", code, file, hashlib.sha256(content).hexdigest()]
        environ = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        environ["PYTHONPATH"] = f"{scripts}{os.pathsep}{environ['PYTHONPATH']}"
        return subprocess.run(words, env=environ, capture_output=True, text=True, check=False)

    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "f.safetensors").write_bytes(b"abc")
    with HubServer({"a/b": tmp_path / "served"}) as hub:
        assert compared(hub.url, "f.safetensors", b"abc").stdout == "[]\n"
        assert "sha256 ba7816bf8f01… there" in compared(hub.url, "f.safetensors", b"abd").stdout
        assert "no answer: 404" in compared(hub.url, "g.safetensors", b"abc").stdout
    done = compared("http://127.0.0.1:9", "f.safetensors", b"abc")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("The Hub cannot be reached (")
    assert done.stderr.count("\n") == 1


def test_sd15_has_the_defaults_of_the_notebook_it_replaces():
    spec = find_model("sd15")
    expected = {"unet_steps": 1500, "unet_lr": 2e-6, "text_encoder_steps": 350, "text_encoder_lr": 1e-6}
    assert spec.defaults == {"resolution": 512, "batch_size": 1, **expected}


def test_sdxls_children_have_its_shape_words_of_quality_and_the_velocity_that_one_predicts():
    parent = find_model("sdxl")
    for key in XL_CHILDREN:
        spec = find_model(key)
        assert (spec.family, spec.native_px, spec.trainable) == ("sdxl", 1024, True)
        assert {**spec.defaults, "min_snr": 0} == {**parent.defaults, "min_snr": 0}
        assert spec.quality
        assert spec.note.startswith("trained on captions as tags")
    velocity = {spec.key for spec in models() if spec.family == "sdxl" and spec.prediction_type == "v_prediction"}
    assert velocity == {spec.key for spec in models() if spec.zero_terminal_snr} == {"noobai-xl-v"}
    assert find_model("pony-v6").quality.startswith("score_9")


def test_every_default_is_a_setting_of_dreambooth():
    settings = pytest.importorskip("fastsd_helpers.dreambooth.settings")
    from fastsd_helpers.options import options_of

    names = {option.name for option in options_of(settings.DreamBoothConfig)}
    for spec in models():
        assert set(spec.defaults) <= names, spec.key


def test_the_two_sd21_models_differ_in_prediction_type_and_size_only_in_the_table():
    small, large = find_model("sd21-512"), find_model("sd21-768")
    assert small.family == large.family == "sd21"
    assert (small.prediction_type, large.prediction_type) == ("epsilon", "v_prediction")
    assert (small.native_px, large.native_px) == (512, 768)


def test_the_models_that_can_be_trained_are_those_of_the_families_sd15_sd21_and_sdxl():
    trained = ["demo", "sd15", "sd21-512", "sd21-768", "sdxl", *XL_CHILDREN]
    assert [spec.key for spec in models() if spec.trainable] == trained


def test_an_unknown_key_names_the_valid_ones_and_the_nearest():
    with pytest.raises(ModelNotFound) as caught:
        find_model("SD-15")
    assert "'SD-15'" in caught.value.problem
    assert "Did you mean 'sd15'?" in caught.value.hint
    assert ", ".join(KEYS) in caught.value.hint


def test_changing_the_defaults_of_a_spec_does_not_change_the_table():
    find_model("sd15").defaults["unet_steps"] = 1
    assert find_model("sd15").defaults["unet_steps"] == 1500


# --------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize(
    ("expected", "unet", "text_encoders"),
    [
        ("sd15", SD_UNET, 1),
        ("sd15", {**SD_UNET, "cross_attention_dim": 1024, "use_linear_projection": False}, 1),  # widths do not decide
        ("sd15-inpaint", {**SD_UNET, "in_channels": 9}, 1),
        ("sd21", {**SD_UNET, "use_linear_projection": True, "cross_attention_dim": 32}, 1),
        ("sd21-inpaint", {**SD_UNET, "use_linear_projection": True, "in_channels": 9}, 1),
        ("sdxl", SDXL_UNET, 2),
        ("sdxl-inpaint", {**SDXL_UNET, "in_channels": 9}, 2),
    ],
)
def test_the_family_follows_from_the_structure(tmp_path, expected, unet, text_encoders):
    assert detect_family(make_pipeline(tmp_path, unet=unet, text_encoders=text_encoders)) == expected


def test_an_sdxl_refiner_is_told_from_the_base_by_its_one_text_encoder(tmp_path):
    make_pipeline(tmp_path, unet=SDXL_UNET, text_encoders=2)
    index = json.loads((tmp_path / "model_index.json").read_text())
    write_json(tmp_path / "model_index.json", {**index, "text_encoder": [None, None]})
    assert detect_family(tmp_path) == "sdxl-refiner"


def test_flux_is_known_by_its_transformer(tmp_path):
    assert (
        detect_family(make_pipeline(tmp_path, transformer={"_class_name": "FluxTransformer2DModel"}, text_encoders=2))
        == "flux"
    )


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("takes 7 channels", {"in_channels": 7}),
        ("num_class_embeds = 1000", {"num_class_embeds": 1000}),
        ("time_cond_proj_dim = 256", {"time_cond_proj_dim": 256}),
        ("encoder_hid_dim_type = 'text_proj'", {"encoder_hid_dim_type": "text_proj"}),
        ("addition_embed_type = 'image'", {"addition_embed_type": "image"}),
        ("U-Net is a UNet2DModel", {"_class_name": "UNet2DModel"}),
        ("no cross-attention", {"cross_attention_dim": None}),
    ],
)
def test_a_unet_of_an_unknown_kind_is_named_with_the_reason(tmp_path, said, change):
    make_pipeline(tmp_path, unet={**SD_UNET, **change})
    with pytest.raises(WrongFamily, match=re.escape(said)) as caught:
        detect_family(tmp_path)
    assert "sd15" in caught.value.hint


def test_another_transformer_model_is_of_the_wrong_family(tmp_path):
    make_pipeline(tmp_path, transformer={"_class_name": "SD3Transformer2DModel"}, text_encoders=2)
    with pytest.raises(WrongFamily, match="SD3Transformer2DModel"):
        detect_family(tmp_path)


@pytest.mark.parametrize(
    ("said", "files"),
    [
        ("is empty", {}),
        ("is a ControlNet", {"config.json": '{"_class_name": "ControlNetModel"}', "diffusion_pytorch_model.bin": "w"}),
        ("is only a VAE", {"config.json": '{"_class_name": "AutoencoderKL"}', "diffusion_pytorch_model.bin": "w"}),
        ("is only a U-Net", {"config.json": '{"_class_name": "UNet2DConditionModel"}'}),
        ("is a single network (CLIPTextModel)", {"config.json": '{"architectures": ["CLIPTextModel"]}'}),
        ("is a LoRA", {"pytorch_lora_weights.safetensors": "w"}),
        ("is a LoRA", {"adapter_config.json": "{}", "adapter_model.safetensors": "w"}),
        ("holds single files (dream.safetensors)", {"dream.safetensors": "w", "readme.txt": "x"}),
        ("has no model_index.json", {"holiday.jpg": "x"}),
        ("has model parts but no model_index.json", {"unet/config.json": "{}"}),
        ("cannot be read as JSON", {"model_index.json": "{ cut off"}),
        ("holds no JSON object", {"model_index.json": "[]"}),
        ("is incomplete: a unet or transformer, vae", {"model_index.json": '{"vae": ["diffusers", "AutoencoderKL"]}'}),
    ],
)
def test_a_folder_that_is_no_base_model_is_told_what_it_is(tmp_path, said, files):
    for name, content in files.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "model").mkdir(exist_ok=True)
    with pytest.raises(ModelError, match=re.escape(said)) as caught:
        detect_family(tmp_path / "model")
    assert caught.value.hint


def test_a_missing_folder_and_a_file_are_not_the_same_mistake(tmp_path):
    with pytest.raises(ModelNotFound, match="no folder"):
        detect_family(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="single file"):
        detect_family(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "the weights in unet/"),
        ("text_encoder/model.safetensors", "the weights in text_encoder/"),
        ("vae/config.json", "vae/config.json"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json"),
    ],
)
def test_a_folder_that_lost_a_file_says_which(tmp_path, lost, said):
    make_pipeline(tmp_path, unet=SD_UNET)
    (tmp_path / lost).unlink()
    with pytest.raises(ModelError, match=f"is incomplete: {said} missing"):
        detect_family(tmp_path)


def test_weights_that_a_mount_has_not_delivered_yet_are_noticed(tmp_path):
    make_pipeline(tmp_path, unet=SD_UNET)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model.safetensors empty"):
        detect_family(tmp_path)


def test_training_takes_the_sd15_shape_and_refuses_others_with_what_works(tmp_path):
    assert require_trainable(make_pipeline(tmp_path / "good", unet=SD_UNET)) == "sd15"
    deep = {**SDXL_UNET, "transformer_layers_per_block": [1, 2, 10]}
    assert require_trainable(make_pipeline(tmp_path / "xl", unet=deep, text_encoders=2)) == "sdxl"
    make_pipeline(tmp_path / "inpaint", unet={**deep, "in_channels": 9}, text_encoders=2)
    with pytest.raises(WrongFamily, match="is a sdxl-inpaint model") as caught:
        require_trainable(tmp_path / "inpaint")
    assert "'demo', 'sd15'" in caught.value.hint
    for kind in ("LCMScheduler", "TCDScheduler", "EDMEulerScheduler"):
        other = make_pipeline(tmp_path / kind, unet=deep, text_encoders=2, scheduler={"_class_name": kind})
        with pytest.raises(WrongFamily, match=f"is made for {kind}") as caught:
            require_trainable(other)


@pytest.mark.parametrize(
    "change",
    [
        {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D"]},
        {"layers_per_block": 1},
    ],
)
def test_a_shortened_unet_is_refused_before_training_because_it_could_not_be_exported(tmp_path, change):
    make_pipeline(tmp_path, unet={**SD_UNET, **change})
    assert detect_family(tmp_path) == "sd15"
    with pytest.raises(WrongFamily, match="shortened U-Net"):
        require_trainable(tmp_path)


def test_a_model_saved_by_diffusers_itself_is_recognised(tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    make_pipeline(tmp_path, unet=SD_UNET)
    diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 4, 4, 4), norm_num_groups=2, cross_attention_dim=4, attention_head_dim=2
    ).save_pretrained(tmp_path / "unet")
    assert require_trainable(tmp_path) == "sd15"
    assert spec_of("mine", tmp_path).native_px == 64


# ---------------------------------------------------------------------------------------- specs of other models


def test_a_key_is_described_by_its_row_without_looking_at_the_folder(tmp_path):
    assert spec_of("sdxl", tmp_path / "nowhere") == find_model("sdxl")


def test_a_fine_tune_gets_the_defaults_of_its_family(tmp_path):
    spec = spec_of("someone/fine-tune", make_pipeline(tmp_path, unet=SD_UNET))
    row = find_model("sd15")
    assert (spec.key, spec.family, spec.native_px, spec.trainable) == ("someone/fine-tune", "sd15", 512, True)
    assert spec.defaults == row.defaults
    assert (spec.licence, spec.sources, spec.checkpoint) == ("unknown", (), None)


def test_a_copy_of_the_demo_is_treated_like_the_demo(tmp_path):
    spec = spec_of("./copy", make_pipeline(tmp_path, unet={**SD_UNET, "sample_size": 16}))
    demo = find_model("demo")
    assert (spec.native_px, spec.min_px, spec.max_px, spec.defaults) == (128, demo.min_px, demo.max_px, demo.defaults)


def test_the_scheduler_says_how_an_sd21_fine_tune_predicts(tmp_path):
    unet = {**SD_UNET, "use_linear_projection": True, "sample_size": 96}
    spec = spec_of("x/y", make_pipeline(tmp_path, unet=unet, scheduler={"prediction_type": "v_prediction"}))
    assert (spec.prediction_type, spec.native_px) == ("v_prediction", 768)
    write_json(tmp_path / "scheduler/scheduler_config.json", {"prediction_type": "sample"})
    with pytest.raises(WrongFamily, match="'sample'"):
        spec_of("x/y", tmp_path)


def test_limits_follow_an_unusual_native_size(tmp_path):
    spec = spec_of("x/y", make_pipeline(tmp_path, unet={**SD_UNET, "sample_size": 48}))
    assert (spec.native_px, spec.min_px, spec.max_px, spec.defaults["resolution"]) == (384, 192, 768, 384)


# ------------------------------------------------------------------------------------------------- resolution


def test_the_native_resolution_brings_no_warning():
    for spec in models():
        assert check_resolution(spec, spec.native_px) == []


@pytest.mark.parametrize(("px", "reason"), [(576, "1.3 times the memory"), (448, "lose detail")])
def test_an_off_native_resolution_warns_with_the_reason_and_the_safe_choice(px, reason):
    (warning,) = check_resolution(find_model("sd15"), px)
    assert str(px) in warning
    assert reason in warning
    assert "512 is the safe choice" in warning


@pytest.mark.parametrize(
    ("px", "problem", "hint"),
    [
        (500, "multiple of 64", "Choose 448 or 512."),
        (600, "multiple of 64", "Choose 576 or 640, or 512"),
        (64, "the smallest for Stable Diffusion 1.5 is 256", "Choose 256, or 512"),
        (0, "the smallest", "Choose 256, or 512"),
        (-512, "the smallest", "Choose 256, or 512"),
        (2048, "the largest for Stable Diffusion 1.5 is 1024", "Choose 1024, or 512"),
        (512.0, "integer", "Choose 512."),
        (True, "integer", "Choose 512."),
    ],
)
def test_an_impossible_resolution_is_refused_with_the_nearest_that_work(px, problem, hint):
    with pytest.raises(SettingsError, match=problem) as caught:
        check_resolution(find_model("sd15"), px)
    assert f"resolution (--resolution) is {px}" in caught.value.problem
    assert caught.value.hint.startswith(hint)


def test_the_hint_stays_inside_the_limits_of_the_model():
    spec = replace(find_model("demo"), min_px=128, max_px=192)
    with pytest.raises(SettingsError) as caught:
        check_resolution(spec, 100)
    assert caught.value.hint == "Choose 128."
