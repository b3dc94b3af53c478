"""What need not be computed twice: each image's latent mean and deviation, and each prompt's text embedding."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.images.files import PictureProblem, read_rgb

if TYPE_CHECKING:
    import torch

    from fastsd_helpers.dreambooth.dataset.prepared import PreparedImage

__all__ = ["Latents", "encode_images", "encode_prompts", "tokenize"]


@dataclass(frozen=True)
class Latents:
    """The VAE's posteriors of some images, already times the scaling factor; float32 [n, 4, h/8, w/8] on the CPU.

    `mirrored` holds those of the mirrored images: a mirrored image's latent is not its latent mirrored.
    """

    mean: "torch.Tensor"
    std: "torch.Tensor"
    mirrored: "Latents | None" = None

    def draw(self, images: list[int], flips: list[bool], noise: "torch.Tensor") -> "torch.Tensor":
        """The latents of `images` at a point of their posteriors given by `noise`: float32 [batch, 4, h/8, w/8]."""
        import torch

        turned = self.mirrored or self  # nothing is flipped where nothing was mirrored
        sources = [turned if flip else self for flip in flips]
        mean = torch.stack([source.mean[image] for source, image in zip(sources, images, strict=True)])
        std = torch.stack([source.std[image] for source, image in zip(sources, images, strict=True)])
        return mean + std * noise


def _read_pixels(path: Any, size: int) -> "torch.Tensor":
    import numpy as np
    import torch
    from PIL import Image

    try:
        picture = read_rgb(path)
    except PictureProblem as err:
        raise DatasetError(f"{path.name} {err.problem}.", "Prepare the images again.") from err
    if picture.size != (size, size):
        # Prepared at another size than this model is trained at: a clean resize, never a second crop.
        if picture.width != picture.height:
            raise DatasetError(
                f"{path.name} is {picture.width} x {picture.height}; training needs square images.",
                "Prepare the images again with --crop smart or --crop center.",
            )
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def encode_images(
    vae: Any, images: "tuple[PreparedImage, ...]", size: int, *, device: Any, flip: bool = False
) -> Latents:
    """Encode images one by one, in float32, so that a latent does not depend on its neighbours in a batch."""
    import torch

    def encode(mirror: bool) -> Latents:
        means, stds = [], []
        for image in images:
            pixels = _read_pixels(image.path, size).to(device)
            with torch.no_grad():
                posterior = vae.encode(pixels.flip(-1) if mirror else pixels).latent_dist
            means.append((posterior.mean * vae.config.scaling_factor).float().cpu())
            stds.append((posterior.std * vae.config.scaling_factor).float().cpu())
        return Latents(torch.cat(means), torch.cat(stds))

    plain = encode(False)
    return Latents(plain.mean, plain.std, encode(True)) if flip else plain


def tokenize(tokenizer: Any, prompts: list[str]) -> "torch.Tensor":
    """Token ids int64 [n, 77], padded and cut as Stable Diffusion expects."""
    return tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def encode_prompts(text_encoder: Any, tokenizer: Any, prompts: list[str], *, device: Any) -> "torch.Tensor":
    """Text embeddings float32 [n, 77, width] on the CPU, one prompt at a time."""
    import torch

    ids = tokenize(tokenizer, prompts).to(device)
    with torch.no_grad():
        rows = [text_encoder(row[None]).last_hidden_state.float().cpu() for row in ids]
    return torch.cat(rows)
