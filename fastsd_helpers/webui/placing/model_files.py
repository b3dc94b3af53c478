"""What a model file is, before a web UI gets it: its kind, its family, and whether it can be what it was given as."""

from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.checkpoints import inspector
from fastsd_helpers.downloads import describe_content
from fastsd_helpers.errors import CheckpointError, ModelError, UnsafeModel
from fastsd_helpers.files import file_errors
from fastsd_helpers.model_lookup import require_inert
from fastsd_helpers.webui.placing.gguf import read_gguf

__all__ = [
    "BASE_KINDS",
    "ENDINGS",
    "KINDS",
    "ModelFile",
    "PlacedModel",
    "a_kind",
    "base_family",
    "look_at",
    "require_kind",
    "with_description",
]

ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".gguf", ".bin")
BASE_KINDS = ("checkpoint", "diffusion-model")
KINDS = {
    "checkpoint": "base model",
    "diffusion-model": "diffusion model without its text encoders and VAE",
    "lora": "LoRA",
    "vae": "VAE",
    "text-encoder": "text encoder",
    "embedding": "embedding",
    "controlnet": "ControlNet",
    "upscaler": "upscaler",
}
# Of these there are many layouts that nothing here knows by name; the others are refused when they are not recognised.
_OF_MANY_LAYOUTS = ("controlnet", "upscaler", "embedding")
_ADVICE = "Download all of it again: its page may require a login. Nothing was placed."


@dataclass(frozen=True)
class ModelFile:
    """What a file is.

    kind: a key of KINDS; "" for one that is not recognised. family: of the base models it goes with, where it is told
    by the file. what: in words. notes: what is wrong with it without making it useless.
    """

    kind: str
    family: str | None
    what: str
    notes: tuple[str, ...] = ()
    foreign: bool = False  # a model of a family that nothing here has a table of
    four_bit: bool = False  # weights of bitsandbytes (nf4, fp4)


@dataclass(frozen=True)
class PlacedModel:
    """A model where the web UI finds it."""

    path: Path
    kind: str
    family: str | None
    how: str  # there already, linked, converted, downloaded


def base_family(family: str | None) -> str | None:
    """The family that LoRAs, VAEs and ControlNets go by: sd15 for sd15-inpaint, flux for flux-all-in-one."""
    if family is None:
        return None
    for ending in ("-inpaint", "-refiner", "-all-in-one"):
        family = family.removesuffix(ending)
    return family


def with_description(path: Path) -> list[Path]:
    """A file, and the .yaml of the same name, by which a web UI builds the network."""
    description = path.with_suffix(".yaml")
    return [path, *([description] if description != path and description.is_file() else [])]


def look_at(path: Path) -> ModelFile:
    """Look into a model file; tensors are not read, and nothing in it is run.

    Raises:
        ModelError: it is not a model file: a page, text, a pointer, empty, truncated.
        UnsafeModel: it could run code.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ModelError(f"{path} is not a model file.", f"Give a file that ends in {', '.join(ENDINGS)}.")
    _require_model(path)
    require_inert(with_description(path))
    if path.suffix.lower() == ".gguf":
        return _of_gguf(path)
    return _of_tensors(path)


def _require_model(path: Path) -> None:
    with file_errors(path, "read"):
        content = describe_content(path)
        head = path.read_bytes()[:200] if path.stat().st_size < 2000 else b""
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{path} is a Git LFS pointer: a reference to the model, not the model.",
            "Run `git lfs pull` where it came from, or download the file itself.",
        )
    if content.startswith("broken"):
        raise ModelError(f"{path} is truncated or damaged: it is not a complete {content.split()[-1]} file.", _ADVICE)
    if content not in ("safetensors", "checkpoint", "gguf", "data"):
        what = {"empty": "an empty file", "image": "an image", "text": "plain text"}.get(content, f"a {content}")
        raise ModelError(f"{path} is {what}, not a model.", _ADVICE)


def _of_gguf(path: Path) -> ModelFile:
    try:
        header = read_gguf(path)
    except CheckpointError as err:
        raise ModelError(err.problem, err.hint) from err
    flux = any("double_blocks.0.img_attn.qkv" in name for name in header.tensors)
    if flux or header.architecture == "flux":
        return ModelFile("diffusion-model", "flux", "a Flux.1 transformer in GGUF")
    if header.architecture in ("t5", "t5encoder"):
        return ModelFile("text-encoder", "flux", "a T5 text encoder in GGUF")
    architecture = {"sd1": "sd15"}.get(header.architecture, header.architecture)
    if architecture in ("sd15", "sdxl"):
        return ModelFile("diffusion-model", architecture, f"a U-Net of {architecture} in GGUF")
    words = f"a GGUF file of the architecture '{header.architecture or 'unknown'}'"
    return ModelFile("", None, words, foreign=bool(header.architecture))


def _of_tensors(path: Path) -> ModelFile:
    try:
        found = inspector.inspect(path, hashes=False)
    except UnsafeModel:
        raise
    except CheckpointError as err:
        raise ModelError(err.problem, f"{err.hint} Nothing was placed.") from err
    notes = tuple(problem.what for problem in found.problems)
    family = found.family
    if found.kind == "checkpoint":
        kind = "diffusion-model" if family == "flux" else "checkpoint"
        four_bit = any(".quant_state.bitsandbytes__" in name for name in found.unexpected)
        family = "flux" if family is not None and family.startswith("flux") else family
        return ModelFile(kind, family, found.what, notes, four_bit=four_bit)
    if found.kind == "unet":
        return ModelFile("diffusion-model", None, found.what, notes)
    if found.kind in ("part", "diffusers part"):
        of_part = {"flux-ae": ("vae", "flux"), "vae": ("vae", None), "t5": ("text-encoder", "flux")}
        kind, goes_with = of_part.get(family or "", ("text-encoder" if family else "", None))
        return ModelFile(kind, goes_with, found.what, notes)
    first = found.kind.split()[0]
    kind = {"lycoris": "lora", "adapter": "controlnet"}.get(first, first if first in KINDS else "")
    return ModelFile(kind, base_family(family), found.what, notes, foreign=first == "foreign")


def require_kind(path: Path, found: ModelFile, wanted: str) -> str:
    """The kind a file is placed as.

    Args:
        wanted: a key of KINDS, checkpoint meaning any base model; or auto.

    Raises:
        ModelError: the file is of another kind, or of none that is known.
    """
    if found.kind == wanted or (wanted == "checkpoint" and found.kind in BASE_KINDS):
        return found.kind
    if not found.kind and (wanted in _OF_MANY_LAYOUTS or (found.foreign and wanted != "auto")):
        return wanted
    if wanted == "auto" and found.kind:
        return found.kind
    if not found.kind:
        kinds = "diffusion-model, text-encoder" if found.foreign else "controlnet, upscaler, embedding"
        hint = f"Name its kind if you know it (--kind): {kinds}."
        raise ModelError(f"{path.name} is {found.what}.", hint if wanted == "auto" else f"Give {a_kind(wanted)}.")
    raise ModelError(
        f"{path.name} is {found.what}, not {a_kind(wanted)}.",
        f"Place it as its own kind ({found.kind}), or choose {a_kind(wanted)} instead.",
    )


def a_kind(kind: str) -> str:
    """A kind in words, with its article: a LoRA, an embedding."""
    noun = KINDS[kind]
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
