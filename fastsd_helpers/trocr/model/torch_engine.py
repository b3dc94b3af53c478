"""The model's arithmetic in PyTorch: one decoder step at a time, the image's keys computed once per image.

transformers' own loop copies the keys and values of the image (57 MB a line at base size) for every beam and moves
them at every step. All beams of one line look at the same image, so here they share one copy and the beams are
folded into the query: q [lines, heads, beams, d] against k [lines, heads, places, d].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["DecoderState", "TorchEngine", "cross_keys", "decoder_step", "position_rows"]


@dataclass
class DecoderState:
    """What the next step needs of the steps before.

    cross: per layer (k, v), each [lines, heads, places, d]. own: per layer (k, v), each [lines * beams, heads,
    steps so far, d]; None before the first step.
    """

    cross: list[tuple[Any, Any]]
    own: list[tuple[Any, Any]] | None
    lines: int
    beams: int
    steps: int = 0


def position_rows(decoder: Any, length: int) -> "torch.Tensor":
    """The position vectors of steps 0..length-1, [length, width], whichever kind the checkpoint has.

    Learned positions are stored two rows further on; sinusoidal ones start after the padding's row.
    Source: transformers, models/trocr/modeling_trocr.py (itself from fairseq).
    """
    table = decoder.embed_positions
    if hasattr(table, "weight"):
        return table.weight[table.offset : table.offset + length]
    first = table.padding_idx + 1
    rows = table.weights
    if rows.shape[0] < first + length:
        rows = table.get_embedding(first + length, table.embedding_dim, table.padding_idx)
    weight = decoder.embed_tokens.weight
    return rows[first : first + length].to(device=weight.device, dtype=weight.dtype)


def _heads(x: "torch.Tensor", heads: int) -> "torch.Tensor":
    """[rows, n, width] -> [rows, heads, n, width / heads]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def cross_keys(decoder: Any, hidden: "torch.Tensor") -> list[tuple["torch.Tensor", "torch.Tensor"]]:
    """Per layer the keys and values of the image, each [lines, heads, places, d], from [lines, places, width]."""
    found = []
    for layer in decoder.layers:
        attention = layer.encoder_attn
        keys = _heads(attention.k_proj(hidden), attention.num_heads).contiguous()
        values = _heads(attention.v_proj(hidden), attention.num_heads).contiguous()
        found.append((keys, values))
    return found


def _attend(query: Any, keys: Any, values: Any, scaling: float, of_picture: bool) -> "torch.Tensor":
    """PyTorch's attention, which scales by itself."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(query, keys, values)


def _append(own: Any, keys: Any, values: Any) -> tuple[Any, Any]:
    """The keys and values of all steps so far: those of a layer's `own` (None at first) and this step's."""
    import torch

    return (keys, values) if own is None else (torch.cat((own[0], keys), dim=2), torch.cat((own[1], values), dim=2))


def decoder_step(
    decoder: Any,
    head: Any,
    tokens: "torch.Tensor",
    position: "torch.Tensor",
    own: list[tuple["torch.Tensor", "torch.Tensor"]] | None,
    cross: list[tuple["torch.Tensor", "torch.Tensor"]],
    weights: list["torch.Tensor"] | None = None,
    attend: "Callable[..., torch.Tensor]" = _attend,
    append: Callable[[Any, Any, Any], tuple[Any, Any]] = _append,
) -> tuple["torch.Tensor", list[tuple["torch.Tensor", "torch.Tensor"]]]:
    """One token further for every beam of every line.

    Args:
        decoder: `model.decoder.model.decoder`.
        head: `model.decoder.output_projection`.
        tokens: int64 [lines, beams].
        position: [width], or [lines, beams, width] where rows differ, added to the tokens' vectors.
        own: as in DecoderState.
        cross: as in DecoderState.
        weights: filled, when a list is given, with each layer's attention over the image, [lines, heads, beams,
            places].
        attend: the attention, PyTorch's or another: called with the query [rows, heads, n, d], keys and values as `own`
            and `cross` have them, the scaling, and whether they are the image's.
        append: how a step's keys and values, each [lines * beams, heads, 1, d], join a layer's `own`.

    Returns:
        The scores before softmax, [lines, beams, vocabulary], and `own` one step longer.
    """
    lines, beams = tokens.shape
    x = decoder.embed_tokens(tokens) + position
    if decoder.layernorm_embedding is not None:
        x = decoder.layernorm_embedding(x)
    longer = []
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        flat = x.reshape(lines * beams, 1, -1)
        query = _heads(attention.q_proj(flat), attention.num_heads)
        keys = _heads(attention.k_proj(flat), attention.num_heads)
        values = _heads(attention.v_proj(flat), attention.num_heads)
        keys, values = append(own[index] if own is not None else None, keys, values)
        longer.append((keys, values))
        mixed = attend(query, keys, values, attention.scaling, False)  # [lines * beams, heads, 1, d]
        x = layer.self_attn_layer_norm(x + attention.out_proj(mixed.reshape(lines, beams, -1)))

        attention = layer.encoder_attn
        query = _heads(attention.q_proj(x), attention.num_heads)  # the beams take the place of time
        keys, values = cross[index]
        if weights is not None:
            scores = (query * attention.scaling) @ keys.transpose(2, 3)
            weights.append(scores.softmax(dim=-1))
        mixed = attend(query, keys, values, attention.scaling, True).transpose(1, 2)
        x = layer.encoder_attn_layer_norm(x + attention.out_proj(mixed.reshape(lines, beams, -1)))
        x = layer.final_layer_norm(x + layer.fc2(layer.activation_fn(layer.fc1(x))))
    return head(x), longer


class TorchEngine:
    """A TrOCR model as the search uses it: encode images, begin, step, keep some lines, reorder beams."""

    def __init__(self, model: Any, *, device: str) -> None:
        self.model = model
        self.device = device
        self.decoder = model.decoder.model.decoder
        self.head = model.decoder.output_projection
        self.dtype = self.decoder.embed_tokens.weight.dtype
        config = model.config.decoder
        self.most_steps = config.max_position_embeddings
        self._padding = None if config.use_learned_position_embeddings else self.decoder.padding_idx
        self._positions = position_rows(self.decoder, self.most_steps)

    def encode(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """float32 [lines, 3, h, w] -> [lines, places, width], in the engine's own type."""
        return self.model.encoder(pixels.to(self.device, self.dtype)).last_hidden_state

    def begin(self, hidden: "torch.Tensor", beams: int, steps: int) -> DecoderState:
        """Prepare the search over the lines of `hidden`; `steps` is the most there will be."""
        return DecoderState(self._cross_keys(hidden), None, hidden.shape[0], beams)

    def _cross_keys(self, hidden: "torch.Tensor") -> list[tuple["torch.Tensor", "torch.Tensor"]]:
        # A model whose two halves differ in width has a projection between them, unless its keys take the width.
        if hasattr(self.model, "enc_to_dec_proj"):
            hidden = self.model.enc_to_dec_proj(hidden)
        return cross_keys(self.decoder, hidden)

    def step(self, state: DecoderState, tokens: "torch.Tensor", weights: list | None = None) -> "torch.Tensor":
        """tokens [lines, beams] -> float32 scores before softmax, [lines, beams, vocabulary]; `state` moves on."""
        position = self._position(state.steps, tokens)
        scores, state.own = decoder_step(
            self.decoder, self.head, tokens.to(self.device), position, state.own, state.cross, weights
        )
        state.steps += 1
        return scores.float()

    def _position(self, step: int, tokens: "torch.Tensor") -> "torch.Tensor":
        """What is added to the tokens' vectors: [width], or [lines, beams, width] where rows differ."""
        position = self._positions[step]
        if self._padding is not None and bool((tokens == self._padding).any()):
            # Sinusoidal positions do not count padding, which a model may also write: its row is all zeros.
            position = position.expand(*tokens.shape, -1).clone()
            position[tokens == self._padding] = 0
        return position

    def keep(self, state: DecoderState, lines: "torch.Tensor") -> None:
        """Go on with these lines alone (int64 indices); the others are finished."""
        import torch

        lines = lines.to(self.device)
        rows = (lines[:, None] * state.beams + torch.arange(state.beams, device=self.device)).flatten()
        state.cross = self._select(state.cross, lines)
        state.own = self._select(state.own or [], rows) or None
        state.lines = len(lines)

    def reorder(self, state: DecoderState, beams: "torch.Tensor") -> None:
        """Let beam j of line i go on from what was beam `beams[i, j]`; the image's keys stay where they are."""
        import torch

        first = torch.arange(state.lines, device=self.device)[:, None] * state.beams
        rows = (first + beams.to(self.device)).flatten()
        state.own = self._select(state.own or [], rows)

    def _select(self, pairs: list[tuple[Any, Any]], rows: "torch.Tensor") -> list[tuple[Any, Any]]:
        """These rows of keys and values, in that order."""
        return [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in pairs]
