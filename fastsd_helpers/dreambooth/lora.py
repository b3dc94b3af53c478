"""LoRA: small matrices beside frozen weights, by peft; merged, counted, and written in the layout of kohya's scripts.

Source: Hu et al. 2021, "LoRA": W + alpha / rank * B A. The file's names are those that AUTOMATIC1111, Forge and ComfyUI
read (networks.lora of kohya's sd-scripts), from the table that converts every LoRA.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.checkpoints.lora_names import lora_modules
from fastsd_helpers.dreambooth.chance import generator_for
from fastsd_helpers.errors import CheckpointError, VerificationFailed
from fastsd_helpers.files import sha256_of, write_atomic
from fastsd_helpers.runtime import load_peft

if TYPE_CHECKING:
    import torch

__all__ = [
    "add_lora",
    "count_lora",
    "kohya_metadata",
    "kohya_tensors",
    "lora_parameters",
    "merge_lora",
    "plain_lora_name",
    "write_lora_file",
]

# The attention's linear layers, as in diffusers' and kohya's scripts: convolutions cost more than they bring.
_TARGETS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
_ADAPTER = "default"
_KOHYA_SIDES = {"A": "lora_down", "B": "lora_up"}


def _targets(module: Any, part: str) -> Iterator[tuple[str, Any]]:
    endings = tuple(f".{target}" for target in _TARGETS[part])
    for name, layer in module.named_modules():
        if name.endswith(endings) and hasattr(layer, "in_features"):
            yield name, layer


def count_lora(module: Any, part: str, rank: int) -> int:
    """How many values a LoRA of this rank has; the module's weights are not read (it may be on `meta`)."""
    return sum(rank * (layer.in_features + layer.out_features) for _, layer in _targets(module, part))


def add_lora(module: Any, part: str, *, rank: int, alpha: float, seed: int) -> None:
    """Put trainable matrices beside the attention's layers; at first they change nothing (B is zero).

    A is drawn from (seed, part, name), uniform as in peft, so that a run that is started again starts the same.

    Raises:
        DependencyMissing: peft is not installed.
    """
    import torch

    peft = load_peft("The method lora", "Run: fastsd install dreambooth")

    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=[name for name, _ in _targets(module, part)], bias="none"
    )
    peft.inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
    with torch.no_grad():
        for name, parameter in lora_parameters(module):
            if ".lora_A." in name:
                plain = plain_lora_name(name)
                bound = 1 / math.sqrt(parameter.shape[1])
                drawn = torch.rand(parameter.shape, generator=generator_for(seed, part, "lora", plain))
                parameter.copy_((2 * drawn - 1) * bound)
            else:
                parameter.zero_()


def lora_parameters(module: Any) -> "Iterator[tuple[str, torch.nn.Parameter]]":
    """The matrices that are trained, under the module's own names."""
    return ((name, parameter) for name, parameter in module.named_parameters() if ".lora_" in name)


def plain_lora_name(name: str) -> str:
    """`...to_q.lora_A.weight`: without the adapter's name and without older libraries' `text_model.`."""
    return name.removeprefix("text_model.").replace(f".{_ADAPTER}.", ".")


def merge_lora(
    state: "Mapping[str, torch.Tensor]", tensors: "Mapping[str, torch.Tensor]", *, alpha: float
) -> "dict[str, torch.Tensor]":
    """A whole part's tensors with the LoRA added, float32; names with or without `text_model.` as they were given."""
    merged = dict(state)
    spelling = {name.removeprefix("text_model."): name for name in state}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            target = spelling[name.replace(".lora_A.weight", ".weight")]
            change = (up.float() @ down.float()) * (alpha / down.shape[0])
            merged[target] = state[target].float() + change.to(state[target].device)
    return merged


# ------------------------------------------------------------------------------------------------- the file


def kohya_tensors(
    parts: "Mapping[str, Mapping[str, torch.Tensor] | None]", *, family: str, alpha: float, dtype: str = "fp16"
) -> "dict[str, torch.Tensor]":
    """All parts' matrices under kohya's names, each layer with its alpha: a reader's strength is alpha / rank.

    Args:
        parts: `mid_block...to_q.lora_A.weight` and so on of the U-Net and the text encoder, as they are trained.
        family: whose modules they belong to, `sd15` or `sd21`.

    Raises:
        CheckpointError: a value is NaN or Inf, or becomes infinite in fp16.
    """
    import torch

    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    layers = {(module.part, path): module.kohya for module in lora_modules(family) for path in module.paths}
    written: dict[str, torch.Tensor] = {}
    for part, tensors in parts.items():
        for name, tensor in sorted((tensors or {}).items()):
            path, _, matrix = name.removesuffix(".weight").rpartition(".lora_")
            layer = layers[part, path]
            kohya = f"{layer}.{_KOHYA_SIDES[matrix]}.weight"
            value = tensor.detach().cpu().to(wanted).contiguous()
            if not torch.isfinite(value).all():
                raise CheckpointError(
                    f"The LoRA's tensor {kohya!r} contains NaN or Inf in {dtype}.",
                    "Choose fp32, or export an earlier checkpoint and resume training with a lower learning rate.",
                )
            written[kohya] = value
            written[f"{layer}.alpha"] = torch.tensor(alpha, dtype=wanted)
    return written


def kohya_metadata(*, name: str, family: str, prediction_type: str, rank: int, alpha: float, px: int) -> dict[str, str]:
    """The header that web UIs guess a LoRA's family from, as kohya's scripts write it."""
    v = prediction_type == "v_prediction"
    version = {"sd15": "sd_v1", "sd21": "sd_v2"}[family] + ("_v" if v else "")
    architecture = {"sd15": "stable-diffusion-v1", "sd21": f"stable-diffusion-v2-{'768-v' if v else '512'}"}[family]
    return {
        "format": "pt",
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_output_name": name,
        "ss_resolution": f"({px}, {px})",
        "ss_v2": str(family == "sd21"),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.title": name,
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.resolution": f"{px}x{px}",
    }


def write_lora_file(path: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> str:
    """Write a LoRA whole or not at all, read it back from the disk and compare every value; returns its SHA-256.

    Raises:
        DiskFull, DriveReadOnly, DriveError: it cannot be written.
        VerificationFailed: what was read back differs.
    """
    import torch
    from safetensors.torch import load, save

    data = save(tensors, metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    stored = load(path.read_bytes())
    if stored.keys() != tensors.keys() or not all(torch.equal(stored[name], tensors[name]) for name in tensors):
        raise VerificationFailed(f"{path} was read back with other values.", "Export it again; check the disk.")
    return sha256_of(path)
