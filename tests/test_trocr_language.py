"""The language model of characters: its numbers against the formula written out, its file, and reading with it."""

import json
import math
import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from test_trocr_beams import END, START, Table, log_softmax
from tiny_readers import write_tokenizer

from fastsd_helpers.errors import DatasetError, ModelError
from fastsd_helpers.trocr.language.fusion import Fusion, pieces_of
from fastsd_helpers.trocr.language.ngram import folded, learn_characters, open_characters
from fastsd_helpers.trocr.model.alternatives import alternatives_search
from fastsd_helpers.trocr.model.checkpoint import load_tokenizer
from fastsd_helpers.trocr.model.search import Limits, beam_search, greedy_search

np = pytest.importorskip("numpy")
pytest.importorskip("torch")

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


def test_case_and_digits_count_as_one_and_line_breaks_as_blanks():
    model = learn_characters(["Anno 1818\nwas  GOOD\n\n"])
    assert model.alphabet == "".join(sorted(set("anno 0000 was good")))
    assert model.log_prob("ANNO 2025") == model.log_prob("anno  1818 ")
    assert folded("ΆΣ İ9٣") == "άσ İ00", "as many characters as before"


def test_of_a_script_with_many_characters_the_n_grams_are_shorter():
    many = "".join(chr(0x4E00 + place) for place in range(9000))
    model = learn_characters([many], order=6)
    assert model.order == 63 // 14
    assert len(model.alphabet) == 9001
    assert np.isfinite(model.log_prob(many[5:9] + "☃"))


@pytest.mark.parametrize("texts", [[], [""], [" \n\t"]])
def test_without_any_text_nothing_is_learned(texts):
    with pytest.raises(DatasetError, match="no text to learn the language from"):
        learn_characters(texts)


# ------------------------------------------------------------------------------------------------------------ file


def test_a_file_gives_back_the_same_model(tmp_path):
    model = replace(learn_characters(TEXTS), greedy=(0.2, 0.1), alternatives=(0.4, -0.5), normal_form="NFD")
    found = open_characters(model.save(tmp_path / "deep" / "m.safetensors"))
    assert found.log_prob(PROSE) == model.log_prob(PROSE)
    assert (found.digest, found.weights, found.normal_form) == (model.digest, model.weights, "NFD")
    assert found.digest != replace(model, greedy=(0.1, 0.1)).digest


def test_an_older_file_ranks_no_alternatives(tmp_path):
    path = replace(learn_characters(TEXTS), greedy=(0.2, 0.1)).save(tmp_path / "m.safetensors")
    spoilt(path, weights={"greedy": [0.2, 0.1], "beams": [0, 0], "rescoring": [0, 0]})
    found = open_characters(path)
    assert (found.greedy, found.alternatives) == ((0.2, 0.1), (0.0, 0.0))


def spoilt(path, **changes):
    """The same file with other values in its description, or other tensors."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(str(path), "numpy") as opened:
        told = json.loads(opened.metadata()["language"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    tensors |= {name: value for name, value in changes.items() if name in tensors}
    told |= {name: value for name, value in changes.items() if name not in tensors}
    save_file(tensors, str(path), {"language": json.dumps(told)})


@pytest.mark.parametrize(
    "changes",
    [
        {"alphabet": "abc"},
        {"alphabet": ""},
        {"order": 60},
        {"order": 0},
        {"keys": np.array([3, 2, 1])},
        {"keys": np.array([1.0, 2.0, 3.0])},
        {"keys": np.zeros((0,), np.int64), "counts": np.zeros((0,), np.uint32)},
        {"counts": np.zeros((3, 3), np.uint32)},
        {"weights": {}},
        {"weights": {"greedy": [1], "beams": [0, 0], "rescoring": [0, 0]}},
        {"weights": {"greedy": [float("nan"), 0], "beams": [0, 0], "rescoring": [0, 0]}},
        {"about": 7},
        {"format": "another"},
        {"version": 2},
    ],
)
def test_a_damaged_file_is_told_by_name(tmp_path, changes):
    path = learn_characters([PROSE]).save(tmp_path / "m.safetensors")
    spoilt(path, **changes)
    with pytest.raises(ModelError, match=r"m\.safetensors"):
        open_characters(path)


@pytest.mark.parametrize("data", [b"", b"PROSE", b'\x08\0\0\0\0\0\0\0{"a":1} '])
def test_what_is_no_such_file_is_told_by_name(tmp_path, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"m\.safetensors .*(no language model|not a language model)"):
        open_characters(path)


# ---------------------------------------------------------------------------------------------------------- tokens


def told(kind, tmp_path):
    write_tokenizer(tmp_path, kind)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokens_count_by_the_characters_they_write(tmp_path, kind):
    tokenizer = told(kind, tmp_path)
    model = learn_characters([PROSE])
    fusion = Fusion(model, pieces_of(tokenizer, 1000), (2,), (0.5, 0.25))
    for text in ("the quick brown fox", "fox", "0123. the dog", *(["über ſ 🦊 λ"] if kind == "bpe" else [])):
        ids = [*tokenizer.encode(text, add_special_tokens=False), 2]
        written, total = fusion.begin(), 0.0
        for token in ids:
            total += fusion.added([written], [[token]])[0][0]
            written = fusion.after(written, token)
        assert total == pytest.approx(0.5 * model.log_prob(text) + 0.25 * (len(text) + 1), abs=1e-9), text
        assert written.pending == b""


def test_added_characters_and_those_of_an_own_vocabulary_count_too(tmp_path):
    from fastsd_helpers.trocr.model.vocabulary import _letters_tokenizer

    tokenizer = told("bpe", tmp_path)
    tokenizer.add_tokens(["ꝑ"])
    own = _letters_tokenizer(list("abxꝑ"))
    for each in (tokenizer, own):
        pieces = pieces_of(each, 10_000)
        written = b"".join(pieces[token] for token in each.encode("ab ꝑ x", add_special_tokens=False))
        assert written.decode() == "ab ꝑ x"
        assert all(pieces[token] == b"" for token in each.all_special_ids)


PIECES = [b"", b"", b" the", b" quick", b"brown", b"x", b"\xce", b"\xbb", b" "]


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("weights", [(0.3, 0.0), (1.0, 0.5)])
def test_a_beam_search_with_a_language_takes_the_best_sum_of_both(beams, weights):
    fusion = Fusion(learn_characters([PROSE + " λόγος"]), PIECES, (END,), weights)
    limits = Limits(START, (END,), 0, 4)
    for seed in range(6):
        table = Table(vocabulary=len(PIECES), seed=seed, end=1.0)
        found = beam_search(table, [0, 1, 2], limits, beams, language=fusion)
        for line in range(3):
            expected = plain_beams(table, line, limits, beams, fusion)
            assert [one.ids for one in (found[line], *found[line].others)] == expected, (seed, line)


def plain_beams(table, line, limits, beams, fusion):
    """The rule written out: sums of both, no mean."""
    running, finished = [([], 0.0, fusion.begin())], []
    for step in range(limits.max_new_tokens):
        candidates = []
        for ids, total, written in running:
            logs = log_softmax(table.scores(line, step, ids[-1] if ids else limits.start))
            for token, log in enumerate(logs):
                sums = total + log + fusion.added([written], [[token]])[0][0]
                candidates.append((sums, [*ids, token], fusion.after(written, token)))
        candidates.sort(key=lambda item: -item[0])
        candidates = candidates[: 2 * beams]
        last = step + 1 == limits.max_new_tokens
        finished += [(total, ids) for total, ids, _next in candidates[:beams] if ids[-1] == END or last]
        finished = sorted(finished, key=lambda item: -item[0])[:beams]
        running = [(ids, total, after) for total, ids, after in candidates if ids[-1] != END][:beams]
        if len(finished) == beams and running[0][1] <= finished[-1][0]:
            break
    return [ids for _total, ids in finished]


def test_greedy_decoding_with_a_language_takes_the_best_sum_at_every_step():
    fusion = Fusion(learn_characters([PROSE]), PIECES, (END,), (0.7, 0.1))
    limits = Limits(START, (END,), 0, 6)
    table = Table(vocabulary=len(PIECES), seed=4)
    found = greedy_search(table, list(range(6)), limits, language=fusion)
    plain = greedy_search(Table(vocabulary=len(PIECES), seed=4), list(range(6)), limits)
    assert [line.ids for line in found] != [line.ids for line in plain]
    for line in range(6):
        ids, logs, written, last = [], [], fusion.begin(), START
        while len(ids) < 6 and END not in ids:
            scores = log_softmax(table.scores(line, len(ids), last))
            added = fusion.added([written], [list(range(len(PIECES)))])[0]
            last = max(range(len(PIECES)), key=lambda token: scores[token] + added[token])
            ids.append(last)
            logs.append(scores[last])
            written = fusion.after(written, last)
        assert found[line].ids == ids
        assert found[line].log_probs == pytest.approx(logs, abs=1e-5), "how sure the reader is, not the language"


def decoded(table, line, limits, begun):
    """The rule written out: the beginning as it is, then the likeliest; each token with its score and those of all."""
    ids, logs, margins = [], [], []
    while len(ids) < limits.max_new_tokens and END not in ids:
        scores = log_softmax(table.scores(line, len(ids), ids[-1] if ids else limits.start))
        best = max(range(len(scores)), key=scores.__getitem__)
        token = begun[len(ids)] if len(ids) < len(begun) else best
        rival = max((other for other in range(len(scores)) if other != token), key=scores.__getitem__)
        margins.append((scores[token] - scores[rival], len(ids), rival))
        ids.append(token)
        logs.append(scores[token])
    return ids, sum(logs), margins


def test_the_alternatives_of_a_line_follow_from_the_rivals_of_its_two_least_sure_tokens():
    torch = pytest.importorskip("torch")
    limits = Limits(START, (END,), 0, 8)
    counted = []
    for seed in range(8):
        table = Table(seed=seed, end=1.0)
        found = alternatives_search(table, torch.arange(4), limits)
        assert [line.ids for line in found] == [line.ids for line in greedy_search(table, torch.arange(4), limits)]
        for place, line in enumerate(found):
            ids, _log, margins = decoded(table, place, limits, [])
            close = [(at, rival) for margin, at, rival in sorted(margins)[:2] if margin < 1]
            expected = [decoded(table, place, limits, [*ids[:at], rival]) for at, rival in close]
            assert [other.ids for other in line.others] == [other for other, _log, _margins in expected]
            assert [sum(other.log_probs) for other in line.others] == pytest.approx([log for _ids, log, _m in expected])
            counted.append(len(close))
    assert set(counted) == {0, 1, 2}, "sure lines, and others"
