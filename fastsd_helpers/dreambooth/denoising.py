"""The denoising objective, for training and for the held-out loss.

Source: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", L_simple; the v target is that of Salimans
and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.cache import Latents
from fastsd_helpers.dreambooth.chance import generator_for

if TYPE_CHECKING:
    import torch

__all__ = ["HeldOut", "held_out_loss", "make_held_out", "training_loss"]

# Every picture is judged at eight noise levels, from nearly clean to nearly all noise.
_LEVELS = (60, 180, 300, 420, 540, 660, 780, 900)


def target_of(
    schedule: Any, latents: "torch.Tensor", noise: "torch.Tensor", timesteps: "torch.Tensor"
) -> "torch.Tensor":
    """What the U-Net should have predicted, by the schedule's prediction type."""
    if schedule.config.prediction_type == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    return noise


def training_loss(
    unet: Any,
    schedule: Any,
    latents: "torch.Tensor",
    noise: "torch.Tensor",
    timesteps: "torch.Tensor",
    text: "torch.Tensor",
) -> "torch.Tensor":
    """Mean squared error of the prediction, in float32; latents [batch, 4, h/8, w/8], text [batch, 77, width]."""
    import torch.nn.functional as functional

    noisy = schedule.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, text).sample
    return functional.mse_loss(predicted.float(), target_of(schedule, latents, noise, timesteps).float())


@dataclass(frozen=True)
class HeldOut:
    """Fixed latents, noise and timesteps on which a model is judged before, during and after."""

    latents: "torch.Tensor"
    noise: "torch.Tensor"
    timesteps: "torch.Tensor"
    prompts: tuple[int, ...]  # index of each row's prompt
    label: str  # which pictures these are, in words


def make_held_out(latents: Latents, prompts: list[int], *, seed: int, label: str) -> HeldOut:
    """Fix the noise: it is reserved for this and never drawn in training."""
    import torch

    generator = generator_for(seed, "held-out")
    count = len(prompts)
    rows = [index for index in range(count) for _ in _LEVELS]
    return HeldOut(
        latents=latents.mean[rows],
        noise=torch.randn((len(rows), *latents.mean.shape[1:]), generator=generator),
        timesteps=torch.tensor(_LEVELS * count),
        prompts=tuple(prompts[row] for row in rows),
        label=label,
    )


def held_out_loss(
    unet: Any, schedule: Any, held_out: HeldOut, text: "torch.Tensor", *, device: Any, batch_size: int = 8
) -> float:
    """Mean loss over the fixed rows; `text` is float32 [prompts, 77, width]."""
    import torch

    total = 0.0
    for start in range(0, len(held_out.timesteps), batch_size):
        rows = slice(start, start + batch_size)
        context = text[list(held_out.prompts[rows])]
        with torch.no_grad():
            loss = training_loss(
                unet,
                schedule,
                held_out.latents[rows].to(device),
                held_out.noise[rows].to(device),
                held_out.timesteps[rows].to(device),
                context.to(device),
            )
        total += loss.item() * len(held_out.prompts[rows])
    return total / len(held_out.timesteps)
