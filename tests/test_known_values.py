"""Fields with known values: a list that takes any other text, on both ipywidgets; models that cannot be trained."""

import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from contrast import contrast

from fastsd_helpers.dreambooth.results.learned import ExportConfig
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.errors import DriveError, WrongFamily
from fastsd_helpers.forms import show_form
from fastsd_helpers.forms.widgets import known
from fastsd_helpers.forms.widgets.choice import Choice
from fastsd_helpers.forms.widgets.known import OTHER, known_values
from fastsd_helpers.forms.widgets.style import COLOURS
from fastsd_helpers.model_lookup import known_model
from fastsd_helpers.options import check, option, options_of
from fastsd_helpers.registry import models
from fastsd_helpers.sessions import Session

pytest.importorskip("ipywidgets")

DATA = Path(__file__).resolve().parent / "data" / "v0.1"


@dataclass(frozen=True)
class ShopConfig:
    """What to buy."""

    fruit: str = option("apple", help="which", known="fruit")
    bag: str = option("", help="in what", known="bags")
    coupon: str | None = option(None, help="which", known="fruit")

    def __post_init__(self) -> None:
        check(self)


@pytest.fixture(autouse=True)
def _shop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known.SOURCES, "fruit", f"{__name__}:list_fruit")
    monkeypatch.setitem(known.SOURCES, "bags", f"{__name__}:list_bags")


def list_fruit(_session: Session | None) -> list[tuple[str, str]]:
    return [("a pear, ripe", "pear"), ("an apple", "apple")]


def list_bags(_session: Session | None) -> list[tuple[str, str]]:
    return [("a new one: write its colour", OTHER), ("none, in the hand", ""), ("the red one", "red")]


def offered(form: object, name: str) -> list[tuple[str, str]]:
    return list(form._fields[name].choice.known.options)  # type: ignore[attr-defined]


def list_long(_session: Session | None) -> list[tuple[str, str]]:
    return [("none", ""), ("sd-turbo: Stable Diffusion Turbo, one to four steps an image", "sd-turbo")]


def test_a_list_with_long_entries_has_the_width_of_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known.SOURCES, "bags", f"{__name__}:list_long")
    fields = show_form(ShopConfig)._fields
    assert "fastsd-wide" in fields["bag"].row._dom_classes
    assert "fastsd-wide" not in fields["fruit"].row._dom_classes


def test_a_setting_with_known_values_offers_them_and_takes_others() -> None:
    form = show_form(ShopConfig)
    assert offered(form, "fruit") == [("a pear, ripe", "pear"), ("an apple", "apple"), ("another one: type it", "")]
    assert form.config() == ShopConfig()
    choice = form._fields["fruit"].choice
    assert choice.known.value == "apple"
    assert choice.text.layout.display == "none", "the field to type in is there when it is wanted"
    choice.known.value = "pear"
    assert form.config().fruit == "pear"
    choice.known.value = ""
    assert choice.text.layout.display == ""
    choice.text.value = "  quince "
    assert form.config().fruit == "quince"
    form.update(fruit="apple")
    assert (choice.known.value, choice.text.layout.display) == ("apple", "none")


def test_a_list_can_word_its_free_entry_and_have_an_empty_value() -> None:
    form = show_form(ShopConfig)
    choice = form._fields["bag"].choice
    assert [words for words, _value in offered(form, "bag")][:2] == ["a new one: write its colour", "none, in the hand"]
    assert (choice.known.value, form.config().bag) == ("", "")
    choice.known.value = OTHER
    assert choice.text.layout.display == ""
    choice.text.value = "blue"
    assert (form.config().bag, choice.known.value) == ("blue", OTHER)
    choice.known.value = ""
    assert form.config().bag == ""


def test_an_optional_setting_can_be_left_alone() -> None:
    form = show_form(ShopConfig)
    assert offered(form, "coupon")[0] == ("automatic", "")
    assert form.config().coupon is None
    form.update(coupon="pear")
    assert form.config().coupon == "pear"


def test_what_was_entered_comes_back_whether_known_or_typed(tmp_path: Path) -> None:
    session = Session.create("shop", root=tmp_path)
    show_form(ShopConfig, restore=session, given={"fruit": "quince", "bag": "red"}).config()
    again = show_form(ShopConfig, restore=Session.open("shop", root=tmp_path))
    assert again.config() == ShopConfig(fruit="quince", bag="red")
    assert again._fields["bag"].choice.known.value == "red"


def test_a_list_that_cannot_be_made_leaves_the_text_field_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_session: Session | None) -> list[tuple[str, str]]:
        raise DriveError("Drive is not there.", "Mount it.")

    monkeypatch.setitem(globals(), "list_fruit", gone)
    form = show_form(ShopConfig)
    choice = form._fields["fruit"].choice
    assert choice.known.layout.display == "none"
    assert "Drive is not there." in choice.about.value
    choice.text.value = "plum"
    assert form.config().fruit == "plum"


def test_every_list_that_a_setting_of_a_form_names_is_there() -> None:
    from test_forms import forms_of_the_notebooks

    for settings in forms_of_the_notebooks():
        for spec in options_of(settings):
            if spec.known:
                assert all(len(entry) == 2 for entry in known_values(spec.known)), (settings, spec.name)


def test_the_choice_alone_starts_with_what_it_is_given() -> None:
    choice = Choice([("one", "1"), ("two", "2")], label="number", value="7")
    assert (choice.read(), choice.known.value) == ("7", "")
    choice.known.value = "2"
    assert choice.read() == "2"
    assert choice.known.description == "number"
    assert Choice([], label="number").text.description == "number"


def test_the_checkpoints_of_a_session_are_offered_for_export(tmp_path: Path) -> None:
    with tarfile.open(DATA / "sessions-full-done.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    folder = next(tmp_path.rglob("session.json")).parent
    session = Session.open(folder.name, root=folder.parent)
    form = show_form(ExportConfig, restore=session)
    entries = offered(form, "checkpoint")
    assert entries[0] == ("the newest", "")
    assert any(value == "best" and "held-out loss" in words for words, value in entries)
    whole = [value for words, value in entries if words == "U-Net step 6"]
    assert whole == ["000003-unet-000006-fde58c49"]
    form.update(checkpoint=whole[0])
    assert form.config().checkpoint == whole[0]
    (folder / "checkpoints" / whole[0] / "unet.safetensors").write_bytes(b"cut")
    assert whole[0] not in [value for _words, value in known_values("checkpoints", session)], "not whole any more"
    assert known_values("checkpoints", None) == [("the newest", "")]


# ------------------------------------------------------------------------------- models that cannot be trained

UNTRAINABLE = [spec.key for spec in models() if not spec.trainable]


@pytest.mark.parametrize("key", UNTRAINABLE)
def test_a_model_that_cannot_be_trained_says_so_at_its_field(key: str) -> None:
    from fastsd_helpers.dreambooth.settings import DreamBoothConfig

    form = show_form(DreamBoothConfig)
    form.update(base_model=key)
    said = form._fields["base_model"].choice.about.value
    assert "cannot train" in said
    assert "sd21-768" in said, "what can be trained is named"
    assert "Neither a path" not in said


@pytest.mark.parametrize("key", UNTRAINABLE)
def test_a_model_that_cannot_be_trained_is_refused_before_anybody_is_asked(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsd_helpers.model_lookup import finding

    for name in ("fetch", "fetch_repo"):
        monkeypatch.setattr(finding, name, lambda *_a, **_k: pytest.fail("it was asked for"))
    spec = next(spec for spec in models() if spec.key == key)
    repos = [source.repo for source in spec.sources]
    links = [f"https://huggingface.co/{repo}/resolve/main/model.safetensors" for repo in repos]
    for ref in (key, *repos, *(f"{repo}@main" for repo in repos), *links):
        with pytest.raises(WrongFamily, match="cannot train"):
            BaseModel.fetch(ref)


def test_a_misspelt_model_is_answered_with_those_that_can_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsd_helpers.errors import ModelNotFound

    for typed in ("sdx l", "sd15 inpaint"):
        with pytest.raises(ModelNotFound) as caught:
            BaseModel.fetch(typed)
        for key in UNTRAINABLE:
            assert f"'{key}'" not in caught.value.hint
            assert f" {key}," not in caught.value.hint
        assert "sd21-512" in caught.value.hint


def test_a_folder_and_a_reader_that_cannot_be_trained_say_so_too(tmp_path: Path) -> None:
    from fastsd_helpers import demo
    from fastsd_helpers.forms.widgets.model_choice import ModelChoice
    from fastsd_helpers.registry import TRAINABLE_FAMILIES

    choice = ModelChoice(families=TRAINABLE_FAMILIES)
    choice.write("trocr-base-handwritten")
    assert "⚠" in choice.about.value
    choice.write("microsoft/trocr-base-handwritten")
    assert "⚠" in choice.about.value
    choice.write("somebody/their-own-sd15")
    assert "⚠" not in choice.about.value
    shutil.copytree(demo.MODEL_FOLDER, tmp_path / "mine")
    choice.write(str(tmp_path / "mine"))
    assert "A path on this machine" in choice.about.value
    config = tmp_path / "mine" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    choice.write("")
    choice.write(str(tmp_path / "mine"))
    assert "cannot train" in choice.about.value


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/a.safetensors", "sdxl"),
        ("StabilityAI/Stable-Diffusion-XL-base-1.0", "sdxl"),
        ("somebody/something", None),
        ("https://example.org/stabilityai/stable-diffusion-xl-base-1.0/a.safetensors", None),
        ("", None),
    ],
)
def test_a_known_repository_is_known_however_it_is_written(text: str, key: str | None) -> None:
    found = known_model(text)
    assert (found.key if found else None) == key


# -------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("kind", COLOURS)
def test_what_has_a_colour_of_its_own_can_be_read_in_every_theme(kind: str) -> None:
    assert contrast(*COLOURS[kind]) >= 4.5


def test_contrast_is_measured_as_the_guidelines_say() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
