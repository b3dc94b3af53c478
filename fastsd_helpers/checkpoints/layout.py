"""What a family's name table is, and the pure functions that read it: names both ways, and the shapes to expect.

A table row ties one Diffusers tensor to one tensor of the original single file. Both directions of renaming and the
completeness check read the same rows, so they cannot disagree.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fastsd_helpers.errors import CheckpointError

__all__ = [
    "PART_WORDS",
    "Family",
    "Row",
    "Shape",
    "Widths",
    "check_shapes",
    "expected_shapes",
    "match_names",
    "measure",
]

Shape = tuple[int, ...]
Widths = Mapping[str, int]

PART_WORDS = {"text_encoder": "text encoder", "unet": "U-Net", "vae": "VAE"}


@dataclass(frozen=True)
class Row:
    """One tensor under its two names.

    `sizes` is the shape in the original file; each entry is a sum of products of widths and numbers, such as
    `"4*u0"` or `"u3+u2"`. A row with `unless_equal=(a, b)` exists only where those two sizes differ: a residual block
    has a shortcut convolution only when it changes the width. A `linear` row is [c, c] in Diffusers, [c, c, 1, 1] in
    the original.
    """

    part: str
    diffusers: str
    original: str
    sizes: tuple[str, ...]
    unless_equal: tuple[str, str] | None = None
    linear: bool = False


@dataclass(frozen=True)
class Family:
    """Everything that sets one model family's single files apart.

    spellings: per part, (other prefix, table's prefix) of names that mean the same tensor.
    ignored: per part, tensors a Diffusers folder may have and the single file leaves out.
    measured: width symbol -> (part, Diffusers name, axis) of the tensor that shows it.
    same: pairs of widths that must agree for the parts to work together.
    """

    key: str
    title: str
    parts: tuple[str, ...]
    rows: tuple[Row, ...]
    spellings: Mapping[str, tuple[tuple[str, str], ...]]
    ignored: Mapping[str, frozenset[str]]
    measured: Mapping[str, tuple[str, str, int]]
    same: tuple[tuple[str, str], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def to_original(self) -> dict[tuple[str, str], Row]:
        """(part, Diffusers name) -> row."""
        return {(row.part, row.diffusers): row for row in self.rows}

    @cached_property
    def to_diffusers(self) -> dict[str, Row]:
        """Original name -> row."""
        return {row.original: row for row in self.rows}


def match_names(family: Family, part: str, given: Iterable[str]) -> dict[str, str]:
    """Find the table's Diffusers name for every tensor name of one part, whatever its spelling.

    Returns:
        Diffusers name of the table -> name as given. Ignored tensors are left out.

    Raises:
        CheckpointError: a name that the family does not have, or one part that mixes two spellings.
    """
    found: dict[str, str] = {}
    used: dict[tuple[str, str], dict[bool, str]] = {}
    for name in sorted(given):
        table_name = name
        for pair in family.spellings.get(part, ()):
            if name.startswith(pair[0]):
                table_name = pair[1] + name.removeprefix(pair[0])
        if table_name in family.ignored.get(part, ()):
            continue
        if (part, table_name) not in family.to_original:
            raise CheckpointError(
                f"The {PART_WORDS[part]} has a tensor {name!r} that {family.title} does not have.",
                f"Give the {PART_WORDS[part]} of a {family.title} model; merge LoRA or other adapters into it first.",
            )
        for pair in family.spellings.get(part, ()):
            if table_name.startswith(pair[1]):
                used.setdefault(pair, {}).setdefault(name.startswith(pair[0]), name)
        found.setdefault(table_name, name)
    for spellings in used.values():
        if len(spellings) > 1:
            raise CheckpointError(
                f"The {PART_WORDS[part]} names its tensors in two ways: {spellings[True]!r} and {spellings[False]!r}.",
                "Give the model itself, not a wrapper or a merge that holds it twice.",
            )
    return found


def measure(family: Family, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, int]:
    """Read the widths of a model off its tensors' shapes (part -> Diffusers name -> shape).

    Raises:
        CheckpointError: a tensor is missing, or two parts do not fit together.
    """
    widths = {}
    for symbol, (part, name, axis) in family.measured.items():
        shape = shapes[part].get(name)
        if shape is None:
            raise _missing(family, part, name)
        row = family.to_original[part, name]
        if len(shape) != len(_diffusers_sizes(row)):
            raise _wrong_shape(family, part, name, shape, f"{len(_diffusers_sizes(row))} dimensions")
        widths[symbol] = shape[axis]
    for one, other in family.same:
        if widths[one] != widths[other]:
            first, second = (family.measured[symbol][0] for symbol in (one, other))
            raise CheckpointError(
                f"The {PART_WORDS[first]} fits a width of {widths[one]}, the {PART_WORDS[second]} of {widths[other]}.",
                "Give parts that were trained together.",
            )
    return widths


def expected_shapes(family: Family, widths: Widths, part: str | None = None) -> dict[str, Shape]:
    """List the original file's tensors at these widths: name -> shape; of one part, or of all."""
    return {
        row.original: tuple(_size(size, widths) for size in row.sizes)
        for row in family.rows
        if part in (None, row.part) and _exists(row, widths)
    }


def check_shapes(family: Family, part: str, shapes: Mapping[str, Shape], widths: Widths) -> None:
    """Refuse a part (Diffusers name -> shape) that lacks a tensor, has one too many, or one of another shape.

    Raises:
        CheckpointError: names the first such tensor.
    """
    for row in family.rows:
        if row.part != part:
            continue
        shape = shapes.get(row.diffusers)
        wanted = tuple(_size(size, widths) for size in _diffusers_sizes(row))
        if _exists(row, widths) and shape is None:
            raise _missing(family, part, row.diffusers)
        if not _exists(row, widths) and shape is not None:
            raise _wrong_shape(family, part, row.diffusers, shape, "none, as the block keeps its width")
        if shape is not None and shape != wanted:
            raise _wrong_shape(family, part, row.diffusers, shape, str(list(wanted)))


def _diffusers_sizes(row: Row) -> tuple[str, ...]:
    return row.sizes[:2] if row.linear else row.sizes


def _exists(row: Row, widths: Widths) -> bool:
    return row.unless_equal is None or _size(row.unless_equal[0], widths) != _size(row.unless_equal[1], widths)


def _size(text: str, widths: Widths) -> int:
    total = 0
    for term in text.split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor) if factor.isdigit() else widths[factor]
        total += product
    return total


def _missing(family: Family, part: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"The {PART_WORDS[part]} lacks the tensor {name!r} of {family.title}.",
        f"Give the whole {PART_WORDS[part]} of a {family.title} model, or download it again.",
    )


def _wrong_shape(family: Family, part: str, name: str, shape: Shape, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"The {PART_WORDS[part]}'s tensor {name!r} has the shape {list(shape)}; {family.title} has {wanted} there.",
        f"Give the {PART_WORDS[part]} of a {family.title} model.",
    )
