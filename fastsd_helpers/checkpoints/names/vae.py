"""The name table of the VAEs of Stable Diffusion and Flux: Diffusers name beside the original name.

Widths are free: `v0`..`v3` are the levels'. Stable Diffusion has 4 latent channels and two 1x1 convolutions around
them, Flux has 16 and none.

Source: the key lists of CompVis/stable-diffusion and black-forest-labs/flux, and of diffusers.
"""

from collections.abc import Iterator
from functools import partial

from fastsd_helpers.checkpoints.names.layout import Row, layer_rows

__all__ = ["VAE_SPELLINGS", "measured_vae", "vae_rows"]

_LEVELS = 4

_RESNET = (
    ("norm1", "norm1", "{i}"),
    ("conv1", "conv1", "{o} {i} 3 3"),
    ("norm2", "norm2", "{o}"),
    ("conv2", "conv2", "{o} {o} 3 3"),
    ("conv_shortcut", "nin_shortcut", "{o} {i} 1 1"),
)
_ATTENTION = (
    ("group_norm", "norm", "v3"),
    ("to_q", "q", "v3 v3 1 1"),
    ("to_k", "k", "v3 v3 1 1"),
    ("to_v", "v", "v3 v3 1 1"),
    ("to_out.0", "proj_out", "v3 v3 1 1"),
)
_ENDS = (
    ("encoder.conv_in", "encoder.conv_in", "v0 3 3 3"),
    ("encoder.conv_norm_out", "encoder.norm_out", "v3"),
    ("encoder.conv_out", "encoder.conv_out", "{2z} v3 3 3"),
    ("decoder.conv_in", "decoder.conv_in", "v3 {z} 3 3"),
    ("decoder.conv_norm_out", "decoder.norm_out", "v0"),
    ("decoder.conv_out", "decoder.conv_out", "3 v0 3 3"),
)
_QUANT = (
    ("quant_conv", "quant_conv", "{2z} {2z} 1 1"),
    ("post_quant_conv", "post_quant_conv", "{z} {z} 1 1"),
)
# diffusers before 0.15 named the VAE's attention otherwise, and folders saved by it are still about.
_OLD_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
VAE_SPELLINGS = tuple(
    (f"{side}.mid_block.attentions.0.{old}.", f"{side}.mid_block.attentions.0.{new}.")
    for side in ("encoder", "decoder")
    for old, new in _OLD_ATTENTION
)

_layer = partial(layer_rows, "vae")


def measured_vae() -> dict[str, tuple[str, str, int]]:
    """Which tensor shows which width."""
    return {f"v{n}": ("vae", f"encoder.down_blocks.{n}.resnets.0.conv1.weight", 0) for n in range(_LEVELS)}


def vae_rows(prefix: str, *, flux: bool = False) -> Iterator[Row]:
    """Every tensor of the VAE of Stable Diffusion, or of Flux."""
    latents = 16 if flux else 4
    for ours, theirs, sizes in _ENDS if flux else (*_ENDS, *_QUANT):
        filled = sizes.replace("{2z}", str(2 * latents)).replace("{z}", str(latents))
        yield from _layer(ours, prefix + theirs, filled)
    for side in ("encoder", "decoder"):
        for place in range(2):
            name = f"{prefix}{side}.mid.block_{place + 1}"
            yield from _resnet(f"{side}.mid_block.resnets.{place}", name, "v3", "v3")
        for ours, theirs, sizes in _ATTENTION:
            name = f"{prefix}{side}.mid.attn_1.{theirs}"
            form = "same" if ours == "group_norm" else "flat"
            yield from _layer(f"{side}.mid_block.attentions.0.{ours}", name, sizes, form=form)
    for level in range(_LEVELS):
        width, before = f"v{level}", f"v{max(level - 1, 0)}"
        for place in range(2):
            ours, theirs = f"encoder.down_blocks.{level}.resnets.{place}", f"encoder.down.{level}.block.{place}"
            yield from _resnet(ours, prefix + theirs, width if place else before, width)
        if level < _LEVELS - 1:
            below = f"{prefix}encoder.down.{level}.downsample.conv"
            yield from layer_rows(
                "vae", f"encoder.down_blocks.{level}.downsamplers.0.conv", below, f"{width} {width} 3 3"
            )
    for level in range(_LEVELS):  # the original counts the decoder's levels from the image down
        width, before = f"v{3 - level}", f"v{min(4 - level, 3)}"
        for place in range(3):
            ours, theirs = f"decoder.up_blocks.{level}.resnets.{place}", f"decoder.up.{3 - level}.block.{place}"
            yield from _resnet(ours, prefix + theirs, width if place else before, width)
        if level < _LEVELS - 1:
            above = f"{prefix}decoder.up.{3 - level}.upsample.conv"
            yield from _layer(f"decoder.up_blocks.{level}.upsamplers.0.conv", above, f"{width} {width} 3 3")


def _resnet(diffusers: str, original: str, before: str, after: str) -> Iterator[Row]:
    for ours, theirs, sizes in _RESNET:
        changes = (before, after) if ours == "conv_shortcut" else None
        filled = sizes.format(i=before, o=after)
        yield from _layer(f"{diffusers}.{ours}", f"{original}.{theirs}", filled, unless_equal=changes)
