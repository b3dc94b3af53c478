"""The benchmark of the training step: what it times is what it says."""

import pytest
from installed import require_installed

pytest.importorskip("torch")

from fastsd_helpers.bench import BENCHMARKS, load_benchmark
from fastsd_helpers.bench.clock import Clock
from fastsd_helpers.bench.dreambooth import Settings, loops_of, make_model, make_pictures, measure
from fastsd_helpers.bench.dreambooth_sdxl import open_plain
from fastsd_helpers.errors import SettingsError

require_installed("diffusers")


@pytest.fixture(scope="module")
def sixteenth(tmp_path_factory):
    """A sixteenth of SDXL; not to be changed."""
    return make_model("sdxl", "sixteenth", tmp_path_factory.mktemp("sdxl") / "model")


def test_it_is_in_the_register() -> None:
    module = load_benchmark("dreambooth")
    assert (module.Settings, module.measure) == (Settings, measure)
    assert "diffusers" in BENCHMARKS["dreambooth"].about
    with pytest.raises(SettingsError, match="rounds"):
        Settings(rounds=0)


def test_the_quarter_has_sd15s_blocks_at_a_quarter_of_its_widths(tmp_path) -> None:
    import json

    from fastsd_helpers.registry import require_trainable

    folder = make_model("sd15", "quarter", tmp_path / "model")
    assert require_trainable(folder) == "sd15"
    unet = json.loads((folder / "unet" / "config.json").read_text())
    assert unet["block_out_channels"] == [80, 160, 320, 320]
    assert unet["cross_attention_dim"] == 192
    assert unet["block_out_channels"][0] // unet["attention_head_dim"] == 320 // 8  # the width of a head


def test_a_part_of_sdxl_has_its_blocks_heads_and_depths_and_the_shares_of_its_widths(sixteenth) -> None:
    import json

    from fastsd_helpers.registry import require_trainable, spec_of

    folder = sixteenth
    assert require_trainable(folder) == "sdxl"
    assert spec_of(str(folder), folder).prediction_type == "epsilon"
    unet = json.loads((folder / "unet" / "config.json").read_text())
    assert [width * 16 for width in unet["block_out_channels"]] == [320, 640, 1280]
    assert (unet["transformer_layers_per_block"], unet["attention_head_dim"]) == ([1, 2, 10], [5, 10, 20])
    widths = [
        json.loads((folder / part / "config.json").read_text())["hidden_size"]
        for part in ("text_encoder", "text_encoder_2")
    ]
    assert sum(widths) == unet["cross_attention_dim"] == 2048 // 16


def test_a_model_of_another_family_is_refused_with_both_named() -> None:
    with pytest.raises(SettingsError, match="The model demo is of the family sd15, not sdxl"):
        Settings(family="sdxl", model="demo")
    filled = Settings(family="sdxl").filled()
    assert list(loops_of("sdxl")) == ["plain", "cached", "ours"]
    assert (filled.model, filled.resolution, filled.batch_size) == ("quarter", 512, 1)
    assert (Settings().filled().model, Settings().filled().batch_size) == ("demo", 4)


@pytest.mark.parametrize("keep", [False, True])
def test_sdxls_plain_loop_encodes_an_image_at_every_step_or_each_once_before_the_first(
    keep, sixteenth, tmp_path, monkeypatch
):
    diffusers = pytest.importorskip("diffusers")
    encoded = []
    encode = diffusers.AutoencoderKL.encode
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "encode", lambda *given, **how: encoded.append(1) or encode(*given, **how)
    )
    settings = Settings(family="sdxl", model="sixteenth").filled()
    pictures = make_pictures(tmp_path / "pictures", settings)
    step, seconds = open_plain(settings, sixteenth, pictures, Clock("cpu"), keep_latents=keep)
    before = len(encoded)
    for index in range(2):
        step(index)
    assert (before, len(encoded) - before) == ((len(pictures), 0) if keep else (0, 2))
    assert (seconds > 0) is keep


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_loops_are_timed_in_turns_with_their_split_and_memory() -> None:
    report = measure(Settings(model="demo", resolution=64, steps=2, rounds=1, threads=1))
    plain, ours = report.data["medians"]["plain"], report.data["medians"]["ours"]
    assert report.data["ratio"] == pytest.approx(plain["step"] / ours["step"])
    for values in (plain, ours):
        assert sum(values["split"].values()) == pytest.approx(values["step"])
        assert values["peak"] > 50e6
    assert plain["split"]["vae"] > 0 < plain["split"]["text"]
    assert ours["split"]["vae"] == ours["split"]["text"] == plain["caches"] == 0
    assert ours["caches"] > 0
    assert "baseline / ours = " in report.lines[-1]
