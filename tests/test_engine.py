"""The training run, on a real model of Stable Diffusion 1.5's layout with random weights and 64-pixel images."""

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from dreambooth_runs import draw_quickly
from tiny_models import load_file

torch = pytest.importorskip("torch")

import demo_pictures as pictures  # noqa: E402

from fastsd_helpers.dreambooth import DreamBoothConfig, PrepareConfig, export, plan, prepare, sample, train  # noqa: E402
from fastsd_helpers.dreambooth.results.learned import ExportConfig, SampleConfig  # noqa: E402
from fastsd_helpers.errors import (  # noqa: E402
    Interrupted,
    ModelError,
    ModelNotFound,
    SessionError,
    SettingsError,
    TrainingFailed,
)
from fastsd_helpers.sessions import Session  # noqa: E402


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Three prepared images and one held out."""
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    generator = np.random.default_rng(0)
    for folder, count in (("train", 3), ("held-out", 1)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            place = list(pictures.PLACES)[index]
            path = tmp_path / folder / f"zib robot ({index + 1}).png"
            pictures.draw_subject("robot", place, list(pictures.BACKGROUNDS)[index + count], generator).save(path)
    session = Session.create("robot", root=tmp_path / "sessions")
    prepare(PrepareConfig(images=str(tmp_path / "train"), held_out=str(tmp_path / "held-out"), size=64), session)
    return session


@pytest.fixture
def undrawn(session: Session, monkeypatch: pytest.MonkeyPatch) -> Session:
    """The same, for runs whose weights are looked at and not their images and plots, which take longer than those."""
    draw_quickly(monkeypatch)
    return session


def config_for(base_model: Path, **values) -> DreamBoothConfig:
    few = {"resolution": 64, "batch_size": 1, "sample_every": 0, "save_every": 0, "precision": "fp32"}
    return DreamBoothConfig(base_model=str(base_model), **{**few, "unet_steps": 2, "text_encoder_steps": 2, **values})


def parts_of(path: Path) -> dict[str, dict[str, "torch.Tensor"]]:
    prefixes = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    }
    tensors = load_file(path)
    return {
        part: {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for part, prefix in prefixes.items()
    }


def changed(before: Path, after: Path) -> set[str]:
    """The parts in which any tensor differs."""
    first, second = parts_of(before), parts_of(after)
    assert {part: list(tensors) for part, tensors in first.items()} == {
        part: list(tensors) for part, tensors in second.items()
    }
    return {
        part
        for part, tensors in first.items()
        if any(not torch.equal(tensor, second[part][name]) for name, tensor in tensors.items())
    }


@pytest.fixture(scope="module")
def base_file(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastsd_helpers.checkpoints import convert

    path = tmp_path_factory.mktemp("file") / "base.safetensors"
    convert(small_base, path, dtype="fp32")
    return path


@pytest.mark.numeric
def test_each_stage_changes_its_own_network_and_nothing_else(small_base, base_file, undrawn, tmp_path) -> None:
    first, second = tmp_path / "stage1.safetensors", tmp_path / "stage2.safetensors"
    train(config_for(small_base, unet_steps=0, text_encoder_steps=2), undrawn)
    export(ExportConfig(dtype="fp32", out=str(first)), undrawn)
    assert changed(base_file, first) == {"text_encoder"}
    train(config_for(small_base, unet_steps=2, text_encoder_steps=0), undrawn, restart=True)
    export(ExportConfig(dtype="fp32", out=str(second)), undrawn)
    assert changed(base_file, second) == {"unet"}


def test_a_run_ends_with_a_verified_file_its_pictures_and_its_record(small_base, session) -> None:
    result = train(config_for(small_base, sample_every=2), session)
    assert result.path.is_file()
    assert result.grid.is_file()
    assert result.loss_plot.read_bytes().startswith(b"\x89PNG")
    assert result.sha256[:12] in Path(result.model_card).read_text(encoding="utf-8")
    assert (result.first_step, result.steps) == (0, 4)
    record = json.loads((session.folder / "session.json").read_text(encoding="utf-8"))
    assert record["progress"] == {"stage": "unet", "step": 2, "steps": 2}
    assert record["settings"]["seed"] == 42
    assert len(record["checkpoints"]) == 2
    assert list((session.logs / "tensorboard").glob("events.*"))
    assert (session.samples / "unet-000002.png").is_file()
    again = train(config_for(small_base, sample_every=2), session)
    assert (again.path, again.first_step, again.seconds) == (result.path, 4, 0.0)
    drawn = sample(SampleConfig(prompt="a zib robot", count=2, sample_steps=2), session)
    assert drawn.path.is_file()


@pytest.mark.numeric
@pytest.mark.parametrize("stage", ["text_encoder", "unet"])
def test_a_stopped_run_goes_on_to_the_same_bits(small_base, undrawn, tmp_path, stage) -> None:
    settings = config_for(small_base, unet_steps=3, text_encoder_steps=3, accumulation=2, flip=True)
    whole = train(settings, undrawn)

    def stop_in_stage(progress) -> None:
        if (progress.stage, progress.step) == (stage, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Interrupted, match="everything is saved"):
        train(settings, undrawn, restart=True, report=stop_in_stage)
    resumed = train(config_for(small_base, unet_steps=3, text_encoder_steps=3, accumulation=2, flip=True), undrawn)
    assert resumed.first_step == (2 if stage == "text_encoder" else 5)
    assert resumed.path != whole.path
    assert changed(whole.path, resumed.path) == set()
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)


@pytest.mark.numeric
def test_a_stop_is_heard_between_the_denoising_steps_of_samples_and_of_before_and_after(
    small_base, session, tmp_path, monkeypatch
) -> None:
    from dreambooth_runs import config_for, learned, same

    from fastsd_helpers.dreambooth.results import finishing
    from fastsd_helpers.dreambooth.training import sampling

    settings = config_for(small_base, text_encoder_steps=0, unet_steps=3, sample_every=2)
    draw_quickly(monkeypatch, blank=False)
    drawn, asked, stop_in = sampling.draw_pictures, [], ""

    def draw(*args, stopped, **options):
        row = "before-after" if "after_step" in options else "sample"

        def ask() -> bool:
            asked.append(row)
            if (row, len(asked)) == (stop_in, 3):
                os.kill(os.getpid(), signal.SIGTERM)
            return stopped()

        return drawn(*args, stopped=ask, **options | {"steps": 4})

    for module in (finishing, sampling):
        monkeypatch.setattr(module, "draw_pictures", draw)
    whole = train(settings, session)
    picture = session.samples / "unet-000002.png"
    kept, tensors = picture.read_bytes(), learned(session)
    picture.unlink()
    asked, stop_in = [], "sample"
    with pytest.raises(Interrupted, match="Stopped at unet step 2 of 3; everything is saved"):
        train(settings, session, restart=True)
    assert asked == ["sample"] * 3, "no denoising step was made after the signal"
    assert not picture.exists()
    asked, stop_in = [], ""
    resumed = train(settings, session)
    assert (resumed.first_step, picture.read_bytes()) == (2, kept)
    assert same(learned(session), tensors)
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)
    file = resumed.path.rename(tmp_path / resumed.path.name)
    asked, stop_in = [], "before-after"
    with pytest.raises(Interrupted, match="Stopped after the last step, while the images before and after"):
        train(settings, session)
    assert len(asked) == 3
    stop_in = ""
    finished = train(settings, session)
    assert (changed(file, finished.path), finished.first_step) == (set(), 3)


def test_another_number_of_threads_is_said_where_a_run_goes_on(small_base, small_session) -> None:
    from dreambooth_runs import config_for, stop_at

    threads, said = torch.get_num_threads(), []

    def go_on(step: int | None = None) -> list[str]:
        """Train until that step of the U-Net; the sentences about other arithmetic."""
        said.clear()

        def report(progress) -> None:
            said.append(progress.message)
            if step is not None:
                stop_at("unet", step)(progress)

        with contextlib.suppress(Interrupted):
            train(config_for(small_base, text_encoder_steps=0, unet_steps=4), small_session, report=report)
        return [line for line in said if "bit-identical" in line]

    assert go_on(1) == go_on(2) == []
    try:
        torch.set_num_threads(threads + 1)
        (line,) = go_on(3)
        first, second = (f"{count} thread{'s' * (count != 1)}, torch" for count in (threads, threads + 1))
        assert line.startswith("Started on ")
        assert line.index(first) < line.index(", resumed on ") < line.index(second)
    finally:
        torch.set_num_threads(threads)
    assert len(go_on()) == 1, "that other threads took part stays so"
    assert go_on() == [], "nothing is left to train"


def test_changed_settings_are_listed_and_refused(small_base, undrawn) -> None:
    def stop(progress) -> None:
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config_for(small_base), undrawn, report=stop)
    with pytest.raises(SettingsError, match=r"unet_lr was 0.0001 and is now 0.001; seed was 42 and is now 7") as caught:
        train(config_for(small_base, seed=7, unet_lr=1e-3), undrawn)
    assert "--restart" in caught.value.hint


@pytest.mark.slow
def test_a_base_model_that_was_moved_is_the_same_model_and_another_one_is_not(small_base, undrawn, tmp_path) -> None:
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    shutil.copytree(small_base, first)
    train(config_for(first), undrawn)
    first.rename(second)
    with pytest.raises(ModelNotFound) as caught:
        train(DreamBoothConfig(), undrawn)
    assert "--base-model" in caught.value.hint
    assert train(config_for(second), undrawn).seconds == 0, "a finished run stays finished"
    result = export(ExportConfig(), undrawn)
    assert result.path.is_file()
    assert train(config_for(second), undrawn, more_steps=1).first_step == 4
    assert undrawn.record["base_model"]["ref"] == str(second)
    shutil.copytree(small_base, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SettingsError, match=r"base_model was .*second.* and is now .*other"):
        train(config_for(other), undrawn)


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_change(small_base, session, monkeypatch) -> None:
    from fastsd_helpers.dreambooth.training import stages

    monkeypatch.setattr(stages.StageTrainer, "take_step", lambda self, step, lr: float("nan"))
    with pytest.raises(TrainingFailed, match="became NaN or Inf at text encoder step 1") as caught:
        train(config_for(small_base), session)
    assert "--text-encoder-lr" in caught.value.hint


def test_a_session_without_a_checkpoint_can_neither_draw_nor_export(session) -> None:
    with pytest.raises(SessionError, match="no complete checkpoint"):
        sample(SampleConfig(), session)


def test_the_users_own_pictures_without_a_gpu_stop_with_where_to_switch_it_on(session) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="no GPU") as caught:
        train(DreamBoothConfig(), session)
    assert "T4 GPU" in caught.value.hint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unet_steps": 0, "text_encoder_steps": 0}, "both 0"),
        ({"unet_steps": -1}, "the smallest is 0"),
        ({"unet_lr": 1.0}, "the largest is 0.01"),
        ({"batch_size": 0, "seed": -1}, r"batch_size.*seed"),
    ],
)
def test_settings_out_of_range_are_all_named(values, message) -> None:
    with pytest.raises(SettingsError, match=message):
        DreamBoothConfig(**values)


def test_a_resolution_the_model_cannot_have_is_refused_before_training(small_base, session) -> None:
    with pytest.raises(SettingsError, match="resolution"):
        train(config_for(small_base, resolution=100), session)


def test_the_plan_counts_steps_and_bytes(small_base, session) -> None:
    made = plan(config_for(small_base), session)
    unet = sum(tensor.numel() for tensor in load_file(small_base / "unet/diffusion_pytorch_model.safetensors").values())
    assert made.steps == 4
    assert made.generation_bytes["unet"] == 12 * unet
    assert any("steps" in line for line in made.lines())


@pytest.mark.timeout(900)  # fp16 is slow on a processor, and this may not be its only work
@pytest.mark.slow  # half a minute on a free core, minutes beside other work
def test_half_precision_with_a_loss_scale_resumes_to_the_same_bits(small_base, undrawn) -> None:
    settings = config_for(small_base, precision="fp16", text_encoder_steps=0, unet_steps=3)
    whole = train(settings, undrawn)

    def stop(progress) -> None:
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(settings, undrawn, restart=True, report=stop)
    manifest = max(undrawn.checkpoints.glob("*/manifest.json"))
    scaler = json.loads(manifest.read_text(encoding="utf-8"))["record"]["scaler"]
    assert scaler["scale"] > 0
    assert changed(whole.path, train(settings, undrawn).path) == set()


def test_progress_is_logged_without_a_report_function(small_base, undrawn, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="fastsd_helpers"):
        train(config_for(small_base), undrawn)
    assert "unet 2 of 2" in caplog.text
    assert "DONE" in caplog.text
