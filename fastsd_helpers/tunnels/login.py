"""Who may pass: the user name and password of a link, how one is made up, and how many wrong tries are taken."""

import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.runtime import secret

__all__ = ["Login", "LoginLimiter", "choose_login", "make_login"]

# Without letters that are mistaken for others (0 o 1 l i); 16 of them are 79 bits.
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
_SHORTEST_PASSWORD = 8
# Blanks, what web UIs take for the end of a user or a login, and what is no text: control characters, and bytes of an
# environment that are no UTF-8.
_REFUSED = r"\s:,\"'\x00-\x1f\x7f-\x9f\ud800-\udfff"


@dataclass(frozen=True)
class Login:
    """One user name and password; the password is in no repr."""

    user: str
    password: str = field(repr=False)

    def matches(self, user: str, password: str) -> bool:
        """Compare both in a time that does not tell where they differ."""
        same_user = hmac.compare_digest(user.encode(), self.user.encode())
        same_password = hmac.compare_digest(password.encode(), self.password.encode())
        return same_user and same_password


def make_login(user: str = "fastsd", password: str = "") -> Login:
    """Check a user name and a password, or make up a password when it is empty.

    Raises:
        SettingsError: what web UIs cannot take: a blank, comma, colon, quote or control character in either, or a
            password under 8 characters.
    """
    user = user.strip()
    if not re.fullmatch(rf"[^{_REFUSED}]{{1,64}}", user):
        raise SettingsError(
            f"user is {user!r}; it needs 1 to 64 characters without blanks, commas, colons, quotes and control "
            "characters.",
            "Choose a simple word, for example 'fastsd'.",
        )
    if not password:
        password = "-".join("".join(secrets.choice(_LETTERS) for _ in range(4)) for _ in range(4))
    if not re.fullmatch(rf"[^{_REFUSED}]{{8,128}}", password):
        raise SettingsError(
            f"The password has {len(password)} characters or holds a blank, comma, colon, quote or control character.",
            f"Give {_SHORTEST_PASSWORD} to 128 other characters, or leave it empty: a strong one is made for you.",
        )
    return Login(user, password)


def choose_login(user: str = "fastsd", password: str | None = None) -> Login:
    """The login of a link or a page: with `password`, else with FASTSD_PASSWORD, else with one made up.

    FASTSD_PASSWORD comes from the environment or the secrets of Colab or Kaggle.

    Raises:
        SettingsError: what `make_login` does not take.
    """
    given = secret("FASTSD_PASSWORD") if not password else None
    if given is None:
        return make_login(user, password or "")
    try:
        return make_login(user, given)
    except SettingsError as err:
        if err.problem.startswith("user"):
            raise
        raise SettingsError(f"FASTSD_PASSWORD: {err.problem}", err.hint) from None


class LoginLimiter:
    """Counts wrong passwords: few per visitor, and a bound for all together, since an address can be made up.

    Who is over the bound is refused even with the right password until a minute has passed; who is logged in already
    is never asked here.

    Args:
        per_address, overall: wrong tries allowed within `window_s` seconds.
        now: the clock, in seconds.
    """

    _REMEMBERED = 1000

    def __init__(
        self,
        per_address: int = 5,
        overall: int = 30,
        window_s: float = 60,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_address, self._overall, self._window_s, self._now = per_address, overall, window_s, now
        self._all: deque[float] = deque(maxlen=overall)
        self._by_address: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait_s(self, address: str) -> float:
        """Seconds this visitor has to wait before the next try; 0 when it may try now."""
        with self._lock:
            tries = self._by_address.get(address, deque())
            return max(self._rest(self._all, self._overall), self._rest(tries, self._per_address))

    def failed(self, address: str) -> None:
        """Count one wrong password."""
        with self._lock:
            now = self._now()
            self._all.append(now)
            self._by_address.setdefault(address, deque(maxlen=self._per_address)).append(now)
            self._by_address.move_to_end(address)
            while len(self._by_address) > self._REMEMBERED:
                self._by_address.popitem(last=False)

    def passed(self, address: str) -> None:
        """Forget the wrong tries of a visitor who is in now."""
        with self._lock:
            self._by_address.pop(address, None)

    def _rest(self, tries: deque[float], limit: int) -> float:
        if len(tries) < limit:
            return 0.0
        return max(0.0, tries[0] + self._window_s - self._now())
