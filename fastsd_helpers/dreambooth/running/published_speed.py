"""Seconds of a U-Net step as others have published them for a GPU, scaled to a run; each figure with its source."""

from fastsd_helpers.dreambooth.families import Family
from fastsd_helpers.dreambooth.settings import ResolvedConfig

__all__ = ["published_lines"]


def published_lines(gpu: str, family: Family, config: ResolvedConfig, steps: int) -> list[str]:
    """How long so many U-Net steps took others on this GPU, in a sentence; nothing where nobody has published it.

    Args:
        gpu: the device's name.
        family: of the model.
        config: with the resolution, batch, accumulation and gradient checkpointing.
        steps: that are left.
    """
    for row in family.steps_of_others:
        same = row.gpu in gpu.split() and row.checkpointed == bool(config.gradient_checkpointing)
        if same and steps and config.precision != "fp32":
            work = _forward(family, max(config.training_resolutions)) / _forward(family, row.px)
            images = config.batch_size * config.accumulation * (2 if config.class_prompts else 1)
            seconds = row.seconds * work * images
            return [
                f"By others' figures about {steps * seconds / 60:.0f} minutes of the U-Net stage: {row.seconds:.2g} s "
                f"a step on this GPU at {row.px} px with one image ({row.source}), scaled by the work to "
                f"{seconds:.2g} s."
            ]
    return []


def _forward(family: Family, px: int) -> float:
    """Teraflops of a forward pass at a resolution, from the nearest that was counted; it goes with the area."""
    nearest = min(family.forward_teraflops, key=lambda known: abs(known - px))
    return family.forward_teraflops[nearest] * (px / nearest) ** 2
