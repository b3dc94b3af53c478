"""Carry the values of tensors from their sources, in order, in pieces: read and converted ahead by other threads."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastsd_helpers.checkpoints.number_formats import DTYPE_BYTES, cast
from fastsd_helpers.checkpoints.recipes import Piece, Recipe

__all__ = ["pump"]

# Stays in a processor's own cache until it is written: pieces of 2 MB take half as long again.
_PIECE_BYTES = 512 << 10
_SMALL_BYTES = 1 << 18
_AHEAD = 8  # pieces that wait: 4 MB


def pump(recipes: Iterable[tuple[str, Recipe]], *, finite: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """Give every recipe's values as (name, buffer, whether the tensor ends with it), one tensor after the other.

    Args:
        finite: refuse values that are infinite or not a number.

    Raises:
        CheckpointError: a source cannot be read, or a value does not fit the new number format.
    """
    jobs = ((name, recipe, job, last) for name, recipe in recipes for job, last in _jobs(recipe))
    waiting: deque[tuple[str, Callable[[], Any], bool]] = deque()
    with ExitStack() as stack:
        pool: ThreadPoolExecutor | None = None
        while True:
            for name, recipe, job, last in itertools.islice(jobs, _AHEAD - len(waiting)):
                if sum(piece.count * DTYPE_BYTES[piece.stored] for piece in job) < _SMALL_BYTES:
                    # Most tensors are biases: handing them to a thread would take longer than reading them.
                    waiting.append((name, partial(_values, recipe, job, finite), last))
                    continue
                if pool is None:
                    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="tensors")
                    stack.callback(pool.shutdown, cancel_futures=True)
                waiting.append((name, pool.submit(_values, recipe, job, finite).result, last))
            if not waiting:
                return
            name, result, last = waiting.popleft()
            yield name, result(), last


def _jobs(recipe: Recipe) -> Iterator[tuple[list[Piece], bool]]:
    """A recipe cut into pieces of a size that is worth a thread's while; a transpose needs the whole."""
    if recipe.turned is not None or not recipe.fact.count:
        yield list(recipe.pieces), True
        return
    cut = []
    for piece in recipe.pieces:
        step = _PIECE_BYTES // DTYPE_BYTES[piece.stored]
        for first in range(0, piece.count, step):
            count = min(step, piece.count - first)
            cut.append(Piece(piece.source, piece.name, piece.first + first, count))
    for place, piece in enumerate(cut):
        yield [piece], place == len(cut) - 1


def _values(recipe: Recipe, pieces: list[Piece], finite: bool) -> Any:
    import numpy as np

    made = []
    for piece in pieces:
        size = DTYPE_BYTES[piece.stored]
        # A Piece's bytes are about to be overwritten: zeroing them first would be work for nothing.
        values = np.empty(piece.count * size, np.uint8)
        piece.source.read_into(piece.name, piece.first * size, values)
        changed = cast(
            values, piece.stored, recipe.fact.dtype, owner=lambda piece=piece: recipe.owner(piece), finite=finite
        )
        made.append(memoryview(changed).cast("B"))
    if recipe.turned is not None and recipe.fact.count:
        (whole,) = made
        size = DTYPE_BYTES[recipe.fact.dtype]
        return np.ascontiguousarray(np.frombuffer(whole, f"V{size}").reshape(recipe.turned).T).view(np.uint8)
    return made[0] if made else b""
