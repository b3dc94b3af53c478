"""What a denoiser is told about the text of every row of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Conditions"]


@dataclass(frozen=True)
class Conditions:
    """The text of n rows, encoded.

    sequence: [n, tokens, width], a vector for every token.
    pooled: [n, width], a vector for the whole text; None where the family has none.
    ids: [n, tokens, axes], the tokens' positions; None where the family has none.
    lengths: int64 [n], how many of the tokens are text and not padding; None where padding is part of the model.
    """

    sequence: "torch.Tensor"
    pooled: "torch.Tensor | None" = None
    ids: "torch.Tensor | None" = None
    lengths: "torch.Tensor | None" = None

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, rows: "slice | list[int]") -> "Conditions":
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: Any) -> "Conditions":
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def float(self) -> "Conditions":
        """The same in float32; whole numbers stay what they are."""
        return self._each(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)

    def long_as(self, other: "Conditions") -> "Conditions":
        """The same with as many chunks of tokens as `other`: a text's end is followed by the empty text's chunks.

        Only of the empty text itself, whose chunks are all alike.
        """
        times, rest = divmod(other.sequence.shape[1], self.sequence.shape[1])
        if times == 1 or rest:
            return self
        return Conditions(self.sequence.repeat(1, times, 1), self.pooled, self.ids, self.lengths)

    @classmethod
    def join(cls, parts: "Sequence[Conditions]") -> "Conditions":
        """One after the other; all of the same kind."""
        import torch

        def joined(name: str) -> "torch.Tensor | None":
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        return cls(*(joined(field.name) for field in fields(cls)))

    def _each(self, change: Any) -> "Conditions":
        values = [getattr(self, field.name) for field in fields(self)]
        return Conditions(*(None if value is None else change(value) for value in values))
