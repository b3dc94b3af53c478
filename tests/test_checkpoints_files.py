"""Files of every kind as input, broken and hostile ones too; inspection; dtypes without torch; the command."""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import types
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("numpy")
import numpy as np
import table_models
from fakes import broken_reads
from table_models import folder, original, read, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats import dtypes
from fastsd_helpers.checkpoints.formats.dtypes import cast, cast_dtype, count_not_finite, is_small_float
from fastsd_helpers.checkpoints.formats.half_floats import half_floats
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, TensorFact
from fastsd_helpers.checkpoints.formats.safetensors_writer import write_safetensors
from fastsd_helpers.checkpoints.formats.sources import BytesSource, read_whole
from fastsd_helpers.checkpoints.formats.tensor_plan import copied
from fastsd_helpers.checkpoints.formats.tensor_stream import stream
from fastsd_helpers.checkpoints.models import folder_conversion
from fastsd_helpers.checkpoints.models.detect import detect
from fastsd_helpers.checkpoints.models.single_file import averaged_names
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.cli import main
from fastsd_helpers.errors import CheckpointError, DiskFull, DriveReadOnly, FastSDError, ModelError, VerificationFailed

WHOLE = ("sd15", "sd15-inpaint", "sd21", "sdxl", "sdxl-inpaint", "sdxl-refiner", "flux-all-in-one")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """A single file of the SD 1.5 layout; only to be read."""
    return write(tmp_path_factory.mktemp("sd15") / "model.safetensors", original("sd15"))


def zeros(*shape, dtype="F32"):
    fact = TensorFact(dtype, shape)
    return fact, bytes(fact.bytes)


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("key", WHOLE)
def test_a_file_becomes_a_folder_and_the_same_file_again(key, place):
    one = write(place / "one.safetensors", original(key))
    made = checkpoints.convert(one, place / "folder", verify=True)
    assert made.family == key
    two = checkpoints.convert(place / "folder", place / "two.safetensors", verify=True, all_in_one=True)
    assert read(one) == read(two.path)
    assert sorted(path.name for path in place.iterdir()) == ["folder", "one.safetensors", "two.safetensors"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_folder_can_become_one_in_another_format(dtype, place):
    source = folder(place / "model", "sd15")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.json").write_text("{}")
    checkpoints.convert(source, place / "half", dtype=dtype, verify=True)
    assert (place / "half" / "tokenizer" / "vocab.json").is_file()
    direct = checkpoints.convert(source, place / "a.safetensors", dtype=dtype)
    around = checkpoints.convert(place / "half", place / "b.safetensors")
    assert read(direct.path) == read(around.path)
    with pytest.raises(CheckpointError, match="is a Diffusers folder already"):
        checkpoints.convert(source, place / "again")


def test_a_base_folder_lends_tokenizer_and_configurations(sd15, place):
    base = folder(place / "base", "sd15", seed=5)
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.json").write_text("{}")
    config = json.loads((base / "unet" / "config.json").read_text()) | {"attention_head_dim": 2}
    (base / "unet" / "config.json").write_text(json.dumps(config))
    made = checkpoints.convert(sd15, place / "folder", base=base)
    assert json.loads((place / "folder" / "unet" / "config.json").read_text())["attention_head_dim"] == 2
    assert (place / "folder" / "tokenizer" / "vocab.json").is_file()
    assert made.notes == ()
    config["block_out_channels"] = [16, 32, 64, 64]
    (base / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"base folder's U-Net has the widths \[16"):
        checkpoints.convert(sd15, place / "other", base=base)
    other = folder(place / "sdxl", "sdxl")
    with pytest.raises(CheckpointError, match="of another family"):
        checkpoints.convert(sd15, place / "other", base=other)
    assert not (place / "other").exists()


@pytest.mark.parametrize(
    ("key", "extras"),
    [
        (
            "sd21",
            (
                "cond_stage_model.model.logit_scale",
                "cond_stage_model.model.text_projection",
                "cond_stage_model.model.transformer.resblocks.23.ln_1.bias",
            ),
        ),
        ("sdxl", ("conditioner.embedders.1.model.logit_scale",)),
    ],
)
def test_what_folders_lack_is_carried_over_from_a_base_file_and_that_is_said(place, key, extras):
    source = folder(place / "model", key, "F16")
    added = {name: (TensorFact("F16", (3,)), bytes([place, 60] * 3)) for place, name in enumerate(extras)}
    base = write(place / "base.safetensors", {**original(key, "F16", seed=9), **added})
    plain = checkpoints.convert(source, place / "plain.safetensors")
    made = checkpoints.convert(source, place / "made.safetensors", base=base)
    assert not any("carried over" in note for note in plain.notes)
    assert any(note.startswith(f"{len(extras)} tensors that Diffusers folders lack") for note in made.notes)
    expected = {**read(plain.path), **{name: ("F16", (3,), values) for name, (_, values) in added.items()}}
    assert read(made.path) == expected


def test_a_rewritten_file_loses_buffers_and_keeps_what_it_says_of_itself(place):
    tensors = original("sd15")
    buffers = {
        "betas": zeros(1000),
        "alphas_cumprod": zeros(1000),
        "model_ema.decay": zeros(),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": zeros(1, 77, dtype="I64"),
    }
    said = {"modelspec.title": "My dog", "modelspec.hash_sha256": "0x12", "own": "words"}
    source = write(place / "old.safetensors", {**tensors, **buffers}, said)
    written = checkpoints.convert(source, place / "new.safetensors")
    assert read(written.path).keys() == tensors.keys()
    with SafetensorsFile(written.path) as file:
        assert (file.metadata["modelspec.title"], file.metadata["own"]) == ("My dog", "words")
        assert "modelspec.hash_sha256" not in file.metadata


def test_averaged_weights_are_taken_or_dropped_on_request(place):
    tensors = original("sd15")
    averages = {
        name: table_models.values({name: tensors[original_name][0].shape}, seed=9)[name]
        for name, original_name in averaged_names(find_family("sd15")).items()
        if original_name in tensors
    }
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    source = write(place / "full.safetensors", {**tensors, **averages})
    taken = checkpoints.convert(source, place / "ema.safetensors")
    dropped = checkpoints.convert(source, place / "last.safetensors", ema=False)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert read(taken.path)[name][2] == averages["model_ema.diffusion_modelinput_blocks00weight"][1]
    assert read(dropped.path)[name][2] == tensors[name][1]
    assert "686 EMA" in taken.notes[0]
    assert read(taken.path).keys() == read(dropped.path).keys() == tensors.keys()
    del averages["model_ema.diffusion_modelout2bias"]
    source = write(place / "half.safetensors", {**tensors, **averages})
    with pytest.raises(CheckpointError, match=r"not complete(.|\n)*--no-ema"):
        checkpoints.convert(source, place / "a.safetensors")


def test_the_other_spelling_of_the_text_encoder_is_understood_in_files_too(sd15, place):
    short = {name.replace("transformer.text_model.", "transformer."): value for name, value in original("sd15").items()}
    source = write(place / "short.safetensors", short)
    written = checkpoints.convert(source, place / "long.safetensors")
    assert read(written.path) == read(sd15)
    both = {**short, **original("sd15")}
    with pytest.raises(CheckpointError, match="uses two naming schemes for its tensors"):
        checkpoints.convert(write(place / "both.safetensors", both), place / "a.safetensors")


def test_eight_bit_weights_are_refused_or_widened_with_a_word(place):
    tensors = original("sd15")
    name = "model.diffusion_model.out.2.weight"
    tensors[name] = zeros(*tensors[name][0].shape, dtype="F8_E4M3")
    source = write(place / "small.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"1 tensors in an 8-bit format, such as 'model(.|\n)*--dtype fp16"):
        checkpoints.convert(source, place / "a.safetensors")
    written = checkpoints.convert(source, place / "a.safetensors", dtype="fp16")
    assert read(written.path)[name][0] == "F16"
    assert "upcast from 8 bits" in written.notes[0]
    tensors["model.diffusion_model.out.2.scale_weight"] = zeros()
    source = write(place / "scaled.safetensors", tensors)
    with pytest.raises(CheckpointError, match="scaled 8-bit weights"):
        checkpoints.convert(source, place / "b.safetensors", dtype="fp16")


# ------------------------------------------------------------------------------------------------ dtypes


def every_half():
    """All fp32 values near every fp16 and bf16 step: the steps, their middles, and one digit beside them."""
    steps = np.concatenate([np.arange(0, 0x10000, dtype="<u4") << 16, _fp16_steps()])
    around = [steps, steps + 1, steps - 1, steps + 0x8000, steps + 0x7FFF, steps + 0x8001, steps + 0x1000]
    return np.concatenate([*around, steps + 0x0FFF, steps + 0x1001]).astype("<u4")


def _fp16_steps():
    return np.arange(0, 0x10000, dtype="<u2").view("<f2").astype("<f4").view("<u4")


@pytest.fixture(params=["OpenCV's instructions", "ours"])
def with_and_without_opencv(request, monkeypatch):
    if request.param == "ours":
        monkeypatch.setattr(dtypes, "half_floats", lambda: None)
    else:
        pytest.importorskip("cv2")
        assert half_floats() is not None


@pytest.mark.numeric
@pytest.mark.usefixtures("with_and_without_opencv")
@pytest.mark.parametrize(("wanted", "theirs"), [("BF16", "bfloat16"), ("F16", "float16")])
def test_rounding_is_torchs_bit_for_bit(wanted, theirs):
    torch = pytest.importorskip("torch")
    bits = every_half()
    random_bits = np.random.default_rng(1).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype("<u4")
    bits = np.concatenate([bits, random_bits, np.array([0x7F800001, 0xFFC12345, 0x7FFFFFFF, 1, 0x80000001], "<u4")])
    expected = torch.from_numpy(bits.view("<f4").copy()).to(getattr(torch, theirs)).view(torch.int16).numpy()
    infinite = 0x7F80 if wanted == "BF16" else 0x7C00
    # What overflows is refused by us, and infinite for torch.
    fits = np.isinf(bits.view("<f4")) | ~np.isin(expected.view("<u2") & 0x7FFF, (0x7F80, 0x7C00))
    fits &= (expected.view("<u2") & 0x7FFF) != infinite
    fits |= np.isinf(bits.view("<f4"))
    ordinary = fits & np.isfinite(bits.view("<f4"))  # without the others these are rounded in another way
    for chosen in (fits, ordinary):
        ours = np.asarray(cast(bits[chosen].tobytes(), "F32", wanted, owner=str))
        theirs_there = expected.view("<u2")[chosen]
        # torch's bits of a bf16 that is no number are 0xFFFF where it has AVX2, and 0x7FC0 elsewhere.
        no_number = ((ours & 0x7FFF) > infinite) & ((theirs_there & 0x7FFF) > infinite)
        assert np.array_equal(ours[~no_number], theirs_there[~no_number])
        assert np.array_equal(no_number, np.isnan(bits[chosen].view("<f4")))
        assert chosen.sum() > 500_000
    assert not ordinary[fits].all()
    out = bytearray(2 * ordinary.sum() + 100)
    cast(bits[ordinary].tobytes(), "F32", wanted, owner=str, out=out)
    assert out[:-100] == expected.view("<u2")[ordinary].tobytes()
    assert out[-100:] == bytes(100)


@pytest.mark.numeric
@pytest.mark.usefixtures("with_and_without_opencv")
@pytest.mark.parametrize(("stored", "theirs"), [("F16", "float16"), ("BF16", "bfloat16")])
def test_widening_is_torchs_bit_for_bit(stored, theirs):
    torch = pytest.importorskip("torch")
    bits = np.arange(0, 0x10000, dtype="<u2")
    wide = torch.from_numpy(bits.view("<i2").copy()).view(getattr(torch, theirs)).float().numpy()
    ours = np.asarray(cast(bits.tobytes(), stored, "F32", owner=str))
    known = ~np.isnan(wide)
    assert np.array_equal(ours.view("<u4")[known], wide.view("<u4")[known])
    assert np.array_equal(np.isnan(ours), np.isnan(wide))
    ours = np.asarray(cast(bits[known].tobytes() * 2, stored, "F32", owner=str))  # without the others: another way
    assert np.array_equal(ours.view("<u4"), np.tile(wide.view("<u4")[known], 2))


def test_an_opencv_that_is_missing_or_rounds_differently_is_not_taken(monkeypatch):
    def as_numpy(wide, dst):
        dst[:] = wide.astype("<f2").view("<i2") if dst.dtype == "<i2" else wide.view("<f2").astype("<f4")

    def rounded_down(wide, dst):
        as_numpy(np.nextafter(wide, np.float32(0)) if dst.dtype == "<i2" else wide, dst)

    found = {}
    for name, opencv in {
        "missing": None,
        "without either": types.SimpleNamespace(),
        "rounds down": types.SimpleNamespace(convertFp16=rounded_down),
        "right": types.SimpleNamespace(convertFp16=as_numpy),
    }.items():
        monkeypatch.setitem(sys.modules, "cv2", opencv)
        found[name] = half_floats.__wrapped__() is not None
    assert found == {"missing": False, "without either": False, "rounds down": False, "right": True}


@pytest.mark.numeric
@pytest.mark.parametrize(("stored", "theirs"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")])
def test_eight_bit_values_are_torchs(stored, theirs):
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype="u1")
    wide = torch.from_numpy(codes.copy()).view(getattr(torch, theirs)).float().numpy()
    ours = np.asarray(cast(codes.tobytes(), stored, "F32", owner=str))
    assert np.array_equal(ours, wide, equal_nan=True)
    assert count_not_finite(codes.tobytes(), stored) == (~np.isfinite(wide)).sum()


@pytest.mark.parametrize("count", [1, 1 << 17])
@pytest.mark.parametrize(("wanted", "limit", "beyond"), [("F16", 65519.0, 65520.0), ("BF16", 3.38e38, 3.4e38)])
def test_a_value_that_would_become_infinite_stops_with_its_size(wanted, limit, beyond, count):
    cast(np.array([limit, -np.inf, np.nan] * count, "<f4").tobytes(), "F32", wanted, owner=str)
    with pytest.raises(CheckpointError, match=r"The tensor 'a' reaches (6\.55e\+04|3\.4e\+38)"):
        cast(np.array([1, -beyond, np.nan] * count, "<f4").tobytes(), "F32", wanted, owner=lambda: "The tensor 'a'")
    with pytest.raises(CheckpointError, match="reaches"):
        cast(np.array([1e300], "<f8").tobytes(), "F64", wanted, owner=str)


# Below and from the size at which a piece is handed to OpenCV, and of more than one block of ours.
SIZES = (1, 1000, (1 << 16) - 1, 1 << 16, (1 << 18) + 1)


@pytest.mark.usefixtures("with_and_without_opencv")
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("stored", ["F32", "F64"])
@pytest.mark.parametrize(("wanted", "beyond"), [("F16", 65520.0), ("BF16", 3.4e38)])
def test_one_value_too_large_among_ordinary_ones_is_refused_wherever_it_stands(wanted, beyond, stored, count):
    ordinary = np.linspace(-2, 2, count).astype("<f4" if stored == "F32" else "<f8")
    cast(ordinary.tobytes(), stored, wanted, owner=str)
    for place in {0, count // 2, count - 1}:
        for value in (beyond, -beyond):
            values = ordinary.copy()
            values[place] = value
            with pytest.raises(CheckpointError, match=r"The tensor 'a' reaches "):
                cast(values.tobytes(), stored, wanted, owner=lambda: "The tensor 'a'")


@pytest.mark.usefixtures("with_and_without_opencv")
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("stored", ["F64", "F32", "F16"])
def test_what_was_infinite_or_no_number_before_stays_so_and_changes_nothing_else(stored, count):
    torch = pytest.importorskip("torch")
    for strange in (np.inf, -np.inf, np.nan):
        values = np.linspace(-2, 2, count).astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[stored])
        values[count // 2] = strange
        assert count_not_finite(values.tobytes(), stored) == 1
        for wanted, theirs in (("F16", "float16"), ("BF16", "bfloat16"), ("F32", "float32")):
            expected = torch.from_numpy(values).to(getattr(torch, theirs))
            made = bytearray(memoryview(cast(values.tobytes(), stored, wanted, owner=str)))
            found = torch.frombuffer(made, dtype=expected.dtype)
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5)), (wanted, strange)


@pytest.mark.parametrize(
    ("stored", "theirs", "layout"),
    [("F8_E4M3", "float8_e4m3fn", "u1"), ("F8_E5M2", "float8_e5m2", "u1"), ("F16", "float16", "<u2"),
     ("BF16", "bfloat16", "<u2")],
)  # fmt: skip
def test_of_every_code_of_a_format_those_that_are_no_finite_numbers_are_counted(stored, theirs, layout):
    torch = pytest.importorskip("torch")
    codes = np.arange(1 << (8 * np.dtype(layout).itemsize), dtype=layout)
    finite = torch.frombuffer(bytearray(codes.tobytes()), dtype=getattr(torch, theirs)).float().isfinite()
    assert count_not_finite(codes.tobytes(), stored) == int((~finite).sum()) > 0
    assert count_not_finite(codes[finite.numpy()].tobytes(), stored) == 0
    for code in codes[~finite.numpy()][:: 1 if layout == "u1" else 97]:
        assert count_not_finite(code.tobytes(), stored) == 1
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        cast(codes.tobytes(), stored, "F32", owner=str, finite=True)
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        cast(codes.tobytes(), stored, stored, owner=str, finite=True)
    ordinary = codes[finite.numpy()].tobytes()
    assert cast(ordinary, stored, stored, owner=str, finite=True) is ordinary
    assert cast(codes, stored, stored, owner=str) is codes
    assert count_not_finite(np.full(9, -1, "<i8").tobytes(), "I64") == 0


def test_only_fractions_get_another_format():
    for stored in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"):
        assert [cast_dtype(stored, wanted) for wanted in ("keep", "fp32", "fp16", "bf16")] == [
            stored,
            "F32",
            "F16",
            "BF16",
        ]
        assert is_small_float(stored) is stored.startswith("F8")
    for stored in ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"):
        assert {cast_dtype(stored, wanted) for wanted in ("keep", "fp32", "fp16", "bf16")} == {stored}
    with pytest.raises(CheckpointError, match="no dtype 'fp8'") as caught:
        cast_dtype("I64", "fp8")
    assert caught.value.hint == "Choose keep, fp32, fp16, bf16."


@pytest.mark.parametrize(
    ("wanted", "said"),
    [("F16", "float16 ends at 6.55e+04"), ("BF16", "bfloat16 ends at 3.39e+38"), ("F32", "float32 ends at 3.4e+38")],
)
def test_a_value_too_large_is_told_with_the_largest_there_is_and_what_would_hold_it(wanted, said):
    values = np.array([1.0, -1e300, np.inf, np.nan], "<f8")
    with pytest.raises(CheckpointError) as caught:
        cast(values.tobytes(), "F64", wanted, owner=lambda: "The tensor 'a'")
    assert caught.value.problem == f"The tensor 'a' reaches 1e+300; {said}."
    assert caught.value.hint == ("Choose keep." if wanted == "F32" else "Choose fp32.")


@pytest.mark.usefixtures("with_and_without_opencv")
@pytest.mark.parametrize("wanted", ["F16", "BF16"])
def test_a_buffer_that_is_handed_in_is_filled_and_no_further(wanted):
    values = np.linspace(-3, 3, (1 << 16) + 7).astype("<f4")
    fresh = np.asarray(cast(values.tobytes(), "F32", wanted, owner=str)).view("<u2")
    out = np.full(values.size + 5, 0xABCD, "<u2")
    made = cast(values.tobytes(), "F32", wanted, owner=str, out=out)
    assert np.array_equal(np.asarray(made).view("<u2"), fresh)
    assert np.array_equal(out[: values.size], fresh)
    assert (out[values.size :] == 0xABCD).all()


@pytest.mark.usefixtures("with_and_without_opencv")
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(("wanted", "theirs"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_values_of_64_bits_become_torchs(wanted, theirs, count):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(5).standard_normal(count) * np.logspace(-6, 3, count)
    values[0] = 1 + 2.0**-11 + 2.0**-40  # beside a tie of fp16, which its rounding to fp32 makes one
    made = bytearray(memoryview(cast(values.tobytes(), "F64", wanted, owner=str)))
    expected = torch.from_numpy(values).to(torch.float32).to(getattr(torch, theirs))
    assert torch.equal(torch.frombuffer(made, dtype=expected.dtype), expected)


# ------------------------------------------------------------------------------------------------ in pieces


@pytest.fixture
def large():
    """Two tensors of many pieces and one that is small, between them."""
    values = np.random.default_rng(2).standard_normal(12_000_000).astype("<f4")
    cut = {"a": values[:5_000_001], "b": values[5_000_001:5_000_100], "c": values[5_000_100:]}
    return BytesSource({name: (TensorFact("F32", part.shape), part.tobytes()) for name, part in cut.items()}), values


@pytest.mark.parametrize(("dtype", "layout"), [("keep", "<f4"), ("fp16", "<f2")])
def test_pieces_come_in_order_and_are_stored_at_their_place(large, dtype, layout):
    source, values = large
    stored, given, ends = bytearray(len(values) * np.dtype(layout).itemsize), bytearray(), []

    def store(place, buffer):
        stored[place : place + len(buffer)] = buffer

    for name, buffer, last in stream(((name, copied(source, name, dtype)) for name in source.tensors), store=store):
        given += buffer
        ends += [name] if last else []
    assert ends == ["a", "b", "c"]
    assert given == stored == values.astype(layout).tobytes()


def test_a_large_file_has_the_hash_that_is_told(large, place):
    source, _values = large
    recipes = {name: copied(source, name, "fp16") for name in source.tensors}
    sha256, size = write_safetensors(place / "a.safetensors", recipes, metadata={}, read_back=False)
    content = (place / "a.safetensors").read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (sha256, size)


def test_a_disk_that_fills_up_within_a_large_tensor_leaves_nothing(large, place):
    source, _values = large
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000_000, limits[1]))
    try:
        with pytest.raises(DiskFull):
            write_safetensors(place / "a.safetensors", {"a": copied(source, "a")}, metadata={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(place.iterdir()) == []


# ------------------------------------------------------------------------------------------------ bad input


def refused(source, place, match, **options):
    with pytest.raises(FastSDError, match=match) as caught:
        checkpoints.convert(source, place / "refused.safetensors", **options)
    assert caught.value.hint
    assert not (place / "refused.safetensors").exists()
    assert not list(place.glob(".*"))


LORA_NAME = "lora_unet_down_blocks_0_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"control_model.input_hint_block.0.weight": zeros(2)}, "is a ControlNet(.|\n)*ControlNets"),
        ({"controlnet_cond_embedding.conv_in.weight": zeros(2)}, "is a ControlNet"),
        ({"emb_params": zeros(2, 768)}, "a textual inversion embedding"),
        ({"lora_unet_x.hada_w1_a": zeros(2, 2)}, "LyCORIS(.|\n)*merge"),
        ({"down_blocks.0.resnets.0.conv1.weight": zeros(2)}, "U-Net of a Diffusers folder(.|\n)*model_index"),
        ({"input_blocks.0.0.weight": zeros(2)}, "a U-Net alone"),
        ({"model.diffusion_model.input_blocks.0.0.weight": zeros(2, 4, 3, 3)}, "without its text encoder"),
        ({"something": zeros(2)}, "not a known model"),
        ({}, "holds no tensors"),
    ],
)
def test_what_is_no_model_is_named(tensors, message, place):
    refused(write(place / "in.safetensors", tensors), place, message)


def test_a_vae_given_as_a_model_stays_a_vae(place):
    source = write(place / "vae.safetensors", original("vae"))
    assert checkpoints.convert(source, place / "out", verify=True).family == "vae"
    refused(source, place, "a VAE of Stable Diffusion, not of the family 'flux'", family="flux")


def test_a_wrong_family_by_force_is_refused(sd15, place):
    refused(sd15, place, "Stable Diffusion 1.x file, not of the family 'sdxl'", family="sdxl")
    refused(sd15, place, "no checkpoint layout for the model family 'sd99'", family="sd99")
    refused(folder(place / "model", "sd15"), place, "is a sd15 model, not sdxl", family="sdxl")


@pytest.mark.parametrize("extra", ["model.diffusion_model.strange.weight", "down_blocks.0.resnets.0.conv1.weight"])
def test_an_unknown_tensor_or_a_second_layout_stops_with_its_name(extra, place):
    source = write(place / "in.safetensors", {**original("sd15"), extra: zeros(3)})
    refused(source, place, f"has a tensor {extra!r} that SD 1.5 does not have")


def test_a_missing_tensor_and_a_wrong_shape_are_named(place):
    tensors = original("sd15")
    name = "first_stage_model.decoder.conv_out.bias"
    source = write(place / "a.safetensors", {key: value for key, value in tensors.items() if key != name})
    refused(source, place, f"VAE lacks the tensor {name!r}")
    source = write(place / "b.safetensors", {**tensors, name: zeros(4)})
    refused(source, place, r"conv_out\.bias' has the shape \[4\]")


@pytest.mark.parametrize("kind", ["cut", "empty", "text"])
def test_a_file_that_is_not_whole_is_refused(kind, sd15, place):
    content = {"cut": sd15.read_bytes()[:-1], "empty": b"", "text": b"version https://git-lfs"}[kind]
    (place / "in.safetensors").write_bytes(content)
    said = "is a text file, not a model" if kind == "text" else "not a complete safetensors file"
    refused(place / "in.safetensors", place, said)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.pt", r"models are not written as \.pt"),
        ("out.GGUF", r"models are not written as \.GGUF"),
        ("a" * 300 + ".safetensors", r"cannot be a name: File name too long"),
    ],
)
def test_names_that_nothing_can_be_written_to_are_refused(name, message, sd15, place):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.convert(sd15, place / name)
    assert not list(place.iterdir())


def test_what_is_no_file_and_no_plain_weights_is_named(place):
    os.mkfifo(place / "pipe.safetensors")  # opened, it would be waited for
    (place / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    for look in (checkpoints.inspect, lambda path: checkpoints.convert(path, place / "out.safetensors")):
        with pytest.raises(CheckpointError, match=r"is not a file|neither a file nor a folder"):
            look(place / "pipe.safetensors")
        with pytest.raises(CheckpointError, match="is a GGUF file"):
            look(place / "model.gguf")


def test_folders_that_are_no_model_are_refused(place):
    (place / "empty").mkdir()
    with pytest.raises(ModelError):
        checkpoints.convert(place / "empty", place / "a.safetensors")
    model = folder(place / "model", "sd15")
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, place, "weights in unet/ missing")


def test_an_adapter_that_was_not_merged_is_refused(place):
    model = folder(place / "model", "sd15")
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    with SafetensorsFile(path) as file:
        tensors = {name: (fact, bytes(read_whole(file, name))) for name, fact in file.tensors.items()}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
    write(path, tensors)
    refused(model, place, r"base_layer\.weight' that SD 1\.5 does not have(.|\n)*merge LoRA")


def test_source_and_destination_must_differ(sd15, place):
    model = folder(place / "model", "sd15")
    with pytest.raises(CheckpointError, match="both source and destination"):
        checkpoints.convert(sd15, sd15, overwrite=True)
    inside = model / "unet" / "diffusion_pytorch_model.safetensors"
    before = inside.read_bytes()
    with pytest.raises(CheckpointError, match="one of the files the model is read from"):
        checkpoints.convert(model, inside, overwrite=True)
    (place / "link.safetensors").symlink_to(sd15)
    with pytest.raises(CheckpointError, match="both source and destination"):
        checkpoints.convert(sd15, place / "link.safetensors", overwrite=True)
    assert inside.read_bytes() == before


def test_a_folder_with_other_things_in_it_is_never_replaced(sd15, place):
    (place / "home").mkdir()
    (place / "home" / "letters.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="contains something other than a model"):
        checkpoints.convert(sd15, place / "home", overwrite=True)
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoints.convert(sd15, place / "home")
    assert (place / "home" / "letters.txt").read_text() == "precious"
    checkpoints.convert(sd15, place / "model")
    (place / "model" / "old.txt").write_text("from before")
    checkpoints.convert(sd15, place / "model", overwrite=True)
    assert not (place / "model" / "old.txt").exists()
    (place / "file").write_text("a file")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoints.convert(sd15, place / "file", overwrite=True)


def test_a_full_disk_leaves_no_half_folder(sd15, place, monkeypatch):
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda _folder: 1000)
    with pytest.raises(DiskFull, match="are needed for the file"):
        checkpoints.convert(sd15, place / "out")
    with pytest.raises(DiskFull):
        checkpoints.convert(sd15, place / "a.ckpt")
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for name in ("out", "a.safetensors", "a.ckpt"):
            with pytest.raises(DiskFull):
                checkpoints.convert(sd15, place / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(place.iterdir()) == []


def test_a_read_only_disk_is_named(sd15, place, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DriveReadOnly):
        checkpoints.convert(sd15, place / "out")


def test_a_file_that_shrinks_while_it_is_read_leaves_nothing_behind(place, monkeypatch):
    source = write(place / "in.safetensors", original("sd15"))
    real = folder_conversion.write_recipes

    def cut_then_write(*args, **kwargs):
        os.truncate(source, source.stat().st_size // 2)
        return real(*args, **kwargs)

    monkeypatch.setattr(folder_conversion, "write_recipes", cut_then_write)
    with pytest.raises(CheckpointError, match="it ends inside the tensor"):
        checkpoints.convert(source, place / "out.safetensors")
    assert [path.name for path in place.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize("name", ["out.safetensors", "out.ckpt", "folder"])
def test_a_disk_that_fails_while_a_tensor_is_read_is_named_and_nothing_is_left(place, name, code):
    source = write(place / "in.safetensors", original("sd15"))
    told = pytest.raises(CheckpointError, match=r"^in\.safetensors cannot be read at the tensor '.+': ")
    with broken_reads(source, after_bytes=source.stat().st_size // 2, code=code), told as caught:
        checkpoints.convert(source, place / name, dtype="fp16")
    assert os.strerror(code) in caught.value.problem
    assert [path.name for path in place.iterdir()] == ["in.safetensors"]


def test_a_part_of_a_folder_that_cannot_be_read_is_named(place):
    source = folder(place / "model", "sd15")
    broken = source / "vae" / "diffusion_pytorch_model.safetensors"
    with broken_reads(broken), pytest.raises(CheckpointError, match="cannot be read at the tensor 'decoder"):
        checkpoints.convert(source, place / "out.safetensors", dtype="fp16")
    assert [path.name for path in place.iterdir()] == ["model"]


SLOW = """
import sys, time
from fastsd_helpers.checkpoints.formats import safetensors_writer, tensor_stream
from fastsd_helpers.cli import main
real = tensor_stream.stream
def slowly(*args, **kwargs):
    for item in real(*args, **kwargs):
        time.sleep(0.02)
        yield item
safetensors_writer.stream = slowly
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("name", ["out.safetensors", "folder"])
def test_ctrl_c_in_the_middle_leaves_nothing_and_ends_with_130(name, sd15, place):
    before = sd15.read_bytes()
    started = subprocess.Popen([sys.executable, "-c", SLOW, str(sd15), str(place / name)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(place.glob(".*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(place.glob(".*")), "nothing was being written"
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130, said
    assert b"Traceback" not in said
    assert list(place.iterdir()) == []
    assert sd15.read_bytes() == before


def test_a_changed_byte_on_the_disk_is_found_by_verify(sd15, place, monkeypatch):
    real = folder_conversion.write_recipes

    def write_then_rot(dst, *args, **kwargs):
        result = real(dst, *args, **kwargs)
        with dst.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        return result

    monkeypatch.setattr(folder_conversion, "write_recipes", write_then_rot)
    with pytest.raises(VerificationFailed, match="differs from the source's"):
        checkpoints.convert(sd15, place / "a.safetensors", verify=True)


# ------------------------------------------------------------------------------------------------ hostile headers


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", 99_000_000) + b" " * 100,
        with_header({"a": {**ENTRY, "data_offsets": [-4, 0]}}, bytes(4)),
        with_header({"a": {**ENTRY, "data_offsets": [0, 1 << 70]}}, bytes(4)),
        with_header({"a": {**ENTRY, "shape": [-1]}}, bytes(4)),
        with_header({"a": {**ENTRY, "shape": [1 << 40, 1 << 40, 0]}}, bytes(4)),
        with_header({"a": {**ENTRY, "shape": [1] * 1000}}, bytes(4)),
        with_header({"a": {**ENTRY, "shape": [True]}}, bytes(4)),
        with_header({"a": {**ENTRY, "shape": "1"}}, bytes(4)),
        with_header({"a": {**ENTRY, "shape": [1.0]}}, bytes(4)),
        with_header({"a": ENTRY, "b": {**ENTRY, "data_offsets": [2, 6]}}, bytes(6)),
        with_header({"a": ENTRY, "b": ENTRY}, bytes(4)),
        with_header({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 12]}}, bytes(12)),
        with_header({"a": ENTRY}, bytes(5)),
        with_header(b'{"a":' + json.dumps(ENTRY).encode() + b',"a":' + json.dumps(ENTRY).encode() + b"}", bytes(4)),
        with_header({"__metadata__": {"a": 1}, "a": ENTRY}, bytes(4)),
        with_header({"__metadata__": [1], "a": ENTRY}, bytes(4)),
        with_header({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
        with_header({"a": [1, 2, 3]}, bytes(4)),
        with_header(b"[" * 200_000),
        with_header(b'{"a": NaN}'),
        with_header(b"\xff\xfe{}"),
        with_header(b"not json"),
        with_header({"a": {**ENTRY, "data_offsets": [0, 4, 8]}}, bytes(4)),
        with_header({"a": {**ENTRY, "data_offsets": ["0", "4"]}}, bytes(4)),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(content, place):
    (place / "in.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"in\.safetensors is not a complete safetensors file"):
        checkpoints.inspect(place / "in.safetensors")


def fuzzed(seed):
    """A safetensors file with something wrong, or right, in its header."""
    chance = random.Random(seed)
    numbers = (0, 1, 4, 8, -1, 3, 1 << 31, 1 << 32, 1 << 62, 1 << 64, -(1 << 63), 1.5, "4", None, True, [], {})
    entries = {}
    for place in range(chance.randrange(4)):
        name = chance.choice(["a", "", "model.diffusion_model.x", "é\u0000", "a" * 5000, str(place)])
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [4 * place, 4 * place + 4]}
        for key in list(entry):
            if chance.random() < 0.3:
                entry[key] = chance.choice([chance.choice(numbers), [chance.choice(numbers) for _ in range(3)], "F99"])
        entries[name] = chance.choice([entry, entry, entry, chance.choice(numbers)])
    if chance.random() < 0.3:
        entries["__metadata__"] = chance.choice([{"a": "b"}, {"a": 1}, [], 3])
    text = bytearray(json.dumps(entries).encode())
    for _ in range(chance.choice([0, 0, 1, 5])):
        if text:
            text[chance.randrange(len(text))] = chance.randrange(256)
    length = chance.choice([len(text)] * 6 + [0, 1, len(text) - 1, len(text) + 1, 1 << 32, 1 << 63, (1 << 64) - 1])
    return struct.pack("<Q", length % (1 << 64)) + bytes(text) + bytes(chance.randrange(20))


def fuzzed_pickle(seed, whole):
    """A .ckpt with bytes changed, cut, or moved."""
    chance = random.Random(seed)
    content = bytearray(whole)
    for _ in range(chance.choice([1, 3, 20])):
        content[chance.randrange(len(content))] = chance.randrange(256)
    if chance.random() < 0.3:
        del content[chance.randrange(len(content)) :]
    if chance.random() < 0.1:
        content = bytearray(chance.randbytes(chance.randrange(300)))
    return bytes(content)


def inspect_all(names, contents, place):
    """Look at every file; returns how many were refused. Anything but a CheckpointError is a failure."""
    tracemalloc.start()
    count = 0
    for name, content in zip(names, contents, strict=True):
        path = place / name
        path.write_bytes(content)
        started = time.process_time()
        try:
            checkpoints.inspect(path, scan=True)
        except CheckpointError:
            count += 1
        assert time.process_time() - started < 20
        path.unlink()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000_000
    return count


def test_500_fuzzed_headers_crash_hang_and_allocate_nothing(place):
    contents = [fuzzed(seed) for seed in range(500)]
    assert 300 < inspect_all([f"{seed}.safetensors" for seed in range(500)], contents, place) < 500


def harmless(place):
    tensors = {"model.diffusion_model.a": zeros(3), "b": zeros(2, 2, dtype="F16")}
    source = write(place / "source.safetensors", tensors)
    from fastsd_helpers.checkpoints.formats.ckpt_writer import write_ckpt
    from fastsd_helpers.checkpoints.formats.sources import open_file
    from fastsd_helpers.checkpoints.formats.tensor_plan import copied

    opened = open_file(source)
    write_ckpt(place / "whole.ckpt", {name: copied(opened, name) for name in tensors})
    opened.close()
    return (place / "whole.ckpt").read_bytes()


def test_500_fuzzed_pickles_crash_hang_and_run_nothing(place):
    pytest.importorskip("torch")
    whole = harmless(place)
    contents = [fuzzed_pickle(seed, whole) for seed in range(500)]
    assert inspect_all([f"{seed}.ckpt" for seed in range(500)], contents, place) > 100


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def zipped(place, **members):
    with zipfile.ZipFile(place, "w", members.pop("compression", zipfile.ZIP_STORED)) as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", content)
    return place


def test_a_pickle_with_code_is_refused_before_anything_runs(place):
    program = pickle.dumps({"state_dict": Harmful()}, protocol=2)
    path = zipped(place / "bad.ckpt", data_pkl=program, version="3")
    with pytest.raises(CheckpointError, match=r"it names '\w+\.mkdir', which is code and no tensor"):
        checkpoints.convert(path, place / "a.safetensors")
    path = zipped(place / "bomb.ckpt", data_pkl=b"\x00" * 50_000_000, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        checkpoints.inspect(path)
    assert "torch" not in vars(sys.modules["fastsd_helpers.checkpoints.formats.pickled"])
    assert not Path("ran").exists()


# ------------------------------------------------------------------------------------------------ .ckpt


def test_a_ckpt_has_only_what_the_safe_loader_of_a1111_allows_and_torch_reads_it(sd15, place):
    torch = pytest.importorskip("torch")
    written = checkpoints.convert(sd15, place / "a.ckpt", verify=True)
    with zipfile.ZipFile(written.path) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
    # The pattern of AUTOMATIC1111's modules/safe.py.
    import re

    assert all(re.fullmatch(r"([^/]+)/((data/\d+)|version|(data\.pkl))", name) for name in names)
    loaded = torch.load(written.path, weights_only=True, mmap=True)["state_dict"]
    wanted = read(sd15)
    assert loaded.keys() == wanted.keys()
    for name, (_dtype, shape, content) in wanted.items():
        assert tuple(loaded[name].shape) == shape
        assert loaded[name].numpy().tobytes() == content
        assert loaded[name].is_contiguous()
    back = checkpoints.convert(written.path, place / "b.safetensors", verify=True)
    assert read(back.path) == wanted


# ------------------------------------------------------------------------------------------------ inspect


SD15_TEXT = "cond_stage_model.transformer.text_model."


def test_inspect_says_what_a_file_is(sd15):
    found = checkpoints.inspect(sd15, scan=True)
    sha256 = hashlib.sha256(sd15.read_bytes()).hexdigest()
    assert (found.sha256, found.short_hash) == (sha256, sha256[:10])
    assert (found.family, found.kind, found.format, found.prediction) == (
        "sd15",
        "checkpoint",
        "safetensors",
        "epsilon",
    )
    assert found.parts.keys() == {"U-Net", "VAE", "text encoder"}
    assert sum(found.parts.values()) == found.dtypes["F32"]
    assert (found.missing, found.unexpected, found.problems, found.not_finite) == ((), (), (), {})
    assert checkpoints.inspect(sd15, hashes=False).sha256 is None


@pytest.mark.parametrize(
    ("key", "change", "problem"),
    [
        ("sd15", {"betas": zeros(3), "alphas_cumprod": zeros(3, dtype="F16")}, "noise schedule"),
        ("sd15", {"strange": zeros(1)}, "1 tensors are not of this layout, such as 'strange'"),
        (
            "sd15",
            {"cond_stage_model.transformer.text_model.embeddings.position_ids": zeros(7, dtype="F16")},
            "floats",
        ),
        ("sd15", {"first_stage_model.decoder.conv_out.bias": zeros(5)}, r"shape \[5\]"),
        ("sd15", {"first_stage_model.decoder.conv_out.bias": None}, "1 VAE tensors are missing"),
        ("sdxl", {"conditioner.embedders.1.model.text_projection.weight": zeros(24, 24)}, "untransposed"),
        ("sd15", {"model.diffusion_model.out.2.bias": zeros(4, dtype="F8_E5M2")}, "8-bit"),
    ],
)
def test_inspect_names_what_is_wrong_and_what_it_does(key, change, problem, place):
    tensors = {**original(key), **change}
    path = write(place / "in.safetensors", {name: value for name, value in tensors.items() if value is not None})
    found = checkpoints.inspect(path, hashes=False)
    import re

    assert any(re.search(problem, f"{item.what}: {item.effect}") for item in found.problems), found.problems


def test_inspect_counts_values_that_are_no_numbers(place):
    tensors = original("vae")
    bad = np.array([1, np.nan, np.inf], "<f4")
    tensors["decoder.conv_out.bias"] = TensorFact("F32", (3,)), bad.tobytes()
    found = checkpoints.inspect(write(place / "in.safetensors", tensors), scan=True)
    assert found.not_finite == {"decoder.conv_out.bias": 2}
    assert "black" in found.problems[-1].effect


@pytest.mark.parametrize(
    ("beside", "metadata", "marks", "kind", "known"),
    [
        ('parameterization: "v"', {}, (), "v_prediction", "in.yaml"),
        ("parameterization: eps", {}, (), "epsilon", "in.yaml"),
        (None, {"modelspec.prediction_type": "v"}, (), "v_prediction", "ModelSpec"),
        (None, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v_prediction", "ModelSpec"),
        (None, {}, ("v_pred",), "v_prediction", "'v_pred'"),
        (None, {}, (), None, "does not say"),
    ],
)
def test_inspect_finds_the_prediction_type_where_it_is_written(beside, metadata, marks, kind, known, place):
    tensors = {**original("sd21"), **{mark: zeros(0) for mark in marks}}
    path = write(place / "in.safetensors", tensors, metadata)
    if beside:
        path.with_suffix(".yaml").write_text(f"model:\n  params:\n    {beside}\n")
    found = checkpoints.inspect(path, hashes=False)
    assert found.prediction == kind
    assert known in found.prediction_source
    assert bool(found.problems) == (kind is None)


@pytest.mark.parametrize(("key", "words"), [("clip-l", "12 layers"), ("clip-g", "32"), ("t5", "T5"), ("flux", "Flux")])
def test_parts_are_recognised(key, words):
    kind = detect({name: fact for name, (fact, _values) in original(key).items()})
    assert (kind.family, words in kind.words) == (key, True)


# ------------------------------------------------------------------------------------------------ the command


def test_the_commands_answer_in_json(sd15, place, capsys):
    assert main(["convert", str(sd15), str(place / "a.safetensors"), "--dtype", "fp16", "--verify", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["path"] == str(place / "a.safetensors")
    assert said["verified"] is True
    assert main(["inspect", said["path"], "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["sha256"], found["problems"]) == (said["sha256"], [])
    assert main(["inspect", said["path"], "--scan"]) == 0
    assert "No problems found." in capsys.readouterr().out
    assert main(["convert", str(sd15), said["path"]]) == 2
    assert "exists already" in capsys.readouterr().err
    (place / "broken.safetensors").write_bytes(b"12345678")
    assert main(["inspect", str(place / "broken.safetensors")]) == 2
    assert main(["convert", str(sd15), str(place / "b"), "--dtype", "int4"]) == 2


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_without_hashes_the_file_is_the_same_and_verifying_hashes_all_the_same(sd15, place, ending, capsys):
    hashed = checkpoints.convert(sd15, place / f"a{ending}", dtype="fp16")
    assert hashed.sha256 == hashlib.sha256(hashed.path.read_bytes()).hexdigest()
    assert main(["convert", str(sd15), str(place / f"b{ending}"), "--dtype", "fp16"]) == 0
    assert "  sha256" not in capsys.readouterr().out
    assert main(["convert", str(sd15), str(place / f"e{ending}"), "--hashes"]) == 0
    assert (
        f"  sha256     {hashlib.sha256((place / f'e{ending}').read_bytes()).hexdigest()}\n" in capsys.readouterr().out
    )
    files = [(place / f"{name}{ending}").read_bytes() for name in "ab"]
    start = -sum(fact.bytes for fact in SafetensorsFile(sd15).tensors.values()) // 2 if ending != ".ckpt" else 0
    assert files[0][start:] == files[1][start:]  # headers name the file and the second
    again = checkpoints.convert(sd15, place / f"c{ending}", dtype="fp16", hashes=False)
    assert (again.sha256, again.bytes) == ("", (place / f"c{ending}").stat().st_size)
    if ending == ".ckpt":
        pytest.importorskip("torch")  # which reads it back
    verified = checkpoints.convert(sd15, place / f"d{ending}", verify=True, hashes=False)
    assert verified.sha256 == hashlib.sha256(verified.path.read_bytes()).hexdigest()


def test_the_benchmark_measures_a_small_model(place, capsys):
    script = place / "theirs.py"  # takes the arguments of diffusers' script
    script.write_text("import sys; open(sys.argv[4], 'wb').write(bytes(9)); print(sys.argv[1::2])")
    given = ["--divide", "16", "--rounds", "1", "--work", str(place), "--script", str(script)]
    assert main(["bench", "convert", *given, "--json"]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert data["torch_imported"] is False
    ours = {"same", "same_hashed", "fp16", "fp16_hashed", "merged", "theirs"}
    assert set(data["seconds"]) == {"copy", "copy_half", *ours}
    assert set(data["seconds_without_pythons_start"]) == ours
    assert sorted(path.name for path in place.iterdir()) == ["model-16", "theirs.py"]
    assert checkpoints.convert(place / "model-16", place / "a.safetensors", verify=True).tensors == 1130
