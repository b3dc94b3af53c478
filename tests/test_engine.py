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

torch = pytest.importorskip("torch")

from fastsd_helpers.demo import networks, pictures  # noqa: E402
from fastsd_helpers.dreambooth import DreamBoothConfig, PrepareConfig, export, plan, prepare, sample, train  # noqa: E402
from fastsd_helpers.dreambooth.learned import ExportConfig, SampleConfig  # noqa: E402
from fastsd_helpers.errors import (  # noqa: E402
    Interrupted,
    ModelError,
    ModelNotFound,
    SessionError,
    SettingsError,
    TrainingFailed,
)
from fastsd_helpers.sessions import Session  # noqa: E402


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real classes with random weights, saved as a Diffusers folder."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "model"
    vocabulary = networks.build_tokenizer_files(folder / "tokenizer")
    StableDiffusionPipeline(
        vae=networks.build_vae(),
        text_encoder=networks.build_text_encoder(vocabulary),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=networks.build_unet(),
        scheduler=networks.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


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


def config_for(base_model: Path, **values) -> DreamBoothConfig:
    few = {"resolution": 64, "batch_size": 1, "sample_every": 0, "save_every": 0, "precision": "fp32"}
    return DreamBoothConfig(base_model=str(base_model), **{**few, "unet_steps": 2, "text_encoder_steps": 2, **values})


def parts_of(path: Path) -> dict[str, dict[str, "torch.Tensor"]]:
    from safetensors.torch import load_file

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
def base_file(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastsd_helpers.checkpoints import convert

    path = tmp_path_factory.mktemp("file") / "base.safetensors"
    convert(base_model, path, dtype="fp32")
    return path


@pytest.mark.numeric
def test_each_stage_changes_its_own_network_and_nothing_else(base_model, base_file, session, tmp_path) -> None:
    first, second = tmp_path / "stage1.safetensors", tmp_path / "stage2.safetensors"
    train(config_for(base_model, unet_steps=0, text_encoder_steps=2), session)
    export(ExportConfig(dtype="fp32", out=str(first)), session)
    assert changed(base_file, first) == {"text_encoder"}
    train(config_for(base_model, unet_steps=2, text_encoder_steps=0), session, restart=True)
    export(ExportConfig(dtype="fp32", out=str(second)), session)
    assert changed(base_file, second) == {"unet"}


def test_a_run_ends_with_a_verified_file_its_pictures_and_its_record(base_model, session) -> None:
    result = train(config_for(base_model, sample_every=2), session)
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
    again = train(config_for(base_model, sample_every=2), session)
    assert (again.path, again.first_step, again.seconds) == (result.path, 4, 0.0)
    drawn = sample(SampleConfig(prompt="a zib robot", count=2, sample_steps=2), session)
    assert drawn.path.is_file()


@pytest.mark.numeric
@pytest.mark.parametrize("stage", ["text_encoder", "unet"])
def test_a_stopped_run_goes_on_to_the_same_bits(base_model, session, tmp_path, stage) -> None:
    settings = config_for(base_model, unet_steps=3, text_encoder_steps=3, accumulation=2, flip=True)
    whole = train(settings, session)

    def stop_in_stage(progress) -> None:
        if (progress.stage, progress.step) == (stage, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Interrupted, match="everything is saved"):
        train(settings, session, restart=True, report=stop_in_stage)
    resumed = train(config_for(base_model, unet_steps=3, text_encoder_steps=3, accumulation=2, flip=True), session)
    assert resumed.first_step == (2 if stage == "text_encoder" else 5)
    assert resumed.path != whole.path
    assert changed(whole.path, resumed.path) == set()
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)


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
        return [line for line in said if "bit for bit" in line]

    assert go_on(1) == go_on(2) == []
    try:
        torch.set_num_threads(threads + 1)
        (line,) = go_on(3)
        first, second = (f"{count} thread{'s' * (count != 1)}, torch" for count in (threads, threads + 1))
        assert line.startswith("Started on ")
        assert line.index(first) < line.index(", now on ") < line.index(second)
    finally:
        torch.set_num_threads(threads)
    assert len(go_on()) == 1, "that other threads took part stays so"
    assert go_on() == [], "nothing is left to train"


def test_changed_settings_are_listed_and_refused(base_model, session) -> None:
    def stop(progress) -> None:
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config_for(base_model), session, report=stop)
    with pytest.raises(SettingsError, match=r"unet_lr was 0.0001 and is now 0.001; seed was 42 and is now 7") as caught:
        train(config_for(base_model, seed=7, unet_lr=1e-3), session)
    assert "--restart" in caught.value.hint


@pytest.mark.slow
def test_a_base_model_that_was_moved_is_the_same_model_and_another_one_is_not(base_model, session, tmp_path) -> None:
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    shutil.copytree(base_model, first)
    train(config_for(first), session)
    first.rename(second)
    with pytest.raises(ModelNotFound) as caught:
        train(DreamBoothConfig(), session)
    assert "--base-model" in caught.value.hint
    assert train(config_for(second), session).seconds == 0, "a finished run stays finished"
    result = export(ExportConfig(), session)
    assert result.path.is_file()
    assert train(config_for(second), session, more_steps=1).first_step == 4
    assert session.record["base_model"]["ref"] == str(second)
    shutil.copytree(base_model, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SettingsError, match=r"base_model was .*second.* and is now .*other"):
        train(config_for(other), session)


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_change(base_model, session, monkeypatch) -> None:
    from fastsd_helpers.dreambooth import stages

    monkeypatch.setattr(stages.Job, "take_step", lambda self, step, lr: float("nan"))
    with pytest.raises(TrainingFailed, match="became NaN or Inf at text_encoder step 1") as caught:
        train(config_for(base_model), session)
    assert "--text-encoder-lr" in caught.value.hint


def test_a_session_without_a_checkpoint_can_neither_draw_nor_export(session) -> None:
    with pytest.raises(SessionError, match="no whole checkpoint"):
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


def test_a_resolution_the_model_cannot_have_is_refused_before_training(base_model, session) -> None:
    with pytest.raises(SettingsError, match="resolution"):
        train(config_for(base_model, resolution=100), session)


def test_the_plan_counts_steps_and_bytes(base_model, session) -> None:
    made = plan(config_for(base_model), session)
    unet = sum(parameter.numel() for parameter in networks.build_unet().parameters())
    assert made.steps == 4
    assert made.generation_bytes["unet"] == 12 * unet
    assert any("steps" in line for line in made.lines())


@pytest.mark.timeout(900)  # fp16 is slow on a processor, and this may not be its only work
@pytest.mark.slow  # half a minute on a free core, minutes beside other work
def test_half_precision_with_a_loss_scale_resumes_to_the_same_bits(small_base, session) -> None:
    settings = config_for(small_base, precision="fp16", text_encoder_steps=0, unet_steps=3)
    whole = train(settings, session)

    def stop(progress) -> None:
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(settings, session, restart=True, report=stop)
    manifest = max(session.checkpoints.glob("*/manifest.json"))
    scaler = json.loads(manifest.read_text(encoding="utf-8"))["record"]["scaler"]
    assert scaler["scale"] > 0
    assert changed(whole.path, train(settings, session).path) == set()


def test_progress_is_logged_without_a_report_function(base_model, session, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="fastsd_helpers"):
        train(config_for(base_model), session)
    assert "unet 2 of 2" in caplog.text
    assert "DONE" in caplog.text
