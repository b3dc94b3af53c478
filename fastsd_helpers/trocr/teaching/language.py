"""A language model for a reader: learned from texts, its weights chosen on ground truth, and off without a gain."""

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.model_lookup import LANGUAGE
from fastsd_helpers.trocr.ground_truth.labels import read_texts
from fastsd_helpers.trocr.ground_truth.rows import LeftOut
from fastsd_helpers.trocr.language.ngram import CharacterModel, learn_characters
from fastsd_helpers.trocr.reading.dataset import LineSet
from fastsd_helpers.trocr.reading.reader import Reader
from fastsd_helpers.trocr.teaching.metrics import line_errors

__all__ = ["LanguageGain", "choose_weights", "keep_language", "texts_of"]

logger = logging.getLogger("fastsd_helpers")

_WEIGHTS = (0.05, 0.1, 0.2, 0.4, 0.6)
_BONUSES = (0.0, 0.5, 1.0, 2.0)  # of the weight, for every character
_BEAMS = 4
_MOST_LINES = 200
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")


@dataclass(frozen=True)
class LanguageGain:
    """What a language model is worth with one search: the weights chosen, and the CER without and with them."""

    search: str  # greedy or beams (4)
    weight: float
    bonus: float
    cer_without: float
    cer_with: float
    lines: int

    def in_words(self) -> str:
        """One line for people."""
        name = "greedy" if self.search == "greedy" else f"beam {_BEAMS}"
        told = f"{name}: CER {100 * self.cer_without:.2f} % without"
        return f"{told}, {100 * self.cer_with:.2f} % with" if self.weight else f"{told}, no better with: off"


def texts_of(paths: Iterable[Path]) -> list[str]:
    """The texts of files and of folders of them (.txt, .md, .rst).

    Raises:
        DatasetError: one is not there, or is no text.
    """
    files: list[Path] = []
    for path in (path.expanduser() for path in paths):
        if not path.exists():
            raise DatasetError(f"There is no file or folder {path}.", "Check the path; names are case-sensitive.")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in found if file.is_file() and (file == path or file.suffix in _TEXT_SUFFIXES)]
    if not files:
        raise DatasetError("There is no text file in the folder.", f"Put files there that end in {_TEXT_SUFFIXES[0]}.")
    texts = []
    for text in read_texts(files).values():
        if isinstance(text, LeftOut):
            raise DatasetError(str(text), "Save it as UTF-8.")
        texts.append(text)
    return texts


def choose_weights(
    model: str | Path, language: CharacterModel, lines: LineSet, **reading: Any
) -> tuple[CharacterModel, tuple[LanguageGain, ...]]:
    """Choose how much a language model counts, for greedy decoding and for a beam search.

    Tried: weights of 0.05 to 0.6, and for beams a bonus for length too, over the texts that a search without a language
    model ends with. Chosen on one half of the lines and tried on the other, both ways, they must lower the errors, and
    the lines read with them too; else the weight is 0.

    Args:
        model: recognition model: key, folder or Hub id.
        lines: none that the reader or the language model learned from; up to 200 of them are read.
        reading: settings of the Reader, but for its search.
    """
    step = max(1, -(-len(lines.lines) // _MOST_LINES))
    chosen = lines.lines[::step]
    pictures = [line.picture for line in chosen]
    truths = [line.text for line in chosen]

    def read(beams: int, n_best: int, weights: tuple[float, float] | None) -> Any:
        with_it: Any = replace(language, greedy=weights, beams=weights) if weights else "none"
        return Reader(model, beams, n_best=n_best, language=with_it, **reading).read(pictures)

    trials = {(0.0, 0.0): _edits(truths, read(1, 1, None))}
    trials |= {(weight, 0.0): _edits(truths, read(1, 1, (weight, 0.0))) for weight in _WEIGHTS[1:-1]}
    greedy = _gain("greedy", trials, truths)
    found = read(_BEAMS, _BEAMS, None)
    best = _gain("beams", _rescored(truths, found, language), truths)
    if best.weight:
        plain, fused = (sum(_edits(truths, lines)) for lines in (found, read(_BEAMS, 1, (best.weight, best.bonus))))
        size = max(1, sum(map(len, truths)))
        best = replace(best, cer_without=plain / size, cer_with=fused / size)
        if fused >= plain:
            best = replace(best, weight=0.0, bonus=0.0, cer_with=best.cer_without)
    gains = (greedy, best)
    about = language.about | {"gains": [gain.in_words() for gain in gains], "lines": len(truths)}
    return replace(language, greedy=(greedy.weight, greedy.bonus), beams=(best.weight, best.bonus), about=about), gains


def _edits(truths: Sequence[str], lines: Sequence[Any]) -> list[int]:
    return [line_errors(_composed(truth), _composed(line.text))[0] for truth, line in zip(truths, lines, strict=True)]


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _rescored(
    truths: Sequence[str], lines: Sequence[Any], language: CharacterModel
) -> dict[tuple[float, float], list[int]]:
    """The errors of each line with each pair of weights, when its n-best texts are ranked with them."""
    ranked = []
    for truth, line in zip(truths, lines, strict=True):
        others = line.alternatives or ((line.text, 0.0),)
        ranked.append([(log, language.log_prob(text), len(text), line_errors(_composed(truth), _composed(text))[0])
                       for text, log in others])  # fmt: skip
    pairs = [(weight, weight * bonus) for weight in _WEIGHTS for bonus in _BONUSES]
    found = {(0.0, 0.0): [texts[0][3] for texts in ranked]}
    for weight, bonus in pairs:
        found[weight, bonus] = [max(texts, key=lambda one: one[0] + weight * one[1] + bonus * one[2])[3]
                                for texts in ranked]  # fmt: skip
    return found


def _gain(search: str, trials: dict[tuple[float, float], list[int]], truths: Sequence[str]) -> LanguageGain:
    """The pair of weights with the fewest errors, if those chosen on half of the lines lower them on the other."""
    plain = trials[0.0, 0.0]
    size = max(1, sum(map(len, truths)))
    best = min(trials, key=lambda pair: (sum(trials[pair]), pair))
    crossed = 0
    for own, other in ((0, 1), (1, 0)):
        picked = min(trials, key=lambda pair: (sum(trials[pair][own::2]), pair))
        crossed += sum(trials[picked][other::2])
    if crossed >= sum(plain):
        best = (0.0, 0.0)
    return LanguageGain(search, *best, sum(plain) / size, sum(trials[best]) / size, len(truths))


def keep_language(
    folder: Path,
    learned: LineSet,
    held: LineSet,
    *,
    texts: Sequence[Path] = (),
    normal_form: Literal["NFC", "NFD", "none"] = "NFC",
    **reading: Any,
) -> tuple[LanguageGain, ...]:
    """Learn a language model from the texts that a reader learned, and put it into the reader's folder if it helps.

    Args:
        folder: of the reader. learned, held: as for the fine-tuning. texts: files with more text.
        normal_form: Unicode form of the texts. reading: settings of the Reader.

    Returns:
        The gains; none where nothing could be measured, for the lines held out were learned from.
    """
    known = {line.text for line in learned.lines}
    unknown = LineSet([line for line in held.lines if line.text not in known], source=held.source)
    if len(unknown.lines) < 2:
        return ()
    own = [line.text for line in learned.lines]
    language = learn_characters([*own, *texts_of(texts)] if texts else own, normal_form=normal_form)
    language, gains = choose_weights(folder, language, unknown, **reading)
    if any(gain.weight for gain in gains):
        language.save(folder / LANGUAGE)
    return gains
