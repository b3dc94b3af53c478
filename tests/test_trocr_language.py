"""The language model of characters: its numbers against the formula written out, its file, and reading with it."""

import math
import random
from collections import Counter, defaultdict

import pytest

from fastsd_helpers.trocr.language.ngram import folded, learn_characters

np = pytest.importorskip("numpy")

PROSE = "The quick brown fox jumps over the lazy dog; the dog, who was not lazy, jumped after the brown fox."
TEXTS = [PROSE, "aaaa aaaa", "a", "ἀρχή ἦν ὁ λόγος\nκαὶ ὁ λόγος", "12.3.1818  12.4.1819", "🦊 fox 🦊"]


class WrittenOut:
    """Interpolated Witten-Bell by its definition, over dictionaries of strings."""

    def __init__(self, text, order):
        text = folded(" ".join(text.split())) + " "
        self.letters = set(text)
        self.order = min(order, len(text))
        circle = text * 2 if len(text) >= order else text * (order + 1)
        first = len(text) * (len(circle) // len(text) - 1)
        self.after = defaultdict(Counter)
        for length in range(self.order):
            for place in range(first, first + len(text)):
                self.after[circle[place - length : place]][circle[place]] += 1

    def probability(self, letter, context):
        if context is None:
            return 1 / (len(self.letters) + 1)
        shorter = self.probability(letter, context[1:] if context else None)
        seen = self.after.get(context)
        if not seen:
            return shorter
        return (seen[letter] + len(seen) * shorter) / (sum(seen.values()) + len(seen))

    def score(self, before, text):
        total = 0.0
        before = folded(before)
        for letter in folded(text):
            total += math.log(self.probability(letter, before[1 - self.order :] if self.order > 1 else ""))
            before += letter
        return total


@pytest.mark.parametrize("order", [1, 2, 4, 6])
@pytest.mark.parametrize("text", TEXTS)
def test_its_log_probabilities_are_those_of_the_formula(text, order):
    model, expected = learn_characters([text], order=order), WrittenOut(text, order)
    chance = random.Random(order)
    letters = [*expected.letters, "☃", "z"]
    drawn = ["".join(chance.choices(letters, k=chance.randrange(9))) for _ in range(160)]
    pairs = [*zip(drawn[:80], drawn[80:], strict=True), (" ", text.split()[0]), ("", ""), (text, "fox")]
    assert model.order == expected.order
    for found, (before, after) in zip(model.score(pairs), pairs, strict=True):
        assert found == pytest.approx(expected.score(before, after), abs=1e-9), (before, after)


@pytest.mark.parametrize("text", TEXTS)
def test_after_any_context_the_probabilities_add_up_to_one(text):
    model = learn_characters([text], order=5)
    for before in ("", " ", "a", "the q", "☃", "a☃", text[:7], text[-3:]):
        found = np.exp(model.score([(before, letter) for letter in [*model.alphabet, "☃"]]))
        assert found.sum() == pytest.approx(1, abs=1e-9), before
