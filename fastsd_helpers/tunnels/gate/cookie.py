"""The gate's cookie: its name, how it is read, and the sessions it stands for.

Over https its name begins with `__Host-`: a browser takes such a cookie from this very host only, so a neighbour on
the share service can neither set one nor cover it. Cookies are read by hand: Python's parser drops every cookie after
one that it dislikes, and a request can make it log thousands of lines.
"""

import secrets
import time
from typing import Any

__all__ = ["NAMES", "Sessions", "cookie_name", "cookie_pairs", "set_cookie"]

_PLAIN, _SECURE = "fastsd_gate", "__Host-fastsd_gate"
NAMES = frozenset({_PLAIN, _SECURE})
_MOST_SESSIONS = 1000


def cookie_name(*, https: bool) -> str:
    """The name that counts; the other one is not looked at."""
    return _SECURE if https else _PLAIN


def set_cookie(answer: Any, value: str, max_age_s: float, *, https: bool) -> None:
    """Add the cookie to an aiohttp response; an empty value takes it back."""
    line = f"{cookie_name(https=https)}={value}; Max-Age={int(max_age_s)}; Path=/; HttpOnly; SameSite=Lax"
    answer.headers.add("Set-Cookie", f"{line}; Secure" if https else line)


def cookie_pairs(headers: Any) -> list[tuple[str, str]]:
    """Every name and value of the Cookie headers, in order, as they are."""
    found = []
    for line in headers.getall("Cookie", []):
        for part in line.split(";"):
            name, separator, value = part.strip().partition("=")
            if separator:
                found.append((name, value))
    return found


class Sessions:
    """Who is logged in, by the value of the cookie. Only values made here count.

    Args:
        lasts_s: how long a visitor stays logged in, in seconds.
    """

    def __init__(self, lasts_s: float) -> None:
        self.lasts_s = lasts_s
        self._until: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def start(self) -> str:
        """Begin a session; gives its value. The oldest makes room."""
        now = time.monotonic()
        self._until = {value: until for value, until in self._until.items() if until > now}
        while len(self._until) >= _MOST_SESSIONS:
            del self._until[next(iter(self._until))]
        value = secrets.token_urlsafe(32)
        self._until[value] = now + self.lasts_s
        return value

    def holds(self, headers: Any, *, https: bool) -> bool:
        """Whether a request brings a valid value.

        Any of several cookies of the name will do: a neighbour may have set another one of it.
        """
        now = time.monotonic()
        return any(self._until.get(value, 0) > now for value in _values(headers, https))

    def end(self, headers: Any, *, https: bool) -> None:
        """End the sessions that a request brings."""
        for value in _values(headers, https):
            self._until.pop(value, None)


def _values(headers: Any, https: bool) -> list[str]:
    name = cookie_name(https=https)
    return [value for found, value in cookie_pairs(headers) if found == name]
