"""Which images are held out: one of ten, and never a subject's last."""

from collections import Counter

import pytest

from fastsd_helpers.dreambooth.dataset.hold_out import choose_held_out, subject_of


def test_every_tenth_is_held_out_as_long_as_its_subject_has_others() -> None:
    assert choose_held_out(["a"] * 9) == []
    assert choose_held_out(["a"] * 21) == [9, 19]
    assert choose_held_out([*["a"] * 9, "b"]) == [8]
    assert choose_held_out(list("abcdefghij")) == []
    assert choose_held_out([*"aaaaaaaabc"]) == [7]


@pytest.mark.parametrize("seed", range(20))
def test_no_subject_loses_its_last_photo(seed: int) -> None:
    import random

    numbers = random.Random(seed)
    subjects = [numbers.choice("aaabbcdefgh") for _ in range(numbers.randrange(1, 80))]
    chosen = choose_held_out(subjects)
    assert len(set(chosen)) == len(chosen) <= len(subjects) // 10
    left = Counter(subjects)
    left.subtract(subjects[place] for place in chosen)
    assert min(left[subject] for subject in set(subjects)) >= 1


def test_a_subject_is_a_repeated_caption_else_the_words_of_the_name() -> None:
    images = [
        {"caption": "zib dog", "stem_words": ""},
        {"caption": "zib dog", "stem_words": ""},
        {"caption": "zob fish in a bowl", "stem_words": "Fish"},
        {"caption": None, "stem_words": "fish"},
    ]
    one, two, three, four = subject_of(images)
    assert one == two != three == four
