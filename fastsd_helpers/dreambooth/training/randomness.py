"""All randomness of a run as a function of (seed, stage, step): nothing random has to be saved or restored.

A run that was cut and resumed draws the same images, mirrorings, noise and timesteps as one that was not.
Everything is drawn on the CPU, so that every device sees the same numbers.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Draw", "draw_offset", "draw_step", "generator_for", "pick_images"]


@dataclass(frozen=True)
class Draw:
    """What one forward pass is made of, besides weights and images."""

    images: list[int]  # indices into the training images
    flips: list[bool]
    posterior_noise: "torch.Tensor"  # float32 [batch, 4, h/8, w/8]: which latent of the VAE's posterior
    noise: "torch.Tensor"  # float32 [batch, 4, h/8, w/8]
    timesteps: "torch.Tensor"  # int64 [batch], 0..999


def generator_for(*key: object) -> "torch.Generator":
    """A CPU generator seeded by the SHA-256 of its key, so that near-by keys share nothing."""
    import torch

    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def pick_images(seed: int, stage: str, position: int, count: int, images: int) -> list[int]:
    """The images at places position..position+count of an endless row of shuffled epochs, each once in each."""
    import torch

    picked: list[int] = []
    while len(picked) < count:
        epoch, place = divmod(position + len(picked), images)
        order = torch.randperm(images, generator=generator_for(seed, stage, "epoch", epoch)).tolist()
        picked += order[place : place + count - len(picked)]
    return picked


def draw_offset(seed: int, stage: str, step: int, part: int, *, batch_size: int, channels: int) -> "torch.Tensor":
    """One value per image and channel, float32 [batch, channels, 1, 1]; it leaves the step's other draws as they are.

    Source: Guttenberg 2023, "Diffusion with Offset Noise".
    """
    import torch

    generator = generator_for(seed, stage, step, part, "offset")
    return torch.randn((batch_size, channels, 1, 1), generator=generator)


def draw_step(
    seed: int,
    stage: str,
    step: int,
    part: int = 0,
    *,
    parts: int = 1,
    batch_size: int,
    images: int,
    latent_shape: tuple[int, int, int],
    timesteps: int = 1000,
    flip: bool = False,
) -> Draw:
    """Draw forward pass `part` of the `parts` that make up optimizer step `step`, counted from 0."""
    import torch

    generator = generator_for(seed, stage, step, part)
    shape = (batch_size, *latent_shape)
    coins = torch.rand(batch_size, generator=generator).tolist()
    return Draw(
        images=pick_images(seed, stage, (step * parts + part) * batch_size, batch_size, images),
        flips=[flip and coin < 0.5 for coin in coins],
        posterior_noise=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        timesteps=torch.randint(0, timesteps, (batch_size,), generator=generator),
    )
