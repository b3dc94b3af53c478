"""Carry the values of tensors from their sources, in order, in pieces: read and converted ahead by other threads."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastsd_helpers.checkpoints.formats.dtypes import DTYPE_BYTES, cast
from fastsd_helpers.checkpoints.formats.tensor_plan import Piece, Recipe

__all__ = ["stream"]

# Large enough that threads seldom wait for each other, small enough to stay in a processor's cache until written.
_PIECE_BYTES = 1 << 20
_SMALL_BYTES = 1 << 18
_AHEAD_BYTES = 16 * _PIECE_BYTES  # what may wait


def stream(
    recipes: Iterable[tuple[str, Recipe]],
    *,
    finite: bool = False,
    store: Callable[[int, Any], None] = lambda _place, _buffer: None,
    move: Callable[[int, Piece, Any], bool] = lambda _place, _piece, _buffer: False,
) -> Generator[tuple[str, Any, bool], None, None]:
    """Give every recipe's values as (name, buffer, whether the tensor ends with it), one tensor after the other.

    A buffer is filled anew once the next one is asked for: it is used at once, or copied.

    Args:
        finite: refuse values that are infinite or not a number.
        store: called with each buffer and how many bytes come before it, by the threads, in whatever order; a buffer
            that is given was stored.
        move: asked first for values that are taken over as they are and not looked at, with how many bytes come
            before and a buffer of their size: whether it has put them there itself. The buffer is what will be given.

    Raises:
        CheckpointError: a source cannot be read, or a value does not fit the new dtype.
    """
    spare = _Spare()
    jobs, ahead = _jobs(recipes), 0
    waiting: deque[tuple[_Job, Callable[[], tuple[Any, list[Any]]]]] = deque()
    with ExitStack() as stack:
        pool: ThreadPoolExecutor | None = None
        while True:
            while ahead < _AHEAD_BYTES and (job := next(jobs, None)) is not None:
                work: Callable[[], tuple[Any, list[Any]]] = partial(_make, job, finite, store, move, spare)
                if job.bytes >= _SMALL_BYTES:
                    if pool is None:
                        pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="tensors")
                        stack.callback(pool.shutdown, cancel_futures=True)
                    work = pool.submit(work).result
                # Most tensors are biases: handing them to a thread would take longer than reading them.
                waiting.append((job, work))
                ahead += job.bytes
            if not waiting:
                return
            job, result = waiting.popleft()
            ahead -= job.bytes
            buffer, lent = result()
            yield job.name, buffer, job.last
            spare.arrays += lent


class _Spare:
    """Arrays of one size that are used again: the system would have to clear new ones first."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []

    def take(self) -> Any:
        """The one that was given back last, which is still in a processor's cache; or a new one."""
        import numpy as np

        try:
            return self.arrays.pop()
        except IndexError:
            return np.empty(_PIECE_BYTES, np.uint8)


@dataclass(frozen=True)
class _Job:
    """A piece of a recipe that is read in one go, None where the tensor is empty; `place`: bytes that come before."""

    name: str
    recipe: Recipe
    piece: Piece | None
    place: int
    last: bool

    @property
    def bytes(self) -> int:
        """How much is read for it."""
        return self.piece.count * DTYPE_BYTES[self.piece.stored] if self.piece else 0


def _jobs(recipes: Iterable[tuple[str, Recipe]]) -> Iterator[_Job]:
    place = 0
    for name, recipe in recipes:
        size = DTYPE_BYTES[recipe.fact.dtype]
        cut = list(_cut(recipe, size)) if recipe.fact.count else [None]
        for number, piece in enumerate(cut, 1):
            yield _Job(name, recipe, piece, place, number == len(cut))
            place += size * piece.count if piece else 0


def _cut(recipe: Recipe, size: int) -> Iterator[Piece]:
    """Pieces of a size that is worth a thread's while; a transpose needs the whole."""
    if recipe.turned is not None:
        yield from recipe.pieces
        return
    row = recipe.fact.count // recipe.fact.shape[0] if recipe.fact.shape else 1
    for piece in recipe.pieces:
        step = _PIECE_BYTES // max(size, DTYPE_BYTES[piece.stored])
        if row < step:  # what is merged is multiplied by whole rows
            step -= step % row
        for first in range(0, piece.count, step):
            yield Piece(piece.source, piece.name, piece.first + first, min(step, piece.count - first))


def _make(
    job: _Job,
    finite: bool,
    store: Callable[[int, Any], None],
    move: Callable[[int, Piece, Any], bool],
    spare: _Spare,
) -> tuple[Any, list[Any]]:
    """The values of a job, stored, and the arrays to give back once they are done with."""
    import numpy as np

    recipe, piece = job.recipe, job.piece
    if piece is None:
        return b"", []
    if piece.stored == recipe.fact.dtype and recipe.turned is None and not finite:
        lent = [spare.take()]
        if move(job.place, piece, values := memoryview(lent[0])[: job.bytes]):
            return values, lent
        spare.arrays += lent
    lent = [spare.take(), spare.take()] if recipe.turned is None else [np.empty(job.bytes, np.uint8), None]
    values, out = lent[0][: job.bytes], lent[1]
    piece.source.read_into(piece.name, piece.first * DTYPE_BYTES[piece.stored], values)
    owner = partial(recipe.owner, piece)
    made = cast(values, piece.stored, recipe.fact.dtype, owner=owner, finite=finite, out=out)
    if recipe.turned is not None:
        whole = np.frombuffer(made, f"V{DTYPE_BYTES[recipe.fact.dtype]}").reshape(recipe.turned)
        made, lent = np.ascontiguousarray(whole.T).view(np.uint8), []
    else:
        spare.arrays.append(lent.pop(1 if made is values else 0))
    made = memoryview(made).cast("B")
    store(job.place, made)
    return made, lent
