"""What a weights file is, told from its tensors' names and shapes alone; nothing in it is read or run."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastsd_helpers.checkpoints.formats.foreign_models import Kind, foreign_by_names, foreign_unet, hint_of
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.lora.layouts import is_lora, read_layout
from fastsd_helpers.checkpoints.models.folder_settings import vae_family
from fastsd_helpers.checkpoints.models.leftovers import tidy_facts
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.errors import CheckpointError

__all__ = ["Kind", "detect", "detect_file", "require_convertible"]

Facts = Mapping[str, TensorFact]


# Where a whole model has its text encoder, the first that fits.
_TEXT_ENCODERS = (
    ("conditioner.embedders.1.", "sdxl", "an SDXL{} file"),
    ("conditioner.embedders.0.model.", "sdxl-refiner", "an SDXL refiner file"),
    ("cond_stage_model.model.", "sd21", "a Stable Diffusion 2.x{} file"),
    ("cond_stage_model.", "sd15", "a Stable Diffusion 1.x{} file"),
)
_TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL", 2048: "SDXL"}
# The names of a token's vectors, one for each text encoder; those of training scripts and of AUTOMATIC1111.
_EMBEDDED = frozenset(["clip_l", "clip_g", "t5", "t5xxl", "text_encoders_0", "text_encoders_1"])
_TOKEN = re.compile(r"emb_params|string_to_param\..*|<.*>", re.DOTALL)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")
_BESIDE_A_MODEL = ("adapter", "controlnet", "embedding")  # what may have LoRA inside and is still none
_LYCORIS = re.compile(r".*\.(hada_w1_a|lokr_w1(_a)?|lokr_w2(_a)?|oft_blocks|oft_diag)(\.weight)?$", re.DOTALL)
_KOHYA = re.compile(r"lora_(unet|te\d?)_")
_MERGE = "Merge it into a model: fastsd convert MODEL NEW.safetensors --merge THIS_FILE."
_UNKNOWN = "Give a Stable Diffusion 1.x, 2.x, SDXL or Flux.1 model, a VAE, a text encoder or a LoRA."
_AVERAGED_FIRST = "model_ema.diffusion_modelinput_blocks00weight"  # where the averages alone were kept
_WHOLE = "Give the whole model: U-Net, VAE and text encoder."
_FLUX_BLOCKS = (19, 38)
_FLUX_TASKS = {384: " Fill (inpainting)", 128: " Canny or Depth"}


def detect(tensors: Facts, metadata: Mapping[str, str] | None = None) -> Kind:
    """Tell what a file with these tensors is; its metadata help where names and shapes fit several."""
    tensors, metadata = tidy_facts(tensors), metadata or {}
    if (embedding := _embedding(tensors)) is not None:
        return embedding
    foreign = foreign_by_names(tensors)
    if foreign is not None and foreign.what in _BESIDE_A_MODEL:
        return foreign
    first = ("input_blocks.0.0.weight", "double_blocks.0.img_attn.qkv.weight")  # of a whole model
    if not any(name.endswith(first) for name in tensors) and is_lora(tensors):
        return _lora(tensors, metadata)
    if foreign is not None:
        return foreign
    found = _flux(tensors) or _stable_diffusion(tensors) or _part(tensors, metadata) or _diffusers(tensors)
    return found or Kind("unknown", None, "not a known model", _UNKNOWN)


def detect_file(path: Path, tensors: Facts, metadata: Mapping[str, str] | None = None) -> Kind:
    """As `detect`; one of the several files of a model is called that, since it has a share of the tensors alone."""
    shard = _SHARD.search(path.name)
    if shard and int(shard[2]) > 1:
        words = f"file {int(shard[1])} of the {int(shard[2])} of a model (a shard)"
        return Kind("shard", None, words, "Give the folder that has all of them, with their index.")
    return detect(tensors, metadata)


def _embedding(tensors: Facts) -> Kind | None:
    # OneTrainer puts several into one file, and adds what comes out of the text encoders.
    names = {re.sub(r"^bundle_emb\.[^.]*\.|_out$", "", name) for name in tensors}
    width = max((fact.shape[-1] for fact in tensors.values() if fact.shape), default=0)
    if not names:
        return None
    if names <= _EMBEDDED:
        base = "Stable Diffusion 3" if "clip_g" in names else "Flux.1"
        base = base if names & {"t5", "t5xxl"} else "SDXL"
    elif all(_TOKEN.fullmatch(name) for name in names):
        base = _TEXT_WIDTHS.get(width, "Stable Diffusion")
    elif width in _TEXT_WIDTHS and all(_is_token(name, fact, width) for name, fact in tensors.items()):
        base = _TEXT_WIDTHS[width]
    else:
        return None
    return Kind("embedding", None, f"a textual inversion embedding for {base}", hint_of("embedding"))


def _is_token(name: str, fact: TensorFact, width: int) -> bool:
    """Whether it is a word's vectors under the word itself, which people choose: `sks`, or `my cat`."""
    return "." not in name and fact.shape[-1:] == (width,) and len(fact.shape) <= 2 and fact.count <= 128 * width


def _lora(tensors: Facts, metadata: Mapping[str, str]) -> Kind:
    what = "lora" if any(_KOHYA.match(name) for name in tensors) else "lora peft"
    try:
        layout = read_layout(tensors, metadata)
    except CheckpointError as err:
        if any(_LYCORIS.match(name) for name in tensors):
            return Kind("lycoris", None, "a LyCORIS adapter (LoHa, LoKr or OFT)", _MERGE)
        other = re.match(r"The LoRA is for (.+?), which is not converted", err.problem)
        naming = "kohya's names" if what == "lora" else "diffusers' or peft's names"
        words = f"a LoRA for {other[1]}" if other else f"a LoRA in {naming}"
        return Kind(what, None, words, f"{err.problem} {err.hint}")
    if layout.kind != "lora":
        return Kind("lycoris", layout.family, layout.words, _MERGE)
    return Kind("lora" if layout.naming == "kohya" else "lora peft", layout.family, layout.words)


# ------------------------------------------------------------------------------------------------ whole models


def _flux(tensors: Facts) -> Kind | None:
    qkv = next((name for name in tensors if name.endswith("double_blocks.0.img_attn.qkv.weight")), None)
    if qkv is None:
        return None
    prefix = qkv.removesuffix("double_blocks.0.img_attn.qkv.weight")
    blocks = (_count(tensors, f"{prefix}double_blocks."), _count(tensors, f"{prefix}single_blocks."))
    if blocks != _FLUX_BLOCKS and any(name.startswith(f"{prefix}final_layer.") for name in tensors):
        words = f"a shortened Flux.1 file such as Flux.1 Lite: {blocks[0]} and {blocks[1]} blocks, not 19 and 38"
        return Kind("foreign", None, words, hint_of("comfy"))
    first = tensors.get(f"{prefix}img_in.weight")
    task = _FLUX_TASKS.get(first.shape[-1], "") if first is not None and first.shape else ""
    whole = any(name.startswith(("text_encoders.", "vae.")) for name in tensors)
    family = "flux-all-in-one" if whole else "flux"
    return Kind("checkpoint", family, f"a Flux.1{task} file" + (" with text encoders and VAE" if whole else ""))


def _stable_diffusion(tensors: Facts) -> Kind | None:
    first = tensors.get("model.diffusion_model.input_blocks.0.0.weight") or tensors.get(_AVERAGED_FIRST)
    if first is None:
        if "input_blocks.0.0.weight" in tensors:
            return Kind("unet", None, f"a U-Net alone, in the original names, of {_unet_of(tensors, '')}", _WHOLE)
        return None
    found = ((base, words) for start, base, words in _TEXT_ENCODERS if any(name.startswith(start) for name in tensors))
    base, words = next(found, ("", ""))
    if not base:
        of = _unet_of(tensors, "model.diffusion_model.")
        return Kind("unet", None, f"a U-Net of {of} without its text encoder", _WHOLE)
    foreign = foreign_unet(tensors, base)
    if foreign is not None:
        return foreign
    inpainting = len(first.shape) == 4 and first.shape[1] == 9 and base != "sdxl-refiner"
    kind = {"edm_mean": " (Playground v2.5)", "edm_vpred.sigma_max": " (CosXL)"} if base == "sdxl" else {}
    name = " inpainting" if inpainting else next((text for mark, text in kind.items() if mark in tensors), "")
    return Kind("checkpoint", base + ("-inpaint" if inpainting else ""), words.format(name))


def _unet_of(tensors: Facts, prefix: str) -> str:
    if f"{prefix}label_emb.0.0.weight" in tensors:
        return "SDXL"
    projection = tensors.get(f"{prefix}input_blocks.1.1.proj_in.weight")
    if projection is None:
        return "Stable Diffusion"
    return "Stable Diffusion 2.x" if len(projection.shape) == 2 else "Stable Diffusion 1.x"


# ------------------------------------------------------------------------------------------------ parts


def _part(tensors: Facts, metadata: Mapping[str, str]) -> Kind | None:
    for prefix in ("", "first_stage_model.", "vae."):
        if f"{prefix}decoder.mid.attn_1.q.weight" in tensors:
            return _vae(tensors.get(f"{prefix}decoder.conv_in.weight"), "part", metadata)
    return _text_encoder(tensors)


def _vae(first: TensorFact | None, what: str, metadata: Mapping[str, str]) -> Kind:
    latents = first.shape[1] if first is not None and len(first.shape) == 4 else 4
    place = " in Diffusers' names" if what == "diffusers part" else ""
    if latents not in (4, 16):
        return Kind("foreign", None, f"a VAE of {latents} latent channels, of an unknown model", hint_of("vae"))
    said = metadata.get("modelspec.architecture", "").lower()
    if latents == 16:
        sd3 = "v3" in said or "sd3" in said
        return Kind(what, "flux-ae", f"a VAE of {'Stable Diffusion 3' if sd3 else 'Flux.1 (or of SD3)'}{place}")
    return Kind(what, "vae", f"a VAE of Stable Diffusion{' XL' if 'xl' in said else ''}{place}")


def _text_encoder(tensors: Facts) -> Kind | None:
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in tensors:
        return _t5(tensors)
    if "token_embedding.weight" in tensors and any("transformer.resblocks.0." in name for name in tensors):
        return Kind("foreign", None, "a CLIP text encoder in OpenCLIP's names", hint_of("encoder"))
    found = [re.match(r"(?:text_model\.)?encoder\.layers\.(\d+)\.self_attn\.q_proj\.weight$", name) for name in tensors]
    layers = {int(match[1]) for match in found if match}
    if not layers:
        return None
    family = {12: "clip-l", 23: "clip-h", 32: "clip-g"}.get(max(layers) + 1)
    words = f"a CLIP text encoder of {max(layers) + 1} layers"
    return Kind("part", family, words) if family else Kind("foreign", None, words, hint_of("encoder"))


def _t5(tensors: Facts) -> Kind:
    layers = _count(tensors, "encoder.block.")
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in tensors:
        words = "a UMT5 text encoder (of Wan or AuraFlow)"
    elif any(name.startswith("decoder.block.") for name in tensors):
        words = f"a whole T5 of {layers} layers, encoder and decoder"
    elif layers != 24 or "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" not in tensors:
        words = f"a T5 text encoder of {layers} layers, not the T5-XXL 1.1 of Flux.1"
    else:
        return Kind("part", "t5", "a T5 text encoder")
    return Kind("foreign", None, words, hint_of("encoder"))


def _diffusers(tensors: Facts) -> Kind | None:
    if "down_blocks.0.resnets.0.conv1.weight" in tensors:
        return Kind("diffusers part", None, "the U-Net of a Diffusers folder")
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors:
        return _vae(tensors.get("decoder.conv_in.weight"), "diffusers part", {})
    if any(name.startswith("transformer_blocks.0.") for name in tensors):
        return Kind("diffusers part", None, "the transformer of a Diffusers folder")
    return None


def _count(tensors: Iterable[str], prefix: str) -> int:
    """How many blocks have names that begin so."""
    numbers = {name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}
    return len({number for number in numbers if number.isdigit()})


def require_convertible(
    path: Path, tensors: Facts, family: str | None = None, metadata: Mapping[str, str] | None = None
) -> Kind:
    """Recognise a file and refuse what no conversion exists for, or what is not of the family that was asked for.

    Raises:
        CheckpointError: says what the file is, and what to do with it.
    """
    kind = detect_file(path, tensors, metadata)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.", "Download it again, or choose another file.")
    if kind.hint and not kind.what.startswith("lora"):
        example = f" (it has {min(tensors)!r})" if kind.what == "unknown" else ""
        raise CheckpointError(f"{path} is {kind.words}{example}, and is not converted.", kind.hint)
    if kind.what == "diffusers part" and kind.family is None:
        raise CheckpointError(
            f"{path} is {kind.words}, one part of a model.",
            "Give the complete folder, the one that contains model_index.json.",
        )
    if family is not None and not _is_of(kind, family):
        raise CheckpointError(
            f"{path} is {kind.words}, not of the family {family!r}.",
            f"Leave the family out, or give {kind.family!r}." if kind.family else "Leave the family out.",
        )
    return kind


def _is_of(kind: Kind, family: str) -> bool:
    """Whether a file is of a family; a VAE alone also of the families whose part it can be."""
    alone = kind.what in ("part", "diffusers part") and kind.family is not None
    return kind.family == family or (alone and bool(vae_family(find_family(kind.family), family, {})))
