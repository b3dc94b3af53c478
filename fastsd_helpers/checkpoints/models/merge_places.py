"""Where the weight that an adapter means lies in a model's files: which rows of which tensors, in which order.

A Diffusers tensor may be rows of a larger one of the original, have its halves exchanged there, or be its transpose;
and a module of an adapter may be several Diffusers tensors under one another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastsd_helpers.checkpoints.formats.sources import Source
from fastsd_helpers.checkpoints.models.merged_source import Span
from fastsd_helpers.checkpoints.models.parts import Parts
from fastsd_helpers.checkpoints.models.single_file import SingleFile
from fastsd_helpers.checkpoints.names.layout import Shape, part_shapes

__all__ = ["Tensor", "find_in_parts", "find_in_single", "spans_of"]


@dataclass(frozen=True)
class Tensor:
    """One Diffusers tensor of a model, and where it lies.

    shape: as Diffusers has it.
    rows: (first row in the source's tensor, first row of the Diffusers tensor, count).
    turned: the source's tensor is the transpose.
    """

    source: Source
    name: str
    shape: Shape
    rows: tuple[tuple[int, int, int], ...]
    turned: bool = False


def find_in_parts(opened: Parts, part: str, name: str) -> Tensor | None:
    """A tensor of an opened Diffusers folder; None where it has none of that name."""
    if name not in opened.names[part]:
        return None
    source, theirs = opened.find(part, name)
    shape = source.tensors[theirs].shape
    return Tensor(source, theirs, shape, ((0, 0, shape[0]),))


def find_in_single(single: SingleFile, part: str, name: str) -> Tensor | None:
    """A tensor of an opened single file, which may be some rows of one of the original's; None where it has none."""
    row = single.family.to_original.get((part, name))
    shapes = part_shapes(row, single.widths) if row else []
    if row is None or not shapes or row.original not in single.names:
        return None
    place = row.diffusers.index(name)
    height, first = shapes[place][0], sum(shape[0] for shape in shapes[:place])
    half = height // 2
    rows = ((half, 0, half), (0, half, half)) if row.form == "swapped" else ((first, 0, height),)
    return Tensor(single.source, single.names[row.original], shapes[place], rows, row.form == "turned")


def spans_of(tensors: Sequence[Tensor], *, swapped: bool) -> Iterator[Span]:
    """The rows of an adapter's module, wherever they lie.

    Args:
        tensors: the Diffusers tensors that the module covers, in its order.
        swapped: the module has the halves of its only tensor exchanged.
    """
    start = 0
    for tensor in tensors:
        height = tensor.shape[0]
        half = height // 2
        # Rows of the Diffusers tensor -> rows of the module.
        own = [(0, half, half), (half, 0, half)] if swapped else [(0, start, height)]
        for first, there, count in tensor.rows:
            for begin, at, length in own:
                low, high = max(there, begin), min(there + count, begin + length)
                if low < high:
                    place, rows = first + low - there, high - low
                    yield Span(tensor.source, tensor.name, place, at + low - begin, rows, tensor.turned)
        start += height
