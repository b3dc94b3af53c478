"""The gate against strangers, foreign pages and servers that answer garbage, with real sockets at both ends."""

import asyncio
import base64
import contextlib
import logging
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")

from tunnel_doubles import serve, site_handler  # noqa: E402

from fastsd_helpers.tunnels import Gate, Login, make_login, open_gate  # noqa: E402
from fastsd_helpers.tunnels.gate import connection as connections  # noqa: E402
from fastsd_helpers.tunnels.gate import entrance as entrances  # noqa: E402
from fastsd_helpers.tunnels.gate import login_form as forms  # noqa: E402
from fastsd_helpers.tunnels.gate.login import LoginLimiter  # noqa: E402
from fastsd_helpers.tunnels.gate.wire import Malformed, RequestReader  # noqa: E402

LOGIN = Login("fastsd", "right-password-1")
BASIC = "Authorization: Basic " + base64.b64encode(b"fastsd:right-password-1").decode()
PUBLIC = "https://calm-fox.gradio.example"


@pytest.fixture
def site() -> Iterator[int]:
    with serve(site_handler) as port:
        yield port


@pytest.fixture
def gate(site: int) -> Iterator[Gate]:
    with open_gate(site, LOGIN) as gate:
        yield gate


@pytest.fixture
def trying(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that tries the gate on other versions; here it runs with the installed one."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
    import gate_on_aiohttp

    return gate_on_aiohttp


def open_raw(port: int, sent: bytes = b"") -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", port), timeout=20)
    raw.sendall(sent)
    return raw


def read_head(raw: socket.socket) -> bytes:
    """An answer up to the end of a short body."""
    received = b""
    while b"\r\n\r\n" not in received or received.endswith(b"\r\n\r\n"):
        received += raw.recv(65536)
    return received


def read_all(raw: socket.socket, timeout_s: float = 20) -> bytes:
    raw.settimeout(timeout_s)
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := raw.recv(65536):
            received += part
    return received


def send(port: int, *lines: str, body: bytes = b"") -> tuple[int, str, bytes]:
    """One request by its lines, on a connection of its own; gives status, head and body."""
    head = [lines[0], *(["Host: a.example"] if not any(line.startswith("Host:") for line in lines) else []), *lines[1:]]
    if body and not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in head):
        head.append(f"Content-Length: {len(body)}")
    with open_raw(port, "\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1") + body) as raw:
        answer = read_all(raw)
    first, _, rest = answer.partition(b"\r\n\r\n")
    return int(first.split(b" ")[1]), first.decode("latin-1"), rest


def form(**fields: str) -> bytes:
    return urllib.parse.urlencode({"user": LOGIN.user, "password": LOGIN.password, **fields}).encode()


FORM = "Content-Type: application/x-www-form-urlencoded"


def cookie_of(gate: Gate) -> str:
    _status, head, _ = send(gate.port, "POST /.fastsd/login HTTP/1.1", FORM, body=form())
    return next(line for line in head.split("\r\n") if line.startswith("Set-Cookie: ")).split(" ", 1)[1].split(";")[0]


# ------------------------------------------------------------------------------------------------- before the login


def test_of_generated_requests_none_of_a_stranger_arrives_and_of_a_visitor_exactly_the_meant(trying: Any) -> None:
    stranger = asyncio.run(trying.fuzz(250, login=False, seed=1))
    assert stranger["problems"] == []
    assert stranger["arrived"] == 0
    assert {"401", "400"} <= set(stranger["statuses"])
    visitor = asyncio.run(trying.fuzz(250, login=True, seed=2))
    assert visitor["problems"] == []
    assert visitor["arrived"] > 50


def test_the_recorder_of_the_fuzz_sees_a_request_that_leaves_a_choice(trying: Any) -> None:
    good = b"POST /meant-1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok"
    assert trying.read_requests(good + trying.SMUGGLED)[0] == [
        ("POST", "/meant-1", b"ok"),
        ("GET", "/smuggled", b""),
    ]
    for bad in (b"Transfer-Encoding: chunked", b"Content-Length: 3", b"X : 1", b" folded"):
        with pytest.raises(ValueError, match=r"choice|none"):
            trying.read_requests(good.replace(b"\r\n\r\n", b"\r\n" + bad + b"\r\n\r\n"))


def test_a_body_that_would_unpack_to_gigabytes_costs_nothing(trying: Any) -> None:
    figures = asyncio.run(trying.bombs())
    assert figures["more_mb"] < 20
    assert figures["arrived"] == 0
    assert set(figures["statuses"]) <= {"401", "413", "415"}


def test_packed_bodies_arrive_byte_for_byte_with_their_headers(trying: Any) -> None:
    assert asyncio.run(trying.packed()) == 16


def test_two_hundred_half_open_connections_keep_nobody_waiting(trying: Any) -> None:
    assert max(asyncio.run(trying.half_open())) < 2  # 0.002 s when this was written


MALFORMED = [
    (b"GET /secret-bytes", 400),
    (b"\xff\xfe secret-bytes\r\n\r\n", 400),
    (b"GET /secret-bytes HTTP/1.1\nHost: a\n\n", 400),
    (b"GET /secret-bytes HTTP/9.9\r\nHost: a\r\n\r\n", 400),
    (b"GET /secret-bytes HTTP/1.1\r\n\r\n", 400),
    (b"GET /secret-bytes HTTP/1.1\r\nHost: a\r\nsecret bytes: 1\r\n\r\n", 400),
    (b"GET http://secret-bytes/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"CONNECT secret-bytes:443 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"BREW /secret-bytes HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: secret-bytes\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: secret-bytes\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"secret-bytes" * 9000 + b"\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: secret-bytes\r\n" * 300 + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Type: secret-bytes\r\nContent-Type: b\r\n\r\n", 400),
    (b"GET /.fastsd/secret-bytes HTTP/1.1\r\nHost: a\r\n\r\n", 404),
    (b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Basic c2VjcmV0LWJ5dGVz\r\n\r\n", 401),
    (b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Basic \xff\xff\r\n\r\n", 401),
]


def test_two_thousand_malformed_requests_get_one_short_line_and_leave_no_trace(
    gate: Gate, caplog: Any, capfd: Any
) -> None:
    with caplog.at_level(logging.INFO):
        for number in range(2000):
            sent, status = MALFORMED[number % len(MALFORMED)]
            with open_raw(gate.port) as raw:
                with contextlib.suppress(ConnectionError):
                    raw.sendall(sent)
                    raw.shutdown(socket.SHUT_WR) if number % len(MALFORMED) == 0 else None
                if number % len(MALFORMED) == 0:
                    continue  # a client that goes away in the middle of a line
                raw.settimeout(20)
                answer = raw.recv(65536)
            assert answer.startswith(b"HTTP/1.1 %d " % status), sent[:80]
            _head, _, text = answer.partition(b"\r\n\r\n")
            assert text.count(b"\n") == 1
            assert b"secret" not in answer
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert send(gate.port, "GET /headers HTTP/1.1", BASIC)[0] == 200


def test_a_malformed_request_behind_a_good_one_is_refused_after_the_answer_to_it(gate: Gate) -> None:
    good = f"GET /headers HTTP/1.1\r\nHost: a\r\n{BASIC}\r\n\r\n".encode()
    for bad in (b"secret bytes\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n"):
        with open_raw(gate.port, good + bad + good) as raw:
            answer = read_all(raw)
        assert [part[:13] for part in answer.split(b"HTTP/1.1")[1:]] == [b" 200 OK\r\nCont", b" 400 Bad Requ"]
        assert answer.endswith(b"This request is malformed.\n")


def test_what_aiohttp_alone_dislikes_is_refused_in_a_word_too(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the reader let through what a parser of some version does not take."""
    monkeypatch.setattr(RequestReader, "_written_anew", lambda self, lines: b"\r\n".join([b"secret-bytes", *lines]))
    with open_raw(gate.port, b"GET /secret-bytes HTTP/1.1\r\nHost: a\r\n\r\n") as raw:
        answer = read_all(raw)
    assert answer[8:13] == b" 400 "
    assert answer.endswith(b"\r\n\r\nThis request is malformed.\n")
    assert b"secret" not in answer
    assert b"aiohttp" not in answer


@pytest.mark.parametrize(
    ("lines", "body", "status"),
    [
        (("Content-Type: application/x-www-form-urlencoded; charset=no-such",), form(), 415),
        (("Content-Type: application/x-www-form-urlencoded; charset=utf-16",), form(), 415),
        (("Content-Type: application/x-www-form-urlencoded; charset=UTF-8",), form(), 303),
        (('Content-Type: application/x-www-form-urlencoded; charset="utf-8"',), form(), 303),
        ((FORM,), b"user=%FF%FE&password=%FF", 400),
        ((FORM,), b"user=\xff\xfe&password=\xff", 400),
        ((FORM,), form() + b"&user=other", 400),
        ((FORM,), b"&".join([b"a=b"] * 100), 400),
        ((FORM,), b"&&&;;;===", 401),
        ((FORM, "Content-Encoding: gzip"), form(), 415),
        (("Content-Type: multipart/form-data; boundary=x",), b"--x\r\nbroken", 415),
        (("Content-Type: multipart/form-data",), b"--", 415),
        (("Content-Type: application/json",), b"{", 415),
        (("Content-Type: text/plain",), form(), 415),
        ((), form(), 415),
        ((FORM, "Transfer-Encoding: chunked"), b"5\r\nhello\r\n0\r\n\r\n", 401),
        ((FORM, "Transfer-Encoding: chunked"), (b"400\r\n" + b"a" * 1024 + b"\r\n") * 8 + b"0\r\n\r\n", 413),
        ((FORM, "Transfer-Encoding: chunked"), b"5\r\nhelloXXX\r\n", 400),
    ],
)
def test_a_login_form_that_is_none_is_refused_in_a_word(
    gate: Gate, lines: tuple[str, ...], body: bytes, status: int
) -> None:
    got, head, _ = send(gate.port, "POST /.fastsd/login HTTP/1.1", *lines, body=body)
    assert got == status
    assert ("Set-Cookie" in head) is (status == 303)


def test_hundreds_of_odd_cookies_cost_nothing_and_the_good_one_among_them_counts(gate: Gate, caplog: Any) -> None:
    odd = "; ".join(f'a[{number}]="\xff\x80=;,@{number}' for number in range(200))
    with caplog.at_level(logging.DEBUG):
        assert send(gate.port, "GET /headers HTTP/1.1", f"Cookie: {odd}")[0] == 401
        status, _, text = send(gate.port, "GET /headers HTTP/1.1", f"Cookie: {odd}; {cookie_of(gate)}")
    assert status == 200
    assert b"a[199]" in text
    assert b"fastsd_gate" not in text
    assert [record for record in caplog.records if record.name != "aiohttp.access"] == [], "that is the site's own"


def test_a_password_of_128_signs_opens_the_page_and_the_api(site: int) -> None:
    chance = random.Random(7)
    signs = "!#$%&()*+-./;<=>?@[]^_`{|}~\\äöüß漢字🦊abcXYZ019"
    login = make_login("me", "".join(chance.choice(signs) for _ in range(128)))
    with open_gate(site, login) as gate:
        body = urllib.parse.urlencode({"user": "me", "password": login.password}).encode()
        assert send(gate.port, "POST /.fastsd/login HTTP/1.1", FORM, body=body)[0] == 303
        basic = base64.b64encode(f"me:{login.password}".encode()).decode()
        assert send(gate.port, "GET /headers HTTP/1.1", f"Authorization: Basic {basic}")[0] == 200
        wrong = base64.b64encode(f"me:{login.password[:-1]}".encode()).decode()
        assert send(gate.port, "GET /headers HTTP/1.1", f"Authorization: Basic {wrong}")[0] == 401


# ------------------------------------------------------------------------------------------------ slow and many


def test_a_head_that_never_ends_is_closed_and_so_is_a_connection_that_says_nothing(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    with open_raw(gate.port) as silent, open_raw(gate.port, b"GET / HTTP/1.1\r\nX-A: ") as slow:
        done = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not done.wait(0.1):
                    slow.sendall(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        start = time.monotonic()
        assert (read_all(silent), read_all(slow)) == (b"", b"")
        assert time.monotonic() - start < 10
        done.set()
        thread.join(5)
    with open_raw(gate.port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") as idle:
        assert read_all(idle).startswith(b"HTTP/1.1 401 "), "and closed, though it may be kept alive"


def test_a_body_that_never_comes_is_not_waited_for(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_FORM_S", 0.5)
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n" + FORM.encode() + b"\r\n\r\nuser="
    start = time.monotonic()
    for path, status in ((b"/", b"401"), (b"/.fastsd/login", b"408")):
        with open_raw(gate.port, head % path) as raw:
            assert raw.recv(4096)[9:12] == status
            assert read_all(raw).count(b"HTTP/1.1") == 0, "and closed"
    assert time.monotonic() - start < 30


def test_a_stranger_has_little_time_also_where_a_visitor_was_before(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tunnels' programs send the requests of many over one connection."""
    monkeypatch.setattr(connections, "ANSWER_S", 0.5)
    stalled = f"POST /.fastsd/login HTTP/1.1\r\nHost: a\r\n{FORM}\r\nContent-Length: 90\r\n\r\nuser=".encode()
    for before in (b"", f"GET /headers HTTP/1.1\r\nHost: a\r\n{BASIC}\r\n\r\n".encode()):
        with open_raw(gate.port, before) as raw:
            if before:
                assert b"200 OK" in read_head(raw)
            start = time.monotonic()
            raw.sendall(stalled)
            assert read_all(raw) == b""
            assert time.monotonic() - start < 8, "the form itself may take ten seconds"


def test_of_one_address_two_wait_for_their_turn_and_of_all_together_a_bounded_number(
    site: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entrances, "_LONGEST_WAIT_S", 2.0)
    monkeypatch.setattr(entrances, "_MOST_WAITING", 3)
    limiter = LoginLimiter(100, 1, 3600, now=lambda: 0.0)
    limiter.failed(None)
    took: dict[str, list[float]] = {"203.0.113.1": [], "203.0.113.2": []}

    def guess(address: str) -> None:
        start = time.monotonic()
        assert send(gate.port, "GET / HTTP/1.1", BASIC, f"CF-Connecting-IP: {address}")[0] == 429
        took[address].append(time.monotonic() - start)

    with open_gate(site, LOGIN, limiter=limiter, address_header="CF-Connecting-IP") as gate:
        for address in took:
            threads = [threading.Thread(target=guess, args=(address,)) for _ in range(5)]
            for thread in threads:
                thread.start()
                time.sleep(0.02)
        end = time.monotonic() + 20
        while sum(map(len, took.values())) < 10 and time.monotonic() < end:
            time.sleep(0.05)
    waited = [sum(seconds > 1.5 for seconds in took[address]) for address in took]
    assert waited == [2, 1]


def test_the_slow_upload_and_the_quiet_stream_of_a_visitor_are_never_cut(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HEAD_S", "ANSWER_S"):
        monkeypatch.setattr(connections, name, 0.3)
    head = f"POST /upload HTTP/1.1\r\nHost: a\r\n{BASIC}\r\nConnection: close\r\nContent-Length: 8\r\n\r\n"
    with open_raw(gate.port, head.encode()) as upload, open_raw(gate.port) as stream:
        stream.sendall(f"GET /events HTTP/1.1\r\nHost: a\r\n{BASIC}\r\nConnection: close\r\n\r\n".encode())
        for _ in range(8):
            time.sleep(0.15)
            upload.sendall(b"x")
        assert b'"bytes": 8' in read_all(upload)
        assert read_all(stream).count(b"data:") == 3
    with open_raw(gate.port, f"GET /headers HTTP/1.1\r\nHost: a\r\n{BASIC}\r\n\r\n".encode()) as kept:
        assert b"200 OK" in read_head(kept)
        time.sleep(1)
        kept.sendall(f"GET /headers HTTP/1.1\r\nHost: a\r\n{BASIC}\r\n\r\n".encode())
        assert b"200 OK" in read_head(kept), "a visitor's connection is kept for the next page"
        kept.sendall(b"GET /headers HTTP/1.1\r\n")
        assert read_all(kept) == b"", "but not for the half of a request"


def test_who_asks_before_sending_is_told_to_go_on_after_the_login_alone(gate: Gate) -> None:
    lines = "POST /upload HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\nConnection: close\r\n"
    with open_raw(gate.port, f"{lines}{BASIC}\r\n\r\n".encode()) as raw:
        assert raw.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(b"ok")
        assert b'"bytes": 2' in read_all(raw)
    with open_raw(gate.port, f"{lines}\r\n".encode()) as raw:
        assert raw.recv(100).startswith(b"HTTP/1.1 401 ")


def test_of_too_many_strangers_the_oldest_makes_room_and_no_visitor_does(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_STRANGERS", 20)
    stream = open_raw(gate.port, f"GET /events HTTP/1.1\r\nHost: a\r\n{BASIC}\r\nConnection: close\r\n\r\n".encode())
    assert stream.recv(100)
    strangers = [open_raw(gate.port, b"GET / HTTP/1.1\r\nX-A: ") for _ in range(50)]
    assert send(gate.port, "GET /.fastsd/login HTTP/1.1")[0] == 200
    assert send(gate.port, "POST /.fastsd/login HTTP/1.1", FORM, body=form())[0] == 303
    closed = 0
    for raw in strangers:
        raw.settimeout(0.01 if closed >= 30 else 5)
        try:
            raw.recv(1)
        except TimeoutError:
            continue
        except ConnectionError:
            pass
        closed += 1
    assert 30 <= closed <= 34
    assert read_all(stream).count(b"data:") == 3
    for raw in (stream, *strangers):
        raw.close()


def test_what_is_sent_ahead_is_not_heaped_up(gate: Gate) -> None:
    """A client that sends without end while its first request is answered is made to wait."""
    with open_raw(gate.port, f"GET /events HTTP/1.1\r\nHost: a\r\n{BASIC}\r\n\r\n".encode()) as raw:
        raw.setblocking(False)
        sent, end = 0, time.monotonic() + 0.7
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                sent += raw.send(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
    assert sent < 30e6


# ------------------------------------------------------------------------------------------------ who acts


OWN, SIBLING = PUBLIC, "https://evil.gradio.example"
FOREIGN_PAGES = [
    ("Origin: null",),
    ("Origin: null", "Sec-Fetch-Site: same-origin"),
    (f"Origin: {SIBLING}",),
    (f"Origin: {SIBLING}", "Sec-Fetch-Site: same-site"),
    (f"Origin: {OWN}:8443",),
    (f"Origin: {OWN.replace('https', 'http')}",),
    (f"Origin: {OWN}.evil.example",),
    (f"Origin: {OWN}@evil.example",),
    (f"Origin: {OWN}", f"Origin: {SIBLING}"),
    (f"Origin: {OWN}, {SIBLING}",),
    ("Origin: ",),
    (f"Origin: {OWN}", "Sec-Fetch-Site: cross-site"),
    (f"Origin: {OWN}", "Sec-Fetch-Site: none"),
    ("Origin: http://127.0.0.1:7860",),
    ("Origin: file://",),
    ("Origin: chrome-extension://abc", "Sec-Fetch-Site: none"),
    ("Sec-Fetch-Site: same-site",),
    ("Sec-Fetch-Site: cross-site",),
    ("Sec-Fetch-Site: none",),
    ("Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"),
    ("Sec-Fetch-Site: whatever",),
    ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"),
    ("Origin: http://a.example", "X-Forwarded-Host: a.example", "X-Forwarded-Proto: https"),
]
OWN_PAGES = [
    (f"Origin: {OWN}",),
    (f"Origin: {OWN}", "Sec-Fetch-Site: same-origin"),
    ("Sec-Fetch-Site: same-origin",),
]
PROGRAMS = [(), ("Sec-Fetch-Mode: cors",), ("Referer: https://evil.example/",)]
UPGRADE = (
    *("Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"),
    "Sec-WebSocket-Protocol: graphql-ws",
)


@pytest.fixture
def link(gate: Gate) -> tuple[Gate, str]:
    """A gate that knows its public address, and the cookie of somebody who is in."""
    gate.set_public_url(PUBLIC + "/")
    return gate, f"Cookie: {cookie_of(gate)}"


def socket_opens(gate: Gate, *lines: str) -> bool:
    """Whether a WebSocket is opened for a request with these lines."""
    head = "\r\n".join(["GET /socket HTTP/1.1", "Host: a.example", "Connection: Upgrade", *UPGRADE, *lines, "", ""])
    with open_raw(gate.port, head.encode()) as raw:
        return raw.recv(4096).startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize("credential", ["cookie", "basic"])
def test_a_page_of_somewhere_else_changes_nothing(link: Any, credential: str) -> None:
    gate, cookie = link
    known = cookie if credential == "cookie" else BASIC
    for lines in FOREIGN_PAGES:
        changes_nothing(gate, known, lines)
    assert send(gate.port, "GET /headers HTTP/1.1", cookie)[0] == 200, "nobody was logged out"


def changes_nothing(gate: Gate, known: str, lines: tuple[str, ...]) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        status, _, text = send(gate.port, f"{method} /upload HTTP/1.1", known, *lines, body=b"x")
        assert (status, text.count(b"\n")) == (403, 1), (method, lines)
    assert not socket_opens(gate, known, *lines), lines
    for path in ("/.fastsd/login", "/.fastsd/logout", "/login"):
        status, head, _ = send(gate.port, f"POST {path} HTTP/1.1", known, FORM, *lines, body=form())
        assert (status, "Set-Cookie" in head) == (403, False), (path, lines)


@pytest.mark.parametrize("lines", [*OWN_PAGES, *PROGRAMS])
def test_the_own_page_and_programs_act(link: Any, lines: tuple[str, ...]) -> None:
    gate, cookie = link
    for known in (cookie, BASIC):
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            assert send(gate.port, f"{method} /upload HTTP/1.1", known, *lines, body=b"x")[0] == 200
        assert socket_opens(gate, known, *lines)
    assert not socket_opens(gate, *lines)
    assert send(gate.port, "POST /.fastsd/login HTTP/1.1", FORM, *lines, body=form())[0] == 303
    assert send(gate.port, "POST /.fastsd/logout HTTP/1.1", cookie, *lines)[0] == 303
    assert send(gate.port, "GET /headers HTTP/1.1", cookie)[0] == 401


@pytest.mark.parametrize(
    ("lines", "passes"),
    [
        (("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"), True),
        (("Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"), True),
        (("Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"), True),
        (("Sec-Fetch-Site: none",), True),
        (("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"), False),
        (("Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: embed"), False),
        (("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image"), False),
        (("Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: script"), False),
        (("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors", "Sec-Fetch-Dest: empty"), False),
        (("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"), False),
        (("Origin: null", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"), False),
        ((f"Origin: {SIBLING}", "Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: cors", "Sec-Fetch-Dest: empty"), False),
        # Older browsers do not say how they ask: what only looks passes, the start of a stream does not.
        (("Sec-Fetch-Site: cross-site",), True),
        ((f"Origin: {SIBLING}",), True),
        (("Origin: null",), True),
        ((f"Origin: {SIBLING}", "Accept: text/event-stream"), False),
        (("Sec-Fetch-Site: same-site", "Accept: */*, Text/Event-Stream"), False),
        (("Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: iframe"), True),
        ((f"Origin: {OWN}", "Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors"), True),
        ((), True),
    ],
)
def test_from_somewhere_else_only_a_link_that_is_followed_opens(
    link: Any, lines: tuple[str, ...], passes: bool
) -> None:
    gate, cookie = link
    for path in ("/headers", "/queue/data"):
        assert send(gate.port, f"GET {path} HTTP/1.1", cookie, *lines)[0] == (200 if passes else 403)


def test_on_this_machine_the_gates_own_address_is_its_own_page(gate: Gate) -> None:
    for name in ("127.0.0.1", "localhost"):
        own = f"{name}:{gate.port}"
        assert send(gate.port, "POST /upload HTTP/1.1", f"Host: {own}", BASIC, f"Origin: http://{own}")[0] == 200
        for origin, host in [
            (f"http://{own}", "a.example"),
            (f"http://{own}", PUBLIC.removeprefix("https://")),
            (f"https://{own}", own),
            (f"http://{name}:{gate.port + 1}", own),
            (f"http://{name}", own),
            (PUBLIC, own),
            ("http://evil.example", "evil.example"),
        ]:
            status = send(gate.port, "POST /upload HTTP/1.1", f"Host: {host}", BASIC, f"Origin: {origin}")[0]
            assert status == 403, (origin, host)


def test_when_the_link_is_opened_anew_the_old_address_is_foreign(link: Any) -> None:
    gate, cookie = link
    gate.set_public_url("https://new-fox.gradio.example")
    assert send(gate.port, "POST /upload HTTP/1.1", cookie, f"Origin: {PUBLIC}")[0] == 403
    new = "Origin: https://new-fox.gradio.example"
    assert send(gate.port, "POST /upload HTTP/1.1", cookie, new)[0] == 200


def test_a_neighbours_cookie_of_the_same_name_neither_logs_in_nor_locks_out(link: Any) -> None:
    gate, cookie = link
    name = "__Host-fastsd_gate"
    for other in (f"{name}=neighbour", f"{name}=", f'{name}="x"', f"{name}={'x' * 5000}", "fastsd_gate=1"):
        assert send(gate.port, "GET /headers HTTP/1.1", f"Cookie: {other}")[0] == 401
        for line in (f"{cookie}; {other}", f"Cookie: {other}; {cookie.removeprefix('Cookie: ')}"):
            status, _, text = send(gate.port, "GET /headers HTTP/1.1", line)
            assert status == 200
            assert b"fastsd_gate" not in text, "none of them goes any further"
    value = cookie.partition("=")[2]
    assert send(gate.port, "GET /headers HTTP/1.1", f"Cookie: fastsd_gate={value}")[0] == 401
    status, head, _ = send(gate.port, "POST /.fastsd/login HTTP/1.1", FORM, f"Cookie: {name}=chosen", body=form())
    assert status == 303
    assert "chosen" not in head, "a value that was brought along is never the session's"


def test_the_server_behind_cannot_set_the_gates_cookie() -> None:
    async def handler(_request: Any) -> Any:
        from aiohttp import web

        answer = web.Response(text="ok")
        for name in ("fastsd_gate", "__Host-fastsd_gate", "mine"):
            answer.headers.add("Set-Cookie", f"{name}=1; Path=/; Secure")
        return answer

    with serve(handler) as port, open_gate(port, None) as gate:
        head = send(gate.port, "GET / HTTP/1.1")[1]
    assert [line for line in head.split("\r\n") if "Set-Cookie" in line] == ["Set-Cookie: mine=1; Path=/; Secure"]


def test_headers_that_name_another_request_go_no_further(gate: Gate) -> None:
    lines = ["X-Original-URL: /x", "X-Rewrite-URL: /x", "X-HTTP-Method-Override: PUT", "X-Kept: 1"]
    text = send(gate.port, "GET /headers HTTP/1.1", BASIC, *lines)[2]
    assert b"X-Kept" in text
    assert b"URL" not in text
    assert b"Override" not in text


# --------------------------------------------------------------------------------- a server behind that answers garbage


GARBAGE = {
    "nothing": b"",
    "noise": b"\x00\xff\x13garbage\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a status of letters": b"HTTP/1.1 abc OK\r\n\r\n",
    "no final answer": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "a length of letters": b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\n",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"X-Flood: aaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 20_000,
    "one endless header": b"HTTP/1.1 200 OK\r\nX-Flood: " + b"a" * 600_000,
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
}


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server of bare sockets that says the same to everything, and closes."""
    server = socket.create_server(("127.0.0.1", 0))

    def work() -> None:
        while True:
            try:
                one, _ = server.accept()
            except OSError:
                return
            with one, contextlib.suppress(OSError):
                one.recv(65536)
                one.sendall(answer)

    threading.Thread(target=work, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_server_that_answers_garbage_is_said_to_give_no_answer(kind: str, caplog: Any, capfd: Any) -> None:
    with caplog.at_level(logging.INFO), answering(GARBAGE[kind]) as port, open_gate(port, LOGIN) as gate:
        status, _, text = send(gate.port, "GET /secret HTTP/1.1", BASIC)
        assert (status, text.count(b"\n")) == (502, 1)
        assert not socket_opens(gate, BASIC)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_odd_bytes_in_an_answers_headers_become_text_and_break_nothing() -> None:
    head = b"HTTP/1.1 200 Gr\xfc\xdfe\r\nX-Name: Stra\xdfe.png\r\nX-Twice: \xc3\xa9\r\nContent-Length: 2\r\n\r\nok"
    with answering(head) as port, open_gate(port, LOGIN) as gate:
        status, answer, body = send(gate.port, "GET / HTTP/1.1", BASIC)
    assert (status, body) == (200, b"ok")
    said = answer.encode("latin-1")
    assert "X-Name: Straße.png".encode() in said
    assert "X-Twice: é".encode() in said


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + b"HTTP/1.1 200 OK\r\n\r\nsmuggled", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n", False),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", True),
    ],
)
def test_an_answer_of_another_length_than_it_says_never_looks_whole(answer: bytes, whole: bool) -> None:
    asked = f"GET / HTTP/1.1\r\nHost: a\r\n{BASIC}\r\nConnection: close\r\n\r\n".encode()
    with answering(answer) as port, open_gate(port, LOGIN) as gate, open_raw(gate.port, asked) as raw:
        received = read_all(raw)
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"smuggled" not in received
    length = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    complete = len(body) == length[0] if length else body.endswith(b"0\r\n\r\n")
    assert complete is whole or (not whole and b" 502 " in head.split(b"\r\n")[0])


# ------------------------------------------------------------------------------------------------------- the reader


def all_of(pieces: list[bytes], reader: RequestReader, *, answer: bool = True) -> bytes:
    out = b"".join(b"".join(reader.feed(piece)) for piece in pieces)
    while answer and not reader.waiting:
        before = out
        out += b"".join(reader.answered())
        if out == before:
            break
    return out


def test_however_the_bytes_come_the_same_requests_go_on() -> None:
    body = bytes(range(256)) * 3
    sent = (
        b"\r\nPOST /a?b HTTP/1.1\r\nHost:a\r\nX:  1 \t\r\nContent-Length: 768\r\n\r\n"
        + body
        + b"PUT /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n"
        + b"0a;x=y\r\n0123456789\r\n1\r\n!\r\n0\r\nT: 1\r\n\r\n"
        + b"GET /d HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade, X\r\nHTTP2-Settings: AA\r\n\r\n"
    )
    expected = (
        b"POST /a?b HTTP/1.1\r\nHost: a\r\nX: 1\r\nContent-Length: 768\r\n\r\n"
        + body
        + b"PUT /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\na\r\n0123456789\r\n1\r\n!\r\n0\r\n\r\n"
        + b"GET /d HTTP/1.1\r\nHost: a\r\nConnection: X\r\n\r\n"
    )
    assert all_of([sent], RequestReader()) == expected
    chance = random.Random(3)
    for _ in range(60):
        cuts = sorted(chance.sample(range(len(sent)), chance.choice([1, 5, 200])))
        reader, out = RequestReader(), b""
        for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
            out += all_of([sent[start:end]], reader)
        assert out == expected
    reader, out = RequestReader(), b""
    for number in range(len(sent)):
        out += all_of([sent[number : number + 1]], reader)
    assert out == expected


def test_the_next_request_waits_for_the_answer_to_the_one_before() -> None:
    reader = RequestReader()
    two = b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n"
    assert b"".join(reader.feed(two)).startswith(b"GET /1 ")
    assert reader.feed(b"X") == []
    assert reader.ahead_bytes > 20
    assert b"".join(reader.answered()).startswith(b"GET /2 ")


def test_bytes_of_a_socket_wait_until_it_stands() -> None:
    reader = RequestReader()
    lines = "\r\n".join(["GET / HTTP/1.1", "Host: a", "Connection: keep-alive, Upgrade", *UPGRADE, "", ""]).encode()
    assert b"Upgrade: websocket" in b"".join(reader.feed(lines + b"\x81\x02hi"))
    assert reader.upgrade
    assert reader.feed(b"\x81\x01a") == []
    assert b"".join(reader.opened()) == b"\x81\x02hi\x81\x01a"
    assert reader.feed(b"\x89\x00") == [b"\x89\x00"]


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        *[([line], b"") for line in ("X : 1", ": 1", "X", " folded", "\tfolded", "X: a\x00", "X: a\x7f", "X\xe9: 1")],
        *[([f"Content-Length: {odd}"], b"") for odd in ("+1", "-1", "1,1", "0x1", "1_0", "", "1 1", "1" * 16, "\xb2")],
        (["Content-Length: 1", "Content-Length: 1"], b"x"),
        (["Content-Length: 0", "Content-Length: 1"], b""),
        (["Content-Length: 1", "Transfer-Encoding: chunked"], b""),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], b""),
        *[
            ([f"Transfer-Encoding: {odd}"], b"")
            for odd in ("x", "gzip, chunked", "chunked, x", '"chunked"', "", ",chunked")
        ],
        (["Host: b"], b""),
        (["Content-Type: a", "content-type: b"], b""),
        *[
            (["Transfer-Encoding: chunked"], chunks)
            for chunks in (
                *(b"\r\n", b"x\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b"1 1\r\n", b"1" * 16 + b"\r\n", b"1;\x00\r\n"),
                *(b"1\nx", b"1\rx", b"1\r\nxx", b"1\r\nx\n", b"1\r\nx\rx", b"1;" + b"a" * 300, b"0\r\nX\r\n"),
                *(b"0\r\nX: a\n", b"0\r\n X: a\r\n", b"0\r\n" + b"X: a\r\n" * 3000),
            )
        ],
    ],
)
def test_what_leaves_a_choice_where_a_request_ends_is_refused(lines: list[str], body: bytes) -> None:
    head = "\r\n".join(["POST / HTTP/1.1", "Host: a", *lines, "", ""]).encode("latin-1")
    for pieces in ([head + body], [bytes([one]) for one in head + body]):
        with pytest.raises(Malformed) as caught:
            all_of(pieces, RequestReader(), answer=False)
        assert 400 <= caught.value.status < 500


@pytest.mark.parametrize(
    ("line", "status"),
    [
        *[
            (line, 400)
            for line in ("get / HTTP/1.1", "GET  / HTTP/1.1", "GET / HTTP/1.2", "GET / HTTP/1.1 ", "GET /", "")
        ],
        *[(line, 400) for line in ("GET * HTTP/1.1", "OPTIONS * HTTP/1.1", "CONNECT a:1 HTTP/1.1", "GET a HTTP/1.1")],
        *[
            (line, 400)
            for line in ("GET /#a HTTP/1.1", "GET /\xe9 HTTP/1.1", "GET /\x00 HTTP/1.1", "GET http://a/ HTTP/1.1")
        ],
        *[(line, 405) for line in ("TRACE / HTTP/1.1", "PROPFIND / HTTP/1.1", "M-SEARCH / HTTP/1.1")],
    ],
)
def test_a_request_line_is_of_http_1_and_of_this_server(line: str, status: int) -> None:
    with pytest.raises(Malformed) as caught:
        RequestReader().feed(f"\r\n{line}\r\nHost: a\r\n\r\n".encode("latin-1"))
    assert caught.value.status == status


def test_an_old_program_may_leave_the_host_out() -> None:
    assert RequestReader().feed(b"GET / HTTP/1.0\r\n\r\n") == [b"GET / HTTP/1.0\r\n\r\n"]
    for lines in (b"", b"Host: a\r\nHost: a\r\n", b"Host: a b\r\n", b"Host: a/b\r\n", b"Host: user@a\r\n"):
        with pytest.raises(Malformed):
            RequestReader().feed(b"GET / HTTP/1.1\r\n" + lines + b"\r\n")
    with pytest.raises(Malformed):
        RequestReader().feed(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n")


@pytest.mark.parametrize("length", [10, 65_000, 66_000, 10**6])
def test_a_head_is_held_up_to_its_bound(length: int) -> None:
    reader, sent = RequestReader(), b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * length
    if length < 65_536:
        assert reader.feed(sent) == []
        return
    with pytest.raises(Malformed) as caught:
        all_of([sent[start : start + 1000] for start in range(0, len(sent), 1000)], reader)
    assert caught.value.status == 431
    assert len(reader._held) < 70_000
