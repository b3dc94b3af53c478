"""The name table of Stable Diffusion U-Nets: every tensor of a Diffusers U-Net beside its name in the original.

Block positions follow from the architecture, so the table is written as leaves of each kind of block plus where the
blocks stand. Widths are free: `u0`, `u1`, ... are the levels', `x` is the width of the text input, `adm` that of the
added conditions (SDXL).

Source: the key lists of CompVis/stable-diffusion, Stability-AI/stablediffusion and Stability-AI/generative-models, and
of diffusers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastsd_helpers.checkpoints.names.layout import Row, layer_rows

__all__ = ["UNetKind", "measured_unet", "unet_rows"]

_PREFIX = "model.diffusion_model."

# One line per layer: Diffusers name, original name, shape of its weight; the bias, where there is one, has the first
# size. {i} and {o} are the widths before and after a block, {c} the width of an attention.
_RESNET = (
    ("norm1", "in_layers.0", "{i}"),
    ("conv1", "in_layers.2", "{o} {i} 3 3"),
    ("time_emb_proj", "emb_layers.1", "{o} 4*u0"),
    ("norm2", "out_layers.0", "{o}"),
    ("conv2", "out_layers.3", "{o} {o} 3 3"),
    ("conv_shortcut", "skip_connection", "{o} {i} 1 1"),
)
# The same name on both sides.
_TRANSFORMER_BLOCK = (
    ("norm1", "{c}"),
    ("attn1.to_q", "{c} {c}"),
    ("attn1.to_k", "{c} {c}"),
    ("attn1.to_v", "{c} {c}"),
    ("attn1.to_out.0", "{c} {c}"),
    ("norm2", "{c}"),
    ("attn2.to_q", "{c} {c}"),
    ("attn2.to_k", "{c} x"),
    ("attn2.to_v", "{c} x"),
    ("attn2.to_out.0", "{c} {c}"),
    ("norm3", "{c}"),
    ("ff.net.0.proj", "8*{c} {c}"),
    ("ff.net.2", "{c} 4*{c}"),
)
_WITHOUT_BIAS = (".to_q", ".to_k", ".to_v")


@dataclass(frozen=True)
class UNetKind:
    """What sets one family's U-Net apart.

    depths: transformer blocks per level on the way down (and up); 0 is a level without attention.
    middle: transformer blocks in the middle.
    channels: what the first convolution takes: 4, or 9 for inpainting.
    linear: the projections around a transformer are matrices (SD 2.x, SDXL), not convolutions (SD 1.x).
    added: the model takes added conditions (SDXL).
    """

    depths: tuple[int, ...]
    middle: int
    channels: int = 4
    linear: bool = False
    added: bool = False


def measured_unet(kind: UNetKind) -> dict[str, tuple[str, str, int]]:
    """Which tensor shows which width."""
    attended = next(level for level, depth in enumerate(kind.depths) if depth)
    found = {f"u{n}": ("unet", f"down_blocks.{n}.resnets.0.conv1.weight", 0) for n in range(len(kind.depths))}
    found["x"] = ("unet", f"down_blocks.{attended}.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1)
    if kind.added:
        found["adm"] = ("unet", "add_embedding.linear_1.weight", 1)
    return found


def unet_rows(kind: UNetKind) -> Iterator[Row]:
    """Every tensor of such a U-Net."""
    levels = len(kind.depths)
    ends = [
        ("time_embedding.linear_1", "time_embed.0", "4*u0 u0"),
        ("time_embedding.linear_2", "time_embed.2", "4*u0 4*u0"),
        ("conv_in", "input_blocks.0.0", f"u0 {kind.channels} 3 3"),
        ("conv_norm_out", "out.0", "u0"),
        ("conv_out", "out.2", "4 u0 3 3"),
    ]
    if kind.added:
        ends.append(("add_embedding.linear_1", "label_emb.0.0", "4*u0 adm"))
        ends.append(("add_embedding.linear_2", "label_emb.0.2", "4*u0 4*u0"))
    for ours, theirs, sizes in ends:
        yield from _layer(ours, theirs, sizes)
    for level, depth in enumerate(kind.depths):  # down: input block 3 * level + 1 + place
        width, before = f"u{level}", f"u{max(level - 1, 0)}"
        for place in range(2):
            block = f"input_blocks.{3 * level + 1 + place}"
            taken = width if place else before
            yield from _resnet(f"down_blocks.{level}.resnets.{place}", f"{block}.0", taken, width)
            yield from _attention(f"down_blocks.{level}.attentions.{place}", f"{block}.1", width, depth, kind)
        if level < levels - 1:
            below = f"input_blocks.{3 * level + 3}.0.op"
            yield from _layer(f"down_blocks.{level}.downsamplers.0.conv", below, f"{width} {width} 3 3")
    last = f"u{levels - 1}"
    yield from _resnet("mid_block.resnets.0", "middle_block.0", last, last)
    yield from _attention("mid_block.attentions.0", "middle_block.1", last, kind.middle, kind)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", last, last)
    for level in range(levels):  # up: output block 3 * level + place; each takes in what the way down left at its size
        width, before = f"u{levels - 1 - level}", f"u{min(levels - level, levels - 1)}"
        skipped = (width, width, f"u{max(levels - 2 - level, 0)}")
        depth = kind.depths[levels - 1 - level]
        for place in range(3):
            block = f"output_blocks.{3 * level + place}"
            taken = f"{width if place else before}+{skipped[place]}"
            yield from _resnet(f"up_blocks.{level}.resnets.{place}", f"{block}.0", taken, width)
            yield from _attention(f"up_blocks.{level}.attentions.{place}", f"{block}.1", width, depth, kind)
        if level < levels - 1:
            above = f"output_blocks.{3 * level + 2}.{2 if depth else 1}.conv"
            yield from _layer(f"up_blocks.{level}.upsamplers.0.conv", above, f"{width} {width} 3 3")


def _layer(diffusers: str, original: str, sizes: str, **rest: Any) -> Iterator[Row]:
    bias = not diffusers.endswith(_WITHOUT_BIAS)
    return layer_rows("unet", diffusers, _PREFIX + original, sizes, bias=bias, **rest)


def _resnet(diffusers: str, original: str, before: str, after: str) -> Iterator[Row]:
    for ours, theirs, sizes in _RESNET:
        changes = (before, after) if ours == "conv_shortcut" else None
        yield from _layer(
            f"{diffusers}.{ours}", f"{original}.{theirs}", sizes.format(i=before, o=after), unless_equal=changes
        )


def _attention(diffusers: str, original: str, width: str, depth: int, kind: UNetKind) -> Iterator[Row]:
    if not depth:
        return
    projection = f"{width} {width}" if kind.linear else f"{width} {width} 1 1"
    yield from _layer(f"{diffusers}.norm", f"{original}.norm", width)
    yield from _layer(f"{diffusers}.proj_in", f"{original}.proj_in", projection)
    for block in range(depth):
        for leaf, sizes in _TRANSFORMER_BLOCK:
            name = f"transformer_blocks.{block}.{leaf}"
            yield from _layer(f"{diffusers}.{name}", f"{original}.{name}", sizes.format(c=width))
    yield from _layer(f"{diffusers}.proj_out", f"{original}.proj_out", projection)
