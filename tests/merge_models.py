"""Small models, LoRA of every layer of theirs, and what merging has to make of them; with numpy alone."""

import json

import numpy as np
from closeness import assert_close_to
from table_models import folder, read, widths_of, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.lora.modules import lora_modules
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import part_shapes

# Of the largest value: W + strength * scale * up @ down in fp32, with ranks of at most 8.
ROUNDING = 1e-6
FAMILIES = {"sd15": "sd15", "sd21": "sd21", "sdxl": "sdxl", "flux": "flux-all-in-one"}  # whose LoRA -> table


def array(entry):
    dtype, shape, content = entry
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    return np.frombuffer(content, kinds[dtype]).astype("<f8").reshape(shape)


def stored(values, kind="<f4"):
    names = {"<f2": "F16", "<f4": "F32", "<f8": "F64", "<i4": "I32"}
    values = np.asarray(values)
    return TensorFact(names[kind], values.shape), values.astype(kind).tobytes()


def noise(*shape, seed=0, size=0.3):
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype("<f4")


def shapes_of(key):
    """(part, Diffusers name) -> shape, at the small widths."""
    widths = widths_of(key)
    return {
        (row.part, name): shape
        for row in find_family(key).rows
        for name, shape in zip(row.diffusers, part_shapes(row, widths), strict=False)
    }


def every_layer(family, *, text=True):
    """Modules and the shapes of their Diffusers weights, for all that the small model has."""
    shapes = shapes_of(FAMILIES[family])
    for module in lora_modules(family):
        own = [shapes.get((module.part, f"{path}.weight")) for path in module.paths]
        if all(own) and (text or not module.part.startswith("text")):
            yield module, own


def diffusers_lora(family, *, rank=2, alpha=3.0, text=True):
    """(tensors, metadata, (part, path) -> what it adds): a LoRA of every layer in diffusers' names."""
    tensors, added, parts = {}, {}, set()
    for module, shapes in every_layer(family, text=text):
        longer = module.part.startswith("text") and module.row.original.startswith("text_model.")
        for path, shape in zip(module.paths, shapes, strict=True):
            seed = len(added)
            down, up = noise(rank, *shape[1:], seed=seed), noise(shape[0], rank, seed=-seed % 9973)
            name = f"{module.part}.{'text_model.' if longer else ''}{path}"
            tensors[f"{name}.lora_A.weight"] = stored(down)
            tensors[f"{name}.lora_B.weight"] = stored(up.reshape(*up.shape, *(1,) * len(shape[2:])))
            added[module.part, path] = alpha / rank * np.tensordot(up.astype("<f8"), down.astype("<f8"), 1)
            parts.add(module.part)
    said = {f"{part}.{key}": value for part in sorted(parts) for key, value in (("r", rank), ("lora_alpha", alpha))}
    return tensors, {"lora_adapter_metadata": json.dumps(said)}, added


def weights_of(model):
    """(part, name) -> values, of a whole Diffusers folder; text encoders without `text_model.`"""
    found = {}
    for path in sorted(model.glob("*/*.safetensors")):
        for name, entry in read(path).items():
            found[path.parent.name, name.removeprefix("text_model.")] = array(entry)
    return found


def assert_merged(model, before, added, strength):
    after = weights_of(model)
    assert after.keys() == before.keys()
    for (part, name), weight in before.items():
        change = added.get((part, name.removesuffix(".weight")), 0) if name.endswith(".weight") else 0
        wanted = weight + strength * np.reshape(change, weight.shape if np.ndim(change) else ())
        assert_close_to(after[part, name], wanted, of_largest=ROUNDING, about=f"{part} {name}")


def make_model(home, family):
    """A folder, the same as a file, a LoRA of every layer in diffusers' and in the family's other names.

    Returns:
        Their home, the weights, and what the LoRA adds.
    """
    tensors, metadata, added = diffusers_lora(family)
    folder(home / "model", FAMILIES[family])
    write(home / "lora.safetensors", tensors, metadata)
    checkpoints.convert(home / "lora.safetensors", home / "kohya.safetensors")
    checkpoints.convert(home / "model", home / "model.safetensors", all_in_one=True)
    return home, weights_of(home / "model"), added


TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def kohya(path):
    return "lora_unet_" + path.replace(".", "_")
