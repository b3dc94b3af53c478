"""The denoising objective, for training and for the held-out loss.

Noise, target and weights are the family's own. Source: the prior term is that of Ruiz et al. 2022, "DreamBooth",
equation 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.families import Conditions, Objective
from fastsd_helpers.dreambooth.training.cache import Latents
from fastsd_helpers.dreambooth.training.randomness import generator_for

if TYPE_CHECKING:
    import torch

__all__ = ["HeldOut", "Predict", "held_out_loss", "make_held_out", "training_loss"]

# Noised latents, times, text and what is told about each image -> prediction.
Predict = Callable[..., "torch.Tensor"]


def training_loss(
    predict: Predict,
    objective: Objective,
    latents: "torch.Tensor",
    noise: "torch.Tensor",
    timesteps: "torch.Tensor",
    text: Conditions,
    pictures: "torch.Tensor | None" = None,
    *,
    min_snr: float = 0.0,
    class_rows: int = 0,
    prior_weight: float = 1.0,
) -> "torch.Tensor":
    """Mean squared error of the prediction, in float32.

    Args:
        predict: the denoiser, as `Family.predict`.
        objective: of the family.
        latents: float32 [batch, channels, h, w].
        noise: float32 [batch, channels, h, w].
        timesteps: what is told of each row, [batch] or a record of so many rows.
        text: what is told of each row, [batch] or a record of so many rows.
        pictures: what is told of each row, [batch] or a record of so many rows.
        min_snr: gamma of the min-SNR weights, each row's by its own timestep; 0 weighs all timesteps alike.
        class_rows: how many rows, the last ones, are images of the class.
        prior_weight: what their mean counts beside the mean of the others.
    """
    import torch.nn.functional as functional

    noisy = objective.add_noise(latents, noise, timesteps)
    predicted = predict(noisy, timesteps, text, pictures)
    target = objective.target(latents, noise, timesteps)
    if not min_snr and not class_rows:
        return functional.mse_loss(predicted.float(), target.float())
    rows = functional.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)
    if min_snr:
        rows = rows * objective.weights(timesteps, min_snr)
    subject = len(rows) - class_rows
    loss = rows[:subject].mean()
    return loss + prior_weight * rows[subject:].mean() if class_rows else loss


@dataclass(frozen=True)
class HeldOut:
    """Fixed latents, noise and timesteps on which a model is judged before, during and after."""

    latents: "torch.Tensor"
    noise: "torch.Tensor"
    timesteps: "torch.Tensor"
    prompts: tuple[int, ...]  # index of each row's prompt
    label: str  # which images these are, in words
    pictures: "torch.Tensor | None" = None  # what the denoiser is told about each row's image


def make_held_out(
    latents: Latents, prompts: list[int], *, seed: int, label: str, objective: Objective, bucket: int = 0
) -> HeldOut:
    """Fix the noise of a bucket's images: it is reserved for this and never drawn in training."""
    import torch

    generator = generator_for(seed, "held-out", bucket) if bucket else generator_for(seed, "held-out")
    count = len(prompts)
    levels = list(objective.held_out_times)
    rows = [index for index in range(count) for _ in levels]
    return HeldOut(
        latents=latents.mean[rows],
        noise=torch.randn((len(rows), *latents.mean.shape[1:]), generator=generator),
        timesteps=torch.tensor(levels * count),
        prompts=tuple(prompts[row] for row in rows),
        label=label,
        pictures=None if latents.numbers is None else latents.numbers[rows],
    )


def held_out_loss(
    predict: Predict,
    objective: Objective,
    held_out: Sequence[HeldOut],
    text: Conditions,
    *,
    device: Any,
    batch_size: int = 8,
) -> float:
    """Mean loss over the fixed rows of all buckets; `text` has a row for every prompt."""
    import torch

    total = 0.0
    for bucket in held_out:
        for start in range(0, len(bucket.timesteps), batch_size):
            rows = slice(start, start + batch_size)
            with torch.no_grad():
                loss = training_loss(
                    predict,
                    objective,
                    bucket.latents[rows].to(device),
                    bucket.noise[rows].to(device),
                    bucket.timesteps[rows].to(device),
                    text[list(bucket.prompts[rows])].to(device),
                    None if bucket.pictures is None else bucket.pictures[rows].to(device),
                )
            total += loss.item() * len(bucket.prompts[rows])
    return total / sum(len(bucket.timesteps) for bucket in held_out)
