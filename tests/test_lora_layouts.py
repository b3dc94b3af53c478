"""How LoRA files spell their layers: every spelling is read, and as the programs that write and read it mean it."""

import pytest
from table_models import read, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.lora.layouts import is_lora, read_layout
from fastsd_helpers.checkpoints.lora.modules import LORA_FAMILIES, every_module, lora_modules, spelled_paths
from fastsd_helpers.errors import CheckpointError

AB = ("lora_A.weight", "lora_B.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
XLABS = ("down.weight", "up.weight")


def facts(*names, rows=6, columns=8):
    """Names of tensors -> facts with the shapes that such endings have."""
    shapes = {"down": (4, columns), "A": (4, columns), "up": (rows, 4), "B": (rows, 4), "alpha": ()}
    made = {}
    for name in names:
        ending = next((end for end in shapes if f"lora_{end}" in name or f".{end}" in name), "down")
        made[name] = TensorFact("F32", shapes[ending])
    return made


def layout_of(*names, metadata=None, part="", **sizes):
    return read_layout(facts(*names, **sizes), metadata or {}, part=part)


def pairs(*stems, sides=AB, **sizes):
    """Facts of a plain LoRA of these layers."""
    return facts(*(f"{stem}.{side}" for stem in stems for side in sides), **sizes)


def pairs_of(modules, sides=AB):
    """The same for modules (stem -> module), with as many axes as their weights have."""
    made = {}
    for stem, module in modules.items():
        ones = (1,) * (len(module.row.sizes) - 2)
        made[f"{stem}.{sides[0]}"] = TensorFact("F32", (4, 8, *ones))
        made[f"{stem}.{sides[1]}"] = TensorFact("F32", (6, 4, *ones))
    return made


# ------------------------------------------------------------------------------------------ every layer, every spelling


def flat(path):
    return path.replace(".", "_")


def kohya_te(number):
    return lambda part, path: f"lora_te{number[part]}_" + flat(f"text_model.{path}")


ONE, TWO = {"text_encoder": ""}, {"text_encoder": 1, "text_encoder_2": 2}
SPELLINGS = {  # (family, what) -> (the prefixes' rule for the denoiser by Diffusers' paths, for the text encoders)
    "diffusers": (lambda part, path: f"{part}.{path}", lambda part, path: f"{part}.text_model.{path}"),
    "transformers 5": (lambda part, path: f"{part}.{path}", lambda part, path: f"{part}.{path}"),
    "peft of old": (
        lambda part, path: f"{part}.base_model.model.{path}",
        lambda part, path: f"{part}.base_model.model.text_model.{path}",
    ),
    "compiled": (lambda part, path: f"{part}._orig_mod.{path}", lambda part, path: f"{part}.{path}"),
    "kohya": (lambda part, path: "lora_unet_" + flat(path), None),
    "onetrainer": (lambda part, path: "lora_transformer_" + flat(path), None),
    "simpletuner": (lambda part, path: "lycoris_" + flat(path), None),
}


def text_rule(family):
    return kohya_te(ONE if family in ("sd15", "sd21") else TWO)


@pytest.mark.parametrize("family", LORA_FAMILIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_layer_of_a_family_is_found_under_its_diffusers_path(family, spelling):
    inside, text = SPELLINGS[spelling]
    wanted = {}
    for module in lora_modules(family):
        for path in module.paths:
            if path.startswith("encoder.block.") or path == "text_projection":
                continue  # they have no text_model in front; their names are tried below
            rule = (text or text_rule(family)) if module.part.startswith("text") else inside
            if family == "flux" and not text and module.part == "text_encoder":
                rule = kohya_te({"text_encoder": 1})
            wanted[rule(module.part, path)] = (module, path)
    sides = DOWN_UP if text is None else AB
    layout = read_layout(pairs_of({stem: module for stem, (module, _) in wanted.items()}, sides), {})
    assert layout.family == family
    found = {one.tensors["down"].removesuffix(f".{sides[0]}"): one for one in layout.modules}
    assert found.keys() == wanted.keys()
    for stem, (module, path) in wanted.items():
        assert (found[stem].module, found[stem].path, found[stem].fused) == (module, path, False)


ORIGINALS = {
    "kohya": ("lora_unet_", flat, DOWN_UP),
    "comfyui": ("diffusion_model.", str, AB),
    "ai-toolkit": ("diffusion_model.", str, DOWN_UP),
    "whole": ("model.diffusion_model.", str, AB),
    "unet": ("unet.", str, DOWN_UP),
    "transformer": ("transformer.", str, AB),
    "peft": ("base_model.model.", str, AB),
    "bare": ("", str, AB),
    "old endings": ("diffusion_model.", str, ("lora.down.weight", "lora.up.weight")),
}


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("spelling", ORIGINALS)
def test_every_layer_of_a_family_is_found_under_its_original_path(family, spelling):
    prefix, written, sides = ORIGINALS[spelling]
    wanted = {}
    for module in lora_modules(family):
        if module.part in ("unet", "transformer"):
            original = module.row.original.removeprefix("model.diffusion_model.").removesuffix(".weight")
            wanted[prefix + written(original)] = module
    layout = read_layout(pairs_of(wanted, sides), {})
    assert layout.family == family
    assert layout.naming == {"kohya": "kohya", "peft": "peft"}.get(spelling, "bfl" if family == "flux" else "original")
    for one in layout.modules:
        assert one.fused
        assert one.module == wanted[one.tensors["down"].removesuffix(f".{sides[0]}")]
    assert len(layout.modules) == len(wanted)


@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_no_path_means_two_things(family):
    for part in {module.part for module in every_module(family)}:
        for paths in spelled_paths(family, part):
            assert len(paths) > 100
    # A path with dots and the same with underscores mean the same layer.
    for part in {module.part for module in every_module(family)}:
        dotted, underscored = spelled_paths(family, part)
        assert {flat(path): target.path for path, target in dotted.items() if flat(path) in underscored} == {
            path: target.path for path, target in underscored.items()
        }


# ------------------------------------------------------------------------------------------ which family, which part

BLOCK = "transformer_blocks.0"
ATTENTION = f"attentions.0.{BLOCK}"
KOHYA_15 = f"lora_unet_down_blocks_1_{flat(ATTENTION)}"
KOHYA_XL = "lora_unet_input_blocks_4_1_transformer_blocks_0"
TE = "text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    ("stem", "columns", "metadata", "family"),
    [
        (f"{KOHYA_15}_attn2_to_k", 768, {}, "sd15"),
        (f"{KOHYA_15}_attn2_to_k", 1024, {}, "sd21"),
        (f"{KOHYA_15}_attn2_to_k", 2048, {}, "sdxl"),
        (f"{KOHYA_15}_attn2_to_k", 8, {}, "sd15"),  # no published width: the first that is trained by such names
        (f"{KOHYA_15}_attn2_to_k", 8, {"ss_v2": "True"}, "sd21"),
        (f"{KOHYA_15}_attn1_to_k", 640, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        (f"{KOHYA_15}_attn1_to_k", 640, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        (f"{KOHYA_15}_attn1_to_k", 640, {"ss_base_model_version": "sdxl", "ss_sd_model_name": "sd15.ckpt"}, "sdxl"),
        (f"{KOHYA_15}_attn2_to_k", 768, {"ss_base_model_version": "sdxl_base_v1-0"}, "sd15"),  # widths know better
        (f"{KOHYA_XL}_attn1_to_k", 640, {}, "sdxl"),  # kohya has the original's names for SDXL alone
        (f"diffusion_model.input_blocks.4.1.{BLOCK}.attn2.to_k", 768, {}, "sd15"),
        (f"diffusion_model.input_blocks.4.1.{BLOCK}.attn2.to_k", 2048, {}, "sdxl"),
        (f"down_blocks.1.{ATTENTION}.attn2.to_v", 2048, {}, "sdxl"),
        (f"lora_te_{TE}", 768, {}, "sd15"),
        (f"lora_te_{TE}", 1024, {}, "sd21"),
        (f"lora_te1_{TE}", 768, {}, "sdxl"),
        (f"lora_te1_{TE}", 768, {"ss_base_model_version": "flux1"}, "flux"),
        (f"lora_te2_{TE}", 1280, {}, "sdxl"),
        ("lora_te2_text_projection", 1280, {}, "sdxl"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", 1280, {}, "sdxl"),
        ("text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1", 1024, {}, "sd21"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", 4096, {}, "flux"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 4096, {}, "flux"),
        ("lora_te2_encoder_block_0_layer_1_DenseReluDense_wo", 10240, {}, "flux"),
        ("lora_te_text_model_encoder_layers_22_mlp_fc1", 8, {}, "sd21"),
        ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1", 8, {}, "sdxl"),
    ],
)
def test_the_family_is_told_by_names_then_widths_then_metadata_then_custom(stem, columns, metadata, family):
    assert layout_of(f"{stem}.lora_A.weight", metadata=metadata, columns=columns).family == family


@pytest.mark.parametrize(
    ("columns", "asked", "family"),
    [(768, "flux", "flux"), (768, "sd15", "sd15"), (768, "sd21", "sd15"), (1024, "sd15", "sd21"), (8, "sd21", "sd21")],
)
def test_a_family_that_is_asked_for_is_taken_where_nothing_speaks_against_it(columns, asked, family):
    tensors = pairs("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", columns=columns)
    assert read_layout(tensors, {"ss_base_model_version": "sdxl_base_v1-0"}, family=asked).family == family


@pytest.mark.parametrize(
    ("path", "columns", "part", "found"),
    [
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", 768, "", "text_encoder"),
        ("base_model.model.encoder.layers.0.mlp.fc1", 1280, "", "text_encoder_2"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", 8, "text_encoder_2", "text_encoder_2"),
        (f"base_model.model.down_blocks.1.{ATTENTION}.attn1.to_q", 8, "unet", "unet"),
        ("base_model.model.single_transformer_blocks.0.proj_mlp", 8, "transformer", "transformer"),
        ("text_model.encoder.layers.0.mlp.fc1", 8, "", "text_encoder"),
    ],
)
def test_a_file_without_the_names_of_parts_is_of_one_part(path, columns, part, found):
    [module] = layout_of(f"{path}.lora_A.weight", columns=columns, part=part).modules
    assert (module.module.part, module.spelled) == (found, path.removeprefix("base_model.model."))


def test_a_bare_file_of_the_second_text_encoder_is_not_spread_over_both():
    layers = [f"base_model.model.text_model.encoder.layers.{layer}.mlp.fc1" for layer in (2, 31)]
    assert {one.module.part for one in read_layout(pairs(*layers), {}).modules} == {"text_encoder_2"}


def test_one_piece_of_a_fused_matrix_is_known_by_its_place():
    layout = layout_of("transformer.double_blocks.0.img_attn.qkv.1.lora_up.weight")
    assert [(one.path, one.fused) for one in layout.modules] == [("transformer_blocks.0.attn.to_k", False)]


def test_halves_are_exchanged_only_where_the_original_names_them():
    [by_original] = layout_of("lora_unet_final_layer_adaLN_modulation_1.lora_up.weight").modules
    [by_diffusers] = layout_of("lora_transformer_norm_out_linear.lora_up.weight").modules
    assert by_original.module == by_diffusers.module
    assert (by_original.fused, by_diffusers.fused, by_diffusers.path) == (True, False, "norm_out.linear")


@pytest.mark.parametrize(
    ("stem", "path"),
    [
        ("unet.unet.conv_in", "conv_in"),
        (f"unet.down_blocks.1.attentions.0._orig_mod.{BLOCK}.ff.net.2", f"down_blocks.1.{ATTENTION}.ff.net.2"),
        ("lora_unet__orig_mod_conv_in", "conv_in"),
        ("_orig_mod.unet.conv_in", "conv_in"),
        ("module.unet.conv_in", "conv_in"),
        ("unet._fsdp_wrapped_module.conv_in", "conv_in"),
        ("base_model.model.unet.conv_in", "conv_in"),
        ("lycoris_text_model_encoder_layers_0_mlp_fc1", "encoder.layers.0.mlp.fc1"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out", "mid_block.attentions.0.tra"),
    ],
)
def test_what_wraps_a_model_is_no_part_of_a_path(stem, path):
    [module] = layout_of(f"{stem}.lora_down.weight").modules
    assert module.module.paths[0].startswith(path)


@pytest.mark.parametrize("ending", ["lora.down", "lora_layer.down", "lora_linear_layer.down", "lora_conv_layer.down"])
def test_the_endings_of_older_versions_are_the_same_matrix(ending):
    [module] = layout_of(f"unet.conv_in.{ending}.weight").modules
    assert module.tensors == {"down": f"unet.conv_in.{ending}.weight"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (f"{KOHYA_XL}_attn1_to_k.lora_down.weight", "a LoRA for SDXL in kohya's names"),
        (f"unet.down_blocks.1.{ATTENTION}.attn1.to_q.lora_A.weight", "a LoRA for SD 1.5 in diffusers' names"),
        ("base_model.model.single_transformer_blocks.0.proj_mlp.lora_A.weight", "a LoRA for Flux.1 in peft's names"),
        (
            "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight",
            "a LoRA for Flux.1 in Black Forest Labs' names",
        ),
        ("lora_transformer_proj_out.lora_down.weight", "a LoRA for Flux.1 in OneTrainer's names"),
        ("lycoris_proj_out.lokr_w1", "a LoKr (LyCORIS) for Flux.1 in SimpleTuner's names"),
        ("double_blocks.0.processor.proj_lora1.down.weight", "a LoRA for Flux.1 in XLabs' names"),
        (f"lora_te_{TE}.lora_down.weight", "a LoRA for the text encoder of SD 1.5 in kohya's names"),
        (f"lora_te1_{TE}.lora_down.weight lora_te2_{TE}.lora_up.weight", "a LoRA for the text encoders of SDXL in"),
        ("unet.input_blocks.4.1.proj_in.lora_up.weight", "a LoRA for SD 1.5 in the original's names"),
    ],
)
def test_a_lora_is_named_with_its_family_and_whose_names_it_has(names, words):
    assert layout_of(*names.split()).words.startswith(words)


# ------------------------------------------------------------------------------------------ kinds


KINDS = [
    ("lora", "lora_down.weight lora_up.weight alpha", "a LoRA"),
    ("lora", "lora_down.weight lora_up.weight lora_mid.weight alpha", "a LoRA"),
    ("lora", "lora_A.weight lora_B.weight lora_B.bias", "a LoRA"),
    ("lora", "lora_A.default.weight lora_B.default.weight", "a LoRA"),
    ("loha", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b alpha", "a LoHa"),
    ("loha", "hada_t1 hada_t2 hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "a LoHa"),
    ("loha", "hada_w1_a.default hada_w1_b.default hada_w2_a.default hada_w2_b.default", "a LoHa"),
    ("lokr", "alpha lokr_w1 lokr_w2", "a LoKr"),
    ("lokr", "alpha lokr_w1 lokr_t2 lokr_w2_a lokr_w2_b", "a LoKr"),
    ("lokr", "lokr_w1_a.weight lokr_w1_b.weight lokr_w2.weight dora_scale", "a LoKr"),
    ("oft", "oft_blocks alpha", "an OFT"),
    ("oft", "oft_diag rescale", "an OFT"),
    ("oft", "oft_R.weight oft_R.scaled_oft", "an OFT"),
    ("boft", "boft_R boft_s", "a BOFT"),
    ("dora", "lora_down.weight lora_up.weight dora_scale alpha", "a DoRA"),
    ("dora", "lora_A.weight lora_B.weight lora_magnitude_vector", "a DoRA"),
    ("dora", "lora_A.default.weight lora_B.default.weight lora_magnitude_vector.default.weight", "a DoRA"),
    ("glora", "a1.weight a2.weight b1.weight b2.weight alpha", "a GLoRA"),
    ("ia3", "weight on_input", "an IA3"),
    ("ia3", "ia3_l", "an IA3"),
    ("full", "diff diff_b", "full weight differences"),
    ("norm", "w_norm b_norm", "differences of norm layers"),
    ("mixed", "lora_down.weight lora_up.weight diff_b", "an adapter of several kinds (LoRA, weight differences)"),
]
STEMS = {
    "kohya": (f"{KOHYA_XL}_attn1_to_k", f"lora_te1_{TE}"),
    "diffusers": (f"unet.down_blocks.1.{ATTENTION}.attn1.to_k", "text_encoder.encoder.layers.0.mlp.fc1"),
    "peft": ("base_model.model.single_transformer_blocks.0.attn.to_q",),
    "bfl": ("diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.0.linear1"),
}


@pytest.mark.parametrize("naming", STEMS)
@pytest.mark.parametrize(("kind", "endings", "words"), KINDS)
def test_every_kind_of_adapter_is_named_in_every_naming(naming, kind, endings, words):
    names = [f"{stem}.{ending}" for stem in STEMS[naming] for ending in endings.split()]
    layout = layout_of(*sorted(names))
    assert (layout.kind, layout.naming) == (kind, naming)
    assert layout.words.startswith(words)
    assert is_lora(facts(*names))
    assert sorted(name for one in layout.modules for name in one.tensors.values()) == sorted(names)
    assert len(layout.modules) == len(STEMS[naming])


def test_oft_and_boft_differ_in_the_axes_of_their_blocks():
    name = f"{KOHYA_XL}_attn1_to_k.oft_blocks"
    for axes, kind in ((3, "oft"), (4, "boft")):
        assert read_layout({name: TensorFact("F32", (2,) * axes)}, {}).kind == kind


def test_layers_of_norms_and_biases_beside_a_lora_make_it_mixed():
    norm = "lora_unet_input_blocks_4_1_norm"
    layout = layout_of(f"{KOHYA_XL}_attn1_to_k.lokr_w1", f"{KOHYA_XL}_attn1_to_k.lokr_w2", f"{norm}.w_norm")
    assert layout.kind == "mixed"
    assert "several kinds (LoKr, differences of norm layers)" in layout.words
    assert {one.module.paths[0] for one in layout.modules if "w_norm" in one.tensors} == {
        "down_blocks.1.attentions.0.norm"
    }


def test_layers_with_and_without_a_dora_scale_are_a_dora():
    layout = layout_of(
        *(f"{KOHYA_XL}_attn1_to_k.{end}" for end in (*DOWN_UP, "dora_scale")),
        *(f"{KOHYA_XL}_attn1_to_q.{end}" for end in DOWN_UP),
    )
    assert layout.kind == "dora"


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("stem", "columns", "what"),
    [
        ("transformer.transformer_blocks.12.attn.to_q", 1536, "Stable Diffusion 3"),
        ("base_model.model.transformer_blocks.30.attn.add_k_proj", 2432, "Stable Diffusion 3.5"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, "Stable Diffusion 3"),
        ("diffusion_model.joint_blocks.0.context_block.mlp.fc1", 1536, "Stable Diffusion 3"),
        ("transformer.transformer_blocks.3.attn2.to_q", 1536, "Stable Diffusion 3.5"),
        ("transformer.transformer_blocks.40.attn.to_q", 3072, "Qwen-Image"),
        ("transformer.transformer_blocks.3.img_mlp.net.0.proj", 3072, "Qwen-Image"),
        ("lora_unet_transformer_blocks_3_txt_mlp_net_2", 3072, "Qwen-Image"),
        ("diffusion_model.transformer_blocks.0.img_mod.1", 3072, "Qwen-Image"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 6144, "FLUX.2"),
        ("transformer.transformer_blocks.0.ff.linear_in", 3072, "FLUX.2"),
        ("diffusion_model.double_blocks.0.img_attn.qkv", 6144, "FLUX.2 dev"),
        ("lora_unet_double_blocks_0_img_attn_qkv", 4096, "FLUX.2 klein 9B"),
        ("transformer.layers.3.attention.to_q", 3840, "Z-Image"),
        ("lora_unet_layers_3_feed_forward_w1", 3840, "Z-Image"),
        ("diffusion_model.noise_refiner.0.attention.qkv", 3840, "Z-Image"),
        ("diffusion_model.distilled_guidance_layer.layers.0.in_layer", 3072, "Chroma"),
        ("transformer.single_transformer_blocks.0.attn.to_q", 4096, "FLUX.2 klein 9B"),
        ("diffusion_model.double_blocks.0.img_attn_qkv", 3072, "HunyuanVideo"),
        ("lora_unet_double_blocks_0_img_mlp_fc1", 3072, "HunyuanVideo"),
        ("lora_unet_double_blocks_0_img_attn_q", 3584, "HunyuanVideo or HunyuanImage"),
        ("lora_unet_blocks_0_attn1_Wqkv", 1408, "Hunyuan-DiT"),
        ("diffusion_model.blocks.0.cross_attn.kv_linear", 1152, "PixArt"),
        ("diffusion_model.blocks.0.self_attn.q", 5120, "Wan"),
        ("lora_unet_blocks_0_cross_attn_k_img", 5120, "Wan"),
        ("transformer.blocks.0.attn2.to_k", 5120, "Wan"),
        ("transformer.transformer_blocks.0.attn1.to_q", 2048, "PixArt, LTX-Video"),
        ("lora_prior_unet_down_blocks_0_1_attention", 8, "Stable Cascade"),
        ("unet.down_blocks.0.motion_modules.0.proj_in", 320, "AnimateDiff"),
        (f"unet.down_blocks.1.{ATTENTION}.attn2.to_k", 4096, "Kolors"),
        ("base_model.model.model.layers.0.self_attn.q_proj", 4096, "a language model"),
        ("diffusion_model.double_stream_blocks.0.block.attn1.to_q", 2560, "HiDream"),
        ("transformer.joint_transformer_blocks.0.attn.to_q", 3072, "AuraFlow"),
        ("transformer.single_transformer_blocks.3.attn.to_out", 12288, "FLUX.2"),
        ("diffusion_model.single_blocks.3.linear2", 12288, "FLUX.2 klein 4B"),
        ("lora_unet_txt_in", 15360, "FLUX.2 dev"),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", 4096, "Stable Diffusion 3"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 768, "the SDXL refiner"),
        (f"unet.down_blocks.1.{ATTENTION}.attn2.to_k", 1280, "the SDXL refiner"),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_lora_of_another_family_is_named_and_refused(stem, columns, what, kind):
    if kind == "lora":
        tensors = pairs(stem, columns=columns, rows=columns)
    else:
        tensors = {f"{stem}.alpha": TensorFact("F32", ())}
        tensors |= {
            f"{stem}.lokr_w1": TensorFact("F32", (4, 4)),
            f"{stem}.lokr_w2": TensorFact("F32", (columns // 4,) * 2),
        }
    with pytest.raises(CheckpointError, match=rf"is for {what}[^:]*, which is not converted: ") as caught:
        read_layout(tensors, {})
    assert caught.value.hint.endswith(".")


@pytest.mark.parametrize(("path", "rows"), [("single_blocks.3.linear1", 27648), ("double_blocks.3.img_mlp.0", 18432)])
def test_the_smallest_flux_2_differs_from_flux_1_in_its_inner_layers(path, rows):
    with pytest.raises(CheckpointError, match=r"FLUX\.2 klein 4B"):
        read_layout(pairs(f"diffusion_model.{path}", columns=3072, rows=rows), {})
    assert read_layout(pairs(f"diffusion_model.{path}", columns=3072, rows=21504), {}).family == "flux"


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        ({"modelspec.architecture": "stable-diffusion-v3-medium/lora"}, "Stable Diffusion 3"),
        ({"modelspec.architecture": "chroma/lora"}, "Chroma"),
        ({"ss_base_model_version": "sd3m"}, "Stable Diffusion 3"),
        ({"modelspec.architecture": "Flux.2-klein/lora"}, "FLUX.2"),
    ],
)
def test_metadata_names_a_family_that_layers_do_not(metadata, what):
    with pytest.raises(CheckpointError, match=what):
        read_layout(pairs("lora_unet_double_blocks_0_img_attn_qkv"), metadata)


def test_clip_g_and_t5_together_are_stable_diffusion_3s():
    stems = [f"lora_te2_{TE}", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"]
    with pytest.raises(CheckpointError, match="is for Stable Diffusion 3, which is not converted"):
        read_layout(pairs(*stems, sides=DOWN_UP), {})
    assert read_layout(pairs(f"lora_te1_{TE}", stems[1], sides=DOWN_UP), {}).family == "flux"


@pytest.mark.parametrize("said", ["flux-1-dev/lora", "flux-1-kontext-dev/lora", "flux1"])
def test_flux_1s_relatives_with_the_same_layers_are_flux_1(said):
    assert (
        read_layout(pairs("lora_unet_double_blocks_0_img_attn_qkv"), {"modelspec.architecture": said}).family == "flux"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("transformer.transformer_blocks.0.attn.to_q", "lora_transformer_transformer_blocks_0_attn_to_q"),
        (f"unet.down_blocks.1.{ATTENTION}.attn1.to_q", f"{KOHYA_15}_attn1_to_q"),
        (f"{KOHYA_15}_attn1_to_q", f"{KOHYA_XL}_attn1_to_q"),
        ("text_encoder.encoder.layers.0.mlp.fc1", f"lora_te_{TE}"),
        ("base_model.model.proj_out", "proj_out"),
        ("double_blocks.0.processor.qkv_lora1", "double_blocks.0.img_attn.qkv"),
    ],
)
def test_one_lora_in_two_layouts_is_refused(one, other):
    def named(stem):
        sides = XLABS if "processor" in stem else AB
        return pairs(stem, sides=sides)

    with pytest.raises(CheckpointError, match="one LoRA in two layouts") as caught:
        read_layout({**named(one), **named(other)}, {})
    assert one in str(caught.value)
    assert other in str(caught.value)


def test_parts_may_be_written_in_two_layouts():
    """AI-Toolkit and OneTrainer write the transformer by one program's names and the text encoder by another's."""
    layout = read_layout({**pairs("transformer.proj_out"), **pairs(f"lora_te1_{TE}", sides=DOWN_UP)}, {})
    assert (layout.naming, len(layout.modules)) == ("diffusers", 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["unet.strange.lora_A.weight"], "changes 'strange', a layer of no known model"),
        (["lora_unet_strange.lora_down.weight"], "'strange'"),
        ([f"{KOHYA_XL}_attn1_to_k.alpha", "bundle_emb.robot.clip_l"], "embedding .textual inversion."),
        ([f"{KOHYA_XL}_attn1_to_k.lora_down.0.weight"], "intermediate training file"),
        ([f"{KOHYA_XL}_attn1_to_k.alpha", "optimizer.step"], "'optimizer.step', which is not a tensor of a LoRA"),
        ([f"unet.proj_out.lora_A.{own}.weight" for own in ("default", "other")], "two adapters"),
        (["text_encoder.text_model.embeddings.token_embedding.lora_embedding_A"], "token embeddings"),
        (["lora_te1_encoder_layers_40_mlp_fc1.lora_up.weight", f"{KOHYA_XL}_attn1_to_k.lora_up.weight"], "SDXL models"),
        ([], "no tensors of a LoRA"),
        (["base_model.model.proj_out.lora_A.weight", "base_model.model.proj_out.lora_E"], "AdaLoRA"),
        (["base_model.model.proj_out.vera_lambda_b"], "another adapter of peft.s .AdaLoRA, VeRA"),
        (
            ["base_model.model.proj_out.lora_A.weight", "base_model.model.norm.weight"],
            "full weights .* modules_to_save",
        ),
        (["img_in.lora_A.weight", "double_blocks.0.img_attn.norm.key_norm.scale"], "control LoRA of Flux.1"),
    ],
)
def test_what_is_no_tensor_of_a_known_layer_is_named(names, message):
    with pytest.raises(CheckpointError, match=message):
        layout_of(*names)


def test_a_model_with_an_adapter_inside_is_no_lora():
    inside = f"down_blocks.1.{ATTENTION}.attn1.to_q"
    assert not is_lora(facts(f"{inside}.base_layer.weight", f"{inside}.lora_A.default.weight"))
    assert not is_lora(facts("model.diffusion_model.input_blocks.0.0.weight", "alpha", "first.alpha"))
    assert is_lora(pairs(inside))


# ------------------------------------------------------------------------------------------ as a person meets it


def saved(path, tensors):
    """The same with numbers: 1.0 everywhere."""
    return write(path, {name: (fact, b"\0\0\x80\x3f" * fact.count) for name, fact in tensors.items()})


@pytest.mark.parametrize(
    ("stem", "sides", "what", "written"),
    [
        ("base_model.model.transformer_blocks.12.attn.to_q", AB, "Flux.1 in peft's", "double_blocks_12_img_attn_qkv"),
        ("single_transformer_blocks.0.attn.to_q", AB, "Flux.1 in diffusers'", "single_blocks_0_linear1"),
        ("diffusion_model.double_blocks.3.img_attn.proj", AB, "Flux.1 in Black", "double_blocks_3_img_attn_proj"),
        ("diffusion_model.double_blocks.3.img_attn.proj", DOWN_UP, "Flux.1 in Black", "double_blocks_3_img_attn_proj"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_k", DOWN_UP, "Flux.1 in One", "single_blocks_0_linear1"),
        (f"unet.output_blocks.3.1.{BLOCK}.attn1.to_q", DOWN_UP, "SD 1.5 in the original's", "up_blocks_1_attentions_0"),
        ("double_blocks.0.processor.proj_lora1", XLABS, "Flux.1 in XLabs'", "double_blocks_0_img_attn_proj"),
        (f"down_blocks.1.{ATTENTION}.attn2.to_k", AB, "SDXL in diffusers'", "input_blocks_4_1_transformer_blocks_0"),
    ],
)
def test_inspect_says_what_it_is_and_convert_writes_kohyas_names(stem, sides, what, written, tmp_path):
    path = saved(tmp_path / "in.safetensors", pairs(stem, sides=sides, columns=2048 if "attn2" in stem else 8, rows=8))
    assert what in checkpoints.inspect(path).what
    made = checkpoints.convert(path, tmp_path / "out.safetensors", verify=True)
    names = set(read(made.path))
    assert len(names) == 3
    assert all(name.startswith("lora_unet_") and written in name for name in names)


@pytest.mark.parametrize(
    ("stem", "columns", "what"),
    [
        ("transformer.transformer_blocks.12.attn.to_q", 1536, "Stable Diffusion 3"),
        ("diffusion_model.layers.3.attention.to_q", 3840, "Z-Image"),
    ],
)
def test_another_familys_lora_is_named_by_inspect_and_refused_by_convert(stem, columns, what, tmp_path):
    path = saved(tmp_path / "in.safetensors", pairs(stem, columns=columns, rows=8))
    assert what in checkpoints.inspect(path).what
    with pytest.raises(CheckpointError, match=what):
        checkpoints.convert(path, tmp_path / "out.safetensors")
    assert [place.name for place in tmp_path.glob("*.safetensors*")] == ["in.safetensors"]


@pytest.mark.parametrize(("kind", "endings"), [("LoKr", "alpha lokr_w1 lokr_w2"), ("DoRA", "lora_A.weight dora_scale")])
@pytest.mark.parametrize("stem", [f"{KOHYA_XL}_attn1_to_k", "transformer.single_transformer_blocks.0.proj_mlp"])
def test_a_kind_that_is_not_converted_is_named_before_anything_is_written(kind, endings, stem, tmp_path):
    path = saved(tmp_path / "in.safetensors", facts(*(f"{stem}.{ending}" for ending in endings.split())))
    assert kind in checkpoints.inspect(path).what
    with pytest.raises(CheckpointError, match=kind) as caught:
        checkpoints.convert(path, tmp_path / "out.safetensors")
    assert "merge" in caught.value.hint
    assert [place.name for place in tmp_path.glob("*.safetensors*")] == ["in.safetensors"]
