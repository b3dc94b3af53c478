"""Tests of the model dropdown, with real ipywidgets."""

import pytest

from fastsd_helpers.device import Device
from fastsd_helpers.registry import find_model, models

pytest.importorskip("ipywidgets")

from fastsd_helpers.forms.widgets import model_choice
from fastsd_helpers.forms.widgets.model_choice import ModelChoice, describe_fit

CPU = Device("cpu", "Test CPU", 8 * 2**30, False)
T4 = Device("cuda", "Tesla T4", 15 * 2**30, False, (7, 5))


@pytest.fixture(autouse=True)
def _t4(monkeypatch):
    monkeypatch.setattr(model_choice, "describe_device", lambda: T4)


def test_every_base_model_is_offered_and_any_other_can_be_typed():
    choice = ModelChoice()
    assert choice.read() == "demo"
    keys = [value for _label, value in choice.known.options]
    assert keys == [*(spec.key for spec in models()), ""]
    choice.write("sdxl")
    assert (choice.read(), choice.known.value) == ("sdxl", "sdxl")
    choice.text.value = "  owner/name "
    assert (choice.read(), choice.known.value) == ("owner/name", "")


def test_choosing_in_the_list_fills_in_the_text_and_another_one_empties_it():
    choice = ModelChoice()
    choice.known.value = "sdxl"
    assert choice.read() == "sdxl"
    choice.known.value = ""
    assert choice.read() == ""
    choice.write("/my/model")
    choice.known.value = "sd15"
    assert choice.read() == "sd15"
    choice.write("/my/model")
    assert choice.known.value == ""
    assert choice.read() == "/my/model"


def test_auto_is_offered_where_it_means_something_and_asks_for_no_processor(monkeypatch):
    monkeypatch.setattr(model_choice, "describe_device", lambda: pytest.fail("torch would be imported"))
    choice = ModelChoice(auto="what suits this machine")
    assert choice.read() == "auto"
    assert choice.known.options[0] == ("auto: what suits this machine", "auto")
    assert choice.about.value == ""
    assert "Neither a path" in ModelChoice(value="auto").about.value


def test_whether_it_fits_follows_the_use():
    choice = ModelChoice(value="flux-dev", use="lora")
    assert "⚠ wants 24 GB" in choice.about.value
    choice.write("sdxl")
    assert "✓ wants 10 GB" in choice.about.value
    choice.set_use("draw")
    assert "✓ wants 9 GB" in choice.about.value


def test_size_licence_gate_and_fit_are_shown():
    choice = ModelChoice(value="flux-dev")
    said = choice.about.value
    assert "23.8 GB" in said
    assert "non-commercial" in said
    assert "HF_TOKEN" in said
    assert "⚠ wants 34 GB of GPU memory, and Tesla T4 has 16 GB" in said
    choice.write("sd15")
    assert "✓ wants 4 GB" in choice.about.value
    assert "HF_TOKEN" not in choice.about.value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Type a Hub id"),
        ("https://example.org/<b>x</b>", "A link"),
        ("owner/name@main", "Hugging Face Hub"),
        ("what is this", "Neither a path"),
    ],
)
def test_a_typed_text_is_told_what_it_is(text, said):
    choice = ModelChoice()
    choice.write("x/y")
    choice.write(text)
    assert said in choice.about.value


def test_a_path_and_other_kinds_of_models(tmp_path):
    choice = ModelChoice(kind="vae")
    assert choice.read() == "sdxl-vae"
    choice.write(str(tmp_path))
    assert "A path on this machine" in choice.about.value
    assert {spec.key for spec in choice._specs.values()} == {"sdxl-vae", "sd15-vae", "flux-vae"}


def test_whether_a_model_fits_is_told_for_each_use():
    # All of SDXL's weights are not trained here: what its training takes is what a LoRA takes.
    for use in ("full", "lora"):
        assert describe_fit(find_model("sdxl"), T4, use) == (
            True,
            "wants 10 GB of GPU memory, and Tesla T4 has 16 GB",
        )
    assert describe_fit(find_model("sdxl"), T4, "lora")[0] is True
    assert describe_fit(find_model("sd15"), CPU, "full")[0] is False
    assert describe_fit(find_model("demo"), CPU, "full") == (True, "runs without a GPU")
    assert describe_fit(find_model("sd21-768"), T4, "full")[0] is True
    assert describe_fit(find_model("sd15-inpaint"), T4, "full")[0] is None
