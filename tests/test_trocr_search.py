"""What is written of a line, and what is not: no loop in a second reading, and no legal line taken for one."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from fastsd_helpers.trocr.model.search import Limits, find_loop, greedy_search, unlooped  # noqa: E402

END, START, VOCABULARY = 1, 0, 9


class TableEngine:
    """An engine whose scores depend on the last tokens alone, by a table: it runs into loops all the time."""

    most_steps = 200

    def __init__(self, seed: int, *, memory: int = 2, end: float = -1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.memory = memory
        self.table = torch.randn((VOCABULARY,) * (memory + 1), generator=generator) * 2
        self.table[..., START] = -50.0
        self.table[..., END] += end

    def scores(self, ids: "list[int]") -> "torch.Tensor":
        """After the last tokens; START fills up."""
        place = ([START] * self.memory + ids)[-self.memory :]
        return self.table[tuple(place)].clone()

    def begin(self, hidden, beams, steps):
        self.written = [[] for _ in range(len(hidden))]
        self.first = True
        return self.written

    def step(self, state, tokens):
        if not self.first:
            for ids, token in zip(self.written, tokens[:, 0].tolist(), strict=True):
                ids.append(token)
        self.first = False
        return torch.stack([self.scores(ids) for ids in self.written])[:, None]

    def keep(self, state, lines):
        self.written = [self.written[line] for line in lines.tolist()]

    def reorder(self, state, beams):
        raise AssertionError("one beam only")


def read(engine, *, lines=1, most=60, **options):
    return greedy_search(engine, torch.zeros(lines, 1, 1), Limits(START, (END,), 0, most), **options)


def written_thrice(ids: "list[int]") -> "tuple[int, ...] | None":
    """A piece of 2 to 12 tokens that comes three times in a row, or one token that comes five times; else None."""
    for unit in range(1, 13):
        times = 3 if unit > 1 else 5
        for start in range(len(ids) - times * unit + 1):
            piece = ids[start : start + unit]
            if ids[start : start + times * unit] == piece * times:
                return tuple(piece)
    return None


def expected(engine, most):
    """The likeliest allowed token at each step, found by trying every one of them."""
    ids = []
    while len(ids) < most:
        for token in engine.scores(ids).argsort(descending=True).tolist():
            if written_thrice([*ids, token]) is None:
                break
        ids.append(token)
        if token == END:
            break
    return ids


# ------------------------------------------------------------------------------------------------ the second reading


def test_such_engines_loop_unless_they_are_kept_from_it():
    looped = [read(TableEngine(seed))[0].ids for seed in range(20)]
    assert sum(written_thrice(ids) is not None for ids in looped) > 10


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_a_reading_that_bans_loops_writes_no_piece_a_third_time_and_else_the_likeliest_token(memory):
    for seed in range(20):
        engine = TableEngine(seed, memory=memory)
        (found,) = read(engine, ban_loops=True)
        assert written_thrice(found.ids) is None, (seed, found.ids)
        assert found.ids == expected(engine, 60), seed


def test_a_ban_is_for_its_own_line_and_changes_no_line_that_has_no_loop():
    """Several lines per batch, of which some end early: a row of the scores must stay with its line."""

    class PerLine(TableEngine):
        """Each line has a first token of its own, from which it goes its own way."""

        def step(self, state, tokens):
            begins = self.first
            scores = super().step(state, tokens)
            if begins:
                for line in range(len(scores)):
                    scores[line] = -20.0
                    scores[line, 0, 2 + line] = 20.0
            return scores

    for seed in range(10):
        engine = PerLine(seed)
        together = read(engine, lines=7, ban_loops=True)
        plain = read(engine, lines=7)
        for line, (banned, free) in enumerate(zip(together, plain, strict=True)):
            assert banned.ids[0] == 2 + line
            assert written_thrice(banned.ids) is None
            if written_thrice(free.ids) is None:
                assert banned.ids == free.ids
                assert banned.log_probs == pytest.approx(free.log_probs, rel=1e-5)


def test_a_looped_line_that_ends_in_its_second_reading_is_kept_whole():
    """By cutting alone nothing of what comes after the loop would be left."""
    table = {
        (): [5],
        (5,): [6],
        (5, 6): [7, 8],  # round again; and behind it the way out
        (6, 7): [5],
        (7, 5): [6],
        (6, 8): [3],
        (8, 3): [4],
        (3, 4): [END],
    }

    class Looping(TableEngine):
        def scores(self, ids):
            found = torch.full((VOCABULARY,), -30.0)
            for rank, token in enumerate(table.get(tuple(ids[-2:]), [2])):
                found[token] = 10.0 - rank
            return found

    engine = Looping(0)
    (first,) = read(engine, stop_loops=True)
    assert first.looped
    assert not first.ended
    (second,) = read(engine, ban_loops=True)
    assert second.ids == [5, 6, 7, 5, 6, 7, 5, 6, 8, 3, 4, END]
    kept = unlooped(first, second)
    assert (kept.ids, kept.ended, kept.looped) == (second.ids, True, True)
    assert kept.log_probs == second.log_probs


# ----------------------------------------------------------------------------------------------------- what a loop is


@pytest.mark.parametrize("before", [[], [8, 9, 8, 9, 4], list(range(50, 90))], ids=["nothing", "a few", "a text"])
@pytest.mark.parametrize(
    ("piece", "least"),
    [
        # From how many tokens on a tail of this piece, over and over, is a loop.
        ([7], 32),  # a dotted line
        ([7, 8], 32),  # "- - - -", "11 11 11"
        ([7, 7, 8], 32),  # also of two kinds, in a longer piece
        ([7, 8, 8, 7, 8], 32),
        ([5, 6, 7], 16),
        ([5, 6, 7, 7], 16),
        ([1, 2, 3, 4, 5], 20),  # four times
        ([1, 2, 3, 4, 5, 6, 7], 28),
        (list(range(10, 22)), 48),
    ],
    ids=str,
)
def test_a_tail_is_a_loop_from_its_length_on_and_not_one_token_before(before, piece, least):
    endless = (token for _ in itertools.repeat(0) for token in piece)
    tail = list(itertools.islice(endless, 2 * least))
    for length in range(1, 2 * least):
        found = find_loop([*before, *tail[:length]])
        assert found == (None if length < least else (len(before), len(piece))), length


def test_pieces_that_are_longer_than_twelve_tokens_are_no_loop():
    assert find_loop(list(range(12)) * 4) == (0, 12)
    assert find_loop(list(range(13)) * 9) is None


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_a_line_is_stopped_once_its_tail_is_a_loop_and_never_for_another_reason(memory):
    stopped = 0
    for seed in range(30):
        engine = TableEngine(seed, memory=memory)
        (whole,), (found,) = read(engine, most=90), read(engine, most=90, stop_loops=True)
        assert found.ids == whole.ids[: len(found.ids)]
        assert found.looped == (not found.ended and find_loop(found.ids) is not None)
        if len(found.ids) < len(whole.ids):
            assert found.looped
            stopped += 1
        elif not whole.ended:
            assert found.looped == (find_loop(whole.ids) is not None)
    assert stopped, "none of these lines looped: nothing was tested"
