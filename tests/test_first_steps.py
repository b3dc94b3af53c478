"""What a newcomer types first and gets wrong: the sentence names that mistake and the next step."""

import json

import pytest

from fastsd_helpers.cli import main


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out + err


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("civitai.com/models/5", "Write all of it: https://civitai.com/models/5"),
        ("www.huggingface.co/owner/name/resolve/main/a.safetensors", "Write all of it: https://www.huggingface.co/"),
        ("htp://example.org/model.safetensors", "htp:// is not supported."),
        ("ftp://example.org/model.safetensors", "Links begin with https://"),
        ("https:/civitai.com/models/5", "Links begin with https://"),
        ("nothere.safetensors", "There is no file 'nothere.safetensors'."),
        ("folder/of/mine/nothere.ckpt", "There is no file 'folder/of/mine/nothere.ckpt'."),
        ("SD15", "Did you mean 'sd15'?"),
        ("sdx", "Did you mean 'sdxl'?"),
        ("nothing like it at all", "it is not a registry key"),
    ],
)
def test_a_model_named_wrongly_is_told_what_is_wrong_with_the_name(
    capsys: pytest.CaptureFixture[str], ref: str, said: str
) -> None:
    code, text = run(capsys, "models", "get", ref)
    assert (code, said in text) == (2, True), text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--task", "cany"), "Did you mean 'canny'?"),
        (("--task", "cany", "--ui", "a1111"), "Did you mean 'canny'?"),
        (("--task", "opnpose"), "Did you mean 'openpose'?"),
        (("--task", "nothing at all"), "For sd15 in AUTOMATIC1111: canny, depth"),
    ],
)
def test_a_task_named_nearly_is_guessed(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    code, text = run(capsys, "controlnet", "list", "--base", "sd15", *words)
    assert (code, said in text) == (2, True), text


@pytest.mark.parametrize("ui", ["a1111", "forge-neo", "comfyui"])
def test_the_packages_of_a_web_ui_lead_to_the_command_that_makes_its_environment(
    capsys: pytest.CaptureFixture[str], ui: str
) -> None:
    code, text = run(capsys, "install", ui, "--dry-run")
    assert (code, f"`fastsd webui install --ui {ui}`" in text) == (2, True), text


def test_a_column_that_says_never_of_every_model_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "models", "list")
    assert code == 0
    assert "never" not in text
    assert "Trained here: demo, sd15" in text.splitlines()[-1]
    _, text = run(capsys, "models", "list", "--json")
    assert all(row["checked"] for row in json.loads(text.splitlines()[-1])["models"]), "programs get it all the same"


@pytest.mark.parametrize("ui", ["a1111", "forge-neo", "comfyui"])
def test_a_family_that_no_web_ui_runs_is_answered_with_those_it_runs(
    capsys: pytest.CaptureFixture[str], ui: str
) -> None:
    code, text = run(capsys, "webui", "launch", "--dry-run", "--family", "sd3", "--ui", ui)
    assert (code, "It runs sd15" in text) == (2, True), text
