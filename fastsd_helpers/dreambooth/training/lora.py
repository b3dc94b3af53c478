"""LoRA: small matrices beside frozen weights, by peft; merged, counted, and written in the layout of kohya's scripts.

Source: Hu et al. 2021, "LoRA": W + alpha / rank * B A. The file's names are those that AUTOMATIC1111, Forge and ComfyUI
read (networks.lora of kohya's sd-scripts), from the table that converts every LoRA.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.checkpoints import CheckpointFile
from fastsd_helpers.checkpoints.lora.modules import lora_modules
from fastsd_helpers.dreambooth.families import Family, family_named
from fastsd_helpers.dreambooth.settings import ResolvedConfig
from fastsd_helpers.dreambooth.training.base_model import BaseModel, plain_name
from fastsd_helpers.dreambooth.training.randomness import generator_for
from fastsd_helpers.registry import ModelSpec
from fastsd_helpers.runtime import load_peft

if TYPE_CHECKING:
    import torch

__all__ = [
    "add_lora",
    "count_lora",
    "lora_parameters",
    "merge_lora",
    "plain_lora_name",
    "trained_count_of",
    "write_lora_file",
]

_ADAPTER = "default"


def _targets(family: Family, module: Any, part: str, targets: str) -> Iterator[tuple[str, Any]]:
    for name, layer in module.named_modules():
        if family.takes_lora(part, name, targets) and hasattr(layer, "weight"):
            yield name, layer


def count_lora(family: Family, module: Any, part: str, *, rank: int, targets: str) -> int:
    """How many values a LoRA of this rank has; the module's weights are not read (it may be on `meta`)."""
    return sum(rank * sum(layer.weight.shape[:2]) for _, layer in _targets(family, module, part, targets))


def trained_count_of(base: BaseModel, config: ResolvedConfig, stage: str) -> int:
    """Number of values of a stage that are trained, from the model's own configuration: all of them, or the LoRA's."""
    parts = {part: base.build_empty(part) for part in base.family.parts_of(stage)}
    if config.method != "lora":
        return sum(parameter.numel() for network in parts.values() for parameter in network.parameters())
    rank, targets = config.lora_rank, config.lora_targets
    return sum(count_lora(base.family, each, part, rank=rank, targets=targets) for part, each in parts.items())


def add_lora(
    family: Family, networks: Mapping[str, Any], stage: str, *, rank: int, alpha: float, seed: int, targets: str
) -> None:
    """Put trainable matrices in float32 beside layers of a stage's networks; at first they change nothing (B is zero).

    A is drawn from (seed, stage, name), uniform as in peft, so that a run that is started again starts the same.

    Args:
        family: of the model.
        networks: the stage's, by part.
        stage: its name.
        rank: of the settings.
        alpha: of the settings.
        seed: of the settings.
        targets: which layers, a choice of the family's.

    Raises:
        DependencyMissing: peft is not installed.
    """
    import torch

    peft = load_peft("The method lora", "Run: fastsd install dreambooth")

    for part, module in networks.items():
        names = [name for name, _ in _targets(family, module, part, targets)]
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, bias="none")
        peft.inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
        for layer in module.modules():
            if hasattr(layer, "cast_input_dtype_enabled"):
                # To float32, and by autocast back at once: the same bits, after four copies and with one more kept.
                layer.cast_input_dtype_enabled = False
        start = f"{part}." if len(networks) > 1 else ""
        with torch.no_grad():
            for name, parameter in lora_parameters(module):
                # peft gives them the base's dtype; small steps on half-precision weights would round to nothing.
                parameter.data = parameter.data.float()
                if ".lora_A." in name:
                    plain = plain_lora_name(start + name)
                    bound = 1 / math.sqrt(parameter.shape[1])
                    drawn = torch.rand(parameter.shape, generator=generator_for(seed, stage, "lora", plain))
                    parameter.copy_((2 * drawn - 1) * bound)
                else:
                    parameter.zero_()


def lora_parameters(module: Any) -> "Iterator[tuple[str, torch.nn.Parameter]]":
    """The matrices that are trained, under the module's own names."""
    return ((name, parameter) for name, parameter in module.named_parameters() if ".lora_" in name)


def plain_lora_name(name: str) -> str:
    """`...to_q.lora_A.weight`: without the adapter's name and without older libraries' `text_model.`."""
    return plain_name(name).replace(f".{_ADAPTER}.", ".")


def merge_lora(
    state: "Mapping[str, torch.Tensor]", tensors: "Mapping[str, torch.Tensor]", *, alpha: float
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Give each changed tensor of a part with the LoRA added, by its name there: float32, one at a time.

    All of a large model at once would be twice its size in 16 bits.

    Args:
        state: the part's own tensors, with or without `text_model.` in their names.
        tensors: of the LoRA.
    """
    spelling = {plain_name(name): name for name in state}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            target = spelling[name.replace(".lora_A.weight", ".weight")]
            change = (up.float().flatten(1) @ down.float().flatten(1)) * (alpha / down.shape[0])
            own = state[target]
            yield target, own.float() + change.to(own.device).reshape(own.shape)


# ------------------------------------------------------------------------------------------------- the file


def write_lora_file(
    path: Path,
    parts: "Mapping[str, Mapping[str, torch.Tensor] | None]",
    *,
    spec: ModelSpec,
    alpha: float,
    px: int,
    dtype: str = "fp16",
    bucket_info: Mapping[str, Any] | None = None,
) -> CheckpointFile:
    """Write all parts' matrices in kohya's layout, each layer with its alpha: a reader's strength is alpha / rank.

    Args:
        parts: `mid_block...to_q.lora_A.weight` and so on of the U-Net and the text encoder, as they are trained.
        spec: the base model.
        px: side of the images it was trained on.
        bucket_info: as `buckets.bucket_info`, where they had other shapes.

    Raises:
        CheckpointError: as `write_kohya`.
        DiskFull: as `write_kohya`.
        DriveReadOnly: as `write_kohya`.
        DriveError: as `write_kohya`.
        VerificationFailed: as `write_kohya`.
    """
    from fastsd_helpers.checkpoints.lora.layers import Layer
    from fastsd_helpers.checkpoints.lora_converter import write_kohya

    modules = {(module.part, path): module for module in lora_modules(spec.family) for path in module.paths}
    layers = []
    for part, tensors in parts.items():
        arrays = {name: tensor.detach().float().cpu().numpy() for name, tensor in sorted((tensors or {}).items())}
        for name, down in arrays.items():
            layer, dot, _rest = name.partition(".lora_A.weight")
            if dot:
                layers.append((modules[part, layer], Layer(down, arrays[f"{layer}.lora_B.weight"], alpha, "F32")))
    metadata = {
        "ss_network_alpha": str(alpha),
        "ss_output_name": path.stem,
        "ss_resolution": f"({px}, {px})",
        "modelspec.title": path.stem,
        "modelspec.prediction_type": "v" if spec.prediction_type == "v_prediction" else "epsilon",
        "modelspec.resolution": f"{px}x{px}",
        **({"ss_bucket_info": json.dumps(bucket_info)} if bucket_info else {}),
        **family_named(spec.family).lora_metadata(spec),
    }
    return write_kohya(path, layers, spec.family, dtype=dtype, metadata=metadata)
