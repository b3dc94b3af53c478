"""Seconds of a U-Net step as others have published them for a GPU, scaled to a run; each figure with its source."""

from dataclasses import dataclass

from fastsd_helpers.dreambooth.settings import ResolvedConfig

__all__ = ["published_lines"]


@dataclass(frozen=True)
class _Figure:
    """One row of somebody's table: a batch of one image, half precision."""

    gpu: str
    family: str
    px: int
    checkpointed: bool
    seconds: float
    source: str


_T4 = "ShivamShrirao's DreamBooth README"  # all weights, 8-bit AdamW; in steps a second there
_TUNER = "SimpleTuner's SEGMENTED_CHECKPOINTING.md"  # a LoKr
_FIGURES = (
    _Figure("T4", "sd15", 512, True, 1 / 0.93, _T4),
    _Figure("T4", "sd15", 512, False, 1 / 1.14, _T4),
    _Figure("H100", "sd15", 512, True, 0.305, _TUNER),
    _Figure("H100", "sd15", 512, False, 0.181, _TUNER),
    _Figure("L40S", "sd15", 512, False, 0.176, _TUNER),
    _Figure("H100", "sdxl", 1024, True, 1.080, _TUNER),
    _Figure("H100", "sdxl", 1024, False, 0.606, _TUNER),
    _Figure("L40S", "sdxl", 1024, False, 0.585, _TUNER),
)
# Teraflops of a forward pass of one image, counted on the networks' shapes; between them it goes with the area.
_FORWARD = {"sd15": {512: 0.803, 768: 2.148}, "sdxl": {512: 1.589, 768: 3.641, 1024: 6.761}}


def published_lines(gpu: str, family: str, config: ResolvedConfig, steps: int) -> list[str]:
    """How long so many U-Net steps took others on this GPU, in a sentence; nothing where nobody has published it.

    Args:
        gpu: the device's name.
        family: of the model.
        config: with the resolution, batch, accumulation and gradient checkpointing.
        steps: that are left.
    """
    for row in _FIGURES:
        same = (
            row.gpu in gpu.split() and row.family == family and row.checkpointed == bool(config.gradient_checkpointing)
        )
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


def _forward(family: str, px: int) -> float:
    """Teraflops of a forward pass at a resolution, from the nearest that was counted."""
    nearest = min(_FORWARD[family], key=lambda known: abs(known - px))
    return _FORWARD[family][nearest] * (px / nearest) ** 2
