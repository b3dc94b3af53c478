"""What a run will cost: the memory computed from shapes, and the minutes measured on steps that leave no trace."""

import re
from types import SimpleNamespace

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

from dreambooth_runs import build_base, config_for, draw_quickly, make_session, stop_at  # noqa: E402

from fastsd_helpers.dreambooth import plan, train  # noqa: E402
from fastsd_helpers.dreambooth.families import family_named  # noqa: E402
from fastsd_helpers.dreambooth.running.memory import StageMemory  # noqa: E402
from fastsd_helpers.dreambooth.settings import DreamBoothConfig  # noqa: E402
from fastsd_helpers.errors import Interrupted  # noqa: E402

require_installed("diffusers")


def test_a_dry_run_says_minutes_and_memory_and_leaves_no_trace(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    draw_quickly(monkeypatch)
    base, session = build_base(tmp_path / "base"), make_session(tmp_path)
    config = config_for(base, class_prompt="a dog", class_images=2)
    record = (session.folder / "session.json").read_bytes()
    made = plan(config, session, rehearse=True)
    assert set(made.memory_bytes) == set(made.seconds_per_step) == {"text_encoder", "unet"}
    expected = sum(3 * seconds for seconds in made.seconds_per_step.values()) / 60
    assert made.minutes == pytest.approx(expected)
    said = " ".join(made.lines())
    assert "Estimated memory of the unet stage: " in said
    assert "(weights " in said
    assert re.search(r"About (1 second|\d+ (seconds|minutes)) of training are left \(measured here: ", said)
    assert (session.folder / "session.json").read_bytes() == record
    assert list(session.checkpoints.glob("*")) == list(session.class_images.glob("*")) == []
    with pytest.raises(Interrupted):
        train(config, session, report=stop_at("unet", 1))
    left = plan(config, session, rehearse=True)
    assert set(left.seconds_per_step) == {"unet"}
    assert left.minutes == pytest.approx(2 * left.seconds_per_step["unet"] / 60)


def test_a_stage_that_does_not_fit_is_said_with_what_to_change(monkeypatch) -> None:
    from fastsd_helpers.dreambooth.running import dry_run

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dry_run, "open_stage", fail)
    monkeypatch.setattr(dry_run, "Memory", lambda *_: SimpleNamespace(of_stage=lambda *_: StageMemory(1, 2, 3, 4)))
    from dataclasses import replace

    from fastsd_helpers.dreambooth.running.forecast import Plan

    before = Plan(DreamBoothConfig(), 5, {"unet": 1}, 1, 1, 1, ())
    config = replace(DreamBoothConfig(), resolution=64)
    context = SimpleNamespace(config=config, family=family_named("sd15"), base=None, device=torch.device("cpu"))
    after = dry_run.rehearse(before, context, {"unet": 5}, ["a dog"])
    assert after.minutes is None
    assert "The unet stage does not fit" in after.reasons[-1]
    assert "--method lora" in after.reasons[-1]
