"""What a weights file is, told from its tensors' names and shapes alone; nothing in it is read or run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.checkpoints.safetensors_file import TensorFact
from fastsd_helpers.errors import CheckpointError

__all__ = ["Kind", "recognise", "require_convertible"]

Facts = Mapping[str, TensorFact]


@dataclass(frozen=True)
class Kind:
    """What a file is.

    what: `checkpoint` (a whole model in its original layout), `part` (a VAE or text encoder alone), `diffusers part`
        (weights of a Diffusers folder), `lora` (kohya's names), `lora peft` (diffusers' and peft's names), or something
        that is not converted: `lycoris`, `controlnet`, `embedding`, `unet`, `unknown`.
    family: a key of the name tables, where there is one.
    words: the same for people.
    """

    what: str
    family: str | None
    words: str


_CONTROL = re.compile(r"control_model\.|controlnet_|input_hint_block\.|zero_convs\.|controlnet_cond_embedding\.")
_LYCORIS = re.compile(r".*\.(hada_w1_a|lokr_w1(_a)?|lokr_w2(_a)?|oft_blocks|oft_diag)(\.weight)?$")
_PEFT = re.compile(r".*\.(lora_A|lora_B|lora\.down|lora\.up|\w+_lora\.down|\w+_lora\.up)(\.\w+)?\.weight$")
_KOHYA = re.compile(r"lora_(unet|te\d?)_")


def recognise(tensors: Facts) -> Kind:
    """Tell what a file with these tensors is."""
    for name in tensors:
        if _LYCORIS.match(name):
            return Kind("lycoris", None, "a LyCORIS adapter (LoHa, LoKr or OFT)")
        if _KOHYA.match(name):
            return Kind("lora", None, "a LoRA in kohya's names")
        if _PEFT.match(name):
            return Kind("lora peft", None, "a LoRA in diffusers' or peft's names")
        if _CONTROL.match(name):
            return Kind("controlnet", None, "a ControlNet")
        if name == "emb_params" or name.startswith("string_to_param"):
            return Kind("embedding", None, "a textual inversion embedding")
    return _original(tensors) or _part(tensors) or _diffusers(tensors) or Kind("unknown", None, "no model we know")


def _original(tensors: Facts) -> Kind | None:
    if any(name.endswith("double_blocks.0.img_attn.qkv.weight") for name in tensors):
        whole = any(name.startswith(("text_encoders.", "vae.")) for name in tensors)
        family = "flux-all-in-one" if whole else "flux"
        return Kind("checkpoint", family, "a Flux.1 file" + (" with text encoders and VAE" if whole else ""))
    first = tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    if first is None:
        if "input_blocks.0.0.weight" in tensors:
            return Kind("unet", None, "a U-Net alone, in the original names")
        return None
    task = "-inpaint" if len(first.shape) == 4 and first.shape[1] == 9 else ""
    words = " inpainting" if task else ""
    starts = tuple(
        start
        for start in ("conditioner.embedders.1.", "conditioner.embedders.0.model.", "cond_stage_model.model.")
        if any(name.startswith(start) for name in tensors)
    )
    if "conditioner.embedders.1." in starts:
        return Kind("checkpoint", "sdxl" + task, f"an SDXL{words} file")
    if "conditioner.embedders.0.model." in starts:
        return Kind("checkpoint", "sdxl-refiner", "an SDXL refiner file")
    if starts:
        return Kind("checkpoint", "sd21" + task, f"a Stable Diffusion 2.x{words} file")
    if any(name.startswith("cond_stage_model.") for name in tensors):
        return Kind("checkpoint", "sd15" + task, f"a Stable Diffusion 1.x{words} file")
    return Kind("unet", None, "a U-Net without its text encoder")


def _part(tensors: Facts) -> Kind | None:
    for prefix in ("", "first_stage_model.", "vae."):
        middle = tensors.get(f"{prefix}decoder.mid.attn_1.q.weight")
        if middle is not None:
            latents = tensors.get(f"{prefix}decoder.conv_in.weight")
            flux = latents is not None and len(latents.shape) == 4 and latents.shape[1] == 16
            return Kind("part", "flux-ae" if flux else "vae", "a VAE of " + ("Flux.1" if flux else "Stable Diffusion"))
    return _text_encoder(tensors)


def _text_encoder(tensors: Facts) -> Kind | None:
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in tensors:
        return Kind("part", "t5", "a T5 text encoder")
    found = [re.match(r"(?:text_model\.)?encoder\.layers\.(\d+)\.self_attn\.q_proj\.weight$", name) for name in tensors]
    layers = {int(match[1]) for match in found if match}
    if not layers:
        return None
    family = {12: "clip-l", 23: "clip-h", 32: "clip-g"}.get(max(layers) + 1)
    return Kind("part" if family else "unknown", family, f"a CLIP text encoder of {max(layers) + 1} layers")


def _diffusers(tensors: Facts) -> Kind | None:
    if "down_blocks.0.resnets.0.conv1.weight" in tensors:
        return Kind("diffusers part", None, "the U-Net of a Diffusers folder")
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors:
        latents = tensors.get("decoder.conv_in.weight")
        flux = latents is not None and len(latents.shape) == 4 and latents.shape[1] == 16
        return Kind("diffusers part", "flux-ae" if flux else "vae", "the VAE of a Diffusers folder")
    if any(name.startswith("transformer_blocks.0.") for name in tensors):
        return Kind("diffusers part", None, "the transformer of a Diffusers folder")
    return None


_ADVICE = {
    "lycoris": "Only LoRA files are converted; merge the adapter into a model in your web UI first.",
    "controlnet": "A ControlNet is used as it is: put the file where your web UI looks for ControlNets.",
    "embedding": "An embedding is used as it is: put the file where your web UI looks for embeddings.",
    "unet": "Give the whole model: U-Net, VAE and text encoder.",
    "unknown": "Give a Stable Diffusion 1.x, 2.x, SDXL or Flux.1 model, a VAE, a text encoder or a LoRA.",
}


def require_convertible(path: Path, tensors: Facts, family: str | None = None) -> Kind:
    """Recognise a file and refuse what no conversion exists for, or what is not of the family that was asked for.

    Raises:
        CheckpointError: says what the file is, and what to do with it.
    """
    kind = recognise(tensors)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.", "Download it again, or pick another file.")
    if kind.what in _ADVICE:
        example = min(tensors)
        raise CheckpointError(f"{path} is {kind.words} (it has {example!r}), and is not converted.", _ADVICE[kind.what])
    if kind.what == "diffusers part" and kind.family is None:
        raise CheckpointError(
            f"{path} is {kind.words}, one part of a model.", "Give the whole folder, the one with model_index.json."
        )
    if family is not None and kind.family != family:
        raise CheckpointError(
            f"{path} is {kind.words}, not of the family {family!r}.",
            f"Leave the family out, or give {kind.family!r}." if kind.family else "Leave the family out.",
        )
    return kind
