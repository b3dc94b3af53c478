"""A model's tensors with changes added while they are read: whatever copies, stacks or casts them sees them merged.

A changed tensor is given in fp32 (fp64 where it is stored so), computed a few rows at a time: neither the weight nor
the change is ever in memory as a whole, but where a tensor is the transpose of the weight that is meant.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastsd_helpers.checkpoints.formats.dtypes import DTYPE_BYTES, cast
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.formats.sources import Source
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe
from fastsd_helpers.checkpoints.lora.lycoris import Change

__all__ = ["Addition", "Merged", "MergedSource", "Span"]

_KEPT = 8  # changes whose factors stay in memory: neighbouring pieces of a tensor are computed at the same time


@dataclass(frozen=True)
class Span:
    """Rows of a model's tensor that are rows of one changed weight.

    first: where they begin in the tensor; at: where they begin in the weight.
    turned: the tensor is the transpose of the weight; then the span is all of it.
    """

    source: Source
    name: str
    first: int
    at: int
    count: int
    turned: bool = False


@dataclass(frozen=True)
class Addition:
    """`strength` times a change, and the rows it is added to.

    build: reads the change's factors.
    """

    strength: float
    build: Callable[[], Change]
    spans: Sequence[Span]

    def weights(self, first: int, last: int) -> np.ndarray:
        """The weight's own rows, float32 [last - first, columns], as they are without any change."""
        found = []
        for span in sorted(self.spans, key=lambda one: one.at):
            begin, end = max(first, span.at), min(last, span.at + span.count)
            if begin < end:
                found.append(_own_rows(span, begin - span.at, end - span.at))
        return found[0] if len(found) == 1 else np.concatenate(found)


class MergedSource(Source):
    """A source whose changed tensors are given changed; the others are not asked for.

    Attributes:
        tensors: the changed ones, in the format they are given in.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._additions: dict[str, list[tuple[Addition, Span]]] = {}
        self._changes: OrderedDict[int, Change] = OrderedDict()
        self._alone = threading.Lock()
        self.tensors: dict[str, TensorFact] = {}
        self.files: tuple[Path, ...] = source.files
        self.metadata: Mapping[str, str] = source.metadata

    def add(self, addition: Addition, span: Span) -> None:
        """Change one of the tensors."""
        fact = self._source.tensors[span.name]
        self.tensors[span.name] = TensorFact("F64" if fact.dtype == "F64" else "F32", fact.shape)
        self._additions.setdefault(span.name, []).append((addition, span))

    def read_into(self, name: str, start: int, buffer: Any) -> None:
        fact = self.tensors[name]
        size = DTYPE_BYTES[fact.dtype]
        values = np.frombuffer(buffer, f"<f{size}")
        if not values.size:
            return
        begin, end = start // size, start // size + len(values)
        self._read_own(name, begin, values)
        width = fact.count // fact.shape[0]
        for addition, span in self._additions[name]:
            low, high = max(begin, span.first * width), min(end, (span.first + span.count) * width)
            for first, last in _split_at_rows(low, high, width):
                self._add(addition, span, first, width, values[first - begin : last - begin])

    def _read_own(self, name: str, begin: int, values: np.ndarray) -> None:
        stored = self._source.tensors[name].dtype
        size = DTYPE_BYTES[stored]
        if stored == self.tensors[name].dtype:
            self._source.read_into(name, begin * size, values.view("u1"))
            return
        values[:] = _read_values(self._source, name, begin, len(values))

    def _add(self, addition: Addition, span: Span, first: int, width: int, values: np.ndarray) -> None:
        """Add what it changes to whole rows of a tensor, or to a part of one, from its value `first` on."""
        change, (row, skipped) = self._change(addition), divmod(first, width)
        if span.turned:
            made = change.rows(0, change.shape[0], addition.weights).T[row : row + max(1, len(values) // width)]
            values += np.float32(addition.strength) * made.reshape(-1)[skipped : skipped + len(values)]
            return
        row += span.at - span.first
        if skipped or len(values) < width:
            whole = np.zeros((1, width), "<f4")
            change.add(whole, row, addition.strength, addition.weights)
            values += whole[0, skipped : skipped + len(values)]
        else:
            change.add(values.reshape(-1, width), row, addition.strength, addition.weights)

    def _change(self, addition: Addition) -> Change:
        with self._alone:
            if id(addition) not in self._changes:
                self._changes[id(addition)] = addition.build()
                if len(self._changes) > _KEPT:
                    self._changes.popitem(last=False)
            self._changes.move_to_end(id(addition))
            return self._changes[id(addition)]


@dataclass
class Merged:
    """Changes to the tensors of a model's sources, whichever of its files they lie in."""

    sources: dict[int, MergedSource] = field(default_factory=dict)

    def add(self, addition: Addition) -> None:
        """Change every tensor that the addition has rows in."""
        for span in addition.spans:
            self.sources.setdefault(id(span.source), MergedSource(span.source)).add(addition, span)

    def recipes(self, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """The same plan with the changed tensors; formats and shapes of the result stay."""
        return {name: replace(recipe, pieces=tuple(self._pieces(recipe))) for name, recipe in recipes.items()}

    def _pieces(self, recipe: Recipe) -> Iterable[Any]:
        for piece in recipe.pieces:
            changed = self.sources.get(id(piece.source))
            yield replace(piece, source=changed) if changed is not None and piece.name in changed.tensors else piece


def _split_at_rows(low: int, high: int, width: int) -> Iterable[tuple[int, int]]:
    """A range of values as the end of a row, whole rows, and the beginning of one, where it has them."""
    if low >= high:
        return ()
    return pairwise(sorted({low, min(high, -(-low // width) * width), max(low, high // width * width), high}))


def _own_rows(span: Span, first: int, last: int) -> np.ndarray:
    height, *_ = shape = span.source.tensors[span.name].shape
    width = 1
    for size in shape[1:]:
        width *= size
    if span.turned:
        return _read_values(span.source, span.name, 0, height * width).reshape(height, width).T[first:last]
    begin = (span.first + first) * width
    return _read_values(span.source, span.name, begin, (last - first) * width).reshape(last - first, width)


def _read_values(source: Source, name: str, begin: int, count: int) -> np.ndarray:
    """Values of a tensor as float32, in memory of their own."""
    stored = source.tensors[name].dtype
    size = DTYPE_BYTES[stored]
    values = np.empty(count * size, "u1")
    source.read_into(name, begin * size, values)
    return np.frombuffer(cast(values, stored, "F32", owner=lambda: f"The tensor {name!r}"), "<f4")
