"""A pipeline from its folder: in the dtype its family wants, and placed by the memory that is free."""

from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile
from fastsd_helpers.device import Device, describe_device, find_memory_left
from fastsd_helpers.downloads import read_json
from fastsd_helpers.errors import CheckpointError, ModelError
from fastsd_helpers.model_lookup import require_inert
from fastsd_helpers.runtime import logger
from fastsd_helpers.wheels.advisories import require_safe_tokenizer
from fastsd_helpers.wording import size_in_words

__all__ = ["choose_dtype", "load_pipeline", "part_sizes", "place_pipeline"]

_SHARE_OF_GPU = 0.8  # what weights may take of its free memory; the rest is for the computation
_SHARE_OF_MEMORY = 0.95  # of the machine's own that is free, while weights are read
# Below this the VAE decodes an image in tiles: SDXL's takes more than 4 GB in one piece of 1024 pixels, in fp32.
_ROOM_FOR_VAE = 6e9


def load_pipeline(folder: Path) -> Any:
    """Load a Diffusers folder for drawing, on the GPU where there is one.

    Transformers of the Flux kind compute in bf16 where the GPU can, U-Nets in fp16, and everything in fp32 on a CPU; a
    VAE that overflows in fp16 says so in its configuration (`force_upcast`), and diffusers follows it. Weights that
    take more than the GPU's free memory take turns there, part by part, or layer by layer where one part alone is too
    large.

    Raises:
        ModelError: it does not load, or this machine has too little memory free to read it.
        UnsafeModel: it could run code.
    """
    import diffusers
    from diffusers import DiffusionPipeline

    require_inert(folder)
    for part in folder.glob("tokenizer*"):
        require_safe_tokenizer(part)
    name = str(read_json(folder, "model_index.json").get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise ModelError(
            f"{folder / 'model_index.json'} names {name[:80]!r}, a pipeline that this diffusers version lacks.",
            "Update diffusers, or choose another model.",
        )
    device = describe_device()
    dtype = choose_dtype(device, folder)
    sizes = part_sizes(folder, dtype.itemsize)
    _require_memory(folder, sum(sizes.values()))
    parts = ", ".join(f"{part} {size_in_words(size)}" for part, size in sizes.items())
    logger.info("Loading %s.", parts or folder.name)
    # What judges images is not part of every model, and needs weights of its own.
    without = {"safety_checker": None, "feature_extractor": None} if (folder / "unet").is_dir() else {}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, torch_dtype=dtype, **without, **_no_code(diffusers.__version__)
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as err:
        raise ModelError(
            f"{folder} cannot be loaded: {str(err).splitlines()[0]}", "Download the model again, or choose another one."
        ) from err
    pipe.set_progress_bar_config(disable=True)
    return place_pipeline(pipe, device, sizes)


def choose_dtype(device: Device, folder: Path) -> Any:
    """torch's dtype for a model on this processor."""
    import torch

    if device.kind != "cuda":
        return torch.float32
    # Activations of Flux' transformer and of T5 go beyond fp16, which clips them; GPUs before Ampere have nothing else.
    return torch.bfloat16 if (folder / "transformer").is_dir() and device.has_bf16 else torch.float16


def part_sizes(folder: Path, itemsize: int) -> dict[str, int]:
    """Bytes of each part's weights once they are loaded; parts of which nothing is known are left out."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        part = path.parent.name
        if part == "safety_checker" or path.name.count(".") > 1:  # a variant, such as model.fp16.safetensors
            continue
        try:
            with SafetensorsFile(path) as opened:
                count = sum(fact.count for fact in opened.tensors.values())
        except CheckpointError as err:
            raise ModelError(f"{folder} cannot be loaded: {err.problem}", err.hint) from err
        sizes[part] = sizes.get(part, 0) + count * itemsize
    return sizes


def _require_memory(folder: Path, needed: int) -> None:
    """A machine that runs out of memory ends this program without a word: said before it happens."""
    free = find_memory_left()
    if free and needed > _SHARE_OF_MEMORY * free:
        raise ModelError(
            f"{folder.name} takes {needed / 1e9:.1f} GB of memory to load, and {free / 1e9:.1f} GB are free.",
            "Choose a smaller model or a machine with more memory; a web UI can also use fp8 and GGUF files, "
            "which are smaller: fastsd webui launch.",
        )


def place_pipeline(pipe: Any, device: Device, sizes: dict[str, int]) -> Any:
    """Put a pipeline on the processor: whole, its parts or its layers in turns, by what is free there."""
    if device.kind != "cuda":
        return pipe.to(device.kind)
    import torch

    free = torch.cuda.mem_get_info()[0]
    room = _SHARE_OF_GPU * free
    whole, largest = sum(sizes.values()), max(sizes.values(), default=0)
    if free - min(whole, room) < _ROOM_FOR_VAE and hasattr(pipe.vae, "enable_tiling"):
        pipe.vae.enable_tiling()
    if whole <= room:
        return pipe.to(device.kind)
    if largest <= room:
        logger.info(
            "The model is larger than the free memory of %s: its parts are offloaded to RAM in turn.", device.name
        )
        pipe.enable_model_cpu_offload()
    else:
        logger.info(
            "A single part is larger than the free memory of %s: its layers are offloaded in turn, which is slow.",
            device.name,
        )
        pipe.enable_sequential_cpu_offload()
    return pipe


def _no_code(version: str) -> dict[str, bool]:
    """Said to diffusers from 0.38 on: versions before it take no such word, and rely on our look alone."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return {"trust_remote_code": False} if numbers >= (0, 38) else {}
