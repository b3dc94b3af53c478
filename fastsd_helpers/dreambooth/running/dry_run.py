"""What a run will take: its memory by the model's shapes, its time by a few real steps on random latents.

No weights are loaded for the memory, and no device is asked. Weights, gradients, the optimizer's state and averages are
counted exactly. What the forward pass keeps for the backward pass is found by running the U-Net on the `meta` device
and adding up what autograd saves; half precision and gradient checkpointing are then two factors, so that part is good
to about a fifth. Allocator losses are not in it.
"""

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.families import Framing
from fastsd_helpers.dreambooth.running.forecast import Plan
from fastsd_helpers.dreambooth.training.base_model import suit_cpu
from fastsd_helpers.dreambooth.training.cache import Latents, SortedLatents
from fastsd_helpers.dreambooth.training.optimizers import state_bytes, weight_bytes
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES
from fastsd_helpers.dreambooth.training.stages import TrainingContext, open_stage
from fastsd_helpers.wording import label_of

if TYPE_CHECKING:
    import torch

__all__ = ["peak_bytes", "rehearse", "saved_bytes"]

_STEPS = 3  # the first one is not timed: it is the one that finds the fastest kernels
_ENOUGH_S = 20.0
_ALIKE = 1.3  # largest area to smallest: within it the largest stands for all
# Under autocast most values are kept in 16 bits, those of norms in 32.
_HALF = 0.6
# Each block's inputs, and the whole of one block while it is computed again.
_CHECKPOINTED = 0.3
# A tensor's gradient, and in float32 itself, its gradient, the mean square, the step and the chance of its rounding.
_STEP_BYTES = 2 + 5 * 4
_CUDA_BYTES = 600 * 2**20  # CUDA's own context and libraries


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
    _fill(context, prompts, *largest)
    memory, seconds, reasons = {}, {}, []
    for stage in STAGE_NAMES:
        if left.get(stage):
            memory[stage] = peak_bytes(context, stage, largest)
            try:
                trainer = open_stage(stage, context, None)
                seconds[stage] = _time_step(trainer)
                if math.prod(smallest) * _ALIKE < math.prod(largest):
                    _fill(context, prompts, *smallest)
                    seconds[stage] = _between(_time_step(trainer), seconds[stage], sizes)
                    _fill(context, prompts, *largest)
            except torch.OutOfMemoryError:
                reasons.append(
                    f"The {label_of(stage)} stage does not fit into this GPU's memory: try --gradient-checkpointing, "
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


def _between(smallest_s: float, largest_s: float, sizes: list[tuple[int, int, int]]) -> float:
    """Seconds of a step on average, from those of the smallest and the largest size (width, height, images)."""
    areas = [width * height for width, height, _count in sizes]
    mean = sum(area * size[2] for area, size in zip(areas, sizes, strict=True)) / sum(size[2] for size in sizes)
    return smallest_s + (largest_s - smallest_s) * (mean - min(areas)) / (max(areas) - min(areas))


def _fill(context: TrainingContext, prompts: list[str], width: int, height: int) -> None:
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


def peak_bytes(context: TrainingContext, stage: str, size: tuple[int, int] | None = None) -> int:
    """Bytes at the peak of a stage's optimizer step, on the device that the context trains on.

    `size` is width and height of the largest images; if it is not given, the resolution's square.
    """
    config = context.config
    unet, trained = context.count_of("unet"), context.trained_count_of(stage)
    present = unet + (context.count_of("text_encoder") if stage == "text_encoder" else 0)
    # Of float32 weights autocast keeps a 16-bit copy until the step is done.
    weights = present * (2 if context.base_dtype else 6 if context.dtype else 4)
    learning = trained * (state_bytes(config.optimizer) + (4 if config.ema else 0)) + _gradient_bytes(context, stage)
    kept = saved_bytes(context, learns=stage == "unet", size=size) * (_HALF if context.dtype else 1.0)
    kept *= _CHECKPOINTED if config.gradient_checkpointing else 1.0
    own = _CUDA_BYTES if context.device.type == "cuda" else 0
    return int(weights + learning + kept) + own


def _gradient_bytes(context: TrainingContext, stage: str) -> int:
    """Bytes of a stage's gradients: of all of them, or of the largest alone where each is stepped by itself."""
    if context.config.optimizer != "adafactor" or context.parts > 1:
        return weight_bytes(context.config) * context.trained_count_of(stage)
    networks = [context.build_empty(part) for part in context.family.parts_of(stage)]
    return _STEP_BYTES * max(parameter.numel() for network in networks for parameter in network.parameters())


def saved_bytes(context: TrainingContext, *, learns: bool, size: tuple[int, int] | None = None) -> int:
    """Bytes in float32 that one forward pass of the denoiser keeps for its backward pass, weights not counted.

    Args:
        context: for the denoiser's configuration and the settings' batch and resolution.
        learns: whether the denoiser itself is trained, or only what comes before it.
        size: width and height of the images; if it is not given, the resolution's square.
    """
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    config = context.config
    unet = context.build_empty(context.family.denoiser).requires_grad_(learns and config.method == "full")
    if context.suits_cpu():
        suit_cpu(unet)
    rows = config.batch_size * (2 if config.class_prompts else 1)
    shape = context.family.latent_shape(*(size or (config.resolution, config.resolution)))
    own = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    seen: dict[int, Any] = {}  # holds the storages, so that no number is given twice

    def note(tensor: "torch.Tensor") -> "torch.Tensor":
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage, tensor.numel() * tensor.element_size())
        return tensor

    with torch.device("meta"):
        latents = torch.empty(rows, *shape)
        text, told = context.family.blank_conditions(unet, rows)
        timesteps = torch.empty(rows, dtype=torch.int64)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            context.family.predict(unet, latents, timesteps, text, told)
    return sum(size for _, size in seen.values())
