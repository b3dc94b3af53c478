"""The name table of the Flux.1 transformer: Diffusers name beside Black Forest Labs' own.

Widths: `d` is that of the model, `hd` that of one attention head, `fm` of the inner layers; `ins` and `outs` are the
channels of a latent patch, `c` and `p` the widths of T5's and CLIP's output. `guided` is 1 for dev, 0 for schnell.

Source: the key lists of black-forest-labs/flux and of diffusers; the swapped halves are documented in the latter's
scripts/convert_flux_to_diffusers.py.
"""

from collections.abc import Iterator
from functools import partial

from fastsd_helpers.checkpoints.names.layout import Row, layer_rows

__all__ = ["measured_transformer", "transformer_rows"]

_DOUBLE_BLOCKS = 19
_SINGLE_BLOCKS = 38

_ENDS = (
    ("x_embedder", "img_in", "d ins"),
    ("context_embedder", "txt_in", "d c"),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer", "d 256"),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer", "d d"),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer", "d p"),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer", "d d"),
    ("proj_out", "final_layer.linear", "outs d"),
)
_GUIDANCE = (
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer", "d 256"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", "d d"),
)
# A double block has everything twice: for the image and for the text.
_DOUBLE = (
    ("norm1.linear", "img_mod.lin", "6*d d"),
    ("norm1_context.linear", "txt_mod.lin", "6*d d"),
    ("attn.to_out.0", "img_attn.proj", "d d"),
    ("attn.to_add_out", "txt_attn.proj", "d d"),
    ("ff.net.0.proj", "img_mlp.0", "fm d"),
    ("ff.net.2", "img_mlp.2", "d fm"),
    ("ff_context.net.0.proj", "txt_mlp.0", "fm d"),
    ("ff_context.net.2", "txt_mlp.2", "d fm"),
)
_DOUBLE_QKV = (
    (("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv"),
    (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv"),
)
_DOUBLE_NORMS = (
    ("attn.norm_q", "img_attn.norm.query_norm"),
    ("attn.norm_k", "img_attn.norm.key_norm"),
    ("attn.norm_added_q", "txt_attn.norm.query_norm"),
    ("attn.norm_added_k", "txt_attn.norm.key_norm"),
)

_layer = partial(layer_rows, "transformer")


def measured_transformer() -> dict[str, tuple[str, str, int]]:
    """Which tensor shows which width."""
    part = "transformer"
    return {
        "d": (part, "x_embedder.weight", 0),
        "ins": (part, "x_embedder.weight", 1),
        "outs": (part, "proj_out.weight", 0),
        "c": (part, "context_embedder.weight", 1),
        "p": (part, "time_text_embed.text_embedder.linear_1.weight", 1),
        "hd": (part, "transformer_blocks.0.attn.norm_q.weight", 0),
        "fm": (part, "transformer_blocks.0.ff.net.0.proj.weight", 0),
        "guided": (part, "time_text_embed.guidance_embedder.linear_1.weight", -1),
    }


def transformer_rows(prefix: str) -> Iterator[Row]:
    """Every tensor of the transformer."""
    for ours, theirs, sizes in _ENDS:
        yield from _layer(ours, prefix + theirs, sizes)
    for ours, theirs, sizes in _GUIDANCE:
        yield from _layer(ours, prefix + theirs, sizes, unless_equal=("guided", "0"))
    # Diffusers has (scale, shift) here, the original (shift, scale).
    yield from layer_rows(
        "transformer", "norm_out.linear", f"{prefix}final_layer.adaLN_modulation.1", "2*d d", form="swapped"
    )
    for block in range(_DOUBLE_BLOCKS):
        ours, theirs = f"transformer_blocks.{block}.", f"{prefix}double_blocks.{block}."
        for leaf, their_leaf, sizes in _DOUBLE:
            yield from _layer(ours + leaf, theirs + their_leaf, sizes)
        for leaves, their_leaf in _DOUBLE_QKV:
            yield from _stacked([ours + leaf for leaf in leaves], theirs + their_leaf, ("3*d", "d"), ("d", "d", "d"))
        for leaf, their_leaf in _DOUBLE_NORMS:
            yield Row("transformer", (f"{ours}{leaf}.weight",), f"{theirs}{their_leaf}.scale", ("hd",))
    for block in range(_SINGLE_BLOCKS):
        ours, theirs = f"single_transformer_blocks.{block}.", f"{prefix}single_blocks.{block}."
        yield from _layer(f"{ours}norm.linear", f"{theirs}modulation.lin", "3*d d")
        stacked = [ours + leaf for leaf in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        yield from _stacked(stacked, f"{theirs}linear1", ("3*d+fm", "d"), ("d", "d", "d", "fm"))
        yield from _layer(f"{ours}proj_out", f"{theirs}linear2", "d d+fm")
        for leaf, their_leaf in (("attn.norm_q", "norm.query_norm"), ("attn.norm_k", "norm.key_norm")):
            yield Row("transformer", (f"{ours}{leaf}.weight",), f"{theirs}{their_leaf}.scale", ("hd",))


def _stacked(diffusers: list[str], original: str, sizes: tuple[str, str], firsts: tuple[str, ...]) -> Iterator[Row]:
    for leaf, shape in (("weight", sizes), ("bias", sizes[:1])):
        yield Row("transformer", tuple(f"{name}.{leaf}" for name in diffusers), f"{original}.{leaf}", shape, firsts)
