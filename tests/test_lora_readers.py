"""LoRA in every spelling, and what they are converted to, read by diffusers: every layer changes by the same."""

import pytest

pytest.importorskip("numpy")
import numpy as np
from closeness import assert_close_to
from test_lora_layouts import AB, DOWN_UP, ORIGINALS, flat, text_rule

from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.lora.layouts import LORA_FILE, read_layout
from fastsd_helpers.checkpoints.lora.modules import lora_modules
from fastsd_helpers.checkpoints.lora_converter import convert_lora
from fastsd_helpers.errors import CheckpointError

# Of the largest value: products of two fp32 matrices, the alpha shared out between them.
PRODUCTS = 1e-6
PLAIN = {"dtype": "keep", "overwrite": False, "verify": True}
AB_TO_DOWN, AB_TO_UP = zip(AB, DOWN_UP, strict=True)


def matrices(random, rows, columns, *ones, rank=2):
    return (
        random.standard_normal((rank, columns, *ones)).astype("<f4"),
        random.standard_normal((rows, rank, *(1 for _ in ones))).astype("<f4"),
    )


def by_definition(arrays, heights, metadata=None):
    """(part, Diffusers path) -> (up with its strength, down): what a file adds, from its layout alone.

    heights: rows of each Diffusers weight, by (part, path); a fused matrix is cut by them.
    """
    shapes = {name: TensorFact("F32", array.shape) for name, array in arrays.items()}
    added = {}
    for one in read_layout(shapes, metadata or {}).modules:
        down, up = (arrays[one.tensors[role]].astype("<f8") for role in ("down", "up"))
        alpha = float(arrays[one.tensors["alpha"]]) if "alpha" in one.tensors else len(down)
        up = alpha / len(down) * up.reshape(len(up), -1)
        if one.fused and one.module.row.form == "swapped":
            up = np.concatenate(np.split(up, 2)[::-1])
        paths = one.module.paths if one.fused else (one.path,)
        cuts = np.cumsum([heights[one.module.part, path] for path in paths])
        assert cuts[-1] == len(up)
        for path, piece in zip(paths, np.split(up, cuts[:-1]), strict=True):
            added[one.module.part, path] = piece, down.reshape(len(down), -1)
    return added


@pytest.fixture(scope="module")
def readers():
    """diffusers' own reading by family: a pipeline whose weights are zero, so that a merged LoRA is all they hold."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_families

    made = {}

    def reader(family):
        if family not in made:
            with torch.device("meta"):
                parts = tiny_families.build_parts(family)
            del parts["vae"]
            for part in parts.values():
                part.to_empty(device="cpu")
            no = {"vae": None, "scheduler": None, "tokenizer": None}
            if family == "sdxl":
                made[family] = diffusers.StableDiffusionXLPipeline(**parts, **no, tokenizer_2=None)
            elif family == "flux":
                made[family] = diffusers.FluxPipeline(**parts, **no, tokenizer_2=None)
            else:
                no |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
                made[family] = diffusers.StableDiffusionPipeline(**parts, **no)
        pipe = made[family]
        for part in pipe.components.values():
            for tensor in getattr(part, "parameters", list)():
                tensor.data.zero_()
        return pipe

    return reader


def weight_of(pipe, part, path):
    model = getattr(pipe, part)
    longer = f"text_model.{path}" if hasattr(model, "text_model") and path != "text_projection" else path
    return model.get_submodule(longer).weight.detach().numpy()


def added_by_diffusers(pipe, arrays, parts):
    """(part, path) -> what diffusers adds to a weight, for all that change."""
    import torch

    pipe.load_lora_weights({name: torch.from_numpy(array) for name, array in arrays.items()})
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return {
        (part, name.removeprefix("text_model.").removesuffix(".weight")): tensor.numpy().reshape(len(tensor), -1)
        for part in parts
        for name, tensor in getattr(pipe, part).state_dict().items()
        if name.endswith(".weight") and tensor.any()
    }


CONVOLUTIONS = ("down_blocks.1.resnets.0.", "up_blocks.1.upsamplers.0.", "down_blocks.0.downsamplers.0.", "conv_in")
PLACES = {
    "sd15": ("down_blocks.1.attentions.0.", "mid_block.attentions.0.", "time_embedding.linear_1", *CONVOLUTIONS),
    "sd21": ("down_blocks.1.attentions.0.", "mid_block.attentions.0.", "time_embedding.linear_1", *CONVOLUTIONS),
    "sdxl": (
        *("down_blocks.1.attentions.1.transformer_blocks.1.", "up_blocks.0.attentions.2.transformer_blocks.7."),
        *("down_blocks.1.attentions.1.proj_in", "add_embedding.linear_1", *CONVOLUTIONS),
    ),
}
LEAVES = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
TEXT_LEAVES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def some_layers(family):
    """Modules of a few blocks: everything in their transformers, and two layers of each text encoder."""
    for module in lora_modules(family):
        path = module.paths[0]
        if module.part.startswith("text"):
            if ".layers.3." in path or ".layers.11." in path or path == "text_projection":
                yield module
        elif path.startswith(PLACES[family]):
            yield module


def old_processor(part, path):
    leaf = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}
    stem, _, last = path.removesuffix(".0").rpartition(".")
    old = leaf.get(last, last)
    start = f"{part}.text_model.{stem}" if part.startswith("text") else f"{part}.{stem}.processor"
    return f"{start}.{old}_lora"


def original_path(module):
    return module.row.original.removeprefix("model.diffusion_model.").removesuffix(".weight")


def in_spelling(family, spelling, module):
    """(stem, endings) of a module, or None where a spelling has no name for it."""
    part, path = module.part, module.paths[0]
    text = part.startswith("text")
    dotted = f"{part}.text_model.{path}" if text and path != "text_projection" else f"{part}.{path}"
    attention = path.endswith((*LEAVES[:4], *TEXT_LEAVES[:4]))
    if spelling == "diffusers":
        return dotted, AB
    if spelling == "old":
        middle = "lora_linear_layer" if text else "lora"
        return dotted, (f"{middle}.down.weight", f"{middle}.up.weight")
    if spelling == "processor":
        return (old_processor(part, path), ("down.weight", "up.weight")) if attention else None
    if text and spelling == "comfyui":
        inside = f"text_model.{path}" if path != "text_projection" else path
        return f"text_encoders.clip_{'g' if part == 'text_encoder_2' else 'l'}.transformer.{inside}", AB
    if text:
        return f"lora_te2_{path}" if path == "text_projection" else text_rule(family)(part, path), DOWN_UP
    if spelling == "kohya":
        return "lora_unet_" + flat(original_path(module) if family == "sdxl" else path), DOWN_UP
    if spelling in ORIGINALS:
        prefix, written, sides = ORIGINALS[spelling]
        return prefix + written(original_path(module)), sides
    if path.startswith("add_embedding") and spelling == "kohya by diffusers' paths":
        return None  # diffusers does not find it under this name
    return ("lycoris_" if spelling == "simpletuner" else "lora_unet_") + flat(path), DOWN_UP


READ_BY_DIFFUSERS = [
    *(("sd15", spelling) for spelling in ("diffusers", "old", "processor", "kohya")),
    *(("sd21", spelling) for spelling in ("diffusers", "kohya")),
    *(("sdxl", spelling) for spelling in ("diffusers", "kohya", "kohya by diffusers' paths")),
]


def written_by(pipe, family, spelling):
    """A random LoRA of some layers in a spelling, and the rows of each weight."""
    random = np.random.default_rng(7)
    arrays, heights = {}, {}
    for module in some_layers(family):
        spelled = in_spelling(family, spelling, module)
        if spelled is not None:
            weight = weight_of(pipe, module.part, module.paths[0])
            heights[module.part, module.paths[0]] = len(weight)
            for ending, array in zip(spelled[1], matrices(random, *weight.shape[:2], *weight.shape[2:]), strict=True):
                arrays[f"{spelled[0]}.{ending}"] = array
    return arrays, heights


@pytest.mark.numeric
@pytest.mark.parametrize(("family", "spelling"), READ_BY_DIFFUSERS)
def test_a_stable_diffusion_lora_means_what_diffusers_reads_in_it(family, spelling, readers):
    pipe = readers(family)
    arrays, heights = written_by(pipe, family, spelling)
    ours = by_definition(arrays, heights)
    theirs = added_by_diffusers(pipe, arrays, {part for part, _ in heights})
    assert ours.keys() == theirs.keys() == heights.keys()
    for place, (up, down) in ours.items():
        assert_close_to(theirs[place], up @ down, of_largest=PRODUCTS, about=str(place))


def converted(arrays, folder):
    """What each conversion of a LoRA writes: into a file, and into a folder where that is another thing."""
    from safetensors.numpy import load_file, save_file

    save_file(arrays, folder / "in.safetensors")
    results = [load_file(convert_lora(folder / "in.safetensors", folder / "out.safetensors", **PLAIN).path)]
    facts = {name: TensorFact("F32", array.shape) for name, array in arrays.items()}
    if read_layout(facts, {}).naming not in ("diffusers", "peft"):
        convert_lora(folder / "in.safetensors", folder / "out", **PLAIN)
        results.append(load_file(folder / "out" / LORA_FILE))
    return results


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("family", "spelling"),
    [
        *(("sd15", spelling) for spelling in ("old", "processor", "kohya", "comfyui", "simpletuner")),
        ("sd21", "kohya"),
        *(("sdxl", spelling) for spelling in ("diffusers", "kohya", "comfyui", "peft")),
    ],
)
def test_diffusers_finds_in_what_is_converted_what_the_source_says(family, spelling, readers, tmp_path):
    pipe = readers(family)
    arrays, heights = written_by(pipe, family, spelling)
    wanted = by_definition(arrays, heights)
    for made in converted(arrays, tmp_path):
        found = added_by_diffusers(readers(family), made, {part for part, _ in heights})
        assert found.keys() == wanted.keys()
        for place, (up, down) in wanted.items():
            assert_close_to(found[place], up @ down, of_largest=PRODUCTS, about=str(place))


D, FM = 3072, 12288  # of Flux.1: diffusers takes its fused layers apart at these widths alone
FLUX = {  # original path -> (rows, columns, Diffusers paths with their rows)
    "double_blocks.3.img_attn.qkv": (3 * D, D, {f"transformer_blocks.3.attn.to_{x}": D for x in "qkv"}),
    "double_blocks.3.txt_attn.qkv": (3 * D, D, {f"transformer_blocks.3.attn.add_{x}_proj": D for x in "qkv"}),
    "double_blocks.3.img_attn.proj": (D, D, {"transformer_blocks.3.attn.to_out.0": D}),
    "double_blocks.3.txt_attn.proj": (D, D, {"transformer_blocks.3.attn.to_add_out": D}),
    "double_blocks.3.img_mlp.0": (FM, D, {"transformer_blocks.3.ff.net.0.proj": FM}),
    "double_blocks.3.img_mlp.2": (D, FM, {"transformer_blocks.3.ff.net.2": D}),
    "double_blocks.3.txt_mlp.0": (FM, D, {"transformer_blocks.3.ff_context.net.0.proj": FM}),
    "double_blocks.3.img_mod.lin": (6 * D, D, {"transformer_blocks.3.norm1.linear": 6 * D}),
    "double_blocks.3.txt_mod.lin": (6 * D, D, {"transformer_blocks.3.norm1_context.linear": 6 * D}),
    "single_blocks.37.linear1": (
        3 * D + FM,
        D,
        {f"single_transformer_blocks.37.{x}": D for x in ("attn.to_q", "attn.to_k", "attn.to_v")}
        | {"single_transformer_blocks.37.proj_mlp": FM},
    ),
    "single_blocks.37.linear2": (D, D + FM, {"single_transformer_blocks.37.proj_out": D}),
    "single_blocks.37.modulation.lin": (3 * D, D, {"single_transformer_blocks.37.norm.linear": 3 * D}),
    "final_layer.adaLN_modulation.1": (2 * D, D, {"norm_out.linear": 2 * D}),
    "final_layer.linear": (64, D, {"proj_out": 64}),
    "img_in": (D, 64, {"x_embedder": D}),
    "time_in.in_layer": (D, 256, {"time_text_embed.timestep_embedder.linear_1": D}),
    "vector_in.in_layer": (D, 768, {"time_text_embed.text_embedder.linear_1": D}),
}
XLABS = {
    "double_blocks.3.img_attn.qkv": "processor.qkv_lora1",
    "double_blocks.3.txt_attn.qkv": "processor.qkv_lora2",
    "double_blocks.3.img_attn.proj": "processor.proj_lora1",
    "double_blocks.3.txt_attn.proj": "processor.proj_lora2",
    "single_blocks.37.linear2": "processor.proj_lora",
}
PREFIXES = {
    "kohya": ("lora_unet_", DOWN_UP),
    "ai-toolkit": ("diffusion_model.", DOWN_UP),
    "comfyui": ("diffusion_model.", AB),
}


def flux_stems(spelling):
    """Stem -> (endings, rows, columns) in a spelling."""
    for original, (rows, columns, paths) in FLUX.items():
        if spelling == "xlabs":
            if original in XLABS:
                stem = ".".join([*original.split(".")[:2], XLABS[original]])
                yield stem, ("down.weight", "up.weight"), rows, columns
            elif original.endswith("linear1"):  # without the inner layer that lies beside query, key and value
                yield "single_blocks.37.processor.qkv_lora", ("down.weight", "up.weight"), 3 * D, columns
        elif spelling in PREFIXES:
            prefix, endings = PREFIXES[spelling]
            yield prefix + (flat(original) if spelling == "kohya" else original), endings, rows, columns
        else:
            for path, height in paths.items():
                if spelling == "diffusers":
                    yield f"transformer.{path}", AB, height, columns
                elif "attn." in path or path in ("proj_out", "norm_out.linear", "x_embedder") or "embed." in path:
                    yield "lora_transformer_" + flat(path), DOWN_UP, height, columns


FLUX_HEIGHTS = {("transformer", path): rows for _, _, paths in FLUX.values() for path, rows in paths.items()}
WITH_ALPHA = ("kohya", "comfyui", "ai-toolkit", "onetrainer")


def flux_written_by(spelling, alpha):
    random = np.random.default_rng(3)
    arrays = {}
    for stem, endings, rows, columns in flux_stems(spelling):
        for ending, array in zip(endings, matrices(random, rows, columns, rank=3), strict=True):
            arrays[f"{stem}.{ending}"] = array
        if spelling == "onetrainer" or (alpha and spelling in WITH_ALPHA):
            # diffusers forgets the alpha of the final layer.
            arrays[f"{stem}.alpha"] = np.array(3 if "final_layer" in stem or not alpha else 2, "<f4")
    return arrays


PROBES = {
    columns: np.random.default_rng(columns).standard_normal((columns, 2)) for columns in (64, 256, 768, D, FM, D + FM)
}


def flux_by_definition(arrays):
    """Diffusers path -> what the change of a layer makes of two random vectors: the change itself is too large."""
    factors = by_definition(arrays, FLUX_HEIGHTS)
    return {path: up @ (down @ PROBES[down.shape[1]]) for (_, path), (up, down) in factors.items()}


def flux_by_diffusers(arrays):
    import torch
    from diffusers import FluxPipeline

    read = FluxPipeline.lora_state_dict({name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()})
    found = {}
    for name, down in read.items():
        if name.endswith(".lora_A.weight"):
            up = read[name.replace(".lora_A.", ".lora_B.")].numpy().astype("<f8")
            path = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            found[path] = up @ (down.numpy().astype("<f8") @ PROBES[down.shape[1]])
    return found


def assert_same_changes(found, wanted):
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        assert_close_to(found[path], change, of_largest=PRODUCTS, about=path)


@pytest.mark.numeric
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("spelling", ["diffusers", *PREFIXES, "onetrainer", "xlabs"])
def test_a_flux_lora_means_what_diffusers_reads_in_it(spelling, alpha):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    arrays = flux_written_by(spelling, alpha)
    given = arrays
    if spelling == "comfyui":  # diffusers reads these paths with the other endings alone
        given = {name.replace(*AB_TO_DOWN).replace(*AB_TO_UP): array for name, array in arrays.items()}
    assert_same_changes(flux_by_diffusers(given), flux_by_definition(arrays))


@pytest.mark.numeric
@pytest.mark.parametrize("spelling", ["diffusers", *PREFIXES, "onetrainer", "xlabs"])
def test_diffusers_finds_in_a_converted_flux_lora_what_the_source_says(spelling, tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    arrays = flux_written_by(spelling, alpha=False)
    for made in converted(arrays, tmp_path):
        # A matrix of which one piece is not changed has zeros there.
        found = {path: change for path, change in flux_by_diffusers(made).items() if change.any()}
        assert_same_changes(found, flux_by_definition(arrays))


# ------------------------------------------------------------------------------------------ as peft and diffusers write


@pytest.mark.numeric
@pytest.mark.parametrize("writer", ["save_lora_adapter", "save_pretrained"])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_what_the_real_writers_save_is_converted_with_its_strength(family, writer, readers, tmp_path):
    import peft
    import torch
    from safetensors.numpy import load_file

    pipe = readers(family)
    part = "transformer" if family == "flux" else "unet"
    model = getattr(pipe, part)
    targets = [path for _, _, paths in FLUX.values() for path in paths] if family == "flux" else []
    targets = targets or [module.paths[0] for module in some_layers(family) if module.part == part]
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=targets)
    torch.manual_seed(4)
    if writer == "save_lora_adapter":
        model.add_adapter(config)
        model.save_lora_adapter(tmp_path / "saved")
        [source] = (tmp_path / "saved").glob("*.safetensors")
    else:
        wrapped = peft.get_peft_model(model, config)
        wrapped.save_pretrained(tmp_path / "saved")
        source = tmp_path / "saved"
    wanted, heights = {}, {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            wanted[part, name] = layer.get_delta_weight("default").detach().numpy()
        if getattr(layer, "weight", None) is not None:
            heights[part, name] = len(layer.weight)
    if writer == "save_lora_adapter":
        model.unload_lora()
    else:
        wrapped.unload()
    made = convert_lora(source, tmp_path / "kohya.safetensors", **PLAIN)
    found = by_definition(load_file(made.path), heights)
    for place, change in wanted.items():
        up, down = found[place]
        assert_close_to(up @ down, change.reshape(len(change), -1), of_largest=PRODUCTS, about=str(place))
    rest = [place for place in found.keys() - wanted.keys() if found[place][0].any()]
    assert not rest


# --------------------------------------------------------------------------------------- what diffusers has no name for


def test_zeros_for_embeddings_are_left_out_and_numbers_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    stem, table = "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_embeddings_position_embedding"
    random = np.random.default_rng(1)
    arrays = {
        f"{name}.{ending}": array
        for name in (stem, table)
        for ending, array in zip(DOWN_UP, matrices(random, 8, 6), strict=True)
    }
    save_file({**arrays, f"{table}.{DOWN_UP[1]}": np.zeros((8, 2), "<f4")}, tmp_path / "zeros.safetensors")
    written = convert_lora(tmp_path / "zeros.safetensors", tmp_path / "out.safetensors", **PLAIN)
    assert len(load_file(written.path)) == 2
    assert any("1 all-zero layers of embeddings" in note for note in written.notes)
    save_file(arrays, tmp_path / "numbers.safetensors")
    with pytest.raises(CheckpointError, match="changes 'text_model_embeddings_position_embedding', neither a linear"):
        convert_lora(tmp_path / "numbers.safetensors", tmp_path / "other.safetensors", **PLAIN)
    assert not (tmp_path / "other.safetensors").exists()


def test_layers_of_t5_are_kept_both_ways_and_what_diffusers_leaves_out_is_said(tmp_path):
    from safetensors.numpy import load_file, save_file

    random = np.random.default_rng(2)
    stems = (
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0",
    )
    arrays = {
        f"{stem}.{ending}": array
        for stem in stems
        for ending, array in zip(DOWN_UP, matrices(random, 8, 6), strict=True)
    }
    save_file(arrays, tmp_path / "kohya.safetensors")
    there = convert_lora(tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors", **PLAIN)
    assert any("2 layers change T5; diffusers' Flux.1 pipeline does not load those" in note for note in there.notes)
    back = load_file(convert_lora(there.path, tmp_path / "back.safetensors", **PLAIN).path)
    for name, array in arrays.items():
        assert np.array_equal(back[name], array)
