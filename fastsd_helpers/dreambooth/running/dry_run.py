"""What a run will take: its memory by the model's shapes, its time by a few real steps on random latents."""

import math
import time
from dataclasses import replace
from typing import Any

from fastsd_helpers.dreambooth.families import Framing
from fastsd_helpers.dreambooth.running.forecast import Plan
from fastsd_helpers.dreambooth.running.memory import Memory
from fastsd_helpers.dreambooth.training.cache import Latents, SortedLatents
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES
from fastsd_helpers.dreambooth.training.stages import TrainingContext, open_stage
from fastsd_helpers.wording import label_of

__all__ = ["fill_with_noise", "rehearse"]

_STEPS = 3  # the first one is not timed: it is the one that finds the fastest kernels
_ENOUGH_S = 20.0
_ALIKE = 1.3  # largest area to smallest: within it the largest stands for all


def rehearse(plan: Plan, context: TrainingContext, left: dict[str, int], prompts: list[str]) -> Plan:
    """Add to a plan the memory of each stage, computed, and the time of the steps that are left, measured here.

    Reading images, saving and drawing samples are not in it.

    Args:
        plan: of the run.
        context: with its settings; its caches are filled with random latents, so it is not to be trained with.
        left: stage -> steps still to make.
        prompts: the run's prompts.
    """
    import torch

    sizes = [(each["width"], each["height"], len(each["images"])) for each in plan.buckets if not each["held_out"]]
    sizes = sizes or [(context.config.resolution, context.config.resolution, 1)]
    smallest, largest = (choose(sizes, key=lambda size: size[0] * size[1])[:2] for choose in (min, max))
    fill_with_noise(context, prompts, *largest)
    memory, seconds, reasons = {}, {}, []
    needs = Memory(context.base, context.device.type)
    for stage in STAGE_NAMES:
        if left.get(stage):
            memory[stage] = needs.of_stage(context.config, stage, largest)
            try:
                trainer = open_stage(stage, context, None)
                seconds[stage] = _time_step(trainer)
                if math.prod(smallest) * _ALIKE < math.prod(largest):
                    fill_with_noise(context, prompts, *smallest)
                    seconds[stage] = _between(_time_step(trainer), seconds[stage], sizes)
                    fill_with_noise(context, prompts, *largest)
            except torch.OutOfMemoryError:
                reasons.append(
                    f"The {label_of(stage)} stage does not fit into this GPU's memory: try --gradient-checkpointing, "
                    "--batch-size 1, a smaller --resolution or --method lora."
                )
    minutes = None if reasons else sum(seconds[stage] * left[stage] for stage in seconds) / 60
    return replace(
        plan,
        memory_bytes={stage: each.total for stage, each in memory.items()},
        memory_parts={stage: vars(each) for stage, each in memory.items()},
        seconds_per_step=seconds,
        minutes=minutes,
        reasons=(*plan.reasons, *reasons),
    )


def _between(smallest_s: float, largest_s: float, sizes: list[tuple[int, int, int]]) -> float:
    """Seconds of a step on average, from those of the smallest and the largest size (width, height, images)."""
    areas = [width * height for width, height, _count in sizes]
    mean = sum(area * size[2] for area, size in zip(areas, sizes, strict=True)) / sum(size[2] for size in sizes)
    return smallest_s + (largest_s - smallest_s) * (mean - min(areas)) / (max(areas) - min(areas))


def fill_with_noise(context: TrainingContext, prompts: list[str], width: int, height: int) -> None:
    """Give a context random latents of one image of this size instead of encoded ones, for each prompt.

    Args:
        context: whose caches are replaced.
        prompts: of the run.
        width: in pixels.
        height: in pixels.
    """
    import torch

    family = context.family
    shape = (1, *family.latent_shape(width, height))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    numbers = family.picture_numbers([Framing.whole(width, height)], width, height)
    context.latents = SortedLatents.one(Latents(latents, latents, Latents(latents, latents, numbers=numbers), numbers))
    context.prompts, context.prompt_of = sorted(set(prompts)), [0]
    if context.config.class_prompts:
        context.class_latents, context.class_prompt_of = context.latents, [len(context.prompts)]


def _time_step(trainer: Any) -> float:
    """Seconds of one optimizer step; `take_step` returns the loss as a number, so the device is done by then."""
    timed: list[float] = []
    for step in range(_STEPS):
        started = time.perf_counter()
        trainer.take_step(step, 0.0)
        timed.append(time.perf_counter() - started)
        if timed[0] > _ENOUGH_S:
            break
    return min(timed[1:] or timed)
