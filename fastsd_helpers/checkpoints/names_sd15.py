"""The SD 1.x name table: every tensor of a Diffusers folder beside its name in the original single file.

Block positions follow from the architecture (4 levels, 2 residual blocks each, attention in the upper three), so the
table is written as leaves of each kind of block plus where the blocks stand. Widths are free: `u0`..`u3` are the
U-Net's, `v0`..`v3` the VAE's, `x` is the width of the U-Net's text input, `h`, `m`, `vocab` and `positions` belong to
the text encoder.

Source: the key lists of CompVis/stable-diffusion (configs/stable-diffusion/v1-inference.yaml) and of diffusers.
"""

from collections.abc import Iterator
from functools import cache

from fastsd_helpers.checkpoints.layout import Family, Row

__all__ = ["sd15"]

_LEVELS = 4
_TEXT_LAYERS = 12

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_TEXT = "cond_stage_model.transformer.text_model."

# One line per layer: Diffusers name, original name, shape of its weight; the bias, where there is one, has the first
# size. {i} and {o} are the widths before and after a block, {c} the width of an attention.
_UNET_RESNET = (
    ("norm1", "in_layers.0", "{i}"),
    ("conv1", "in_layers.2", "{o} {i} 3 3"),
    ("time_emb_proj", "emb_layers.1", "{o} 4*u0"),
    ("norm2", "out_layers.0", "{o}"),
    ("conv2", "out_layers.3", "{o} {o} 3 3"),
    ("conv_shortcut", "skip_connection", "{o} {i} 1 1"),
)
_UNET_ATTENTION = (
    ("norm", "norm", "{c}"),
    ("proj_in", "proj_in", "{c} {c} 1 1"),
    ("transformer_blocks.0.norm1", "transformer_blocks.0.norm1", "{c}"),
    ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q", "{c} {c}"),
    ("transformer_blocks.0.attn1.to_k", "transformer_blocks.0.attn1.to_k", "{c} {c}"),
    ("transformer_blocks.0.attn1.to_v", "transformer_blocks.0.attn1.to_v", "{c} {c}"),
    ("transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.attn1.to_out.0", "{c} {c}"),
    ("transformer_blocks.0.norm2", "transformer_blocks.0.norm2", "{c}"),
    ("transformer_blocks.0.attn2.to_q", "transformer_blocks.0.attn2.to_q", "{c} {c}"),
    ("transformer_blocks.0.attn2.to_k", "transformer_blocks.0.attn2.to_k", "{c} x"),
    ("transformer_blocks.0.attn2.to_v", "transformer_blocks.0.attn2.to_v", "{c} x"),
    ("transformer_blocks.0.attn2.to_out.0", "transformer_blocks.0.attn2.to_out.0", "{c} {c}"),
    ("transformer_blocks.0.norm3", "transformer_blocks.0.norm3", "{c}"),
    ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.0.proj", "8*{c} {c}"),
    ("transformer_blocks.0.ff.net.2", "transformer_blocks.0.ff.net.2", "{c} 4*{c}"),
    ("proj_out", "proj_out", "{c} {c} 1 1"),
)
_VAE_RESNET = (
    ("norm1", "norm1", "{i}"),
    ("conv1", "conv1", "{o} {i} 3 3"),
    ("norm2", "norm2", "{o}"),
    ("conv2", "conv2", "{o} {o} 3 3"),
    ("conv_shortcut", "nin_shortcut", "{o} {i} 1 1"),
)
_VAE_ATTENTION = (
    ("group_norm", "norm", "v3"),
    ("to_q", "q", "v3 v3 1 1"),
    ("to_k", "k", "v3 v3 1 1"),
    ("to_v", "v", "v3 v3 1 1"),
    ("to_out.0", "proj_out", "v3 v3 1 1"),
)
_TEXT_LAYER = (
    ("self_attn.q_proj", "h h"),
    ("self_attn.k_proj", "h h"),
    ("self_attn.v_proj", "h h"),
    ("self_attn.out_proj", "h h"),
    ("layer_norm1", "h"),
    ("layer_norm2", "h"),
    ("mlp.fc1", "m h"),
    ("mlp.fc2", "h m"),
)
_UNET_ENDS = (
    ("time_embedding.linear_1", "time_embed.0", "4*u0 u0"),
    ("time_embedding.linear_2", "time_embed.2", "4*u0 4*u0"),
    ("conv_in", "input_blocks.0.0", "u0 4 3 3"),
    ("conv_norm_out", "out.0", "u0"),
    ("conv_out", "out.2", "4 u0 3 3"),
)
_VAE_ENDS = (
    ("encoder.conv_in", "encoder.conv_in", "v0 3 3 3"),
    ("encoder.conv_norm_out", "encoder.norm_out", "v3"),
    ("encoder.conv_out", "encoder.conv_out", "8 v3 3 3"),
    ("quant_conv", "quant_conv", "8 8 1 1"),
    ("post_quant_conv", "post_quant_conv", "4 4 1 1"),
    ("decoder.conv_in", "decoder.conv_in", "v3 4 3 3"),
    ("decoder.conv_norm_out", "decoder.norm_out", "v0"),
    ("decoder.conv_out", "decoder.conv_out", "3 v0 3 3"),
)
_WITHOUT_BIAS = (".to_q", ".to_k", ".to_v")

# diffusers before 0.15 named the VAE's attention otherwise, and folders saved by it are still about.
_OLD_VAE_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))


@cache
def sd15() -> Family:
    """The SD 1.x family: 1130 tensors at the widths of SD 1.5 (686 U-Net, 248 VAE, 196 text encoder)."""
    return Family(
        key="sd15",
        title="SD 1.5",
        parts=("unet", "vae", "text_encoder"),
        rows=(*_unet_rows(), *_vae_rows(), *_text_rows()),
        spellings={
            "vae": tuple(
                (f"{side}.mid_block.attentions.0.{old}.", f"{side}.mid_block.attentions.0.{new}.")
                for side in ("encoder", "decoder")
                for old, new in _OLD_VAE_ATTENTION
            ),
            # transformers writes either, depending on its version and on where the model came from.
            "text_encoder": (("text_model.", ""),),
        },
        # A constant that transformers before 4.31 saved; no reader needs it, and some would cast it to half.
        ignored={"text_encoder": frozenset({"embeddings.position_ids"})},
        measured={
            **{f"u{n}": ("unet", f"down_blocks.{n}.resnets.0.conv1.weight", 0) for n in range(_LEVELS)},
            "x": ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
            **{f"v{n}": ("vae", f"encoder.down_blocks.{n}.resnets.0.conv1.weight", 0) for n in range(_LEVELS)},
            "vocab": ("text_encoder", "embeddings.token_embedding.weight", 0),
            "h": ("text_encoder", "embeddings.token_embedding.weight", 1),
            "positions": ("text_encoder", "embeddings.position_embedding.weight", 0),
            "m": ("text_encoder", "encoder.layers.0.mlp.fc1.weight", 0),
        },
        same=(("x", "h"),),
        metadata={
            "modelspec.architecture": "stable-diffusion-v1",
            "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
            "modelspec.resolution": "512x512",
            "modelspec.prediction_type": "epsilon",
        },
    )


def _layer(
    part: str,
    diffusers: str,
    original: str,
    sizes: str,
    *,
    unless_equal: tuple[str, str] | None = None,
    linear: bool = False,
) -> Iterator[Row]:
    shape = tuple(sizes.split())
    yield Row(part, f"{diffusers}.weight", f"{original}.weight", shape, unless_equal, linear)
    if not diffusers.endswith(_WITHOUT_BIAS) or part == "vae":
        yield Row(part, f"{diffusers}.bias", f"{original}.bias", shape[:1], unless_equal)


def _resnet(part: str, diffusers: str, original: str, before: str, after: str) -> Iterator[Row]:
    for ours, theirs, sizes in _UNET_RESNET if part == "unet" else _VAE_RESNET:
        changes = (before, after) if ours == "conv_shortcut" else None
        filled = sizes.format(i=before, o=after)
        yield from _layer(part, f"{diffusers}.{ours}", f"{original}.{theirs}", filled, unless_equal=changes)


def _attention(diffusers: str, original: str, width: str) -> Iterator[Row]:
    for ours, theirs, sizes in _UNET_ATTENTION:
        yield from _layer("unet", f"{diffusers}.{ours}", f"{original}.{theirs}", sizes.format(c=width))


def _unet_rows() -> Iterator[Row]:
    for ours, theirs, sizes in _UNET_ENDS:
        yield from _layer("unet", ours, _UNET + theirs, sizes)
    for level in range(_LEVELS):  # down: input block 3 * level + 1 + place
        width, before = f"u{level}", f"u{max(level - 1, 0)}"
        for place in range(2):
            block = f"{_UNET}input_blocks.{3 * level + 1 + place}"
            yield from _resnet(
                "unet", f"down_blocks.{level}.resnets.{place}", f"{block}.0", width if place else before, width
            )
            if level < _LEVELS - 1:
                yield from _attention(f"down_blocks.{level}.attentions.{place}", f"{block}.1", width)
        if level < _LEVELS - 1:
            below = f"{_UNET}input_blocks.{3 * level + 3}.0.op"
            yield from _layer("unet", f"down_blocks.{level}.downsamplers.0.conv", below, f"{width} {width} 3 3")
    yield from _resnet("unet", "mid_block.resnets.0", f"{_UNET}middle_block.0", "u3", "u3")
    yield from _attention("mid_block.attentions.0", f"{_UNET}middle_block.1", "u3")
    yield from _resnet("unet", "mid_block.resnets.1", f"{_UNET}middle_block.2", "u3", "u3")
    for level in range(_LEVELS):  # up: output block 3 * level + place; each takes in what the way down left at its size
        width, before = f"u{3 - level}", f"u{min(4 - level, 3)}"
        skipped = (width, width, f"u{max(2 - level, 0)}")
        for place in range(3):
            block = f"{_UNET}output_blocks.{3 * level + place}"
            taken = f"{width if place else before}+{skipped[place]}"
            yield from _resnet("unet", f"up_blocks.{level}.resnets.{place}", f"{block}.0", taken, width)
            if level > 0:
                yield from _attention(f"up_blocks.{level}.attentions.{place}", f"{block}.1", width)
        if level < _LEVELS - 1:
            above = f"{_UNET}output_blocks.{3 * level + 2}.{2 if level else 1}.conv"
            yield from _layer("unet", f"up_blocks.{level}.upsamplers.0.conv", above, f"{width} {width} 3 3")


def _vae_rows() -> Iterator[Row]:
    for ours, theirs, sizes in _VAE_ENDS:
        yield from _layer("vae", ours, _VAE + theirs, sizes)
    for side in ("encoder", "decoder"):
        for place in range(2):
            ours, theirs = f"{side}.mid_block.resnets.{place}", f"{_VAE}{side}.mid.block_{place + 1}"
            yield from _resnet("vae", ours, theirs, "v3", "v3")
        for ours, theirs, sizes in _VAE_ATTENTION:
            yield from _layer(
                "vae",
                f"{side}.mid_block.attentions.0.{ours}",
                f"{_VAE}{side}.mid.attn_1.{theirs}",
                sizes,
                linear=ours != "group_norm",
            )
    for level in range(_LEVELS):
        width, before = f"v{level}", f"v{max(level - 1, 0)}"
        for place in range(2):
            ours, theirs = f"encoder.down_blocks.{level}.resnets.{place}", f"{_VAE}encoder.down.{level}.block.{place}"
            yield from _resnet("vae", ours, theirs, width if place else before, width)
        if level < _LEVELS - 1:
            below = f"{_VAE}encoder.down.{level}.downsample.conv"
            yield from _layer("vae", f"encoder.down_blocks.{level}.downsamplers.0.conv", below, f"{width} {width} 3 3")
    for level in range(_LEVELS):  # the original counts the decoder's levels from the picture down
        width, before = f"v{3 - level}", f"v{min(4 - level, 3)}"
        for place in range(3):
            ours, theirs = f"decoder.up_blocks.{level}.resnets.{place}", f"{_VAE}decoder.up.{3 - level}.block.{place}"
            yield from _resnet("vae", ours, theirs, width if place else before, width)
        if level < _LEVELS - 1:
            above = f"{_VAE}decoder.up.{3 - level}.upsample.conv"
            yield from _layer("vae", f"decoder.up_blocks.{level}.upsamplers.0.conv", above, f"{width} {width} 3 3")


def _text_rows() -> Iterator[Row]:
    for name, sizes in (("token_embedding", ("vocab", "h")), ("position_embedding", ("positions", "h"))):
        yield Row("text_encoder", f"embeddings.{name}.weight", f"{_TEXT}embeddings.{name}.weight", sizes)
    for layer in range(_TEXT_LAYERS):
        for leaf, sizes in _TEXT_LAYER:
            name = f"encoder.layers.{layer}.{leaf}"
            yield from _layer("text_encoder", name, _TEXT + name, sizes)
    yield from _layer("text_encoder", "final_layer_norm", f"{_TEXT}final_layer_norm", "h")
