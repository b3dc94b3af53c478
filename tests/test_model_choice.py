"""Tests of the model dropdown, with real ipywidgets."""

import pytest

from fastsd_helpers.registry import find_model, models
from fastsd_helpers.runtime import Device

pytest.importorskip("ipywidgets")

from fastsd_helpers.forms import model_choice
from fastsd_helpers.forms.model_choice import ModelChoice, describe_fit

CPU = Device("cpu", "Test CPU", 8 * 2**30, False)
T4 = Device("cuda", "Tesla T4", 15 * 2**30, False, (7, 5))


@pytest.fixture(autouse=True)
def _t4(monkeypatch):
    monkeypatch.setattr(model_choice, "describe_device", lambda: T4)


def test_every_base_model_is_offered_and_any_other_can_be_typed():
    seen = []
    choice = ModelChoice(changed=seen.append)
    assert choice.read() == "demo"
    keys = [value for _label, value in choice._list.options]
    assert keys == [*(spec.key for spec in models()), ""]
    choice.write("sdxl")
    assert choice.read() == "sdxl"
    choice.write("  owner/name ")
    assert choice.read() == "owner/name"
    assert choice._text.layout.display == ""
    assert seen[-1] == "owner/name"


def test_size_licence_gate_and_fit_are_shown():
    choice = ModelChoice(value="flux-dev")
    said = choice._about.value
    assert "23.8 GB" in said
    assert "non-commercial" in said
    assert "HF_TOKEN" in said
    assert "⚠ wants 34 GB of GPU memory, and Tesla T4 has 16 GB" in said
    choice.write("sd15")
    assert "✓ wants 4 GB" in choice._about.value
    assert "HF_TOKEN" not in choice._about.value


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
    assert said in choice._about.value


def test_a_path_and_other_kinds_of_models(tmp_path):
    choice = ModelChoice(kind="vae")
    assert choice.read() == "sdxl-vae"
    choice.write(str(tmp_path))
    assert "A path on this machine" in choice._about.value
    assert {spec.key for spec in choice._specs.values()} == {"sdxl-vae", "sd15-vae", "flux-vae"}


def test_whether_a_model_fits_is_told_for_each_use():
    assert describe_fit(find_model("sdxl"), T4, "full") == (
        False,
        "wants 17 GB of GPU memory, and Tesla T4 has 16 GB",
    )
    assert describe_fit(find_model("sdxl"), T4, "lora")[0] is True
    assert describe_fit(find_model("sd15"), CPU, "full")[0] is False
    assert describe_fit(find_model("demo"), CPU, "full") == (True, "runs without a GPU")
    assert describe_fit(find_model("sd21-512"), T4, "full")[0] is None
