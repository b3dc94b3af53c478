"""What `convert --merge` refuses, and what it says: paths and strengths, damaged adapters, the header of the result."""

import json
import re
from contextlib import ExitStack

import pytest

pytest.importorskip("numpy")
import numpy as np
from merge_models import TO_K, assert_merged, kohya, noise, stored
from table_models import read, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile
from fastsd_helpers.checkpoints.models.merge import open_adapters
from fastsd_helpers.errors import CheckpointError

UNET_FILE = "diffusion_pytorch_model.safetensors"


# ------------------------------------------------------------------------------------------------ what is refused, said

A, B = f"unet.{TO_K}.lora_A.weight", f"unet.{TO_K}.lora_B.weight"
GOOD = {A: stored(noise(2, 24)), B: stored(noise(8, 2))}
OTHER = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"


def lyco(**roles):
    return {f"{kohya(TO_K)}.{role}": stored(values) for role, values in roles.items()}


BAD_FILES = {
    "of another family": (
        {f"{OTHER}.lora_A.weight": stored(noise(2, 48)), f"{OTHER}.lora_B.weight": stored(noise(16, 2))},
        r"a LoRA for SDXL in diffusers' names; the model is SD 1.5",
    ),
    "of other widths": (
        {A: stored(noise(2, 768)), B: stored(noise(320, 2))},
        r"\[320, 768\]; the model's has \[8",
    ),
    "half": ({A: GOOD[A]}, "lacks its up matrix"),
    "half a LoHa": (lyco(hada_w1_a=noise(8, 2), hada_w1_b=noise(2, 24)), "lacks 'hada_w2_a'"),
    "not fitting": (
        lyco(hada_w1_a=noise(8, 2), hada_w1_b=noise(3, 24), hada_w2_a=noise(8, 2), hada_w2_b=noise(2, 24)),
        "do not fit each other",
    ),
    "not a number": ({**GOOD, A: stored(noise(2, 24) * np.nan)}, "NaN or Inf"),
    "no number for a LoKr": (lyco(lokr_w1=noise(2, 4) * np.inf, lokr_w2=noise(4, 6)), "contains NaN or Inf"),
    "of whole numbers": ({**GOOD, A: stored(np.ones((2, 24)), "<i4")}, "quantized"),
    "with an alpha that is none": (
        lyco(**{"lora_down.weight": noise(2, 24), "lora_up.weight": noise(8, 2), "alpha": np.nan}),
        "its scale is unknown",
    ),
    "with lengths of another layer": (
        {**GOOD, f"unet.{TO_K}.dora_scale": stored(noise(1, 8))},
        "8 lengths for a weight",
    ),
    "for a bias that the model lacks": ({**GOOD, f"unet.{TO_K}.lora_B.bias": stored(noise(8))}, "does not have"),
    "an OFT": (lyco(oft_blocks=noise(2, 4, 4), alpha=0.1), "changed by OFT"),
    "a GLoRA": (lyco(**{f"{role}.weight": noise(4, 4) for role in ("a1", "a2", "b1", "b2")}), "changed by GLoRA"),
    "with a factor that other programs ignore": (
        lyco(lokr_w1=noise(2, 4), lokr_w2=noise(4, 6), scalar=0.5),
        "that is not 1",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("way", ["model", "model.safetensors"])
def test_a_file_that_cannot_be_merged_is_named_and_nothing_is_written(case, way, merge_models, place):
    tensors, message = BAD_FILES[case]
    write(place / "bad.safetensors", tensors)
    home, _, _ = merge_models("sd15")
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.convert(home / way, place / "merged.safetensors", merge=[str(place / "bad.safetensors")])
    assert "bad.safetensors" in caught.value.problem
    assert [path.name for path in place.iterdir()] == ["bad.safetensors"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("l.safetensors:0", "nothing would be merged"),
        ("l.safetensors:-0.0", "nothing would be merged"),
        ("l.safetensors:nan", "strength of l.safetensors is nan"),
        ("l.safetensors:1e999", "strength of l.safetensors is 1e999"),
        ("l.safetensors:abc", "strength 'abc' of l.safetensors is not a number"),
        ("l.safetensors:0,7", "with a dot"),
        ("l.safetensors:", "strength '' of l.safetensors"),
        (r"C:\loras\l.safetensors", r"no LoRA at C:\\loras\\l.safetensors"),
        (r"C:\loras\l.safetensors:0.5", r"no LoRA at C:\\loras\\l.safetensors\."),
        ("nothing.safetensors:0.5", "no LoRA at nothing.safetensors"),
        ("", "names no LoRA"),
        ("a:0.5", "is ambiguous"),
        ("empty", "a folder without a LoRA"),
        ("model.safetensors", "not a LoRA: it cannot be merged"),
    ],
)
def test_what_is_asked_for_wrongly_is_said(asked, message, merge_models, place, monkeypatch):
    home, _, _ = merge_models("sd15")
    for name in ("l.safetensors", "a", "a:0.5"):
        write(place / name, GOOD)
    (place / "empty").mkdir()
    (place / "model.safetensors").symlink_to(home / "model.safetensors")
    monkeypatch.chdir(place)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.convert(home / "model", place / "merged", merge=[asked])
    assert re.search(message, f"{caught.value.problem} {caught.value.hint}"), caught.value
    assert caught.value.hint
    assert not (place / "merged").exists()


@pytest.mark.parametrize("name", ["my own.safetensors", "pytorch_lora_weights.bin"])
def test_a_folder_with_one_lora_of_any_name_is_that_lora(name, merge_models, place):
    home, _, _ = merge_models("sd15")
    lora = write(place / "lora" / name, GOOD)
    if name.endswith(".bin"):
        torch = pytest.importorskip("torch")
        lora.unlink()
        torch.save({layer: torch.frombuffer(bytearray(content), dtype=torch.float32).reshape(fact.shape)
                    for layer, (fact, content) in GOOD.items()}, lora)  # fmt: skip
    (place / "lora" / "README.md").write_text("# My LoRA\n")
    named = checkpoints.convert(home / "model", place / "a.safetensors", merge=[str(lora)])
    whole = checkpoints.convert(home / "model", place / "b.safetensors", merge=[str(place / "lora")])
    assert read(whole.path) == read(named.path)
    assert any("is the only model file" in note for note in whole.notes)
    write(place / "lora" / "other.safetensors", GOOD)
    with pytest.raises(CheckpointError, match="holds 2 model files"):
        checkpoints.convert(home / "model", place / "c.safetensors", merge=[str(place / "lora")])


@pytest.mark.parametrize(
    ("asked", "strength"),
    [
        ("l.safetensors", 1),
        ("l.safetensors:+.5", 0.5),
        ("C:x.safetensors", 1),
        ("C:x.safetensors:2e-1", 0.2),
        ("a:0.50", 0.5),
    ],
)
def test_paths_with_colons_and_strengths_are_told_apart(asked, strength, merge_models, place, monkeypatch):
    for name in ("l.safetensors", "C:x.safetensors", "a", "a:0.5"):
        write(place / name, GOOD)
    monkeypatch.chdir(place)
    with ExitStack() as stack:
        (adapter,) = open_adapters([asked], stack)
        assert adapter.strength == strength


def test_the_result_says_what_was_merged_and_a_second_merge_adds_to_it(merge_models, place):
    home, _, _ = merge_models("sd15")
    lora = home / "lora.safetensors"
    once = checkpoints.convert(home / "model", place / "once.safetensors", merge=[f"{lora}:0.7", f"{lora}:-0.2"])
    assert any("given 2 times: the combined strength is 0.5" in note for note in once.notes)
    assert any("opposite effect" in note for note in once.notes)
    checkpoints.convert(
        place / "once.safetensors", place / "twice.safetensors", merge=[f"{home / 'kohya.safetensors'}:0.3"]
    )
    checkpoints.convert(place / "twice.safetensors", place / "folder", merge=[f"{lora}:0.1"])
    with SafetensorsFile(place / "once.safetensors") as file:
        said = file.metadata
    assert said["modelspec.merged_from"] == "model, lora, lora"
    assert [(one["lora"], one["strength"]) for one in json.loads(said["fastsd.merged"])] == [
        ("lora.safetensors", 0.7),
        ("lora.safetensors", -0.2),
    ]
    with SafetensorsFile(place / "twice.safetensors") as file:
        assert file.metadata["modelspec.merged_from"] == "model, lora, lora, kohya"
        assert len(json.loads(file.metadata["fastsd.merged"])) == 3
    with SafetensorsFile(place / "folder" / "unet" / UNET_FILE) as file:
        assert len(json.loads(file.metadata["fastsd.merged"])) == 4
        assert file.metadata["format"] == "pt"


def test_a_lora_is_not_merged_into_a_lora(merge_models, place):
    home, _, _ = merge_models("sd15")
    for source in (home / "lora.safetensors", home / "kohya.safetensors"):
        with pytest.raises(CheckpointError, match="merged into a model"):
            checkpoints.convert(source, place / "x.safetensors", merge=[str(home / "lora.safetensors")])


def test_the_lora_that_is_read_is_not_overwritten(merge_models, place):
    home, _, _ = merge_models("sd15")
    write(place / "l.safetensors", GOOD)
    before = (place / "l.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="one of the files the model is read from"):
        checkpoints.convert(
            home / "model", place / "l.safetensors", merge=[str(place / "l.safetensors")], overwrite=True
        )
    assert (place / "l.safetensors").read_bytes() == before


def test_a_merge_that_was_written_wrongly_is_found(merge_models, place, monkeypatch):
    from fastsd_helpers.checkpoints.models import folder_conversion
    from fastsd_helpers.errors import VerificationFailed

    home, _, _ = merge_models("sd15")
    write_as_it_is = folder_conversion.write_recipes

    def damaged(dst, recipes, **settings):
        done = write_as_it_is(dst, recipes, **settings)
        with dst.open("r+b") as file:
            file.seek(-4, 2)
            byte = file.read(1)
            file.seek(-4, 2)
            file.write(bytes([byte[0] ^ 1]))
        return done

    monkeypatch.setattr(folder_conversion, "write_recipes", damaged)
    with pytest.raises(VerificationFailed, match="differs"):
        checkpoints.convert(
            home / "model", place / "m.safetensors", merge=[str(home / "lora.safetensors")], verify=True
        )


def test_the_command_line_takes_several_merges(merge_models, place, capsys):
    from fastsd_helpers.cli import main

    home, before, added = merge_models("sd15")
    asked = ["--merge", f"{home / 'lora.safetensors'}:0.5", "--merge", f"{home / 'kohya.safetensors'}:0.2"]
    assert main(["convert", str(home / "model"), str(place / "merged"), *asked]) == 0
    assert "kohya.safetensors was merged with strength 0.2" in capsys.readouterr().out
    assert_merged(place / "merged", before, added, 0.7)
