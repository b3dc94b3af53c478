"""Who gets in at the gate: the login and logout pages, sessions, passwords in a header, and everybody else's answer."""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from fastsd_helpers.tunnels.gate.cookie import Sessions, set_cookie
from fastsd_helpers.tunnels.gate.login import Login, LoginLimiter
from fastsd_helpers.tunnels.gate.login_form import read_basic, read_form
from fastsd_helpers.tunnels.gate.pages import login_page, logout_page, own_path
from fastsd_helpers.tunnels.gate.passing import ClosedPath
from fastsd_helpers.tunnels.gate.visitor import Visitor, address_of, origin_of, who_asks
from fastsd_helpers.tunnels.gate.wire import Malformed

__all__ = ["ALIVE_PATH", "Entrance", "plain"]

_OWN = "/.fastsd/"
ALIVE_PATH = f"{_OWN}alive"
_LOGIN_PATH = f"{_OWN}login"
_LOGOUT_PATH = f"{_OWN}logout"
_PROGRAM_LOGIN_PATH = "/login"  # where gradio_client sends user and password

# How long a password may wait for its turn, and how many may wait.
_LONGEST_WAIT_S = 10.0
_MOST_WAITING = 64
_MOST_WAITING_PER_ADDRESS = 2

_PLAIN_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Not no-referrer: with that a browser says `Origin: null` of the form on the page.
    "Referrer-Policy": "same-origin",
    "Server": "fastsd",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Entrance:
    """Decides for each request whether it may pass.

    Args:
        login: whom to let in; None lets everyone in.
        limiter: bounds wrong passwords.
        session_s: how long a visitor stays logged in, in seconds.
        closed: paths that nobody is sent to after the login.

    Attributes:
        public_url: the link's address, once it is known.
        port: where the gate listens on this machine.
        address_header: in which header the service in front tells the visitor's address.
    """

    def __init__(
        self, login: Login | None, limiter: LoginLimiter, *, session_s: float, closed: Sequence[ClosedPath] = ()
    ) -> None:
        self.public_url: str | None = None
        self.address_header: str | None = None
        self.port = 0
        self.sessions = Sessions(session_s)
        self._login, self._limiter, self._closed = login, limiter, closed
        self._waiting: dict[str | None, int] = {}

    def _https(self, request: Any) -> bool:
        """Whether the visitor came over https: as the link says it, or the service in front.

        At the gate's own address nobody does, except that localtunnel says that address instead of the link's. A
        visitor who makes either up changes the name of his own cookie, and no page can do it for him.
        """
        if "https" in request.headers.get("X-Forwarded-Proto", "").lower():
            return True
        here = request.headers.get("Host", "").lower() in {f"127.0.0.1:{self.port}", f"localhost:{self.port}"}
        return not here and urlsplit(self.public_url or "").scheme.lower() == "https"

    async def answer(self, request: Any, nonce: str) -> Any:
        """None for a visitor who may pass; the answer to give otherwise."""
        path = request.raw_path.partition("?")[0]
        if path == ALIVE_PATH:
            return plain(200, nonce)
        if self._login is None:
            return None
        public = origin_of(self.public_url or "")
        local = [f"http://{name}:{self.port}" for name in ("127.0.0.1", "localhost")]
        visitor = who_asks(request, [public] if public else [], local)
        if visitor is Visitor.FOREIGN:
            return plain(403, "Another site's page asked for this. Open the link itself, and do it there.")
        try:
            if path == _LOGIN_PATH:
                return await self._log_in(request)
            if path == _LOGOUT_PATH:
                return self._log_out(request)
            if path.startswith(_OWN):
                return plain(404, "There is no such page.")
            if self.sessions.holds(request.headers, https=self._https(request)):
                return None
            if path == _PROGRAM_LOGIN_PATH and request.method == "POST" and visitor is Visitor.PROGRAM:
                return await self._log_in_program(request)
            return await self._look_at_basic(request)
        except Malformed as problem:
            return plain(problem.status, problem.text)

    # ------------------------------------------------------------------------------------------ ways to get in

    async def _look_at_basic(self, request: Any) -> Any:
        given = read_basic(request.headers.get("Authorization", ""))
        if given is not None:
            wait_s = await self._judge(request, *given)
            if wait_s is None:
                return None
            if wait_s:
                return self._too_many(wait_s)
        if request.method in ("GET", "HEAD") and "text/html" in request.headers.get("Accept", ""):
            place = f"{_LOGIN_PATH}?next={quote(request.raw_path, safe='')}"
            return plain(303, "", {"Location": place})
        headers = {}
        if "Sec-Fetch-Mode" not in request.headers:  # a script of a page would make the browser open its own dialogue
            headers["WWW-Authenticate"] = 'Basic realm="fastsd", charset="UTF-8"'
        return plain(401, "A user name and password are needed.", headers)

    async def _log_in(self, request: Any) -> Any:
        if request.method in ("GET", "HEAD"):
            return self._page(200, request.query.get("next", "/"))
        if request.method != "POST":
            return plain(405, "This method is not allowed.", {"Allow": "GET, POST"})
        fields = await read_form(request, ("user", "password", "next"))
        user = fields["user"].strip()
        wait_s = await self._judge(request, user, fields["password"].strip())
        if wait_s:
            return self._too_many(wait_s, fields["next"], user)
        if wait_s is not None:
            return self._page(401, fields["next"], "Wrong user or password.", user)
        # Signs that a header cannot hold are encoded, as a browser would.
        place = quote(own_path(fields["next"], self._closed), safe="/?#[]@!$&'()*+,;=~%")
        return self._welcome(request, plain(303, "", {"Location": place}))

    async def _log_in_program(self, request: Any) -> Any:
        """Take what gradio_client sends; it keeps the cookie, and sends it with every call."""
        fields = await read_form(request, ("username", "password"))
        wait_s = await self._judge(request, fields["username"].strip(), fields["password"].strip())
        if wait_s:
            return self._too_many(wait_s)
        if wait_s is not None:
            return plain(401, "Wrong user or password.")
        return self._welcome(request, plain(200, '{"success": true}', {"Content-Type": "application/json"}))

    def _welcome(self, request: Any, answer: Any) -> Any:
        set_cookie(answer, self.sessions.start(), self.sessions.lasts_s, https=self._https(request))
        return answer

    def _log_out(self, request: Any) -> Any:
        if request.method in ("GET", "HEAD"):
            return _html(200, logout_page(_LOGOUT_PATH))
        if request.method != "POST":
            return plain(405, "This method is not allowed.", {"Allow": "GET, POST"})
        self.sessions.end(request.headers, https=self._https(request))
        answer = plain(303, "", {"Location": _LOGIN_PATH})
        set_cookie(answer, "", 0, https=self._https(request))
        return answer

    async def _judge(self, request: Any, user: str, password: str) -> float | None:
        """None for the right password, 0 for a wrong one, else the seconds after which it will be looked at.

        While somebody guesses, a try waits here for its turn.
        """
        login = self._login
        right = login is not None and login.matches(user, password)
        if login is not None and right and login.strong:
            return None
        address = address_of(request, self.address_header)
        until = time.monotonic() + min(_LONGEST_WAIT_S, self._limiter.window_s / 2)
        wait_s = self._limiter.judge(address, right)
        if wait_s and not self._limiter.refuses(address) and self._may_wait(address):
            self._waiting[address] = self._waiting.get(address, 0) + 1
            try:
                while wait_s and time.monotonic() < until and not self._limiter.refuses(address):
                    # Whose turn it is, is chance: nobody gains by having come first with many.
                    await asyncio.sleep(min(wait_s, 0.2) * random.uniform(0.5, 1.5))
                    wait_s = self._limiter.judge(address, right)
            finally:
                self._waiting[address] -= 1
                if not self._waiting[address]:
                    del self._waiting[address]
        return wait_s or (None if right else 0.0)

    def _may_wait(self, address: str | None) -> bool:
        full = sum(self._waiting.values()) >= _MOST_WAITING
        return not full and (address is None or self._waiting.get(address, 0) < _MOST_WAITING_PER_ADDRESS)

    # ---------------------------------------------------------------------------------------------- answers

    def _page(
        self, status: int, place: str, message: str = "", user: str = "", headers: dict[str, str] | None = None
    ) -> Any:
        return _html(status, login_page(_LOGIN_PATH, own_path(place, self._closed), message, user), headers)

    def _too_many(self, wait_s: float, place: str = "/", user: str = "") -> Any:
        seconds = int(wait_s) + 1
        message = f"Too many wrong tries: wait {seconds} seconds."
        return self._page(429, place, message, user, {"Retry-After": str(seconds)})


def plain(status: int, text: str, headers: dict[str, str] | None = None) -> Any:
    """An answer of the gate itself: one line, kept nowhere."""
    from aiohttp import web

    kind = {} if "Content-Type" in (headers or {}) else {"Content-Type": "text/plain; charset=utf-8"}
    body = text if status == 200 or not text else f"{text}\n"
    return web.Response(status=status, body=body.encode(), headers={**_PLAIN_HEADERS, **kind, **(headers or {})})


def _html(status: int, text: str, headers: dict[str, str] | None = None) -> Any:
    return plain(status, text, {"Content-Type": "text/html; charset=utf-8", **(headers or {})})
