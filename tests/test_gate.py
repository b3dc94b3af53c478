"""The login gate: nobody passes without the password, and whoever passes notices nothing of it."""

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")

from tunnel_doubles import free_port, serve, site_handler  # noqa: E402

from fastsd_helpers.errors import SettingsError  # noqa: E402
from fastsd_helpers.tunnels import Gate, Login, make_login, open_gate  # noqa: E402
from fastsd_helpers.tunnels.gate.login import LoginLimiter  # noqa: E402
from fastsd_helpers.tunnels.gate.pages import own_path  # noqa: E402
from fastsd_helpers.tunnels.gate.passing import ClosedPath  # noqa: E402
from fastsd_helpers.tunnels.gate.server import ALIVE_PATH  # noqa: E402

LOGIN = Login("fastsd", "right-password-1")
BASIC = {"Authorization": "Basic " + base64.b64encode(b"fastsd:right-password-1").decode()}


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any, **_more: Any) -> None:
        return None


def ask(url: str, *, data: bytes | None = None, method: str | None = None, **headers: str) -> tuple[int, Any, bytes]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data=data, headers=names, method=method)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as err:
        with err:
            return err.code, err.headers, err.read()


def log_in(gate: Gate, password: str = LOGIN.password, **more: str) -> tuple[int, Any, bytes]:
    form = urllib.parse.urlencode({"user": LOGIN.user, "password": password, "next": "/headers?a=1", **more})
    return ask(f"{gate.url}/.fastsd/login", data=form.encode())


@pytest.fixture
def site() -> Iterator[int]:
    with serve(site_handler) as port:
        yield port


@pytest.fixture
def gate(site: int) -> Iterator[Gate]:
    with open_gate(site, LOGIN) as gate:
        yield gate


# ---------------------------------------------------------------------------------------------------- who passes


def test_a_stranger_gets_nothing_but_the_login_page(gate: Gate) -> None:
    status, headers, _ = ask(f"{gate.url}/headers?a=1", Accept="text/html,*/*")
    assert status == 303
    assert headers["Location"] == "/.fastsd/login?next=%2Fheaders%3Fa%3D1"
    status, headers, text = ask(f"{gate.url}{headers['Location']}")
    assert status == 200
    assert b"This page needs a login" in text
    assert b'value="/headers?a=1"' in text
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    for method, path in (("GET", "/internal/sysinfo"), ("POST", "/sdapi/v1/txt2img"), ("PUT", "/x"), ("OPTIONS", "/")):
        status, headers, text = ask(f"{gate.url}{path}", method=method)
        assert (status, text) == (401, b"A user name and password are needed.\n")
        assert headers["WWW-Authenticate"].startswith("Basic ")


def test_a_script_of_a_page_is_refused_without_the_browsers_own_dialogue(gate: Gate) -> None:
    status, headers, _ = ask(f"{gate.url}/headers", Sec_Fetch_Mode="cors")
    assert status == 401
    assert "WWW-Authenticate" not in headers


def test_the_password_opens_it_and_a_cookie_keeps_it_open(gate: Gate) -> None:
    status, headers, _ = log_in(gate)
    assert (status, headers["Location"]) == (303, "/headers?a=1")
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert "Secure" not in cookie
    name = cookie.split(";")[0]
    assert LOGIN.password not in cookie
    status, _, text = ask(f"{gate.url}/headers?a=1", Cookie=f"mine=1; {name}; other=2")
    assert status == 200
    seen = dict(json.loads(text)["headers"])
    assert seen["Cookie"] == "mine=1; other=2"
    status, _, _ = ask(f"{gate.url}/headers", Cookie=name[:-1] + "x")
    assert status == 401
    status, _, text = ask(f"{gate.url}/.fastsd/logout", Cookie=name)
    assert (status, b"Log out here?" in text) == (200, True)
    assert ask(f"{gate.url}/headers", Cookie=name)[0] == 200, "to be asked is not to be logged out"
    assert ask(f"{gate.url}/.fastsd/logout", method="POST", Cookie=name)[0] == 303
    assert ask(f"{gate.url}/headers", Cookie=name)[0] == 401


def test_over_https_the_cookie_is_for_https_and_this_host_alone(gate: Gate) -> None:
    form = urllib.parse.urlencode({"user": LOGIN.user, "password": LOGIN.password}).encode()
    plain = ask(f"{gate.url}/.fastsd/login", data=form)[1]["Set-Cookie"].split(";")[0]
    assert plain.startswith("fastsd_gate=")
    gate.set_public_url("https://calm-fox.example")
    for said in ({"Host": "calm-fox.example"}, {"X_Forwarded_Proto": "https"}):
        _, headers, _ = ask(f"{gate.url}/.fastsd/login", data=form, **said)
        assert headers["Location"] == "/"
        cookie = headers["Set-Cookie"]
        assert cookie.startswith("__Host-fastsd_gate=")
        assert {"Secure", "Path=/", "HttpOnly", "SameSite=Lax"} <= {part.strip() for part in cookie.split(";")}
        assert "Domain" not in cookie
        assert ask(f"{gate.url}/headers", Cookie=cookie.split(";")[0], **said)[0] == 200
        refused = ask(f"{gate.url}/headers", Cookie=plain, **said)[0]
        assert refused == 401, "the name that a neighbour can set does not count"


def test_a_program_on_this_machine_keeps_its_cookie_without_https(gate: Gate) -> None:
    gate.set_public_url("https://calm-fox.example")
    form = urllib.parse.urlencode({"user": LOGIN.user, "password": LOGIN.password}).encode()
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with opener.open(f"{gate.url}/.fastsd/login", data=form, timeout=20):
        pass
    with opener.open(f"{gate.url}/headers", timeout=20) as answer:
        assert answer.status == 200


def test_a_cookie_does_not_last_longer_than_it_should(site: int) -> None:
    with open_gate(site, LOGIN, session_s=4.0) as gate:
        name = log_in(gate)[1]["Set-Cookie"].split(";")[0]
        assert ask(f"{gate.url}/headers", Cookie=name)[0] == 200
        time.sleep(4.1)
        assert ask(f"{gate.url}/headers", Cookie=name)[0] == 401


def test_programs_pass_with_basic_authentication_and_it_goes_no_further(gate: Gate) -> None:
    status, _, text = ask(f"{gate.url}/headers", **BASIC)
    assert status == 200
    assert "Authorization" not in dict(json.loads(text)["headers"])
    wrong = {"Authorization": "Basic " + base64.b64encode(b"fastsd:wrong").decode()}
    assert ask(f"{gate.url}/headers", **wrong)[0] == 401
    assert ask(f"{gate.url}/headers", Authorization="Basic ###")[0] == 401
    assert ask(f"{gate.url}/headers", Authorization="Bearer abc")[0] == 401


@pytest.fixture
def told(site: int) -> Iterator[Gate]:
    """A gate behind a service that tells the visitors' addresses."""
    with open_gate(site, LOGIN, address_header="CF-Connecting-IP") as gate:
        yield gate


STRANGER, OWNER = {"CF-Connecting-IP": "203.0.113.1"}, {"CF-Connecting-IP": "203.0.113.2"}


def guess(gate: Gate, password: str = LOGIN.password, **headers: str) -> tuple[int, Any, bytes]:
    form = urllib.parse.urlencode({"user": LOGIN.user, "password": password})
    return ask(f"{gate.url}/.fastsd/login", data=form.encode(), **headers)


def test_a_wrong_password_a_hundred_times_is_refused_and_slowed_down(told: Gate) -> None:
    answers = [guess(told, f"guess-{number}", **STRANGER) for number in range(100)]
    statuses = [status for status, _, _ in answers]
    assert statuses[:5] == [401] * 5
    assert set(statuses[5:]) == {429}
    assert b"Wrong user or password." in answers[0][2]
    assert b"Too many wrong tries: wait" in answers[-1][2]
    assert 1 <= int(answers[-1][1]["Retry-After"]) <= 61
    assert guess(told, **STRANGER)[0] == 429, "the right password must not be found out by going on trying"
    assert guess(told, **OWNER)[0] == 303, "somebody else is not kept out"


def test_after_a_wrong_password_the_user_name_stands_there_still_and_only_the_password_is_typed_again(
    told: Gate,
) -> None:
    form = {"user": ' Ann "of" <O\'Hara> ', "password": "not-the-password", "next": "/"}
    asked = {"data": urllib.parse.urlencode(form).encode(), **STRANGER}
    # The first tries are wrong, further ones have to wait: both pages ask again.
    pages = [ask(f"{told.url}/.fastsd/login", **asked) for _ in range(12)]
    assert {status for status, _, _ in pages} == {401, 429}
    for _status, _headers, page in pages:
        [user, password] = [row for row in page.decode().splitlines() if " id=" in row]
        assert 'value="Ann &quot;of&quot; &lt;O&#x27;Hara&gt;"' in user
        assert "autofocus" in password
        assert "autofocus" not in user
        assert "not-the-password" not in page.decode()
    first = ask(f"{told.url}/.fastsd/login")[2].decode()
    assert 'value=""' in first
    assert "autofocus" in next(row for row in first.splitlines() if 'id="user"' in row)


def test_thirty_wrong_tries_of_a_stranger_keep_neither_the_owner_nor_a_program_out(site: int) -> None:
    """At a service that tells no addresses, so that all look the same; a minute is one second here."""
    limiter = LoginLimiter(5, 30, 1.0)
    with open_gate(site, LOGIN, limiter=limiter) as gate:
        assert [log_in(gate, f"guess-{number}")[0] for number in range(30)] == [401] * 30
        assert log_in(gate)[0] == 303
        assert [ask(f"{gate.url}/headers", **BASIC)[0] for _ in range(20)] == [200] * 20


def test_a_flood_of_guesses_gets_no_more_tries_and_the_owners_password_gets_its_turn(site: int) -> None:
    limiter = LoginLimiter(5, 30, 3.0)
    statuses, done = [], threading.Event()

    def stranger(number: int) -> None:
        while not done.is_set():
            statuses.append(guess(gate, f"guess-{number}", **{"X-Forwarded-For": f"198.51.100.{number}"})[0])

    with open_gate(site, LOGIN, limiter=limiter) as gate:
        start = time.monotonic()
        threads = [threading.Thread(target=stranger, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        # Each answer comes within half a window; a program that is told to wait comes again.
        for _ in range(40):
            if ask(f"{gate.url}/headers", **BASIC)[0] == 200:
                break
        else:
            pytest.fail("the right password never had its turn")
        done.set()
        for thread in threads:
            thread.join(20)
        windows = (time.monotonic() - start) / 3.0 + 1
    assert statuses.count(401) <= 30 * windows


def test_a_password_that_was_made_up_here_never_waits(site: int) -> None:
    login = Login("fastsd", "abcd-efgh-jkm2-npq3")
    assert login.strong
    right = {"Authorization": "Basic " + base64.b64encode(f"fastsd:{login.password}".encode()).decode()}
    limiter = LoginLimiter(2, 2, 3600, now=lambda: 0.0)
    with open_gate(site, login, limiter=limiter, address_header="CF-Connecting-IP") as gate:
        limiter.failed("203.0.113.1")
        limiter.failed("203.0.113.1")
        assert ask(f"{gate.url}/headers", **basic("wrong"), **STRANGER)[0] == 429
        assert ask(f"{gate.url}/headers", **right, **STRANGER)[0] == 200


def test_who_is_in_stays_in_while_a_stranger_guesses(gate: Gate) -> None:
    name = log_in(gate)[1]["Set-Cookie"].split(";")[0]
    for number in range(10):
        log_in(gate, f"guess-{number}")
    assert ask(f"{gate.url}/headers", Cookie=name)[0] == 200


@pytest.mark.parametrize(("per_address", "overall"), [(2, 30), (7, 30), (5, 1)])
def test_the_bounds_that_were_given_are_those_of_the_gate(site: int, per_address: int, overall: int) -> None:
    clock = [0.0]
    limiter = LoginLimiter(per_address, overall, 0.4, now=lambda: clock[0])
    with open_gate(site, LOGIN, limiter=limiter, address_header="CF-Connecting-IP") as gate:
        allowed = min(per_address, overall)
        statuses = [guess(gate, f"guess-{number}", **STRANGER)[0] for number in range(allowed + 2)]
        assert statuses == [401] * allowed + [429] * 2
        assert guess(gate, **STRANGER)[0] == 429
        assert limiter.wait_s("203.0.113.1") == 0.4
        clock[0] = 0.5
        assert guess(gate, **STRANGER)[0] == 303, "its clock is the one that counts"


def test_two_gates_may_share_one_count(site: int) -> None:
    limiter, told = LoginLimiter(3, 30, 60), "CF-Connecting-IP"
    with (
        open_gate(site, LOGIN, limiter=limiter, address_header=told) as one,
        open_gate(site, LOGIN, limiter=limiter, address_header=told) as other,
    ):
        statuses = [guess(gate, "guess", **STRANGER)[0] for gate in (one, other, one, other)]
    assert statuses == [401, 401, 401, 429]


@pytest.mark.parametrize(
    "place",
    [
        *("//evil.example", "/\\evil.example", "https://evil.example", "", "/a\r\nSet-Cookie: b"),
        *("/file=https://evil.example", "/file=https%3A%2F%2Fevil.example", "/file=https%253A%252F%252Fevil.example"),
        *(
            "/%2F/evil.example",
            "/%5Cevil.example",
            "/?to=//evil.example",
            "/file=https:evil.example",
            "/a\x85b",
            "/\x7f",
        ),
        *("/.fastsd/logout", "/%2Efastsd/login", "/../x", "/%252e%252e/x", "javascript:alert(1)", "/" + "a" * 3000),
        *("/\ud800", "/\x7f", "\t//evil.example", " /a", "/a%0d%0ab", "/?a=%0d%0ab", "/%09/evil.example"),
    ],
)
def test_the_login_page_sends_nobody_elsewhere(place: str) -> None:
    assert own_path(place) == "/"


def test_what_a_visitor_types_does_not_become_html(gate: Gate) -> None:
    _, _, text = ask(f"{gate.url}/.fastsd/login?next=" + urllib.parse.quote('/"><script>alert(1)</script>'))
    assert b"<script>" not in text


def test_a_huge_or_strange_login_form_is_refused(gate: Gate) -> None:
    assert ask(f"{gate.url}/.fastsd/login", data=b"x" * 5000)[0] == 413
    assert ask(f"{gate.url}/.fastsd/login", data=b"", method="DELETE")[0] == 405


def test_it_says_to_anyone_that_it_is_alive_and_nothing_else(gate: Gate) -> None:
    status, headers, text = ask(f"{gate.url}{ALIVE_PATH}")
    assert (status, text.decode(), headers["Cache-Control"]) == (200, gate.nonce, "no-store")


def test_it_listens_on_this_machine_alone_and_is_no_forward_proxy(gate: Gate) -> None:
    assert gate.url.startswith("http://127.0.0.1:")
    with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as raw:
        token = BASIC["Authorization"]
        raw.sendall(f"GET http://example.com/ HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n\r\n".encode())
        assert b" 400 " in raw.recv(4096)


@pytest.mark.parametrize(
    ("user", "password"), [("a b", ""), ("", ""), ("a:b", ""), ("a", "short"), ("a", "with,a-comma-1")]
)
def test_a_login_that_web_uis_cannot_take_is_refused(user: str, password: str) -> None:
    with pytest.raises(SettingsError):
        make_login(user, password)


def test_a_made_up_password_is_long_and_new_every_time() -> None:
    one, two = make_login(), make_login()
    assert one.user == "fastsd"
    assert one.password != two.password
    assert len(one.password) == 19
    assert one.password not in repr(one)


# ----------------------------------------------------------------------------------------------- what passes through


def test_requests_arrive_as_they_were_sent(gate: Gate) -> None:
    path = "/headers?x=%2F%2F&y=a+b&z=%C3%A9"
    _, _, text = ask(
        f"{gate.url}{path}", Accept="x/y", X_Mine="1", X_Forwarded_Proto="https", Host="a.example", **BASIC
    )
    seen = json.loads(text)
    headers = {name.title(): value for name, value in seen["headers"]}
    assert seen["path"] == path
    assert (headers["Accept"], headers["X-Mine"], headers["Host"]) == ("x/y", "1", "a.example")
    assert headers["X-Forwarded-Proto"] == "https"
    assert headers["X-Forwarded-Host"] == "a.example"
    assert headers["X-Forwarded-For"] == "127.0.0.1"
    assert headers["User-Agent"].startswith("Python-urllib"), "the visitor's own"


def test_where_a_tunnel_hides_the_public_name_it_is_put_back(gate: Gate) -> None:
    gate.set_public_url("https://calm-fox.example")
    headers = {name.title(): value for name, value in json.loads(ask(f"{gate.url}/headers", **BASIC)[2])["headers"]}
    assert headers["Host"] == headers["X-Forwarded-Host"] == "calm-fox.example"
    assert headers["X-Forwarded-Proto"] == "https"


def test_answers_arrive_as_they_were_given(gate: Gate, site: int) -> None:
    _, headers, _ = ask(f"{gate.url}/cookies", **BASIC)
    assert [line.split(";")[0] for line in headers.get_all("Set-Cookie")] == ["one=1", "two=2"]
    status, headers, _ = ask(f"{gate.url}/elsewhere?port={site}", **BASIC)
    assert (status, headers["Location"]) == (302, "/headers")
    status, headers, text = ask(f"{gate.url}/", method="HEAD", **BASIC)
    assert (status, headers["Content-Length"], text) == (200, "17", b"")


def test_half_an_answer_does_not_look_like_a_whole_one(gate: Gate) -> None:
    import http.client

    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        ask(f"{gate.url}/half", **BASIC)


@pytest.mark.parametrize("kind", ["application/octet-stream", "text/event-stream"])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_half_an_answer_of_unknown_length_does_not_look_like_a_whole_one_either(
    gate: Gate, kind: str, parts: int
) -> None:
    """As the downloads and event streams of Gradio are sent: only the last chunk says that nothing is missing."""
    import http.client

    path = f"/chunks?parts={parts}&kind={kind}"
    status, headers, whole = ask(f"{gate.url}{path}", **BASIC)
    assert (status, headers["Content-Length"], headers["Transfer-Encoding"]) == (200, None, "chunked")
    assert whole == b"part" * parts
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(f"{gate.url}{path}&cut=1", **BASIC)

    # Byte for byte, for a visitor with a parser of its own: the last chunk must not come.
    with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as visitor:
        visitor.sendall(
            f"GET {path}&cut=1 HTTP/1.1\r\nHost: a\r\nAuthorization: {BASIC['Authorization']}\r\n\r\n".encode()
        )
        received = b""
        with contextlib.suppress(ConnectionError):
            while more := visitor.recv(65536):
                received += more
    assert not received.endswith(b"0\r\n\r\n")
    assert received.count(b"part\r\n") <= parts


def test_a_server_that_does_not_answer_is_said_so() -> None:
    with open_gate(free_port(), LOGIN) as gate:
        status, _, text = ask(f"{gate.url}/", **BASIC)
    assert status == 502
    assert b"does not answer" in text


def test_events_arrive_when_they_are_sent(gate: Gate) -> None:
    request = urllib.request.Request(f"{gate.url}/events", headers=BASIC)
    with urllib.request.urlopen(request, timeout=20) as answer:
        late = []
        for line in answer:
            if line.startswith(b"data:"):
                late.append(time.monotonic() - float(line.split()[2]))
    assert len(late) == 3
    assert max(late) < 0.25, "events must not wait for each other"


def test_sockets_pass_text_bytes_protocol_and_the_closing_code(gate: Gate) -> None:
    async def talk() -> None:
        async with aiohttp.ClientSession(headers=BASIC) as session:
            url = f"{gate.url}/socket"
            async with session.ws_connect(url, protocols=("graphql-ws",), max_msg_size=0) as ws:
                assert ws.protocol == "graphql-ws"
                await ws.send_str("hello")
                assert await ws.receive_str() == "you said hello"
                large = bytes(range(256)) * 2**14
                await ws.send_bytes(large)
                assert await ws.receive_bytes() == large[::-1]
                await ws.send_str("bye")
                closing = await ws.receive()
                assert (closing.type, closing.data) == (aiohttp.WSMsgType.CLOSE, 4001)
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await session.ws_connect(f"{gate.url}/headers")

    asyncio.run(talk())


def test_a_socket_without_the_password_is_not_opened(gate: Gate) -> None:
    async def talk() -> int:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await session.ws_connect(f"{gate.url}/socket")
            return caught.value.status

    assert asyncio.run(talk()) == 401


def _upload(port: int, total: int) -> dict[str, Any]:
    """Send so many bytes as a browser sends a file, without holding them; gives the server's count and hash."""
    block = bytes(range(256)) * 4096
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
        head = f"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: {total}\r\nAuthorization: {BASIC['Authorization']}"
        raw.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
        left = total
        while left:
            raw.sendall(memoryview(block)[: min(left, len(block))])
            left -= min(left, len(block))
        answer = b""
        while part := raw.recv(65536):
            answer += part
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


def _hash_of(total: int) -> str:
    block, digest, left = bytes(range(256)) * 4096, hashlib.sha256(), total
    while left:
        digest.update(memoryview(block)[: min(left, len(block))])
        left -= min(left, len(block))
    return digest.hexdigest()


def test_an_upload_arrives_whole(gate: Gate) -> None:
    total = 20_000_001
    assert _upload(gate.port, total) == {"bytes": total, "sha256": _hash_of(total)}


def test_bodies_whose_length_nobody_knows_arrive_whole() -> None:
    async def mirror(request: Any) -> Any:
        from aiohttp import web

        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        async for part in request.content.iter_any():
            await response.write(part)
        await response.write_eof()
        return response

    sent = bytes(range(256)) * 12345

    async def talk(gate: Gate) -> bytes:
        async def parts() -> Any:
            for start in range(0, len(sent), 100_001):
                yield sent[start : start + 100_001]

        async with (
            aiohttp.ClientSession(headers=BASIC) as session,
            session.post(f"{gate.url}/mirror", data=parts()) as answer,
        ):
            assert "Content-Length" not in answer.headers
            return await answer.read()

    with serve(mirror) as port, open_gate(port, LOGIN) as gate:
        assert asyncio.run(talk(gate)) == sent


@pytest.mark.slow
def test_an_upload_of_a_gigabyte_is_held_nowhere(gate: Gate) -> None:
    from fastsd_helpers.device import peak_memory_bytes

    before = peak_memory_bytes()
    assert _upload(gate.port, 10**9) == {"bytes": 10**9, "sha256": _hash_of(10**9)}
    assert peak_memory_bytes() - before < 100e6


@pytest.mark.slow
def test_a_hundred_megabytes_cost_the_gate_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
    import measure_gate

    # Processor time, not the clock: server, gate and visitor want a core each, and this machine may have other work.
    # scripts/measure_gate.py compares by the clock.
    for way, row in measure_gate.measure(rounds=3).items():
        sys.stdout.write(f"{way}: {row}\n")
        assert row["processor"] < 0.4, way  # 0.06 s when this was written


def test_a_visitor_who_leaves_frees_the_server(site: int) -> None:
    left = threading.Event()

    async def handler(request: Any) -> Any:
        from aiohttp import web

        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x")
                await asyncio.sleep(0.05)
        except (ConnectionError, asyncio.CancelledError):
            left.set()
            raise

    with serve(handler) as port, open_gate(port, LOGIN) as gate:
        answer = urllib.request.urlopen(urllib.request.Request(f"{gate.url}/", headers=BASIC), timeout=10)
        answer.read(1)
        answer.close()
        assert left.wait(5)


# -------------------------------------------------------------------------------------- the server's own login


def gradio_like(accepted: dict[str, int]) -> Any:
    """A site with Gradio's login (`POST /login`, a cookie) and AUTOMATIC1111's API login (basic)."""

    async def handler(request: Any) -> Any:
        from aiohttp import web

        if request.path == "/login":
            form = await request.post()
            if (form["username"], form["password"]) != ("ui", "ui-password"):
                return web.Response(status=400)
            accepted["logins"] = accepted.get("logins", 0) + 1
            response = web.json_response({"success": True})
            response.set_cookie("access-token", f"token-{accepted['logins']}")
            return response
        good_cookie = request.cookies.get("access-token") == f"token-{accepted.get('logins', 0) + accepted['lost']}"
        basic = base64.b64encode(b"ui:ui-password").decode()
        if request.path == "/page":
            return web.Response(text="page") if good_cookie else web.Response(status=401)
        good = request.headers.get("Authorization") == f"Basic {basic}"
        return web.Response(text="api") if good else web.Response(status=401)

    return handler


def test_a_visitor_logs_in_once_and_the_gate_logs_in_behind() -> None:
    accepted = {"lost": 0}
    with (
        serve(gradio_like(accepted)) as port,
        open_gate(port, LOGIN, upstream_login=Login("ui", "ui-password")) as gate,
    ):
        assert ask(f"{gate.url}/page")[0] == 401
        assert ask(f"{gate.url}/page", **BASIC)[2] == b"page"
        assert ask(f"{gate.url}/api", **BASIC)[2] == b"api"
        assert accepted["logins"] == 1
        accepted["logins"] = 7  # as after a restart: the old cookie is worth nothing
        assert ask(f"{gate.url}/page", **BASIC)[2] == b"page"
        assert accepted["logins"] == 8


def test_without_a_login_everyone_passes() -> None:
    with serve(site_handler) as port, open_gate(port, None) as gate:
        assert ask(f"{gate.url}/headers")[0] == 200
        assert ask(f"{gate.url}{ALIVE_PATH}")[2].decode() == gate.nonce


def test_closing_frees_the_port_and_can_be_done_twice(site: int) -> None:
    gate = open_gate(site, LOGIN)
    gate.close()
    gate.close()
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", gate.port), timeout=2)


# ------------------------------------------------------------------------------------ wrong tries, forms and cookies


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"fastsd:{password}".encode()).decode()}


def test_wrong_basic_passwords_are_counted_too_and_a_right_one_forgives(told: Gate) -> None:
    for _ in range(2):
        assert [ask(f"{told.url}/headers", **basic(f"no-{n}"), **STRANGER)[0] for n in range(4)] == [401] * 4
        assert ask(f"{told.url}/headers", **BASIC, **STRANGER)[0] == 200
    assert [ask(f"{told.url}/headers", **basic("no"), **STRANGER)[0] for _ in range(7)] == [401] * 5 + [429] * 2
    status, headers, text = ask(f"{told.url}/headers", **BASIC, **STRANGER)
    assert status == 429
    wait = int(headers["Retry-After"])
    assert 1 <= wait <= 61
    assert f"wait {wait} seconds".encode() in text
    assert guess(told, **STRANGER)[0] == 429, "the form is closed to this visitor as well"


def test_the_right_password_in_the_form_forgives_wrong_ones(gate: Gate) -> None:
    for _ in range(2):
        assert [log_in(gate, f"no-{n}")[0] for n in range(4)] == [401] * 4
        assert log_in(gate)[0] == 303


def test_requests_without_any_password_are_no_wrong_tries(gate: Gate) -> None:
    for number in range(8):
        assert ask(f"{gate.url}/headers", **({"Authorization": "Bearer x"} if number % 2 else {}))[0] == 401
    assert ask(f"{gate.url}/headers", **BASIC)[0] == 200


@pytest.mark.parametrize("header", ["CF-Connecting-IP", "X-Forwarded-For", None])
def test_an_address_is_believed_only_from_the_service_that_sets_it(site: int, header: str | None) -> None:
    limiter = LoginLimiter(2, 1000, 60)

    def tries(**headers: str) -> list[int]:
        return [ask(f"{gate.url}/headers", **basic("no"), **headers)[0] for _ in range(3)]

    free, bound = [401] * 3, [401, 401, 429]
    with open_gate(site, LOGIN, limiter=limiter, address_header=header) as gate:
        cloudflare, forwarded = header == "CF-Connecting-IP", header == "X-Forwarded-For"
        assert tries(CF_Connecting_IP="203.0.113.7") == (bound if cloudflare else free)
        assert tries(X_Forwarded_For="203.0.113.8") == (bound if forwarded else free)
        assert tries(X_Forwarded_For="203.0.113.9, 203.0.113.10") == (bound if forwarded else free)
        last = tries(X_Forwarded_For="203.0.113.66, 203.0.113.10")
        assert last == ([429] * 3 if forwarded else free), "only the last entry is the service's own"
        assert tries(X_Forwarded_For="203.0.113.9") == (bound if forwarded else free), "a victim that was named is free"
        if header:
            name = header.replace("-", "_")
            assert tries(**{name: "10.1.2.3"}) == free, "a machine before the service is not a visitor"
            assert tries(**{name: "made up"}) == free
            assert tries(**{name: "2001:db8:1:2::1"}) == bound
            assert tries(**{name: "2001:db8:1:2:ffff::9"}) == [429] * 3, "who has one of a /64 has all"
            assert tries(**{name: "::ffff:203.0.113.77"}) == bound
            assert tries(**{name: "203.0.113.77"}) == [429] * 3


def test_only_who_asks_for_a_page_is_led_to_the_form(gate: Gate) -> None:
    for method, accept, status in [
        ("GET", "text/html", 303),
        ("HEAD", "text/html;q=0.9", 303),
        ("POST", "text/html", 401),
        ("GET", "application/json", 401),
    ]:
        assert ask(f"{gate.url}/headers", method=method, Accept=accept)[0] == status, (method, accept)
    status, headers, _ = ask(f"{gate.url}/.fastsd/login", method="HEAD")
    assert (status, headers["Cache-Control"], headers["Content-Type"].split(";")[0]) == (200, "no-store", "text/html")
    assert ask(f"{gate.url}/.fastsd/login", method="PUT", data=b"x")[1]["Allow"] == "GET, POST"


def test_a_form_is_taken_up_to_its_bound_and_blanks_around_its_fields_do_not_count(gate: Gate) -> None:
    form = urllib.parse.urlencode({"user": " fastsd ", "password": f" {LOGIN.password}\n", "next": "/a"}).encode()
    largest = form + b"&more=" + b"x" * (4096 - len(form) - len(b"&more="))
    assert ask(f"{gate.url}/.fastsd/login", data=largest)[0] == 303
    assert ask(f"{gate.url}/.fastsd/login", data=largest + b"x")[0] == 413
    assert ask(f"{gate.url}/.fastsd/login", data=b"", method="POST")[0] == 413
    wrong_user = urllib.parse.urlencode({"user": "other", "password": LOGIN.password}).encode()
    assert ask(f"{gate.url}/.fastsd/login", data=wrong_user)[0] == 401


def test_the_cookie_is_kept_as_long_as_the_session_and_each_visitor_has_one(site: int) -> None:
    with open_gate(site, LOGIN, session_s=1234.5) as gate:
        first, second = (log_in(gate)[1]["Set-Cookie"] for _ in range(2))
        assert "Max-Age=1234;" in first
        one, two = first.split(";")[0], second.split(";")[0]
        assert one != two
        status, headers, _ = ask(f"{gate.url}/.fastsd/logout", method="POST", Cookie=one)
        assert (status, headers["Location"]) == (303, "/.fastsd/login")
        assert "Max-Age=0" in headers["Set-Cookie"]
        assert ask(f"{gate.url}/headers", Cookie=one)[0] == 401
        assert ask(f"{gate.url}/headers", Cookie=two)[0] == 200, "the other visitor is still in"
    with open_gate(site, LOGIN) as gate:
        assert "Max-Age=604800;" in log_in(gate)[1]["Set-Cookie"], "a week"


def test_of_a_thousand_sessions_the_oldest_makes_room(site: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsd_helpers.tunnels.gate import cookie as module

    monkeypatch.setattr(module, "_MOST_SESSIONS", 3)
    with open_gate(site, LOGIN) as gate:
        cookies = [log_in(gate)[1]["Set-Cookie"].split(";")[0] for _ in range(5)]
        assert [ask(f"{gate.url}/headers", Cookie=cookie)[0] for cookie in cookies] == [401, 401, 200, 200, 200]


def test_sessions_that_are_over_take_no_room(site: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsd_helpers.tunnels.gate import cookie as module

    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda now=time.monotonic: now() + clock[0])
    with open_gate(site, LOGIN, session_s=60) as gate:
        over = log_in(gate)[1]["Set-Cookie"].split(";")[0]
        clock[0] += 61
        assert ask(f"{gate.url}/headers", Cookie=over)[0] == 401
        assert log_in(gate)[0] == 303
        assert len(gate._entrance.sessions) == 1


@pytest.mark.parametrize("login", [LOGIN, None])
def test_closed_paths_pass_for_nobody_and_by_no_protocol(login: Login | None) -> None:
    reached = []

    async def handler(request: Any) -> Any:
        reached.append(request.path)
        return await site_handler(request)

    async def opens(url: str) -> int:
        async with aiohttp.ClientSession(headers=BASIC) as session:
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await session.ws_connect(url)
            return caught.value.status

    rows = (ClosedPath(r"/socket"), ClosedPath(r"/train(/.*)?"))
    with serve(handler) as port, open_gate(port, login, closed=rows) as gate:
        for path in ("/train", "/train/now?x=1", "/%74rain", "/%2574rain", "/a/%2e%2e/x", "/view?name=..%2Fx"):
            for method in ("GET", "POST"):
                status, _, text = ask(f"{gate.url}{path}", method=method, **BASIC)
                assert (status, text.count(b"\n")) == (403, 1), path
        assert asyncio.run(opens(f"{gate.url}/socket")) == 403
        assert reached == []
        assert ask(f"{gate.url}/training", **BASIC)[0] == 200
        if login:
            assert ask(f"{gate.url}/train")[0] == 401, "a stranger does not learn what is closed"
            assert log_in(gate, next="/train/now")[1]["Location"] == "/"


@pytest.mark.parametrize("login", [LOGIN, None])
def test_every_answer_that_passes_gets_the_headers_that_keep_other_origins_out(login: Login | None) -> None:
    async def handler(request: Any) -> Any:
        from aiohttp import web

        headers = {"Access-Control-Allow-Origin": "*", "X-Frame-Options": "ALLOWALL", "Content-Type": "text/html"}
        return web.Response(text="<p>", status=int(request.query.get("status", 200)), headers=headers)

    with serve(handler) as port, open_gate(port, login) as gate:
        for path in ("/", "/file=x.html", "/?status=404", "/?status=500"):
            _, headers, _ = ask(f"{gate.url}{path}", **BASIC)
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers.get_all("X-Frame-Options") == ["SAMEORIGIN"]
            assert headers["Referrer-Policy"] == "same-origin"
            assert headers["Access-Control-Allow-Origin"] is None
            assert ("sandbox" in headers["Content-Security-Policy"]) is ("file" in path)


@pytest.mark.parametrize(
    ("place", "leads_to"),
    [
        ("/a/b?c=d#e", "/a/b?c=d#e"),
        ("/", "/"),
        ("/ü", "/ü"),
        ("a/b", "/"),
        ("///x", "/"),
        ("/a\x1fb", "/"),
        ("/a b", "/a b"),
    ],
)
def test_after_the_login_a_visitor_goes_on_to_a_path_of_this_server(place: str, leads_to: str) -> None:
    assert own_path(place) == leads_to


def test_closing_ends_its_thread_at_once_whatever_is_open(site: int) -> None:
    before = set(threading.enumerate())
    gate = open_gate(site, LOGIN)
    with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as raw:
        raw.sendall(f"GET /events HTTP/1.1\r\nHost: x\r\nAuthorization: {BASIC['Authorization']}\r\n\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        gate.close()
        assert time.monotonic() - started < 5
    assert not {thread.name for thread in set(threading.enumerate()) - before} & {"fastsd-gate"}


def test_a_file_of_a_visitor_does_not_stay_in_a_browser_as_a_program(gate: Gate) -> None:
    """A browser sends this header when a page installs a service worker, which would see all that comes after it."""
    for path in ("/file=/tmp/a.js", "/gradio_api/file=/tmp/a.js", "/view?filename=a.js", "/userdata/a.js"):
        assert ask(f"{gate.url}{path}", Service_Worker="script", **BASIC)[0] == 403, path
        assert ask(f"{gate.url}{path}", **BASIC)[0] == 200, path
    assert ask(f"{gate.url}/headers", Service_Worker="script", **BASIC)[0] == 200
