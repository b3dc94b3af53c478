"""DreamBooth's settings: what is left alone is filled in, presets and steps, and every field changes the run."""

from dataclasses import fields
from pathlib import Path

import pytest

from fastsd_helpers.demo import SUBJECTS_FOLDER
from fastsd_helpers.device import Device
from fastsd_helpers.dreambooth.presets import PRESETS, choose_steps
from fastsd_helpers.dreambooth.settings import DreamBoothConfig, resolve_settings, settings_for_more
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.options import to_values
from fastsd_helpers.registry import find_model, spec_of

CPU = Device(kind="cpu", name="a processor", memory_bytes=8 * 2**30, has_bf16=False)
SD15 = find_model("sd15")


def resolve(photos: int = 15, *, saved=None, **values) -> tuple[DreamBoothConfig, list[str]]:
    return resolve_settings(DreamBoothConfig(**values), SD15, CPU, saved=saved, photos=photos)


def test_what_is_left_alone_is_the_old_notebooks_run_with_everything_new_off() -> None:
    config, _ = resolve()
    assert (config.unet_steps, config.unet_lr, config.text_encoder_steps, config.text_encoder_lr) == (
        1500,
        2e-6,
        350,
        1e-6,
    )
    assert (config.method, config.min_snr, config.offset_noise, config.prior_weight, config.ema) == ("full", 0, 0, 0, 0)
    assert config.class_prompts == ()


@pytest.mark.parametrize(
    ("photos", "steps", "words"),
    [(15, 1500, "15 photos"), (5, 500, "5 photos"), (1, 500, "1 photo, the fewest"), (90, 4500, "90 photos, the most")],
)
def test_steps_auto_follow_the_number_of_photos_and_say_why(photos, steps, words) -> None:
    config, reasons = resolve(photos, steps="auto")
    assert config.unet_steps == steps
    assert config.text_encoder_steps == min(350, round(350 * steps / 1500, -1))
    assert any(line.startswith(f"steps from {words}: unet_steps {steps}") for line in reasons)


def test_a_larger_batch_needs_fewer_steps() -> None:
    assert resolve(steps="auto", batch_size=2, accumulation=2)[0].unet_steps == 380


def test_a_preset_fills_what_is_left_alone_and_the_users_own_values_win() -> None:
    config, reasons = resolve(10, preset="style")
    assert (config.offset_noise, config.unet_steps, config.text_encoder_steps) == (0.1, 1000, 120)
    assert "from the preset style: offset_noise 0.1" in reasons
    config, _ = resolve(10, preset="style", offset_noise=0.0, unet_steps=7)
    assert (config.offset_noise, config.unet_steps) == (0.0, 7)
    assert resolve(preset="face")[0].min_snr == 5.0


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_makes_settings_that_can_be_trained(name) -> None:
    config, _ = resolve(preset=name)
    assert config.unet_steps >= 10
    assert set(PRESETS[name].settings) <= {field.name for field in fields(DreamBoothConfig)}
    chosen, _ = choose_steps(SD15, 1, preset=name, rows=64.0)
    assert min(chosen.values()) == 10


def test_lora_has_rates_and_a_strength_of_its_own() -> None:
    config, reasons = resolve(method="lora", lora_rank=8)
    assert (config.unet_lr, config.text_encoder_lr, config.lora_alpha) == (1e-4, 5e-5, 8.0)
    assert any(line.startswith("rates for LoRA: unet_lr 0.0001") for line in reasons)
    assert resolve(method="lora", unet_lr=3e-5)[0].unet_lr == 3e-5
    assert "lora_rank and lora_alpha have no effect with method full" in resolve(lora_rank=8)[1]


def test_a_model_with_defaults_of_its_own_has_them_where_nothing_else_is_given() -> None:
    pony = find_model("pony-v6")
    config, reasons = resolve_settings(DreamBoothConfig(), pony, CPU, photos=15)
    assert (config.method, config.lr_scheduler, config.lora_targets) == ("lora", "constant_with_warmup", "all linears")
    assert (config.unet_lr, config.text_encoder_steps, config.resolution) == (1e-4, 0, 1024)
    assert "from Pony Diffusion V6 XL: method lora, lr_scheduler constant_with_warmup" in reasons
    own = DreamBoothConfig(lr_scheduler="linear", lora_targets="attention", unet_lr=3e-4, preset="face")
    config, _ = resolve_settings(own, pony, CPU, photos=15)
    assert (config.lr_scheduler, config.lora_targets, config.unet_lr) == ("linear", "attention", 3e-4)
    assert (config.unet_steps, config.text_encoder_steps, config.min_snr) == (1500, 0, 5.0)
    config, reasons = resolve_settings(DreamBoothConfig(method="full"), pony, CPU, photos=15)
    assert (config.unet_lr, config.text_encoder_lr, config.optimizer) == (1e-5, 1e-6, "adafactor")
    assert "rates for all weights: unet_lr 1e-05, text_encoder_lr 1e-06" in reasons


def test_a_class_prompt_turns_the_prior_on_and_zero_turns_it_off() -> None:
    config, reasons = resolve(class_prompt="a dog |  a  cat ")
    assert (config.prior_weight, config.class_images, config.class_prompts) == (1.0, 100, ("a dog", "a cat"))
    assert any("class prompt: prior_weight 1.0, class_images 100" in line for line in reasons)
    assert resolve(class_prompt="a dog", prior_weight=0.0)[0].class_prompts == ()
    assert resolve(class_prompt="a dog", class_images=0)[0].class_prompts == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prior_weight": 1.0}, "need a class_prompt"),
        ({"class_images": 5}, "need a class_prompt"),
        ({"class_prompt": "a dog |"}, "an empty part next to"),
        ({"class_prompt": " "}, "class_prompt .--class-prompt. is empty"),
        ({"ema": 1.0}, "the largest is 0.99999"),
        ({"preset": "dog"}, "choose none, face, object, style"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(values, words) -> None:
    with pytest.raises(SettingsError, match=words):
        DreamBoothConfig(**values)


def test_a_run_from_before_a_setting_existed_goes_on_without_it_and_refuses_it() -> None:
    saved = {"unet_steps": 10, "text_encoder_steps": 0, "unet_lr": 1e-6, "seed": 3, "batch_size": 1, "resolution": 512}
    config, _ = resolve(saved=saved)
    assert (config.method, config.min_snr, config.class_images, config.seed) == ("full", 0.0, 0, 3)
    with pytest.raises(SettingsError, match=r"min_snr was 0\.0 and is now 5\.0"):
        resolve(saved=saved, min_snr=5.0)
    with pytest.raises(SettingsError, match="method was 'full' and is now 'lora'"):
        resolve(saved=saved, method="lora")
    assert resolve(saved=saved, keep_best=True)[0].keep_best


# ------------------------------------------------------------------------------- every field changes the run

# field -> (what both runs have, one value, another value)
CLASS = {"class_prompt": "a dog", "class_images": 2, "prior_weight": 1.0}
LORA = {"method": "lora", "lora_rank": 2}
CASES: dict[str, tuple[dict, object, object]] = {
    "base_model": ({}, "one", "other"),
    "method": ({}, "full", "lora"),
    "preset": ({}, "none", "style"),
    "instance_prompt": ({}, None, "a photo of mel dog"),
    "class_prompt": ({"class_images": 2, "prior_weight": 1.0}, "a dog", "a cat"),
    "steps": ({"unet_steps": None, "text_encoder_steps": 0}, "model", "auto"),
    "unet_steps": ({}, 2, 1),
    "unet_lr": ({}, 1e-3, 2e-3),
    "text_encoder_steps": ({}, 2, 1),
    "text_encoder_lr": ({}, 1e-3, 2e-3),
    "resolution": ({}, 64, 128),
    "resolutions": ({}, None, "64,128"),
    "batch_size": ({}, 1, 2),
    "accumulation": ({}, 1, 2),
    "lr_scheduler": ({}, "linear", "constant"),
    "prior_weight": (CLASS, 1.0, 0.5),
    "class_images": (CLASS, 2, 3),
    "class_folder": (CLASS, None, "a folder"),
    "class_guidance": (CLASS, 1.0, 7.5),
    "min_snr": ({}, None, 0.01),  # 1 and more changes nothing at the noisy timesteps that two steps may draw
    "offset_noise": ({}, None, 0.2),
    "ema": ({}, 0.0, 0.9),
    "lora_rank": ({**LORA, "lora_alpha": 2.0}, 2, 3),
    "lora_alpha": (LORA, None, 1.0),
    "lora_targets": (LORA, "attention", "all linears"),
    "prediction_type": ({}, "auto", "v_prediction"),
    "zsnr": ({}, None, True),
    "seed": ({}, 42, 43),
    "flip": ({"unet_steps": 4}, False, True),
    "precision": ({}, "fp32", "bf16"),
    "optimizer": ({}, "adamw", "adamw8bit"),
    "gradient_checkpointing": ({}, False, True),
    "save_every": ({"keep_last": 9}, 0, 1),
    "keep_last": ({"save_every": 1}, 1, 9),
    "keep_best": ({}, False, True),
    "sample_every": ({}, 0, 1),
    "deterministic": ({}, False, True),
}


# Shown where processes are started anyway: the run of two equals that of accumulation 2, which is a case.
ELSEWHERE = {"processes": "test_several_processes.py"}


def test_every_field_has_a_case() -> None:
    assert sorted(CASES.keys() | ELSEWHERE.keys()) == sorted(field.name for field in fields(DreamBoothConfig))
    assert not CASES.keys() & ELSEWHERE.keys()


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    pytest.importorskip("diffusers")
    from dreambooth_runs import build_base

    folder = tmp_path_factory.mktemp("bases")
    return {"one": build_base(folder / "one"), "other": build_base(folder / "other", seed=8)}


def observe(config, folder: Path, monkeypatch) -> dict:
    """What a run made: weights, which checkpoints and samples there are, which work was done; or why it was refused."""
    import torch
    import torch.utils.checkpoint
    from diffusers.models import modeling_utils
    from dreambooth_runs import learned, make_session

    from fastsd_helpers.dreambooth import train

    monkeypatch.setenv("FASTSD_SCRATCH", str(folder / "scratch"))
    session = make_session(folder)
    again = []
    compute = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        modeling_utils.torch.utils.checkpoint, "checkpoint", lambda *a, **k: again.append(1) or compute(*a, **k)
    )
    try:
        train(config, session)
        deterministic = torch.are_deterministic_algorithms_enabled()
    except SettingsError as err:
        return {"refused": err.problem}
    finally:
        torch.use_deterministic_algorithms(False)
    kept = sorted(path.parent.name.rpartition("-")[0] for path in session.checkpoints.glob("*/manifest.json"))
    return {
        "weights": {name: tensor.sum().item() for name, tensor in learned(session).items()},
        "checkpoints": kept,
        "samples": sorted(path.name for path in session.samples.iterdir()),
        "computed again": bool(again),
        "deterministic": deterministic,
    }


@pytest.fixture(scope="module")
def observed() -> dict[frozenset, dict]:
    """What a run with these settings made."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_field_changes_the_run(name, bases, observed, tmp_path, monkeypatch) -> None:
    from dreambooth_runs import config_for, draw_quickly

    draw_quickly(monkeypatch)
    common, one, other = CASES[name]
    seen = []
    for number, value in enumerate((one, other)):
        values = {"unet_steps": 2, "text_encoder_steps": 2, **common, name: value}
        base = bases[values.pop("base_model", "one")]
        if values.get("class_folder"):
            values["class_folder"] = str(SUBJECTS_FOLDER / "held_out" / "robot")
        if name == "steps":  # the model's own are too many for a test
            spec = find_model("demo")
            monkeypatch.setitem(spec.defaults, "unet_steps", 30)
            monkeypatch.setattr(
                "fastsd_helpers.dreambooth.training.base_model.spec_of", lambda ref, folder, spec=spec: spec
            )
        # A value that the run has without it makes the run that most others are compared with: it is made once.
        plain = config_for(base, unet_steps=2, text_encoder_steps=2)
        had = to_values(plain), to_values(resolve_settings(plain, spec_of(str(base), base), CPU)[0])
        changes = {key: it for key, it in values.items() if it not in (had[0][key], had[1][key])}
        run = frozenset({"base": base, **changes}.items())
        if run not in observed:
            observed[run] = observe(config_for(base, **values), tmp_path / str(number), monkeypatch)
        seen.append(observed[run])
    assert seen[0] != seen[1]


def test_more_steps_of_a_full_run_say_nothing_of_lora() -> None:
    begun = resolve()[0]
    assert begun.lora_alpha is not None
    steps = {"unet_steps": 20, "text_encoder_steps": 0}
    begun_steps = {"unet_steps": begun.unet_steps, "text_encoder_steps": begun.text_encoder_steps}
    config, _ = settings_for_more(
        {"unet_lr": 1e-6}, to_values(begun), steps=steps, begun_steps=begun_steps, begun_given={}
    )
    _, reasons = resolve_settings(config, SD15, CPU)
    assert not any("have no effect" in reason for reason in reasons)
