"""`convert --merge`: every weight becomes W + strength * change, whatever the model's and the adapter's layout."""

import json
from contextlib import ExitStack

import pytest

pytest.importorskip("numpy")
import numpy as np
from closeness import assert_close_to
from merge_models import (
    FAMILIES,
    ROUNDING,
    TO_K,
    array,
    assert_merged,
    diffusers_lora,
    kohya,
    noise,
    stored,
    weights_of,
)
from table_models import folder, read, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, TensorFact
from fastsd_helpers.checkpoints.lora.modules import lora_modules
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.errors import CheckpointError

UNET_FILE = "diffusion_pytorch_model.safetensors"


# ------------------------------------------------------------------------------------------------ every way


@pytest.mark.parametrize(("family", "lora"), [("sd15", "lora"), ("sdxl", "kohya"), ("flux", "kohya"), ("flux", "lora")])
def test_a_folder_stays_a_folder_with_every_layer_changed(family, lora, merge_models, place):
    home, before, added = merge_models(family)
    asked = f"{home / lora}.safetensors:0.7"
    written = checkpoints.convert(home / "model", place / "merged", merge=[asked], verify=lora == "lora")
    assert_merged(place / "merged", before, added, 0.7)
    assert any("was merged with strength 0.7" in note for note in written.notes)
    index = "model_index.json"
    assert (place / "merged" / index).read_bytes() == (home / "model" / index).read_bytes()


@pytest.mark.parametrize(("family", "lora"), [("sd15", "kohya"), ("sd21", "lora"), ("flux", "lora"), ("flux", "kohya")])
def test_a_file_and_a_folder_become_the_same_merged_file(family, lora, merge_models, place):
    home, before, added = merge_models(family)
    asked = [f"{home / lora}.safetensors:-1.5"]
    given = {"verify": family == "sd21", "merge": asked, "all_in_one": True}
    checkpoints.convert(home / "model", place / "one.safetensors", **given)
    checkpoints.convert(home / "model.safetensors", place / "two.safetensors", **given)
    one, two = read(place / "one.safetensors"), read(place / "two.safetensors")
    assert one.keys() == two.keys()
    for name, entry in one.items():
        assert_close_to(array(two[name]), array(entry), of_largest=ROUNDING, about=name)
    checkpoints.convert(place / "one.safetensors", place / "folder")
    assert_merged(place / "folder", before, added, -1.5)


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_a_file_becomes_a_merged_folder(family, merge_models, place):
    home, before, added = merge_models(family)
    asked = [f"{home / 'kohya'}.safetensors:0.7"]
    checkpoints.convert(home / "model.safetensors", place / "folder", merge=asked)
    assert_merged(place / "folder", before, added, 0.7)


def test_a_ckpt_is_read_and_written(merge_models, place):
    pytest.importorskip("torch")
    home, before, added = merge_models("sd15")
    checkpoints.convert(home / "model.safetensors", place / "model.ckpt")
    asked = [f"{home / 'kohya'}.safetensors:0.7"]
    checkpoints.convert(place / "model.ckpt", place / "merged.ckpt", merge=asked, verify=True)
    checkpoints.convert(place / "merged.ckpt", place / "folder")
    assert_merged(place / "folder", before, added, 0.7)


@pytest.mark.parametrize(
    ("source", "dtype", "rounding"),
    [("F32", "fp16", 2**-11), ("F16", "keep", 2**-11), ("F16", "fp32", ROUNDING), ("F16", "bf16", 2**-8)],
)
def test_the_sum_is_rounded_once_to_the_format_that_is_wanted(source, dtype, rounding, place):
    folder(place / "model", "sd15", source)
    tensors, metadata, added = diffusers_lora("sd15")
    write(place / "lora.safetensors", tensors, metadata)
    asked = [f"{place / 'lora.safetensors'}:0.7"]
    checkpoints.convert(place / "model", place / "merged", merge=asked, dtype=dtype, verify=True)
    before, after = weights_of(place / "model"), weights_of(place / "merged")
    stored_as = {fact.dtype for fact in SafetensorsFile(place / "merged" / "unet" / UNET_FILE).tensors.values()}
    assert stored_as == {{"fp16": "F16", "fp32": "F32", "bf16": "BF16", "keep": source}[dtype]}
    for (part, path), change in added.items():
        weight = before[part, f"{path}.weight"]
        wanted = weight + 0.7 * change.reshape(weight.shape)
        error = np.abs(after[part, f"{path}.weight"] - wanted)
        assert (error <= rounding * np.abs(wanted) + 1e-6).all(), path


def test_weights_in_shards_and_a_variant_are_merged_where_they_lie(place):
    folder(place / "model", "sd15")
    unet = place / "model" / "unet"
    entries = {}
    for name, (kind, shape, content) in read(unet / UNET_FILE).items():
        entries[name] = TensorFact(kind, shape), content
    names = sorted(entries)
    homes = {}
    for number, chosen in enumerate((names[::2], names[1::2]), 1):
        home = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        write(unet / home, {name: entries[name] for name in chosen})
        homes |= dict.fromkeys(chosen, home)
    (unet / UNET_FILE).unlink()
    (unet / f"{UNET_FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    tensors, metadata, added = diffusers_lora("sd15")
    write(place / "lora.safetensors", tensors, metadata)
    before = weights_of(place / "model")
    checkpoints.convert(place / "model", place / "merged", merge=[str(place / "lora.safetensors")], verify=True)
    assert sorted(path.name for path in (place / "merged" / "unet").glob("*-of-*")) == sorted(set(homes.values()))
    assert_merged(place / "merged", before, added, 1.0)


def test_several_loras_add_up_in_any_order_and_the_same_one_twice(merge_models, place):
    home, before, added = merge_models("sd15")
    first = f"{home / 'lora'}.safetensors:0.5"
    second = f"{home / 'kohya'}.safetensors:0.25"
    for name, asked in (("one", [first, second]), ("two", [second, first]), ("three", [first, first])):
        checkpoints.convert(home / "model", place / name, merge=asked)
        assert_merged(place / name, before, added, 1.0 if name == "three" else 0.75)


def test_a_text_encoder_alone_takes_its_share_of_a_lora_and_the_rest_is_named(merge_models, place):
    home, before, added = merge_models("sd15")
    asked = [f"{home / 'kohya'}.safetensors:0.7"]
    written = checkpoints.convert(home / "model" / "text_encoder", place / "clip", merge=asked, verify=True)
    (path,) = (place / "clip").glob("*.safetensors")
    for name, entry in read(path).items():
        key = "text_encoder", name.removeprefix("text_model.")
        change = added.get((key[0], key[1].removesuffix(".weight")), 0) if name.endswith(".weight") else 0
        assert_close_to(array(entry), before[key] + 0.7 * change, of_largest=ROUNDING, about=name)
    assert any("also changes the U-Net" in note for note in written.notes)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "flux"])
def test_a_lora_of_a_text_encoder_alone_is_merged_into_every_family_that_has_such_layers(family, merge_models, place):
    home, before, _ = merge_models(family)
    path = "encoder.layers.3.mlp.fc1"
    rows, columns = before["text_encoder", f"{path}.weight"].shape
    down, up = noise(2, columns, seed=1), noise(rows, 2, seed=2)
    name = f"text_encoder.text_model.{path}"
    write(place / "te.safetensors", {f"{name}.lora_A.weight": stored(down), f"{name}.lora_B.weight": stored(up)})
    checkpoints.convert(home / "model", place / "merged", merge=[str(place / "te.safetensors")])
    assert_merged(place / "merged", before, {("text_encoder", path): up.astype("<f8") @ down}, 1)


def test_a_lora_whose_layers_the_family_does_not_have_is_refused(merge_models, place):
    home, _, _ = merge_models("sd15")
    other, _, _ = merge_models("sdxl")
    with pytest.raises(CheckpointError, match=r"is a LoRA for SDXL in .*; the model is SD 1\.5"):
        checkpoints.convert(home / "model", place / "merged", merge=[str(other / "lora.safetensors")])
    assert not (place / "merged").exists()


def test_a_flux_file_names_the_text_encoder_that_it_does_not_hold(merge_models, place):
    home, before, added = merge_models("flux")
    written = checkpoints.convert(home / "model", place / "f.safetensors", merge=[f"{home / 'lora'}.safetensors:0.7"])
    assert any("also changes the text encoder" in note for note in written.notes)
    checkpoints.convert(place / "f.safetensors", place / "transformer")
    (path,) = (place / "transformer").glob("*.safetensors")
    for name, entry in read(path).items():
        change = added.get(("transformer", name.removesuffix(".weight")), 0) if name.endswith(".weight") else 0
        wanted = before["transformer", name] + 0.7 * change
        assert_close_to(array(entry), wanted, of_largest=ROUNDING, about=name)
    vae = {name.partition(".")[0] for name in read(place / "ae.safetensors")}
    assert vae == {"encoder", "decoder"}


# ------------------------------------------------------------------------------------------------ other kinds, biases

CONV = "down_blocks.1.resnets.0.conv1"
NORM = "down_blocks.1.resnets.0.norm1"


def merged_unet(place, tensors, asked=":0.7", metadata=None):
    """The U-Net's weights before and after merging an adapter of these tensors."""
    folder(place / "model", "sd15")
    write(place / "adapter.safetensors", tensors, metadata)
    asked = [f"{place / 'adapter.safetensors'}{asked}"]
    written = checkpoints.convert(place / "model", place / "merged", merge=asked, verify=True)
    return weights_of(place / "model"), weights_of(place / "merged"), written


def only_changes(before, after, *names):
    changed = {key for key, values in before.items() if not np.array_equal(values, after[key])}
    assert changed == {("unet", name) for name in names}


def test_lyco_kinds_of_one_file_are_each_merged_by_their_definition(place):
    tensors = {
        f"{kohya(TO_K)}.lokr_w1": stored(noise(2, 4, seed=1)),
        f"{kohya(TO_K)}.lokr_w2_a": stored(noise(4, 2, seed=2)),
        f"{kohya(TO_K)}.lokr_w2_b": stored(noise(2, 6, seed=3)),
        f"{kohya(TO_K)}.alpha": stored(1.0),
        f"{kohya(CONV)}.hada_w1_a": stored(noise(16, 3, seed=4)),
        f"{kohya(CONV)}.hada_w1_b": stored(noise(3, 72, seed=5)),
        f"{kohya(CONV)}.hada_w2_a": stored(noise(16, 3, seed=6)),
        f"{kohya(CONV)}.hada_w2_b": stored(noise(3, 72, seed=7)),
        f"{kohya(CONV)}.alpha": stored(6.0),
        f"{kohya(NORM)}.w_norm": stored(noise(8, seed=8)),
        f"{kohya(NORM)}.b_norm": stored(noise(8, seed=9)),
    }
    before, after, _ = merged_unet(place, tensors)
    values = {name: np.frombuffer(content, "<f4").reshape(fact.shape) for name, (fact, content) in tensors.items()}
    second = values[f"{kohya(TO_K)}.lokr_w2_a"] @ values[f"{kohya(TO_K)}.lokr_w2_b"]
    kron = np.kron(values[f"{kohya(TO_K)}.lokr_w1"], second)
    halves = [values[f"{kohya(CONV)}.hada_w{n}_a"] @ values[f"{kohya(CONV)}.hada_w{n}_b"] for n in "12"]
    wanted = {
        f"{TO_K}.weight": 1 / 2 * kron,
        f"{CONV}.weight": (6 / 3 * halves[0] * halves[1]).reshape(16, 8, 3, 3),
        f"{NORM}.weight": values[f"{kohya(NORM)}.w_norm"],
        f"{NORM}.bias": values[f"{kohya(NORM)}.b_norm"],
    }
    only_changes(before, after, *wanted)
    for name, change in wanted.items():
        assert_close_to(after["unet", name], before["unet", name] + 0.7 * change, of_largest=ROUNDING, about=name)


def test_biases_of_peft_and_of_full_differences_are_added_to_the_models_biases(place):
    up = "up_blocks.1.attentions.0.proj_in"
    tensors = {
        f"unet.{CONV}.lora_A.weight": stored(noise(2, 8, 3, 3, seed=1)),
        f"unet.{CONV}.lora_B.weight": stored(noise(16, 2, 1, 1, seed=2)),
        f"unet.{CONV}.lora_B.bias": stored(noise(16, seed=3)),
        f"unet.{up}.diff": stored(noise(32, 32, 1, 1, seed=4)),
        f"unet.{up}.diff_b": stored(noise(32, seed=5)),
    }
    said = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1})}
    before, after, _ = merged_unet(place, tensors, metadata=said)
    only_changes(before, after, f"{CONV}.weight", f"{CONV}.bias", f"{up}.weight", f"{up}.bias")
    bias = before["unet", f"{CONV}.bias"] + 0.7 * 0.5 * noise(16, seed=3)
    assert_close_to(after["unet", f"{CONV}.bias"], bias, of_largest=ROUNDING)
    assert_close_to(
        after["unet", f"{up}.bias"], before["unet", f"{up}.bias"] + 0.7 * noise(32, seed=5), of_largest=ROUNDING
    )


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_a_dora_of_a_fused_layer_has_the_lengths_of_the_whole_wherever_its_rows_lie(on_input, single, place):
    folder(place / "model", "flux-all-in-one")
    before = weights_of(place / "model")
    paths = [f"transformer_blocks.0.attn.to_{leaf}" for leaf in "qkv"]
    weight = np.concatenate([before["transformer", f"{path}.weight"] for path in paths])
    height, width = weight.shape
    down, up = noise(2, width, seed=1), noise(height, 2, seed=2)
    lengths = np.abs(noise(width if on_input else height, seed=3)) + 0.5
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": stored(down),
        f"{name}.lora_up.weight": stored(up),
        f"{name}.alpha": stored(4.0),
        f"{name}.dora_scale": stored(lengths.reshape((1, -1) if on_input else (-1, 1))),
    }
    write(place / "adapter.safetensors", tensors)
    asked = {"merge": [f"{place / 'adapter.safetensors'}:0.5"], "verify": True, "all_in_one": True}
    if single:
        checkpoints.convert(place / "model", place / "f.safetensors", **asked)
        checkpoints.convert(place / "f.safetensors", place / "merged")
    else:
        checkpoints.convert(place / "model", place / "merged", **asked)
    after = weights_of(place / "merged")
    changed = weight + 2.0 * up @ down
    norms = np.sqrt((changed**2).sum(axis=0 if on_input else 1, keepdims=True))
    wanted = weight + 0.5 * (changed / norms * lengths.reshape((1, -1) if on_input else (-1, 1)) - weight)
    found = np.concatenate([after["transformer", f"{path}.weight"] for path in paths])
    assert_close_to(found, wanted, of_largest=ROUNDING)


@pytest.mark.parametrize("turned", [False, True])
def test_a_dora_of_a_transposed_layer_is_that_of_the_weight_it_means(turned, place):
    folder(place / "model", "sdxl")
    before = weights_of(place / "model")
    weight = before["text_encoder_2", "text_projection.weight"]
    size = len(weight)
    down, up, lengths = noise(2, size, seed=1), noise(size, 2, seed=2), np.abs(noise(size, seed=3)) + 0.5
    name = "lora_te2_text_projection"
    tensors = {
        f"{name}.lora_down.weight": stored(down),
        f"{name}.lora_up.weight": stored(up),
        f"{name}.alpha": stored(2.0),
        f"{name}.dora_scale": stored(lengths.reshape(-1, 1)),
    }
    write(place / "adapter.safetensors", tensors)
    asked = [f"{place / 'adapter.safetensors'}:0.5"]
    if turned:  # the file has it transposed
        checkpoints.convert(place / "model", place / "f.safetensors")
        checkpoints.convert(place / "f.safetensors", place / "g.safetensors", merge=asked, verify=True)
        checkpoints.convert(place / "g.safetensors", place / "merged")
    else:
        checkpoints.convert(place / "model", place / "merged", merge=asked, verify=True)
    changed = weight + up @ down
    norms = np.sqrt((changed**2).sum(axis=1, keepdims=True))
    wanted = weight + 0.5 * (changed / norms * lengths[:, None] - weight)
    after = weights_of(place / "merged")
    assert_close_to(after["text_encoder_2", "text_projection.weight"], wanted, of_largest=ROUNDING)
    assert sum(not np.array_equal(values, after[key]) for key, values in before.items()) == 1


# ------------------------------------------------------------------------------------------------ as diffusers merges


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_a_merge_is_what_diffusers_fuses(family, place):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    import tiny_families

    from fastsd_helpers.checkpoints.formats.tensor_stream import stream
    from fastsd_helpers.checkpoints.models.merge import Merging, open_adapters
    from fastsd_helpers.checkpoints.models.parts import open_parts

    with torch.device("meta"):
        parts = tiny_families.build_parts(family)
    tiny_families.fill(parts, 3)
    before = {
        part: {name: tensor.clone() for name, tensor in model.state_dict().items()} for part, model in parts.items()
    }
    tensors, modules = {}, 0
    targets = {part: [] for part in before}
    for module in lora_modules(family):
        if module.part == "text_encoder_2" and (family == "flux" or module.paths[0] == "text_projection"):
            continue  # diffusers does not read them
        for path in module.paths:
            longer = f"text_model.{path}" if module.part.startswith("text") else path
            state = before[module.part]
            name = f"{longer}.weight" if f"{longer}.weight" in state else f"{path}.weight"
            if name not in state:
                continue
            shape = state[name].shape
            ones = (1,) * len(shape[2:])
            stem = f"{module.part}.{longer}"
            tensors[f"{stem}.lora_A.weight"] = stored(noise(3, *shape[1:], seed=modules))
            tensors[f"{stem}.lora_B.weight"] = stored(noise(shape[0], 3, *ones, seed=modules + 7))
            targets[module.part].append(path)
            modules += 1
    said = {}
    for part, paths in targets.items():
        said |= {f"{part}.r": 3, f"{part}.lora_alpha": 2.0, f"{part}.target_modules": paths} if paths else {}
    write(place / "lora.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)})
    no = {"vae": parts["vae"], "scheduler": None, "tokenizer": None}
    own = {part: model for part, model in parts.items() if part != "vae"}
    if family == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**own, **no, tokenizer_2=None, add_watermarker=False)
    elif family == "flux":
        pipe = diffusers.FluxPipeline(**own, **no, tokenizer_2=None)
    else:
        no |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**own, **no)
    pipe.load_lora_weights(place, weight_name="lora.safetensors")
    pipe.fuse_lora(components=[part for part, paths in targets.items() if paths], lora_scale=0.7)
    pipe.unload_lora_weights()
    fused = {part: getattr(pipe, part).state_dict() for part in before}
    changed = sum(
        not torch.equal(fused[part][name], tensor) for part in before for name, tensor in before[part].items()
    )
    assert changed == modules > 100
    table = find_family(FAMILIES[family])
    with ExitStack() as stack:
        merging = Merging(open_adapters([f"{place / 'lora.safetensors'}:0.7"], stack))
        ours = merging.into_parts(stack.enter_context(open_parts(table, before))).recipes("keep")
        theirs = stack.enter_context(open_parts(table, fused)).recipes("keep")
        assert ours.keys() == theirs.keys()
        pieces = zip(stream(sorted(ours.items())), stream(sorted(theirs.items())), strict=True)
        for (name, own_values, _), (_, their_values, _) in pieces:
            found, wanted = (np.frombuffer(bytes(values), "<f4") for values in (own_values, their_values))
            assert_close_to(found, wanted, of_largest=ROUNDING, about=name)


def test_the_lora_of_the_benchmark_changes_every_layer_of_its_model(place):
    from fastsd_helpers.bench.convert import make_folder, make_lora

    make_folder(place / "model", 16)
    lora = make_lora(place / "lora.safetensors", 16)
    checkpoints.convert(place / "model", place / "merged", merge=[f"{lora}:0.7"])
    before, after = weights_of(place / "model"), weights_of(place / "merged")
    changed = {key for key, values in before.items() if not np.array_equal(values, after[key])}
    assert len(changed) == len(read(lora)) // 2 > 300
