"""A language model for a reader: learned from texts, its weights chosen on ground truth, and off without a gain."""

import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.model_lookup import LANGUAGE
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.language.ngram import CharacterModel, learn_characters
from fastsd_helpers.trocr.reading.dataset import LineSet
from fastsd_helpers.trocr.reading.reader import Reader
from fastsd_helpers.trocr.teaching.metrics import line_errors

__all__ = ["LanguageGain", "choose_weights", "fit_language", "keep_language"]

_WEIGHTS = (0.05, 0.1, 0.2, 0.4, 0.6)
_SEARCHED = (0.1, 0.2, 0.4)  # of them, those tried beside a search, which reads all lines again
_BONUSES = (0.0, 0.5, 1.0, 2.0)  # of the weight, for every character
_BEAMS = 4
_SAMPLES, _SURE = 1000, 0.9  # bootstrap samples, and the share of them in which there must be a gain
_MOST_LINES = 200
_FEWEST, _QUICK = 10, 50  # lines to choose on before a reading, which waits for it


@dataclass(frozen=True)
class LanguageGain:
    """What a language model is worth with one search: the weights chosen, and the CER without and with them.

    Attributes:
        beams: beam width; 1 is greedy decoding. way: greedy or beams (beside the search), rescoring (of the lines
            that a beam search ends with), alternatives (rescoring of a greedily decoded line and what else it may be),
            or none: it does not help.
    """

    beams: int
    way: str
    weight: float
    bonus: float
    cer_without: float
    cer_with: float
    lines: int

    def in_words(self) -> str:
        """One line for people."""
        told = f"{'greedy' if self.beams == 1 else f'beam {self.beams}'}: CER {100 * self.cer_without:.2f} % without"
        return f"{told}, {100 * self.cer_with:.2f} % with" if self.weight else f"{told}, no better with: off"


def choose_weights(
    reader: Reader,
    language: CharacterModel,
    lines: LineSet,
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[CharacterModel, tuple[LanguageGain, ...]]:
    """Choose how much a language model counts, for greedy decoding and for a beam search.

    Tried: weights of 0.1 to 0.4, beside the search; and, for the lines that a search without it found, weights of 0.05
    to 0.6 with bonuses for length. The weights are 0 where none lowers the errors for certain.

    Args:
        reader: with any search.
        lines: none that the reader or the language model learned from; up to 200 of them are read.
        progress: called after every batch of lines.
    """
    step = max(1, -(-len(lines.lines) // _MOST_LINES))
    chosen = lines.lines[::step]
    pictures = [line.picture for line in chosen]
    truths = [line.text for line in chosen]

    def read(beams: int, weights: tuple[float, float] | None) -> Any:
        off = (0.0, 0.0)
        with_it: Any = "none"
        if weights:
            with_it = replace(language, greedy=weights, beams=weights, rescoring=off, alternatives=off)
        own = reader.with_search(beams, n_best=beams, language=with_it)
        own.compares = beams == 1 and not weights
        return own.read(pictures, progress=progress)

    gains = []
    for beams, way, ranking in ((1, "greedy", "alternatives"), (_BEAMS, "beams", "rescoring")):
        plain = read(beams, None)
        trials: _Trials = {("none", 0.0, 0.0): _edits(truths, plain)}
        trials |= {(way, weight, 0.0): _edits(truths, read(beams, (weight, 0.0))) for weight in _SEARCHED}
        trials |= _rescored(ranking, truths, plain, language)
        gains.append(_gain(beams, trials, truths))
    about = language.about | {"gains": [gain.in_words() for gain in gains], "lines": len(truths)}
    weights: dict[str, Any] = dict.fromkeys(language.weights, (0.0, 0.0))
    weights |= {gain.way: (gain.weight, gain.bonus) for gain in gains if gain.way in weights}
    return replace(language, about=about, **weights), tuple(gains)


def fit_language(
    reader: Reader, lines: LineSet, *, progress: Callable[[int], None] | None = None
) -> tuple[Reader, LanguageGain | None]:
    """The same reader, whose language model counts as much as lowers the CER of these lines; else not at all.

    Args:
        reader: one with a language model.
        lines: with their text; of more than fifty every so manieth is read.
        progress: called after every batch of lines.

    Returns:
        The reader; and the gain with its own search, None where there are too few lines to tell.
    """
    if reader.language is None or len(lines.lines) < _FEWEST:
        return reader, None
    step = -(-len(lines.lines) // _QUICK)
    some = LineSet(lines.lines[::step], source=lines.source)
    language, (greedy, beams) = choose_weights(reader, reader.language, some, progress=progress)
    own = reader.settings
    return reader.with_search(own.beams, n_best=own.n_best, language=language), beams if own.beam_width > 1 else greedy


# The errors of each line, by the way a language model is used and its weight and bonus.
_Trials = dict[tuple[str, float, float], list[int]]


def _edits(truths: Sequence[str], lines: Sequence[Any]) -> list[int]:
    return [line_errors(_composed(truth), _composed(line.text))[0] for truth, line in zip(truths, lines, strict=True)]


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _rescored(way: str, truths: Sequence[str], lines: Sequence[Any], language: CharacterModel) -> _Trials:
    """The same for each pair of weights, when the texts found for each line are ranked with them."""
    ranked = []
    for truth, line in zip(truths, lines, strict=True):
        others = line.alternatives or ((line.text, 0.0),)
        ranked.append([(log, language.log_prob(text), len(text), line_errors(_composed(truth), _composed(text))[0])
                       for text, log in others])  # fmt: skip
    found: _Trials = {}
    for weight, bonus in ((weight, weight * bonus) for weight in _WEIGHTS for bonus in _BONUSES):
        found[way, weight, bonus] = [
            max(texts, key=lambda one: one[0] + weight * one[1] + bonus * one[2])[3] for texts in ranked
        ]
    return found


def _gain(beams: int, trials: _Trials, truths: Sequence[str]) -> LanguageGain:
    """The trial with the fewest errors, if it has fewer than none at all in nine of ten bootstrap samples of the lines.

    The best of so many trials is better by chance too.
    """
    none = ("none", 0.0, 0.0)
    plain, size = trials[none], max(1, sum(map(len, truths)))
    best = min(trials, key=lambda trial: (sum(trials[trial]), trial[1:]))
    gained = [one - other for one, other in zip(plain, trials[best], strict=True)]
    chance = random.Random(0)
    lower = sum(sum(chance.choices(gained, k=len(gained))) > 0 for _ in range(_SAMPLES))
    if lower < _SURE * _SAMPLES:
        best = none
    return LanguageGain(beams, *best, sum(plain) / size, sum(trials[best]) / size, len(truths))


def keep_language(
    folder: Path,
    learned: LineSet,
    held: LineSet,
    *,
    texts: Sequence[str] = (),
    normal_form: Literal["NFC", "NFD", "none"] = "NFC",
    progress: Callable[[int], None] | None = None,
    **reading: Any,
) -> tuple[LanguageGain, ...]:
    """Learn a language model from the texts that a reader learned, and put it into the reader's folder if it helps.

    Args:
        folder: of the reader.
        learned: the lines that it learned.
        held: the lines held out.
        texts: more text.
        normal_form: Unicode form of the texts.
        progress: called after every batch of lines.
        reading: settings of the Reader.

    Returns:
        The gains; none where nothing could be measured, for the lines held out were learned from.
    """
    known = {line.text for line in learned.lines}
    unknown = LineSet([line for line in held.lines if line.text not in known], source=held.source)
    if len(unknown.lines) < 2:
        if texts:
            logger.warning("No language model of the texts is kept: whether it helps is measured on two held-out lines "
                           "or more whose text is not learned.")  # fmt: skip
        return ()
    own = [line.text for line in learned.lines]
    language = learn_characters([*own, *texts], normal_form=normal_form)
    language, gains = choose_weights(Reader(folder, **reading), language, unknown, progress=progress)
    if any(gain.weight for gain in gains):
        language.save(folder / LANGUAGE)
    return gains
