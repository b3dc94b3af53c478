"""A ControlNet for a pipeline that is loaded: from the table, a file, a Diffusers folder or the Hub."""

from pathlib import Path
from typing import Any

from fastsd_helpers.controlnet import ControlNet, fetch_controlnet, find_controlnet
from fastsd_helpers.downloads import HubFile, fetch
from fastsd_helpers.downloads.files import models_folder
from fastsd_helpers.errors import ModelError
from fastsd_helpers.model_lookup import CONTROLNET, find_folder, require_inert, understand

__all__ = ["load_controlnet"]

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_controlnet(pipe: Any, ref: str, family: str) -> tuple[Any, str]:
    """Load a ControlNet for a pipeline, on its processor and in its number format.

    A single file in the layout of the original ControlNet takes its shape from the pipeline's own U-Net, so no
    description of it is fetched.

    Args:
        ref: a task (`canny`) or key of the ControlNet table, a file, a Diffusers folder or a Hub id.
        family: of the base model.

    Returns:
        The model, and its task or name.

    Raises:
        ModelError: it does not go together with this model; the hint says what does. DownloadError.
    """
    named = understand(ref)
    # Outside of the block below: what is wrong with a name or a download is said already.
    folder = find_folder(ref, CONTROLNET) if named.what in ("folder", "hub") else None
    try:
        if named.what == "file":
            made, name = _of_file(pipe, named.path), named.path.name
        elif folder is not None:
            made, name = _of_folder(pipe, folder), named.path.name if named.path else ref
        else:
            row = find_controlnet(family, ref, ui="playground")
            made, name = _of_row(pipe, row), ref if ref in row.tasks else row.tasks[0]
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as err:
        raise ModelError(
            f"The ControlNet {ref} does not go together with this model: {(str(err).splitlines() or ['?'])[0][:200]}",
            "Give one for the same family: `fastsd controlnet list --base KEY --ui playground` has them.",
        ) from err
    main = _main_part(pipe)
    return made.to(device=main.device, dtype=main.dtype).eval(), name


def _main_part(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _of_row(pipe: Any, row: ControlNet) -> Any:
    if row.file.rpartition("/")[2] == _WEIGHTS:  # a Diffusers repository, whose description lies beside the weights
        return _of_folder(pipe, _fetch_folder(row))
    return _of_file(pipe, fetch_controlnet(row, models_folder() / "controlnet"))


def _fetch_folder(row: ControlNet) -> Path:
    folder = models_folder() / "controlnet" / row.repo.replace("/", "--")
    fetch(HubFile(row.repo, row.file.replace(_WEIGHTS, _CONFIG), row.revision), folder, name=_CONFIG)
    size = row.bytes if row.bytes_exact else None
    fetch(HubFile(row.repo, row.file, row.revision), folder, name=_WEIGHTS, size=size, sha256=row.sha256)
    return folder


def _of_folder(pipe: Any, folder: Path) -> Any:
    from diffusers import ControlNetModel, FluxControlNetModel

    require_inert(folder)
    main = _main_part(pipe)
    kind = ControlNetModel if hasattr(pipe, "unet") else FluxControlNetModel
    made = kind.from_pretrained(folder, local_files_only=True, torch_dtype=main.dtype)
    name = "cross_attention_dim" if kind is ControlNetModel else "joint_attention_dim"
    ours, its = getattr(main.config, name), getattr(made.config, name)
    if ours != its:
        raise ValueError(f"it reads prompts of width {its}, and this model writes {ours}")
    return made


def _of_file(pipe: Any, path: Path) -> Any:
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
    from safetensors.torch import load_file

    if not hasattr(pipe, "unet"):
        raise ValueError("a single file is read for Stable Diffusion alone; give a Diffusers folder")
    if path.suffix.lower() != ".safetensors":
        raise ValueError("it is no .safetensors file")
    require_inert(path)
    made = ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False)
    weights = load_file(path)
    if not any(name.startswith("controlnet_") for name in weights):
        weights = convert_controlnet_checkpoint(weights, dict(made.config))
    made.load_state_dict(weights)
    return made
