"""Where the model looked for each token: the attention over the image, as numbers and as an image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["Attention", "draw_attention", "find_attention"]


@dataclass(frozen=True)
class Attention:
    """For each token of a line the attention over the grid: float32 [tokens, rows, columns], each summing to 1 or less.

    What goes to the extra places (CLS) is left out. `pieces` are the tokens' texts.
    """

    weights: "np.ndarray"
    pieces: tuple[str, ...]


def find_attention(reader: Any, image: Any) -> Attention:
    """Read one line greedily and keep where each token's step looked: the mean over all layers and heads.

    Raises:
        ModelError: the image cannot be used, or the model is a folder of graphs, which keep no such weights.
    """
    import numpy as np
    import torch

    from fastsd_helpers.trocr.pages.inputs import gather

    if reader.checkpoint.model is None:
        raise ModelError("An int8 model gives no cross-attention maps.", "Open the model it was made from.")
    item = next(iter(gather([image])))
    if item.picture is None:
        raise ModelError(str(item.problem), "Give an image that can be read.")
    line = reader.read([item.picture])[0]
    rows, columns = reader.grid
    maps = []
    with reader.alone, torch.inference_mode():
        hidden = reader.engine.encode(reader.checkpoint.pixels.batch([reader.checkpoint.pixels.resize(item.picture)]))
        state = reader.engine.begin(hidden, 1, reader.limits.max_new_tokens)
        before = reader.limits.start
        for token in line.tokens:
            weights: list[Any] = []
            reader.engine.step(state, torch.tensor([[before]]), weights)
            mean = torch.stack([layer.float().mean(dim=(0, 1, 2)) for layer in weights]).mean(0)
            maps.append(mean[-rows * columns :].unflatten(0, (rows, columns)).cpu().numpy())
            before = token.id
    stacked = np.stack(maps) if maps else np.zeros((0, rows, columns), np.float32)
    return Attention(stacked.astype(np.float32), tuple(token.text for token in line.tokens))


def draw_attention(image: Any, attention: Attention) -> "Image.Image":
    """Draw the line once per token, red where that step looked, with the token's text beside it."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    from fastsd_helpers.trocr.pages.inputs import to_rgb

    picture = to_rgb(image)
    width = 480
    height = max(24, round(picture.height * width / picture.width))
    small = np.asarray(picture.resize((width, height)), np.float32)
    sheet = Image.new("RGB", (width + 120, max(1, len(attention.pieces)) * (height + 4)), "white")
    font = ImageFont.load_default(size=min(20, height))
    for place, (weights, piece) in enumerate(zip(attention.weights, attention.pieces, strict=True)):
        heat = Image.fromarray((255 * weights / max(1e-9, float(weights.max()))).astype(np.uint8))
        strength = np.asarray(heat.resize((width, height), Image.Resampling.BILINEAR), np.float32)[:, :, None] / 255
        shown = small * (1 - 0.6 * strength) + np.array([220, 30, 30], np.float32) * 0.6 * strength
        y = place * (height + 4)
        sheet.paste(Image.fromarray(shown.astype(np.uint8)), (0, y))
        ImageDraw.Draw(sheet).text((width + 8, y), repr(piece)[1:-1], font=font, fill="black")
    return sheet
