"""Bytes over HTTP, answer by answer: what is asked again, what is waited for, what of a part file is trusted."""

import contextlib
import hashlib
import http.client
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from fastsd_helpers.downloads.transfer import ask, part_name, transfer
from fastsd_helpers.errors import DiskFull, DownloadError

BODY = bytes(range(256)) * 8
SHA256 = hashlib.sha256(BODY).hexdigest()
MODULE = "fastsd_helpers.downloads.transfer"


def answer(status: int = 200, body: bytes = b"", *headers: str, length: int | None = -1) -> bytes:
    """The bytes of one answer; length -1 announces what comes, None nothing."""
    lines = [f"HTTP/1.1 {status} X", *headers, "Connection: close"]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length == -1 else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


class Site:
    """A server that gives each connection the next of its answers, byte by byte as told, and keeps what was asked."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.asked: list[dict[str, str]] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/file"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                one, _ = self._server.accept()
            except OSError:
                return
            with one, contextlib.suppress(OSError):
                head = b""
                while b"\r\n\r\n" not in head:
                    head += one.recv(65536)
                first, *lines = head.decode().split("\r\n\r\n")[0].split("\r\n")
                found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                self.asked.append({"": first.split()[1], **found})
                if self.answers:
                    one.sendall(self.answers.pop(0))

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture
def other() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits here; what would have been waited is noted."""
    noted: list[float] = []
    here, sleep = threading.current_thread(), time.sleep
    # `time` is everybody's: threads that other tests have left must go on sleeping.
    monkeypatch.setattr(
        f"{MODULE}.time.sleep", lambda s: noted.append(s) if threading.current_thread() is here else sleep(s)
    )
    return noted


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / ".model.part"


def note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


# --------------------------------------------------------------------------------------------- asking again


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(site: Site, part: Path, waits: list[float], status: int) -> None:
    site.answers = [answer(status), answer(status), answer(200, b"said")]
    assert ask(site.url).body == b"said"
    site.answers = [answer(status), answer(200, BODY)]
    assert transfer(site.url, part).status == 200
    assert part.read_bytes() == BODY
    assert waits == [1, 2, 1]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451, 501])
def test_another_refusal_is_an_answer(site: Site, part: Path, status: int) -> None:
    site.answers = [answer(status, b"no such thing")]
    found = ask(site.url)
    assert (found.status, found.body) == (status, b"no such thing")
    site.answers = [answer(status, b"<p>" + b"x" * 200_000, "Content-Type: Text/HTML"), answer(status, b"plain")]
    found = transfer(site.url, part)
    assert (found.status, found.is_page, len(found.head), found.total, found.name) == (
        status,
        True,
        100_000,
        None,
        None,
    )
    found = transfer(site.url, part)
    assert (found.status, found.is_page, found.head) == (status, False, b"plain")
    assert not part.exists()
    assert len(site.asked) == 3


def test_the_pauses_grow_and_then_it_is_given_up(site: Site, waits: list[float]) -> None:
    site.answers = [answer(503)] * 6
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1: answer 503, 6 times in a row") as caught:
        ask(site.url)
    assert waits == [1, 2, 4, 8, 15]
    assert "Wait a few minutes" in caught.value.hint
    site.answers = []
    with pytest.raises(DownloadError, match=r"no connection \(.+\), 6 times in a row") as caught:
        ask(site.url)
    assert "Check the network" in caught.value.hint
    assert len(site.asked) == 12


def test_pauses_begin_again_once_more_has_arrived_than_ever_before(site: Site, part: Path, waits: list[float]) -> None:
    etag = 'ETag: "a"'
    half, more = (answer(200, BODY[:n], etag, length=len(BODY)) for n in (1000, 1000))
    rest = [
        answer(206, BODY[1000:], etag, f"Content-Range: bytes 1000-{len(BODY) - 1}/{len(BODY)}"),
    ]
    # Two tries bring the first 1000 bytes: the second is no progress, though bytes arrive.
    site.answers = [half, b"", answer(503), *rest]
    assert transfer(site.url, part).total == len(BODY)
    assert part.read_bytes() == BODY
    assert waits == [1, 2, 4]
    waits.clear()
    part.unlink()
    note_of(part).unlink()
    site.answers = [answer(503), answer(503), half, *rest]
    transfer(site.url, part)
    assert waits == [1, 2, 1], "after the first bytes failures count from the beginning"
    waits.clear()
    part.unlink()
    note_of(part).unlink()
    site.answers = [half.replace(b'"a"', b'W/"a"'), more.replace(b'"a"', b'W/"a"'), answer(200, BODY)]
    transfer(site.url, part)
    assert waits == [1, 2], "the same bytes a second time are not progress"


@pytest.mark.parametrize(
    ("said", "waited"),
    [("0", 0), ("7", 7), ("120", 120), (" 5 ", 5), ("soon", 1), ("-3", 1), ("", 1), ("1e1", 1)],
)
def test_a_server_is_waited_for_as_long_as_it_asks(site: Site, waits: list[float], said: str, waited: float) -> None:
    site.answers = [answer(429, b"", f"Retry-After: {said}"), answer()]
    assert ask(site.url).status == 200
    assert waits == [waited]


@pytest.mark.parametrize(
    "said", ["121", "7200", formatdate(time.time() + 5000, usegmt=True)], ids=["121", "7200", "a date"]
)
def test_more_than_two_minutes_are_not_waited(site: Site, waits: list[float], said: str) -> None:
    site.answers = [answer(503, b"", f"Retry-After: {said}")]
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 is busy and asks you to wait for \d+ minutes"):
        ask(site.url)
    assert waits == []


def test_a_date_that_is_over_is_not_waited_for(site: Site, waits: list[float]) -> None:
    site.answers = [answer(503, b"", f"Retry-After: {formatdate(time.time() - 5000, usegmt=True)}"), answer()]
    ask(site.url)
    assert waits == [0]


# --------------------------------------------------------------------------------------------- what is sent


def test_a_small_answer_is_read_up_to_its_limit_with_its_cookies(site: Site) -> None:
    site.answers = [answer(200, b"x" * 50, "Set-Cookie: a=1; Path=/", "Set-Cookie: b=2; Secure", "X-Mine: 3"), answer()]
    found = ask(site.url, token="abc", limit=20)
    assert (found.body, found.cookies, found.headers["X-Mine"]) == (b"x" * 20, "a=1; b=2", "3")
    assert site.asked[0]["authorization"] == "Bearer abc"
    assert site.asked[0]["accept-encoding"] == "identity", "packed bytes would have another hash"
    found = ask(site.url)
    assert found.cookies is None
    assert "authorization" not in site.asked[1]
    assert "cookie" not in site.asked[1]


def test_token_and_cookies_follow_to_the_same_host_and_port_alone(site: Site, other: Site, part: Path) -> None:
    site.answers = [answer(302, b"", "Location: /there"), answer(200, BODY)]
    transfer(site.url, part, token="abc", cookies="c=1")
    assert [(seen[""], seen.get("authorization"), seen.get("cookie")) for seen in site.asked] == [
        ("/file", "Bearer abc", "c=1"),
        ("/there", "Bearer abc", "c=1"),
    ]
    for place in (other.url, other.url.replace("127.0.0.1", "localhost")):
        part.unlink()
        site.answers = [answer(302, b"", f"Location: {place}")]
        other.answers = [answer(200, BODY)]
        transfer(site.url, part, token="abc", cookies="c=1")
        assert part.read_bytes() == BODY
        assert not {"authorization", "cookie"} & set(other.asked[-1])


@pytest.mark.parametrize("place", ["ftp://127.0.0.1/x", "http://[", "http://x:port/"])
def test_a_redirect_to_nowhere_is_refused(site: Site, part: Path, place: str) -> None:
    site.answers = [answer(302, b"", f"Location: {place}")]
    with pytest.raises(DownloadError):
        transfer(site.url, part, token="abc")
    assert not part.exists()


def test_a_redirect_to_a_file_of_this_machine_is_not_followed(site: Site, part: Path) -> None:
    site.answers = [answer(302, b"", "Location: file:///etc/passwd")]
    assert transfer(site.url, part).status == 302
    assert not part.exists()


# ---------------------------------------------------------------------------------------------- what is kept


def test_what_the_server_says_is_told_once_before_bytes_are_kept(site: Site, part: Path) -> None:
    site.answers = [answer(200, BODY[:100], 'ETag: "a"', length=len(BODY)), answer(503), answer(200, BODY, 'ETag: "b"')]
    told = []
    found = transfer(site.url, part, size=len(BODY), begun=lambda remote: told.append((remote.total, part.exists())))
    assert told == [(len(BODY), False)]
    assert (found.status, found.is_page, found.total) == (200, False, len(BODY))
    assert part.read_bytes() == BODY

    def refuse(_remote: object) -> None:
        raise DownloadError("not this one", "")

    part.unlink()
    note_of(part).unlink()
    site.answers = [answer(200, BODY)]
    with pytest.raises(DownloadError, match="not this one"):
        transfer(site.url, part, begun=refuse)
    assert not part.exists()


@pytest.mark.parametrize("size", [len(BODY) - 1, len(BODY) + 1, 0])
def test_another_length_than_is_expected_is_refused_at_once(site: Site, part: Path, size: int) -> None:
    site.answers = [answer(200, BODY)]
    with pytest.raises(DownloadError, match=f"offers {len(BODY)} bytes; {size} were expected"):
        transfer(site.url, part, size=size)
    assert not part.exists()


def test_without_an_announced_length_the_end_is_the_end(site: Site, part: Path) -> None:
    site.answers = [answer(200, BODY, length=None)]
    assert transfer(site.url, part, size=len(BODY) + 5).total is None, "the caller compares what it knows"
    assert part.read_bytes() == BODY
    site.answers = [answer(200, b"", length=None)]
    transfer(site.url, part)
    assert part.read_bytes() == b""


def test_without_an_announced_length_no_more_is_taken_than_is_expected(site: Site, part: Path) -> None:
    site.answers = [answer(200, BODY, length=None)]
    with pytest.raises(DownloadError, match="sends more than 5 bytes"):
        transfer(site.url, part, size=5)
    assert not part.exists()


def test_a_page_is_handed_over_and_no_byte_kept(site: Site, part: Path) -> None:
    site.answers = [answer(200, b"<html>" + b"x" * 200_000, "Content-Type: text/html; charset=x", "Set-Cookie: a=1; x")]
    found = transfer(site.url, part, size=3)
    assert (found.is_page, found.cookies, len(found.head)) == (True, "a=1", 100_000)
    assert not part.exists()
    site.answers = [answer(200, BODY, "Content-Type: application/octet-stream")]
    assert not transfer(site.url, part).is_page


@pytest.mark.parametrize(
    ("etag", "known", "asked"),
    [('"a"', None, True), ('"a"', SHA256, True), (None, SHA256, True), (None, None, False), ('W/"a"', None, False),
     ('"a', None, False), ("a", None, False), ('W/"a"', SHA256, True)],
)  # fmt: skip
def test_only_a_part_of_a_known_version_is_gone_on_with(
    site: Site, part: Path, etag: str | None, known: str | None, asked: bool
) -> None:
    headers = [f"ETag: {etag}"] if etag else []
    site.answers = [answer(200, BODY[:700], *headers, length=len(BODY))]
    site.answers += [answer(206, BODY[700:], *headers, f"Content-Range: bytes 700-2047/{len(BODY)}") if asked
                     else answer(200, BODY, *headers)]  # fmt: skip
    assert transfer(site.url, part, sha256=known).total == len(BODY)
    assert part.read_bytes() == BODY
    assert site.asked[1].get("range") == ("bytes=700-" if asked else None)
    assert site.asked[1].get("if-range") == (etag if asked and etag == '"a"' else None)


@pytest.mark.parametrize(
    ("note", "known", "asked"),
    [
        ({"etag": '"a"', "sha256": None}, None, True),
        ({"etag": '"a"', "sha256": SHA256}, SHA256, True),
        ({"etag": None, "sha256": SHA256}, SHA256, True),
        ({"etag": '"a"', "sha256": "0" * 64}, SHA256, False),
        ({"etag": '"a"', "sha256": SHA256}, None, False),
        ({"etag": None, "sha256": None}, None, False),
        ({"etag": None, "sha256": None}, SHA256, False),
        ([], None, False),
        (None, None, False),
    ],
)
def test_what_an_earlier_process_left_is_used_when_its_note_shows_that_it_is_of_this_file(
    site: Site, part: Path, note: object, known: str | None, asked: bool
) -> None:
    part.write_bytes(BODY[:700])
    note_of(part).write_text("{" if note is None else json.dumps(note))
    site.answers = [
        answer(206, BODY[700:], f"Content-Range: bytes 700-2047/{len(BODY)}") if asked else answer(200, BODY)
    ]
    transfer(site.url, part, sha256=known)
    assert site.asked[0].get("range") == ("bytes=700-" if asked else None)
    assert part.read_bytes() == BODY
    note_of(part).unlink(missing_ok=True)
    part.write_bytes(BODY[:700])
    site.answers = [answer(200, BODY)]
    transfer(site.url, part, sha256=known)
    assert "range" not in site.asked[1], "without a note nothing is known of it"


def test_a_part_longer_than_the_file_is_thrown_away(site: Site, part: Path) -> None:
    part.write_bytes(BODY + b"more")
    note_of(part).write_text(json.dumps({"etag": '"a"', "sha256": None}))
    site.answers = [answer(416), answer(200, BODY)]
    transfer(site.url, part)
    assert part.read_bytes() == BODY
    assert [seen.get("range") for seen in site.asked] == [f"bytes={len(BODY) + 4}-", None]


@pytest.mark.parametrize("wrong", ["bytes 0-2047/2048", "bytes 701-2047/2048", "bytes 700-", "", "items 700-2047/2048"])
def test_another_range_than_was_asked_for_is_not_put_in(site: Site, part: Path, wrong: str) -> None:
    first = answer(200, BODY[:700], 'ETag: "a"', length=len(BODY))
    right = answer(206, BODY[700:], 'ETag: "a"', "Content-Range: bytes 700-2047/*")
    site.answers = [first, answer(206, b"y" * 1348, f"Content-Range: {wrong}"), right]
    assert transfer(site.url, part).total is None
    assert part.read_bytes() == BODY


def test_a_server_that_ignores_the_range_gives_the_whole_file(site: Site, part: Path) -> None:
    site.answers = [answer(200, b"z" * 700, 'ETag: "a"', length=len(BODY)), answer(200, BODY[:1000], 'ETag: "b"')]
    transfer(site.url, part)
    assert part.read_bytes() == BODY[:1000], "cut to what it is now"


# ------------------------------------------------------------------------------------------------- names, room


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ('attachment; filename="a b.safetensors"', "a b.safetensors"),
        ("attachment; filename=plain.ckpt ; x=1", "plain.ckpt"),
        ("attachment; FILENAME=x.bin", "x.bin"),
        ('attachment; filename=""', ""),
        ("attachment; filename=a.bin; filename*=UTF-8''gr%C3%BCn.bin", "grün.bin"),
        ("attachment; filename*=utf-8'de'%22q%22", '"q"'),
        ("inline", None),
        (None, None),
    ],
)
def test_the_servers_name_for_a_file_is_read(site: Site, part: Path, said: str | None, name: str | None) -> None:
    site.answers = [answer(200, BODY, *([f"Content-Disposition: {said}"] if said else []))]
    assert transfer(site.url, part).name == name


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_room_is_asked_for_what_is_still_to_come_and_200_mib_more(
    site: Site, part: Path, monkeypatch: pytest.MonkeyPatch, spare: int, fits: bool
) -> None:
    part.write_bytes(BODY[:700])
    note_of(part).write_text(json.dumps({"etag": '"a"', "sha256": None}))
    free = 200 * 2**20 + len(BODY) - 700 + spare
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**40, 2**40 - free, free))
    site.answers = [answer(206, BODY[700:], 'ETag: "a"', "Content-Range: bytes 700-2047/2048")]
    if fits:
        transfer(site.url, part)
        assert part.read_bytes() == BODY
    else:
        with pytest.raises(DiskFull, match="the rest of the download"):
            transfer(site.url, part)
        assert part.read_bytes() == BODY[:700]


def test_now_and_then_it_is_said_how_far_it_is(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 4.0
        return clock[0]

    monkeypatch.setattr(f"{MODULE}.time.monotonic", tick)
    monkeypatch.setattr(f"{MODULE}._CHUNK_BYTES", 10_000_000)
    part = tmp_path / part_name("model.safetensors", "x")
    large = bytes(3_000_000)
    for length, said in [(-1, "of 0.00 GB, "), (None, "model.safetensors: 0.00 GB, ")]:
        site.answers = [answer(200, large, length=length)]
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastsd_helpers"):
            transfer(site.url, part)
        lines = [record.getMessage() for record in caplog.records if "MB/s" in record.getMessage()]
        assert lines
        assert all(line.startswith("model.safetensors: ") for line in lines)
        assert said in lines[0]
        assert (" left." in lines[0]) is (length == -1)
        assert len(lines) <= 1 + clock[0] / 12, "at most one in ten seconds"
    assert part_name("a", "x") == part_name("a", "x") != part_name("a", "y")
    assert part_name("a", "x").startswith(".a.")


@pytest.mark.parametrize(("left", "said"), [(29, "29 s"), (89, "89 s"), (91, "2 min"), (600, "10 min")])
def test_what_is_left_is_said_in_seconds_up_to_a_minute_and_a_half(
    site: Site, part: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, left: int, said: str
) -> None:
    clock = iter([0.0, 100.0, 100.1, 100.2, 100.3])
    monkeypatch.setattr(f"{MODULE}.time.monotonic", lambda: next(clock, 101.0))
    monkeypatch.setattr(f"{MODULE}._CHUNK_BYTES", 100_000)
    body = bytes(1000 * (100 + left))
    site.answers = [answer(200, body)]
    real = [100_000]
    # The first piece is of a hundred seconds, at a thousand bytes a second.
    read1 = http.client.HTTPResponse.read1
    monkeypatch.setattr(
        http.client.HTTPResponse, "read1", lambda self, size: self.read(real.pop(0)) if real else read1(self, size)
    )
    with caplog.at_level(logging.INFO, "fastsd_helpers"):
        transfer(site.url, part)
    lines = [record.getMessage() for record in caplog.records if "MB/s" in record.getMessage()]
    assert lines[0].endswith(f"0.00 of 0.00 GB, 0.0 MB/s, {said} left.")
    assert len(lines) == 1, "not again before ten seconds have passed"
    assert part.read_bytes() == body
