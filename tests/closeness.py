"""How close two computations come: every bound is a share of the largest value of the reference.

Two ways through the same sums round differently: another order, another width of the processor's registers, another
library. What rounding does grows with the values it is done on, so an absolute bound that fits one model or processor
does not fit the next. Where a rounding error can turn a choice over, only a real tie is excused: `assert_same_lines`.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Written", "assert_close_to", "assert_same_lines", "written"]

_END = 2  # the token that ends a line, of every tiny reader


def assert_close_to(found: Any, reference: Any, *, of_largest: float, about: Any = "") -> None:
    """Fail where a value is further from the reference's than a share of the reference's largest absolute value.

    Args:
        found, reference: tensors, arrays or lists of numbers, of one shape. What is NaN or Inf in the reference
            must be the same in what was found, and never counts as the largest.
        of_largest: the share that is allowed; the caller says beside it which rounding it stands for.
        about: what is compared, for the message.
    """
    found, reference = _array(found), _array(reference)
    about = about or "it is"
    assert found.shape == reference.shape, f"{about} shapes differ: {found.shape} for {reference.shape}"
    known = np.isfinite(reference)
    assert np.array_equal(found[~known], reference[~known], equal_nan=True), f"{about} other infinities or NaN"
    away = np.abs(found[known] - reference[known])
    largest = np.abs(reference[known]).max(initial=0.0)
    assert largest > 0, f"{about} the reference is 0 everywhere: no share of it says anything"
    share = float(away.max() / largest)
    _note(share, of_largest)
    assert share <= of_largest, (
        f"{about} off by {share:.2e} of the largest value ({largest:.4g}); {of_largest:.0e} is allowed"
    )


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _note(share: float, allowed: float) -> None:
    """Keep the deviation for scripts/test_paths.py, which names a file in the environment."""
    file = os.environ.get("FASTSD_DEVIATIONS")
    if file:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
        with Path(file).open("a", encoding="utf-8") as notes:
            notes.write(json.dumps({"test": test, "share": share, "allowed": allowed}) + "\n")


# --------------------------------------------------------------------------------------------- written lines


@dataclass(frozen=True)
class Written:
    """A line as a search wrote it: ids without start and end, their log-probabilities, the mean (the end counted)."""

    ids: list[int]
    logs: list[float]
    mean: float


def written(lines: Sequence[Any]) -> list[Written]:
    """What a Reader's lines say."""
    return [
        Written(
            [token.id for token in line.tokens],
            [math.log(token.confidence) for token in line.tokens],
            math.log(line.confidence),
        )
        for line in lines
    ]


def assert_same_lines(
    found: Sequence[Written],
    reference: Sequence[Written],
    *,
    of_largest: float,
    judge: Callable[[int, list[int]], Any],
    beams: int = 1,
    ties: int = 1,
) -> None:
    """Two searches wrote the same tokens with log-probabilities that are close; at most so many lines part at a tie.

    Args:
        of_largest: as in assert_close_to, of the largest log-probability of all lines.
        judge: called with a line's place and some token ids, gives the log-probabilities of what comes first and of
            what follows each of them, [tokens + 1, vocabulary], by a computation that is neither search's. Where two
            lines part, it must hold both for equally likely: the two next tokens of a greedy search, the two whole
            lines of a beam search.
        ties: how many lines may part; more would mean that the lines are ill chosen.
    """
    assert len(found) == len(reference)
    largest = max(abs(log) for line in reference for log in (*line.logs, line.mean))
    ours, theirs, parted = [], [], []
    for place, (one, other) in enumerate(zip(found, reference, strict=True)):
        same = _common(one.ids, other.ids)
        ours += one.logs[:same]
        theirs += other.logs[:same]
        if one.ids == other.ids:
            ours.append(one.mean)
            theirs.append(other.mean)
            continue
        parted.append(place)
        likelier, gap = _gap(judge, place, one.ids, other.ids, same, beams)
        assert gap <= of_largest * largest, (
            f"line {place} parts from the reference at token {same} without a tie: {one.ids} for {other.ids}, "
            f"where {likelier} is likelier by {gap:.3g} (log-probability)"
        )
    assert len(parted) <= ties, f"lines {parted} part from the reference at ties; at most {ties} may"
    assert_close_to([*ours, largest], [*theirs, largest], of_largest=of_largest, about="log-probabilities")


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lines begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _gap(
    judge: Callable[[int, list[int]], Any], place: int, one: list[int], other: list[int], same: int, beams: int
) -> tuple[str, float]:
    """Which of two lines that part the judge holds for likelier, and by how much."""
    ends = [[*ids, _END] for ids in (one, other)]
    if beams == 1:
        logs = judge(place, one[:same])[same]
        a, b = (float(logs[ids[same]]) for ids in ends)
    else:  # a beam search goes by the mean per token; of a line cut at the limit this counts an end that is not there
        a, b = (
            sum(float(row[token]) for row, token in zip(judge(place, ids[:-1]), ids, strict=True)) / len(ids)
            for ids in ends
        )
    return ("the line found" if a > b else "the reference", abs(a - b))
