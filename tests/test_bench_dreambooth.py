"""The benchmark of the training step: what it times is what it says."""

import pytest
from installed import require_installed

pytest.importorskip("torch")

from fastsd_helpers.bench import BENCHMARKS, load_benchmark
from fastsd_helpers.bench.dreambooth import Settings, make_model, measure
from fastsd_helpers.errors import SettingsError

require_installed("diffusers")


def test_it_is_in_the_register() -> None:
    module = load_benchmark("dreambooth")
    assert (module.Settings, module.measure) == (Settings, measure)
    assert "diffusers" in BENCHMARKS["dreambooth"].about
    with pytest.raises(SettingsError, match="rounds"):
        Settings(rounds=0)


def test_the_quarter_has_sd15s_blocks_at_a_quarter_of_its_widths(tmp_path) -> None:
    import json

    from fastsd_helpers.registry import require_trainable

    folder = make_model("quarter", tmp_path / "model")
    assert require_trainable(folder) == "sd15"
    unet = json.loads((folder / "unet" / "config.json").read_text())
    assert unet["block_out_channels"] == [80, 160, 320, 320]
    assert unet["cross_attention_dim"] == 192
    assert unet["block_out_channels"][0] // unet["attention_head_dim"] == 320 // 8  # the width of a head


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
