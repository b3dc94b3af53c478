"""More steps after the end of a run: segments with settings, photos and captions of their own, resumed to the bit."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from dreambooth_runs import config_for, draw_quickly, learned, make_session, same, stop_at  # noqa: E402

from fastsd_helpers.dreambooth import DreamBoothConfig, PrepareConfig, prepare, train  # noqa: E402
from fastsd_helpers.dreambooth.dataset.captioning import set_caption  # noqa: E402
from fastsd_helpers.dreambooth.resume.generation import list_generations, read_generation  # noqa: E402
from fastsd_helpers.dreambooth.training.segments import Segment, legs_of, read_segments, steps_in_words  # noqa: E402
from fastsd_helpers.errors import Interrupted, SettingsError  # noqa: E402
from fastsd_helpers.runtime import fault_point  # noqa: E402
from fastsd_helpers.sessions import Session  # noqa: E402


class Cut(Exception):
    """The process is gone here."""


@contextlib.contextmanager
def cut_at(monkeypatch: pytest.MonkeyPatch, name: str, time: int = 1) -> Any:
    """End a run at the given passing of a fault point, without anything that a run does when it is stopped."""
    from fastsd_helpers.dreambooth.results import learned as results
    from fastsd_helpers.dreambooth.running import engine

    passed: list[str] = []

    def point(found: str) -> None:
        passed.append(found)
        if found == name and passed.count(name) == time:
            raise Cut(name)

    with monkeypatch.context() as patch:
        for module in (engine, results):
            patch.setattr(module, "fault_point", point)
        yield
    assert fault_point is not point


def newest(session: Session) -> Any:
    return read_generation(session.checkpoints, list_generations(session.checkpoints)[0])


def copy_of(session: Session, name: str) -> Session:
    """The session as it is now, under another name: what follows can be tried twice from the same beginning."""
    shutil.copytree(session.folder, session.folder.with_name(name))
    return Session.open(name, root=session.folder.parent)


FIRST = {"unet_steps": 2, "text_encoder_steps": 1}
LATER = {"unet_lr": 5e-4, "text_encoder_lr": 2e-4, "lr_scheduler": "constant", "save_every": 1}


# ------------------------------------------------------------------------------------------------- the arithmetic


def test_legs_are_counted_over_the_segments_and_have_keys_of_their_own() -> None:
    first = Segment.of({"text_encoder_steps": 1, "unet_steps": 2}, [], more=(3, 4))
    second = Segment.of({"text_encoder_steps": 5, "unet_steps": 6}, [])
    legs = legs_of([first, second])
    assert [(leg.key, leg.parts, leg.before, leg.offset) for leg in legs] == [
        ("text_encoder", (1,), 0, 0),
        ("unet", (2, 3, 4), 0, 1),
        ("text_encoder+1", (5,), 1, 10),
        ("unet+1", (6,), 9, 15),
    ]
    assert steps_in_words(legs[3], 11, 21) == "unet step 11 of 15, after step 17 of 21"
    assert steps_in_words(legs_of([Segment.of({"unet_steps": 6}, [])])[0], 4, 6) == "unet step 4 of 6"


def test_what_version_0_1_recorded_is_one_segment_with_added_steps() -> None:
    settings = {"text_encoder_steps": 0, "unet_steps": 2}
    checkpoint = {"settings": settings, "pictures": [["a", "zib"]], "more_steps": [3]}
    (found,) = read_segments(checkpoint, {"run": 1, "more_steps": [3, 2]}, 1)
    assert (found.steps, found.more) == ({"unet": 2}, (3, 2)), "the session knows of steps cut before a checkpoint"
    (found,) = read_segments(checkpoint, {"run": 2, "more_steps": [3, 2]}, 1)
    assert found.more == (3,), "what another run added does not count"
    assert read_segments(None, {"run": 1, "more_steps": [3]}, 1) == []
    assert read_segments({"segments": [found.to_record()]}, {}, 1) == [found]


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_a_segment_has_its_own_settings_and_resumes_to_the_same_bits(
    small_base: Path, small_session: Session, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    settings = config_for(small_base, method=method, **FIRST)
    first = train(settings, small_session)
    before, more = learned(small_session), {"more_steps": 3, "more_text_encoder_steps": 2}
    changed = DreamBoothConfig(**LATER)
    others = [copy_of(small_session, name) for name in ("stopped", "killed", "plain")]
    whole = train(changed, small_session, **more)
    assert (whole.first_step, whole.steps, whole.path.name[:11]) == (3, 8, "robot-more1")
    assert first.path.is_file()
    record = newest(small_session).record
    assert [each["settings"]["unet_lr"] for each in record["segments"]] == [1e-3, 5e-4]
    assert record["segments"] == small_session.record["segments"]
    weights = learned(small_session)
    assert not any(torch.equal(before[name], weights[name]) for name in before if name.startswith("unet/"))
    assert not same(learned(small_session, "text_encoder"), {k: v for k, v in before.items() if k.startswith("text")})
    assert newest(small_session).load("history")["unet"].shape == (5,)

    for moment in (("text_encoder", 2), ("text_encoder", 3), ("unet", 3)):
        with pytest.raises(Interrupted, match=r"after step \d of 8; everything is saved"):
            train(changed, others[0], report=stop_at(*moment), **more)
    assert train(DreamBoothConfig(), others[0]).steps == 8, "without being asked for again"
    assert same(learned(others[0]), weights)

    for point, time in (("segment.recorded", 1), ("step.text_encoder", 2), ("step.unet", 2), ("finish.begin", 1)):
        with cut_at(monkeypatch, point, time), pytest.raises(Cut):
            train(changed, others[1], **more)
    made = train(changed, others[1], **more)
    assert (made.steps, made.path.name[:12]) == (8, "killed-more1"), "the same command goes on with what it began"
    assert same(learned(others[1]), weights)

    other = train(DreamBoothConfig(), others[2], **more)
    assert other.steps == 8
    assert not same(learned(others[2]), weights), "without new settings those of the run hold"


def test_new_photos_and_captions_are_trained_in_a_new_segment_alone(
    small_base: Path, small_session: Session, tmp_path: Path
) -> None:
    settings = config_for(small_base, unet_steps=2, text_encoder_steps=0)
    train(settings, small_session)
    name = small_session.record["dataset"]["images"][0]["file"].split("/")[1]
    set_caption(small_session, name, "zib robot at the sea")
    with pytest.raises(SettingsError, match="images or captions changed") as caught:
        train(settings, small_session)
    assert "--more-steps N" in caught.value.hint
    result = train(settings, small_session, more_steps=1)
    assert "zib robot at the sea" in small_session.record["prompts"]
    losses = newest(small_session).record["held_out"]
    assert [row[0] for row in losses] == [0, 2, 2, 3], "judged anew before the first step on other prompts"
    assert result.loss_before == losses[2][1]

    prepare(PrepareConfig(images=str(tmp_path / "held-out"), size=64), small_session)
    one = train(settings, small_session, more_steps=1)
    assert one.steps == 4
    pictures = [each["pictures"] for each in newest(small_session).record["segments"]]
    assert [len(each) for each in pictures] == [4, 4, 1]


def test_only_the_text_encoder_can_be_gone_on_with(small_base: Path, small_session: Session) -> None:
    train(config_for(small_base, unet_steps=1, text_encoder_steps=0), small_session)
    unet = learned(small_session, "unet")
    result = train(DreamBoothConfig(), small_session, more_text_encoder_steps=1)
    assert result.steps == 2
    assert newest(small_session).stage == "text_encoder"
    assert same(learned(small_session, "unet"), unet)
    again = train(DreamBoothConfig(), small_session, more_steps=1)
    assert (again.first_step, again.steps) == (2, 3)
    assert set(newest(small_session).roles) >= {"unet", "text_encoder"}


def test_a_cut_before_the_file_was_written_adds_no_second_segment(
    small_base: Path, small_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config_for(small_base, unet_steps=1, text_encoder_steps=0)
    train(settings, small_session)
    with cut_at(monkeypatch, "finish.begin"), pytest.raises(Cut):
        train(settings, small_session, more_steps=1)
    assert train(settings, small_session, more_steps=1).steps == 2
    assert train(settings, small_session, more_steps=1).steps == 3, "once it is finished, the command adds again"


def test_a_segment_that_was_cut_before_its_first_checkpoint_can_be_begun_anew(
    small_base: Path, small_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config_for(small_base, unet_steps=1, text_encoder_steps=0)
    train(settings, small_session)
    with cut_at(monkeypatch, "segment.recorded"), pytest.raises(Cut):
        train(DreamBoothConfig(unet_lr=5e-4), small_session, more_steps=2)
    name = small_session.record["dataset"]["images"][0]["file"].split("/")[1]
    set_caption(small_session, name, "zib robot at the sea")
    with pytest.raises(SettingsError, match="captions changed") as caught:
        train(DreamBoothConfig(), small_session)
    assert "add --more-steps N;" in caught.value.hint
    assert train(DreamBoothConfig(), small_session, more_steps=3).steps == 4
    segment = newest(small_session).record["segments"][1]
    assert (segment["settings"]["unet_steps"], segment["settings"]["unet_lr"]) == (3, 5e-4)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def trained_once(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished session; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSD_SCRATCH", str(folder / "scratch"))
        draw_quickly(patch)
        session = make_session(folder)
        settings = {"unet_steps": 1, "text_encoder_steps": 0, "method": "lora", "lora_rank": 4, "seed": 7}
        train(config_for(small_base, **settings), session)
    return session.folder


@pytest.fixture
def finished(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    draw_quickly(monkeypatch)
    shutil.copytree(trained_once, tmp_path / "sessions" / trained_once.name)
    return Session.open(trained_once.name, root=tmp_path / "sessions")


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsd_helpers.dreambooth.training.base_model import BaseModel

    def fail(*_: Any) -> None:
        raise AssertionError("a network is loaded")

    for name in ("fetch", "sha256", "load", "load_tokenizers"):
        monkeypatch.setattr(BaseModel, name, fail)


@pytest.mark.parametrize(
    ("values", "words", "way"),
    [
        ({"seed": 42}, "seed was 7 and is now 42", "--more-steps N"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler was 'linear' and is now 'cosine'", "--more-steps N"),
        ({"method": "full"}, "method was 'lora' and is now 'full'", "--restart"),
        ({"lora_rank": 16}, "lora_rank was 4 and is now 16", "--restart"),
        ({"unet_steps": 21}, "unet_steps was 1 and is now 21", "--more-steps 20"),
        ({"text_encoder_steps": 5}, "text_encoder_steps was 0 and is now 5", "--more-text-encoder-steps 5"),
    ],
)
def test_what_a_finished_run_cannot_take_is_refused_before_anything_is_loaded(
    finished: Session, no_loading: None, values: dict[str, Any], words: str, way: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        train(DreamBoothConfig(**values), finished)
    assert words in caught.value.problem
    assert way in caught.value.hint
    assert "--restart" in caught.value.hint
    assert caught.value.exit_code == 2
    assert ("--more-steps N" in caught.value.hint) == (way == "--more-steps N")


@pytest.mark.parametrize("values", [{"method": "full"}, {"lora_rank": 16}, {"lora_alpha": 1.0}, {"preset": "face"}])
def test_what_may_never_change_within_a_run_is_refused_with_more_steps_too(
    finished: Session, no_loading: None, values: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match="started with other settings"):
        train(DreamBoothConfig(**values), finished, more_steps=1)
    assert len(finished.record["segments"]) == 1


def test_a_flag_that_equals_its_default_counts_on_the_command_line(
    finished: Session, capsys: pytest.CaptureFixture[str], no_loading: None
) -> None:
    from fastsd_helpers.cli import main

    words = ["dreambooth", "train", finished.name, "--root", str(finished.folder.parent), "--json"]
    assert main([*words, "--seed", "42", "--accumulation", "1", "--method", "full"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert "seed was 7 and is now 42" in error
    assert "method was 'lora' and is now 'full'" in error
    assert "accumulation" not in error, "it is what the run has"


def test_settings_that_are_what_the_run_has_are_no_change(finished: Session) -> None:
    assert train(DreamBoothConfig(seed=7, method="lora", precision="auto", optimizer="auto"), finished).seconds == 0
    assert train(DreamBoothConfig(base_model="auto", unet_steps=1), finished).seconds == 0


def test_after_another_segment_both_the_first_ones_steps_and_the_newest_ones_rate_are_known(finished: Session) -> None:
    train(DreamBoothConfig(unet_lr=1e-6), finished, more_steps=2)
    assert train(DreamBoothConfig(unet_steps=1, unet_lr=1e-6), finished).seconds == 0, "as a form still shows them"
    with pytest.raises(SettingsError, match=r"unet_lr was 1e-06 and is now 0\.001"):
        train(DreamBoothConfig(unet_lr=1e-3), finished)


# ------------------------------------------------------------------------------------------------ the base model


def test_a_base_model_that_was_moved_is_found_where_it_is_said_to_be_and_remembered(
    small_base: Path, small_session: Session, tmp_path: Path
) -> None:
    from fastsd_helpers.dreambooth import export, sample
    from fastsd_helpers.dreambooth.results.learned import ExportConfig, SampleConfig
    from fastsd_helpers.errors import ModelNotFound

    old, new = tmp_path / "my-model", tmp_path / "elsewhere" / "my-model"
    shutil.copytree(small_base, old)
    settings = config_for(old, unet_steps=2, text_encoder_steps=0)
    with pytest.raises(Interrupted):
        train(settings, small_session, report=stop_at("unet", 1))
    sha256 = newest(small_session).record["base_model"]["sha256"]
    new.parent.mkdir()
    old.rename(new)
    for call in (
        lambda: train(DreamBoothConfig(), small_session),
        lambda: sample(SampleConfig(count=1, sample_steps=1), small_session),
        lambda: export(ExportConfig(), small_session),
    ):
        with pytest.raises(ModelNotFound) as caught:
            call()
        assert str(old) in caught.value.problem
        assert sha256[:12] in caught.value.problem
        assert "--base-model" in caught.value.hint
    made = export(ExportConfig(base_model=str(new)), small_session)
    assert made.path.is_file()
    drawn = sample(SampleConfig(count=1, sample_steps=1), small_session)
    assert drawn.path.is_file(), "where it was found is remembered"
    result = train(DreamBoothConfig(base_model=str(new)), small_session)
    assert (result.first_step, result.steps) == (1, 2)
    card = result.model_card.read_text(encoding="utf-8")
    assert str(tmp_path) not in card
    assert "| base_model | my-model |" in card


def test_a_model_of_other_weights_is_refused_wherever_it_is_named(
    small_base: Path, small_session: Session, tmp_path: Path
) -> None:
    from dreambooth_runs import build_base

    from fastsd_helpers.dreambooth import export
    from fastsd_helpers.dreambooth.results.learned import ExportConfig

    train(config_for(small_base, unet_steps=1, text_encoder_steps=0), small_session)
    other = build_base(tmp_path / "other", seed=8)
    for more in (0, 1):
        with pytest.raises(SettingsError, match="which has other weights"):
            train(DreamBoothConfig(base_model=str(other)), small_session, more_steps=more)
    with pytest.raises(SettingsError, match="which has other weights"):
        export(ExportConfig(base_model=str(other)), small_session)
    assert newest(small_session).step == 1
