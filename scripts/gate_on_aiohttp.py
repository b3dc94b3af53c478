"""Try the login gate on several versions of aiohttp: bombs, packed bodies, half-open sockets and a raw-socket fuzz.

python scripts/gate_on_aiohttp.py [--aiohttp VERSION ...] [--cases N] [--write]

Each version other than the installed one is put into a folder of its own (pip --target), which this process's Python
then finds first; nothing installed is changed. `--write` keeps the table in benchmarks/results/gate_security.md.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SEED = 20261129
VERSIONS = ("3.10.11", "3.11.15", "3.13.0", "3.14.5")
AT_ONCE = 40
QUIET_S = 0.25  # a connection on which nothing comes for so long is done with
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@dataclasses.dataclass
class Case:
    """What is sent on one connection. `meant`: method, path and body of what may arrive; all of it where `whole`."""

    number: int
    kind: str
    sent: bytes
    meant: list[tuple[str, str, bytes]]
    whole: bool


# --------------------------------------------------------------------------------------------------------- cases


def make_cases(count: int, credential: bytes, seed: int = SEED) -> Iterator[Case]:
    """Generate cases: every second of the odd kinds is mixed with a second oddity.

    Args:
        credential: header lines, each with its line end, that let the requests that are meant in; b"" for a stranger.
    """
    chance = random.Random(seed)
    for number in range(count):
        kind = chance.choice(sorted(KINDS))
        yield KINDS[kind](number, kind, credential, chance)


def _ask(number: int, credential: bytes, *lines: bytes, method: bytes = b"POST", tail: str = "") -> bytes:
    head = [b"%s /meant-%d%s HTTP/1.1" % (method, number, tail.encode()), b"Host: a.example", *lines]
    return b"\r\n".join(head) + b"\r\n" + credential + b"\r\n"


def _chunked(body: bytes, chance: random.Random, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    sent = b""
    while body:
        size = chance.randint(1, len(body))
        sent += b"%x%s\r\n%s\r\n" % (size, extension, body[:size])
        body = body[size:]
    return sent + b"0\r\n" + trailer + b"\r\n"


def _good(number: int, kind: str, credential: bytes, chance: random.Random) -> Case:
    """Well-formed requests, up to four on a connection: each must arrive, in order, with its body."""
    sent, meant = b"", []
    for index in range(chance.randint(1, 4)):
        tail = f"-{index}"
        body = chance.choice([b"", SMUGGLED, chance.randbytes(chance.randint(1, 3000))])
        way = chance.choice(["length", "chunks", "none"])
        method = chance.choice([b"POST", b"PUT", b"PATCH", b"DELETE"])
        if way == "length":
            sent += _ask(number, credential, b"Content-Length: %d" % len(body), method=method, tail=tail) + body
        elif way == "chunks":
            extension = chance.choice([b"", b";a=b", b' ; name="x y"'])
            trailer = chance.choice([b"", b"X-Trailer: 1\r\n", b"Transfer-Encoding: chunked\r\nContent-Length: 9\r\n"])
            sent += _ask(number, credential, b"Transfer-Encoding: chunked", method=method, tail=tail)
            sent += _chunked(body, chance, extension, trailer)
        else:
            body, method = b"", b"GET"
            odd = chance.choice(
                [b"X-A: 1", b"Cookie: a=\xff\xfe; b", b"X-B: \xe9", b"Upgrade: h2c", b"Expect: 100-continue"]
            )
            sent += _ask(number, credential, odd, method=method, tail=tail)
        meant.append((method.decode(), f"/meant-{number}{tail}", body))
    return Case(number, kind, sent, meant, whole=True)


def _two_lengths(number: int, kind: str, credential: bytes, chance: random.Random) -> Case:
    """Content-Length and Transfer-Encoding that disagree, or either of them in an odd spelling."""
    body = SMUGGLED
    lengths = [
        *(b"Content-Length: 0", b"Content-Length: %d" % len(body), b"Content-Length: +5", b"Content-Length: 0x5"),
        *(b"Content-Length: 5, 5", b"Content-Length: -1", b"Content-Length:\x0b5", b"Content-Length : 5"),
        *(b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: \xd9\xa5", b"Content-Length: 1_0"),
        *(b"Content-Length:", b"Content-Length: 99999999999999999999", b"Content_Length: 5", b"content-length: 00"),
    ]
    codings = [
        *(b"Transfer-Encoding: chunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding: xchunked"),
        *(
            b"Transfer-Encoding: chunked, identity",
            b"Transfer-Encoding: identity, chunked",
            b"Transfer-Encoding:\tchunked",
        ),
        *(b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding:\r\n chunked", b"X: y\nTransfer-Encoding: chunked"),
        *(
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
            b"\tTransfer-Encoding: chunked",
            b"Transfer-Encoding: gzip",
        ),
        *(b"Transfer-Encoding: CHUNKED\x00", b"Transfer-Encoding\x00: chunked", b"Transfer_Encoding: chunked"),
    ]
    lines = chance.sample(lengths, chance.randint(0, 2)) + chance.sample(codings, chance.randint(0, 2))
    chance.shuffle(lines)
    after = chance.choice([body, b"0\r\n\r\n" + body, b"5\r\nhello\r\n0\r\n\r\n" + body, b"1c\r\n" + body])
    return _odd(number, kind, _ask(number, credential, *lines) + after)


def _bad_chunks(number: int, kind: str, credential: bytes, chance: random.Random) -> Case:
    """Chunks whose borders one program may see elsewhere than another."""
    chunks = chance.choice(
        [
            *(b"5\nhello\n0\n\n", b"5\r\nhelloX\r\n0\r\n\r\n", b"5;a=\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n"),
            *(b"-1\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n", b"5 5\r\nhello\r\n0\r\n\r\n", b"fffffffffffffffff\r\nhello"),
            *(b"5;\r\x00\r\nhello\r\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"5\rhello\r\n0\r\n\r\n", b"\r\n0\r\n\r\n"),
            *(
                b"0\r\nX: y\n\r\n",
                b"0\r\n\tfold\r\n\r\n",
                b"0\r\nGET /smuggled HTTP/1.1\r\n\r\n",
                b"0\r\n" + b"X: y\r\n" * 3000,
            ),
            *(
                b"5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
                b"1_0\r\n" + b"x" * 16 + b"\r\n0\r\n\r\n",
                b"\xd9\xa5\r\nhello\r\n",
            ),
        ]
    )
    return _odd(number, kind, _ask(number, credential, b"Transfer-Encoding: chunked") + chunks + SMUGGLED)


def _bad_lines(number: int, kind: str, credential: bytes, chance: random.Random) -> Case:
    """Heads that are no HTTP/1.1, or not quite."""
    good = _ask(number, credential, b"X-A: 1", method=b"GET")
    target = b"/meant-%d" % number
    sent = chance.choice(
        [
            *(
                good.replace(b"\r\n", b"\n"),
                good.replace(b"\r\n", b"\r"),
                b"GET /smuggled\r\n",
                b"GET  " + target + b"\r\n\r\n",
            ),
            good.replace(b"X-A: 1", b"X-A: 1\r\n folded: GET /smuggled"),
            good.replace(
                b"X-A: 1",
                chance.choice([b"X A: 1", b": 1", b"X-A", b"X-A: \x00", b"X-A: 1\rB: 2", b"\x7f: 1", b"X-\xc3: 1"]),
            ),
            good.replace(
                b"HTTP/1.1", chance.choice([b"HTTP/2.0", b"HTTP/1.2", b"http/1.1", b"HTTP/1.1 ", b"HTTP/11", b"ICY"])
            ),
            good.replace(b"GET", chance.choice([b"get", b"CONNECT", b"TRACE", b"G\x00T", b"PRI", b"X" * 70, b"GET\t"])),
            good.replace(
                target,
                chance.choice(
                    [b"http://other" + target, b"*", b"//x:y" + target, target + b"#f", target + b"\xff", b"a"]
                ),
            ),
            good.replace(
                b"Host: a.example",
                chance.choice([b"X: y", b"Host: a\r\nHost: b", b"Host: a b", b"Host: a/@b", b"Host: \xff"]),
            ),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(60),
            b"\r\n\r\n\r\n" + good,
            good.replace(b"X-A: 1", b"\r\n".join(b"X-%d: y" % index for index in range(500))),
            good.replace(b"X-A: 1", b"X-A: " + b"a" * 80_000),
            good.replace(b"X-A: 1", b"Content-Type: a/b\r\nContent-Type: c/d"),
        ]
    )
    return _odd(number, kind, sent + SMUGGLED)


def _upgrades(number: int, kind: str, credential: bytes, chance: random.Random) -> Case:
    """Requests for another protocol, with a request where its bytes would be."""
    wanted = chance.choice(
        [
            [b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABkAAQAAP__"],
            [b"Upgrade: websocket", b"Connection: Upgrade"],
            [b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Key: x", b"Sec-WebSocket-Version: 13"],
            [b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 999"],
            [b"Upgrade: websocket, h2c", b"Connection: upgrade"],
            [b"Upgrade: TLS/1.0", b"Connection: Upgrade"],
            [b"Upgrade: websocket", b"Connection: Upgrade", b"Content-Length: 3"],
        ]
    )
    return _odd(number, kind, _ask(number, credential, *wanted, method=chance.choice([b"GET", b"POST"])) + SMUGGLED)


def _pipelined(number: int, kind: str, credential: bytes, chance: random.Random) -> Case:
    """A good request with one of a stranger behind it, whole, cut or after a body that is too short."""
    first = chance.choice(
        [_ask(number, credential, method=b"GET"), _ask(number, credential, b"Content-Length: 2") + b"ok"]
    )
    second = chance.choice(
        [SMUGGLED, SMUGGLED * 50, SMUGGLED[:20], b"\r\n" + SMUGGLED, b"\n" + SMUGGLED, b"x" + SMUGGLED]
    )
    return _odd(number, kind, first + second)


def _garbled(number: int, kind: str, credential: bytes, chance: random.Random) -> Case:
    """A good case with some bytes changed, left out or doubled."""
    sent = bytearray(_good(number, kind, credential, chance).sent.replace(b"/meant-", b"/maybe-"))
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(sent))
        change = chance.choice(["set", "cut", "double", "line"])
        if change == "set":
            sent[place] = chance.choice([0, 10, 13, 32, 58, 255, chance.randrange(256)])
        elif change == "cut":
            del sent[place : place + chance.randint(1, 3)]
        elif change == "double":
            sent[place:place] = sent[place : place + chance.randint(1, 8)]
        else:
            sent[place:place] = b"\r\n"
        if not sent:
            break
    return _odd(number, kind, bytes(sent))


def _odd(number: int, kind: str, sent: bytes) -> Case:
    return Case(number, kind, sent, [], whole=False)


KINDS: dict[str, Any] = {
    "good": _good,
    "two lengths": _two_lengths,
    "chunks": _bad_chunks,
    "lines": _bad_lines,
    "upgrades": _upgrades,
    "pipelined": _pipelined,
    "garbled": _garbled,
}


# ------------------------------------------------------------------------------- the server behind, and sending


class Recorder:
    """A server of bare sockets that keeps every byte of every connection, and answers each request that is whole."""

    def __init__(self) -> None:
        self.connections: list[bytearray] = []
        self.port = 0

    async def __aenter__(self) -> "Recorder":
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received, answered = bytearray(), 0
        self.connections.append(received)
        with contextlib.suppress(OSError):
            while part := await reader.read(65536):
                received += part
                requests, _rest = read_requests(bytes(received))
                for _ in requests[answered:]:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                answered = max(answered, len(requests))
                await writer.drain()
        writer.close()

    def requests(self) -> list[tuple[str, str, bytes]]:
        """Everything that has come, in requests.

        Raises:
            ValueError: something came that leaves a choice where a request ends.
        """
        return [one for received in self.connections for one in read_requests(bytes(received))[0]]


def read_requests(received: bytes) -> tuple[list[tuple[str, str, bytes]], bytes]:
    """Cut bytes into requests by the letter of RFC 9112; gives them and the rest that is not whole yet.

    Raises:
        ValueError: there is more than one way to read it.
    """
    found = []
    while b"\r\n\r\n" in received:
        head, _, rest = received.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        line = re.fullmatch(rb"([A-Z]+) (/[\x21-\x7e]*) HTTP/1\.1", first)
        headers: dict[bytes, list[bytes]] = {}
        for one in lines:
            header = re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([^\r\n\0]*)", one)
            if not header:
                raise ValueError(f"a header that is none: {one!r}")
            headers.setdefault(header[1].lower(), []).append(header[2])
        lengths, codings = headers.get(b"content-length", []), headers.get(b"transfer-encoding", [])
        if not line or len(lengths) + len(codings) > 1 or len(headers.get(b"host", [])) != 1:
            raise ValueError(f"a head that leaves a choice: {head!r}")
        if codings:
            if codings != [b"chunked"]:
                raise ValueError(f"a coding: {codings}")
            body = b""
            while True:
                size, end, more = rest.partition(b"\r\n")
                if not end:
                    return found, received
                if not re.fullmatch(rb"[0-9a-fA-F]+", size):
                    raise ValueError(f"a chunk that is none: {size!r}")
                length = int(size, 16)
                if len(more) < length + 2:
                    return found, received
                if more[length : length + 2] != b"\r\n":
                    raise ValueError("a chunk without an end")
                body, rest = body + more[:length], more[length + 2 :]
                if length == 0:
                    break
        else:
            length = int(lengths[0]) if lengths else 0
            if len(rest) < length:
                return found, received
            body, rest = rest[:length], rest[length:]
        found.append((line[1].decode(), line[2].decode(), body))
        received = rest
    return found, received


async def send(port: int, sent: bytes, chance: random.Random, quiet_s: float = QUIET_S) -> bytes:
    """Send bytes in some pieces; gives what is answered until nothing comes for a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    with contextlib.suppress(OSError, asyncio.TimeoutError, TimeoutError):
        cut = sorted(chance.randrange(len(sent) + 1) for _ in range(chance.randint(0, 3)))
        for start, end in zip([0, *cut], [*cut, len(sent)], strict=True):
            writer.write(sent[start:end])
            await writer.drain()
            if cut:
                await asyncio.sleep(0.001)
        while part := await asyncio.wait_for(reader.read(65536), quiet_s):
            answer += part
    writer.close()
    return answer


async def fuzz(count: int, *, login: bool, seed: int = SEED) -> dict[str, Any]:
    """Send cases to a gate in front of a recorder; gives counts, and `problems`, which must be empty."""
    from fastsd_helpers.tunnels import Login, open_gate

    async with Recorder() as recorder:
        gate = await asyncio.to_thread(open_gate, recorder.port, Login("fastsd", "gate-password-1"))
        try:
            credential = b"Authorization: Basic ZmFzdHNkOmdhdGUtcGFzc3dvcmQtMQ==\r\n" if login else b""
            cases = list(make_cases(count, credential, seed))
            chance, gates = random.Random(seed), asyncio.Semaphore(AT_ONCE)
            answers: dict[int, bytes] = {}

            async def one(case: Case) -> None:
                async with gates:
                    quiet_s = 4 if login and case.whole else QUIET_S
                    sent = case.sent
                    if case.whole:  # the last one closes, so that nobody has to wait
                        head, _, rest = sent.rpartition(b"Host: a.example\r\n")
                        sent = head + b"Host: a.example\r\nConnection: close\r\n" + rest
                    answers[case.number] = await send(gate.port, sent, chance, quiet_s)

            await asyncio.gather(*(one(case) for case in cases))
        finally:
            await asyncio.to_thread(gate.close)
        return _judge(cases, answers, recorder, login)


def _judge(cases: list[Case], answers: dict[int, bytes], recorder: Recorder, login: bool) -> dict[str, Any]:
    problems = []
    try:
        arrived = recorder.requests()
    except ValueError as err:
        return {"problems": [str(err)], "cases": len(cases), "arrived": -1, "statuses": {}}
    if not login and any(recorder.connections):
        problems.append(f"{len(arrived)} requests arrived without a login")
    by_case: dict[int, list[tuple[str, str, bytes]]] = {}
    for method, path, body in arrived:
        found = re.search(r"/meant-(\d+)", path)
        if found:
            by_case.setdefault(int(found[1]), []).append((method, path, body))
        elif "smuggled" in path:
            problems.append(f"{method} {path} arrived")
    statuses: dict[str, int] = {}
    for case in cases:
        # Not in order: they may have taken several connections to the server behind.
        if login and case.whole and sorted(by_case.get(case.number, [])) != sorted(case.meant):
            problems.append(f"case {case.number}: {len(by_case.get(case.number, []))} of {len(case.meant)} arrived")
        if not login and re.search(rb"aiohttp|Python|Traceback", answers[case.number]):
            problems.append(f"case {case.number} ({case.kind}) was told of the program")
        for status in re.findall(rb"HTTP/1\.1 (\d+) [^\r]*\r\n", answers[case.number]):
            statuses[status.decode()] = statuses.get(status.decode(), 0) + 1
            # The recorder opens no WebSocket, which is 502; nothing else is a failure of the server behind.
            if status.startswith(b"5") and case.kind != "upgrades":
                problems.append(f"case {case.number} ({case.kind}) was answered {status.decode()}")
    return {"problems": problems[:20], "cases": len(cases), "arrived": len(arrived), "statuses": statuses}


# -------------------------------------------------------------------------------------------------- the other figures


def bomb() -> bytes:
    """A gzip body of 398 kB that unpacks to 410 MB."""
    packer, block = zlib.compressobj(9, wbits=31), bytes(2**20)
    return b"".join([packer.compress(block) for _ in range(391)] + [packer.flush()])


def memory_mb() -> float:
    """The most memory this process has had since `forget_peak`."""
    with contextlib.suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


async def bombs() -> dict[str, Any]:
    """Send four bombs without a login to each of three doors; gives the memory they cost."""
    from fastsd_helpers.tunnels import Login, open_gate

    body, chance = bomb(), random.Random(SEED)
    async with Recorder() as recorder:
        gate = await asyncio.to_thread(open_gate, recorder.port, Login("fastsd", "gate-password-1"))
        try:
            kind = b"Content-Type: application/x-www-form-urlencoded\r\nContent-Encoding: gzip\r\nHost: a\r\n"
            await send(gate.port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", chance)
            forget_peak()
            before, seconds = memory_mb(), time.process_time()
            statuses = []
            for path in (b"/", b"/.fastsd/login", b"/login"):
                for _ in range(2):
                    head = b"POST %s HTTP/1.1\r\n%s" % (path, kind)
                    statuses.append(
                        (await send(gate.port, head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body), chance, 1))[
                            9:12
                        ]
                    )
                    chunks = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
                    statuses.append((await send(gate.port, head + chunks, chance, 1))[9:12])
            used = {"more_mb": memory_mb() - before, "processor_s": time.process_time() - seconds}
        finally:
            await asyncio.to_thread(gate.close)
        return {
            **used,
            "statuses": sorted({status.decode() for status in statuses}),
            "arrived": len(recorder.connections),
        }


async def packed() -> int:
    """Send packed bodies with a login; gives how many of 16 arrived byte for byte."""
    from fastsd_helpers.tunnels import Login, open_gate

    chance, good = random.Random(SEED), 0
    async with Recorder() as recorder:
        gate = await asyncio.to_thread(open_gate, recorder.port, Login("fastsd", "gate-password-1"))
        try:
            for number in range(16):
                coding = (b"gzip", b"deflate", b"br", b"zstd")[number % 4]
                body = zlib.compress(chance.randbytes(5000)) if number < 8 else chance.randbytes(9000)
                lines = b"Authorization: Basic ZmFzdHNkOmdhdGUtcGFzc3dvcmQtMQ==\r\nContent-Encoding: %s\r\n" % coding
                if number % 8 < 4:
                    sent = lines + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
                else:
                    sent = lines + b"Transfer-Encoding: chunked\r\n\r\n" + _chunked(body, chance)
                await send(gate.port, b"POST /packed HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + sent, chance)
                received = bytes(b"".join(recorder.connections))
                kept = b"Content-Encoding: " + coding in received
                good += kept and recorder.requests()[-1] == ("POST", "/packed", body)
        finally:
            await asyncio.to_thread(gate.close)
    return good


async def half_open(count: int = 200) -> list[float]:
    """Open connections that never end their head; gives the seconds that a page then takes, five times."""
    from fastsd_helpers.tunnels import Login, open_gate

    seconds, kept = [], []
    async with Recorder() as recorder:
        gate = await asyncio.to_thread(open_gate, recorder.port, Login("fastsd", "gate-password-1"))
        try:
            for number in range(count):
                _reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
                writer.write(
                    (b"GET / HTTP/1.1\r\nHost: a\r\nX-", b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")[
                        number % 2
                    ]
                )
                kept.append(writer)
            await asyncio.sleep(0.5)
            for _ in range(5):
                start = time.monotonic()
                reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
                writer.write(b"GET /.fastsd/login HTTP/1.1\r\nHost: a\r\n\r\n")
                await asyncio.wait_for(reader.readuntil(b"</html>"), 20)
                seconds.append(time.monotonic() - start)
                writer.close()
        finally:
            for writer in kept:
                writer.close()
            await asyncio.to_thread(gate.close)
    return seconds


async def all_figures(cases: int) -> dict[str, Any]:
    """Everything, with the aiohttp that is found here."""
    import aiohttp

    return {
        "aiohttp": aiohttp.__version__,
        "bombs": await bombs(),
        "packed": await packed(),
        "half_open_s": max(await half_open()),
        "stranger": await fuzz(cases // 2, login=False),
        "visitor": await fuzz(cases - cases // 2, login=True, seed=SEED + 1),
    }


def measure(version: str, cases: int, folder: Path) -> dict[str, Any]:
    """The figures of one version, in a Python of its own."""
    import importlib.metadata

    places = [str(ROOT)]
    if importlib.metadata.version("aiohttp") != version:
        place = folder / version
        if not place.is_dir():
            pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(place), f"aiohttp=={version}"]
            subprocess.run(pip, check=True)
        places.insert(0, str(place))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, __file__, "--inside", "--cases", str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"aiohttp {version}: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout), "said": len(done.stderr)}


def main() -> None:
    """Measure, print, and keep the table when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiohttp", nargs="+", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--cases", type=int, default=5000, help="of the fuzz, half of them without a login")
    parser.add_argument("--folder", type=Path, help="where the other versions are kept; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/gate_security.md")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        sys.stdout.write(json.dumps(asyncio.run(all_figures(chosen.cases))))
        return
    lines = [
        "| aiohttp | 12 bombs before login, MB more | processor, s | packed bodies as sent | page, 200 half-open, s "
        "| fuzz, no login: cases, arrived | fuzz, login: cases, arrived | problems | printed, bytes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    failed = False
    with contextlib.ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for version in chosen.aiohttp:
            row = measure(version, chosen.cases, folder)
            stranger, visitor = row["stranger"], row["visitor"]
            problems = stranger["problems"] + visitor["problems"]
            failed |= bool(problems) or row["bombs"]["more_mb"] > 20 or row["packed"] != 16
            lines.append(
                f"| {row['aiohttp']} | {row['bombs']['more_mb']:.1f} | {row['bombs']['processor_s']:.2f} | "
                f"{row['packed']} of 16 | {row['half_open_s']:.3f} | {stranger['cases']}, {stranger['arrived']} | "
                f"{visitor['cases']}, {visitor['arrived']} | {'; '.join(problems) or 'none'} | {row['said']} |"
            )
            sys.stdout.write(f"{lines[-1]}\n{stranger['statuses']} {visitor['statuses']}\n")
            sys.stdout.flush()
    if chosen.write:
        about = (
            f"# What strangers cannot do at the login gate\n\n{datetime.date.today()}, {platform.machine()}, "
            f"{os.cpu_count()} cores, Python {platform.python_version()}, seed {SEED}. Made by "
            "`scripts/gate_on_aiohttp.py`; 5xx answers, requests that arrive without being meant, and meant ones that "
            "do not arrive are problems.\n\n"
        )
        text = about + "\n".join(lines) + "\n"
        (ROOT / "benchmarks" / "results" / "gate_security.md").write_text(text, encoding="utf-8")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
