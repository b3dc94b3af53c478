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
# Blanks, what web UIs take for the end of a user or a login, and what is not text: control characters, and bytes of an
# environment that are not UTF-8.
_REFUSED = r"\s:,\"'\x00-\x1f\x7f-\x9f\ud800-\udfff"


@dataclass(frozen=True)
class Login:
    """One user name and password; the password is in no repr."""

    user: str
    password: str = field(repr=False)

    def matches(self, user: str, password: str) -> bool:
        """Compare both in a time that does not tell where they differ.

        Args:
            user: as typed.
            password: as typed.

        Returns:
            True when both are right.
        """
        same_user = hmac.compare_digest(_bytes(user), _bytes(self.user))
        same_password = hmac.compare_digest(_bytes(password), _bytes(self.password))
        return same_user and same_password

    def lines(self) -> list[str]:
        """As it is shown below a link; the password is in clear, so it is for no log."""
        return [f"User:      {self.user}", f"Password:  {self.password}"]

    @property
    def strong(self) -> bool:
        """Whether the password is of the kind that is made up here, which nobody finds by trying.

        At ten thousand tries a second, 79 bits hold for a thousand times the age of the earth.
        """
        groups = "-".join([f"[{_LETTERS}]{{4}}"] * 4)
        return (
            re.fullmatch(groups, self.password) is not None
            and len(set(self.password)) > 8
            and any(sign.isdigit() for sign in self.password)
        )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def make_login(user: str = "fastsd", password: str = "") -> Login:
    """Check a user name and a password, or make up a password when it is empty.

    Args:
        user: its name.
        password: 8 characters or more; empty: one is made up, of 79 bits.

    Returns:
        The login.

    Raises:
        SettingsError: what web UIs cannot take: a blank, comma, colon, quote or control character in either, or a
            password under 8 characters.
    """
    user = user.strip()
    if not re.fullmatch(rf"[^{_REFUSED}]{{1,64}}", user):
        raise SettingsError(
            f"user is {user!r}; it needs 1 to 64 characters without spaces, commas, colons, quotes "
            "and control characters.",
            "Choose a simple word, for example 'fastsd'.",
        )
    if not password:
        password = "-".join("".join(secrets.choice(_LETTERS) for _ in range(4)) for _ in range(4))
    if not re.fullmatch(rf"[^{_REFUSED}]{{8,128}}", password):
        raise SettingsError(
            f"The password has {len(password)} characters or contains a space, comma, colon, quote or control "
            "character.",
            f"Give {_SHORTEST_PASSWORD} to 128 other characters, or leave it empty: a strong one is generated.",
        )
    return Login(user, password)


def choose_login(user: str = "fastsd", password: str | None = None) -> Login:
    """The login of a link or a page: with `password`, else with FASTSD_PASSWORD, else with one made up.

    FASTSD_PASSWORD comes from the environment or the secrets of Colab or Kaggle.

    Args:
        user: its name.
        password: 8 characters or more; None: as above.

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
    """Bounds how many wrong passwords are looked at; nobody can use it to keep the owner out.

    Two bounds that pull against each other: a stranger must not get more tries by making addresses up, and his tries
    must not shut the owner out, nor a program that brings the right password with every request. So:

    - Each address that the service vouches for has a bound of its own, and over it nobody of that address is looked
      at, so that going on trying finds nothing. Addresses that a visitor has made up are none (`None` here): the
      gate believes only the header that the service in front of it sets itself.
    - For all together there is a bound too, whatever the addresses. It refuses nobody but makes them wait: the first
      third of it is looked at as it comes, what follows at even intervals (3 s with 30 a minute). A right password
      that waits its turn passes, and does not count, so programs are as fast as ever while nobody guesses.
    - An address from which somebody has logged in lately does not wait for strangers: it has its own bound alone.
    - Who has a session is never asked here, and a password that was made up here (`Login.strong`) needs no bound
      that a right one would have to wait for.

    Args:
        per_address: wrong tries looked at within `window_s` seconds.
        overall: wrong tries looked at within `window_s` seconds.
        now: the clock, in seconds.
    """

    _REMEMBERED = 1000
    _KNOWN_S = 86400.0

    def __init__(
        self,
        per_address: int = 5,
        overall: int = 30,
        window_s: float = 60,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_address, self._overall, self._now = per_address, overall, now
        self.window_s = window_s
        self._at_once = max(1, overall // 3)
        self._apart_s = window_s / max(1, overall - self._at_once)
        self._all: deque[float] = deque(maxlen=overall)
        self._by_address: OrderedDict[str, deque[float]] = OrderedDict()
        self._known: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.RLock()

    def judge(self, address: str | None, right: bool) -> float:
        """Let one try be looked at, and count it when it is wrong.

        Returns:
            Seconds to wait before it is looked at; 0 when it was. Until then nothing may be told of `right`.
        """
        with self._lock:
            wait_s = self.wait_s(address)
            if wait_s == 0:
                self.passed(address) if right else self.failed(address)
            return wait_s

    def wait_s(self, address: str | None) -> float:
        """Seconds this visitor has to wait before the next try; 0 when it may try now."""
        with self._lock:
            now, own = self._now(), self._own_wait_s(address)
            if address is not None and self._known.get(address, -self._KNOWN_S) > now - self._KNOWN_S:
                return own
            waits = [own, _rest(self._all, self._overall, self.window_s, now)]
            if len(self._all) >= self._at_once and self._all[-self._at_once] > now - self.window_s:
                waits.append(self._all[-1] + self._apart_s - now)
            return max(0.0, *waits)

    def refuses(self, address: str | None) -> bool:
        """Whether the address itself is over its bound: no waiting for a turn helps."""
        with self._lock:
            return self._own_wait_s(address) > 0

    def failed(self, address: str | None) -> None:
        """Count one wrong password."""
        with self._lock:
            now = self._now()
            self._all.append(now)
            if address is None:
                return
            self._by_address.setdefault(address, deque(maxlen=self._per_address)).append(now)
            self._by_address.move_to_end(address)
            while len(self._by_address) > self._REMEMBERED:
                self._by_address.popitem(last=False)

    def passed(self, address: str | None) -> None:
        """Forget the wrong tries of a visitor who is in now."""
        if address is None:
            return
        with self._lock:
            self._by_address.pop(address, None)
            self._known[address] = self._now()
            self._known.move_to_end(address)
            while len(self._known) > self._REMEMBERED:
                self._known.popitem(last=False)

    def _own_wait_s(self, address: str | None) -> float:
        tries = self._by_address.get(address, deque()) if address is not None else deque()
        return _rest(tries, self._per_address, self.window_s, self._now())


def _rest(tries: deque[float], limit: int, window_s: float, now: float) -> float:
    return max(0.0, tries[0] + window_s - now) if len(tries) >= limit else 0.0
