"""All randomness of a run as a function of (seed, stage, step): nothing random has to be saved or restored.

A run that was cut and resumed draws the same images, mirrorings, noise and timesteps as one that was not.
Everything is drawn on the CPU, so that every device sees the same numbers; the rounding of bfloat16 weights alone is
drawn where they are, as it takes a number for each of them.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "Draw", "draw_offset", "draw_step", "generator_for", "pick_batch", "pick_images"]


@dataclass(frozen=True)
class Draw:
    """What one forward pass is made of, besides weights and images."""

    bucket: int  # that all of its images are of
    images: list[int]  # indices into the bucket's images
    flips: list[bool]
    posterior_noise: "torch.Tensor"  # float32 [batch, channels, h, w]: which latent of the VAE's posterior
    noise: "torch.Tensor"  # float32 [batch, channels, h, w]
    timesteps: "torch.Tensor"  # [batch], as the objective draws them; by default int64 0..999


@dataclass(frozen=True)
class Batch:
    """One forward pass: the photos' rows, then as many of class images where the prior is preserved."""

    latents: "torch.Tensor"  # float32 [rows, channels, h, w] on the device, as all of them
    noise: "torch.Tensor"
    timesteps: "torch.Tensor"
    prompts: list[int]
    class_rows: int = 0
    pictures: "torch.Tensor | None" = None  # what the denoiser is told about each image
    apart: "Batch | None" = None  # class images of another size, which take a forward pass of their own


def generator_for(*key: object, device: Any = "cpu") -> "torch.Generator":
    """A generator seeded by the SHA-256 of its key, so that near-by keys share nothing."""
    import torch

    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def pick_images(seed: int, stage: str, position: int, count: int, images: int) -> list[int]:
    """The images at places position..position+count of an endless row of shuffled epochs, each once in each."""
    import torch

    picked: list[int] = []
    while len(picked) < count:
        epoch, place = divmod(position + len(picked), images)
        order = torch.randperm(images, generator=generator_for(seed, stage, "epoch", epoch)).tolist()
        picked += order[place : place + count - len(picked)]
    return picked


def pick_batch(seed: int, stage: str, number: int, batch_size: int, images: Sequence[int]) -> tuple[int, list[int]]:
    """Which images are in batch `number` of a stage, counted from 0 over the parts of all steps.

    All of a batch are of one bucket. An epoch has as many batches as there are images, and a bucket as many of them as
    it has images, in an order that is shuffled anew; each takes the next images of the bucket's own row. So every image
    is seen equally often, also one that is alone in its bucket and fills a batch with itself.

    Args:
        seed: what the randomness is drawn with.
        stage: its name, drawn with too.
        number: of the batch.
        batch_size: images in it.
        images: how many there are in each bucket.

    Returns:
        the bucket's index, and indices into its images.
    """
    import torch

    ends = list(accumulate(images))
    epoch, place = divmod(number, ends[-1])
    order = torch.randperm(ends[-1], generator=generator_for(seed, stage, "buckets", epoch)).tolist()
    places = [bisect_right(ends, image) for image in order[: place + 1]]
    bucket = places[-1]
    earlier = epoch * images[bucket] + places[:-1].count(bucket)
    # The first bucket's row is the one that a run without buckets has.
    row = f"{stage}/bucket {bucket}" if bucket else stage
    return bucket, pick_images(seed, row, earlier * batch_size, batch_size, images[bucket])


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
    images: Sequence[int],
    latent_shapes: Sequence[tuple[int, int, int]],
    draw_times: "Callable[[int, torch.Generator], torch.Tensor] | None" = None,
    flip: bool = False,
) -> Draw:
    """Draw forward pass `part` of the `parts` that make up optimizer step `step`, counted from 0.

    `images` and `latent_shapes` are of each bucket: how many there are, and channels, height and width.
    """
    import torch

    def uniformly(count: int, generator: "torch.Generator") -> "torch.Tensor":
        return torch.randint(0, 1000, (count,), generator=generator)

    generator = generator_for(seed, stage, step, part)
    bucket, picked = pick_batch(seed, stage, step * parts + part, batch_size, images)
    shape = (batch_size, *latent_shapes[bucket])
    coins = torch.rand(batch_size, generator=generator).tolist()
    return Draw(
        bucket=bucket,
        images=picked,
        flips=[flip and coin < 0.5 for coin in coins],
        posterior_noise=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        timesteps=(draw_times or uniformly)(batch_size, generator),
    )
