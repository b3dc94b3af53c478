"""The modules a LoRA can change, under diffusers' and under kohya's names, from the families' own name tables.

kohya writes a module's path with underscores, which cannot be taken apart again by rule (`to_out_0`, `time_embed`), so
every name is looked up. Source: kohya-ss/sd-scripts networks/lora.py and networks/lora_flux.py.
"""

from dataclasses import dataclass
from functools import cache

from fastsd_helpers.checkpoints.families import find_family
from fastsd_helpers.checkpoints.layout import Row

__all__ = ["Module", "kohya_modules", "lora_modules"]

_LETTERS = {"sd15": ("te",), "sd21": ("te",), "sdxl": ("te1", "te2"), "flux": ("te1",)}
_TEXT_LAYOUTS = {
    "sd15": {"text_encoder": "clip-l"},
    "sd21": {"text_encoder": "clip-h"},
    "sdxl": {"text_encoder": "clip-l", "text_encoder_2": "clip-g"},
    "flux": {"text_encoder": "clip-l"},
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


@cache
def lora_modules(family: str) -> tuple[Module, ...]:
    """Every module of a family (sd15, sd21, sdxl, flux) that has a weight matrix or a convolution."""
    modules = []
    for row in find_family(family).rows:
        if row.part in ("unet", "transformer") and row.original.endswith(".weight") and len(row.sizes) > 1:
            modules.append(_of_denoiser(family, row))
    for place, (part, layout) in enumerate(_TEXT_LAYOUTS[family].items()):
        for row in find_family(layout).rows:
            if ".layers." in row.original and row.original.endswith(".weight") and len(row.sizes) > 1:
                (path,) = _paths(row)
                start = f"lora_{_LETTERS[family][place]}_"
                flat = path.replace(".", "_")
                # transformers from 5.6 on leaves text_model out, and so do LoRA written with it.
                modules.append(Module(part, (path,), f"{start}text_model_{flat}", (start + flat,), row))
    return tuple(modules)


@cache
def kohya_modules(family: str) -> dict[str, Module]:
    """Name in a kohya-style file, or an alias -> module."""
    return {name: module for module in lora_modules(family) for name in (*module.aliases, module.kohya)}


def _of_denoiser(family: str, row: Row) -> Module:
    paths = _paths(row)
    original = row.original.removeprefix("model.diffusion_model.").removesuffix(".weight")
    by_original = "lora_unet_" + original.replace(".", "_")
    by_diffusers = tuple(f"lora_unet_{path.replace('.', '_')}" for path in paths)
    # kohya trains SD 1.x and 2.x with Diffusers' modules, SDXL and Flux with the original's.
    if family in ("sdxl", "flux"):
        return Module(row.part, paths, by_original, by_diffusers if len(paths) == 1 else (), row)
    return Module(row.part, paths, by_diffusers[0], (by_original,), row)


def _paths(row: Row) -> tuple[str, ...]:
    return tuple(name.removesuffix(".weight") for name in row.diffusers)
