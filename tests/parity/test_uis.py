"""Our full-size exports and LoRA in the web UIs' own loaders: see README.md beside this file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from installed import require_installed
from tiny_families import reference

require_installed("diffusers")

pytest.importorskip("torch")
pytest.importorskip("transformers")

SCRIPTS = Path(__file__).parents[2] / "scripts"
CHECKOUTS = {ui: os.environ.get(f"FASTSD_{ui.upper()}") for ui in ("comfyui", "forge", "a1111")}
LOADERS = ("comfyui", "forge")  # AUTOMATIC1111's is that of the original code
PYTHONS = {ui: os.environ.get(f"FASTSD_{ui.upper()}_PYTHON", sys.executable) for ui in CHECKOUTS}
SD21 = {"comfyui": 18, "forge": 2}


@pytest.fixture
def parity_uis(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import parity_uis

    return parity_uis


def checkout_of(ui):
    if not CHECKOUTS[ui]:
        pytest.skip(f"FASTSD_{ui.upper()} names no checkout (see README.md)")
    return Path(CHECKOUTS[ui])


def test_what_the_uis_are_given_is_the_recorded_list_of_the_original(parity_uis, tmp_path):
    (made,) = parity_uis.make_exports(tmp_path, {"sd15"})
    (names,) = made["files"].values()
    assert {name: tuple(shape) for name, (_dtype, shape) in names.items()} == reference("sd15")[0]
    assert {dtype for dtype, _shape in names.values()} == {"F16"}
    assert not list(tmp_path.rglob("sd15.safetensors")), "nothing of full size is written"


def test_only_what_is_documented_is_let_pass(parity_uis):
    export = {"name": "sdxl", "expected": {"forge": "SDXL"}, "predicts": "epsilon", "files": {}}
    answer = {"model": "SDXL", "predicts": "epsilon", "missing": [], "extra": [], "errors": []}
    lacking = ["text_encoder: transformer.text_projection.weight", "text_encoder_2: logit_scale"]
    assert parity_uis.judged("forge", export, {**answer, "missing": lacking})["permitted"] == 2
    unused = {"extra": ["lora_te2_text_projection.alpha"], "missing": ["lora_te2_text_projection.alpha"]}
    loras = {"name": "lora-sdxl", "expected": {ui: "SDXL" for ui in CHECKOUTS}, "files": {}}
    assert parity_uis.judged("a1111", loras, {**answer, "predicts": None, **unused})["permitted"] == 1
    assert parity_uis.judged("forge", loras, {**answer, "predicts": None, **unused})["permitted"] == 0
    refiner = {**export, "name": "sdxl-refiner"}
    assert not parity_uis.judged("forge", refiner, {**answer, "missing": lacking[:1]})["ok"]
    for change in (
        {"missing": ["text_encoder_2: transformer.text_projection.weight"]},
        {"extra": ["text_encoder: logit_scale"]},
        {"errors": ["a layer does not fit"]},
        {"model": "SD15"},
        {"predicts": "v"},
    ):
        result = parity_uis.judged("forge", export, {**answer, **change})
        assert not result["ok"], change
        assert len(result["troubles"]) == 1, change
        assert parity_uis.in_words(result).startswith("FAILED forge")


@pytest.mark.slow
@pytest.mark.timeout(1600)  # their imports alone take minutes on a busy machine
@pytest.mark.parametrize("ui", LOADERS)
def test_the_loaders_take_every_tensor_and_lack_only_what_is_documented(ui):
    command = [sys.executable, SCRIPTS / "parity_uis.py", f"--{ui}", checkout_of(ui), f"--{ui}-python", PYTHONS[ui]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = {result["export"]: result for result in json.loads(ended.stdout.splitlines()[-1])["results"]}
    assert len(results) == 18
    assert results["sd21-512"]["permitted"] == SD21[ui]
    assert results["sdxl-v"]["predicts"] == "v"
    assert results["lora-sdxl"]["permitted"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1600)  # their imports alone take minutes on a busy machine
@pytest.mark.parametrize("ui", CHECKOUTS)
def test_every_key_of_an_sdxl_lora_is_in_the_table_of_names_and_a_misspelt_one_is_not(ui, parity_uis, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    exports = parity_uis.make_exports(tmp_path, {*parity_uis.TRAINED})
    counts = {"trained-attention": 560, "trained-attention-text": 560 + 176}
    counts |= {"trained-all-linears": 722, "trained-all-linears-text": 722 + 264}
    loras = {export["name"]: export for export in exports if "base" in export}
    assert {name: len(next(iter(export["files"].values()))) for name, export in loras.items()} == {
        name: 3 * layers for name, layers in counts.items()
    }
    ((path, _names),) = loras["trained-attention"]["files"].items()
    with safe_open(path, "pt") as file:
        said = file.metadata()
    wrong = {name.replace("middle_block_1_tr", "middle_block_2_tr"): value for name, value in load_file(path).items()}
    save_file(wrong, tmp_path / "wrong.safetensors", said)
    exports.append({**loras["trained-attention"], "name": "wrong", "files": {str(tmp_path / "wrong.safetensors"): []}})
    listed = tmp_path / "exports.json"
    listed.write_text(json.dumps(exports))
    answers = parity_uis.ask(ui, checkout_of(ui), listed, PYTHONS[ui])
    for name, export in loras.items():
        assert parity_uis.judged(ui, export, answers[name])["troubles"] == []
    assert len(answers["wrong"]["extra"]) == 3 * 80, "ten blocks of two attentions with four layers"


@pytest.mark.slow
@pytest.mark.timeout(1600)  # their imports alone take minutes on a busy machine
@pytest.mark.parametrize("ui", LOADERS)
def test_a_projection_left_out_and_a_name_misspelt_are_found(ui, parity_uis, tmp_path):
    checkout = checkout_of(ui)
    (export,) = parity_uis.make_exports(tmp_path, {"sdxl"})
    names = export["files"]["sdxl.safetensors"]
    del names["conditioner.embedders.1.model.text_projection"]
    names["model.diffusion_model.middle_block.1.proj_out.wrong"] = names.pop(
        "model.diffusion_model.middle_block.1.proj_out.weight"
    )
    listed = tmp_path / "exports.json"
    listed.write_text(json.dumps([export]))
    answer = parity_uis.ask(ui, checkout, listed, PYTHONS[ui])["sdxl"]
    troubles = parity_uis.judged(ui, export, answer)["troubles"]
    assert len(troubles) == 3
    assert any("text_projection" in text and text.startswith("lacks") for text in troubles)
    assert any(text.endswith("middle_block.1.proj_out.weight") for text in troubles)
    assert any(text.startswith("does not use") for text in troubles)
