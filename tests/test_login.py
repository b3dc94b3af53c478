"""Who may pass: logins at the bounds of what is taken, and how wrong tries are counted and forgotten."""

import re

import pytest

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.tunnels.login import Login, LoginLimiter, make_login


@pytest.mark.parametrize(
    ("user", "password", "same"),
    [("me", "right-one", True), ("you", "right-one", False), ("me", "wrong-one", False), ("you", "wrong-one", False)],
)
def test_user_and_password_must_both_be_right(user: str, password: str, same: bool) -> None:
    assert Login("me", "right-one").matches(user, password) is same


@pytest.mark.parametrize(
    ("user", "password"), [("u" * 64, "p" * 8), ("u", "p" * 128), ("  u\n", "pass-wörd"), ("ü", "12345678")]
)
def test_logins_at_the_bounds_are_taken(user: str, password: str) -> None:
    login = make_login(user, password)
    assert (login.user, login.password) == (user.strip(), password)


@pytest.mark.parametrize(
    ("user", "password", "said"),
    [
        ("u" * 65, "p" * 8, "it needs 1 to 64 characters"),
        ("   ", "p" * 8, "user is ''"),
        ("u", "p" * 7, "The password has 7 characters"),
        ("u", "p" * 129, "The password has 129 characters"),
        ("u", "pass word", "holds a blank"),
        ("u", "pass:words", "colon"),
        ("u", 'pass"words', "quote"),
        ("u'", "p" * 8, "user is"),
    ],
)
def test_what_is_over_a_bound_is_refused_with_the_bound_and_never_with_the_password(
    user: str, password: str, said: str
) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        make_login(user, password)
    assert password not in str(caught.value)
    if not user.startswith("u" * 65) and "'" not in user and user.strip():
        assert "8 to 128" in caught.value.hint


def test_a_made_up_password_is_four_groups_of_letters_that_nobody_mistakes() -> None:
    made = [make_login().password for _ in range(40)]
    assert all(re.fullmatch(r"[a-hjkmnp-z2-9]{4}(-[a-hjkmnp-z2-9]{4}){3}", password) for password in made)
    assert len(set(made)) == 40
    assert len(set("".join(made))) == 32, "every letter is used, and the hyphen"


def test_the_longer_of_the_two_waits_counts() -> None:
    clock = [100.0]
    limiter = LoginLimiter(2, 3, 10, now=lambda: clock[0])
    limiter.failed("a")
    clock[0] = 104
    assert limiter.wait_s("a") == 0
    limiter.failed("a")
    assert (limiter.wait_s("a"), limiter.wait_s("b")) == (6, 0), "the first of the two is ten seconds old at 110"
    clock[0] = 105
    limiter.failed("b")
    assert (limiter.wait_s("a"), limiter.wait_s("b"), limiter.wait_s("c")) == (5, 5, 5), "three from all together"
    limiter.passed("a")
    assert limiter.wait_s("a") == 5, "who is in again does not lift the bound for all"
    clock[0] = 110
    assert limiter.wait_s("a") == limiter.wait_s("c") == 0
    clock[0] = 112
    limiter.failed("b")
    limiter.failed("b")
    # The window slides: the tries at 105, 112 and 112 count for all, the last two for b.
    assert (limiter.wait_s("a"), limiter.wait_s("b")) == (3, 10)


def test_a_visitor_is_refused_after_five_tries_and_all_together_after_thirty() -> None:
    limiter = LoginLimiter(now=lambda: 50.0)
    for number in range(5):
        assert limiter.wait_s("a") == 0, number
        limiter.failed("a")
    assert limiter.wait_s("a") == 60
    for number in range(25):
        assert limiter.wait_s("z") == 0, number
        limiter.failed(f"b{number}")
    assert limiter.wait_s("z") == 60


def test_of_a_thousand_addresses_the_one_not_seen_for_longest_is_forgotten() -> None:
    limiter = LoginLimiter(2, 10**6, 60, now=lambda: 0.0)
    for address in ("first", "second", *(f"a{number}" for number in range(997))):
        limiter.failed(address)
    limiter.failed("first")  # seen again: the second is now the oldest
    limiter.failed("last")
    assert limiter.wait_s("first") == 60
    limiter.failed("one too many")
    limiter.failed("second")
    assert limiter.wait_s("second") == 0, "its first try was forgotten with it"
    limiter.failed("a0")
    assert limiter.wait_s("a0") == 0, "and now a0's"
    limiter.failed("a5")
    assert limiter.wait_s("a5") == 60, "no more than one is forgotten for one that comes"
