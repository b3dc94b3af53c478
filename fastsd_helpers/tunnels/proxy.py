"""What the gate does once a visitor may pass: requests, answers and sockets go through, and nothing is kept."""

import asyncio
import base64
import contextlib
import logging
from typing import Any
from urllib.parse import urlsplit

from fastsd_helpers.tunnels.login import Login

__all__ = ["Proxy"]

logger = logging.getLogger("fastsd_helpers")

# What may wait to be sent on a connection before reading stops: enough that both ends work at the same time.
_HELD_BYTES = 2**20

# Source: RFC 9110, 7.6.1; these concern one connection, not the message.
_HOP_BY_HOP = {
    "connection",
    "expect",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
_SOCKET_HEADERS = {
    "sec-websocket-accept",
    "sec-websocket-extensions",
    "sec-websocket-key",
    "sec-websocket-protocol",
    "sec-websocket-version",
}


class Proxy:
    """Passes what it is given on to one port of this machine.

    Args:
        port: where to, on 127.0.0.1.
        hidden_cookie: name of a cookie the server must not see.
        hidden_login: HTTP basic authentication with this login is taken away too.
        upstream_login: entered at the server for every visitor.
    """

    def __init__(
        self, port: int, *, hidden_cookie: str, hidden_login: Login | None, upstream_login: Login | None
    ) -> None:
        self.public_url: str | None = None
        self._origin = f"http://127.0.0.1:{port}"
        self._hidden_cookie, self._upstream_login = hidden_cookie, upstream_login
        self._hidden_basic = _basic(hidden_login) if hidden_login else None
        self._session: Any = None
        self._cookies: dict[str, str] | None = None  # None: not logged in at the server yet
        self._logging_in: asyncio.Lock | None = None

    async def __aenter__(self) -> "Proxy":
        import aiohttp

        # Every header is the visitor's own and every byte passes as it is: no cookies, no decompression, no limit.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            read_bufsize=2**18,
            max_line_size=65536,
            max_field_size=65536,
        )
        self._logging_in = asyncio.Lock()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._session.close()

    def forget_login(self) -> None:
        """Log in at the server again with the next request."""
        self._cookies = None

    async def handle(self, request: Any) -> Any:
        """Answer one request with what the server answers; 502 when it does not."""
        import aiohttp
        from aiohttp import web

        if not request.raw_path.startswith("/"):  # CONNECT, OPTIONS * and absolute addresses of a forward proxy
            return web.Response(status=400, text="This is no forward proxy.\n")
        try:
            if request.headers.get("Upgrade", "").lower() == "websocket":
                return await self._pass_socket(request)
            return await self._pass_request(request)
        except (aiohttp.ClientError, TimeoutError) as err:
            self._cookies = None
            logger.debug("The server behind the gate did not answer: %s.", err)
            text = "The program behind this link does not answer. It may be starting, or have stopped.\n"
            return web.Response(status=502, text=text, headers={"Cache-Control": "no-store", "Retry-After": "5"})

    # ---------------------------------------------------------------------------------------------- requests

    async def _pass_request(self, request: Any) -> Any:
        body = _parts(request.content) if request.can_read_body else None
        answer = await self._ask(request, body)
        if answer.status == 401 and self._upstream_login and body is None and self._cookies is not None:
            answer.release()
            self.forget_login()  # it may have been restarted since
            answer = await self._ask(request, body)
        async with answer:
            return await self._pass_answer(request, answer)

    async def _ask(self, request: Any, body: Any) -> Any:
        import yarl

        headers = await self._headers_for(request)
        url = yarl.URL(self._origin + request.raw_path, encoded=True)
        return await self._session.request(request.method, url, headers=headers, data=body, allow_redirects=False)

    async def _pass_answer(self, request: Any, answer: Any) -> Any:
        import aiohttp
        from aiohttp import web

        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        dropped = _HOP_BY_HOP | _named_by_connection(answer.headers)
        for name, value in answer.headers.items():
            if name.lower() == "location" and value.startswith(f"{self._origin}/"):
                value = value.removeprefix(self._origin)
            if name.lower() not in dropped:
                response.headers.add(name, value)
        await response.prepare(request)
        if request.transport is not None:
            request.transport.set_write_buffer_limits(high=_HELD_BYTES)
        try:
            async for part in _parts(answer.content):
                await response.write(part)
            await response.write_eof()
        except (aiohttp.ClientError, TimeoutError):
            # Half an answer must not look like a whole one.
            if request.transport is not None:
                request.transport.abort()
        except ConnectionResetError:
            logger.debug("The visitor left before the end of an answer.")
        return response

    async def _headers_for(self, request: Any, *, socket: bool = False) -> Any:
        from multidict import CIMultiDict

        dropped = _HOP_BY_HOP | _named_by_connection(request.headers) | {"cookie", "host"}
        dropped |= _SOCKET_HEADERS if socket else set()
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in dropped)
        if headers.get("Authorization") == self._hidden_basic:
            headers.pop("Authorization", None)
        cookies = {name: value for name, value in _cookie_pairs(request.headers) if name != self._hidden_cookie}
        if self._upstream_login is not None:
            headers.setdefault("Authorization", _basic(self._upstream_login))
            cookies |= await self._upstream_cookies()
        if cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        host, scheme = request.headers.get("Host", ""), request.scheme
        if self.public_url:
            public = urlsplit(self.public_url)
            host, scheme = public.netloc, public.scheme
            headers["X-Forwarded-Host"], headers["X-Forwarded-Proto"] = host, scheme
        headers["Host"] = host
        headers.setdefault("X-Forwarded-Host", host)
        headers.setdefault("X-Forwarded-Proto", scheme)
        seen_before = request.headers.get("X-Forwarded-For")
        headers["X-Forwarded-For"] = f"{seen_before}, {request.remote}" if seen_before else str(request.remote)
        return headers

    async def _upstream_cookies(self) -> dict[str, str]:
        """The cookies of Gradio's own login; none for a server that has no such page."""
        async with self._logging_in:
            if self._cookies is None:
                form = {"username": self._upstream_login.user, "password": self._upstream_login.password}
                # The session sets no type by itself.
                headers = {"Content-Type": "application/x-www-form-urlencoded"}
                address = f"{self._origin}/login"
                async with self._session.post(address, data=form, headers=headers, allow_redirects=False) as answer:
                    self._cookies = {name: morsel.value for name, morsel in answer.cookies.items()}
                    if not self._cookies and answer.status == 400:
                        logger.warning("The program behind the gate does not take its own login.")
            return self._cookies

    # ----------------------------------------------------------------------------------------------- sockets

    async def _pass_socket(self, request: Any) -> Any:
        import aiohttp
        import yarl
        from aiohttp import web

        wanted = [part.strip() for part in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if part.strip()]
        headers = await self._headers_for(request, socket=True)
        url = yarl.URL(self._origin + request.raw_path, encoded=True)
        plain = {"autoping": False, "max_msg_size": 0}
        try:
            server = await self._session.ws_connect(url, headers=headers, protocols=wanted, **plain)
        except aiohttp.WSServerHandshakeError as err:
            return web.Response(status=err.status if err.status >= 400 else 502, text="No socket is opened here.\n")
        async with server:
            # The subprotocol is the server's choice, not the gate's.
            chosen = (server.protocol,) if server.protocol else ()
            visitor = web.WebSocketResponse(protocols=chosen, **plain)
            await visitor.prepare(request)
            ways = [asyncio.ensure_future(_pump(visitor, server)), asyncio.ensure_future(_pump(server, visitor))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
            code = server.close_code or visitor.close_code or 1000
            with contextlib.suppress(ConnectionError, RuntimeError):
                await visitor.close(code=code if code not in (1005, 1006) else 1000)
        return visitor


async def _parts(stream: Any) -> Any:
    """A body as it comes. As views: what cannot be sent at once would otherwise be copied once more."""
    async for part in stream.iter_any():
        yield memoryview(part)


async def _pump(source: Any, target: Any) -> None:
    from aiohttp import WSMsgType

    send = {
        WSMsgType.TEXT: target.send_str,
        WSMsgType.BINARY: target.send_bytes,
        WSMsgType.PING: target.ping,
        WSMsgType.PONG: target.pong,
    }
    async for message in source:
        if message.type not in send:
            return
        with_text = message.data
        await send[message.type](with_text)


def _basic(login: Login) -> str:
    return "Basic " + base64.b64encode(f"{login.user}:{login.password}".encode()).decode()


def _named_by_connection(headers: Any) -> set[str]:
    return {name.strip().lower() for name in headers.get("Connection", "").split(",") if name.strip()}


def _cookie_pairs(headers: Any) -> list[tuple[str, str]]:
    # Read by hand: Python's parser drops every cookie after one that it dislikes.
    found = []
    for line in headers.getall("Cookie", []):
        for part in line.split(";"):
            name, separator, value = part.strip().partition("=")
            if separator:
                found.append((name, value))
    return found
