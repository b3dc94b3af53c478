"""What a run will cost: the memory computed from shapes, and the minutes measured on steps that leave no trace."""

from types import SimpleNamespace

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

from dreambooth_runs import build_base, config_for, draw_quickly, make_session, stop_at  # noqa: E402

from fastsd_helpers.dreambooth import plan, train  # noqa: E402
from fastsd_helpers.dreambooth.families import family_named  # noqa: E402
from fastsd_helpers.dreambooth.running.dry_run import peak_bytes, saved_bytes  # noqa: E402
from fastsd_helpers.dreambooth.settings import DreamBoothConfig  # noqa: E402
from fastsd_helpers.dreambooth.training.stages import TrainingContext  # noqa: E402
from fastsd_helpers.errors import Interrupted  # noqa: E402
from fastsd_helpers.registry import find_model  # noqa: E402

require_installed("diffusers")


class Shapes(TrainingContext):
    """A context that knows its networks' shapes only: SD 1.5's own, or small ones."""

    def __init__(self, *, kind: str = "cpu", dtype=None, full_size: bool = False, **values) -> None:
        settings = {"resolution": 64, "batch_size": 1, "optimizer": "adamw", "gradient_checkpointing": False}
        settings |= {"lora_targets": "attention"}
        self.family = family_named("sd15")
        self.config = DreamBoothConfig(**{**settings, "lora_alpha": 16.0, **values})
        self.device, self.dtype, self._full_size, self.parts = torch.device(kind), dtype, full_size, 1

    def _builder_of(self, part: str):
        from tiny_models import FULL, SMALL, build_parts

        return lambda: build_parts(FULL if self._full_size else SMALL)[part]


def test_a_lora_needs_less_memory_and_a_larger_batch_an_average_or_a_class_more() -> None:
    plain = peak_bytes(Shapes(), "unet")
    assert peak_bytes(Shapes(method="lora", lora_rank=4), "unet") < plain
    assert peak_bytes(Shapes(ema=0.9), "unet") - plain == 4 * Shapes().count_of("unet")
    assert peak_bytes(Shapes(gradient_checkpointing=True), "unet") < plain < peak_bytes(Shapes(batch_size=2), "unet")
    assert plain < peak_bytes(Shapes(class_prompt="a dog", prior_weight=1.0, class_images=2), "unet")
    four, one = (saved_bytes(Shapes(batch_size=rows), learns=True) for rows in (4, 1))
    assert four == pytest.approx(4 * one, rel=0.01)


@pytest.mark.slow
def test_sd15_as_a_t4_trains_it_stays_under_14_gb() -> None:
    context = Shapes(
        kind="cuda",
        dtype=torch.float16,
        full_size=True,
        resolution=512,
        optimizer="adamw8bit",
        gradient_checkpointing=True,
    )
    peaks = {stage: peak_bytes(context, stage) for stage in ("text_encoder", "unet")}
    assert 6e9 < peaks["text_encoder"] < peaks["unet"] < 14e9


_SD21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
_SD21_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}


class PublishedShapes(Shapes):
    """The published models' networks, SD 2.1's too, in what a small GPU trains with."""

    def __init__(self, key: str, **values) -> None:
        spare = {"optimizer": "adamw8bit", "gradient_checkpointing": True}
        super().__init__(kind="cuda", dtype=torch.float16, full_size=True, **spare, **values)
        self._is_21 = find_model(key).family == "sd21"

    def _builder_of(self, part: str):
        import diffusers
        import transformers

        if not self._is_21:
            return super()._builder_of(part)
        if part == "unet":
            return lambda: diffusers.UNet2DConditionModel(**_SD21)
        return lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=49408, **_SD21_TEXT))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["sd15", "sd21-512", "sd21-768"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_registrys_gpu_memory_is_what_is_computed_rounded_up(key: str, method: str) -> None:
    spec = find_model(key)
    shapes = PublishedShapes(key, method=method, resolution=spec.native_px)
    peak = max(peak_bytes(shapes, stage) for stage in ("text_encoder", "unet"))
    assert spec.vram_gb[method] - 1 < peak / 1e9 <= spec.vram_gb[method]


def test_a_dry_run_says_minutes_and_memory_and_leaves_no_trace(tmp_path, monkeypatch, no_fsync) -> None:
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
    assert "Estimated memory: " in said
    assert "minutes of training are left (measured here: " in said
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
    monkeypatch.setattr(dry_run, "peak_bytes", lambda *_: 1)
    from dataclasses import replace

    from fastsd_helpers.dreambooth.running.forecast import Plan

    before = Plan(DreamBoothConfig(), 5, {"unet": 1}, 1, 1, 1, ())
    context = SimpleNamespace(config=replace(DreamBoothConfig(), resolution=64), family=family_named("sd15"))
    after = dry_run.rehearse(before, context, {"unet": 5}, ["a dog"])
    assert after.minutes is None
    assert "The unet stage does not fit" in after.reasons[-1]
    assert "--method lora" in after.reasons[-1]
