"""A ControlNet for a pipeline that is loaded: from the table, a file, a Diffusers folder or the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.controlnet import ControlNet, fetch_controlnet, find_controlnet
from fastsd_helpers.downloads import HubFile, fetch, read_json
from fastsd_helpers.downloads.files import models_folder
from fastsd_helpers.errors import ModelError
from fastsd_helpers.model_lookup import CONTROLNET, find_folder, require_inert, understand

__all__ = ["Steering", "load_controlnet", "modes_of"]

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_WEIGHTS_OF_ALL = "diffusion_pytorch_model"  # with a variant's name behind it, such as _promax
# The control mode that a union model is told, by task. Source: the model cards of InstantX/FLUX.1-dev-Controlnet-Union
# and xinsir/controlnet-union-sdxl-1.0; the latter's 7, inpainting, needs a mask and is not offered.
_FLUX_MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "openpose": 4, "gray": 5, "lq": 6}
_SDXL_MODES = {
    **{"openpose": 0, "depth": 1, "softedge": 2, "scribble": 2, "canny": 3, "lineart": 3, "lineart-anime": 3},
    **{"mlsd": 3, "normal": 4, "seg": 5, "tile": 6},
}


@dataclass(frozen=True)
class Steering:
    """A loaded ControlNet.

    Attributes:
        model: on the pipeline's processor, in its dtype.
        title: the task it was chosen for, or its own name.
        modes: task -> control mode of a union model, which does several; empty for one that does what it does.
    """

    model: Any
    title: str
    modes: dict[str, int]

    @property
    def tasks(self) -> tuple[str, ...]:
        """What its image may be: the tasks of a union model, the chosen one first; else its title alone."""
        first = [self.title] if self.title in self.modes else []
        return tuple(dict.fromkeys([*first, *self.modes])) or (self.title,)

    def mode(self, task: str) -> dict[str, Any]:
        """What a union model's call is told of the task, the first one where none is named; nothing for another."""
        return {"control_mode": self.modes[task or self.tasks[0]]} if self.modes else {}


def load_controlnet(pipe: Any, ref: str, family: str) -> Steering:
    """Load a ControlNet for a pipeline, on its processor and in its dtype.

    A single file in the layout of the original ControlNet takes its shape from the pipeline's own U-Net, so no
    description of it is fetched.

    Args:
        ref: a task (`canny`) or key of the ControlNet table, a file, a Diffusers folder or a Hub id.
        family: of the base model.

    Raises:
        ModelError: it does not fit this model; the hint says what does. DownloadError.
    """
    named = understand(ref)
    # Outside of the block below: what is wrong with a name or a download is said already.
    folder = find_folder(ref, CONTROLNET) if named.what in ("folder", "hub") else None
    try:
        if named.what == "file" and named.path is not None:
            made, name = _of_file(pipe, named.path), named.path.name
        elif folder is not None:
            made, name = _of_folder(pipe, folder), named.path.name if named.path else ref
        else:
            row = find_controlnet(family, ref, ui="playground")
            made, name = _of_row(pipe, row), ref if ref in row.tasks else row.tasks[0]
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as err:
        raise ModelError(
            f"The ControlNet {ref} does not fit this model: {(str(err).splitlines() or ['?'])[0][:200]}",
            "Give one for the same family: `fastsd controlnet list --base KEY --ui playground` has them.",
        ) from err
    main = _main_part(pipe)
    return Steering(made.to(device=main.device, dtype=main.dtype).eval(), name, modes_of(made))


def modes_of(made: Any) -> dict[str, int]:
    """The tasks of a union model, as many as its configuration has control types for."""
    for count, modes in (("num_mode", _FLUX_MODES), ("num_control_type", _SDXL_MODES)):
        known = made.config.get(count)
        if known:
            return {task: mode for task, mode in modes.items() if mode < known}
    return {}


def _main_part(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _of_row(pipe: Any, row: ControlNet) -> Any:
    # A Diffusers repository, whose description lies beside the weights.
    if row.file.rpartition("/")[2].startswith(_WEIGHTS_OF_ALL):
        return _of_folder(pipe, _fetch_folder(row))
    return _of_file(pipe, fetch_controlnet(row, models_folder() / "controlnet"))


def _fetch_folder(row: ControlNet) -> Path:
    where, _, file = row.file.rpartition("/")
    variant = Path(file).stem.removeprefix(_WEIGHTS_OF_ALL)  # "_promax", or nothing
    folder = models_folder() / "controlnet" / (row.repo.replace("/", "--") + variant)
    described = f"{where}/config{variant}.json".lstrip("/")
    fetch(HubFile(row.repo, described, row.revision), folder, name=_CONFIG)
    size = row.bytes if row.bytes_exact else None
    fetch(HubFile(row.repo, row.file, row.revision), folder, name=_WEIGHTS, size=size, sha256=row.sha256)
    return folder


def _of_folder(pipe: Any, folder: Path) -> Any:
    import diffusers

    require_inert(folder)
    main = _main_part(pipe)
    unet = hasattr(pipe, "unet")
    # By what it holds: xinsir's names itself after the class of its own repository.
    union = "num_control_type" in read_json(folder, _CONFIG)
    wanted = "ControlNetUnionModel" if union else "ControlNetModel" if unet else "FluxControlNetModel"
    kind = getattr(diffusers, wanted, None)
    if kind is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no {wanted}; a newer one does")
    made = kind.from_pretrained(folder, local_files_only=True, torch_dtype=main.dtype)
    name = "cross_attention_dim" if unet else "joint_attention_dim"
    ours, its = getattr(main.config, name), getattr(made.config, name)
    if ours != its:
        raise ValueError(f"it expects text embeddings of width {its}, and this model has {ours}")
    return made


def _of_file(pipe: Any, path: Path) -> Any:
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
    from safetensors.torch import load_file

    if not hasattr(pipe, "unet"):
        raise ValueError("a single file is read for Stable Diffusion alone; give a Diffusers folder")
    if path.suffix.lower() != ".safetensors":
        raise ValueError("it is not a .safetensors file")
    require_inert(path)
    made = ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False)
    weights = load_file(path)
    if not any(name.startswith("controlnet_") for name in weights):
        weights = convert_controlnet_checkpoint(weights, dict(made.config))
    made.load_state_dict(weights)
    return made
