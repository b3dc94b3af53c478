"""The login gate: a reverse proxy on this machine that lets only those with the password through to a port.

It passes on HTTP, WebSockets, server-sent events and uploads of any size as they come, holding none of them. It is
built on aiohttp: one well-kept package has both ends of both protocols with back pressure, and Colab and Kaggle have
it installed already.
"""

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from typing import Any
from urllib.parse import quote

from fastsd_helpers.errors import DependencyMissing, TunnelError
from fastsd_helpers.tunnels.gate_page import login_page
from fastsd_helpers.tunnels.login import Login, LoginLimiter
from fastsd_helpers.tunnels.proxy import Proxy

__all__ = ["ALIVE_PATH", "Gate", "open_gate"]

logger = logging.getLogger("fastsd_helpers")

ALIVE_PATH = "/.fastsd/alive"
_LOGIN_PATH = "/.fastsd/login"
_LOGOUT_PATH = "/.fastsd/logout"
_COOKIE = "fastsd_gate"
_MOST_SESSIONS = 1000
_LARGEST_FORM_BYTES = 4096
_PLAIN_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def open_gate(
    port: int,
    login: Login | None,
    *,
    upstream_login: Login | None = None,
    session_s: float = 7 * 86400,
    limiter: LoginLimiter | None = None,
) -> "Gate":
    """Start a gate in front of a port of this machine; it listens on 127.0.0.1 on a free port until it is closed.

    Visitors log in on a page, which leaves a cookie, or send HTTP basic authentication with every request.

    Args:
        port: where the server behind it listens, on 127.0.0.1.
        login: whom to let in; None lets everyone in and only answers the tunnel's question whether it is alive.
        upstream_login: the server's own login, entered for the visitor, so that nobody logs in twice: HTTP basic
            for an API, and Gradio's `/login` for its page.
        session_s: how long a visitor stays logged in, in seconds.
        limiter: counts wrong passwords.

    Raises:
        DependencyMissing: aiohttp is not installed. TunnelError: it could not listen.
    """
    return Gate(port, login, upstream_login=upstream_login, session_s=session_s, limiter=limiter)


class Gate:
    """A running gate: `port` is where it listens, `nonce` what it answers at ALIVE_PATH to prove it is this one."""

    def __init__(
        self,
        upstream_port: int,
        login: Login | None,
        *,
        upstream_login: Login | None = None,
        session_s: float = 7 * 86400,
        limiter: LoginLimiter | None = None,
    ) -> None:
        self.upstream_port, self.login, self.nonce = upstream_port, login, secrets.token_urlsafe(24)
        self.port = 0
        self._proxy = Proxy(upstream_port, hidden_cookie=_COOKIE, hidden_login=login, upstream_login=upstream_login)
        self._limiter = limiter or LoginLimiter()
        self._session_s = session_s
        self._sessions: dict[str, float] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._started = threading.Event()
        self._problem: Exception | None = None
        # A loop of its own in a thread of its own: a notebook's kernel runs one already, and blocks it.
        self._thread = threading.Thread(target=self._run, name="fastsd-gate", daemon=True)
        self._thread.start()
        self._started.wait(30)
        if isinstance(self._problem, ModuleNotFoundError):
            raise DependencyMissing(
                "The login gate needs the package aiohttp, which is not installed.", "Run: pip install aiohttp"
            ) from self._problem
        if self._problem is not None or not self.port:
            raise TunnelError(
                f"The login gate could not start: {self._problem or 'no answer in 30 s'}.", "Run it again."
            ) from self._problem

    @property
    def url(self) -> str:
        """Its address on this machine."""
        return f"http://127.0.0.1:{self.port}"

    def set_public_url(self, url: str | None) -> None:
        """Tell the server behind it this public address where a tunnel reports this machine's own name instead."""
        self._proxy.public_url = url

    def forget_upstream_login(self) -> None:
        """Log in at the server behind it anew, after it was restarted."""
        self._proxy.forget_login()

    def close(self) -> None:
        """Stop listening and cut what is open; calling it twice is harmless."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop ended a moment ago
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------- in its thread

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as err:
            self._problem = err
            if self._started.is_set():
                logger.warning("The login gate on port %s stopped: %s.", self.port, err)
        finally:
            self._started.set()

    async def _serve(self) -> None:
        from aiohttp import web

        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        limits = {"max_line_size": 65536, "max_field_size": 65536, "read_bufsize": 2**18}
        # Without cancellation an event stream would go on being read after its visitor has left.
        server = web.Server(self._handle, handler_cancellation=True, access_log=None, **limits)
        runner = web.ServerRunner(server, shutdown_timeout=0.5)
        await runner.setup()
        try:
            async with self._proxy:
                site = web.TCPSite(runner, "127.0.0.1", 0, backlog=256)
                await site.start()
                self.port = site._server.sockets[0].getsockname()[1]
                self._started.set()
                await self._stop.wait()
        finally:
            await runner.cleanup()

    async def _handle(self, request: Any) -> Any:
        from aiohttp import web

        if request.path == ALIVE_PATH:
            return web.Response(text=self.nonce, headers=_PLAIN_HEADERS)
        if self.login is not None:
            if request.path == _LOGIN_PATH:
                return await self._log_in(request)
            if request.path == _LOGOUT_PATH:
                return self._log_out(request)
            refusal = self._refusal(request)
            if refusal is not None:
                return refusal
        return await self._proxy.handle(request)

    def _refusal(self, request: Any) -> Any:
        """None for a visitor who may pass; the answer to give otherwise."""
        import aiohttp
        from aiohttp import web

        if self._sessions.get(request.cookies.get(_COOKIE, ""), 0) > time.monotonic():
            return None
        address, given = _address_of(request), request.headers.get("Authorization", "")
        if given.lower().startswith("basic "):
            wait_s = self._limiter.wait_s(address)
            if wait_s:
                return _too_many(wait_s)
            with contextlib.suppress(ValueError):
                basic = aiohttp.BasicAuth.decode(given, encoding="utf-8")
                if self.login.matches(basic.login, basic.password):
                    self._limiter.passed(address)
                    return None
            self._limiter.failed(address)
        if request.method in ("GET", "HEAD") and "text/html" in request.headers.get("Accept", ""):
            place = f"{_LOGIN_PATH}?next={quote(request.raw_path, safe='')}"
            return web.Response(status=303, headers={**_PLAIN_HEADERS, "Location": place})
        headers = dict(_PLAIN_HEADERS)
        if "Sec-Fetch-Mode" not in request.headers:  # a script of a page would make the browser open its own dialogue
            headers["WWW-Authenticate"] = 'Basic realm="fastsd", charset="UTF-8"'
        return web.Response(status=401, text="A user name and password are needed.\n", headers=headers)

    async def _log_in(self, request: Any) -> Any:
        from aiohttp import web

        if request.method in ("GET", "HEAD"):
            return _page(200, request.query.get("next", "/"))
        if request.method != "POST":
            return web.Response(status=405, headers={"Allow": "GET, POST"})
        if not 0 < (request.content_length or 0) <= _LARGEST_FORM_BYTES:
            return web.Response(status=413, text="That is no login form.\n", headers=_PLAIN_HEADERS)
        fields = await request.post()
        user, password, place = (str(fields.get(name, "")) for name in ("user", "password", "next"))
        address = _address_of(request)
        wait_s = self._limiter.wait_s(address)
        if wait_s:
            return _too_many(wait_s, place)
        if not self.login.matches(user.strip(), password.strip()):
            self._limiter.failed(address)
            return _page(401, place, "Wrong user or password.")
        self._limiter.passed(address)
        answer = web.Response(status=303, headers={**_PLAIN_HEADERS, "Location": _local(place)})
        secure = request.headers.get("X-Forwarded-Proto", "") == "https"
        answer.set_cookie(
            _COOKIE, self._new_session(), max_age=int(self._session_s), httponly=True, secure=secure, samesite="Lax"
        )
        return answer

    def _new_session(self) -> str:
        now = time.monotonic()
        self._sessions = {token: until for token, until in self._sessions.items() if until > now}
        while len(self._sessions) >= _MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        token = secrets.token_urlsafe(32)
        self._sessions[token] = now + self._session_s
        return token

    def _log_out(self, request: Any) -> Any:
        from aiohttp import web

        self._sessions.pop(request.cookies.get(_COOKIE, ""), None)
        answer = web.Response(status=303, headers={**_PLAIN_HEADERS, "Location": _LOGIN_PATH})
        answer.del_cookie(_COOKIE)
        return answer


def _address_of(request: Any) -> str:
    """The visitor's address as the tunnel says it, else that of the connection, which is the tunnel's own."""
    forwarded = request.headers.get("CF-Connecting-IP") or request.headers.get("X-Forwarded-For", "")
    # The last entry is the one that the tunnel itself has added.
    return (forwarded.rsplit(",", 1)[-1].strip() or str(request.remote))[:64]


def _local(place: str) -> str:
    """A path of this very server, so that the login page sends nobody elsewhere."""
    safe = place.startswith("/") and not place.startswith(("//", "/\\")) and not any(ord(char) < 32 for char in place)
    return place if safe else "/"


def _page(status: int, place: str, message: str = "", headers: dict[str, str] | None = None) -> Any:
    from aiohttp import web

    text = login_page(_LOGIN_PATH, _local(place), message)
    return web.Response(
        status=status, text=text, content_type="text/html", headers={**_PLAIN_HEADERS, **(headers or {})}
    )


def _too_many(wait_s: float, place: str = "/") -> Any:
    seconds = int(wait_s) + 1
    return _page(429, place, f"Too many wrong tries: wait {seconds} seconds.", {"Retry-After": str(seconds)})
