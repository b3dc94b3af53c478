"""What the training of each model family differs in, one file a family; all else of the workflow knows none by name.

A new family is a file here, a line below and rows in models.toml. What the two planned next need of the interface
(`family.Family`), checked on paper:

Flux.1. `parts`: transformer, text_encoder (CLIP-L), text_encoder_2 (T5), vae; `denoiser` is the transformer,
`trained_encoders` CLIP-L alone. `encode`: T5's sequence padded to 512 without a mask, CLIP's pooled
vector, `ids` zeros [n, tokens, 3]. `encode_pixels`: (z - shift) * scale, 16 channels. An objective of its own beside
`diffusion`: x_t = (1 - s) x + s n, target n - x, times s in 0..1 (`draw_times` draws the logit-normal and shifts it),
`held_out_times` (k + 0.5) / 8, weights 1. `predict` packs 2 x 2 pixels into [n, h/2 * w/2, 64], makes the image's ids
from the shape, gives t = s and the guidance vector, and unpacks. `lora_layers`: the file's q, k, v are one matrix with
three times the alpha, which `checkpoints` fuses. `half_base` becomes a choice (float16, bfloat16 or nf4).

FLUX.2 klein. As Flux.1 with one text encoder (Qwen3): the sequence is layers 9, 18 and 27 side by side, `lengths` its
valid tokens, `ids` [n, tokens, 4] with the token's place as the last number. `encode_pixels`: 32 channels made 128 by
2 x 2, then normalised with the VAE's running mean and variance, in `latent_shape` too (128, h/16, w/16); no guidance.
"""

from fastsd_helpers.dreambooth.families.conditions import Conditions
from fastsd_helpers.dreambooth.families.family import Counts, Family, Ids, Objective
from fastsd_helpers.dreambooth.families.framing import Framing, cover
from fastsd_helpers.dreambooth.families.sdxl import StableDiffusionXL
from fastsd_helpers.dreambooth.families.stable_diffusion import StableDiffusion1, StableDiffusion2

__all__ = ["Conditions", "Counts", "Family", "Framing", "Ids", "Objective", "cover", "family_named"]

_FAMILIES: dict[str, Family] = {
    "sd15": StableDiffusion1(),
    "sd21": StableDiffusion2(),
    "sdxl": StableDiffusionXL(),
}


def family_named(key: str) -> Family:
    """The family of this key; every one in the registry's TRAINABLE_FAMILIES has one."""
    return _FAMILIES[key]
