"""What the gate passes on: headers, cookies, logins, sockets and failures, each as the two ends would see it."""

import asyncio
import base64
import contextlib
import gzip
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")

from tunnel_doubles import free_port, serve, site_handler  # noqa: E402

from fastsd_helpers.tunnels import Gate, Login, open_gate  # noqa: E402


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


LOGIN = Login("fastsd", "right-password-1")
BASIC = basic(LOGIN.user, LOGIN.password)


def send(port: int, path: str, *headers: str, method: str = "GET", body: bytes = b"") -> tuple[int, dict, bytes]:
    """One request with exactly these header lines; gives status, headers (small letters, joined by |) and body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: a.example", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    if not any(line.lower().startswith("connection:") for line in lines):
        lines.append("Connection: close")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        answer = b""
        while part := raw.recv(65536):
            answer += part
            head, _, rest = answer.partition(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            if length and len(rest) >= int(length[0].split(b":")[1]):
                break
    head, _, rest = answer.partition(b"\r\n\r\n")
    first, *others = head.decode().split("\r\n")
    found: dict[str, str] = {}
    for line in others:
        name, _, value = line.partition(":")
        found[name.lower()] = "|".join(filter(None, [found.get(name.lower()), value.strip()]))
    return int(first.split()[1]), found, rest


def seen(gate: Gate, *headers: str, **more: Any) -> dict[str, str]:
    """The headers that arrive behind the gate, in small letters."""
    status, _, text = send(gate.port, "/headers", *headers, **more)
    assert status == 200
    found: dict[str, str] = {}
    for name, value in json.loads(text)["headers"]:
        found[name.lower()] = "|".join(filter(None, [found.get(name.lower()), value]))
    return found


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate without a login of its own: what is tested is what passes."""
    with serve(site_handler) as port, open_gate(port, None) as gate:
        yield gate


# ------------------------------------------------------------------------------------------------------- headers


def test_what_concerns_one_connection_alone_goes_no_further(gate: Gate) -> None:
    found = seen(
        gate,
        "Connection: close, X-Mine , ,x-Other",
        "X-Mine: 1",
        "X-Other: 2",
        "X-Third: 3",
        "Keep-Alive: timeout=5",
        "TE: trailers",
        "Proxy-Authorization: Basic abc",
        "Proxy-Connection: keep-alive",
        "Trailer: x",
        "Upgrade: h2c",
    )
    assert found["x-third"] == "3"
    dropped = {"x-mine", "x-other", "keep-alive", "te", "proxy-authorization", "proxy-connection", "trailer", "upgrade"}
    assert not dropped & set(found)


def test_the_same_holds_for_the_answer() -> None:
    async def handler(_request: Any) -> Any:
        from aiohttp import web

        headers = {"Connection": "X-Mine", "X-Mine": "1", "X-Third": "3", "Keep-Alive": "9", "Proxy-Authenticate": "x"}
        return web.Response(text="ok", headers=headers, status=207, reason="As The Server Says")

    with serve(handler) as port, open_gate(port, None) as gate:
        status, headers, body = send(gate.port, "/")
    assert (status, body, headers["x-third"]) == (207, b"ok", "3")
    assert not {"x-mine", "keep-alive", "proxy-authenticate"} & set(headers)


def test_nothing_is_added_that_a_visitor_did_not_send(gate: Gate) -> None:
    found = seen(gate)
    assert set(found) == {"host", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-for"}
    assert (found["host"], found["x-forwarded-host"], found["x-forwarded-proto"]) == ("a.example", "a.example", "http")
    assert found["x-forwarded-for"] == "127.0.0.1"


def test_who_was_before_in_the_chain_stays_in_it(gate: Gate) -> None:
    found = seen(gate, "X-Forwarded-For: 203.0.113.9", "X-Forwarded-Host: outside.example", "X-Forwarded-Proto: https")
    assert found["x-forwarded-for"] == "203.0.113.9, 127.0.0.1"
    assert (found["x-forwarded-host"], found["x-forwarded-proto"]) == ("outside.example", "https")
    assert found["host"] == "a.example"


def test_a_public_address_is_told_instead_and_can_be_taken_back(gate: Gate) -> None:
    gate.set_public_url("https://calm-fox.example:8443/below")
    found = seen(gate, "X-Forwarded-Host: inside.example", "X-Forwarded-Proto: http")
    assert found["host"] == found["x-forwarded-host"] == "calm-fox.example:8443"
    assert found["x-forwarded-proto"] == "https"
    gate.set_public_url(None)
    assert seen(gate)["host"] == "a.example"


def test_cookies_arrive_as_they_were_but_for_the_gates_own(gate: Gate) -> None:
    found = seen(gate, 'Cookie: a=1; fastsd_gate=secret; no-value; b=x=y; c={"d": 1}', "Cookie: e=5")
    assert found["cookie"] == 'a=1; b=x=y; c={"d": 1}; e=5'
    assert "cookie" not in seen(gate, "Cookie: fastsd_gate=secret")


def test_another_login_than_the_gates_passes_through() -> None:
    with serve(site_handler) as port, open_gate(port, LOGIN) as gate:
        assert "authorization" not in seen(gate, f"Authorization: {BASIC}")
        both = seen(gate, f"authorization: {BASIC}", "Authorization: Bearer mine", f"Authorization: {BASIC.lower()}x")
        assert "Bearer mine" in both["authorization"]
        assert BASIC not in both["authorization"], "of several ones the gate's is taken away"
        assert "authorization" not in seen(gate, f"Authorization: {BASIC.replace('Basic', 'BASIC ')}"), (
            "however written"
        )
    with serve(site_handler) as port, open_gate(port, None) as gate:
        assert seen(gate, f"Authorization: {BASIC}")["authorization"] == BASIC


def test_long_headers_pass_back() -> None:
    long = "x" * 60_000

    async def handler(_request: Any) -> Any:
        from aiohttp import web

        return web.Response(text="ok", headers={"X-Long": long})

    with serve(handler) as port, open_gate(port, None) as gate:
        assert send(gate.port, "/")[1]["x-long"] == long


# ------------------------------------------------------------------------------------------------------- answers


def test_only_an_address_of_the_server_behind_is_made_the_gates() -> None:
    async def handler(request: Any) -> Any:
        from aiohttp import web

        return web.Response(status=302, headers={"Location": request.query["to"], "X-Location": request.query["to"]})

    with serve(handler) as port, open_gate(port, None) as gate:
        own = f"http://127.0.0.1:{port}"
        for place, expected in [
            (f"{own}/a", "/a"),
            (own, own),
            (f"{own}0/a", f"{own}0/a"),
            ("https://other.example/a", "https://other.example/a"),
            ("/b?c", "/b?c"),
        ]:
            status, headers, _ = send(gate.port, f"/?to={place.replace('?', '%3F')}")
            assert (status, headers["location"]) == (302, expected)
            assert headers["x-location"] == place, "no other header is touched"


def test_packed_answers_stay_packed() -> None:
    packed = gzip.compress(b"hello " * 100)

    async def handler(_request: Any) -> Any:
        from aiohttp import web

        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    with serve(handler) as port, open_gate(port, None) as gate:
        _, headers, body = send(gate.port, "/")
    assert headers["content-encoding"] == "gzip"
    assert body == packed


def test_a_forward_proxys_requests_are_refused(gate: Gate) -> None:
    for method, path in (("GET", "http://example.com/"), ("OPTIONS", "*"), ("GET", f"{gate.url}/headers")):
        status, _, text = send(gate.port, path, method=method)
        assert (status, text) == (400, b"This is not a forward proxy.\n")


def test_a_server_that_is_away_is_said_so_and_found_again_when_it_is_back() -> None:
    port = free_port()
    with open_gate(port, None) as gate:
        status, headers, text = send(gate.port, "/")
        assert (status, headers["retry-after"], headers["cache-control"]) == (502, "5", "no-store")
        assert b"may be starting" in text
        with serve(site_handler, port):
            assert send(gate.port, "/")[0] == 200


def test_visitors_with_open_streams_keep_nobody_out() -> None:
    """More than a hundred at once, which is what aiohttp's client would hold back by itself."""
    most, both = 130, asyncio.Event()
    waiting = []

    async def handler(request: Any) -> Any:
        from aiohttp import web

        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"x")
        waiting.append(request)
        while len(waiting) < most and not both.is_set():
            await asyncio.sleep(0.01)
        await response.write_eof()
        return response

    async def talk(gate: Gate) -> list[bytes]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one() -> bytes:
                async with session.get(gate.url, timeout=aiohttp.ClientTimeout(20)) as answer:
                    return await answer.read()

            return await asyncio.gather(*(one() for _ in range(most)))

    with serve(handler) as port, open_gate(port, None) as gate:
        try:
            assert asyncio.run(talk(gate)) == [b"x"] * most
        finally:
            both.set()


# -------------------------------------------------------------------------------------------- the server's own login


class Gradio:
    """A site with Gradio's login: a form at /login that gives a cookie, which a restart makes worthless."""

    def __init__(self) -> None:
        self.logins, self.requests, self.valid = 0, [], ""
        self.accepts = True

    async def handle(self, request: Any) -> Any:
        from aiohttp import web

        if request.path == "/login":
            form = await request.post()
            self.requests.append(("login", request.method, form.get("username"), form.get("password")))
            if not self.accepts:
                return web.Response(status=400)
            self.logins += 1
            self.valid = f"token-{self.logins}"
            answer = web.Response(status=302, headers={"Location": "/after-login"})
            answer.set_cookie("access-token", self.valid)
            return answer
        body = await request.read()
        self.requests.append((request.method, request.path, request.headers.get("Cookie"), body))
        if request.headers.get("Authorization") == basic("ui", "ui-password"):
            good = request.cookies.get("access-token") == self.valid
            return web.Response(text="in") if good else web.Response(status=401, text="out")
        return web.Response(status=403, text=request.headers.get("Authorization", "none"))


@pytest.fixture
def gradio() -> Iterator[tuple[Gradio, Gate]]:
    site = Gradio()
    with serve(site.handle) as port, open_gate(port, None, upstream_login=Login("ui", "ui-password")) as gate:
        yield site, gate


def test_the_servers_login_is_entered_once_and_its_cookie_joins_the_visitors_own(gradio: Any) -> None:
    site, gate = gradio
    for _ in range(3):
        assert send(gate.port, "/page", "Cookie: mine=1")[2] == b"in"
    assert site.requests[0] == ("login", "POST", "ui", "ui-password")
    assert [line[2] for line in site.requests[1:]] == ["mine=1; access-token=token-1"] * 3
    assert not any(line[1] == "/after-login" for line in site.requests), "the gate does not wander about"


def test_a_visitors_own_login_is_not_replaced(gradio: Any) -> None:
    _site, gate = gradio
    own = basic("me", "my-own-password")
    assert send(gate.port, "/page", f"Authorization: {own}")[2].decode() == own


def test_after_a_restart_the_gate_logs_in_anew_but_sends_no_body_twice(gradio: Any) -> None:
    site, gate = gradio
    assert send(gate.port, "/page")[0] == 200
    site.valid = "nobody has this"
    assert send(gate.port, "/job", method="POST", body=b"paint")[0] == 401
    assert [line for line in site.requests if line[0] == "POST"] == [("POST", "/job", "access-token=token-1", b"paint")]
    assert site.logins == 1
    assert send(gate.port, "/page")[0] == 200
    assert site.logins == 2
    assert send(gate.port, "/job", method="POST", body=b"paint")[0] == 200


def test_who_is_told_of_a_restart_logs_in_anew_before_it_asks(gradio: Any) -> None:
    site, gate = gradio
    assert send(gate.port, "/page")[0] == 200
    gate.forget_upstream_login()
    assert send(gate.port, "/page")[0] == 200
    assert site.logins == 2
    assert [line[1] for line in site.requests] == ["POST", "/page", "POST", "/page"]


def test_a_server_that_refuses_its_own_login_is_asked_once_and_said(gradio: Any, caplog: Any) -> None:
    site, gate = gradio
    site.accepts = False
    with caplog.at_level(logging.WARNING, "fastsd_helpers"):
        assert send(gate.port, "/page")[0] == 401
    assert "does not accept its own login" in caplog.text
    pages = [line for line in site.requests if line[0] == "GET"]
    assert len(pages) == 2, "once, and once more after it had logged in anew"


def test_a_server_without_a_login_page_is_not_complained_about(caplog: Any) -> None:
    async def handler(request: Any) -> Any:
        from aiohttp import web

        if request.path == "/login":
            return web.Response(status=404)
        return web.Response(text=request.headers["Authorization"] + str(request.headers.get("Cookie")))

    with serve(handler) as port, open_gate(port, None, upstream_login=Login("ui", "ui-password")) as gate:
        assert send(gate.port, "/api")[2].decode() == basic("ui", "ui-password") + "None"
    assert "own login" not in caplog.text


def test_a_server_that_went_away_is_logged_in_at_again() -> None:
    site, port = Gradio(), free_port()
    with open_gate(port, None, upstream_login=Login("ui", "ui-password")) as gate:
        for expected in (1, 2):
            with serve(site.handle, port):
                assert send(gate.port, "/page")[0] == 200
                assert site.logins == expected
            assert send(gate.port, "/page")[0] == 502


# ------------------------------------------------------------------------------------------------------- sockets


async def socket_handler(request: Any) -> Any:
    """A socket that says what it was asked with, and ends as it is told."""
    from aiohttp import WSMsgType, web

    if request.path == "/plain":
        return web.Response(text="no socket")
    if request.path in ("/400", "/404", "/503"):
        return web.Response(status=int(request.path[1:]))
    ws = web.WebSocketResponse(protocols=("one", "two"), autoping=False)
    await ws.prepare(request)
    await ws.send_json({"headers": {name.lower(): value for name, value in request.headers.items()}})
    async for message in ws:
        if message.type == WSMsgType.PING:
            await ws.send_str("ping " + bytes(message.data).decode())
        elif message.type == WSMsgType.PONG:
            await ws.send_str("pong " + bytes(message.data).decode())
        elif message.data == "ping me":
            await ws.ping(b"from the server")
        elif message.data == "abort":
            request.transport.abort()
        else:
            await ws.close(code=int(message.data), message=b"as told")
    CLOSED.append(ws.close_code)
    return ws


CLOSED: list[int | None] = []


@contextlib.asynccontextmanager
async def opened(gate: Gate, path: str = "/", **more: Any) -> Any:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{gate.url}{path}", autoping=False, **more) as ws,
    ):
        yield ws


@pytest.fixture
def sockets() -> Iterator[Gate]:
    CLOSED.clear()
    with serve(socket_handler) as port, open_gate(port, None) as gate:
        yield gate


def test_the_subprotocol_is_the_servers_choice_among_the_visitors(sockets: Gate) -> None:
    async def talk() -> None:
        for offered, chosen in [(("zero", "two", "one"), "two"), ((), None), (("zero",), None)]:
            async with opened(sockets, protocols=offered) as ws:
                assert ws.protocol == chosen
                headers = (await ws.receive_json())["headers"]
                assert headers.get("sec-websocket-protocol", "").replace(" ", "") == ",".join(offered)
                assert headers["x-forwarded-for"] == "127.0.0.1"

    asyncio.run(talk())


def test_pings_and_pongs_pass_too(sockets: Gate) -> None:
    async def talk() -> None:
        async with opened(sockets) as ws:
            await ws.receive_json()
            await ws.ping(b"a")
            assert await ws.receive_str() == "ping a"
            await ws.pong(b"b")
            assert await ws.receive_str() == "pong b"
            await ws.send_str("ping me")
            message = await ws.receive()
            assert (message.type, bytes(message.data)) == (aiohttp.WSMsgType.PING, b"from the server")

    asyncio.run(talk())


@pytest.mark.parametrize(("told", "code"), [("1000", 1000), ("1001", 1001), ("4321", 4321), ("abort", 1000)])
def test_how_a_socket_ended_is_passed_on(sockets: Gate, told: str, code: int) -> None:
    async def talk() -> None:
        async with opened(sockets) as ws:
            await ws.receive_json()
            await ws.send_str(told)
            closing = await ws.receive(10)
            assert (closing.type, closing.data) == (aiohttp.WSMsgType.CLOSE, code)

    asyncio.run(talk())


def test_a_visitor_who_closes_a_socket_closes_it_behind_too(sockets: Gate) -> None:
    async def talk() -> None:
        async with opened(sockets) as ws:
            await ws.receive_json()
            await ws.close()
        for _ in range(200):
            if CLOSED:
                break
            await asyncio.sleep(0.02)

    asyncio.run(talk())
    assert len(CLOSED) == 1


@pytest.mark.parametrize(("path", "status"), [("/plain", 502), ("/400", 400), ("/404", 404), ("/503", 503)])
def test_where_no_socket_is_it_is_said(sockets: Gate, path: str, status: int) -> None:
    async def talk() -> int:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with opened(sockets, path):
                pass
        return caught.value.status

    assert asyncio.run(talk()) == status
