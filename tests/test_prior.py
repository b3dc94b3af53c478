"""Prior preservation, averages, v-prediction and what else changes the objective, in whole runs on small models."""

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

from dreambooth_runs import (  # noqa: E402
    build_base,
    config_for,
    draw_quickly,
    learned,
    make_session,
    same,
    stop_at,
    train_in_pieces,
)

from fastsd_helpers.dreambooth import export, train  # noqa: E402
from fastsd_helpers.dreambooth.prior import class_images  # noqa: E402
from fastsd_helpers.dreambooth.results.learned import ExportConfig  # noqa: E402
from fastsd_helpers.errors import CheckpointError, Interrupted, SettingsError  # noqa: E402

require_installed("diffusers")

PRIOR = {"class_prompt": "a robot | a dog", "class_images": 6, "prior_weight": 0.5}


def class_files(session) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(session.class_images.glob("*/*.png"))}


@pytest.mark.numeric
def test_a_run_with_a_prior_stopped_at_every_step_ends_with_the_same_bits(small_base, small_session) -> None:
    values = {**PRIOR, "min_snr": 5.0, "offset_noise": 0.1, "ema": 0.5, "accumulation": 2, "flip": True}
    settings = config_for(small_base, unet_steps=2, text_encoder_steps=2, **values)
    train(settings, small_session)
    tensors, drawn = learned(small_session), class_files(small_session)
    assert len(drawn) == 6
    # A picture that a mount lost and one that it cut short are drawn again, to the same bits.
    lost, cut = sorted(small_session.class_images.glob("*/*.png"))[1:3]
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    moments = [("text_encoder", 1), ("unet", 1)]
    train_in_pieces(settings, small_session, moments, restart=True)
    assert same(learned(small_session), tensors)
    assert class_files(small_session) == drawn


def test_class_pictures_are_drawn_once_for_a_seed_and_a_users_own_are_not_counted(
    small_base, small_session, caplog
) -> None:
    settings = config_for(small_base, text_encoder_steps=0, unet_steps=1, **PRIOR)
    train(settings, small_session)
    own = next(small_session.class_images.iterdir()) / "holiday.png"
    own.write_bytes(b"a user's own file")
    said: list[str] = []
    train(settings, small_session, restart=True, report=lambda progress: said.append(progress.message))
    assert not any("class images" in line and "Generating" in line for line in said)
    train(
        config_for(small_base, text_encoder_steps=0, unet_steps=1, seed=1, **PRIOR),
        small_session,
        restart=True,
        report=lambda progress: said.append(progress.message),
    )
    assert "Generating 6 of 6 class images (a robot | a dog) ..." in said
    assert own.read_bytes() == b"a user's own file"
    assert len(list(small_session.class_images.iterdir())) == 2


def test_a_stop_while_class_pictures_are_drawn_keeps_those_that_are_there(
    small_base, small_session, monkeypatch
) -> None:
    settings = config_for(small_base, **PRIOR)
    report = stop_at("", 0)  # the first sentence that is said
    with pytest.raises(Interrupted, match="Stopped after 0 of 6 class images; they are kept"):
        train(settings, small_session, report=report)
    drawing = class_images.ClassDrawing.fill
    # The first group of four is asked about before its three denoising steps, and before each image is decoded.
    answers = iter([False] * (3 + 4) + [False, True])
    monkeypatch.setattr(class_images, "_STEPS", 3)
    monkeypatch.setattr(
        class_images.ClassDrawing,
        "fill",
        lambda self, **rest: drawing(self, **{**rest, "stopped": lambda: next(answers)}),
    )
    with pytest.raises(Interrupted, match="Stopped after 4 of 6"):
        train(settings, small_session)
    assert next(answers, None) is None, "it ended within the second group, before its second step"
    assert len(class_files(small_session)) == 4


@pytest.mark.numeric
@pytest.mark.parametrize("key", ["sd21-512", "sd21-768"])
def test_sd21_trains_stops_goes_on_and_is_exported(key, small_session, tmp_path) -> None:
    base = build_base(tmp_path / "sd21", key)
    settings = config_for(base, unet_steps=2, text_encoder_steps=2)
    train(settings, small_session)
    tensors = learned(small_session)
    result = train_in_pieces(settings, small_session, [("text_encoder", 1), ("unet", 1)], restart=True)
    assert same(learned(small_session), tensors)
    beside = result.path.with_suffix(".yaml")
    assert beside.is_file() == (key == "sd21-768")
    assert key == "sd21-512" or 'parameterization: "v"' in beside.read_text()


def test_a_model_that_could_not_be_exported_is_refused_before_it_is_trained(small_session, tmp_path) -> None:
    from transformers import CLIPTextModel

    base = build_base(tmp_path / "shortened")
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
    text_encoder.config.num_hidden_layers = 11
    CLIPTextModel(text_encoder.config).save_pretrained(base / "text_encoder")
    with pytest.raises(CheckpointError, match=r"text encoder lacks the tensor .*layers\.11"):
        train(config_for(base), small_session)
    assert "run" not in small_session.record


def test_two_subjects_are_both_trained_and_both_shown(small_base, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    draw_quickly(monkeypatch)
    session = make_session(tmp_path, names=("zib robot", "mel dog"), photos=2, held_out=0)
    from fastsd_helpers.dreambooth.results import finishing

    shown: list[list[str]] = []
    draw = finishing.draw_grid
    monkeypatch.setattr(finishing, "draw_grid", lambda *args: shown.append(args[2]) or draw(*args))
    train(config_for(small_base, unet_steps=1, text_encoder_steps=0), session)
    assert sorted(shown[0]) == ["mel dog", "zib robot"]
    assert session.record["prompts"] == ["mel dog", "zib robot"]


@pytest.mark.parametrize("side", [64, 192, 512, 1024])
def test_the_words_of_a_grid_are_as_large_as_its_images_whatever_their_size(side: int) -> None:
    from PIL import Image

    from fastsd_helpers.dreambooth.training.sampling import draw_grid

    made = draw_grid([[Image.new("RGB", (side, side), "black")] * 2], ["step 3"], ["a zib dog"])
    small = made.convert("L").resize((504, round(504 * made.height / made.width)))  # as it is shown
    words = [y for y in range(60) if min(small.crop((96, y, 504, y + 1)).tobytes()) < 160]
    assert 8 <= len([y for y in words if y < 40]) <= 16


def test_sample_prompts_are_spread_over_all_subjects() -> None:
    from types import SimpleNamespace

    from fastsd_helpers.dreambooth.training.sampling import sample_prompts

    prompts = [f"a {index}" for index in range(6)] + ["b 1", "b 2"]
    context = SimpleNamespace(prompts=prompts, prompt_of=list(range(8)))
    assert sample_prompts(context) == ["a 0", "a 2", "a 4", "b 1"]
    assert sample_prompts(SimpleNamespace(prompts=["a"], prompt_of=[0, 0])) == ["a"] * 4


# ------------------------------------------------------------------------------------- more steps, best


@pytest.mark.numeric
def test_more_steps_go_on_after_the_end_with_a_file_of_their_own(small_base, small_session) -> None:
    settings = config_for(small_base, unet_steps=2, text_encoder_steps=0)
    with pytest.raises(SettingsError, match="step 0 of 2"):
        train(settings, small_session, more_steps=2)
    first = train(settings, small_session)
    unlengthened = learned(small_session, "unet")
    whole = train(settings, small_session, more_steps=3)
    assert (whole.first_step, whole.steps) == (2, 5)
    assert (first.path.name, whole.path.name) == ("robot.safetensors", "robot-more1.safetensors")
    assert first.path.is_file()
    tensors = learned(small_session)
    assert not same(unlengthened, learned(small_session, "unet"))
    assert train(settings, small_session).path == whole.path  # nothing is left to do

    # The same, in pieces: stopped inside the added steps, and gone on with by either command.
    train(settings, small_session, restart=True)
    with pytest.raises(Interrupted):
        train(settings, small_session, more_steps=3, report=stop_at("unet", 3))
    with pytest.raises(SettingsError, match="step 3 of 5"):
        train(settings, small_session, more_steps=4)
    with pytest.raises(Interrupted):
        train(settings, small_session, more_steps=3, report=stop_at("unet", 4))
    pieces = train(settings, small_session)
    assert (pieces.first_step, pieces.steps) == (4, 5)
    assert same(learned(small_session), tensors)


@pytest.mark.numeric
def test_the_best_checkpoint_is_kept_offered_and_exported(small_base, small_session, tmp_path, monkeypatch) -> None:
    from fastsd_helpers.dreambooth.training.stages import StageTrainer

    losses = iter([1.0, 0.3, 0.5, 0.7])
    monkeypatch.setattr(StageTrainer, "held_out_loss", lambda self: next(losses))
    said: list[str] = []
    settings = config_for(small_base, text_encoder_steps=0, save_every=1, keep_last=1, keep_best=True)
    result = train(settings, small_session, report=lambda progress: said.append(progress.message))
    assert result.best_checkpoint == "best"
    assert any("lower at unet step 1: 0.3000, 0.7000 at the end" in line for line in said)
    made = export(ExportConfig(checkpoint="best", dtype="fp32", out=str(tmp_path / "best.safetensors")), small_session)
    assert made.step == 1
    kept = learned(small_session, "best")
    with pytest.raises(CheckpointError, match="no complete checkpoint 'worst'") as caught:
        export(ExportConfig(checkpoint="worst"), small_session)
    assert "Choose best, or one of: " in caught.value.hint

    # It is what the weights were after that step.
    monkeypatch.undo()
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch-2"))
    draw_quickly(monkeypatch)
    with pytest.raises(Interrupted):
        train(config_for(small_base, text_encoder_steps=0), small_session, restart=True, report=stop_at("unet", 1))
    after = learned(small_session, "unet")
    assert all(torch.equal(after[f"unet/{name.partition('/')[2]}"], tensor) for name, tensor in kept.items())
