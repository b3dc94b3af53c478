"""How strongly a LoRA counts: whatever its file states, wherever it states it; and what is said where it is unclear."""

import json
import math
import struct

import pytest

pytest.importorskip("numpy")
import numpy as np
from table_models import read, values, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.lora.modules import lora_modules
from fastsd_helpers.checkpoints.lora.statements import exact_pattern, find_pattern, find_statements
from fastsd_helpers.errors import CheckpointError

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
Q, K = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k"
CROSS = f"{BLOCK}.attn2.to_k"  # 768 wide: Stable Diffusion 1.x
TEXT = "encoder.layers.3.self_attn.q_proj"
OTHER_TEXT = "encoder.layers.4.self_attn.q_proj"


def pairs(*names, rank=4, columns=768, rows=16, ends=("lora_A", "lora_B"), dtype="F32"):
    shapes = {f"{name}.{ends[0]}.weight": (rank, columns) for name in names}
    return values(shapes | {f"{name}.{ends[1]}.weight": (rows, rank) for name in names}, dtype)


def number(value, kind="<f4"):
    return TensorFact("F32" if kind == "<f4" else "F16", ()), np.array(value, kind).tobytes()


def alphas_of(path):
    """Layer of kohya's -> alpha."""
    return {
        name.removesuffix(".alpha"): struct.unpack("<f", content)[0]
        for name, (_dtype, _shape, content) in read(path).items()
        if name.endswith(".alpha")
    }


def convert(tmp_path, tensors, metadata=None, *, config=None, name="in.safetensors"):
    write(tmp_path / name, tensors, metadata)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return checkpoints.convert(tmp_path / name, tmp_path / "out.safetensors", overwrite=True)


def described(**config):
    return {"lora_adapter_metadata": json.dumps(config)}


def kohya(path, letters="unet"):
    return f"lora_{letters}_{path.replace('.', '_')}"


# ------------------------------------------------------------------------------------------------ where it is stated


@pytest.mark.parametrize(
    ("metadata", "noted"),
    [
        (described(r=4, lora_alpha=16), False),
        (described(**{"unet.r": 4, "unet.lora_alpha": 16}), False),
        (described(**{"r": 4, "lora_alpha": 3, "unet.lora_alpha": 16}), False),
        (described(lora_alpha="16"), False),
        (described(r=4, lora_alpha=8, use_rslora=True), False),
        ({"lora_alpha": "16"}, True),
        ({"lora_alpha": "16.0", "rank": "4"}, True),
        ({"network_alpha": "16"}, True),
        ({"alpha": "16", "lora_alpha": "None"}, True),
        ({"unet.lora_alpha": "16", "text_encoder.lora_alpha": "5"}, True),
        ({"lora_alpha": "8", "use_rslora": "True"}, True),
        ({"ss_network_alpha": "16.0", "ss_network_dim": "4"}, True),
        ({"adapter_config": json.dumps({"r": 4, "lora_alpha": 16, "peft_type": "LORA"})}, True),
        ({"lora_config": json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True})}, True),
        (
            {"settings": json.dumps({"lora_rank": 4, "lora_alpha": 16.0, "steps": 900}), "notes": 'his "lora_alpha"'},
            True,
        ),
    ],
)
def test_the_alpha_is_found_wherever_the_header_states_it(metadata, noted, tmp_path) -> None:
    start = "" if "lora_adapter_metadata" in metadata else "unet."
    written = convert(tmp_path, pairs(*(start + path for path in (Q, CROSS))), metadata)
    assert set(alphas_of(written.path).values()) == {16.0}
    assert [("16 was used" in note or "8 was used" in note) for note in written.notes] == [True] * noted


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "my own name.safetensors"])
def test_an_adapter_of_pefts_given_as_a_file_takes_the_configuration_beside_it(name, tmp_path) -> None:
    tensors = pairs(f"base_model.model.{Q}", f"base_model.model.{CROSS}")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["to_q", "to_k"]}
    assert set(alphas_of(convert(tmp_path, tensors, config=config, name=name).path).values()) == {16.0}


def test_another_file_in_a_folder_of_pefts_does_not_take_the_adapters_configuration(tmp_path) -> None:
    write(tmp_path / "adapter_model.safetensors", pairs(f"base_model.model.{Q}"))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
    written = convert(tmp_path, pairs(f"base_model.model.{CROSS}"), config=config)
    assert set(alphas_of(written.path).values()) == {4.0}
    (tmp_path / "adapter_model.safetensors").unlink()
    assert set(alphas_of(convert(tmp_path, pairs(f"unet.{CROSS}"), config=config).path).values()) == {4.0}


def test_each_adapter_of_a_folder_has_its_own_configuration(tmp_path) -> None:
    for part, path, alpha in (("unet", CROSS, 16), ("text_encoder", TEXT, 2)):
        write(tmp_path / "in" / part / "adapter_model.safetensors", pairs(f"base_model.model.{path}"))
        (tmp_path / "in" / part / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
    written = checkpoints.convert(tmp_path / "in", tmp_path / "out.safetensors")
    assert sorted(alphas_of(written.path).values()) == [2.0, 16.0]


@pytest.mark.parametrize("given", ["text_encoder_2", "text_encoder_2/adapter_model.safetensors"])
def test_one_adapter_of_a_folder_is_of_the_part_that_its_folder_is_named_after(given, tmp_path) -> None:
    """The two text encoders of SDXL have the same names."""
    place = tmp_path / "text_encoder_2"
    write(place / "adapter_model.safetensors", pairs(f"base_model.model.text_model.{TEXT}", columns=1280))
    (place / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    written = checkpoints.convert(tmp_path / given, tmp_path / "out.safetensors")
    assert alphas_of(written.path) == {kohya(f"text_model.{TEXT}", "te2"): 2}
    assert written.family == "sdxl-lora"


@pytest.mark.parametrize("config", [{"r": 4}, {"peft_type": "LORA"}, {"r": 4, "lora_alpha": None}])
def test_a_configuration_without_an_alpha_means_what_peft_makes_of_it(config, tmp_path) -> None:
    """peft's LoraConfig takes 8, whatever the rank."""
    written = convert(tmp_path, pairs(f"base_model.model.{CROSS}"), config=config, name="adapter_model.safetensors")
    assert set(alphas_of(written.path).values()) == {8.0}
    assert any("8 was used, from peft's default" in note for note in written.notes)
    peft = pytest.importorskip("peft")
    assert peft.LoraConfig(**{key: value for key, value in config.items() if value and key == "r"}).lora_alpha == 8


def test_kohyas_convolutions_may_have_an_alpha_of_their_own(tmp_path) -> None:
    conv = "down_blocks.0.resnets.0.conv1"
    tensors = pairs(kohya(CROSS), ends=("lora_down", "lora_up"))
    tensors |= values({f"{kohya(conv)}.lora_down.weight": (4, 8, 3, 3), f"{kohya(conv)}.lora_up.weight": (8, 4, 1, 1)})
    header = {"ss_network_alpha": "2", "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": "1"})}
    written = convert(tmp_path, tensors, header)
    from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile

    with SafetensorsFile(written.path) as file:
        said = json.loads(file.metadata["lora_adapter_metadata"])
    assert sorted([said["unet.lora_alpha"], *said["unet.alpha_pattern"].values()]) == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize("start", ["", "text_model."])
@pytest.mark.parametrize("spelled", ["", "text_model."])
@pytest.mark.parametrize("anchor", ["", "^"])
@pytest.mark.parametrize(("part", "letters"), [("text_encoder", "te1"), ("text_encoder_2", "te2")])
def test_patterns_of_text_encoders_count_with_and_without_text_model(
    start, spelled, anchor, part, letters, tmp_path
) -> None:
    deep = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"  # which only SDXL has
    tensors = pairs(deep, columns=640) | pairs(*(f"{part}.{start}{path}" for path in (TEXT, OTHER_TEXT)))
    config = {f"{part}.r": 4, f"{part}.lora_alpha": 8, f"{part}.alpha_pattern": {f"{anchor}{spelled}{TEXT}": 1}}
    found = alphas_of(convert(tmp_path, tensors, described(**config)).path)
    assert found[kohya(f"text_model.{TEXT}", letters)] == 1
    assert found[kohya(f"text_model.{OTHER_TEXT}", letters)] == 8


def test_patterns_mean_what_peft_takes_them_to_mean() -> None:
    other = pytest.importorskip("peft.utils.other")
    paths = [module.paths[0] for module in lora_modules("flux")] + [Q, K, CROSS, TEXT, f"text_model.{TEXT}"]
    patterns = (
        ("proj_out", "^proj_out"),
        ("^proj_out", "proj_out"),
        ("to_q", "attn1.to_q", r".*attn1\.to_k"),
        (r"down_blocks\.\d+\..*to_k", "o_k", "attn.to_q|attn1.to_q"),
        ("single_transformer_blocks.1.proj_out", "single_transformer_blocks.1"),
        (r"(single_)?transformer_blocks.[0-4].*", "linear"),
        ("net.0.proj", "ff.net.2", r"^transformer_blocks\.(0|3)\..*"),
    )
    for some in patterns:
        for path in paths:
            theirs = other.get_pattern_key(some, path)
            assert find_pattern(some, [path]) == (theirs if theirs in some else None), (some, path)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "flux"])
def test_the_pattern_we_write_means_one_module_of_the_model(family) -> None:
    """With and without `text_model.`; paths that are the end of another path are what it is for."""
    ambiguous = 0
    for part in {module.part for module in lora_modules(family)}:
        paths = [path for module in lora_modules(family) if module.part == part for path in module.paths]
        ends = [path for path in paths if any(other.endswith(f".{path}") for other in paths)]
        ambiguous += len(ends)
        some = set(ends) | set(paths[::37])
        for path in some:
            pattern = exact_pattern(part, path)
            assert [one for one in paths if find_pattern([pattern], [one])] == [path]
            long = [f"text_model.{one}" for one in paths]
            assert len([one for one in long if find_pattern([pattern], [one])]) == part.startswith("text")
    assert ambiguous == (1 if family == "flux" else 0)


@pytest.mark.parametrize("pattern", ["(", "[", "a" * 3000, "(a+)+b", r"(.*)*", "a*b*c*d*e*f*g*"])
def test_patterns_that_nobody_can_match_are_refused(pattern, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="metadata has the pattern"):
        convert(
            tmp_path, pairs(f"unet.{CROSS}"), described(**{"unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 1}})
        )


# ------------------------------------------------------------------------------------------------ what looks wrong


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", ["tensor", "metadata", "plain", "config"])
def test_an_alpha_that_is_no_number_is_refused_by_the_layers_name(value, way, tmp_path) -> None:
    name = f"base_model.model.{CROSS}" if way == "config" else f"unet.{CROSS}"
    tensors, metadata, config = pairs(name), {}, None
    if way == "tensor":
        tensors[f"unet.{CROSS}.alpha"] = number(value)
    elif way == "metadata":
        metadata = described(**{"unet.lora_alpha": value})
    elif way == "plain":
        metadata = {"lora_alpha": str(value)}
    else:
        config = {"r": 4, "lora_alpha": value}
    with pytest.raises(CheckpointError, match=rf"alpha of unet\.{CROSS} is -?(nan|inf)"):
        convert(tmp_path, tensors, metadata, config=config, name="adapter_model.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("value", "words"), [(0, "is 0: nothing is changed"), (-2, "has the opposite effect")])
def test_an_alpha_of_zero_or_below_is_kept_and_said(value, words, tmp_path) -> None:
    written = convert(tmp_path, pairs(f"unet.{CROSS}") | {f"unet.{CROSS}.alpha": number(value)})
    assert len(written.notes) == 1
    assert words in written.notes[0]
    stored = read(written.path)
    down, up = (np.frombuffer(stored[f"{kohya(CROSS)}.lora_{side}.weight"][2], "<f4") for side in ("down", "up"))
    alpha = alphas_of(written.path)[kohya(CROSS)]
    before = {name: np.frombuffer(content, "<f4") for name, (_fact, content) in pairs(f"unet.{CROSS}").items()}
    assert np.array_equal(down, before[f"unet.{CROSS}.lora_A.weight"])
    # Some readers cannot take a negative alpha in this layout: the matrix has the sign.
    assert np.array_equal(alpha * up, value * before[f"unet.{CROSS}.lora_B.weight"])
    assert alpha >= 0


def test_statements_that_contradict_each_other_are_said_and_the_tensor_counts(tmp_path) -> None:
    tensors = pairs(f"unet.{CROSS}", f"unet.{Q}") | {f"unet.{CROSS}.alpha": number(3)}
    written = convert(tmp_path, tensors, {**described(**{"unet.lora_alpha": 5}), "lora_alpha": "7"})
    assert alphas_of(written.path) == {kohya(CROSS): 3, kohya(Q): 5}
    assert written.notes == (
        f"The alpha of unet.{CROSS} is stated twice: 5 in the header's metadata, and 3 in its own tensor, which "
        "was used.",
        "The alpha of 2 layers is stated twice: 7 in the header's lora_alpha, and 5 in the header's metadata, which "
        "was used.",
    )


def test_a_tensor_in_half_precision_does_not_contradict_what_it_was_rounded_from(tmp_path) -> None:
    tensors = pairs(f"unet.{CROSS}") | {f"unet.{CROSS}.alpha": number(1.1, "<f2")}
    assert convert(tmp_path, tensors, described(**{"unet.lora_alpha": 1.1})).notes == ()


def test_kohyas_entry_contradicts_only_where_no_layer_has_that_alpha(tmp_path) -> None:
    """Trainers may give each block its own, and the entry holds one of them."""
    tensors = pairs(kohya(CROSS), kohya(Q), ends=("lora_down", "lora_up"))
    tensors |= {f"{kohya(CROSS)}.alpha": number(3), f"{kohya(Q)}.alpha": number(1)}
    assert convert(tmp_path, tensors, {"ss_network_alpha": "1", "ss_network_dim": "4"}).notes == ()
    (note,) = convert(tmp_path, tensors, {"ss_network_alpha": "16"}).notes
    assert "16 in the header's ss_network_alpha" in note


def test_a_rank_that_is_not_the_matrices_and_a_pattern_without_a_layer_are_said(tmp_path) -> None:
    config = {
        "unet.r": 8,
        "unet.lora_alpha": 8,
        "unet.rank_pattern": {"to_q": 4, "proj_out": 2},
        "unet.alpha_pattern": {"to_v": 1},
    }
    written = convert(tmp_path, pairs(f"unet.{CROSS}", f"unet.{Q}"), described(**config))
    assert written.notes == (
        f"The header's metadata states rank 8 for unet.{CROSS}; the matrices have rank 4, which was used.",
        "alpha_pattern in the header's metadata names 'to_v', which is not a layer of this LoRA.",
        "rank_pattern in the header's metadata names 'proj_out', which is not a layer of this LoRA.",
    )
    assert set(alphas_of(written.path).values()) == {8.0}


def test_matrices_of_zeros_are_said(tmp_path) -> None:
    tensors = pairs(f"unet.{CROSS}", f"unet.{Q}") | {f"unet.{CROSS}.alpha": number(4), f"unet.{Q}.alpha": number(4)}
    fact, content = tensors[f"unet.{Q}.lora_B.weight"]
    tensors[f"unet.{Q}.lora_B.weight"] = fact, bytes(len(content))
    written = convert(tmp_path, tensors)
    assert written.notes == (f"A matrix of unet.{Q} is all zeros: nothing is changed there.",)
    assert set(alphas_of(written.path)) == {kohya(CROSS), kohya(Q)}, "it is there all the same"
    fact, content = tensors[f"unet.{CROSS}.lora_A.weight"]
    tensors[f"unet.{CROSS}.lora_A.weight"] = fact, bytes(len(content))
    assert convert(tmp_path, tensors).notes == ("Every layer has an all-zero matrix: this LoRA has no effect.",)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"unet.lora_alpha": "a lot"}, "states lora_alpha as 'a lot', which is not a number"),
        ({"unet.lora_alpha": [1]}, "which is not a number"),
        ({"unet.lora_alpha": True}, "which is not a number"),
        ({"unet.lora_alpha": {"default": 4}}, "which is not a number"),
        ({"unet": [1]}, r"lora_adapter_metadata states unet as \[1\], which is not an object"),
        ({"unet.lora_alpha": 1, "unet.use_rslora": "yes"}, "use_rslora as 'yes', which is not true or false"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": False}, "states alpha_pattern as False, which is not an object"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_k": "x"}}, "states to_k as 'x'"),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}, r"states alpha_pattern as \[1\], which is not an object"),
        ({"unet.lora_alpha": 1, "unet.init_lora_weights": "pissa_niter_4"}, "trained on changed weights"),
    ],
)
def test_statements_that_cannot_be_meant_are_refused(config, message, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path, pairs(f"unet.{CROSS}"), described(**config))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("text", ["sixteen", "1/16", "True", "[16]", '{"unet": 16}'])
@pytest.mark.parametrize("key", ["lora_alpha", "unet.lora_alpha", "unet_network_alpha", "alpha", "ss_network_alpha"])
def test_an_alpha_of_the_header_that_is_words_is_named_and_never_taken_for_none(key, text, tmp_path) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, pairs(f"unet.{CROSS}"), {key: text, **described(**{"unet.r": 4})})
    assert caught.value.problem == (
        f"The scale of unet.{CROSS} is unknown: the header's {key} is {text!r}, which is not a number."
    )
    assert not (tmp_path / "out.safetensors").exists()
    written = convert(tmp_path, pairs(f"unet.{CROSS}") | {f"unet.{CROSS}.alpha": number(3)}, {key: text})
    assert alphas_of(written.path) == {kohya(CROSS): 3}
    assert written.notes == (
        f"The alpha of unet.{CROSS} is stated twice: {text!r} in the header's {key}, and 3 in its own tensor, which "
        "was used.",
    )


def test_a_number_counts_before_words_wherever_it_is_stated_and_the_words_are_named(tmp_path) -> None:
    for number_key, words_key in (
        ("alpha", "unet.lora_alpha"),
        ("unet.alpha", "lora_alpha"),
        ("ss_network_alpha", "alpha"),
    ):
        written = convert(tmp_path, pairs(f"unet.{CROSS}"), {number_key: "16", words_key: "none of your business"})
        assert alphas_of(written.path) == {kohya(CROSS): 16}
        assert written.notes[1] == (
            f"The alpha of unet.{CROSS} is stated twice: 'none of your business' in the header's {words_key}, and 16 "
            f"in the header's {number_key}, which was used."
        )


def test_an_alpha_of_convolutions_that_is_words_speaks_of_convolutions_alone(tmp_path) -> None:
    conv = "down_blocks.0.resnets.0.conv1"
    tensors = pairs(kohya(CROSS), ends=("lora_down", "lora_up"))
    kernel = values(
        {f"{kohya(conv)}.lora_down.weight": (4, 320, 3, 3), f"{kohya(conv)}.lora_up.weight": (320, 4, 1, 1)}
    )
    for args in (json.dumps({"conv_alpha": "two"}), "conv_alpha=two"):
        header = {"ss_network_alpha": "2", "ss_network_args": args}
        assert convert(tmp_path, tensors, header).tensors == 2
        words = f"scale of unet.{conv} is unknown: the header's conv_alpha is .*two"
        with pytest.raises(CheckpointError, match=words):
            convert(tmp_path, tensors | kernel, header)


def test_settings_of_a_training_count_after_the_tensors_and_may_hold_anything(tmp_path) -> None:
    own = pairs(kohya(CROSS), ends=("lora_down", "lora_up")) | {f"{kohya(CROSS)}.alpha": number(3)}
    settings = {"lora_alpha": 3, "unet": "a path", "alpha_pattern": "none", "use_rslora": "perhaps"}
    for said in (settings, ["lora_alpha"], {"text_encoder": {"lora_alpha": 5}}):
        assert convert(tmp_path, own, {"settings": json.dumps(said)}).notes == ()
    for said, words in ((4, "4"), ("auto", "'auto'")):
        notes = convert(tmp_path, own, {"settings": json.dumps({**settings, "lora_alpha": said})}).notes
        assert [f"stated twice: {words} in the header's settings" in note for note in notes] == [True]
    with pytest.raises(CheckpointError, match="the header's settings is 'auto', which is not a number"):
        convert(tmp_path, pairs(f"unet.{CROSS}"), {"settings": json.dumps({**settings, "lora_alpha": "auto"})})


def test_what_kohya_writes_of_a_lora_that_was_resized_is_no_contradiction(tmp_path) -> None:
    """Each layer has a rank and an alpha of its own then."""
    tensors = pairs(kohya(CROSS), ends=("lora_down", "lora_up")) | {f"{kohya(CROSS)}.alpha": number(3)}
    header = {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic", "lora_alpha": "None"}
    assert convert(tmp_path, tensors, header).notes == ()
    del tensors[f"{kohya(CROSS)}.alpha"]
    with pytest.raises(CheckpointError, match="ss_network_alpha is 'Dynamic', which is not a number"):
        convert(tmp_path, tensors, header)


@pytest.mark.parametrize(("said", "alpha"), [(True, 8), ("true", 8), (1, 8), (False, 4), ("False", 4), (None, 4)])
def test_rank_stabilised_is_what_the_word_says_and_not_that_there_is_one(said, alpha, tmp_path) -> None:
    config = {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_rslora": said}
    assert alphas_of(convert(tmp_path, pairs(f"unet.{CROSS}"), described(**config)).path) == {kohya(CROSS): alpha}


def test_an_object_for_each_part_is_read_as_well(tmp_path) -> None:
    config = {"unet": {"lora_alpha": 12, "alpha_pattern": {"attn1.to_q": 2}}, "text_encoder": {"lora_alpha": 5}}
    found = alphas_of(convert(tmp_path, pairs(f"unet.{CROSS}", f"unet.{Q}"), described(**config)).path)
    assert found == {kohya(CROSS): 12, kohya(Q): 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1, 2], "adapter_config.json is not a JSON object"),
        ({"r": 4, "lora_alpha": "sixteen"}, "adapter_config.json states lora_alpha as 'sixteen'"),
        ({"r": 4, "lora_alpha": [16]}, r"adapter_config.json states lora_alpha as \[16\]"),
        ({"r": 4, "alpha_pattern": "16"}, "adapter_config.json states alpha_pattern as '16', which is not an object"),
        ({"r": 4, "alpha_pattern": {"to_k": True}}, "states to_k as True, which is not a number"),
    ],
)
def test_an_adapter_config_that_cannot_be_meant_is_refused(config, message, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path, pairs(f"base_model.model.{CROSS}"), config=config, name="adapter_model.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_matrices_that_cannot_be_meant_are_refused(tmp_path) -> None:
    for role, fact, content, message in (
        ("lora_A", TensorFact("I8", (4, 768)), bytes(4 * 768), "contains integers"),
        ("lora_A", TensorFact("F32", (4, 768)), np.full((4, 768), np.nan, "<f4").tobytes(), "contains NaN or Inf"),
        ("lora_B", TensorFact("F16", (16, 4)), np.full((16, 4), np.inf, "<f2").tobytes(), "contains NaN or Inf"),
    ):
        tensors = pairs(f"unet.{CROSS}") | {f"unet.{CROSS}.{role}.weight": (fact, content)}
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path, tensors)
    tensors = pairs(f"unet.{CROSS}") | {f"unet.{CROSS}.alpha": (TensorFact("F32", (2,)), bytes(8))}
    with pytest.raises(CheckpointError, match="holds 2 numbers instead of one"):
        convert(tmp_path, tensors)


def test_what_is_stated_of_one_part_is_not_taken_for_another() -> None:
    metadata = described(**{"text_encoder.lora_alpha": 9, "text_encoder_2.lora_alpha": 7})
    assert [one.alpha for one in find_statements(metadata, {}, "text_encoder")] == [9]
    assert [one.alpha for one in find_statements(metadata, {}, "text_encoder_2")] == [7]
    assert find_statements(metadata, {}, "unet") == []
