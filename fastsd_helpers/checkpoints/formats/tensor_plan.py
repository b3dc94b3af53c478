"""How the tensors of a new file are made from those of another: byte ranges, in order, and nothing in memory.

Renaming, stacking, splitting, swapping halves and dropping trailing axes of length one are all nothing but ranges of
bytes; only a transpose has to be computed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastsd_helpers.checkpoints.formats.dtypes import FLOATS, cast_dtype
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.formats.sources import Source
from fastsd_helpers.checkpoints.names.layout import PART_WORDS, Family, Row, Shape, expected_shapes, part_shapes

__all__ = ["Piece", "Recipe", "copied", "original_recipes", "part_recipes"]


@dataclass(frozen=True)
class Piece:
    """Values `first` to `first + count` of one tensor of a source."""

    source: Source
    name: str
    first: int
    count: int

    @property
    def stored(self) -> str:
        """The dtype of the values in the source."""
        return self.source.tensors[self.name].dtype


@dataclass(frozen=True)
class Recipe:
    """One tensor of a new file: what it will be and what it is made of.

    turned: the shape before a transpose, where there is one.
    part: the part of the model it belongs to, for messages.
    """

    fact: TensorFact
    pieces: tuple[Piece, ...]
    turned: Shape | None = None
    part: str = ""

    def owner(self, piece: Piece) -> str:
        """The tensor a piece comes from, in words."""
        whose = f"The {PART_WORDS[self.part]}'s" if self.part else "The"
        return f"{whose} tensor {piece.name!r}"


def original_recipes(
    family: Family,
    widths: Mapping[str, int],
    find: Callable[[str, str], tuple[Source, str]],
    dtype: str,
) -> dict[str, Recipe]:
    """Plan a single file: original name -> recipe.

    Args:
        find: (part, Diffusers name) -> the source that has it and its name there.
    """
    shapes = expected_shapes(family, widths)
    recipes = {}
    for row in family.rows:
        if row.original not in shapes:
            continue
        pieces = []
        for name in row.diffusers:
            source, theirs = find(row.part, name)
            pieces.append(Piece(source, theirs, 0, source.tensors[theirs].count))
        recipes[row.original] = _recipe(row, pieces, shapes[row.original], dtype)
    return recipes


def part_recipes(
    family: Family,
    part: str,
    widths: Mapping[str, int],
    source: Source,
    names: Mapping[str, str],
    dtype: str,
    *,
    prefix: str = "",
) -> dict[str, Recipe]:
    """Plan one part of a Diffusers folder: its name -> recipe.

    Args:
        names: original name of the table -> name in `source`.
        prefix: what readers of this part expect in front of the table's names.
    """
    recipes = {}
    for row in family.rows:
        if row.part != part:
            continue
        first = 0
        for name, shape in zip(row.diffusers, part_shapes(row, widths), strict=False):
            count = TensorFact("U8", shape).count
            recipes[prefix + name if name != "text_projection.weight" else name] = _recipe(
                row, [Piece(source, names[row.original], first, count)], shape, dtype
            )
            first += count
    return recipes


def copied(source: Source, name: str, dtype: str = "keep") -> Recipe:
    """A tensor taken over as it is, but for its dtype."""
    fact = source.tensors[name]
    return Recipe(TensorFact(cast_dtype(fact.dtype, dtype), fact.shape), (Piece(source, name, 0, fact.count),))


def _recipe(row: Row, pieces: list[Piece], shape: Shape, dtype: str) -> Recipe:
    if row.form == "swapped":
        (whole,) = pieces
        half = whole.count // 2
        pieces = [
            Piece(whole.source, whole.name, whole.first + half, half),
            Piece(whole.source, whole.name, whole.first, half),
        ]
    stored = {piece.stored for piece in pieces}
    # Stacked tensors that were saved in different formats have to agree on one that holds them all.
    common = stored.pop() if len(stored) == 1 else "F32" if stored <= set(FLOATS) - {"F64"} else "F64"
    turned = shape[::-1] if row.form == "turned" else None
    return Recipe(TensorFact(cast_dtype(common, dtype), shape), tuple(pieces), turned, row.part)
