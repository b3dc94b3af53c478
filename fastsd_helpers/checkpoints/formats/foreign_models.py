"""Model files that have no conversion here, told by their tensors' names (foreign_models.toml) and their U-Net's shape.

Source of the U-Nets' shapes: comfy/supported_models.py of ComfyUI.
"""

import functools
import importlib.resources
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact

__all__ = ["Kind", "foreign_by_names", "foreign_unet", "hint_of", "lora_patterns"]

Facts = Mapping[str, TensorFact]

_START = r"(?:model\.diffusion_model\.|diffusion_model\.|model\.model\.|model\.|net\.|transformer\.|unet\.)?"
_UNET = "model.diffusion_model."
_COMFY = "ComfyUI reads it as it is, in models/checkpoints."
# By the width of the text that FLUX.2's transformers take.
_FLUX2 = {7680: "a FLUX.2 klein 4B file", 12288: "a FLUX.2 klein 9B file", 15360: "a FLUX.2 dev file"}
# Channels of the first convolution: 4 are latents alone, 9 are inpainting's.
_CHANNELS = {
    5: "a depth-to-image file (its U-Net takes 5 channels)",
    6: "a latent super-resolution file (its U-Net takes 6 channels)",
    7: "an x4 upscaler of Stable Diffusion (its U-Net takes 7 channels)",
    8: "an image-editing file such as InstructPix2Pix or CosXL Edit (its U-Net takes 8 channels)",
}
# Transformer blocks at the two levels that have any, and in the middle (0: none), of SDXL's shortened kin.
_SHORTENED = {
    ((2, 4), 0): "an SSD-1B file (SDXL, distilled to half its size)",
    ((1, 2), 0): "a Segmind Vega file (SDXL, distilled)",
    ((2, 5), 0): "a KOALA 700M file (SDXL, distilled)",
    ((2, 6), 6): "a KOALA 1B file (SDXL, distilled)",
}


@dataclass(frozen=True)
class Kind:
    """What a file is.

    what: `checkpoint` (a whole model in its original layout), `part` (a VAE or text encoder alone), `diffusers part`
        (weights of a Diffusers folder), `lora` (kohya's names), `lora peft` (other names), or something that is not
        converted: `lycoris`, `controlnet`, `adapter`, `embedding`, `motion`, `upscaler`, `vision`, `preview`, `unet`,
        `shard` (one of several files), `foreign` (another model), `unknown`.
    family: a key of the name tables, where there is one.
    words: the same for people.
    hint: what to do with a file that is not converted.
    """

    what: str
    family: str | None
    words: str
    hint: str = ""


@functools.cache
def _table() -> dict[str, Any]:
    text = importlib.resources.files("fastsd_helpers").joinpath("foreign_models.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@functools.cache
def _models() -> tuple[tuple[tuple[re.Pattern[str], ...], Kind], ...]:
    rows = []
    for what, words, hint, signs in _table()["models"]["rows"]:
        patterns = tuple(re.compile(f"^{_START}(?:{sign.replace('#', '[^.]+')})", re.MULTILINE) for sign in signs)
        rows.append((patterns, Kind(what, None, words, hint_of(hint))))
    return tuple(rows)


@functools.cache
def lora_patterns(where: str) -> tuple[tuple[re.Pattern[str], str, str], ...]:
    """(pattern, family, hint) of LoRA of other families, by the `names` of layers or by `metadata`."""
    return tuple((re.compile(pattern), what, hint_of(hint)) for what, hint, pattern in _table()["loras"][where])


def hint_of(key: str) -> str:
    """What to do with a kind of file, by its key in the table of hints."""
    return _table()["hints"][key]


def foreign_by_names(tensors: Facts) -> Kind | None:
    """The first row of the table whose every sign is among the names."""
    text = "\n".join(tensors)
    for patterns, foreign in _models():
        if all(pattern.search(text) for pattern in patterns):
            return _more_exactly(foreign, tensors)
    return None


def _more_exactly(foreign: Kind, tensors: Facts) -> Kind:
    if foreign.words == "a FLUX.2 file":
        for name, fact in tensors.items():
            if name.endswith(("txt_in.weight", "context_embedder.weight")) and len(fact.shape) == 2:
                return replace(foreign, words=_FLUX2.get(fact.shape[1], foreign.words))
    return foreign


def foreign_unet(tensors: Facts, base: str) -> Kind | None:
    """What a U-Net in the original's names is, where it is none of the shapes there are tables for.

    Args:
        base: the family that its text encoders tell: sd15, sd21, sdxl or sdxl-refiner.
    """
    first = tensors.get(f"{_UNET}input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None and len(first.shape) == 4 else 4
    title = {"sd15": "Stable Diffusion 1.x", "sd21": "Stable Diffusion 2.x"}.get(base, "SDXL")
    if any(name.startswith(("noise_augmentor.", "embedder.model.visual.")) for name in tensors):
        return Kind("foreign", None, "an unCLIP file of Stable Diffusion 2.x", _COMFY)
    if channels in _CHANNELS:
        words = _CHANNELS[channels]
        return Kind("foreign", None, f"{words} for {title}", _COMFY)
    if channels not in (4, 9):
        return Kind("foreign", None, f"a {title} file whose U-Net takes {channels} channels, not 4 or 9", _COMFY)
    if base == "sdxl":
        return _shortened(tensors)
    if f"{_UNET}label_emb.0.0.weight" in tensors and base != "sdxl-refiner":
        return Kind("foreign", None, f"a {title} file with added conditions in its U-Net (unCLIP or another)", _COMFY)
    return None


def _shortened(tensors: Facts) -> Kind | None:
    depths: dict[int, set[int]] = {}
    for name in tensors:
        match = re.match(rf"{re.escape(_UNET)}input_blocks\.(\d+)\.1\.transformer_blocks\.(\d+)\.", name)
        if match:
            depths.setdefault(int(match[1]), set()).add(int(match[2]))
    middle = {
        int(match[1])
        for name in tensors
        if (match := re.match(rf"{re.escape(_UNET)}middle_block\.1\.transformer_blocks\.(\d+)\.", name))
    }
    if not depths:
        return None
    counts = [len(depths[block]) for block in sorted(depths)]
    shape = ((min(counts), max(counts)), len(middle))
    if shape == ((2, 10), 10):
        return None
    other = f"an SDXL file with another U-Net (transformer blocks {counts}, SDXL has [2, 2, 10, 10])"
    hint = (
        "ComfyUI and SD.Next read it as it is; of the SDXL family, only models with the original U-Net are converted."
    )
    return Kind("foreign", None, _SHORTENED.get(shape, other), hint)
