"""Tools behind buttons of their own: describing photos, a dry run, looking into a model file, converting one."""

from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.dreambooth.dataset import captioning
from fastsd_helpers.dreambooth.running import engine
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import ModelError
from fastsd_helpers.forms import (
    SessionConfig,
    open_session,
    show_captioner,
    show_converter,
    show_dry_run,
    show_form,
    show_inspector,
)
from fastsd_helpers.sessions import Session

pytest.importorskip("ipywidgets")


@pytest.fixture
def session() -> Session:
    return open_session(SessionConfig(session_name="rex"))


def press(view: Any) -> str:
    """Press the button; returns what is said then."""
    view._button.click()
    assert not view._button.disabled
    return str(view._message.value)


def model_file(folder: Path) -> Path:
    """A small part of a real model: a VAE's tensors alone."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    path = folder / "small.safetensors"
    save_file({"lora_unet_x.alpha": torch.ones(()), "lora_unet_x.lora_down.weight": torch.ones(2, 4),
               "lora_unet_x.lora_up.weight": torch.ones(4, 2)}, path)  # fmt: skip
    return path


def test_nothing_is_done_before_the_button_is_pressed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(captioning, "caption_pictures", lambda *_a, **_m: done.append("captions") or [])
    monkeypatch.setattr(engine, "plan", lambda *_a, **_m: done.append("plan"))
    settings = show_form(DreamBoothConfig, restore=session)
    views = [show_captioner(session), show_dry_run(settings, session), show_inspector(session), show_converter(session)]
    assert not done
    assert len({view._button.description for view in views}) == 4


def test_photos_are_described_by_the_model_that_was_named(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def describe(_session: Session, *, model: str) -> list[str]:
        asked.append(model)
        return ["a.png"]

    monkeypatch.setattr(captioning, "caption_pictures", describe)
    view = show_captioner(session)
    view._form.update(captioner="me/blip")
    monkeypatch.setattr("fastsd_helpers.dreambooth.dataset.captioning.prompt_rows", lambda _session: [])
    assert "1 captions were written" in press(view) or "1 caption was written" in press(view)
    assert asked[0] == "me/blip"


def test_a_captioner_that_is_not_there_is_a_sentence_with_the_next_step(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_a: Any, **_m: Any) -> None:
        raise ModelError("The captioning model x cannot be loaded.", "Write the captions by hand.")

    monkeypatch.setattr(captioning, "caption_pictures", refuse)
    said = press(show_captioner(session))
    assert "cannot be loaded" in said
    assert "by hand" in said


def test_the_dry_run_takes_what_the_form_shows_when_it_is_pressed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Plan:
        notes = ("from the model: method lora",)

        def lines(self) -> list[str]:
            return ["2 steps, 3 minutes"]

    monkeypatch.setattr(engine, "plan", lambda config, _s, **more: seen.append((config, more)) or Plan())
    settings = show_form(DreamBoothConfig, restore=session)
    view = show_dry_run(settings, session)
    settings.update(unet_steps=7)
    said = press(view)
    assert "from the model: method lora" in said, "what was chosen, and why"
    assert "2 steps, 3 minutes" in said
    assert "Nothing was trained." in said
    assert seen[0][0].unet_steps == 7
    assert seen[0][1] == {"rehearse": True}
    settings.update(unet_steps=-3)
    assert "unet steps" in press(view)
    open_session(SessionConfig(session_name="cat"))
    settings.update(unet_steps=3)
    assert "belongs to the session rex" in press(view)


def test_a_model_file_is_looked_into(session: Session, tmp_path: Path) -> None:
    view = show_inspector(session)
    assert "has no finished model yet" in press(view)
    view._form.update(file=str(model_file(tmp_path)))
    said = press(view)
    assert "small.safetensors" in said
    assert "SHA-256" in said
    view._form.update(file=str(tmp_path / "nothing.safetensors"))
    assert "nothing.safetensors" in press(view)


def test_a_model_is_converted_and_empty_fields_are_named(session: Session, tmp_path: Path) -> None:
    view = show_converter(session)
    assert "source and target are empty" in press(view)
    view._form.update(source=str(model_file(tmp_path)))
    assert "target is empty" in press(view)
    view._form.update(target=str(tmp_path / "small.safetensors"))
    said = press(view)
    assert 'role="alert"' in said, "never over its own source"


def test_a_conversion_runs_in_a_process_of_its_own_and_merges_what_is_named(session: Session, tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    import table_models as table

    source = table.write(tmp_path / "dog.safetensors", table.original("sd15", "F16"))
    shapes = {"lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3), "lora_unet_conv_in.lora_up.weight": (8, 2, 1, 1)}
    lora = table.write(tmp_path / "hat.safetensors", table.values(shapes))
    view = show_converter(session)
    view._form.update(source=str(source), target=str(tmp_path / "new.safetensors"), merge=f"{lora}:0.5", verify=True)
    said = press(view)
    assert "Written and read back" in said
    assert "hat.safetensors was merged with strength 0.5: 1 layers" in said
    before, after = table.read(source), table.read(tmp_path / "new.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert before[name] != after[name]
    assert {key for key in before if before[key] != after[key]} == {name}
    assert not view._work.children, "there is nothing to stop any more"
    view._form.update(target=str(tmp_path / "other.safetensors"), merge="nothere.safetensors:0.5")
    assert "There is no LoRA at" in press(view)
