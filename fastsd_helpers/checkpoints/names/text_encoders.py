"""The name tables of the text encoders: CLIP in Hugging Face's and in OpenCLIP's names, and T5.

Widths: `h` and `m` are those of a layer and of its inner one, `vocab` and `positions` those of the tables; each symbol
has the encoder's own letter in front where a model has several.

Source: the key lists of transformers' CLIPTextModel and T5EncoderModel, and of mlfoundations/open_clip.
"""

from collections.abc import Iterator

from fastsd_helpers.checkpoints.names.layout import Row, layer_rows

__all__ = [
    "CLIP_IGNORED",
    "CLIP_SPELLINGS",
    "CLIP_UNUSED",
    "clip_rows",
    "measured_clip",
    "measured_t5",
    "open_clip_rows",
    "t5_rows",
]

_CLIP_LAYER = (
    ("self_attn.q_proj", "{h} {h}"),
    ("self_attn.k_proj", "{h} {h}"),
    ("self_attn.v_proj", "{h} {h}"),
    ("self_attn.out_proj", "{h} {h}"),
    ("layer_norm1", "{h}"),
    ("layer_norm2", "{h}"),
    ("mlp.fc1", "{m} {h}"),
    ("mlp.fc2", "{h} {m}"),
)
_OPEN_CLIP_LAYER = (
    ("self_attn.out_proj", "attn.out_proj", "{h} {h}"),
    ("layer_norm1", "ln_1", "{h}"),
    ("layer_norm2", "ln_2", "{h}"),
    ("mlp.fc1", "mlp.c_fc", "{m} {h}"),
    ("mlp.fc2", "mlp.c_proj", "{h} {m}"),
)
# transformers writes either, depending on its version and on where the model came from; a CLIPTextModelWithProjection
# always has the prefix.
CLIP_SPELLINGS = tuple((f"text_model.{start}", start) for start in ("embeddings.", "encoder.", "final_layer_norm."))
# A constant that transformers before 4.31 saved; no reader needs it, and some would cast it to half.
CLIP_IGNORED = frozenset({"embeddings.position_ids"})
# The same and the projection, where a model reads the layers alone; SD3's folders save this encoder with it.
CLIP_UNUSED = CLIP_IGNORED | {"text_projection.weight"}


def measured_clip(part: str, letter: str = "") -> dict[str, tuple[str, str, int]]:
    """Which tensor shows which width."""
    return {
        f"{letter}vocab": (part, "embeddings.token_embedding.weight", 0),
        f"{letter}h": (part, "embeddings.token_embedding.weight", 1),
        f"{letter}positions": (part, "embeddings.position_embedding.weight", 0),
        f"{letter}m": (part, "encoder.layers.0.mlp.fc1.weight", 0),
    }


def clip_rows(part: str, prefix: str, *, layers: int, letter: str = "", projection: str = "") -> Iterator[Row]:
    """CLIP in Hugging Face's names; `projection` is the original name of the text projection, kept as it is."""
    h, m = f"{letter}h", f"{letter}m"
    for name, sizes in _clip_tables(letter):
        yield Row(part, (f"embeddings.{name}.weight",), f"{prefix}embeddings.{name}.weight", sizes)
    for layer in range(layers):
        for leaf, widths in _CLIP_LAYER:
            name = f"encoder.layers.{layer}.{leaf}"
            yield from layer_rows(part, name, prefix + name, widths.format(h=h, m=m))
    yield from layer_rows(part, "final_layer_norm", f"{prefix}final_layer_norm", h)
    if projection:
        yield Row(part, ("text_projection.weight",), projection, (h, h))


def open_clip_rows(part: str, prefix: str, *, layers: int, letter: str = "", projection: bool = False) -> Iterator[Row]:
    """CLIP in OpenCLIP's names: query, key and value stacked, the text projection transposed."""
    h, m = f"{letter}h", f"{letter}m"
    tokens, positions = _clip_tables(letter)
    yield Row(part, ("embeddings.token_embedding.weight",), f"{prefix}token_embedding.weight", tokens[1])
    # A bare parameter: it has no `.weight`.
    yield Row(part, ("embeddings.position_embedding.weight",), f"{prefix}positional_embedding", positions[1])
    for layer in range(layers):
        ours, theirs = f"encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
        for leaf, sizes in (("weight", (f"3*{h}", h)), ("bias", (f"3*{h}",))):
            stacked = tuple(f"{ours}.self_attn.{letter}_proj.{leaf}" for letter in "qkv")
            yield Row(part, stacked, f"{theirs}.attn.in_proj_{leaf}", sizes, (h, h, h))
        for leaf, their_leaf, widths in _OPEN_CLIP_LAYER:
            yield from layer_rows(part, f"{ours}.{leaf}", f"{theirs}.{their_leaf}", widths.format(h=h, m=m))
    yield from layer_rows(part, "final_layer_norm", f"{prefix}ln_final", h)
    if projection:
        # OpenCLIP computes x @ P, Hugging Face x @ W.T: both are square, so no shape check would notice.
        yield Row(part, ("text_projection.weight",), f"{prefix}text_projection", (h, h), form="turned")


def measured_t5(part: str, letter: str = "") -> dict[str, tuple[str, str, int]]:
    """Which tensor shows which width."""
    block = "encoder.block.0.layer"
    return {
        f"{letter}vocab": (part, "shared.weight", 0),
        f"{letter}h": (part, "shared.weight", 1),
        f"{letter}i": (part, f"{block}.0.SelfAttention.q.weight", 0),
        f"{letter}b": (part, f"{block}.0.SelfAttention.relative_attention_bias.weight", 0),
        f"{letter}heads": (part, f"{block}.0.SelfAttention.relative_attention_bias.weight", 1),
        f"{letter}m": (part, f"{block}.1.DenseReluDense.wo.weight", 1),
    }


def t5_rows(part: str, prefix: str, *, layers: int, letter: str = "") -> Iterator[Row]:
    """T5 1.1's encoder; the names are the same on both sides. `encoder.embed_tokens` is `shared` once more."""
    h, i, m = f"{letter}h", f"{letter}i", f"{letter}m"
    names = [("shared", (f"{letter}vocab", h)), ("encoder.final_layer_norm", (h,))]
    bias = (f"{letter}b", f"{letter}heads")
    names.append(("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", bias))
    for layer in range(layers):
        block = f"encoder.block.{layer}.layer"
        names += [(f"{block}.0.SelfAttention.{leaf}", (i, h)) for leaf in "qkv"]
        names.append((f"{block}.0.SelfAttention.o", (h, i)))
        names.append((f"{block}.0.layer_norm", (h,)))
        names += [(f"{block}.1.DenseReluDense.{leaf}", (m, h)) for leaf in ("wi_0", "wi_1")]
        names.append((f"{block}.1.DenseReluDense.wo", (h, m)))
        names.append((f"{block}.1.layer_norm", (h,)))
    for name, sizes in names:
        yield Row(part, (f"{name}.weight",), f"{prefix}{name}.weight", sizes)


def _clip_tables(letter: str) -> tuple[tuple[str, tuple[str, str]], ...]:
    h = f"{letter}h"
    return (("token_embedding", (f"{letter}vocab", h)), ("position_embedding", (f"{letter}positions", h)))
