"""What a family's name table is, and the pure functions that read it: names both ways, and the shapes to expect.

A table row ties one tensor of the original single file to the Diffusers tensors that hold the same numbers. Both
directions of renaming and the completeness checks read the same rows, so they cannot disagree.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastsd_helpers.errors import CheckpointError

__all__ = [
    "PART_WORDS",
    "Family",
    "Row",
    "Shape",
    "Widths",
    "check_original",
    "check_shapes",
    "expected_shapes",
    "layer_rows",
    "match_names",
    "match_original",
    "measure",
    "measure_original",
    "part_shapes",
]

Shape = tuple[int, ...]
Widths = Mapping[str, int]

PART_WORDS = {
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "transformer": "transformer",
    "unet": "U-Net",
    "vae": "VAE",
}


@dataclass(frozen=True)
class Row:
    """One tensor of the original file and the Diffusers tensors it is made of.

    diffusers: their names; several are stacked along the first axis in this order.
    sizes: the shape in the original file; each entry is a sum of products of widths and numbers, such as `"4*u0"` or
        `"u3+u2"`.
    stacked: the first size of each Diffusers tensor, where there are several.
    form: how the numbers lie in the original: `same`; `flat` is [c, c] in Diffusers and [c, c, 1, 1] in the original;
        `turned` is the transpose; `swapped` has the halves of the first axis exchanged.
    unless_equal: the row exists only where these two sizes differ: a residual block has a shortcut convolution only
        when it changes the width.
    """

    part: str
    diffusers: tuple[str, ...]
    original: str
    sizes: tuple[str, ...]
    stacked: tuple[str, ...] = ()
    form: str = "same"
    unless_equal: tuple[str, str] | None = None


def layer_rows(
    part: str, diffusers: str, original: str, sizes: str, *, bias: bool = True, **rest: Any
) -> Iterator[Row]:
    """The weight of a layer and its bias, which has the first of the weight's `sizes`; `rest` are fields of both."""
    shape = tuple(sizes.split())
    yield Row(part, (f"{diffusers}.weight",), f"{original}.weight", shape, **rest)
    if bias:
        yield Row(part, (f"{diffusers}.bias",), f"{original}.bias", shape[:1], **rest)


@dataclass(frozen=True)
class Family:
    """Everything that sets one model family's single files apart.

    spellings: per part, (other prefix, table's prefix) of Diffusers names that mean the same tensor.
    ignored: per part, tensors a Diffusers folder may have and the single file leaves out.
    measured: width symbol -> (part, Diffusers name, axis) of the tensor that shows it; axis -1 asks whether the tensor
        is there (1) or not (0). Each belongs to a row of one name and the same form.
    same: pairs of widths that must agree for the parts to work together; the second may be a sum.
    original_spellings: (other prefix, table's prefix) of names in single files.
    left_out: patterns of names that single files may have and Diffusers folders do not: buffers that readers compute,
        and `extras`.
    extras: patterns of weights that only the original has; they are carried over from a base file, never invented.
    """

    key: str
    title: str
    parts: tuple[str, ...]
    rows: tuple[Row, ...]
    measured: Mapping[str, tuple[str, str, int]]
    spellings: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    ignored: Mapping[str, frozenset[str]] = field(default_factory=dict)
    same: tuple[tuple[str, str], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    original_spellings: tuple[tuple[str, str], ...] = ()
    left_out: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()

    @cached_property
    def to_original(self) -> dict[tuple[str, str], Row]:
        """(part, Diffusers name) -> row."""
        return {(row.part, name): row for row in self.rows for name in row.diffusers}

    @cached_property
    def to_diffusers(self) -> dict[str, Row]:
        """Original name -> row."""
        return {row.original: row for row in self.rows}

    def is_extra(self, name: str) -> bool:
        """Whether an original name is a weight that Diffusers folders do not have."""
        return any(re.fullmatch(pattern, name) for pattern in self.extras)

    def is_left_out(self, name: str) -> bool:
        """Whether an original name is a buffer or an extra, which no Diffusers folder has."""
        return self.is_extra(name) or any(re.fullmatch(pattern, name) for pattern in self.left_out)


# ------------------------------------------------------------------------------------------------ names


def match_names(family: Family, part: str, given: Iterable[str]) -> dict[str, str]:
    """Find the table's Diffusers name for every tensor name of one part, whatever its spelling.

    Returns:
        Diffusers name of the table -> name as given. Ignored tensors are left out.

    Raises:
        CheckpointError: a name that the family does not have, or one part that mixes two spellings.
    """
    spellings, ignored = family.spellings.get(part, ()), family.ignored.get(part, frozenset())
    known = {name for row_part, name in family.to_original if row_part == part}
    found, unknown = _respell(given, spellings, known, ignored, PART_WORDS[part])
    if unknown:
        raise CheckpointError(
            f"The {PART_WORDS[part]} has a tensor {unknown[0]!r} that {family.title} does not have.",
            f"Give the {PART_WORDS[part]} of a {family.title} model; merge LoRA or other adapters into it first.",
        )
    return found


def match_original(family: Family, given: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Find the table's original name for every tensor name of a single file.

    Returns:
        Original name of the table -> name as given; and the names that the table does not have, sorted. Buffers and
        extras are in neither.

    Raises:
        CheckpointError: the file mixes two spellings.
    """
    left_out = {name for name in given if family.is_left_out(name)}
    rest = [name for name in given if name not in left_out]
    return _respell(rest, family.original_spellings, family.to_diffusers.keys(), frozenset(), "file")


def _respell(
    given: Iterable[str],
    spellings: tuple[tuple[str, str], ...],
    known: Iterable[str],
    ignored: frozenset[str],
    owner: str,
) -> tuple[dict[str, str], list[str]]:
    known = set(known)
    both_known = known | ignored
    found: dict[str, str] = {}
    unknown: list[str] = []
    used: dict[tuple[str, str], dict[bool, str]] = {}
    for name in sorted(given):
        table_name = name
        for pair in spellings:
            if name.startswith(pair[0]) and pair[1] + name.removeprefix(pair[0]) in both_known:
                table_name = pair[1] + name.removeprefix(pair[0])
        if table_name in ignored:
            continue
        if table_name not in known:
            unknown.append(name)
            continue
        for pair in spellings:
            if table_name.startswith(pair[1]):
                used.setdefault(pair, {}).setdefault(name != table_name, name)
        found.setdefault(table_name, name)
    for both in used.values():
        if len(both) > 1:
            raise CheckpointError(
                f"The {owner} uses two naming schemes for its tensors: {both[True]!r} and {both[False]!r}.",
                "Give the model itself, not a wrapper or a merge that contains it twice.",
            )
    return found, unknown


# ------------------------------------------------------------------------------------------------ shapes


def measure(family: Family, shapes: Mapping[str, Mapping[str, Shape]]) -> dict[str, int]:
    """Read the widths of a model off its tensors' shapes (part -> Diffusers name -> shape).

    Raises:
        CheckpointError: a tensor is missing, or two parts do not fit together.
    """
    return _measure(family, lambda part, name: (shapes[part].get(name), name), _diffusers_sizes)


def measure_original(family: Family, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Read the widths of a model off the shapes of its single file (original name -> shape); raises as `measure`."""

    def shape_of(part: str, name: str) -> tuple[Shape | None, str]:
        original = family.to_original[part, name].original
        return shapes.get(original), original

    return _measure(family, shape_of, lambda row: row.sizes)


def _measure(
    family: Family,
    shape_of: Callable[[str, str], tuple[Shape | None, str]],
    sizes_of: Callable[[Row], tuple[str, ...]],
) -> dict[str, int]:
    widths = {}
    for symbol, (part, name, axis) in family.measured.items():
        shape, own_name = shape_of(part, name)
        if axis < 0:
            widths[symbol] = int(shape is not None)
            continue
        if shape is None:
            raise _missing(family, part, own_name)
        expected = len(sizes_of(family.to_original[part, name]))
        if len(shape) != expected:
            raise _wrong_shape(family, part, own_name, shape, f"{expected} dimensions")
        widths[symbol] = shape[axis]
    for one, other in family.same:
        if _size(one, widths) != _size(other, widths):
            first, *others = (family.measured[symbol][0] for symbol in (one, *other.split("+")))
            raise CheckpointError(
                f"The {PART_WORDS[first]} fits a width of {_size(one, widths)}, the "
                f"{' and the '.join(PART_WORDS[part] for part in others)} of {_size(other, widths)}.",
                "Give parts of the same model.",
            )
    return widths


def expected_shapes(family: Family, widths: Widths) -> dict[str, Shape]:
    """List the original file's tensors at these widths: name -> shape."""
    return {
        row.original: tuple(_size(size, widths) for size in row.sizes) for row in family.rows if _exists(row, widths)
    }


def part_shapes(row: Row, widths: Widths) -> list[Shape]:
    """The shapes of a row's Diffusers tensors, in the row's order; none where these widths have no such row."""
    if not _exists(row, widths):
        return []
    sizes = tuple(_size(size, widths) for size in _diffusers_sizes(row))
    if not row.stacked:
        return [sizes]
    return [(_size(first, widths), *sizes[1:]) for first in row.stacked]


def check_shapes(family: Family, part: str, shapes: Mapping[str, Shape], widths: Widths) -> None:
    """Refuse a part (Diffusers name -> shape) that lacks a tensor, has one too many, or one of another shape.

    Raises:
        CheckpointError: names the first such tensor.
    """
    for row in family.rows:
        if row.part == part:
            wanted = part_shapes(row, widths)
            for place, name in enumerate(row.diffusers):
                _check(family, part, name, shapes.get(name), wanted[place] if wanted else None)


def check_original(family: Family, shapes: Mapping[str, Shape], widths: Widths) -> None:
    """Refuse a single file (original name -> shape) as `check_shapes` does a part."""
    wanted = expected_shapes(family, widths)
    for row in family.rows:
        _check(family, row.part, row.original, shapes.get(row.original), wanted.get(row.original))


def _check(family: Family, part: str, name: str, shape: Shape | None, wanted: Shape | None) -> None:
    if wanted is not None and shape is None:
        raise _missing(family, part, name)
    if shape is not None and shape != wanted:
        words = "none, because the block keeps its width" if wanted is None else str(list(wanted))
        raise _wrong_shape(family, part, name, shape, words)


def _diffusers_sizes(row: Row) -> tuple[str, ...]:
    if row.form == "turned":
        return row.sizes[::-1]
    return row.sizes[:2] if row.form == "flat" else row.sizes


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
