"""Two readers on the same lines: what each of them reads, and how many errors each makes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.trocr.evaluate import Evaluation, evaluate
from fastsd_helpers.trocr.labels import LineSet
from fastsd_helpers.trocr.reader import Reader
from fastsd_helpers.trocr.scores import line_errors

__all__ = ["ComparedLine", "Comparison", "compare_readers"]


@dataclass(frozen=True)
class ComparedLine:
    """One line: its image, what it says, what both readers make of it, and their errors in characters."""

    picture: Any
    text: str
    before: str
    after: str
    errors_before: int
    errors_after: int


@dataclass(frozen=True)
class Comparison:
    """Both evaluations, and every line, those that changed most first."""

    before: Evaluation
    after: Evaluation
    lines: tuple[ComparedLine, ...]


def compare_readers(before: str | Path, after: str | Path, lines: LineSet) -> Comparison:
    """Read the same lines with two readers, one after the other, and compare.

    Args:
        before, after: key, folder or Hub id.
        lines: whose text is known; none of them should have been learned from.

    Raises:
        DatasetError: no image can be read. ModelError and its kin: a reader cannot be opened.
    """
    evaluations, texts = [], []
    for model in (before, after):
        reader = Reader(model)
        texts.append([found.text for found in reader.read([line.picture for line in lines.lines])])
        evaluations.append(evaluate(reader, lines))
    compared = [
        ComparedLine(line.picture, line.text, one, two, line_errors(line.text, one)[0], line_errors(line.text, two)[0])
        for line, one, two in zip(lines.lines, *texts, strict=True)
    ]
    compared.sort(key=lambda line: -abs(line.errors_before - line.errors_after))
    return Comparison(evaluations[0], evaluations[1], tuple(compared))
