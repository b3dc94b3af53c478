"""The public side of a share service for a browser: https for any name, and the name decides which port answers."""

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

__all__ = ["open_front"]

# Of the network for documentation: what a visitor's address is said to be.
VISITOR = "203.0.113.7"


@contextlib.contextmanager
def open_front(folder: Path, ports: Mapping[str, int], other: int) -> Iterator[int]:
    """Take TLS off and pass requests on, as a tunnel's public end does; gives the port where it listens.

    Args:
        folder: for its key and certificate, which nobody else trusts.
        ports: what is asked for (a Host header) -> port of this machine. It may grow.
        other: port for all other names.
    """
    front = _Front(folder, ports, other)
    thread = threading.Thread(target=lambda: asyncio.run(front.run()), daemon=True)
    thread.start()
    assert front.started.wait(10)
    try:
        yield front.port
    finally:
        front.loop.call_soon_threadsafe(front.stop.set)
        thread.join(10)


class _Front:
    def __init__(self, folder: Path, ports: Mapping[str, int], other: int) -> None:
        self.port, self.started = 0, threading.Event()
        self._ports, self._other = ports, other
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(*_certificate(folder))

    async def run(self) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls, backlog=200)
        self.port = server.sockets[0].getsockname()[1]
        self.started.set()
        await self.stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            host, head = _as_a_tunnel_says_it(head.decode("latin-1"))
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._ports.get(host, self._other))
            far_writer.write(head.encode("latin-1"))
            ways = {asyncio.ensure_future(_pump(reader, far_writer)), asyncio.ensure_future(_pump(far_reader, writer))}
            _, left = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in left:
                way.cancel()
            far_writer.close()
        writer.close()


def _as_a_tunnel_says_it(head: str) -> tuple[str, str]:
    start, *lines = head.rstrip("\r\n").split("\r\n")
    fields = [line.partition(":")[::2] for line in lines]
    host = next((value.strip() for name, value in fields if name.lower() == "host"), "")
    upgrades = any(name.lower() == "upgrade" for name, _ in fields)
    # One request on a connection, so that only one head has to be read.
    dropped = () if upgrades else ("connection",)
    kept = [f"{name}:{value}" for name, value in fields if name.lower() not in dropped]
    added = [f"X-Forwarded-For: {VISITOR}", "X-Forwarded-Proto: https", f"X-Forwarded-Host: {host}"]
    return host, "\r\n".join([start, *kept, *added, *([] if upgrades else ["Connection: close"]), "", ""])


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(2**16):
            sink.write(data)
            await sink.drain()


def _certificate(folder: Path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed (apt install openssl)")
    certificate, key = folder / "front.pem", folder / "front.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key
