"""Tests of the ControlNet map: every row is complete, every impossible pair is refused with what works."""

import re

import pytest

from fastsd_helpers.controlnet import (
    UIS,
    controlnet_file,
    controlnets,
    family_of_base,
    find_controlnet,
    find_controlnets,
    tasks,
    total_bytes,
)
from fastsd_helpers.errors import ModelError, ModelNotFound
from fastsd_helpers.registry import models

ROWS = controlnets()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_every_row_is_complete_and_plausible(row):
    assert row.title
    assert row.tasks
    assert row.preprocessor
    assert row.licence
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", row.repo)
    assert row.file.endswith((".safetensors", ".pth"))
    assert row.save_as.endswith(row.file[row.file.rindex(".") :])
    assert "diffusion_pytorch_model" not in row.save_as, "no web UI would recognise it"
    assert set(row.uis) <= set(UIS)
    assert row.family in ("sd15", "sd21", "sdxl", "flux")
    assert row.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", row.sha256)
    assert row.bytes > 10e6 or row.bytes == 0


def test_names_on_disk_are_unique_and_say_their_family_as_the_extension_reads_it():
    assert len({row.save_as for row in ROWS}) == len(ROWS)
    for row in ROWS:
        # Source: Mikubill/sd-webui-controlnet, scripts/enums.py: the family is read off the file's name.
        name = row.save_as.lower()
        if "a1111" in row.uis:
            found = "sdxl" if "xl" in name else "sd21" if "sd21" in name or "2.1" in name else "sd15"
            assert found == row.family, row.save_as
            if found == "sd15":
                assert re.search(r"sd1[456]", name), row.save_as


def test_the_fourteen_of_sd15_are_there_in_half_precision():
    rows = [row for row in ROWS if row.repo == "comfyanonymous/ControlNet-v1-1_fp16_safetensors"]
    assert len(rows) == 14
    assert all(row.file.startswith("control_v11") and row.file.endswith("_fp16.safetensors") for row in rows)


def test_each_task_has_at_most_one_first_choice():
    for family in ("sd15", "sd21", "sdxl", "flux"):
        for task in tasks(family):
            assert sum(row.recommended for row in find_controlnets(family, task=task)) <= 1, (family, task)


@pytest.mark.parametrize("base", [spec.key for spec in models() if not spec.folder])
@pytest.mark.parametrize("ui", UIS)
def test_whatever_is_offered_can_be_had_and_fits(base, ui):
    for task in tasks(base, ui=ui):
        row = find_controlnet(base, task, ui=ui)
        assert row.family == family_of_base(base)
        assert ui in row.uis
        assert task in row.tasks


def test_no_ui_of_the_automatic1111_family_is_offered_a_flux_controlnet():
    assert tasks("flux-dev", ui="a1111") == tasks("flux-dev", ui="forge-neo") == []
    assert "canny" in tasks("flux-dev", ui="comfyui")
    assert tasks("sd21-768", ui="forge-neo") == []


@pytest.mark.parametrize(
    ("base", "what", "ui", "said", "instead"),
    [
        ("flux-dev", "canny", "a1111", "AUTOMATIC1111 runs no canny", "ComfyUI or the playground"),
        ("sdxl", "sd15-canny", "a1111", "is for sd15, and sdxl is sdxl", "Use 'sdxl-union-promax'"),
        ("sd15", "sdxl-union-promax", "a1111", "is for sdxl", "Use 'sd15-openpose'"),
        ("sd21-512", "canny", "forge-neo", "Forge Neo runs no canny", "AUTOMATIC1111"),
        ("sd21-512", "tile", "a1111", "no tile ControlNet for sd21-512", "there are: canny"),
        ("sdxl", "sdxl-diffusers-canny-mid", "comfyui", "ComfyUI cannot run", "Use 'sdxl-union-promax'"),
    ],
)
def test_an_impossible_pair_is_refused_with_what_works(base, what, ui, said, instead):
    with pytest.raises(ModelError, match=said) as caught:
        find_controlnet(base, what, ui=ui)
    assert instead in caught.value.hint


def test_a_misspelt_task_ui_and_base_name_the_right_ones():
    with pytest.raises(ModelNotFound, match="No ControlNet for 'cany'") as caught:
        find_controlnet("sd15", "cany", ui="a1111")
    assert caught.value.hint.startswith("Did you mean 'canny'?")
    with pytest.raises(ModelError, match="not a web UI") as caught:
        find_controlnets("sd15", ui="a11111")
    assert "forge-neo" in caught.value.hint
    with pytest.raises(ModelNotFound, match="No model has the key"):
        find_controlnets("sd16")
    with pytest.raises(ModelError, match="not a base model for ControlNets"):
        find_controlnets("trocr-base-handwritten")


def test_sizes_add_up_and_a_download_asks_for_the_name_the_extension_knows(tmp_path):
    rows = find_controlnets("sd15", ui="a1111")
    assert total_bytes(rows) == sum(row.bytes for row in rows)
    wanted = controlnet_file(find_controlnet("sdxl", "canny", ui="a1111"), tmp_path)
    assert wanted.source.file == "diffusion_pytorch_model_promax.safetensors"
    assert (wanted.name, wanted.size) == ("controlnet-union-sdxl-1.0-promax.safetensors", 2513342408)
    about = controlnet_file(find_controlnet("sd15", "canny", ui="a1111"), tmp_path)
    assert about.size is None, "a rounded size is not compared"


def test_the_built_in_model_is_offered_no_controlnet() -> None:
    with pytest.raises(ModelError, match="'demo' is not a base model for ControlNets"):
        find_controlnets("demo")


def test_a_control_is_offered_only_for_programs_that_load_its_kind_of_file() -> None:
    for ui in ("playground", "comfyui"):
        keys = {row.key for row in find_controlnets("flux-dev", ui=ui)}
        assert ("flux-tools-canny-lora" in keys) == (ui == "comfyui"), "a LoRA, which the playground does not steer by"
        assert {"flux-union-pro2", "flux-union-instantx"} <= keys
    assert find_controlnet("sd21-768", "canny", ui="comfyui").key == "sd21-canny"
    assert find_controlnet("sdxl", "sdxl-sai-canny-256", ui="comfyui").kind == "control-lora"
