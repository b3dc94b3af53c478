"""Both searches over a table of scores, line by line against the plain rule written out here."""

import math
import random

import pytest

from fastsd_helpers.trocr.model.search import Found, Limits, beam_search, greedy_search, unlooped

torch = pytest.importorskip("torch")

END = 0
START = 1


class Table:
    """An engine whose scores follow from the line, the step and the last token; it notes what it is asked."""

    def __init__(self, vocabulary=7, *, seed=0, most_steps=100, end=0.0, ends=(END,), wanted=None):
        self.vocabulary, self.seed, self.most_steps, self.wanted = vocabulary, seed, most_steps, wanted
        self.end, self.ends = end, ends  # how much likelier the tokens that end a line are
        self.rows, self.steps, self.kept = [], 0, []

    def scores(self, line, step, last):
        chance = random.Random(f"{self.seed}/{line}/{step}/{last}")
        found = [chance.gauss(0, 2) for _ in range(self.vocabulary)]
        for token in self.ends:
            found[token] += self.end
        if self.wanted is not None and step < len(self.wanted[line]):
            found[self.wanted[line][step]] += 100
        return found

    def begin(self, hidden, beams, steps):
        self.rows, self.steps, self.beams, self.asked = list(hidden), 0, beams, steps
        return self

    def step(self, state, tokens):
        assert tokens.shape == (len(self.rows), self.beams)
        found = [[self.scores(line, self.steps, last) for last in row] for line, row in zip(self.rows, tokens.tolist())]  # noqa: B905
        self.steps += 1
        return torch.tensor(found)

    def keep(self, state, lines):
        self.rows = [self.rows[place] for place in lines.tolist()]
        self.kept.append(len(self.rows))

    def reorder(self, state, beams):
        assert beams.shape == (len(self.rows), self.beams)


def log_softmax(scores):
    largest = max(scores)
    total = largest + math.log(sum(math.exp(score - largest) for score in scores))
    return [score - total for score in scores]


# ------------------------------------------------------------------------------------------------------- greedy


def plain_greedy(table, line, limits):
    ids, logs, last = [], [], limits.start
    for step in range(min(limits.max_new_tokens, table.most_steps)):
        scores = table.scores(line, step, last)
        if step < limits.min_new_tokens:
            for token in limits.eos:
                scores[token] = float("-inf")
        last = max(range(len(scores)), key=scores.__getitem__)
        ids.append(last)
        logs.append(log_softmax(scores)[last])
        if last in limits.eos:
            return ids, logs, True
    return ids, logs, False


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "limits",
    [Limits(START, (END,), 0, 12), Limits(START, (END, 5), 3, 12), Limits(START, (END,), 12, 12), Limits(1, (0,))],
)
def test_greedy_search_takes_the_likeliest_token_of_every_line_until_it_ends(seed, limits):
    table, lines = Table(seed=seed, most_steps=40), list(range(9))
    found = greedy_search(table, lines, limits)
    for line in lines:
        ids, logs, ended = plain_greedy(table, line, limits)
        assert (found[line].ids, found[line].ended, found[line].looped) == (ids, ended, False)
        assert found[line].log_probs == pytest.approx(logs, abs=1e-5)
        assert found[line].mean_log_prob == pytest.approx(sum(logs) / len(logs), abs=1e-5)


def test_an_empty_result_has_no_log_probability():
    assert Found([], [], False).mean_log_prob == 0


@pytest.mark.parametrize(("limit", "most", "steps"), [(5, 9, 5), (9, 5, 5), (1, 9, 1), (5, 5, 5)])
def test_no_line_is_longer_than_both_limits_allow(limit, most, steps):
    for search in (greedy_search, lambda *all_of_it: beam_search(*all_of_it, 2)):
        table = Table(most_steps=most, end=-100)
        found = search(table, [0, 1], Limits(START, (END,), 0, limit))
        assert [len(line.ids) for line in found] == [steps, steps]
        assert [line.ended for line in found] == [False, False]
        assert (table.steps, table.asked) == (steps, steps)


def test_lines_that_have_ended_leave_once_a_quarter_of_them_has():
    # Eight lines end one after another, at steps 1 to 8.
    wanted = [[2, 3] * 4 for _ in range(8)]
    for line, tokens in enumerate(wanted):
        tokens[line] = END
    table = Table(wanted=wanted)
    found = greedy_search(table, list(range(8)), Limits(START, (END,), 0, 20))
    assert [len(line.ids) for line in found] == list(range(1, 9))
    assert table.steps == 8, "nothing is computed after the last line has ended"
    assert table.kept == [6, 4, 3, 2, 1], "two of eight, two of six, then one of four, of three, of two"


def repeated(pieces, count):
    return (pieces * count)[:count]


def test_a_loop_ends_its_line_at_the_next_look_and_no_other():
    wanted = [repeated([2, 3, 4, 5], 60), [2, 3, 4, 5, 6, *repeated([2, 3, 4], 14), END], list(range(2, 7)) * 2 + [END]]
    table = Table(wanted=wanted)
    limits = Limits(START, (END,), 0, 60)
    found = greedy_search(table, [0, 1, 2], limits, stop_loops=True)
    assert [(len(line.ids), line.ended, line.looped) for line in found] == [
        (16, False, True),
        (20, True, False),
        (11, True, False),
    ]
    without = greedy_search(Table(wanted=wanted), [0, 1, 2], limits)
    assert [(len(line.ids), line.looped) for line in without] == [(60, False), (20, False), (11, False)]


def test_a_loop_at_the_limit_is_found_between_two_looks():
    wanted = [repeated([2, 3, 4, 5], 60), [END]]
    for limit, looped in [(15, False), (16, True), (17, True), (23, True)]:
        longest = Table(wanted=[[6, *wanted[0]], [END]])
        found = greedy_search(longest, [0, 1], Limits(START, (END,), 0, limit + 1), stop_loops=True)
        assert (found[0].looped, found[1].looped) == (looped, False), limit
        assert not found[0].ended


# --------------------------------------------------------------------------------------------------------- beams


def plain_beams(table, line, limits, beams):
    """transformers' beam search for one line with length_penalty 1 and early_stopping False, written out."""
    running, finished = [([], [], 0.0)], []
    steps = min(limits.max_new_tokens, table.most_steps)
    for step in range(steps):
        candidates = []
        for place, (ids, logs, total) in enumerate(running):
            found = log_softmax(table.scores(line, step, ids[-1] if ids else limits.start))
            for token, log in enumerate(found):
                if not (token in limits.eos and step < limits.min_new_tokens):
                    candidates.append((total + log, place, token, [*ids, token], [*logs, log]))
        candidates.sort(key=lambda item: -item[0])
        candidates = candidates[: max(2, 1 + len(limits.eos)) * beams]
        for total, _place, token, ids, logs in candidates[:beams]:
            if token in limits.eos or step + 1 == steps:
                finished.append((total / (step + 1), ids, logs, token in limits.eos))
        finished = sorted(finished, key=lambda item: -item[0])[:beams]
        running = [(ids, logs, total) for total, _place, token, ids, logs in candidates if token not in limits.eos][
            :beams
        ]
        if len(finished) == beams and running[0][2] / (step + 1) <= finished[-1][0]:
            break
    return finished[0]


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("end", [-2.0, 0.0, 4.0])
@pytest.mark.parametrize(("eos", "least"), [((END,), 0), ((END, 5), 0), ((END,), 4), ((END, 5, 6), 2)])
def test_beam_search_finds_the_line_of_the_rule(beams, end, eos, least):
    limits = Limits(START, eos, least, 9)
    for seed in range(3):
        table = Table(vocabulary=9, seed=seed, end=end, ends=eos)
        found = beam_search(table, list(range(6)), limits, beams)
        for line in range(6):
            _mean, ids, logs, ended = plain_beams(table, line, limits, beams)
            assert (found[line].ids, found[line].ended) == (ids, ended), (seed, line)
            assert found[line].log_probs == pytest.approx(logs, abs=1e-4)
            assert not found[line].looped


def test_a_line_that_nothing_can_beat_any_more_leaves_at_once():
    table = Table(vocabulary=9, wanted=[[END], [2] * 8], seed=3)
    found = beam_search(table, [0, 1], Limits(START, (END,), 0, 8), 1)
    assert found[0].ids == [END]
    assert found[1].ids == [2] * 8
    assert table.kept == [1]
    table = Table(vocabulary=9, wanted=[[END], [END]], seed=3)
    beam_search(table, [0, 1], Limits(START, (END,), 0, 8), 1)
    assert table.steps == 1


# --------------------------------------------------------------------------------------------------------- loops


def test_the_second_reading_is_kept_when_it_came_to_an_end_else_the_first_up_to_its_loop():
    first = Found([1, 2, *[3, 4, 5] * 6], [-0.25 - place for place in range(20)], False, looped=True)
    second = Found([1, 2, 3, 0], [-1.0, -2.0, -3.0, -4.0], True)
    kept = unlooped(first, second)
    assert (kept.ids, kept.log_probs, kept.ended, kept.looped) == (second.ids, second.log_probs, True, True)
    kept = unlooped(first, Found([9] * 40, [-1.0] * 40, False))
    assert (kept.ids, kept.ended, kept.looped) == ([1, 2, 3, 4, 5], False, True)
    assert kept.log_probs == first.log_probs[:5]
    plain = Found(list(range(9)), [-1.0] * 9, False, looped=True)
    assert unlooped(plain, Found([], [], False)).ids == list(range(9)), "without a loop nothing is cut"
