"""Read lines whose text is known and say how many errors there are: of one model, or of two beside each other."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.reading.dataset import LineSet, read_lines
from fastsd_helpers.trocr.reading.reader import Reader
from fastsd_helpers.trocr.teaching.metrics import Score, Scores, count_confusions, line_errors, score_lines

__all__ = [
    "ComparedLine",
    "Comparison",
    "Evaluation",
    "compare_readers",
    "evaluate",
    "evaluation_from",
    "judge",
    "measured_lines",
]

_WORST = 10


@dataclass(frozen=True)
class Evaluation:
    """Error rates on a set of lines.

    Attributes:
        worst: the lines with the most errors. left_out: why some were not used. per_page, per_group: name, lines,
            characters, cer and wer of each, the worst first. confusions: truth, read and how often, the most frequent
            first; an empty truth was read where nothing is, an empty reading is a character left out. missing_letters:
            the characters left out most often, of how many.
    """

    scores: Scores
    confidence: float  # mean over the lines, to compare with 1 - CER
    looped: int
    cut: int
    worst: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...]
    per_page: tuple[dict[str, Any], ...] = ()
    per_group: tuple[dict[str, Any], ...] = ()
    confusions: tuple[dict[str, Any], ...] = ()
    missing_letters: tuple[dict[str, Any], ...] = ()

    def summary(self) -> dict[str, Any]:
        """What is asked for most, at the top: rates as fractions, the interval of the CER, and the tables."""
        return {
            "cer": self.scores.cer.rate,
            "wer": self.scores.wer.rate,
            "lines": self.scores.lines,
            "interval": [self.scores.cer.low, self.scores.cer.high],
            "per_page": list(self.per_page),
            "per_group": list(self.per_group),
            "confusions": list(self.confusions),
            "missing_letters": list(self.missing_letters),
        }


def evaluate(
    reader: Any,
    data: Any,
    *,
    normal_form: Literal["NFC", "NFD", "none"] = "NFC",
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Read the images of `data` with `reader` and compare with their text.

    Args:
        reader: a Reader.
        data: whatever `dataset.read_lines` takes; of a set in parts, the test lines, else the validation lines.
        normal_form: Unicode form of both sides, in which they are compared: the same letters are no error.

    Raises:
        DatasetError: no line of it can be used.
    """
    lines = measured_lines(data)
    read = reader.read([line.picture for line in lines.lines], progress=progress)
    return judge(lines, read, normal_form)


def measured_lines(data: Any) -> LineSet:
    """The lines of `data` that a model is measured on: of a set in parts, the test lines, else the validation lines."""
    lines = read_lines(data)
    if lines.has_part("train"):
        lines = measured if (measured := lines.of_part("test", "validation")).lines else lines
    return lines


def judge(lines: LineSet, read: list[Line], normal_form: Literal["NFC", "NFD", "none"] = "NFC") -> Evaluation:
    """Compare what was read of lines, in their order, with their text; see `evaluate`."""
    lines = lines.in_form(normal_form)
    if normal_form != "none":
        read = [replace(line, text=unicodedata.normalize(normal_form, line.text)) for line in read]
    left_out = list(lines.problems)
    pairs = []
    for line, found in zip(lines.lines, read, strict=True):
        if found.problem:
            left_out.append(f"{line.name}: {found.problem}")
        else:
            pairs.append((line, found))
    if not pairs:
        raise DatasetError(f"No image of {lines.source} can be read.", left_out[0] if left_out else "")
    scores = score_lines([line.text for line, _found in pairs], [found.text for _line, found in pairs])
    ranked = sorted(pairs, key=lambda pair: -line_errors(pair[0].text, pair[1].text)[0])
    worst = tuple(
        {"name": line.name, "text": line.text, "read": found.text, "confidence": round(found.confidence, 4)}
        for line, found in ranked[:_WORST]
        if line.text != found.text
    )
    texts = [(line.text, found.text) for line, found in pairs]
    confusions, missing = count_confusions(texts)
    return Evaluation(
        scores,
        sum(found.confidence for _line, found in pairs) / len(pairs),
        sum("looped" in found.notes for _line, found in pairs),
        sum("cut" in found.notes for _line, found in pairs),
        worst,
        tuple(left_out),
        _by([line.page or line.group for line, _found in pairs], texts),
        _by([line.group for line, _found in pairs], texts),
        confusions,
        missing,
    )


def _by(names: list[str], texts: list[tuple[str, str]]) -> tuple[dict[str, Any], ...]:
    """The rates of each page or group, the worst first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, pair in zip(names, texts, strict=True):
        found.setdefault(name, []).append(pair)
    rows = []
    for name, pairs in found.items():
        letters, words = ([line_errors(*pair, words=by_words) for pair in pairs] for by_words in (False, True))
        rates = [sum(edits for edits, _of in errors) / max(1, sum(of for _edits, of in errors))
                 for errors in (letters, words)]  # fmt: skip
        rows.append({"name": name, "lines": len(pairs), "characters": sum(of for _edits, of in letters),
                     "cer": rates[0], "wer": rates[1]})  # fmt: skip
    return tuple(sorted(rows, key=lambda row: -row["cer"]))


def evaluation_from(values: dict[str, Any]) -> Evaluation:
    """The evaluation that `dataclasses.asdict` made `values` of, also when they have been through JSON."""
    scores: dict[str, Any] = {
        name: Score(**value) if isinstance(value, dict) else value for name, value in values["scores"].items()
    }
    rest: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Evaluation(**{**rest, "scores": Scores(**scores)})


@dataclass(frozen=True)
class ComparedLine:
    """One line: its image, what it says, what both models make of it, and their errors in characters."""

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
    """Read the same lines with two models, one after the other, and compare.

    Args:
        before: key, folder or Hub id.
        after: key, folder or Hub id.
        lines: whose text is known; none of them should have been learned from.

    Raises:
        DatasetError: no image can be read.
        ModelError: a model cannot be opened.
    """
    pictures = [line.picture for line in lines.lines]
    read = [Reader(model).read(pictures) for model in (before, after)]
    compared = [
        ComparedLine(line.picture, line.text, *texts, *(line_errors(line.text, text)[0] for text in texts))
        for line, *texts in zip(lines.lines, *([found.text for found in each] for each in read), strict=True)
    ]
    compared.sort(key=lambda line: -abs(line.errors_before - line.errors_after))
    return Comparison(judge(lines, read[0]), judge(lines, read[1]), tuple(compared))
