"""The denoising objective, for training and for the held-out loss.

Sources: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", L_simple; the v target is that of Salimans
and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D; the weights are those of
Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4; the prior term is that of
Ruiz et al. 2022, "DreamBooth", equation 2.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.training.cache import Latents
from fastsd_helpers.dreambooth.training.randomness import generator_for

if TYPE_CHECKING:
    import torch

__all__ = ["HeldOut", "held_out_loss", "make_held_out", "min_snr_weights", "training_loss"]

# Every image is judged at eight noise levels, from nearly clean to nearly all noise.
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
    *,
    min_snr: float = 0.0,
    class_rows: int = 0,
    prior_weight: float = 1.0,
) -> "torch.Tensor":
    """Mean squared error of the prediction, in float32; latents [batch, 4, h/8, w/8], text [batch, 77, width].

    Args:
        unet, schedule, latents, noise, timesteps, text: the model and what it is asked.
        min_snr: gamma of the min-SNR weights, each row's by its own timestep; 0 weighs all timesteps alike.
        class_rows: how many rows, the last ones, are images of the class.
        prior_weight: what their mean counts beside the mean of the others.
    """
    import torch.nn.functional as functional

    noisy = schedule.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, text).sample
    target = target_of(schedule, latents, noise, timesteps)
    if not min_snr and not class_rows:
        return functional.mse_loss(predicted.float(), target.float())
    rows = functional.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)
    if min_snr:
        rows = rows * min_snr_weights(schedule, timesteps, min_snr)
    subject = len(rows) - class_rows
    loss = rows[:subject].mean()
    return loss + prior_weight * rows[subject:].mean() if class_rows else loss


def min_snr_weights(schedule: Any, timesteps: "torch.Tensor", gamma: float) -> "torch.Tensor":
    """Each row's loss weight, float32 [batch]: min(SNR, gamma) / SNR, for v-prediction min(SNR, gamma) / (SNR + 1).

    The signal-to-noise ratio is that of the noised latent, alpha_bar / (1 - alpha_bar).
    """
    alpha_bar = schedule.alphas_cumprod.to(timesteps.device)[timesteps].float()
    # Written without a division by SNR, so that an SNR of 0 (a schedule that ends in pure noise) has a weight.
    clipped = (alpha_bar / (1 - alpha_bar)).clamp(max=gamma)
    if schedule.config.prediction_type == "v_prediction":
        return clipped * (1 - alpha_bar)  # SNR + 1 = 1 / (1 - alpha_bar)
    return (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1.0)


@dataclass(frozen=True)
class HeldOut:
    """Fixed latents, noise and timesteps on which a model is judged before, during and after."""

    latents: "torch.Tensor"
    noise: "torch.Tensor"
    timesteps: "torch.Tensor"
    prompts: tuple[int, ...]  # index of each row's prompt
    label: str  # which images these are, in words


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
