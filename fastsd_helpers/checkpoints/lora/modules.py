"""The modules a LoRA can change, and every path that files spell them by, from the families' own name tables.

Where a path is written with underscores it cannot be taken apart again by rule (`to_out_0`, `time_embed`), so every
name is looked up. Source: kohya-ss/sd-scripts networks/lora.py and networks/lora_flux.py; Nerogar/OneTrainer
modules/util/convert_lora_util.py; XLabs-AI/x-flux src/flux/modules/layers.py; comfy/lora.py of ComfyUI; diffusers
loaders/lora_conversion_utils.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import Row

__all__ = ["LORA_FAMILIES", "Module", "Target", "every_module", "lora_modules", "parts_of", "spelled_paths"]

LORA_FAMILIES = ("sd15", "sd21", "sdxl", "flux")

# Per family: Diffusers part -> its table, and the prefixes kohya-style files have for it; the first is written.
_TEXT: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "sd15": {"text_encoder": ("clip-l", ("lora_te_",))},
    "sd21": {"text_encoder": ("clip-h", ("lora_te_",))},
    "sdxl": {"text_encoder": ("clip-l", ("lora_te1_",)), "text_encoder_2": ("clip-g", ("lora_te2_",))},
    # kohya counts T5 as the third (as in SD3), OneTrainer as the second.
    "flux": {"text_encoder": ("clip-l", ("lora_te1_",)), "text_encoder_2": ("t5", ("lora_te3_", "lora_te2_"))},
}
# What attention processors call their matrices: diffusers before 0.17 and XLabs.
_PROCESSORS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_TEXT_PROCESSORS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear2": "processor.proj_lora",
}


@dataclass(frozen=True)
class Module:
    """One layer of the file with kohya's names, and the layers of Diffusers that it covers.

    part: the Diffusers part.
    paths: Diffusers' module paths; several where the original has them in one matrix (Flux).
    kohya: its name, without the ending.
    aliases: other names that kohya-style files have for it.
    row: the table row of its weight.
    """

    part: str
    paths: tuple[str, ...]
    kohya: str
    aliases: tuple[str, ...]
    row: Row


@dataclass(frozen=True)
class Target:
    """What a spelled path means: a module, and which of its Diffusers paths; none means the original's own matrix."""

    module: Module
    path: str = ""


@cache
def parts_of(family: str) -> dict[str, str]:
    """What the names in files call a part -> the Diffusers part of a family that it is."""
    texts = _TEXT[family]
    own = {part: part for part in texts} | {table.replace("-", "_"): part for part, (table, _starts) in texts.items()}
    return {"denoiser": "transformer" if family == "flux" else "unet", **own}


@cache
def every_module(family: str) -> tuple[Module, ...]:
    """Every module of a family (sd15, sd21, sdxl, flux) that has a weight, norms and embeddings among them."""
    modules = [
        _of_denoiser(family, row)
        for row in find_family(family).rows
        if row.part in ("unet", "transformer") and row.original.endswith((".weight", ".scale"))
    ]
    for part, (table, starts) in _TEXT[family].items():
        for row in find_family(table).rows:
            if not row.original.endswith(".weight"):
                continue
            (path,) = _paths(row)
            # transformers from 5.6 on leaves text_model out, and so do LoRA written with it.
            longs = (f"text_model.{path}", path) if row.original.startswith("text_model.") else (path,)
            names = [start + long.replace(".", "_") for start in starts for long in longs]
            modules.append(Module(part, (path,), names[0], tuple(names[1:]), row))
    return tuple(modules)


@cache
def lora_modules(family: str) -> tuple[Module, ...]:
    """The modules of a family (sd15, sd21, sdxl, flux) that a LoRA can change: linear layers and convolutions."""
    return tuple(
        module for module in every_module(family) if len(module.row.sizes) > 1 and not _is_table(module.paths[0])
    )


@cache
def spelled_paths(family: str, part: str) -> tuple[dict[str, Target], dict[str, Target]]:
    """Every path that files have for the modules of one part: with dots, and the same with underscores.

    Prefixes of parts and of adapters (`unet.`, `base_model.model.`, `lora_te1_`) are not part of a path.
    """
    dotted: dict[str, Target] = {}
    flat: dict[str, Target] = {}
    for module in every_module(family):
        if module.part == part:
            for spelled, path in _spellings(family, module):
                dotted[spelled] = flat[spelled.replace(".", "_")] = Target(module, path)
            if "linear1" in module.row.original:
                # XLabs' processor changes query, key and value of a single block, and not the inner layer beside them.
                row = module.row
                three = Row(row.part, row.diffusers[:3], row.original, ("3*d", "d"), row.stacked[:3])
                target = Target(Module(part, module.paths[:3], "", (), three))
                dotted[_original(row).replace("linear1", "processor.qkv_lora")] = target
                dotted[f"{_original(row)}_qkv"] = target  # and ComfyUI's name for the same
    return dotted, flat


def _spellings(family: str, module: Module) -> Iterator[tuple[str, str]]:
    """(a path, the Diffusers path it means; "" for the original's matrix)."""
    original = _original(module.row)
    if part_is_text := module.part.startswith("text"):
        original = module.paths[0]
        if module.row.original.startswith("text_model."):
            yield module.row.original.removesuffix(".weight"), module.paths[0]
    else:
        yield original, ""
        if family == "flux":
            for end, processor in _XLABS.items():
                if original.endswith(f".{end}"):
                    yield original.removesuffix(end) + processor, ""
    processors = _TEXT_PROCESSORS if part_is_text else _PROCESSORS
    for place, path in enumerate(module.paths):
        yield path, path
        if len(module.paths) > 1:  # one piece of the original's matrix, by its place
            yield f"{original}.{place}", path
        for leaf, old in processors.items():
            stem, dot, last = path.rpartition(f".{leaf}")
            if dot and not last:
                stems = (stem, f"{stem}.processor", f"text_model.{stem}" if part_is_text else stem)
                for start in dict.fromkeys(stems):
                    yield f"{start}.{old}_lora", path
                    yield f"{start}.{old}", path


def _of_denoiser(family: str, row: Row) -> Module:
    paths = _paths(row)
    by_original = "lora_unet_" + _original(row).replace(".", "_")
    by_diffusers = tuple(f"lora_unet_{path.replace('.', '_')}" for path in paths)
    # kohya trains SD 1.x and 2.x with Diffusers' modules, SDXL and Flux with the original's.
    if family in ("sdxl", "flux"):
        return Module(row.part, paths, by_original, by_diffusers if len(paths) == 1 else (), row)
    return Module(row.part, paths, by_diffusers[0], (by_original,), row)


def _original(row: Row) -> str:
    name = row.original.removeprefix("model.diffusion_model.")
    return name.removesuffix(".weight").removesuffix(".scale")


def _paths(row: Row) -> tuple[str, ...]:
    return tuple(name.removesuffix(".weight") for name in row.diffusers)


def _is_table(path: str) -> bool:
    """Whether a path is a table of vectors, which is looked up and not multiplied."""
    return path == "shared" or path.startswith("embeddings.") or path.endswith(".relative_attention_bias")
