"""What the gate does once a visitor may pass: requests, answers and sockets go through, and nothing is kept."""

import asyncio
import base64
import contextlib
from typing import Any
from urllib.parse import urlsplit

from fastsd_helpers.runtime import logger
from fastsd_helpers.tunnels.gate.connection import Connection
from fastsd_helpers.tunnels.gate.cookie import NAMES, cookie_pairs
from fastsd_helpers.tunnels.gate.login import Login
from fastsd_helpers.tunnels.gate.login_form import read_basic
from fastsd_helpers.tunnels.gate.passing import answer_headers
from fastsd_helpers.tunnels.gate.upstream import open_session

__all__ = ["Proxy"]

# What may wait to be sent on a connection before reading stops: enough that both ends work at the same time.
_HELD_BYTES = 2**20

# A message of a WebSocket is held whole; web UIs send images and short films in one.
_LARGEST_MESSAGE_BYTES = 2**28

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
# Some servers take another path or method from these than the one that was looked at here.
_OTHER_REQUEST = {
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
    "x-original-uri",
    "x-original-url",
    "x-rewrite-url",
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
        hidden_login: HTTP basic authentication with this login is taken away, as the gate's own cookies are.
        upstream_login: entered at the server for every visitor.
    """

    def __init__(self, port: int, *, hidden_login: Login | None, upstream_login: Login | None) -> None:
        self.public_url: str | None = None
        self._origin = f"http://127.0.0.1:{port}"
        self._hidden_login, self._upstream_login = hidden_login, upstream_login
        self._session: Any = None
        self._cookies: dict[str, str] | None = None  # None: not logged in at the server yet
        self._logging_in = asyncio.Lock()

    async def __aenter__(self) -> "Proxy":
        self._session = open_session()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._session.close()

    def forget_login(self) -> None:
        """Log in at the server again with the next request."""
        self._cookies = None

    async def handle(self, request: Any, connection: Connection) -> Any:
        """Answer one request with what the server answers; 502 when it does not, or gives no valid answer."""
        import aiohttp
        from aiohttp import web

        try:
            if "Upgrade" in request.headers:
                return await self._pass_socket(request, connection)
            return await self._pass_request(request, connection)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as err:
            self._cookies = None
            logger.debug("The server behind the gate did not answer: %s.", type(err).__name__)
            if connection.answering:
                connection.abort()  # half an answer must not look like a whole one
            text = "The program behind this link does not answer. It may be starting, or it has stopped.\n"
            return web.Response(status=502, text=text, headers={"Cache-Control": "no-store", "Retry-After": "5"})

    # ---------------------------------------------------------------------------------------------- requests

    async def _pass_request(self, request: Any, connection: Connection) -> Any:
        body = None
        if request.can_read_body:
            if request.headers.get("Expect", "").lower() == "100-continue":
                connection.say_go_on()
            body = _whole(_parts(request.content), request.headers.get("Content-Length"))
        answer = await self._ask(request, body)
        if answer.status == 401 and self._upstream_login and body is None and self._cookies is not None:
            answer.release()
            self.forget_login()  # it may have been restarted since
            answer = await self._ask(request, body)
        async with answer:
            return await self._pass_answer(request, answer, connection)

    async def _ask(self, request: Any, body: Any) -> Any:
        import yarl

        headers = await self._headers_for(request)
        url = yarl.URL(self._origin + request.raw_path, encoded=True)
        return await self._session.request(request.method, url, headers=headers, data=body, allow_redirects=False)

    async def _pass_answer(self, request: Any, answer: Any, connection: Connection) -> Any:
        import aiohttp
        from aiohttp import web

        if answer.status < 200:
            raise ValueError("no final answer")
        response = web.StreamResponse(status=answer.status, reason=_text(answer.reason or ""))
        self._copy_headers(request, answer, response)
        await response.prepare(request)
        connection.answering = True
        if request.transport is not None:
            request.transport.set_write_buffer_limits(high=_HELD_BYTES)
        # An answer to HEAD says how long another one would be.
        length = None if request.method == "HEAD" else response.headers.get("Content-Length")
        try:
            async for part in _whole(_parts(answer.content), length if answer.status not in (204, 304) else None):
                await response.write(part)
            await response.write_eof()
        except (aiohttp.ClientError, TimeoutError, ValueError):
            connection.abort()  # half an answer must not look like a whole one
        except ConnectionError:
            logger.debug("The client disconnected before the end of an answer.")
        return response

    def _copy_headers(self, request: Any, answer: Any, response: Any) -> None:
        dropped = _HOP_BY_HOP | _named_by_connection(answer.headers)
        if "Transfer-Encoding" in answer.headers:
            dropped.add("content-length")  # RFC 9112, 6.3: where both are, it says nothing
        for name, value in answer.headers.items():
            if name.lower() == "location" and value.startswith(f"{self._origin}/"):
                value = value.removeprefix(self._origin)
            ours = name.lower() == "set-cookie" and value.partition("=")[0].strip() in NAMES
            if name.lower() not in dropped and not ours:
                response.headers.add(name, _text(value))
        for name, value in answer_headers(request.raw_path, response.headers).items():
            response.headers.popall(name, None)
            if value:
                response.headers[name] = value

    async def _headers_for(self, request: Any, *, socket: bool = False) -> Any:
        from multidict import CIMultiDict

        dropped = _HOP_BY_HOP | _OTHER_REQUEST | _named_by_connection(request.headers) | {"cookie", "host"}
        dropped |= _SOCKET_HEADERS if socket else set()
        headers: CIMultiDict[str] = CIMultiDict()
        for name, value in request.headers.items():
            small = name.lower()
            if small not in dropped and not (small == "authorization" and self._hides(value)):
                headers.add(name, _text(value))
        cookies = {name: _text(value) for name, value in cookie_pairs(request.headers) if name not in NAMES}
        if self._upstream_login is not None:
            headers.setdefault("Authorization", _basic(self._upstream_login))
            cookies |= await self._upstream_cookies(self._upstream_login)
        if cookies:
            headers["Cookie"] = "; ".join(f"{_text(name)}={value}" for name, value in cookies.items())
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

    def _hides(self, authorization: str) -> bool:
        if self._hidden_login is None:
            return False
        given = read_basic(authorization)
        return given is not None and self._hidden_login.matches(*given)

    async def _upstream_cookies(self, login: Login) -> dict[str, str]:
        """The cookies of Gradio's own login; none for a server that has no such page."""
        async with self._logging_in:
            if self._cookies is None:
                form = {"username": login.user, "password": login.password}
                # The session sets no type by itself.
                headers = {"Content-Type": "application/x-www-form-urlencoded"}
                address = f"{self._origin}/login"
                async with self._session.post(address, data=form, headers=headers, allow_redirects=False) as answer:
                    self._cookies = {name: morsel.value for name, morsel in answer.cookies.items()}
                    if not self._cookies and answer.status == 400:
                        logger.warning("The program behind the gate does not accept its own login.")
            return self._cookies

    # ----------------------------------------------------------------------------------------------- sockets

    async def _pass_socket(self, request: Any, connection: Connection) -> Any:
        import aiohttp
        import yarl
        from aiohttp import web

        wanted = [part.strip() for part in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if part.strip()]
        headers = await self._headers_for(request, socket=True)
        url = yarl.URL(self._origin + request.raw_path, encoded=True)
        plain: dict[str, Any] = {"autoping": False, "max_msg_size": _LARGEST_MESSAGE_BYTES}
        try:
            server = await self._session.ws_connect(url, headers=headers, protocols=wanted, **plain)
        except aiohttp.WSServerHandshakeError as err:
            return web.Response(status=err.status if err.status >= 400 else 502, text="No socket is opened here.\n")
        async with server:
            # The subprotocol is the server's choice, not the gate's.
            chosen = (server.protocol,) if server.protocol else ()
            visitor = web.WebSocketResponse(protocols=chosen, **plain)
            if not visitor.can_prepare(request):
                return web.Response(status=400, text="This is not a WebSocket.\n")
            connection.answering = True
            await visitor.prepare(request)
            connection.opened()
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


async def _whole(parts: Any, length: str | None) -> Any:
    """A body that has exactly the length that was said; anything else ends in an error, and cuts the connection."""
    left = int(length) if length is not None else None
    async for part in parts:
        if left is not None:
            left -= len(part)
            if left < 0:
                raise ValueError("more than was said")
        yield part
    if left:
        raise ValueError("less than was said")


def _text(value: str) -> str:
    """A header's value that can be written: bytes that are not UTF-8, which aiohttp keeps as halves, are Latin-1."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogateescape").decode("latin-1")
    return value


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
