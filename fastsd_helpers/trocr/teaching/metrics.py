"""How right a reading is: character and word error rates, with an interval, and which characters are read as which."""

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastsd_helpers.errors import needs_package

__all__ = ["Score", "Scores", "count_confusions", "line_errors", "normalise", "score_lines"]

_RESAMPLES = 1000
_MOST_CONFUSED, _MOST_MISSING = 50, 20


@dataclass(frozen=True)
class Score:
    """One error rate over many lines: all edits over all symbols, and where it would lie for other lines like these.

    `low` and `high` bound 95 % of 1000 bootstrap resamples of the lines.
    """

    rate: float
    low: float
    high: float
    edits: int
    symbols: int


@dataclass(frozen=True)
class Scores:
    """Error rates of a reading, as fractions (0.05 = 5 %; more than 1 when far too much was written)."""

    lines: int
    cer: Score
    wer: Score
    cer_normalised: Score
    wer_normalised: Score
    exact: float  # part of the lines without any error


def normalise(text: str) -> str:
    """Text without what many call no error: case, punctuation, kinds and runs of blanks, composed accents."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(" " if unicodedata.category(letter)[0] in "PS" else letter for letter in text)
    return " ".join(text.split())


def line_errors(truth: str, read: str, *, words: bool = False) -> tuple[int, int]:
    """Count (edits, symbols of the truth) of one line, in characters or in words.

    Blanks around the line do not count. A line that should be empty has 0 symbols and one edit per symbol read.
    """
    with needs_package("Measuring errors", "Run: fastsd install trocr"):
        import jiwer
    truth, read = (" ".join(text.split()) if words else text.strip() for text in (truth, read))
    if not truth:
        return len(read.split() if words else read), 0
    found = (jiwer.process_words if words else jiwer.process_characters)(truth, read)
    edits = found.substitutions + found.deletions + found.insertions
    return edits, len(truth.split() if words else truth)


def score_lines(truths: Sequence[str], readings: Sequence[str], *, seed: int = 0) -> Scores:
    """Compare readings with the truth, line by line.

    Args:
        truths: the right texts.
        readings: what was read, as many and in the same order.
        seed: of the bootstrap resamples.

    Raises:
        ValueError: they differ in number, or there are none.
    """
    if len(truths) != len(readings) or not truths:
        raise ValueError(f"{len(truths)} true lines and {len(readings)} readings cannot be compared")

    def rate(change: Callable[[str], str], words: bool) -> Score:
        pairs = [line_errors(change(a), change(b), words=words) for a, b in zip(truths, readings, strict=True)]
        return _with_interval(pairs, seed)

    return Scores(
        len(truths),
        rate(str, False),
        rate(str, True),
        rate(normalise, False),
        rate(normalise, True),
        sum(a.strip() == b.strip() for a, b in zip(truths, readings, strict=True)) / len(truths),
    )


def _with_interval(pairs: list[tuple[int, int]], seed: int) -> Score:
    edits, symbols = (sum(values) for values in zip(*pairs, strict=True))
    chance = random.Random(seed)
    rates = []
    for _ in range(_RESAMPLES):
        drawn = chance.choices(pairs, k=len(pairs))
        rates.append(sum(pair[0] for pair in drawn) / max(1, sum(pair[1] for pair in drawn)))
    rates.sort()
    low, high = rates[int(0.025 * _RESAMPLES)], rates[int(0.975 * _RESAMPLES) - 1]
    return Score(edits / max(1, symbols), low, high, edits, symbols)


def count_confusions(
    pairs: Iterable[tuple[str, str]],
) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    """Count the edits that turn each truth into what was read.

    Args:
        pairs: (truth, read) of each line, in one Unicode form; blanks around them do not count.

    Returns:
        Up to 50 confusions ({truth, read, count}; one of both is empty for a character left out or made up), and up to
        20 characters that were left out ({letter, count, of}: so often, of all times it is in the truth).
    """
    with needs_package("Counting confusions", "Run: fastsd install trocr"):
        from rapidfuzz.distance import Levenshtein
    counted: Counter[tuple[str, str]] = Counter()
    letters: Counter[str] = Counter()
    for truth, read in ((truth.strip(), read.strip()) for truth, read in pairs):
        letters.update(truth)
        for edit in Levenshtein.editops(truth, read):
            lost = "" if edit.tag == "insert" else truth[edit.src_pos]
            counted[lost, "" if edit.tag == "delete" else read[edit.dest_pos]] += 1
    ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    confusions = tuple(
        {"truth": truth, "read": read, "count": count} for (truth, read), count in ranked[:_MOST_CONFUSED]
    )
    missing = [(truth, count) for (truth, read), count in ranked if not read]
    return confusions, tuple(
        {"letter": letter, "count": count, "of": letters[letter]} for letter, count in missing[:_MOST_MISSING]
    )
