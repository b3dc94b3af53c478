"""The tests' own measure: what is close passes, and a wrong scale, place, order or choice does not."""

import math

import pytest
from closeness import Written, assert_close_to, assert_same_lines

torch = pytest.importorskip("torch")


def test_a_bound_is_a_share_of_the_largest_value_whatever_the_size():
    reference = torch.tensor([1.0, -2.0, 0.001])
    for size in (1e-6, 1.0, 1e6):
        assert_close_to(size * (reference + 1.9e-4), size * reference, of_largest=1e-4)
        with pytest.raises(AssertionError, match=r"off by 1\.05e-04 of the largest value"):
            assert_close_to(size * (reference + 2.1e-4), size * reference, of_largest=1e-4)


@pytest.mark.parametrize(
    "found",
    [
        [1.0, math.nan, -math.inf],
        [1.0, 2.0, math.inf],
        [1.0, 2.0, -9.0],
        [1.0, 2.0],
        [2.0, 1.0, -math.inf],
        [1.01, 2.02, -math.inf],
    ],
    ids=["no number", "other infinity", "finite", "shape", "order", "scale"],
)
def test_what_is_no_number_or_in_another_place_is_never_close(found):
    reference = [1.0, 2.0, -math.inf]
    assert_close_to(reference, reference, of_largest=1e-3)
    with pytest.raises(AssertionError):
        assert_close_to(found, reference, of_largest=1e-3)


def test_a_reference_of_nothing_is_refused():
    with pytest.raises(AssertionError, match="the reference is 0 everywhere"):
        assert_close_to([0.0], [0.0], of_largest=1e-3)


def judge(*rows):
    """Log-probabilities of tokens 0 to 4 at every step, the same for every line."""
    return lambda _place, ids: torch.tensor(rows[: len(ids) + 1]).log()


LIKELY_3, TIE, END = [0.05, 0.05, 0.1, 0.7, 0.1], [0.05, 0.05, 0.1, 0.4, 0.4], [0.0, 0.0, 1.0, 0.0, 0.0]
ONE, OTHER = Written([3, 3], [-1.0, -1.0], -0.7), Written([3, 4], [-1.0, -1.0], -0.7)


@pytest.mark.parametrize("beams", [1, 4])
def test_lines_may_part_where_the_judge_sees_a_tie_and_only_there(beams):
    settings = {"of_largest": 1e-4, "beams": beams}
    assert_same_lines([ONE, OTHER], [ONE, ONE], judge=judge(LIKELY_3, TIE, END), **settings)
    with pytest.raises(AssertionError, match=r"line 1 parts .* at token 1 without a tie.*the reference is likelier"):
        assert_same_lines([ONE, OTHER], [ONE, ONE], judge=judge(LIKELY_3, LIKELY_3, END), **settings)
    with pytest.raises(AssertionError, match=r"lines \[0, 1\] part"):
        assert_same_lines([OTHER, OTHER], [ONE, ONE], judge=judge(LIKELY_3, TIE, END), **settings)


def test_a_line_that_ends_too_early_or_with_other_scores_is_found():
    sees = judge(LIKELY_3, LIKELY_3, END)
    with pytest.raises(AssertionError, match="at token 1 without a tie"):
        assert_same_lines([Written([3], [-1.0], -0.7)], [ONE], of_largest=1e-4, judge=sees)
    with pytest.raises(AssertionError, match="log-probabilities off by"):
        assert_same_lines([Written([3, 3], [-1.0, -1.001], -0.7)], [ONE], of_largest=1e-4, judge=sees)
    with pytest.raises(AssertionError, match="log-probabilities off by"):
        assert_same_lines([Written([3, 3], [-1.0, -1.0], -0.701)], [ONE], of_largest=1e-4, judge=sees)
