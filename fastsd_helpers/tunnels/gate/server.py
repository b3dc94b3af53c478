"""The login gate: a reverse proxy on this machine that lets only those with the password through to a port.

It passes on HTTP, WebSockets, server-sent events and uploads of any size as they come, holding none of them. It is
built on aiohttp: one well-kept package has both ends of both protocols with back pressure, and Colab and Kaggle have
it installed already.
"""

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Sequence
from typing import Any

from fastsd_helpers.errors import DependencyMissing, TunnelError
from fastsd_helpers.runtime import logger
from fastsd_helpers.tunnels.gate.connection import Connection, Doors, keep_quiet, make_server
from fastsd_helpers.tunnels.gate.entrance import ALIVE_PATH, Entrance, plain
from fastsd_helpers.tunnels.gate.login import Login, LoginLimiter
from fastsd_helpers.tunnels.gate.passing import ClosedPath, is_user_file, refusal
from fastsd_helpers.tunnels.gate.proxy import Proxy

__all__ = ["ALIVE_PATH", "Gate", "open_gate"]


def open_gate(
    port: int,
    login: Login | None,
    *,
    upstream_login: Login | None = None,
    session_s: float = 7 * 86400,
    limiter: LoginLimiter | None = None,
    closed: Sequence[ClosedPath] = (),
    address_header: str | None = None,
) -> "Gate":
    """Start a gate in front of a port of this machine; it listens on 127.0.0.1 on a free port until it is closed.

    Visitors log in on a page, which leaves a cookie. Programs send HTTP basic authentication with every request, or
    log in as `gradio_client` does, with `POST /login` and the fields `username` and `password`. Pages of somewhere
    else may do nothing in a visitor's name (see `visitor`), so a gate that is reached by another address than its own
    has to be told it: `Gate.set_public_url`.

    Args:
        port: where the server behind it listens, on 127.0.0.1.
        login: whom to let in; None lets everyone in and only answers the tunnel's question whether it is alive.
        upstream_login: the server's own login, entered for the visitor, so that nobody logs in twice: HTTP basic
            for an API, and Gradio's `/login` for its page.
        session_s: how long a visitor stays logged in, in seconds.
        limiter: counts wrong passwords.
        closed: paths that pass for nobody.
        address_header: the header in which the service in front says the visitor's address, such as
            "CF-Connecting-IP"; None: no service vouches for one.

    Returns:
        The gate, with its `port` and `url`, open until `close`.

    Raises:
        DependencyMissing: aiohttp is not installed.
        TunnelError: it could not listen.
    """
    entrance = Entrance(login, limiter or LoginLimiter(), session_s=session_s, closed=closed)
    entrance.address_header = address_header
    return Gate(login, entrance, Proxy(port, hidden_login=login, upstream_login=upstream_login), closed)


class Gate:
    """A running gate: `port` is where it listens, `nonce` what it answers at ALIVE_PATH to prove it is this one."""

    def __init__(self, login: Login | None, entrance: Entrance, proxy: Proxy, closed: Sequence[ClosedPath]) -> None:
        self.login, self.nonce, self.port = login, secrets.token_urlsafe(24), 0
        self._entrance, self._proxy, self._closed_paths = entrance, proxy, tuple(closed)
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
        """Say the link's public address: where its own page comes from, and what the server behind it is told.

        Over https the cookie is for https alone.

        Args:
            url: with its https:// or http://; None: only the gate's own.
        """
        self._proxy.public_url = self._entrance.public_url = url

    def set_address_header(self, name: str | None) -> None:
        """Say in which header the service that is in front now tells the visitor's address; None: in none.

        Args:
            name: such as "CF-Connecting-IP".
        """
        self._entrance.address_header = name

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
        self._loop.set_exception_handler(lambda _loop, found: logger.debug("The login gate: %s.", found.get("message")))
        keep_quiet(threading.current_thread())
        self._entrance.port = 0
        server = make_server(
            self._handle,
            Doors(),
            # Without cancellation an event stream would go on being read after its visitor has left.
            handler_cancellation=True,
            access_log=None,
            # A body is nobody's to unpack here: a small one can become gigabytes, and its length would be wrong.
            auto_decompress=False,
            # Our own clock is shorter.
            keepalive_timeout=3600,
            lingering_time=2,
            max_line_size=2**17,
            max_field_size=2**17,
            read_bufsize=2**18,
        )
        runner = web.ServerRunner(server, shutdown_timeout=0.5)
        await runner.setup()
        try:
            async with self._proxy:
                site = web.TCPSite(runner, "127.0.0.1", 0, backlog=256)
                await site.start()
                self.port = self._entrance.port = runner.addresses[0][1]
                self._started.set()
                await self._stop.wait()
        finally:
            await runner.cleanup()

    async def _handle(self, request: Any) -> Any:
        from aiohttp import web

        connection = Connection.of(request)
        if connection is None:
            return plain(400, "The connection is gone.")
        try:
            answer = await self._answer(request, connection)
        except Exception as err:
            logger.debug("The login gate could not answer: %s.", type(err).__name__)
            answer = plain(400, "This request cannot be answered.")
        connection.answering = True
        try:
            if "Upgrade" in request.headers:
                answer.force_close()  # what comes after it on this connection is not a request
            if isinstance(answer, web.Response):
                # The next request is read when this one has its whole answer.
                with contextlib.suppress(ConnectionError):
                    await answer.prepare(request)
                    await answer.write_eof()
        finally:
            connection.answered()
        return answer

    async def _answer(self, request: Any, connection: Connection) -> Any:
        answer = await self._entrance.answer(request, self.nonce)
        if answer is None:
            why = refusal(request.method, request.raw_path, self._closed_paths)
            if why is None and "Service-Worker" in request.headers and is_user_file(request.raw_path):
                why = "A service worker from an uploaded file is not installed in anybody's browser."
            answer = plain(403, why) if why else None
        if answer is not None:
            if request.can_read_body:
                answer.force_close()
            return answer
        connection.trust()
        return await self._proxy.handle(request, connection)
