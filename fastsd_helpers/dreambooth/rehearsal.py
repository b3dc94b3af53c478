"""How long a run will take: a few real steps of each stage on random latents, timed, and nothing of them kept."""

import time
from dataclasses import replace
from typing import Any

from fastsd_helpers.dreambooth.cache import Latents
from fastsd_helpers.dreambooth.footprint import peak_bytes
from fastsd_helpers.dreambooth.plan import Plan
from fastsd_helpers.dreambooth.stages import STAGES, Studio, open_stage

__all__ = ["rehearse"]

_STEPS = 3  # the first one is not timed: it is the one that finds the fastest kernels
_ENOUGH_S = 20.0


def rehearse(plan: Plan, studio: Studio, left: dict[str, int], prompts: list[str]) -> Plan:
    """Add to a plan the memory of each stage, computed, and the time of the steps that are left, measured here.

    Reading images, saving and drawing samples are not in it.

    Args:
        plan: of the run.
        studio: with its settings; its caches are filled with random latents, so it is not to be trained with.
        left: stage -> steps still to make.
        prompts: the run's prompts.
    """
    import torch

    _fill(studio, prompts)
    memory, seconds, reasons = {}, {}, []
    for stage in STAGES:
        if left.get(stage.name):
            memory[stage.name] = peak_bytes(studio, stage.name)
            try:
                seconds[stage.name] = _time_step(open_stage(stage, studio, None))
            except torch.OutOfMemoryError:
                reasons.append(
                    f"The {stage.name} stage does not fit into this GPU's memory: try --gradient-checkpointing, "
                    "--batch-size 1, a smaller --resolution or --method lora."
                )
    minutes = None if reasons else sum(seconds[stage] * left[stage] for stage in seconds) / 60
    return replace(
        plan,
        memory_bytes=memory,
        seconds_per_step=seconds,
        minutes=minutes,
        reasons=(*plan.reasons, *reasons),
    )


def _fill(studio: Studio, prompts: list[str]) -> None:
    import torch

    side = studio.config.resolution // 8
    latents = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(0))
    studio.latents = Latents(latents, latents, Latents(latents, latents))
    studio.prompts, studio.prompt_of = sorted(set(prompts)), [0]
    if studio.config.class_prompts:
        studio.class_latents, studio.class_prompt_of = studio.latents, [len(studio.prompts)]


def _time_step(job: Any) -> float:
    """Seconds of one optimizer step; `take_step` returns the loss as a number, so the device is done by then."""
    timed: list[float] = []
    for step in range(_STEPS):
        started = time.perf_counter()
        job.take_step(step, 0.0)
        timed.append(time.perf_counter() - started)
        if timed[0] > _ENOUGH_S:
            break
    return min(timed[1:] or timed)
