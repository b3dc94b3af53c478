"""A second reader reads what was written and finds every layer that counts differently; then nothing is left behind."""

import json
import re

import pytest

pytest.importorskip("numpy")
import numpy as np
from lora_cases import changes_of, largest_difference
from table_models import values, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints import lora_converter
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, TensorFact
from fastsd_helpers.checkpoints.formats.sources import open_file
from fastsd_helpers.checkpoints.lora import fusing
from fastsd_helpers.checkpoints.lora.modules import lora_modules
from fastsd_helpers.checkpoints.lora.second_reader import SourceLayer, check_lora
from fastsd_helpers.errors import CheckpointError, VerificationFailed

D = 16
SINGLES = tuple(f"lora_unet_single_blocks_{block}" for block in (0, 7, 37))
BLOCK = "lora_unet_double_blocks_0_img"


def layer(name, rows, columns, rank, alpha, *, seed=0, dtype="F32", size=1.0):
    shapes = {f"{name}.lora_down.weight": (rank, columns), f"{name}.lora_up.weight": (rows, rank)}
    made = values(shapes, dtype, seed)
    if size != 1.0:
        made = {key: (fact, (np.frombuffer(data, "<f4") * size).tobytes()) for key, (fact, data) in made.items()}
    return made | {f"{name}.alpha": (TensorFact("F32", ()), np.float32(alpha).tobytes())}


def flux(final_rank=4, final_alpha=1):
    """Layers of every form that Flux has; the final layer's path in Diffusers ends every single block's too."""
    tensors = layer("lora_unet_final_layer_linear", 8, D, final_rank, final_alpha, seed=50)
    tensors |= layer("lora_unet_final_layer_adaLN_modulation_1", 2 * D, D, 4, 3, seed=51)
    tensors |= layer(f"{BLOCK}_attn_qkv", 3 * D, D, 4, 2, seed=52)
    for seed, name in enumerate(SINGLES):
        tensors |= layer(f"{name}_linear2", D, 5 * D, 4, 4, seed=seed)
        tensors |= layer(f"{name}_linear1", 7 * D, D, 2, 8, seed=seed + 10)
    return tensors


def truth_of(tensors):
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return changes_of(write(Path(folder) / "x.safetensors", tensors), "flux")


@pytest.mark.parametrize("rank", [4, 8])
def test_the_final_layer_of_flux_keeps_its_own_rank_and_alpha(rank, tmp_path) -> None:
    tensors = flux(rank)
    source = write(tmp_path / "in.safetensors", tensors)
    there = checkpoints.convert(source, tmp_path / "there.safetensors", verify=True)
    with SafetensorsFile(there.path) as file:
        said = json.loads(file.metadata["lora_adapter_metadata"])
    assert said["transformer.alpha_pattern"]["^proj_out"] == 1
    # peft compares an expression with whole paths, and a list with their ends.
    assert re.fullmatch(said["transformer.target_modules"], "proj_out")
    assert not re.fullmatch(said["transformer.target_modules"], "single_transformer_blocks.1.proj_out")
    assert said["transformer.rank_pattern"].get("^proj_out", said["transformer.r"]) == rank
    back = checkpoints.convert(there.path, tmp_path / "back.safetensors", verify=True)
    for path in (there.path, back.path):
        assert largest_difference(changes_of(path, "flux"), truth_of(tensors)) <= 1e-6
    assert there.notes == back.notes == ()


@pytest.mark.numeric
@pytest.mark.slow
def test_diffusers_gives_the_final_layer_of_flux_its_own_strength(tmp_path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from lora_readers import DiffusersReader

    reader = DiffusersReader("flux")
    width = reader.shapes()["transformer", "proj_out"][1]
    tensors = layer("lora_unet_final_layer_linear", 64, width, 8, 1, seed=50)
    for block in range(38):
        tensors |= layer(f"lora_unet_single_blocks_{block}_linear2", width, 5 * width, 4, 4, seed=block)
    source = write(tmp_path / "in.safetensors", tensors)
    there = checkpoints.convert(source, tmp_path / "there.safetensors")
    assert largest_difference(reader.changes(there.path), truth_of(tensors)) <= 1e-6


# ------------------------------------------------------------------------------------------------ it finds faults


def spoiled(monkeypatch, fault):
    """Make the conversion do something wrong."""
    if fault == "pattern":
        monkeypatch.setattr(lora_converter, "exact_pattern", lambda _part, path: path)
    elif fault == "halves":
        monkeypatch.setattr(lora_converter, "swap_halves", lambda one, _place: one)
    elif fault == "alpha":
        made = lora_converter._to_diffusers

        def described(*given):
            tensors, metadata = made(*given)
            said = {**json.loads(metadata["lora_adapter_metadata"]), "transformer.lora_alpha": 5}
            return tensors, {"lora_adapter_metadata": json.dumps(said)}

        monkeypatch.setattr(lora_converter, "_to_diffusers", described)
    elif fault == "order":
        cut = fusing.split
        monkeypatch.setattr(lora_converter, "split", lambda *given: cut(*given)[1::-1] + cut(*given)[2:])
    elif fault == "lost":
        every = lora_converter._as_diffusers
        monkeypatch.setattr(lora_converter, "_as_diffusers", lambda layers: dict(list(every(layers).items())[1:]))
    elif fault == "one value":
        kept = lora_converter._stored

        def stored(numbers, *formats):
            numbers = numbers.copy()
            numbers[0, 0] += 1e-3
            return kept(numbers, *formats)

        monkeypatch.setattr(lora_converter, "_stored", stored)


@pytest.mark.parametrize("fault", ["pattern", "halves", "alpha", "order", "lost", "one value"])
def test_a_fault_of_the_conversion_stops_it_and_leaves_nothing(fault, tmp_path, monkeypatch) -> None:
    write(tmp_path / "in.safetensors", flux())
    (tmp_path / "there.safetensors").write_text("the one before")
    spoiled(monkeypatch, fault)
    with pytest.raises(VerificationFailed, match=r"The written LoRA|which the source does not change"):
        checkpoints.convert(tmp_path / "in.safetensors", tmp_path / "there.safetensors", overwrite=True)
    with pytest.raises(VerificationFailed):
        checkpoints.convert(tmp_path / "in.safetensors", tmp_path / "folder")
    assert (tmp_path / "there.safetensors").read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == [
        "in.safetensors",
        "there.safetensors",
    ]


@pytest.mark.parametrize("fault", ["fuse", "alpha"])
def test_a_fault_on_the_way_to_kohyas_names_stops_it_too(fault, tmp_path, monkeypatch) -> None:
    write(tmp_path / "in.safetensors", flux())
    there = checkpoints.convert(tmp_path / "in.safetensors", tmp_path / "there.safetensors")
    if fault == "fuse":
        fuse = fusing.fuse
        monkeypatch.setattr(
            lora_converter, "fuse", lambda row, given, place: fuse(row, [given[1], given[0], *given[2:]], place)
        )
    else:
        monkeypatch.setattr(
            lora_converter,
            "_stored_number",
            lambda value, dtype, store=lora_converter._stored_number: store(value + 1, dtype),
        )
    with pytest.raises(VerificationFailed, match="The written LoRA changes"):
        checkpoints.convert(there.path, tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()


def check(path, source, changed):
    """Compare a file with a source of one layer."""
    name = "lora_unet_single_blocks_0_linear2"
    write(path, changed)
    opened = open_file(write(source, layer(name, D, 5 * D, 4, 4)))
    tensors = {"down": f"{name}.lora_down.weight", "up": f"{name}.lora_up.weight"}
    try:
        module = next(module for module in lora_modules("flux") if module.kohya == name)
        return check_lora(path, "flux", [SourceLayer(opened, module, "", tensors, 4.0)])
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": 4.001}, "differ by"),
        ({"alpha": -4}, "differ by"),
        ({"seed": 1}, "differ by"),
        ({"columns": 4 * D}, "another shape"),
        ({"name": "lora_unet_single_blocks_1_linear2"}, "does not change single_transformer_blocks.0.proj_out"),
        ({"name": "lora_unet_strange"}, "which no model has"),
    ],
)
def test_every_difference_of_a_layer_is_found(changed, message, tmp_path) -> None:
    given = {"name": "lora_unet_single_blocks_0_linear2", "rows": D, "columns": 5 * D, "rank": 4, "alpha": 4}
    with pytest.raises(VerificationFailed, match=message):
        check(tmp_path / "written.safetensors", tmp_path / "source.safetensors", layer(**{**given, **changed}))


def test_a_layer_too_many_is_found_and_the_same_product_of_other_matrices_is_not_a_difference(tmp_path) -> None:
    name, more = "lora_unet_single_blocks_0_linear2", layer("lora_unet_single_blocks_1_linear2", D, 5 * D, 4, 4, seed=9)
    with pytest.raises(VerificationFailed, match="which the source does not change"):
        check(tmp_path / "a.safetensors", tmp_path / "source.safetensors", layer(name, D, 5 * D, 4, 4) | more)
    turned = layer(name, D, 5 * D, 4, 4)
    down, up = (np.frombuffer(turned[f"{name}.lora_{side}.weight"][1], "<f4") for side in ("down", "up"))
    down, up = down.reshape(4, -1)[::-1] * np.float32(4), up.reshape(-1, 4)[:, ::-1] / np.float32(2)
    turned[f"{name}.lora_down.weight"] = turned[f"{name}.lora_down.weight"][0], np.ascontiguousarray(down).tobytes()
    turned[f"{name}.lora_up.weight"] = turned[f"{name}.lora_up.weight"][0], np.ascontiguousarray(up).tobytes()
    turned[f"{name}.alpha"] = TensorFact("F32", ()), np.float32(2).tobytes()
    found = check(tmp_path / "b.safetensors", tmp_path / "source.safetensors", turned)
    assert (found.layers, found.worst < 1e-7) == (1, True)


# ------------------------------------------------------------------------------------------------ forms of layers


def test_a_convolution_with_a_middle_matrix_is_multiplied_out(tmp_path) -> None:
    """LyCORIS' LoCon in Tucker form: diffusers and peft have two matrices for a convolution, which hold the same."""
    conv, linear = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_mid_block_attentions_0_proj_in"
    shapes = {"lora_down": (4, 8, 1, 1), "lora_mid": (4, 4, 3, 3), "lora_up": (12, 4, 1, 1)}
    tensors = values({f"{conv}.{role}.weight": shape for role, shape in shapes.items()}, "F16")
    tensors |= values({f"{linear}.lora_down.weight": (4, 8, 1, 1), f"{linear}.lora_up.weight": (8, 4, 1, 1)}, "F16", 3)
    tensors |= {f"{conv}.alpha": (TensorFact("F32", ()), np.float32(2).tobytes())}
    written = checkpoints.convert(
        write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors", verify=True
    )
    found = changes_of(written.path, "sd15")["unet", "down_blocks.0.resnets.0.conv1"]
    down, middle, up = (
        np.frombuffer(tensors[f"{conv}.{role}.weight"][1], "<f2").astype("<f8").reshape(shape)
        for role, shape in shapes.items()
    )
    wanted = 2 / 4 * np.einsum("or,rshw,si->oihw", up[:, :, 0, 0], middle, down[:, :, 0, 0]).reshape(12, -1)
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)
    with SafetensorsFile(written.path) as file:
        name = "unet.down_blocks.0.resnets.0.conv1.lora_A.weight"
        assert file.tensors[name] == TensorFact("F32", (4, 8, 3, 3)), "what was computed is not rounded unasked"
        assert file.tensors["unet.mid_block.attentions.0.proj_in.lora_A.weight"].dtype == "F16"


@pytest.mark.parametrize("axes", [(), (1, 1)])
@pytest.mark.parametrize(
    ("module", "wanted"), [("mid_block.attentions.0.proj_in", (1, 1)), ("time_embedding.linear_1", ())]
)
def test_axes_of_length_one_become_those_of_the_weight(module, wanted, axes, tmp_path) -> None:
    """Pointwise convolutions and linear layers hold the same numbers; diffusers loads the weight's own shape alone."""
    stem = f"lora_unet_{module.replace('.', '_')}"
    tensors = values({f"{stem}.lora_down.weight": (4, 8, *axes), f"{stem}.lora_up.weight": (8, 4, *axes)})
    # 768 columns: Stable Diffusion 1.x, whose proj_in is a convolution.
    tensors |= layer("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 8, 768, 4, 4)
    written = checkpoints.convert(write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors")
    with SafetensorsFile(written.path) as file:
        assert file.tensors[f"unet.{module}.lora_A.weight"].shape == (4, 8, *wanted)
        assert file.tensors[f"unet.{module}.lora_B.weight"].shape == (8, 4, *wanted)


@pytest.mark.parametrize(
    ("module", "kernel"),
    [("conv_in", ()), ("conv_in", (1, 1)), ("time_embedding.linear_1", (3, 3)), ("conv_in", (5, 5))],
)
def test_matrices_of_another_kernel_are_refused(module, kernel, tmp_path) -> None:
    stem = f"unet.{module}"
    tensors = values({f"{stem}.lora_A.weight": (4, 8, *kernel), f"{stem}.lora_B.weight": (8, 4)})
    with pytest.raises(CheckpointError, match=r"do not fit: \[4, 8.* for a (convolution of 3 x 3|linear layer)"):
        checkpoints.convert(write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors")


@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (4, 4), (4, 5, 3, 3)])
def test_a_middle_matrix_that_does_not_fit_is_refused(shape, tmp_path) -> None:
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = {"lora_down": (4, 8, 1, 1), "lora_mid": shape, "lora_up": (12, 4, 1, 1)}
    tensors = values({f"{conv}.{role}.weight": one for role, one in shapes.items()})
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoints.convert(write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("name", "rows"),
    [(f"{BLOCK}_attn_qkv", 3 * D - 1), (f"{BLOCK}_attn_qkv", 4 * D), ("lora_unet_single_blocks_0_linear1", 3 * D),
     ("lora_unet_single_blocks_0_linear1", D), ("lora_unet_final_layer_adaLN_modulation_1", 2 * D + 1)],
)  # fmt: skip
def test_rows_that_are_not_those_of_the_layers_are_refused(name, rows, tmp_path) -> None:
    source = write(tmp_path / "in.safetensors", layer(name, rows, D, 4, 4))
    with pytest.raises(CheckpointError, match=r"which is not the shape of|an odd number"):
        checkpoints.convert(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_layers_that_read_other_inputs_are_not_made_one(tmp_path) -> None:
    block = "transformer.transformer_blocks.0.attn"
    shapes = {f"{block}.to_q": D, f"{block}.to_k": 2 * D}
    tensors = values({f"{name}.lora_A.weight": (4, width) for name, width in shapes.items()})
    tensors |= values({f"{name}.lora_B.weight": (D, 4) for name in shapes})
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoints.convert(write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors")


def test_a_fused_layer_of_zeros_does_not_vanish(tmp_path) -> None:
    tensors = layer(f"{BLOCK}_attn_qkv", 3 * D, D, 4, 4)
    fact, content = tensors[f"{BLOCK}_attn_qkv.lora_up.weight"]
    tensors[f"{BLOCK}_attn_qkv.lora_up.weight"] = fact, bytes(len(content))
    written = checkpoints.convert(write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors")
    assert len(changes_of(written.path, "flux")) == 3
    assert "this LoRA has no effect" in written.notes[0]


@pytest.mark.parametrize(
    ("one", "other", "stored"), [("F16", "BF16", "F32"), ("F16", "F32", "F32"), ("F16", "F16", "F16")]
)
def test_matrices_of_two_formats_are_both_kept_exactly(one, other, stored, tmp_path) -> None:
    block = "transformer.transformer_blocks.0.attn"
    numbers = {"F16": np.float16(1.001).tobytes(), "F32": np.float32(1.001).tobytes(), "BF16": b"\x81\x3f"}
    tensors = {}
    for name, dtype in (("to_q", one), ("to_k", other)):
        for side, shape in (("A", (1, D)), ("B", (D, 1))):
            tensors[f"{block}.{name}.lora_{side}.weight"] = TensorFact(dtype, shape), numbers[dtype] * D
    written = checkpoints.convert(write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors")
    with SafetensorsFile(written.path) as file:
        assert {fact.dtype for name, fact in file.tensors.items() if name.endswith("weight")} == {stored}


def test_numbers_too_small_for_the_format_that_was_asked_for_are_said(tmp_path) -> None:
    source = write(
        tmp_path / "in.safetensors", layer("lora_unet_mid_block_attentions_0_proj_in", D, D, 4, 4, size=1e-5)
    )
    whole = checkpoints.convert(source, tmp_path / "whole.safetensors", dtype="fp32")
    assert whole.notes == ()
    small = checkpoints.convert(source, tmp_path / "small.safetensors", dtype="fp16")
    assert "Rounding to fp16 changes the effect of mid_block.attentions.0.proj_in of the U-Net by" in small.notes[0]


def test_a_text_encoder_without_attention_layers_has_names_that_diffusers_reads(tmp_path) -> None:
    """diffusers tells peft's names in a text encoder by its attention layers, and raises a ValueError without one."""
    tensors = layer("lora_te_text_model_encoder_layers_0_mlp_fc1", 4 * D, D, 4, 2)
    written = checkpoints.convert(write(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors")
    with SafetensorsFile(written.path) as file:
        path = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer"
        assert set(file.tensors) == {f"{path}.down.weight", f"{path}.up.weight"}
    back = checkpoints.convert(written.path, tmp_path / "back.safetensors")
    wanted = changes_of(write(tmp_path / "again.safetensors", tensors), "sd15")
    assert largest_difference(changes_of(back.path, "sd15"), wanted) <= 1e-6
