"""A language model of characters: how likely a character is after those before it, counted in texts (an n-gram model).

Interpolated Witten-Bell: with C(h) times that the context h was seen, T(h) different characters after it, and h' the
context without its first character, P(c|h) = (C(hc) + T(h) P(c|h')) / (C(h) + T(h)); below the shortest context all
characters, and one for those never seen, are equally likely. It has no settings and holds for texts of any length,
where Kneser-Ney's discounts need counts of one and two that few characters have. Letters count without their case and
digits as one digit: which it is, the reader sees, and other texts say little about.
Source: Witten and Bell 1991 (IEEE Transactions on Information Theory 37:4); Chen and Goodman 1998, section 2.5.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsd_helpers.errors import DatasetError, ModelError, SettingsError, needs_package
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.trocr.ground_truth.labels import TEXT_SUFFIXES, texts_of

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ORDER", "CharacterModel", "folded", "learn_characters", "open_characters", "open_language"]

ORDER, _LONGEST = 6, 12
_FORMAT = "fastsd character n-gram"
_VERSION = 1
_MOST_CHARACTERS = 50_000_000
_BITS = 63  # of a number that holds one n-gram


@dataclass(frozen=True)
class _Table:
    """The n-grams of one length: sorted keys, log P of each; contexts, and log of what is left to shorter ones."""

    keys: "np.ndarray"
    log_probs: "np.ndarray"
    contexts: "np.ndarray"
    backoffs: "np.ndarray"


@dataclass(frozen=True)
class CharacterModel:
    """Counts of n-grams, and what follows from them; every text is `folded` first.

    A line break is a blank, for lines of handwriting begin and end at any word; the text is taken for a circle, so that
    every character has one before it. The key of an n-gram has the number of each of its characters (1 to
    len(alphabet), the last in the lowest bits).

    Attributes:
        alphabet: the characters seen. order: length of the n-grams. keys, counts: int64, of the longest ones, sorted.
        greedy, beams: (weight, bonus) while a line is searched for, greedily or with beams: how much its
            log-probabilities, and each character written, count beside the reader's own; (0, 0) where it does not help.
        rescoring: the same for ranking the lines that a beam search ends with; alternatives: for ranking a greedily
            decoded line and what else it may be.
        about: what it was learned from, and what it gains; for people.
    """

    alphabet: str
    order: int
    keys: "np.ndarray"
    counts: "np.ndarray"
    greedy: tuple[float, float] = (0.0, 0.0)
    beams: tuple[float, float] = (0.0, 0.0)
    rescoring: tuple[float, float] = (0.1, 0.05)
    alternatives: tuple[float, float] = (0.0, 0.0)
    normal_form: Literal["NFC", "NFD", "none"] = "NFC"
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Bits of a key that one character takes."""
        return _bits_of(self.alphabet)

    @property
    def weights(self) -> dict[str, tuple[float, float]]:
        """Its (weight, bonus) of every way to use it."""
        return {way: getattr(self, way) for way in ("greedy", "beams", "rescoring", "alternatives")}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate(self.alphabet, 1)}

    @cached_property
    def _tables(self) -> list[_Table]:
        """Tables of all lengths, the shortest first."""
        import numpy as np

        keys, counts, by_length = self.keys, self.counts, []
        for length in range(self.order, 0, -1):
            by_length.append((keys, counts))
            keys, places = np.unique(keys & ((1 << self.bits * (length - 1)) - 1), return_inverse=True)
            counts = np.bincount(places.ravel(), counts, minlength=len(keys)).astype(np.int64)
        tables: list[_Table] = []
        for length, (keys, counts) in enumerate(reversed(by_length), 1):
            contexts, first, kinds = np.unique(keys >> self.bits, return_index=True, return_counts=True)
            times = np.add.reduceat(counts, first)
            shorter = np.full(len(keys), 1 / (len(self.alphabet) + 1))
            if tables:
                below = tables[-1]
                at = np.searchsorted(below.keys, keys & ((1 << self.bits * (length - 1)) - 1))
                shorter = np.exp(below.log_probs[at])
            per_key = np.repeat(kinds, kinds)
            likely = (counts + per_key * shorter) / (np.repeat(times, kinds) + per_key)
            tables.append(_Table(keys, np.log(likely), contexts, np.log(kinds / (times + kinds))))
        return tables

    def score(self, pairs: Sequence[tuple[str, str]]) -> "np.ndarray":
        """Log P of each text after what was before it: float64, one per (before, text); of no text it is 0."""
        import numpy as np

        windows, owners = [], []
        for place, (before, text) in enumerate(pairs):
            context = before[1 - self.order :] if self.order > 1 else ""
            numbers = [0] * (self.order - 1 - len(context))
            numbers += [self._numbers.get(letter, 0) for letter in folded(context + text)]
            for at in range(len(text)):
                windows.append(numbers[at : at + self.order])
                owners.append(place)
        if not windows:
            return np.zeros(len(pairs))
        values = self._log_probs(np.asarray(windows, np.int64))
        return np.bincount(np.asarray(owners), values, minlength=len(pairs))

    def _log_probs(self, windows: "np.ndarray") -> "np.ndarray":
        """Log P of the last character of each window, int64 [n, order]; 0 stands for nothing and for the unknown."""
        import numpy as np

        values = np.full(len(windows), -np.log(len(self.alphabet) + 1))
        keys = np.zeros(len(windows), np.int64)
        for length, table in enumerate(self._tables, 1):
            keys = keys | (windows[:, -length] << (self.bits * (length - 1)))
            at = np.minimum(np.searchsorted(table.keys, keys), len(table.keys) - 1)
            seen = table.keys[at] == keys
            # With a 0 in it, it is the key of no n-gram and no context of this length: what is known stays.
            contexts = keys >> self.bits
            where = np.minimum(np.searchsorted(table.contexts, contexts), len(table.contexts) - 1)
            left = np.where(table.contexts[where] == contexts, table.backoffs[where], 0.0)
            values = np.where(seen, table.log_probs[at], values + left)
        return values

    def log_prob(self, text: str) -> float:
        """Log P of a line, the blank after its last word counted."""
        words = " ".join(text.split())
        return float(self.score([(" ", f"{words} " if words else "")])[0])

    @property
    def digest(self) -> str:
        """What tells it from another one, with other weights too."""
        told = repr((self.alphabet, self.order, self.weights, self.normal_form)).encode()
        return hashlib.sha256(told + self.keys.tobytes() + self.counts.tobytes()).hexdigest()[:16]

    def save(self, path: Path) -> Path:
        """Write it to a file (.safetensors): the counts, from which everything else follows."""
        with needs_package("Keeping a language model", "Run: fastsd install trocr"):
            from safetensors.numpy import save
        import numpy as np

        told = {
            "format": _FORMAT, "version": _VERSION, "alphabet": self.alphabet, "order": self.order,
            "weights": self.weights, "normal_form": self.normal_form, "about": self.about,
        }  # fmt: skip
        kept = {"keys": self.keys, "counts": self.counts.astype(np.uint32)}
        with file_errors(path.parent, "write to"):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(kept, {"language": json.dumps(told)}))
        return path


def folded(text: str) -> str:
    """The text in small letters, with 0 for every digit: as many characters as before."""
    small = ((letter, letter.lower()) for letter in text)
    return "".join("0" if letter.isdecimal() else low if len(low) == 1 else letter for letter, low in small)


def _bits_of(alphabet: str) -> int:
    return len(alphabet).bit_length()


def learn_characters(
    texts: Iterable[str], *, order: int = ORDER, normal_form: Literal["NFC", "NFD", "none"] = "NFC"
) -> CharacterModel:
    """Count the n-grams of texts: lines, pages or books; runs of blanks and line breaks are one blank.

    Args:
        order: length of the n-grams; of scripts with many characters it is less, as a key has 63 bits.
        normal_form: Unicode form that the texts are brought into.

    Raises:
        DatasetError: there is no text.
        SettingsError: the order is not from 1 to 12.
    """
    import numpy as np

    if not 1 <= order <= _LONGEST:
        raise SettingsError(f"The order is {order}.", f"Give an order from 1 to {_LONGEST}; 6 is good for most texts.")
    kept, length, most = [], 0, _MOST_CHARACTERS
    for text in texts:
        words = " ".join(text.split())
        words = folded(words if normal_form == "none" else unicodedata.normalize(normal_form, words))
        if words and length < most:
            kept.append(words)
            length += len(words) + 1
    stream = " ".join([*kept, ""])[:most]
    if not stream.strip():
        raise DatasetError("There is no text to learn the language from.", "Give files with text in UTF-8.")
    points = np.frombuffer(stream.encode("utf-32-le", "surrogatepass"), np.uint32)
    letters, numbers = np.unique(points, return_inverse=True)
    alphabet = "".join(map(chr, letters.tolist()))
    bits = _bits_of(alphabet)
    order = max(1, min(order, _BITS // bits, len(stream)))
    numbers = numbers.ravel().astype(np.int64) + 1
    # A circle: what is before the beginning is the end.
    circle = np.concatenate([numbers[len(numbers) - order + 1 :], numbers])
    keys = np.zeros(len(numbers), np.int64)
    for place in range(order):
        keys = (keys << bits) | circle[place : place + len(numbers)]
    keys, counts = np.unique(keys, return_counts=True)
    about = {"characters": len(stream), "texts": len(kept)}
    return CharacterModel(alphabet, order, keys, counts.astype(np.int64), normal_form=normal_form, about=about)


def open_characters(path: Path) -> CharacterModel:
    """Read a file that `CharacterModel.save` wrote.

    Raises:
        ModelError: it is no language model, or damaged.
    """
    with needs_package("Reading a language model", "Run: fastsd install trocr"):
        import safetensors
    import numpy as np

    hint = "Make it again with: fastsd trocr language, or read with --language none."
    try:
        with file_errors(path, "read"), safetensors.safe_open(str(path), "numpy") as opened:
            told = json.loads((opened.metadata() or {}).get("language", "{}"))
            if told.get("format") != _FORMAT:
                raise ModelError(f"{path} is not a language model of characters.", hint)
            if told.get("version") != _VERSION:
                raise ModelError(
                    f"{path} is a language model of a later version.", "Update fastsd_helpers, or make it again."
                )
            keys, counts = opened.get_tensor("keys"), opened.get_tensor("counts").astype(np.int64)
        model = CharacterModel(
            told["alphabet"],
            int(told["order"]),
            keys,
            counts,
            greedy=_pair(told["weights"]["greedy"]),
            beams=_pair(told["weights"]["beams"]),
            rescoring=_pair(told["weights"]["rescoring"]),
            alternatives=_pair(told["weights"].get("alternatives", (0.0, 0.0))),  # older files have none
            normal_form=told["normal_form"],
            about=dict(told["about"]),
        )
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as err:
        raise ModelError(f"{path} is damaged or no language model: {err}.", hint) from err
    _require_sound(model, path, hint)
    return model


def open_language(wanted: str | Path | CharacterModel, *, own: Path) -> CharacterModel | None:
    """The language model that lines are read with; None for none.

    Args:
        wanted: an opened one, its file, a text file or folder to learn it from, auto or none.
        own: the file of the recognition model's own, which auto takes where it is there.

    Raises:
        SettingsError: there is no such file.
        ModelError: the file is no language model.
    """
    if isinstance(wanted, CharacterModel):
        return wanted
    if wanted == "none" or (wanted == "auto" and not own.is_file()):
        return None
    path = own if wanted == "auto" else Path(wanted).expanduser()
    if str(wanted) and (path.is_dir() or (path.is_file() and path.suffix.lower() in TEXT_SUFFIXES)):
        return learn_characters(texts_of([path]))
    if not path.is_file():
        raise SettingsError(
            f"There is no language model {path}.",
            "Give a text file to learn one from, or auto or none.",
            fields={"language": f"there is no file {path}"},
        )
    return open_characters(path)


def _pair(values: Any) -> tuple[float, float]:
    weight, bonus = values
    return float(weight), float(bonus)


def _require_sound(model: CharacterModel, path: Path, hint: str) -> None:
    """Counts that are none would give probabilities that are none."""
    import numpy as np

    keys, counts, bits = model.keys, model.counts, model.bits
    sound = (
        keys.dtype == np.int64
        and keys.ndim == counts.ndim == 1
        and 0 < len(keys) == len(counts)
        and model.order >= 1
        and bits * model.order <= _BITS
        and len(set(model.alphabet)) == len(model.alphabet)
        and bool((np.diff(keys) > 0).all())
        and bool((counts > 0).all())
        and int(keys[0]) >> bits * (model.order - 1) >= 1
        and int(keys[-1]) >> bits * model.order == 0
        and all(0 <= weight <= 10 and -10 <= bonus <= 10 for weight, bonus in model.weights.values())
    )
    if not sound:
        raise ModelError(f"{path} is damaged: its counts do not fit together.", hint)
    for place in range(model.order):
        numbers = (keys >> bits * place) & ((1 << bits) - 1)
        if int(numbers.min()) < 1 or int(numbers.max()) > len(model.alphabet):
            raise ModelError(f"{path} is damaged: it counts characters that it does not have.", hint)
