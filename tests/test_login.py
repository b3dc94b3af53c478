"""Who may pass: logins at the bounds of what is taken, and how wrong tries are counted and forgotten."""

import re

import pytest

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.tunnels.gate.login import Login, LoginLimiter, make_login


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
        ("u", "pass word", "contains a space"),
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


@pytest.mark.parametrize(
    ("password", "strong"),
    [
        ("abcd-efgh-jkm2-npq3", True),
        ("abcd-efgh-jkmn-npqr", False),  # no digit: as four words would be
        ("aaaa-aaaa-aaaa-aaa2", False),
        ("abcd-efgh-jkm2", False),
        ("a-long-password-2-of-a-user", False),
    ],
)
def test_only_a_password_of_the_kind_made_here_counts_as_strong(password: str, strong: bool) -> None:
    assert Login("me", password).strong is strong


def test_nearly_every_made_up_password_is_strong() -> None:
    assert sum(make_login().strong for _ in range(300)) > 280


def test_passwords_that_no_text_can_be_are_wrong_and_no_failure() -> None:
    assert not Login("me", "right-one").matches("me", "right-one\ud800")


def test_of_one_address_the_tries_are_counted_and_forgotten_after_the_window() -> None:
    clock = [100.0]
    limiter = LoginLimiter(2, 300, 10, now=lambda: clock[0])
    limiter.failed("a")
    clock[0] = 104
    assert limiter.wait_s("a") == 0
    limiter.failed("a")
    assert (limiter.wait_s("a"), limiter.wait_s("b")) == (6, 0), "the first of the two is ten seconds old at 110"
    assert (limiter.refuses("a"), limiter.refuses("b")) == (True, False)
    clock[0] = 110
    assert limiter.wait_s("a") == 0
    limiter.failed("a")
    limiter.passed("a")
    limiter.failed("a")
    assert limiter.wait_s("a") == 0, "who got in starts anew"


def test_all_together_wait_for_a_turn_and_no_window_holds_more_than_the_bound() -> None:
    clock = [0.0]
    limiter = LoginLimiter(5, 30, 60, now=lambda: clock[0])
    looked_at = []
    for number in range(10_000):  # ten minutes of a try every 60 ms, each from an address of its own
        clock[0] = number * 0.06
        if limiter.judge(f"198.51.{number // 256}.{number % 256}" if number % 2 else None, right=False) == 0:
            looked_at.append(clock[0])
    assert len(looked_at) > 200, "the bound is not stricter than it says"
    for start in looked_at:
        assert sum(start <= moment < start + 60 for moment in looked_at) <= 30
    assert limiter.wait_s(None) <= 3, "and a right password waits no longer than a turn"


def test_a_right_password_does_not_count_and_waits_for_its_turn_alone() -> None:
    clock = [0.0]
    limiter = LoginLimiter(5, 30, 60, now=lambda: clock[0])
    assert [limiter.judge(None, right=True) for _ in range(1000)] == [0] * 1000
    assert [limiter.judge(None, right=False) for _ in range(10)] == [0] * 10
    assert limiter.judge(None, right=True) == 3, "nothing is told before it is its turn"
    clock[0] = 3
    assert [limiter.judge(None, right=True) for _ in range(1000)] == [0] * 1000


def test_where_somebody_got_in_lately_nobody_waits_for_strangers() -> None:
    clock = [0.0]
    limiter = LoginLimiter(2, 6, 60, now=lambda: clock[0])
    assert limiter.judge("owner", right=True) == 0
    while limiter.judge(None, right=False) == 0:
        pass
    assert limiter.wait_s("new") > 0
    assert limiter.wait_s("owner") == 0
    assert [limiter.judge("owner", right=False) for _ in range(2)] == [0, 0]
    assert limiter.judge("owner", right=False) == 60, "its own bound holds"
    clock[0] = 86_500
    while limiter.judge(None, right=False) == 0:
        pass
    assert limiter.wait_s("owner") > 0, "after a day it is as any other"


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
