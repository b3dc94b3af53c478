"""What follows from a model's shapes and a run's settings alone: how many values are trained, and in which dtypes."""

from typing import Any

from fastsd_helpers.dreambooth.families import Family
from fastsd_helpers.dreambooth.settings import ResolvedConfig
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.lora import count_lora
from fastsd_helpers.dreambooth.training.optimizers import weight_bytes

__all__ = ["count_of", "dtypes_of", "suits_cpu", "trained_count_of"]


def count_of(base: BaseModel, stage: str) -> int:
    """Number of values of a stage's networks, from the model's own configuration."""
    networks = [base.build_empty(part) for part in base.family.parts_of(stage)]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def trained_count_of(base: BaseModel, config: ResolvedConfig, stage: str) -> int:
    """Number of values of a stage that are trained: all of them, or the LoRA's."""
    if config.method != "lora":
        return count_of(base, stage)
    return sum(
        count_lora(base.family, base.build_empty(part), part, rank=config.lora_rank, targets=config.lora_targets)
        for part in base.family.parts_of(stage)
    )


def dtypes_of(family: Family, config: ResolvedConfig) -> tuple[Any, Any]:
    """The torch dtypes of the arithmetic (None: that of the weights) and of the networks of a stage.

    A LoRA's own matrices are in float32 all the same.
    """
    import torch

    compute = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.precision]
    half = family.half_base if config.method == "lora" else weight_bytes(config) == 2
    return compute, compute if compute and half else torch.float32


def suits_cpu(config: ResolvedConfig, device: str) -> bool:
    """Whether networks are used in the form that is fast in training in bf16 on a CPU."""
    # Plain attention holds whole attention maps: at 256 px and above it is not faster.
    px = max(config.resolution, *config.training_resolutions)
    return device == "cpu" and config.precision != "fp32" and (px // 8) ** 2 < 1024
