"""What need not be computed twice: each image's latent mean and deviation, and each prompt's text embedding."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastsd_helpers.dreambooth.families import Conditions, Family, Framing, cover
from fastsd_helpers.errors import DatasetError, Interrupted
from fastsd_helpers.images.files import PictureProblem, read_rgb
from fastsd_helpers.processes import Ranks
from fastsd_helpers.runtime import fault_point

if TYPE_CHECKING:
    import torch

    from fastsd_helpers.dreambooth.dataset.buckets import Bucket
    from fastsd_helpers.dreambooth.dataset.prepared import PreparedImage

__all__ = ["Latents", "SortedLatents", "encode_buckets", "encode_images", "encode_prompts"]

Box = tuple[float, float, float, float]
Part = tuple["PreparedImage", tuple[int, int], Box | None]  # an image, the size it is trained at, what of it is kept


@dataclass(frozen=True)
class Latents:
    """The VAE's posteriors of some images, scaled as the family has them; float32 [n, channels, h, w] on the CPU.

    `numbers` is what the denoiser is told about each image, float32 [n, ...], in families that tell it something.
    `mirrored` holds the same of the mirrored images: a mirrored image's latent is not its latent mirrored.
    """

    mean: "torch.Tensor"
    std: "torch.Tensor"
    mirrored: "Latents | None" = None
    numbers: "torch.Tensor | None" = None

    def draw(self, images: list[int], flips: list[bool], noise: "torch.Tensor") -> "torch.Tensor":
        """The latents of `images` at a point of their posteriors given by `noise`: float32 [batch, channels, h, w]."""
        import torch

        sources = self._sources(flips)
        mean = torch.stack([source.mean[image] for source, image in zip(sources, images, strict=True)])
        std = torch.stack([source.std[image] for source, image in zip(sources, images, strict=True)])
        return mean + std * noise

    def numbers_of(self, images: list[int], flips: list[bool]) -> "torch.Tensor | None":
        """What the denoiser is told about each of `images`, mirrored or not."""
        import torch

        if self.numbers is None:
            return None
        told = zip(self._sources(flips), images, strict=True)
        return torch.stack([source.numbers[image] for source, image in told if source.numbers is not None])

    def _sources(self, flips: list[bool]) -> "list[Latents]":
        turned = self.mirrored or self  # nothing is flipped where nothing was mirrored
        return [turned if flip else self for flip in flips]


@dataclass(frozen=True)
class SortedLatents:
    """The latents of some images, sorted into buckets; `images` are the images' indices, of each bucket in order."""

    buckets: tuple[Latents, ...]
    images: tuple[tuple[int, ...], ...]

    @classmethod
    def one(cls, latents: Latents) -> "SortedLatents":
        """All of them in one bucket, in order."""
        return cls((latents,), (tuple(range(len(latents.mean))),))

    @property
    def counts(self) -> list[int]:
        """How many images are in each bucket."""
        return [len(images) for images in self.images]

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Channels, height and width of each bucket's latents."""
        return [tuple(bucket.mean.shape[1:]) for bucket in self.buckets]


def _read_pixels(image: "PreparedImage", size: tuple[int, int], box: Box | None) -> "tuple[torch.Tensor, Framing]":
    """An image at the size it is trained at, [1, 3, height, width] in -1..1, and where it is in its photo."""
    import numpy as np
    import torch
    from PIL import Image

    try:
        picture = read_rgb(image.path)
    except PictureProblem as err:
        raise DatasetError(f"{image.path.name} {err.problem}.", "Prepare the images again.") from err
    framing = image.framing or Framing.whole(*picture.size)
    if picture.size != size:
        # Prepared at another size than this model is trained at: a clean resize, and a cut where the shape is another.
        kept = box or cover(*picture.size, size, image.focus)
        framing = framing.part(kept, *picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS, box=kept)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1, framing


def encode_images(
    family: Family,
    vae: Any,
    images: "tuple[PreparedImage, ...]",
    size: tuple[int, int],
    *,
    device: Any,
    flip: bool = False,
    ranks: Ranks | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Latents:
    """Encode images one by one, in float32, so that a latent does not depend on its neighbours in a batch.

    Args:
        family: of the model.
        vae: its VAE.
        images: they are resized to cover `size` (width, height), and what is over is cut off around their subject.
        size: a multiple of 8 in both directions.
        device: that the VAE is on.
        flip: whether the mirrored images are encoded too.
        ranks: the processes that share the work; each gets all latents.
        stopped: asked before each image.

    Raises:
        DatasetError: an image cannot be read.
        Interrupted: `stopped` said so, to one of the processes.
    """
    parts: list[Part] = [(image, size, None) for image in images]
    return _encode(family, vae, [parts], device=device, flip=flip, ranks=ranks, stopped=stopped)[0]


def encode_buckets(
    family: Family,
    vae: Any,
    images: "tuple[PreparedImage, ...]",
    buckets: "tuple[Bucket, ...]",
    *,
    device: Any,
    flip: bool = False,
    ranks: Ranks | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> SortedLatents:
    """Encode images as they were sorted into buckets, as `encode_images` does."""
    parts: list[list[Part]] = [
        [(images[place.image], bucket.size, place.box) for place in bucket.places] for bucket in buckets
    ]
    latents = _encode(family, vae, parts, device=device, flip=flip, ranks=ranks, stopped=stopped)
    return SortedLatents(tuple(latents), tuple(tuple(place.image for place in bucket.places) for bucket in buckets))


def _encode(
    family: Family,
    vae: Any,
    buckets: "list[list[Part]]",
    *,
    device: Any,
    flip: bool,
    ranks: Ranks | None,
    stopped: Callable[[], bool],
) -> list[Latents]:
    """The latents of each bucket's images, and of their mirrored ones; the work is divided over all buckets."""
    import torch

    def encode_one(part: "Part", mirror: bool) -> "tuple[torch.Tensor, torch.Tensor, Framing] | None":
        if stopped():
            return None
        pixels, framing = _read_pixels(*part)
        pixels = pixels.to(device)
        with torch.no_grad():
            mean, std = family.encode_pixels(vae, pixels.flip(-1) if mirror else pixels)
        fault_point("cache")
        return mean.float().cpu(), std.float().cpu(), framing

    def encode(mirror: bool) -> list[Latents]:
        parts = [part for bucket in buckets for part in bucket]
        shares = (ranks or Ranks()).divide(parts, partial(encode_one, mirror=mirror))
        whole = [share for share in shares if share is not None]
        if len(whole) < len(shares):  # which all processes see alike
            raise Interrupted(
                f"Stopped while the images were encoded, {len(whole)} of {len(shares)}; no step was lost.",
                "Train again with the same session to resume.",
            )
        encoded = iter(whole)
        found = []
        for bucket in buckets:
            means, stds, framings = zip(*(next(encoded) for _ in bucket), strict=True)
            numbers = family.picture_numbers(framings, *bucket[0][1], mirrored=mirror)
            found.append(Latents(torch.cat(means), torch.cat(stds), numbers=numbers))
        return found

    plain = encode(False)
    mirrored = encode(True) if flip else [None] * len(plain)
    return [Latents(one.mean, one.std, other, one.numbers) for one, other in zip(plain, mirrored, strict=True)]


def encode_prompts(
    family: Family, encoders: Mapping[str, Any], tokenizers: Mapping[str, Any], prompts: list[str], *, device: Any
) -> Conditions:
    """Text embeddings in float32 on the CPU, one prompt at a time; encoders and tokenizers by the encoder's part."""
    import torch

    ids = {part: rows.to(device) for part, rows in family.tokenize(tokenizers, prompts).items()}
    with torch.no_grad():
        found = [
            family.encode(encoders, {part: rows[place : place + 1] for part, rows in ids.items()}).float().to("cpu")
            for place in range(len(prompts))
        ]
    return Conditions.join(found)
