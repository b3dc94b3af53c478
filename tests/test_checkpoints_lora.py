"""LoRA between diffusers', peft's and kohya's names: the change of every weight stays what it was."""

import json
import math

import pytest

pytest.importorskip("numpy")
import numpy as np
from closeness import assert_close_to
from table_models import read, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, TensorFact
from fastsd_helpers.checkpoints.lora.layouts import is_lora_folder
from fastsd_helpers.checkpoints.lora.modules import lora_modules
from fastsd_helpers.errors import CheckpointError

# Of the largest value: products of two matrices of rank 2 to 4 in fp32, which keeps each to 6e-8, summed in any order.
PRODUCTS = 1e-6

UNET = {
    "sd15": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "sd21": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "sdxl": "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
}
TEXT = "text_model.encoder.layers.3.self_attn.q_proj"


@pytest.fixture
def place(tmp_path):
    made = tmp_path / "place"
    made.mkdir()
    return made


def matrix(rows, columns, seed, *, dtype="F32"):
    numbers = np.random.default_rng(seed).standard_normal((rows, columns)).astype("<f4")
    if dtype == "F16":
        numbers = numbers.astype("<f2")
    return TensorFact(dtype, (rows, columns)), numbers.tobytes()


def number(value):
    return TensorFact("F32", ()), np.float32(value).tobytes()


def array(entry):
    dtype, shape, content = entry
    return np.frombuffer(content, "<f2" if dtype == "F16" else "<f4").reshape(shape).astype("<f8")


def change(tensors, down, up, alpha):
    """What a layer adds to its weight."""
    first, second = array(tensors[down]), array(tensors[up])
    return alpha / first.shape[0] * second.reshape(len(second), -1) @ first.reshape(len(first), -1)


def diffusers_lora(path, family, *, rank=4, alphas=None, width=8):
    """A LoRA of the U-Net and the text encoders as diffusers saves it; alphas: part -> alpha."""
    alphas = alphas or {"unet": 2.0, "text_encoder": 8.0, "text_encoder_2": 3.0}
    width = {"sd21": 1024}.get(family, width)
    layers = {f"unet.{UNET[family]}": width, f"text_encoder.{TEXT}": 8}
    if family == "sdxl":
        layers[f"text_encoder_2.{TEXT.removeprefix('text_model.')}"] = 8
    tensors = {}
    for place, (name, columns) in enumerate(layers.items()):
        tensors[f"{name}.lora_A.weight"] = matrix(rank, columns, 2 * place)
        tensors[f"{name}.lora_B.weight"] = matrix(6, rank, 2 * place + 1)
    parts = {name.split(".")[0] for name in layers}
    described = {f"{part}.{key}": value for part in parts for key, value in (("r", rank), ("lora_alpha", alphas[part]))}
    write(path, tensors, {"lora_adapter_metadata": json.dumps(described)})
    return layers


@pytest.mark.parametrize(("family", "letters"), [("sd15", ("te",)), ("sd21", ("te",)), ("sdxl", ("te1", "te2"))])
def test_diffusers_names_become_kohyas_with_the_true_alpha_for_all_parts_at_once(family, letters, place):
    layers = diffusers_lora(place / "in.safetensors", family)
    written = checkpoints.convert(place / "in.safetensors", place / "out.safetensors", verify=True)
    assert written.family == f"{family}-lora"
    before, after = read(place / "in.safetensors"), read(written.path)
    unet = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    if family != "sdxl":
        unet = "lora_unet_" + UNET[family].replace(".", "_")
    text = [f"lora_{letter}_{TEXT.replace('.', '_')}" for letter in letters]
    assert {name.split(".")[0] for name in after} == {unet, *text}
    for ours, theirs, alpha in zip(layers, [unet, *text], (2.0, 8.0, 3.0), strict=False):
        assert array(after[f"{theirs}.alpha"]) == alpha
        old = change(before, f"{ours}.lora_A.weight", f"{ours}.lora_B.weight", alpha)
        new = change(
            after, f"{theirs}.lora_down.weight", f"{theirs}.lora_up.weight", float(array(after[f"{theirs}.alpha"]))
        )
        assert np.array_equal(old, new)
    with SafetensorsFile(written.path) as file:
        said = file.metadata
    assert said["ss_network_dim"] == "4"
    assert said["ss_v2"] == str(family == "sd21")
    assert said["ss_base_model_version"] == {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_kohyas_names_become_diffusers_and_the_same_again(family, place):
    diffusers_lora(place / "in.safetensors", family)
    kohya = checkpoints.convert(place / "in.safetensors", place / "kohya.safetensors")
    checkpoints.convert(kohya.path, place / "back", verify=True)
    made = place / "back" / "pytorch_lora_weights.safetensors"
    again = checkpoints.convert(place / "back", place / "again.safetensors")
    assert read(again.path) == read(kohya.path)
    with SafetensorsFile(made) as file:
        described = json.loads(file.metadata["lora_adapter_metadata"])
    assert (described["unet.r"], described["unet.lora_alpha"], described["text_encoder.lora_alpha"]) == (4, 2.0, 8.0)
    one = checkpoints.convert(kohya.path, place / "one.safetensors")
    assert read(one.path) == read(made)


def test_sdxl_lora_in_diffusers_style_underscores_is_read_too(place):
    name = "lora_unet_" + UNET["sdxl"].replace(".", "_")
    tensors = {
        f"{name}.lora_down.weight": matrix(4, 8, 0, dtype="F16"),
        f"{name}.lora_up.weight": matrix(6, 4, 1, dtype="F16"),
        f"{name}.alpha": number(1.5),
        "lora_te2_encoder_layers_0_mlp_fc1.lora_down.weight": matrix(4, 8, 2),
        "lora_te2_encoder_layers_0_mlp_fc1.lora_up.weight": matrix(6, 4, 3),
    }
    write(place / "in.safetensors", tensors)
    written = checkpoints.convert(place / "in.safetensors", place / "out.safetensors")
    stored = read(written.path)
    assert stored[f"unet.{UNET['sdxl']}.lora_A.weight"] == ("F16", (4, 8), tensors[f"{name}.lora_down.weight"][1])
    # diffusers knows peft's names in a text encoder by its attention, which this LoRA does not change.
    assert "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight" in stored
    assert "1 layer has no alpha" in written.notes[0]


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"r": 4, "lora_alpha": 2}, 2.0),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"attn2.to_k": 7}}, 7.0),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"o_k": 7}}, 2.0),
        ({"r": 4, "lora_alpha": 2, "use_rslora": True}, 2 * math.sqrt(4)),
        ({}, 4.0),
    ],
)
def test_peft_folders_keep_what_their_configuration_says(config, alpha, place):
    name = f"base_model.model.{UNET['sd15']}"
    tensors = {f"{name}.lora_A.weight": matrix(4, 8, 0), f"{name}.lora_B.weight": matrix(6, 4, 1)}
    write(place / "in" / "unet" / "adapter_model.safetensors", tensors)
    (place / "in" / "unet" / "adapter_config.json").write_text(json.dumps(config))
    text = "base_model.model.text_model.encoder.layers.3.self_attn.q_proj"
    tensors = {f"{text}.lora_A.weight": matrix(4, 8, 0), f"{text}.lora_B.weight": matrix(6, 4, 1)}
    write(place / "in" / "text_encoder" / "adapter_model.safetensors", tensors)
    (place / "in" / "text_encoder" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16}')
    written = checkpoints.convert(place / "in", place / "out.safetensors")
    stored = read(written.path)
    assert array(stored[f"lora_unet_{UNET['sd15'].replace('.', '_')}.alpha"]) == alpha
    assert array(stored[f"lora_te_{TEXT.replace('.', '_')}.alpha"]) == 16
    idle = "o_k" in config.get("alpha_pattern", {})
    assert len(written.notes) == (not config or idle)
    assert not idle or "names 'o_k', which is not a layer of this LoRA" in written.notes[0]


@pytest.mark.parametrize(
    "names",
    [
        (f"unet.{UNET['sd15']}.lora.down", f"unet.{UNET['sd15']}.lora.up"),
        (
            f"unet.{UNET['sd15'].removesuffix('.to_k')}.processor.to_k_lora.down",
            f"unet.{UNET['sd15'].removesuffix('.to_k')}.processor.to_k_lora.up",
        ),
        (f"unet.{UNET['sd15']}.lora_A.default", f"unet.{UNET['sd15']}.lora_B.default"),
    ],
)
def test_the_names_of_older_versions_are_read(names, place):
    tensors = {f"{names[0]}.weight": matrix(4, 8, 0), f"{names[1]}.weight": matrix(6, 4, 1)}
    written = checkpoints.convert(write(place / "in.safetensors", tensors), place / "out.safetensors")
    stored = read(written.path)
    base = f"lora_unet_{UNET['sd15'].replace('.', '_')}"
    assert stored.keys() == {f"{base}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert array(stored[f"{base}.alpha"]) == 4
    assert "has no alpha" in written.notes[0]


# ------------------------------------------------------------------------------------------------ Flux


def flux_change(tensors, prefix, alpha_of):
    names = {name.split(".lora_")[0] for name in tensors if name.startswith(prefix) and ".lora_" in name}
    sides = ("lora_A.weight", "lora_B.weight") if prefix == "transformer." else ("lora_down.weight", "lora_up.weight")
    return {name: change(tensors, f"{name}.{sides[0]}", f"{name}.{sides[1]}", alpha_of(name)) for name in names}


@pytest.mark.numeric
@pytest.mark.parametrize("same", [True, False])
def test_flux_layers_are_fused_and_taken_apart_again(same, place):
    d = 8
    block, single = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.3"
    layers = {
        f"{block}.attn.to_q": (d, d, 4, 2.0),
        f"{block}.attn.to_k": (d, d, 4 if same else 2, 2.0 if same else 9.0),
        f"{block}.attn.to_v": (d, d, 4, 2.0),
        f"{block}.attn.add_k_proj": (d, d, 4, 2.0),
        f"{block}.norm1.linear": (6 * d, d, 4, 2.0),
        f"{single}.attn.to_q": (d, d, 4, 2.0),
        f"{single}.proj_mlp": (4 * d, d, 4, 2.0),
        f"{single}.proj_out": (d, 5 * d, 4, 2.0),
        "transformer.norm_out.linear": (2 * d, d, 4, 2.0),
    }
    tensors = {}
    for seed, (name, (rows, columns, rank, alpha)) in enumerate(layers.items()):
        tensors[f"{name}.lora_A.weight"] = matrix(rank, columns, 2 * seed)
        tensors[f"{name}.lora_B.weight"] = matrix(rows, rank, 2 * seed + 1)
        tensors[f"{name}.alpha"] = number(alpha)
    write(place / "in.safetensors", tensors)
    kohya = checkpoints.convert(place / "in.safetensors", place / "kohya.safetensors", verify=True)
    stored = read(kohya.path)
    wanted = flux_change(read(place / "in.safetensors"), "transformer.", lambda name: layers[name][3])
    made = flux_change(stored, "lora_unet_", lambda name: float(array(stored[f"{name}.alpha"])))
    assert set(made) == {
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_double_blocks_0_txt_attn_qkv",
        "lora_unet_double_blocks_0_img_mod_lin",
        "lora_unet_single_blocks_3_linear1",
        "lora_unet_single_blocks_3_linear2",
        "lora_unet_final_layer_adaLN_modulation_1",
    }

    assert_close_to(
        made["lora_unet_double_blocks_0_img_attn_qkv"],
        np.concatenate([wanted[f"{block}.attn.to_{x}"] for x in "qkv"]),
        of_largest=PRODUCTS,
    )
    nothing = np.zeros((d, d))
    assert_close_to(
        made["lora_unet_double_blocks_0_txt_attn_qkv"],
        np.concatenate([nothing, wanted[f"{block}.attn.add_k_proj"], nothing]),
        of_largest=PRODUCTS,
    )
    assert_close_to(
        made["lora_unet_single_blocks_3_linear1"],
        np.concatenate([wanted[f"{single}.attn.to_q"], nothing, nothing, wanted[f"{single}.proj_mlp"]]),
        of_largest=PRODUCTS,
    )
    scale, shift = np.split(wanted["transformer.norm_out.linear"], 2)
    turned = np.concatenate([shift, scale])
    assert_close_to(made["lora_unet_final_layer_adaLN_modulation_1"], turned, of_largest=PRODUCTS)
    # Back again: the same layers with the same effect, and no empty ones beside them.
    back = checkpoints.convert(kohya.path, place / "back.safetensors")
    with SafetensorsFile(back.path) as file:
        said = json.loads(file.metadata["lora_adapter_metadata"])
    patterns = said["transformer.alpha_pattern"]

    def alpha_of(name):
        return patterns.get(f"^{name.removeprefix('transformer.')}", said["transformer.lora_alpha"])

    again = flux_change(read(back.path), "transformer.", alpha_of)
    assert again.keys() == wanted.keys()
    for name in wanted:
        assert_close_to(again[name], wanted[name], of_largest=PRODUCTS, about=name)


# ------------------------------------------------------------------------------------------------ names and refusals


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "flux"])
def test_no_two_modules_share_a_name(family):
    modules = lora_modules(family)
    names = [name for module in modules for name in (module.kohya, *module.aliases)]
    assert len(names) - len(set(names)) == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((f"unet.{UNET['sd15']}.lora_A.weight",), "an incomplete layer: (.|\n)*lacks its up matrix"),
        ((f"unet.{UNET['sd15']}.lora_A.weight", f"unet.{UNET['sd15']}.lora_magnitude_vector"), "DoRA"),
        (("unet.strange.lora_A.weight", "unet.strange.lora_B.weight"), "changes 'strange'"),
        (("lora_unet_strange.lora_down.weight", "lora_unet_strange.lora_up.weight"), "changes 'strange'"),
        (("lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_mid.weight"), "lacks its up matrix"),
    ],
)
def test_what_cannot_be_converted_is_named(names, message, place):
    write(place / "in.safetensors", {name: matrix(4, 4, 0) for name in names})
    with pytest.raises(CheckpointError, match=message):
        checkpoints.convert(place / "in.safetensors", place / "out.safetensors")
    assert [path.name for path in place.iterdir()] == ["in.safetensors"]


def test_a_lora_is_not_a_model_and_keeps_its_place(place):
    diffusers_lora(place / "in.safetensors", "sd15")
    with pytest.raises(CheckpointError, match=r"not a model of the family 'sd15'"):
        checkpoints.convert(place / "in.safetensors", place / "out.safetensors", family="sd15")
    with pytest.raises(CheckpointError, match=r"not written as \.ckpt"):
        checkpoints.convert(place / "in.safetensors", place / "out.ckpt")
    with pytest.raises(CheckpointError, match="is a single file"):
        checkpoints.convert(place / "in.safetensors", place / "folder")
    (place / "out.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoints.convert(place / "in.safetensors", place / "out.safetensors")
    found = checkpoints.inspect(place / "in.safetensors")
    assert (found.kind, found.family) == ("lora peft", "sd15")
    assert any("kohya" in sentence for sentence in found.advice)


# ------------------------------------------------------------------------------------------------ diffusers as reader


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_applies_our_kohya_file_as_it_does_the_folder(family, place):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    import tiny_families
    from peft.utils import get_peft_model_state_dict

    def pipeline():
        with torch.device("meta"):
            parts = tiny_families.build_parts(family)
        tiny_families.fill(parts, 3)
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
        if family == "sdxl":
            return diffusers.StableDiffusionXLPipeline(
                **parts, tokenizer=None, tokenizer_2=None, scheduler=scheduler, add_watermarker=False
            )
        return diffusers.StableDiffusionPipeline(
            **parts,
            tokenizer=None,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    pipe = pipeline()
    parts = ["unet", "text_encoder"] + (["text_encoder_2"] if family == "sdxl" else [])
    # diffusers' reader of kohya's names tells a text encoder's layers by out_proj, and fails without it.
    text_layers = ["q_proj", "k_proj", "v_proj", "out_proj"]
    targets = {"unet": ["to_q", "to_k", "to_v", "to_out.0"]}
    layers, metadata = {}, {}
    torch.manual_seed(5)
    for part in parts:
        config = peft.LoraConfig(
            r=4,
            lora_alpha=6 if part == "unet" else 2,
            init_lora_weights=False,
            target_modules=targets.get(part, text_layers),
        )
        getattr(pipe, part).add_adapter(config)
        state = get_peft_model_state_dict(getattr(pipe, part))
        layers[f"{part}_lora_layers"] = state
        described = config.to_dict() | {"target_modules": sorted(config.target_modules)}
        metadata[f"{part}_lora_adapter_metadata"] = described
    type(pipe).save_lora_weights(place / "folder", **layers, **metadata)
    kohya = checkpoints.convert(place / "folder", place / "kohya.safetensors", verify=True)

    def weights(source, **options):
        """The parts' weights with the LoRA merged into them."""
        pipe = pipeline()
        pipe.load_lora_weights(source, **options)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return {
            part: {name: tensor.clone() for name, tensor in getattr(pipe, part).state_dict().items()} for part in parts
        }

    ours = weights(place, weight_name=kohya.path.name)
    theirs = weights(place / "folder")
    plain = {part: getattr(pipeline(), part).state_dict() for part in parts}
    for part in parts:
        assert ours[part].keys() == theirs[part].keys()
        changed = 0
        for name, tensor in theirs[part].items():
            assert_close_to(ours[part][name], tensor, of_largest=PRODUCTS, about=f"{part} {name}")
            changed += not torch.equal(tensor, plain[part][name])
        assert changed >= 24, part


# ------------------------------------------------------------------------------------- more than one rank, alpha, kind


OTHER = UNET["sd15"].replace("to_k", "to_v")
THIRD = UNET["sd15"].replace("to_k", "to_q")


def pair(name, rank, seed=0, *, columns=8, rows=6, dtype="F32"):
    return {
        f"{name}.lora_A.weight": matrix(rank, columns, seed, dtype=dtype),
        f"{name}.lora_B.weight": matrix(rows, rank, seed + 1, dtype=dtype),
    }


def kohya_pair(name, rank, seed=0, *, alpha=None):
    made = {f"{name}.lora_down.weight": matrix(rank, 8, seed), f"{name}.lora_up.weight": matrix(6, rank, seed + 1)}
    return made | ({} if alpha is None else {f"{name}.alpha": number(alpha)})


def described(path):
    with SafetensorsFile(path) as file:
        return json.loads(file.metadata["lora_adapter_metadata"])


def test_the_most_common_rank_and_alpha_are_said_and_the_others_by_name(place):
    names = {part: f"lora_unet_{part.replace('.', '_')}" for part in (UNET["sd15"], OTHER, THIRD)}
    text = f"lora_te_{TEXT.replace('.', '_')}"
    tensors = {
        **kohya_pair(names[UNET["sd15"]], 4, alpha=2),
        **kohya_pair(names[OTHER], 4, 2, alpha=3),
        **kohya_pair(names[THIRD], 2, 4, alpha=3),
        **kohya_pair(text, 3, 6),
    }
    written = checkpoints.convert(write(place / "kohya.safetensors", tensors), place / "out.safetensors")
    assert described(written.path) == {
        "unet.r": 4,
        "unet.lora_alpha": 3.0,
        "unet.target_modules": sorted([UNET["sd15"], OTHER, THIRD]),
        "unet.rank_pattern": {f"^{THIRD}": 2},
        "unet.alpha_pattern": {f"^{UNET['sd15']}": 2.0},
        "text_encoder.r": 3,
        "text_encoder.lora_alpha": 3.0,
        "text_encoder.target_modules": [TEXT.removeprefix("text_model.")],
        "text_encoder.rank_pattern": {},
        "text_encoder.alpha_pattern": {},
    }
    assert written.notes == ("1 layer has no alpha; alpha = rank was assumed.",)
    back = checkpoints.convert(written.path, place / "back.safetensors")
    assert {name: value for name, value in read(back.path).items() if not name.startswith(text)} == {
        name: (fact.dtype, fact.shape, content)
        for name, (fact, content) in tensors.items()
        if not name.startswith(text)
    }
    assert array(read(back.path)[f"{text}.alpha"]) == 3
    with SafetensorsFile(back.path) as file:
        said = file.metadata
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["modelspec.title"]) == ("4", "3", "back")
    assert (said["ss_network_module"], said["format"]) == ("networks.lora", "pt")
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"


@pytest.mark.parametrize(
    ("dtype", "stored"), [("keep", ("F16", "F32")), ("fp16", ("F16", "F16")), ("bf16", ("BF16", "BF16")),
                          ("fp32", ("F32", "F32"))],
)  # fmt: skip
def test_matrices_get_the_format_that_was_asked_for_and_alphas_stay_exact(dtype, stored, place):
    tensors = {**pair(f"unet.{UNET['sd15']}", 2, dtype="F16"), **pair(f"unet.{OTHER}", 2, 5)}
    tensors[f"unet.{UNET['sd15']}.alpha"] = number(1.1)
    written = checkpoints.convert(write(place / "in.safetensors", tensors), place / "out.safetensors", dtype=dtype)
    found = read(written.path)
    kinds = [found[f"lora_unet_{name.replace('.', '_')}.lora_up.weight"][0] for name in (UNET["sd15"], OTHER)]
    assert tuple(kinds) == stored
    alpha = found[f"lora_unet_{UNET['sd15'].replace('.', '_')}.alpha"]
    assert (alpha[0], alpha[1], alpha[2]) == ("F32", (), np.float32(1.1).tobytes())


def test_numbers_of_other_formats_are_read(place):
    """As some trainers save them: alpha as an integer or in fp16, matrices in fp64."""
    name, other = (f"lora_unet_{part.replace('.', '_')}" for part in (UNET["sd15"], OTHER))
    wide = {side: np.random.default_rng(1).standard_normal(shape) for side, shape in (("down", (4, 8)), ("up", (6, 4)))}
    tensors = {
        **{
            f"{name}.lora_{side}.weight": (TensorFact("F64", array.shape), array.tobytes())
            for side, array in wide.items()
        },
        f"{name}.alpha": (TensorFact("I64", ()), np.int64(3).tobytes()),
        **kohya_pair(other, 4),
        f"{other}.alpha": (TensorFact("F16", (1,)), np.float16(2.5).tobytes()),
    }
    written = checkpoints.convert(write(place / "in.safetensors", tensors), place / "out.safetensors")
    said = described(written.path)
    assert {said["unet.lora_alpha"], *said["unet.alpha_pattern"].values()} == {3.0, 2.5}
    dtype, shape, content = read(written.path)[f"unet.{UNET['sd15']}.lora_A.weight"]
    assert (dtype, shape) == ("F32", (4, 8)), "read as fp32: wider would be a claim"
    assert content == wide["down"].astype("<f4").tobytes()


@pytest.mark.parametrize(
    ("down", "up"), [((4, 8), (6, 3)), ((4,), (6, 4)), ((4, 8), (6,)), ((0, 8), (6, 0)), ((4, 8), (4, 6))]
)
@pytest.mark.parametrize("kohya", [True, False])
def test_matrices_that_do_not_fit_each_other_are_refused(down, up, kohya, place):
    name = f"lora_unet_{UNET['sd15'].replace('.', '_')}" if kohya else f"unet.{UNET['sd15']}"
    ends = ("lora_down.weight", "lora_up.weight") if kohya else ("lora_A.weight", "lora_B.weight")
    tensors = {
        f"{name}.{end}": (TensorFact("F32", shape), np.zeros(shape, "<f4").tobytes())
        for end, shape in zip(ends, (down, up), strict=True)
    }
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoints.convert(write(place / "in.safetensors", tensors), place / "out.safetensors")
    lacking = {f"{name}.{ends[1]}": tensors[f"{name}.{ends[1]}"]}
    with pytest.raises(CheckpointError, match="lacks its down matrix"):
        checkpoints.convert(write(place / "in.safetensors", lacking), place / "out.safetensors")


def test_metadata_that_cannot_be_read_is_refused_and_metadata_of_another_part_says_nothing(place):
    tensors = pair(f"unet.{UNET['sd15']}", 4)
    for text, words in (("{", "it is '{', which is not JSON"), ("[1, 2]", r"is \[1, 2\], which is not an object")):
        write(place / "in.safetensors", tensors, {"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError, match=f"The header's lora_adapter_metadata .*{words}"):
            checkpoints.convert(place / "in.safetensors", place / "out.safetensors")
    for text in ("", "{}", '{"text_encoder.lora_alpha": 9}', '{"text_encoder": {"lora_alpha": 9}}'):
        write(place / "in.safetensors", tensors, {"lora_adapter_metadata": text})
        written = checkpoints.convert(place / "in.safetensors", place / "out.safetensors", overwrite=True)
        assert array(read(written.path)[f"lora_unet_{UNET['sd15'].replace('.', '_')}.alpha"]) == 4
        assert len(written.notes) == 1


@pytest.mark.parametrize(
    ("name", "kohya"),
    [
        (UNET["sd15"], f"lora_unet_{UNET['sd15'].replace('.', '_')}"),
        (TEXT, f"lora_te_{TEXT.replace('.', '_')}"),
        (f"text_encoder.{TEXT}", f"lora_te_{TEXT.replace('.', '_')}"),
        ("transformer_blocks.0.attn.to_out.0", "lora_unet_double_blocks_0_img_attn_proj"),
        ("transformer_blocks.7.attn.to_out.0", "lora_unet_double_blocks_7_img_attn_proj"),
        ("single_transformer_blocks.12.proj_out", "lora_unet_single_blocks_12_linear2"),
    ],
)
def test_the_part_of_one_adapter_of_peft_is_told_from_its_names(name, kohya, place):
    tensors = pair(f"base_model.model.{name}", 4)
    write(place / "in" / "adapter_model.safetensors", tensors)
    (place / "in" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 6}')
    assert is_lora_folder(place / "in")
    written = checkpoints.convert(place / "in", place / "out.safetensors")
    assert array(read(written.path)[f"{kohya}.alpha"]) == 6


def test_folders_without_a_lora_are_none(place):
    assert not is_lora_folder(place)
    (place / "unet").mkdir()
    assert not is_lora_folder(place)
    (place / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert is_lora_folder(place)


@pytest.mark.parametrize(
    ("ancient", "now"),
    [("self_attn.to_q_lora", "self_attn_q_proj"), ("self_attn.to_k_lora", "self_attn_k_proj"),
     ("self_attn.to_v_lora", "self_attn_v_proj"), ("self_attn.to_out_lora", "self_attn_out_proj")],
)  # fmt: skip
def test_the_oldest_names_of_text_encoders_and_of_outputs_are_read(ancient, now, place):
    base = UNET["sd15"].removesuffix(".to_k")
    names = {
        f"text_encoder.text_model.encoder.layers.3.{ancient}": f"lora_te_text_model_encoder_layers_3_{now}",
        f"unet.{base}.processor.to_out_lora": f"lora_unet_{base.replace('.', '_')}_to_out_0",
    }
    tensors = {}
    for name in names:
        tensors |= {f"{name}.down.weight": matrix(4, 8, 0), f"{name}.up.weight": matrix(8, 4, 1)}
    written = checkpoints.convert(write(place / "in.safetensors", tensors), place / "out.safetensors")
    assert {name.split(".")[0] for name in read(written.path)} == set(names.values())


def test_fused_layers_that_share_columns_each_keep_the_whole_rank(place):
    """As trainers of kohya's make them: one pair of matrices for queries, keys and values."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": matrix(4, 8, 0),
        f"{name}.lora_up.weight": matrix(24, 4, 1),
        f"{name}.alpha": number(2),
    }
    kohya = write(place / "kohya.safetensors", tensors)
    written = checkpoints.convert(kohya, place / "out.safetensors", verify=True)
    found = read(written.path)
    whole = change(read(kohya), f"{name}.lora_down.weight", f"{name}.lora_up.weight", 2)
    block = "transformer.transformer_blocks.0.attn"
    parts = [change(found, f"{block}.to_{x}.lora_A.weight", f"{block}.to_{x}.lora_B.weight", 2) for x in "qkv"]
    assert np.allclose(np.concatenate(parts), whole, atol=1e-6)
    assert described(written.path)["transformer.r"] == 4
    assert described(written.path)["transformer.lora_alpha"] == 2


def test_a_layer_that_one_ui_does_not_read_is_named(place):
    tensors = pair("text_encoder_2.text_projection", 4) | pair(f"unet.{UNET['sdxl']}", 4)
    write(place / "in.safetensors", tensors, {"lora_alpha": "4"})
    written = checkpoints.convert(place / "in.safetensors", place / "out.safetensors")
    assert written.notes[-1] == "AUTOMATIC1111 does not read lora_te2_text_projection; ComfyUI and Forge do."
